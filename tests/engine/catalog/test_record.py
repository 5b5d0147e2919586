"""What a run directory says about its run: of runs that end, fail, go on, are killed; and of broken directories."""

import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from warm_python import WarmPython

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    Callback,
    LossError,
    Metrics,
    RunCatalog,
    RunRecord,
    StepEnd,
    StepPoint,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    edit_labels,
    encode,
    in_step,
    read_events,
    read_run,
)
from offloop.engine.catalog import log_end
from offloop.engine.catalog import record as record_module
from offloop.engine.catalog.summary import Summary
from offloop.engine.checkpoint.lock import has_writer
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_trainer

NOBODY = 65534
WRITER = """
import sys
from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, in_step
from offloop.engine.checkpoint.lock import has_writer
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_trainer

class Wait(Callback):
    def on_validation_end(self, event, run):
        print("validated", flush=True)

    @in_step
    def after_step(self, point):
        if point.step == 12:
            sys.stdin.readline()

trainer = tiny_trainer(run_dir=sys.argv[1], run_name="r")
callbacks = [Wait(), *([ModelCheckpoint()] if "checkpoints" in sys.argv else [])]
resume = "auto" if "resume" in sys.argv else None
trainer.train(tiny_loader(), epochs=2, val_loader=tiny_loader(2), callbacks=callbacks, resume=resume)
"""


def train(directory: Path, name: str = "r", *callbacks: Callback, **arguments: Any) -> None:
    trainer = tiny_trainer(run_dir=str(directory), run_name=name)
    trainer.train(tiny_loader(), callbacks=list(callbacks), **{"epochs": 2, **arguments})


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    return script


def test_record_of_a_run_that_completed(tmp_path: Path) -> None:
    train(tmp_path, val_loader=tiny_loader(2))
    record = read_run(tmp_path / "r")
    assert (record.key, record.id, record.name) == ("r", "r", "r")
    assert (record.state, record.why, record.has_ended) == ("completed", "", True)
    assert (record.step, record.epoch, record.attempt) == (16, 2, 0)
    assert (record.monitor, record.mode, record.pid) == ("val_loss", "min", os.getpid())
    described = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record.metrics["val_loss"].last == described["metrics"]["val_loss"]
    assert record.metrics["val_loss"].best == described["best"]["score"]
    assert record.started == record.created == described["created"] <= record.heard


def test_record_of_a_run_that_failed_says_why(tmp_path: Path) -> None:
    class Fails(Callback):
        on_error = "raise"

        @in_step
        def after_step(self, point: StepPoint) -> None:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        train(tmp_path, "r", Fails())
    record = read_run(tmp_path / "r")
    assert (record.state, record.why) == ("failed", "RuntimeError: no more")


def test_record_of_a_run_in_this_process_while_it_goes_on_and_ends(tmp_path: Path) -> None:
    seen: list[RunRecord] = []

    class Look(Callback):
        async def on_event(self, event: object, run: Any) -> None:
            seen.append(read_run(run.dir))

        def close(self) -> None:
            seen.append(read_run(tmp_path / "r"))

    train(tmp_path, "r", Look(), val_loader=tiny_loader(2))
    states = [record.state for record in seen]
    assert set(states) <= {"running", "validating", "completed"}, states
    assert states[-1] == "completed"
    assert {record.why for record in seen} == {""}


