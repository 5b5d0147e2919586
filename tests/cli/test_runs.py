"""`offloop runs`, `offloop label` and `offloop export`: what they print, for people and for programs."""

import csv
import functools
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import command_line
import pytest
from typer.testing import CliRunner, Result

from offloop.callbacks import LayerStatistics, ModelCheckpoint, ResourceUsage
from offloop.cli.main import app
from offloop.cli.output import duration
from offloop.engine import (
    RUN_FIELDS,
    Evaluated,
    LossError,
    Metrics,
    Sample,
    StepEnd,
    Trainer,
    TrainStart,
    ValidationEnd,
    edit_labels,
    encode,
    export_metrics,
    read_attempts,
    read_labels,
)
from offloop.engine.testing import tiny_batches, tiny_loader, tiny_trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one was resumed, and a third that failed."""
    directory = tmp_path_factory.mktemp("made")

    def train(name: str, data: Any = None, *, epochs: int = 1, resume: Any = None, **knobs: Any) -> None:
        trainer = tiny_trainer(run_dir=str(directory / "runs"), run_name=name, **knobs)
        loader = tiny_loader(3) if data is None else data
        trainer.train(loader, tiny_loader(2), epochs=epochs, callbacks=[ModelCheckpoint()], resume=resume)

    train("first", hyperparameters={"api_key": "s3cret", "width": 8})
    train("second", lr=0.1)
    train("second", lr=0.1, epochs=2, resume="last")
    broken = tiny_batches(2)
    broken[1][0].fill_(float("nan"))
    with pytest.raises(LossError):
        train("third", broken)
    return directory


# Wide enough for all columns.
offloop = functools.partial(command_line.offloop, columns=120)


def names_in(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.stdout.splitlines()[1:]]


# offloop runs --------------------------------------------------------------------------------------


def test_list_has_the_newest_first_with_values_of_the_monitored_metric(here: Path) -> None:
    lines = offloop("runs").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "STEP", "val_loss", "BEST", "DURATION", "AGE", "TAG"]
    described = json.loads((here / "runs" / "second" / "run.json").read_text())
    third, second, first = lines[1:]
    assert third.split()[:5] == ["third", "failed", "1", "-", "-"]
    last, best = described["metrics"]["val_loss"], described["best"]["score"]
    assert second.split()[:5] == ["second", "completed", "6", f"{last:.4g}", f"{best:.4g}"]
    assert first.split()[:2] == ["first", "completed"]


@pytest.mark.parametrize("columns", [80, 100])
def test_long_names_are_cut_to_the_terminal_and_mean_nothing_to_it(here: Path, columns: int) -> None:
    name = "[bold]שלום " + "long " * 30
    edit_labels("runs/first", version=0, name=name, tags=["a tag that is very long indeed", "x"])
    result = offloop("runs", columns=columns)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert "[bold]" in result.stdout and "…" in result.stdout
    # Its directory is needed for `offloop label`
    assert lines[0].split()[:2] == ["NAME", "KEY"]
    piped = CliRunner(env={"TERM": "dumb", "COLUMNS": None}).invoke(app, ["runs"]).stdout
    assert name.strip() in piped


def test_a_long_name_that_goes_to_a_program_widens_only_its_own_row(here: Path) -> None:
    edit_labels("runs/first", version=0, name="x" * 200)
    lines = CliRunner(env={"COLUMNS": None}).invoke(app, ["runs"]).stdout.splitlines()
    (of_long,) = [line for line in lines if "x" * 200 in line]
    assert all(len(line) < 150 for line in lines if line != of_long)


def test_no_run_means_anything_to_the_terminal(here: Path) -> None:
    """The directory and the labels come from elsewhere: offloop writes no such names."""
    os.rename("runs/first", "runs/a\x1b[31mb")
    labels = {"name": "a\u202eb", "tags": ["c\u200bd"], "note": "e\x1b[2Jf"}
    Path("runs/a\x1b[31mb/labels.json").write_text(json.dumps(labels))
    for arguments in (
        ["runs"],
        ["label", "runs/a\x1b[31mb"],
        ["label", "runs/\x1b[31m"],
        ["checkpoints", "list"],
        ["export", "runs/a\x1b[31mb", "-o", "a\x1b[31m.csv"],
    ):
        result = offloop(*arguments)
        assert not any(each in result.output for each in "\x1b\u202e\u200b")
        assert "\ufffd" in result.output


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_directory_that_describes_no_run_is_lost_and_says_why(here: Path, content: str) -> None:
    (here / "runs" / "empty").mkdir()
    (here / "runs" / "empty" / "run.json").write_text(content)
    result = offloop("runs", "-f", "empty", "--columns", "name,state,why")
    what = "no JSON object" if content else "empty"
    assert " ".join(result.stdout.split()).endswith(f"lost run.json is {what}; events.jsonl is missing")


def test_runs_that_are_judged_by_different_metrics_name_theirs(here: Path) -> None:
    tiny_trainer(run_dir="runs", run_name="other", monitor="train_loss").train(tiny_loader(2), epochs=1)
    header, *lines = (line.split() for line in offloop("runs").stdout.splitlines())
    assert header[:6] == ["NAME", "STATE", "STEP", "METRIC", "LAST", "BEST"]
    assert {line[0]: line[3] for line in lines}["other"] == "train_loss"
    assert {line[0]: line[3] for line in lines}["first"] == "val_loss"
    # Chosen columns are shown as they are
    assert offloop("runs", "--columns", "name,last").stdout.splitlines()[0].split() == ["NAME", "LAST"]


def lose(name: str) -> None:
    """Let a run look as if its process had been killed."""
    path = Path("runs", name, "run.json")
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "status": "running", "host": platform.node()}))
    log = Path("runs", name, "events.jsonl")
    *lines, end = log.read_bytes().splitlines(keepends=True)
    assert b'"TrainEnd"' in end
    log.write_bytes(b"".join(lines))


def test_a_lost_run_says_how_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose("first")
    lose("third")
    (line,) = [each for each in offloop("runs").stderr.splitlines() if each.startswith("first")]
    advice = "train(..., resume='runs/first') continues it"
    assert line.startswith("first is lost: ended without saying so") and line.endswith(advice)
    assert "third is lost" in offloop("runs").stderr
    assert "it has no checkpoint to continue from" in offloop("runs", "-f", "third").stderr
    assert advice in " ".join(offloop("label", "runs/first").stdout.split())
    # What is printed can be given to train() from where it was printed
    monkeypatch.chdir("runs")
    assert f"resume='{here / 'runs' / 'first'}'" in offloop("runs", ".").stderr
    result = tiny_trainer().train(tiny_loader(3), epochs=2, resume=str(here / "runs" / "first"))
    assert (result.run_id, result.status) == ("first", "completed")


def test_of_many_lost_runs_the_first_are_explained(here: Path) -> None:
    for number in range(5):
        Path(f"runs/broken{number}").mkdir()
        Path(f"runs/broken{number}/run.json").touch()
    assert offloop("runs").stderr.splitlines()[-1] == (
        "2 more are lost: offloop runs -f state:lost --columns name,why tells why"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "first"),
        ("serve", "first"),
        ("label", "first"),
        ("label", "runs/frst"),
        ("export", "first"),
        ("checkpoints", "list", "first"),
        ("checkpoints", "verify", "first"),
        ("checkpoints", "tag", "first", "x"),
        ("checkpoints", "export", "first", "x.pt"),
        ("checkpoints", "diff", "first", "first"),
    ],
)
def test_the_name_of_a_run_is_answered_with_its_path(here: Path, arguments: tuple[str, ...]) -> None:
    result = offloop(*arguments)
    assert result.exit_code == 2 and result.stderr.endswith("; did you mean runs/first?\n")


def test_filter_sort_and_columns(here: Path) -> None:
    assert names_in(offloop("runs", "--filter", "state:completed", "--sort", "optimizer.lr")) == [
        "first",
        "second",
    ]
    assert names_in(offloop("runs", "-f", "state:completed", "--sort=-optimizer.lr")) == ["second", "first"]
    assert names_in(offloop("runs", "-f", "optimizer.lr=0.1", "-f", "/sec/")) == ["second"]
    # By what some run has, but none of those that are found
    assert names_in(offloop("runs", "-f", "third", "--sort", "val_loss")) == ["third"]
    # Without a value at the end, in both directions
    assert names_in(offloop("runs", "--sort=-last"))[-1] == "third"
    result = offloop("runs", "--columns", "name,width,best.val_loss,api_key", "--sort", "started")
    assert result.stdout.splitlines()[1].split()[0:2] == ["first", "8"]
    assert "s3cret" not in result.stdout and "(masked)" in result.stdout


def test_wrong_filters_names_and_directories_exit_with_2(here: Path) -> None:
    for arguments, text in (
        (("--filter", "val_loss<"), "--filter: val_loss<: a value is missing after <"),
        (("-f", "val_los<1"), "--filter: val_los<1: no run has 'val_los'; did you mean 'val_loss'?"),
        (("-f", "state:fail"), "--filter: state:fail: there is no state 'fail'; did you mean 'failed'?"),
        (("-f", "/(?=x)/"), "--filter: /(?=x)/: '(?=' is not known here, only (...) and (?:...)"),
        (("--sort", "val_los"), "no run has 'val_los'; did you mean 'val_loss'?"),
        (("--columns", "name,stat"), "no run has 'stat'; did you mean 'state'?"),
        (("gone",), "cannot be read: no such file"),
    ):
        result = offloop("runs", *arguments)
        assert result.exit_code == 2 and text in result.stderr and result.stderr.count("\n") == 1
    (here / "empty").mkdir()
    assert offloop("runs", "empty").stdout == "no runs in empty\n"


def test_an_expression_with_endless_ways_comes_to_an_end(here: Path) -> None:
    edit_labels("runs/first", version=0, name="a" * 199 + "b")
    command = [sys.executable, "-m", "offloop", "runs", "--columns", "key", "-f", "/^(a+)+$/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "3 of 3 runs are not shown\n")


def test_help_and_documentation_have_a_table_of_the_fields() -> None:
    help_lines = [line.split(maxsplit=1) for line in offloop("runs", "--help").stdout.splitlines()]
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.+) \|$", page.partition("### Fields")[2], re.MULTILINE)
    assert table == [(each.name, each.about) for each in RUN_FIELDS]
    for each in RUN_FIELDS:
        assert [each.name, each.about.replace("`", "")] in help_lines


def test_json_has_everything_and_masks_secrets(here: Path) -> None:
    result = offloop("runs", "--json", "--sort", "started", "-f", "-third")
    document = json.loads(result.stdout)
    assert document["total"] == 3
    first, second = document["runs"]
    assert (first["id"], first["state"], first["limits"]["epochs"]) == ("first", "completed", 1)
    assert first["hyperparameters"]["api_key"] == "(masked)" and first["hyperparameters"]["width"] == 8
    assert second["attempt"] == 1 and second["metrics"]["val_loss"]["mode"] == "min"


def test_archived_runs_are_hidden(here: Path) -> None:
    edit_labels("runs/first", version=0, archived=True)
    result = offloop("runs")
    assert names_in(result) == ["third", "second"]
    assert "1 of 3 runs are not shown" in result.stderr
    assert names_in(offloop("runs", "-f", "archived:yes")) == ["first"]
    assert len(names_in(offloop("runs", "--all"))) == 3


def test_closed_pipe_ends_quietly_and_no_torch_is_loaded(here: Path) -> None:
    script = (
        "import sys; from offloop.cli.main import app\n"
        "try:\n    app(sys.argv[1:], prog_name='offloop')\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    for command in (["runs"], ["export", "runs/second"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-c", script, *command], stdout=write, stderr=subprocess.PIPE, text=True
        )
        os.close(write)
        assert "Traceback" not in done.stderr and done.returncode != 0


def test_durations_have_two_units() -> None:
    assert [duration(each) for each in (0.25, 7.4, 65, 3600, 7500, 90000)] == [
        "0.2 s",
        "7 s",
        "1 min 5 s",
        "1 h",
        "2 h 5 min",
        "1 d 1 h",
    ]


# offloop label -------------------------------------------------------------------------------------


def test_labels_are_edited_and_shown(here: Path) -> None:
    assert offloop("label", "runs/first", "--name", "best of all", "--tag", "a", "--tag", "b").exit_code == 0
    assert (
        offloop("label", "runs/first", "--untag", "a", "--tag", "c", "--note", "why", "--archive").exit_code
        == 0
    )
    labels = read_labels("runs/first")
    assert (labels.name, labels.tags, labels.note, labels.archived) == (
        "best of all",
        ("b", "c"),
        "why",
        True,
    )
    result = offloop("label", "runs/first")
    assert [line.split(None, 1) for line in result.stdout.splitlines()[1:]] == [
        ["name", "best of all"],
        ["tags", "b, c"],
        ["note", "why"],
        ["archived", "yes"],
    ]
    assert read_labels("runs/first").version == 2


def test_wrong_labels_exit_with_2_and_change_nothing(here: Path) -> None:
    for arguments, text in (
        (
            ("runs", "--name", "x"),
            "runs is not the directory of a run: it has neither run.json nor events.jsonl; it is a directory of 3 "
            "runs: name one of them, like runs/first",
        ),
        (("runs/first", "--untag", "x"), "runs/first has no tag 'x'"),
        (("runs/first", "--note", "x" * 20_000), "note must have at most 16,384 characters"),
    ):
        result = offloop("label", *arguments)
        assert result.exit_code == 2 and text in result.stderr
    assert read_labels("runs/first").version == 0


# offloop export ------------------------------------------------------------------------------------


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_export_has_a_row_for_each_step_validation_and_epoch_of_all_attempts(here: Path) -> None:
    rows = rows_of(offloop("export", "runs/second").stdout)
    events = [
        (attempt, event)
        for attempt, event in read_attempts("runs/second")
        if type(event).__name__ in ("StepEnd", "ValidationEnd", "EpochEnd")
    ]
    assert [(row["attempt"], row["event"], row["step"], row["epoch"], row["time"]) for row in rows] == [
        (str(attempt), type(event).__name__, str(event.step), str(event.epoch), str(event.time))
        for attempt, event in events
    ]
    assert {attempt for attempt, _ in events} == {0, 1}
    for row, (_, event) in zip(rows, events, strict=True):
        if isinstance(event, StepEnd):
            assert (float(row["loss"]), float(row["lr"])) == (event.loss, event.lr)
        if isinstance(event, ValidationEnd):
            assert float(row["val_loss"]) == event.metrics["val_loss"] and row["loss"] == ""


class Score(Sample, frozen=True, kw_only=True):
    """A sample of the user's, with a field that an event of the engine has with another type."""

    score: float
    by: Metrics = Metrics()
    loss: str = "none"


