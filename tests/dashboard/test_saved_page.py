"""dashboard/saved: what a shared file has of its runs, what it leaves out, how large it is, what is refused."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import events_of, lines_of, step, write_run
from saved_file import SavedRun, blocks_of, listed, runs_of, unpacked

from offloop import export_html
from offloop.dashboard.saved.packed_column import PackedColumn, pack_decimals, pack_floats, pack_whole
from offloop.dashboard.saved.saved_page import MOST_RUNS
from offloop.dashboard.serving.page import Page
from offloop.engine import (
    CallbackFailed,
    CheckpointSaved,
    CommandApplied,
    ConfigError,
    EpochEnd,
    Event,
    Metrics,
    Settings,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    edit_labels,
    encode,
    read_events,
)
from offloop.engine.testing import tiny_loader, tiny_trainer

pytestmark = pytest.mark.skipif(Page.load() is None, reason="the page is not built")


def saved_run(directory: Path, target: Path, **options: Any) -> SavedRun:
    """Save one run and return it as the file has it."""
    export_html([directory], target, **options)
    (run,) = runs_of(target).values()
    return run


def texts_of(path: Path) -> str:
    """Return all that a file says, uncompressed."""
    return "".join(block.decode(errors="replace") for block in blocks_of(path).values())


# Columns -----------------------------------------------------------------------------------------


def read_back(column: PackedColumn) -> Any:
    return unpacked(json.loads(json.dumps(list(_fields(column)))), b"".join(column.planes))


def _fields(column: PackedColumn) -> Any:
    layout = column.layout
    return layout.kind, layout.count, layout.bytes, layout.delta, layout.first, layout.scale


FLOATS = st.lists(st.floats(allow_infinity=False), max_size=50).map(np.array)


@given(FLOATS)
def test_floats_are_packed_bit_by_bit(values: Any) -> None:
    assert read_back(pack_floats(values.astype(float))).tobytes() == values.astype(float).tobytes()


@given(st.lists(st.integers(-(2**51) + 1, 2**51 - 1), max_size=50))
def test_whole_numbers_are_packed_as_they_are(numbers: list[int]) -> None:
    packed = pack_whole(np.array(numbers, float))
    assert packed.layout.kind == "whole"
    assert read_back(packed).tolist() == numbers


@given(FLOATS)
def test_numbers_that_are_not_whole_are_packed_bit_by_bit(values: Any) -> None:
    values = values.astype(float)
    assert np.array_equal(read_back(pack_whole(values)), values, equal_nan=True)


@given(FLOATS, st.integers(3, 9))
def test_decimals_are_within_half_of_the_last_digit(values: Any, digits: int) -> None:
    values = values.astype(float)
    packed = pack_decimals(values, digits)
    rounded = read_back(packed)
    assert np.array_equal(np.isnan(rounded), np.isnan(values))
    for value, read in zip(values.tolist(), rounded.tolist(), strict=True):
        if not math.isnan(value):
            # What its digits say, and not a number beside it
            assert packed.layout.kind == "float" or read == float(f"{read:.{digits}g}")
            assert abs(read - value) <= 0.5000001 * 10.0 ** (1 - digits) * abs(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (9.9996, 10.0),
        (-0.00099999, -0.001),
        (123456.0, 123500.0),
        (0.1 + 0.2, 0.3),
        (0.0, 0.0),
        (1e-30, 1e-30),
    ],
)
def test_four_digits(value: float, expected: float) -> None:
    assert read_back(pack_decimals(np.array([value]), 4)).tolist() == [expected]


# What is in it -----------------------------------------------------------------------------------


def test_a_file_has_all_points_of_a_run_and_all_its_events(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        run_dir=str(tmp_path / "runs"), run_name="first", hyperparameters={"api_key": "s3cret"}
    )
    trainer.train(tiny_loader(20), tiny_loader(3), epochs=3)
    written = export_html([tmp_path / "runs" / "first"], tmp_path / "shared.html")
    assert (written.path, written.runs, written.digits, written.skipped) == (
        tmp_path / "shared.html",
        1,
        None,
        0,
    )
    assert written.bytes == (tmp_path / "shared.html").stat().st_size
    (run,) = runs_of(tmp_path / "shared.html").values()
    log = list(read_events(tmp_path / "runs" / "first"))
    steps = [each for each in log if isinstance(each, StepEnd)]
    assert run.curve("loss") == ([each.step for each in steps], [each.loss for each in steps])
    ends = [each for each in log if isinstance(each, ValidationEnd)]
    assert run.curve("val_loss") == (
        [each.step for each in ends],
        [each.metrics["val_loss"] for each in ends],
    )
    assert [each["type"] for each in run.events] == [
        type(each).__name__ for each in log if not isinstance(each, StepEnd | CommandApplied)
    ]
    (info,), (status,) = run.of("run"), run.of("status")
    assert info["hyperparameters"]["api_key"] == "(masked)"
    assert (status["state"], status["step"]) == ("completed", 60)
    assert "s3cret" not in texts_of(tmp_path / "shared.html")


def test_what_says_on_whose_machine_it_was_is_left_out(tmp_path: Path) -> None:
    place: dict[str, Any] = {"time": 1_003.0, "step": 3, "epoch": 0}
    events: list[Event] = [
        TrainStart(
            time=1_000.0,
            config=Settings(cache="/home/somebody/cache", home=f"{Path.home()}/mine", runs=str(tmp_path)),
        ),
        step(1),
        StateChanged(**place, seq=2, state="paused", by="10.1.2.3"),
        CommandApplied(**place, seq=3, command="pause", command_id=1, by="10.1.2.3"),
        CheckpointSaved(**place, seq=3, saved_step=3, path=f"{tmp_path}/first/checkpoints/x"),
        CallbackFailed(
            **place, seq=4, callback="C", event="StepEnd", error="E", traceback="File /srv/secret.py"
        ),
        TrainEnd(**place, seq=5, status="failed", error="OSError: /Users/somebody/data: gone", seconds=1.0),
    ]
    directory = write_run(
        tmp_path / "first",
        events,
        host="host-in-cellar",
        pid=4_711,
        command=["/opt/train.py", "--name", "x"],
        git={"commit": "abc123", "dirty": False},
    )
    run = saved_run(directory, tmp_path / "shared.html")
    text = texts_of(tmp_path / "shared.html")
    for private in (
        "host-in-cellar",
        "4711",
        "/opt/train.py",
        "10.1.2.3",
        "secret.py",
        "somebody",
        str(tmp_path),
    ):
        assert private not in text, private
    if len(Path.home().parts) > 2:
        assert Path.home().name not in text
    (info,), (status,) = run.of("run"), run.of("status")
    assert info["config"]["cache"] == "/home/~/cache"
    assert status["error"] == "OSError: /Users/~/data: gone" and status["traceback"] is None
    assert info["commit"] == "abc123"
    assert info["config"]["runs"] == "."
    (saved,) = (each for each in run.events if each["type"] == "CheckpointSaved")
    assert saved["path"] == "first/checkpoints/x"


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    evil = "</script><script>window.evil = 1</script><!--"
    end = TrainEnd(time=1_002.0, step=1, seq=2, status="failed", error=evil, seconds=1.0)
    directory = write_run(tmp_path / "<img src=x>", [TrainStart(time=1_000.0), step(1), end])
    edit_labels(directory, version=0, name=evil, note=evil)
    run = saved_run(directory, tmp_path / "shared.html")
    document = (tmp_path / "shared.html").read_text()
    assert "evil" not in document and "<img src=x>" not in document
    assert document.count("<script") == document.count("</script") == 3
    assert run.of("status")[0]["error"] == evil
    assert listed(tmp_path / "shared.html")["rows"]["rows"][0]["name"] == evil


def test_the_page_loads_nothing_and_says_so_in_its_policy(tmp_path: Path) -> None:
    export_html([write_run(tmp_path / "first", events_of(2))], tmp_path / "shared.html")
    head = (tmp_path / "shared.html").read_text().partition("<style")[0]
    assert "default-src 'none'; script-src 'sha256-" in head
    assert "connect-src" not in head and "static/" not in head


def test_what_is_not_finite_stays_so(tmp_path: Path) -> None:
    losses = [1.0, math.nan, math.inf, -math.inf, 0.5]
    events: list[Event] = [
        TrainStart(time=1_000.0),
        *(
            StepEnd(seq=n, time=1_000.0 + n, step=n, batch=n, lr=0.1, loss=loss)
            for n, loss in enumerate(losses, 1)
        ),
    ]
    run = saved_run(write_run(tmp_path / "first", events), tmp_path / "shared.html")
    steps, values = run.curve("loss")
    assert steps == [1, 2, 3, 4, 5]
    assert [value if math.isfinite(value) else None for value in values] == [1.0, None, None, None, 0.5]
    (marks,) = [each["marks"] for each in run.head["curves"] if each["marks"]]
    assert marks == [[2.0, 4.0, "mixed", 3]]


def test_a_longer_curve_has_true_points_with_minimum_and_maximum(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=20_000)
    values[7_777], values[12_345] = 50.0, -50.0
    events: list[Event] = [
        TrainStart(time=1_000.0),
        *(
            StepEnd(seq=n, time=1_000.0 + n, step=n, batch=n, lr=0.1, loss=float(value))
            for n, value in enumerate(values, 1)
        ),
        *(ValidationEnd(time=21_001.0 + n, step=20_000, metrics=Metrics(val_loss=1.0)) for n in range(3)),
    ]
    run = saved_run(write_run(tmp_path / "first", events), tmp_path / "shared.html")
    steps, kept = run.curve("loss")
    assert 2_500 <= len(steps) <= 5_000 and run.is_reduced("loss")
    assert all(values[int(each) - 1] == value for each, value in zip(steps, kept, strict=True))
    assert {50.0, -50.0} <= set(kept)
    assert run.curve("val_loss") == ([20_000] * 3, [1.0] * 3) and not run.is_reduced("val_loss")


def test_a_pause_stays_where_it_was(tmp_path: Path) -> None:
    """Places on the time axis are known for some rows only; a jump between two others would be spread over hundreds."""
    events: list[Event] = [
        TrainStart(time=0.0),
        *(
            StepEnd(
                seq=n,
                time=float(n) + (50_000 if n > 30_000 else 0),
                step=n,
                batch=n,
                lr=0.1,
                loss=float(n % 7),
                metrics=Metrics({f"m{k}": float((n * (k + 3)) % 11) for k in range(8)}),
            )
            for n in range(1, 60_001)
        ),
    ]
    run = saved_run(write_run(tmp_path / "first", events), tmp_path / "shared.html")
    times = np.array(run.times)
    assert len(times) <= 15_000
    place = int(np.searchsorted(times, 30_000.5))
    jump = times[place] - times[place - 1]
    assert jump == pytest.approx(50_000, abs=70)


def test_ten_runs_of_twenty_noisy_metrics_fit_into_3_mb(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for number in range(10):
        values = generator.lognormal(size=(6_000, 20)).astype(np.float32).astype(float)
        events: list[Event] = [TrainStart(time=1_000.0, max_steps=6_000, batches_per_epoch=500)]
        clock = 1_000.0
        for n, row in enumerate(values[:5_000].tolist(), 1):
            clock += 0.05 + 0.001 * float(generator.random())
            metrics = Metrics({f"metric_{place}": value for place, value in enumerate(row[2:])})
            numbers: dict[str, Any] = {"loss": row[0], "lr": row[1], "metrics": metrics, "samples": 32}
            events.append(StepEnd(seq=n, time=clock, epoch=n // 500, step=n, batch=n, **numbers))
            if n % 500 == 0:
                means = Metrics({f"val_{place}": value for place, value in enumerate(row)})
                events.append(ValidationEnd(seq=n, time=clock, epoch=n // 500, step=n, metrics=means))
                events.append(EpochEnd(seq=n, time=clock, epoch=n // 500, step=n, metrics=means))
        write_run(
            tmp_path / "runs" / f"run-{number}",
            [*events, TrainEnd(time=clock, step=5_000, status="completed")],
        )
    written = export_html([tmp_path / "runs"], tmp_path / "shared.html")
    assert written.runs == 10 and written.bytes <= 3_000_000
    assert written.digits is not None and written.digits >= 4 and written.points == 5_000
    steps, kept = runs_of(tmp_path / "shared.html")["run-9"].curve("metric_3")
    true = values[:5_000, 5]
    assert steps == list(range(1, 5_001))
    assert np.all(np.abs(kept - true) <= 0.501 * 10.0 ** (1 - written.digits) * np.abs(true))
    # Larger files are exact
    exact = export_html([tmp_path / "runs"], tmp_path / "exact.html", max_bytes=20_000_000)
    assert exact.digits is None
    assert runs_of(tmp_path / "exact.html")["run-9"].curve("metric_3")[1] == true.tolist()
    with pytest.raises(ConfigError, match=r"max_bytes=1,000,000 is not enough for 10 runs"):
        export_html([tmp_path / "runs"], tmp_path / "small.html", max_bytes=1_000_000)
    assert not (tmp_path / "small.html").exists()


def test_of_many_events_the_latest_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    events: list[Event] = [TrainStart(time=0.0)]
    events += [
        EpochEnd(seq=n, time=float(n), epoch=n, step=n, metrics=Metrics(a=n / 3)) for n in range(1, 3_001)
    ]
    run = saved_run(write_run(tmp_path / "first", events), tmp_path / "shared.html")
    assert len(run.events) == 2_000 and run.of("missed")[0]["count"] == 1_001
    assert run.events[-1]["metrics"]["a"] == 1_000.0


def test_a_run_that_goes_on_is_saved_as_it_stands(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "first", events_of(5, end=None))
    with open(directory / "events.jsonl", "ab") as log:
        log.write(b"{broken\n" + encode(step(6)) + b"\n" + encode(step(7))[:20])
    written = export_html([directory], tmp_path / "shared.html")
    assert written.skipped == 1
    (run,) = runs_of(tmp_path / "shared.html").values()
    assert run.curve("loss")[0] == [1, 2, 3, 4, 5, 6]
    assert run.of("status")[0]["state"] in ("running", "lost")
    assert listed(tmp_path / "shared.html")["hello"]["saved"] > 0


def test_a_run_without_events_is_saved(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "first", [])
    assert saved_run(directory, tmp_path / "a.html").head["curves"] == []
    (directory / "events.jsonl").unlink()
    assert saved_run(directory, tmp_path / "b.html").head["curves"] == []


# Which runs --------------------------------------------------------------------------------------


def test_runs_of_a_directory_are_taken_but_archived_ones(tmp_path: Path) -> None:
    for name in ("one", "two", "old"):
        write_run(tmp_path / "runs" / name, events_of(2))
    edit_labels(tmp_path / "runs" / "old", version=0, archived=True)
    export_html(tmp_path / "runs", tmp_path / "shared.html")
    assert set(runs_of(tmp_path / "shared.html")) == {"one", "two"}
    # By name it is meant.
    export_html([tmp_path / "runs" / "old"], tmp_path / "old.html")
    assert set(runs_of(tmp_path / "old.html")) == {"old"}


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_comes_once(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "run", events_of(2))
    two = write_run(tmp_path / "b" / "run", events_of(3))
    (tmp_path / "link").symlink_to(one)
    export_html([one, two, str(one), tmp_path / "link"], tmp_path / "shared.html")
    runs = runs_of(tmp_path / "shared.html")
    assert {key: len(run.curve("loss")[0]) for key, run in runs.items()} == {"run": 2, "run~2": 3}
    assert runs["run~2"].of("run")[0]["key"] == "run~2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "gone does not exist"),
        ("file.txt", r"file\.txt is a file, and not the directory of a run"),
        ("empty", "empty is neither a run, which has run.json or events.jsonl, nor a directory of runs"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        export_html([tmp_path / name], tmp_path / "shared.html")
    assert not (tmp_path / "shared.html").exists()


def test_no_runs_and_too_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        export_html([], tmp_path / "shared.html")
    for number in range(MOST_RUNS + 1):
        directory = tmp_path / "runs" / str(number)
        directory.mkdir(parents=True)
        (directory / "events.jsonl").write_bytes(lines_of(events_of(1)))
    with pytest.raises(ConfigError, match="at most 100, got 101"):
        export_html(tmp_path / "runs", tmp_path / "shared.html")


# The file ----------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", events_of(2))
    target = tmp_path / "shared.html"
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        export_html([run], target)
    assert target.read_text() == "mine"
    export_html([run], target, replace=True)
    assert "saved-0" in target.read_text()
    assert sorted(os.listdir(tmp_path)) == ["first", "shared.html"]


def test_a_target_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", events_of(2))
    for target, error, words in (
        (tmp_path, ConfigError, "is a directory"),
        (tmp_path / "gone" / "a.html", ConfigError, "there is no directory"),
        (Path("/proc/a.html"), OSError, "/proc/a.html"),
    ):
        with pytest.raises(error, match=words):
            export_html([run], target)
    assert os.listdir(tmp_path) == ["first"]


@pytest.mark.parametrize(("name", "value"), [("points", 99), ("points", 5_001), ("max_bytes", 999_999)])
def test_arguments_out_of_range(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        export_html([tmp_path], tmp_path / "shared.html", **{name: value})  # type: ignore[arg-type]


def test_saving_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", events_of(2))
    code = (
        "import sys; from offloop import export_html; "
        f"export_html([{str(run)!r}], {str(tmp_path / 'a.html')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_of_a_file_is_that_of_the_server(tmp_path: Path) -> None:
    page = Page.load()
    assert page is not None
    export_html([write_run(tmp_path / "first", events_of(2))], tmp_path / "shared.html")
    document = (tmp_path / "shared.html").read_text()
    for name in ("page.js", "page.css"):
        body = gzip.decompress(page.assets[f"/static/{page.page_hash}/{name}"].gzipped).decode()
        assert body.strip() in document