@pytest.mark.parametrize("extra", [[], ["checkpoints"]])
def test_a_writer_that_is_killed_is_lost_and_a_resumed_one_runs(
    tmp_path: Path, writer: Path, warm_python: WarmPython, extra: list[str]
) -> None:
    runs = tmp_path / "runs"
    catalog = RunCatalog(runs)
    with warm_python.start(writer, str(runs), *extra) as child:
        assert child.stdout.readline() == "validated\n"
        catalog.refresh()
        # The log has it a moment later
        while "val_loss" not in (record := catalog.records["r"]).metrics:
            assert (record.why, catalog.refresh()[1]) == ("", [])
        assert (record.state, record.why) == ("running", "")
        assert record.metrics["val_loss"].best == record.metrics["val_loss"].last
        assert (record.epochs, record.parameters, record.device) == (2, 195, "cpu")
        assert record.progress is not None and 0.4 < record.progress < 1
        # Its lock was only looked at
        assert read_run(runs / "r").state == "running"
    (record,), _ = catalog.refresh()
    assert record.state == "lost"
    assert record.why.startswith("ended without saying so, last heard ")
    assert catalog.refresh() == ([], [])
    with warm_python.start(writer, str(runs), *extra, "resume") as child:
        # It starts while the catalog looks
        child.stdin.write("\n")
        child.stdin.flush()
        while child.stdout.readline():
            catalog.refresh()
        assert child.wait() == 0, child.stderr.read()
    catalog.refresh()
    record = catalog.records["r"]
    assert (record.state, record.attempt) == ("completed", 1)


def test_a_start_is_not_kept_from_its_lock_by_readers(tmp_path: Path, warm_python: WarmPython) -> None:
    """Readers look at the locks all the time while runs start, end and are resumed."""
    script = tmp_path / "reader.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom offloop.engine.checkpoint.lock import has_writer\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    try:\n        has_writer(Path(sys.argv[1]))\n    except OSError:\n        pass\n"
    )
    with warm_python.start(script, str(tmp_path / "r")) as reader:
        assert reader.stdout.readline() == "ready\n"
        train(tmp_path, "r", ModelCheckpoint(), epochs=1)
        for epochs in range(2, 12):
            train(tmp_path, "r", ModelCheckpoint(), epochs=epochs, resume="last")
    assert read_run(tmp_path / "r").attempt == 10


def test_the_lock_is_held_until_run_json_says_how_the_run_ended(tmp_path: Path) -> None:
    held: list[bool | None] = []

    class Look(Callback):
        async def on_train_end(self, event: TrainEnd, run: Any) -> None:
            held.append(has_writer(run.dir))

        def close(self) -> None:
            held.append(has_writer(tmp_path / "r"))

    train(tmp_path, "r", Look(), ModelCheckpoint())
    assert held == [True, True]
    assert has_writer(tmp_path / "r") is False


def test_runs_of_other_hosts_and_disks_without_locks_are_judged_by_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    run = tmp_path / "r"
    path = run / "run.json"
    described = json.loads(path.read_text()) | {"status": "running", "host": "elsewhere"}
    path.write_text(json.dumps(described))
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:-1]))
    assert read_run(run).state == "running"
    os.utime(run / "events.jsonl", (0, 0))
    os.utime(path, (0, 0))
    record = read_run(run)
    assert record.state == "lost"
    assert record.why.startswith("silent, last heard 1970-01-01 ") and "elsewhere" in record.why
    path.write_text(json.dumps(described | {"host": os.uname().nodename}))
    os.utime(path, (0, 0))
    assert read_run(run).why.startswith("ended without saying so")
    monkeypatch.setattr(record_module, "has_writer", lambda path: None)
    assert "the file system has no locks" in read_run(run).why


def make_pipe(run: Path) -> None:
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")