class Publishes(Trainer):
    def training_step(self, batch: Any) -> Any:
        self.publish(ResourceUsage(memory_bytes=5_000))
        self.publish(Score(score=self.step / 2, by=Metrics(a=1.5), loss="high"))
        return super().training_step(batch)


def test_samples_of_monitors_and_of_the_user_are_exported(tmp_path: Path) -> None:
    trainer = tiny_trainer(Publishes, run_dir=str(tmp_path), run_name="run")
    trainer.train(tiny_loader(3), epochs=1, callbacks=[LayerStatistics(every_n_steps=2)])
    rows = rows_of(offloop("export", str(tmp_path / "run")).stdout)
    scores = [row for row in rows if row["event"] == "Score"]
    assert [(row["step"], row["score/score"], row["score/by/a"], row["loss"]) for row in scores] == [
        (str(step), str(step / 2), "1.5", "") for step in range(3)
    ]
    usage = [row["resource_usage/memory_bytes"] for row in rows if row["event"] == "ResourceUsage"]
    assert usage == ["5000.0"] * 3
    kinds = [row for row in rows if row["event"] == "LayersMeasured"]
    assert any(float(row["layers_measured/weights/std/0.weight"] or 0) > 0 for row in kinds)
    # The others have the columns of the whole run
    only = offloop("export", str(tmp_path / "run"), "--event", "Score", "--event", "StepEnd").stdout
    assert {row["event"] for row in rows_of(only)} == {"Score", "StepEnd"}
    assert "layers_measured" not in only
    nothing = offloop("export", str(tmp_path / "run"), "--event", "Scores")
    assert nothing.stderr == "the log has no event Scores with numbers\n"