def break_run_json(run: Path, content: bytes) -> None:
    (run / "run.json").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "state", "why"),
    [
        (lambda run: (run / "run.json").unlink(), "completed", "run.json is missing"),
        (lambda run: break_run_json(run, b""), "completed", "run.json is empty"),
        (lambda run: break_run_json(run, b'{"status": '), "completed", "run.json is no JSON object"),
        (lambda run: break_run_json(run, b"[" * 9000), "completed", "run.json is no JSON object"),
        (lambda run: break_run_json(run, b"[1]"), "completed", "run.json is no JSON object"),
        (lambda run: break_run_json(run, b"\xff"), "completed", "run.json is no JSON object"),
        (
            lambda run: break_run_json(run, b'{"schema": 99, "status": "completed", "metrics": [1]}'),
            "completed",
            "run.json was written by a later version of offloop (schema 99, known is 1)",
        ),
        (
            lambda run: shutil.copy(run / "events.jsonl", run / "labels.json"),
            "completed",
            "labels.json holds no labels",
        ),
        (
            make_pipe,
            "completed",
            "run.json cannot be read: it is no regular file",
        ),
        (
            lambda run: [(run / "run.json").rename(run / "x"), (run / "run.json").symlink_to(run / "x")],
            "completed",
            "run.json cannot be read: it is a link, and links are not followed",
        ),
        (lambda run: (run / "events.jsonl").unlink(), "completed", ""),
        (lambda run: shutil.rmtree(run), "lost", "cannot be read: no such file or directory"),
    ],
)
def test_each_fault_is_a_record_with_a_reason(tmp_path: Path, damage: Any, state: str, why: str) -> None:
    train(tmp_path)
    damage(tmp_path / "r")
    record = read_run(tmp_path / "r")
    assert record.state == state
    assert record.why.startswith(why) and bool(record.why) == bool(why)


@pytest.mark.parametrize("status", ["running", "completed"])
@pytest.mark.parametrize("value", [None, True, 3, -1.5, 1e400, "x", "NaN", [], [{}], {}, {"best": []}])
def test_no_value_of_run_json_raises(tmp_path: Path, value: object, status: str) -> None:
    train(tmp_path)
    described = json.loads((tmp_path / "r" / "run.json").read_text())
    for name in [*described, "summary", "limits", "hyperparameters", "sparkline", "schema", "ended"]:
        changed = described | {"status": status} | {name: value}
        (tmp_path / "r" / "run.json").write_text(json.dumps(changed))
        record = read_run(tmp_path / "r")
        assert isinstance(record, RunRecord)
        assert record.progress is None or 0 <= record.progress <= 1


def test_catalog_finds_runs_to_a_depth_of_three_and_follows_no_links(tmp_path: Path) -> None:
    train(tmp_path / "outside", "secret")
    runs = tmp_path / "runs"
    train(runs, "a")
    for nested in ("sweep/b", "x/y/c", "x/y/z/too-deep", ".hidden/d", "a/inner"):
        (runs / nested).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(runs / "a", runs / nested, ignore=shutil.ignore_patterns("inner"))
    (runs / "link").symlink_to(tmp_path / "outside")
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    changed, removed = RunCatalog(runs).refresh()
    assert sorted(record.key for record in changed) == ["a", "sweep/b", "x/y/c"]
    assert {record.id for record in changed} == {"a"} and removed == []


def test_catalog_tells_what_has_changed(tmp_path: Path) -> None:
    catalog = RunCatalog(tmp_path)
    assert catalog.refresh() == ([], [])
    for name in ("a", "b", "c"):
        train(tmp_path, name)
    assert [record.key for record in catalog.refresh()[0]] == ["a", "b", "c"]
    assert catalog.refresh() == ([], [])
    edit_labels(tmp_path / "a", version=0, name="best of all", tags=["x"])
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "c").rename(tmp_path / "d")
    changed, removed = catalog.refresh()
    assert [(record.key, record.name) for record in changed] == [("a", "best of all"), ("d", "c")]
    assert sorted(removed) == ["b", "c"]
    train(tmp_path, "a2")
    assert [record.key for record in catalog.refresh()[0]] == ["a2"]


def test_catalog_of_one_run_and_of_none(tmp_path: Path) -> None:
    train(tmp_path)
    (record,), _ = RunCatalog(tmp_path / "r").refresh()
    assert (record.key, record.state) == ("r", "completed")
    catalog = RunCatalog(tmp_path / "gone")
    assert catalog.refresh() == ([], [])
    assert catalog.problem == f"{tmp_path / 'gone'} cannot be read: no such file or directory"