def test_an_evaluation_is_exported_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    evaluated = Evaluated(
        path="p", seq=1, step=90, epoch=8, batch=90, of_step=20, of_epoch=1, metrics=Metrics(eval_a=0.5)
    )
    log.write_bytes(encode(TrainStart(seq=0)) + b"\n" + encode(evaluated) + b"\n")
    (row,) = rows_of(offloop("export", str(tmp_path)).stdout)
    assert [row[name] for name in ("event", "epoch", "step", "batch", "eval_a")] == [
        "Evaluated",
        "1",
        "20",
        "",
        "0.5",
    ]


def test_export_has_the_step_that_failed(here: Path) -> None:
    *_, last = rows_of(offloop("export", "runs/third").stdout)
    assert (last["event"], last["step"]) == ("TrainEnd", "2") and math.isnan(float(last["loss"]))


def test_export_to_a_file(here: Path) -> None:
    result = offloop("export", "runs/second", "-o", "out.csv")
    assert result.exit_code == 0
    text = Path("out.csv").read_text()
    assert text == offloop("export", "runs/second").stdout
    assert result.stdout == f"out.csv: {len(rows_of(text))} rows\n"
    refused = offloop("export", "runs/second", "-o", "out.csv")
    assert refused.exit_code == 2 and "out.csv exists; --force replaces it" in refused.stderr
    assert offloop("export", "runs/first", "-o", "out.csv", "--force").exit_code == 0
    assert Path("out.csv").read_text() != text
    assert sorted(os.listdir()) == ["out.csv", "runs"]
    for output, text in (
        ("gone/out.csv", "there is no directory gone"),
        ("runs", "runs is a directory: --output names a file"),
        ("/proc/out.csv", "runs/second cannot be exported to /proc/out.csv: no such file or directory"),
    ):
        refused = offloop("export", "runs/second", "-o", output, "--force")
        assert (refused.exit_code, refused.stderr) == (2, f"offloop: {text}\n")
    (here / "runs" / "first" / "events.jsonl").unlink()
    missing = offloop("export", "runs/first", "-o", "other.csv")
    assert missing.exit_code == 2 and "cannot be exported" in missing.stderr
    assert not Path("other.csv").exists()


def test_of_a_log_that_grows_what_was_there_is_exported_in_whole_rows(tmp_path: Path) -> None:
    """The log grows, with a metric that no column has, while rows are written."""
    log = tmp_path / "events.jsonl"

    def line(step: int, **more: Any) -> bytes:
        return encode(StepEnd(seq=step, step=step, epoch=0, lr=0.1, loss=1.0, **more)) + b"\n"

    log.write_bytes(
        encode(TrainStart(seq=0)) + b"\n{broken\n" + b"".join(map(line, range(1, 6))) + line(6)[:30]
    )

    class Grows(io.StringIO):
        def write(self, text: str) -> int:
            with open(log, "ab") as file:
                file.write(line(6)[30:] + line(7))
            return super().write(text)

    written = Grows()
    exported = export_metrics(tmp_path, written)
    assert (exported.rows, exported.skipped) == (5, 1)
    assert [row["step"] for row in rows_of(written.getvalue())] == ["1", "2", "3", "4", "5"]


def test_export_of_a_long_log_takes_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "events.jsonl", "wb") as log:
        for step in range(60_000):
            log.write(encode(StepEnd(seq=step, step=step, lr=0.1, loss=1.0 / (step + 1), time=1.0)) + b"\n")
    assert (tmp_path / "events.jsonl").stat().st_size > 5_000_000
    with open(os.devnull, "w") as nowhere:
        tracemalloc.start()
        try:
            assert export_metrics(tmp_path, nowhere).rows == 60_000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 30_000_000