def test_run_json_that_disappears_leaves_the_run_in_the_list(tmp_path: Path) -> None:
    train(tmp_path)
    catalog = RunCatalog(tmp_path)
    catalog.refresh()
    (tmp_path / "r" / "run.json").unlink()
    (record,), removed = catalog.refresh()
    assert (record.state, record.why, removed) == ("completed", "run.json is missing", [])


@pytest.fixture
def as_user() -> Iterator[Path]:
    """A directory of a user who is not root, as whom the test runs."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


def test_a_directory_that_loses_its_permission_keeps_its_row(as_user: Path) -> None:
    for name, status in (("a", "completed"), ("sweep/b", "running")):
        (as_user / name).mkdir(parents=True)
        for file in ("run.json", "events.jsonl"):
            (as_user / name / file).write_text(f'{{"status": "{status}"}}')
    catalog = RunCatalog(as_user)
    catalog.refresh()
    for name in ("a", "sweep"):
        (as_user / name).chmod(0)
    try:
        changed, removed = catalog.refresh()
        fresh, _ = RunCatalog(as_user).refresh()
    finally:
        for name in ("a", "sweep"):
            (as_user / name).chmod(0o755)
    why = "cannot be read: permission denied"
    assert {record.key: (record.state, record.why) for record in changed} == {
        "a": ("completed", why),
        "sweep/b": ("lost", why),
    }
    assert removed == []
    assert {record.key: (record.state, record.why) for record in fresh} == {
        "a": ("lost", why),
        "sweep": ("lost", why),
    }
    assert {record.why for record in catalog.refresh()[0]} == {""}


def test_a_directory_that_hangs_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        train(tmp_path, name)
    catalog = RunCatalog(tmp_path)
    catalog.no_answer = 0.05
    catalog.refresh()
    answers, real = threading.Event(), os.lstat

    def lstat(path: Any) -> os.stat_result:
        # A disk that does not answer can only be imitated
        if str(path).startswith(str(tmp_path / "b")):
            answers.wait()
        return real(path)

    monkeypatch.setattr(os, "lstat", lstat)
    edit_labels(tmp_path / "c", version=0, note="new")
    try:
        changed, removed = catalog.refresh()
        assert {record.key: record.why for record in changed} == {
            "b": "its directory does not answer",
            "c": "",
        }
        assert removed == [] and catalog.refresh() == ([], [])
    finally:
        answers.set()
    for thread in catalog._stuck.values():
        thread.join()
    assert [(record.key, record.why) for record in catalog.refresh()[0]] == [("b", "")]


# Values --------------------------------------------------------------------------------------------


def test_best_values_and_sparkline_count_earlier_attempts(tmp_path: Path) -> None:
    loader = tiny_loader(2)
    train(tmp_path, "r", ModelCheckpoint(), epochs=3, val_loader=loader)
    train(
        tmp_path,
        "r",
        ModelCheckpoint(),
        epochs=6,
        val_loader=loader,
        resume="last",
    )
    record = read_run(tmp_path / "r")
    points = [
        (event.step, event.metrics["val_loss"])
        for event in read_events(tmp_path / "r")
        if isinstance(event, ValidationEnd)
    ]
    assert len(points) == 6 and record.attempt == 1
    best_step, best = min(points, key=lambda point: point[1])
    val_loss = record.metrics["val_loss"]
    assert (val_loss.last, val_loss.best, val_loss.best_step, val_loss.mode) == (
        points[-1][1],
        best,
        best_step,
        "min",
    )
    assert record.sparkline == tuple(float(f"{value:.4g}") for _, value in points)
    assert record.metrics["loss"].best is None
    # The same without what run.json says at the end
    described = json.loads((tmp_path / "r" / "run.json").read_text())
    for name in ("status", "summary", "sparkline", "metrics", "best"):
        del described[name]
    (tmp_path / "r" / "run.json").write_text(json.dumps(described))
    from_log = read_run(tmp_path / "r")
    assert from_log.metrics == {**record.metrics, "loss": from_log.metrics["loss"]}
    assert from_log.sparkline == record.sparkline


def test_a_loss_that_is_not_finite_is_the_last_one(tmp_path: Path) -> None:
    batches = tiny_batches(4)
    batches[3][0].fill_(float("nan"))
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="r")
    with pytest.raises(LossError):
        trainer.train(batches, epochs=1)
    record = read_run(tmp_path / "r")
    assert record.state == "failed" and record.why.startswith("LossError: ")
    assert math.isnan(record.metrics["loss"].last)


def test_the_end_of_a_long_log_is_read_and_losses_are_sampled_from_all_of_it(tmp_path: Path) -> None:
    lines = [encode(TrainStart(run_id="r", seq=0, time=1.0, step=0, epochs=4, device="cpu"))]
    for step in range(1, 20_001):
        lines.append(encode(StepEnd(seq=step, time=float(step), step=step, epoch=1, lr=0.1, loss=1.0 / step)))
    lines.append(encode(ValidationEnd(seq=20_001, time=30_000.0, step=20_000, metrics=Metrics(val_loss=0.5))))
    content = b"".join(line + b"\n" for line in lines)
    assert len(content) > log_end.WHOLE
    (tmp_path / "events.jsonl").write_bytes(content + b'{"type":"StepEnd","half')
    record = read_run(tmp_path)
    assert (record.step, record.heard, record.epochs, record.device) == (20_000, 30_000.0, 4, "cpu")
    # Whether it is the best is not known: only the end was read
    assert (record.metrics["val_loss"].last, record.metrics["val_loss"].best) == (0.5, None)
    assert record.metrics["loss"].last == 1.0 / 20_000
    assert len(record.sparkline) == 32 and list(record.sparkline) == sorted(record.sparkline, reverse=True)
    assert record.sparkline[0] == 1.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=500))
def test_summary_is_bounded_and_true(values: list[float]) -> None:
    summary = Summary("val_x", lambda name: "max")
    for step, value in enumerate(values):
        summary.take(ValidationEnd(step=step, metrics=Metrics(val_x=value)))
    assert len(summary.sparkline) <= 32 and len(summary._values) <= 64
    if values:
        metric = summary.metrics["val_x"]
        finite = [value for value in values if math.isfinite(value)]
        assert metric.last == values[-1] or math.isnan(metric.last)
        assert metric.best == (max(finite) if finite else None)
        if metric.best is not None:
            assert metric.best_step == values.index(metric.best)
        if summary.sparkline:
            assert summary.sparkline[0] == float(f"{finite[0]:.4g}")
            assert summary.sparkline[-1] == float(f"{finite[-1]:.4g}")
    json.loads(json.dumps(summary.as_settings(), allow_nan=False))


@given(
    described=st.binary(max_size=200), cut=st.floats(0, 1), junk=st.binary(max_size=100), at=st.floats(0, 1)
)
def test_no_content_of_a_directory_raises(
    described: bytes, cut: float, junk: bytes, at: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("run")
    events = [
        TrainStart(seq=0, time=1.0, step=0),
        *(StepEnd(seq=step, time=1.0 + step, step=step, lr=0.1, loss=0.5) for step in range(1, 6)),
        ValidationEnd(seq=6, time=7.0, step=5, metrics=Metrics(val_loss=0.25)),
        TrainEnd(seq=7, time=8.0, step=5, status="completed"),
    ]
    log = b"".join(encode(event) + b"\n" for event in events)
    place = int(at * len(log))
    log = (log[:place] + junk + log[place:])[: int(cut * (len(log) + len(junk)))]
    (directory / "events.jsonl").write_bytes(log)
    (directory / "run.json").write_bytes(described)
    (directory / "labels.json").write_bytes(junk)
    record = read_run(directory)
    assert record.state in ("running", "validating", "lost", "completed")
    (known,), _ = RunCatalog(directory).refresh()
    # A NaN differs from itself
    assert repr((known.state, known.metrics, known.step)) == repr((record.state, record.metrics, record.step))
    shutil.rmtree(directory)
    assert read_run(directory).why == "cannot be read: no such file or directory"
