"""callbacks/metric_logger.py: which rows, which columns, and that no row is ever lost."""

import csv
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from warm_python import WarmPython

from offloop.callbacks import MetricLogger
from offloop.engine import (
    ConfigError,
    EpochEnd,
    Event,
    Metrics,
    StepEnd,
    TrainStart,
    ValidationEnd,
    encode,
)
from offloop.engine.testing import drive, tiny_loader, tiny_trainer

Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """Read the file as anybody would."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log(tmp_path: Path, logger: MetricLogger, events: list[Event]) -> list[Row]:
    result = drive(logger, events=events, run_dir=str(tmp_path), run_name="run").result
    assert result.callback_errors == {}
    return rows_of(tmp_path / "run" / "metrics.csv")


def steps(count: int, **values: Any) -> list[Event]:
    return [StepEnd(loss=1 / step, lr=0.1, step=step, batch=step, **values) for step in range(1, count + 1)]


def test_every_n_steps_and_the_last_step_of_the_epoch(tmp_path: Path) -> None:
    events = [*steps(7), EpochEnd(step=7, batch=7, metrics=Metrics(train_loss=0.25, lr=0.1))]
    rows = log(tmp_path, MetricLogger(every_n_steps=3), events)
    assert [(row["step"], row["loss"], row["train_loss"]) for row in rows] == [
        ("3", str(1 / 3), ""),
        ("6", str(1 / 6), ""),
        ("7", str(1 / 7), ""),
        ("7", "", "0.25"),
    ]
    assert list(rows[0]) == ["time", "attempt", "epoch", "step", "batch", "loss", "lr", "train_loss"]
    assert {row["attempt"] for row in rows} == {"0"}


def test_rates_of_parameter_groups_have_columns_of_their_own(tmp_path: Path) -> None:
    rates = Metrics({"0": 0.1, "head": 0.2})
    (row,) = log(tmp_path, MetricLogger(every_n_steps=1), [StepEnd(loss=1.0, lr=0.2, lrs=rates, step=1)])
    assert (row["lr"], row["lr/0"], row["lr/head"]) == ("0.2", "0.1", "0.2")


def test_step_that_has_a_row_gets_no_second_one_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    rows = log(tmp_path, MetricLogger(every_n_steps=2), [*steps(2), EpochEnd(step=2, batch=2)])
    assert [row["loss"] for row in rows] == ["0.5", ""]


def test_by_time_short_runs_never_look_empty(tmp_path: Path) -> None:
    """An hour between rows, and still the first step, the last of the epoch and the epoch have theirs."""
    rows = log(tmp_path, MetricLogger(every_seconds=3600.0), [*steps(50), EpochEnd(step=50, batch=50)])
    assert [row["step"] for row in rows] == ["1", "50", "50"]


def test_by_time_every_step_has_a_row_where_steps_are_slower_than_the_cadence(tmp_path: Path) -> None:
    rows = log(tmp_path, MetricLogger(every_seconds=1e-9), steps(20))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 21)]


def test_columns_that_appear_later_widen_the_rows_before(tmp_path: Path) -> None:
    events = [
        *steps(1),
        StepEnd(loss=0.5, lr=0.1, step=2, batch=2, grad_norm=3.0),
        ValidationEnd(step=2, batch=2, metrics=Metrics(val_loss=0.75)),
        StepEnd(loss=0.25, lr=0.1, step=3, batch=3, metrics=Metrics(**{"mine, with a comma": 7.0})),
    ]
    rows = log(tmp_path, MetricLogger(every_n_steps=1), events)
    assert [{key: value for key, value in row.items() if key not in ("time", "attempt")} for row in rows] == [
        {"epoch": "0", "step": step, "batch": step, "loss": loss, "lr": lr, "grad_norm": norm,
         "val_loss": val_loss, "mine, with a comma": mine}
        for step, loss, lr, norm, val_loss, mine in [
            ("1", "1.0", "0.1", "", "", ""),
            ("2", "0.5", "0.1", "3.0", "", ""),
            ("2", "", "", "", "0.75", ""),
            ("3", "0.25", "0.1", "", "", "7.0"),
        ]
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "run").glob("metrics*")) == [
        "metrics.csv",
        "metrics.jsonl",
    ]


def test_non_finite_values_are_read_back_as_such(tmp_path: Path) -> None:
    events: list[Event] = [
        StepEnd(loss=float("nan"), lr=0.1, step=1),
        StepEnd(loss=float("inf"), lr=0.1, step=2),
    ]
    rows = log(tmp_path, MetricLogger(every_n_steps=1), events)
    assert [str(float(row["loss"])) for row in rows] == ["nan", "inf"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_the_same_rows_without_holes(tmp_path: Path) -> None:
    events = [
        *steps(1),
        StepEnd(loss=float("nan"), lr=0.1, step=2, batch=2, grad_norm=float("-inf")),
        ValidationEnd(step=2, batch=2, metrics=Metrics(val_loss=0.75, **{"a name": float("inf")})),
    ]
    log(tmp_path, MetricLogger(every_n_steps=1), events)
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert all(line.pop("time") > 0 for line in lines)
    position = {"attempt": 0, "epoch": 0}
    assert lines == [
        {**position, "step": 1, "batch": 1, "loss": 1.0, "lr": 0.1},
        {**position, "step": 2, "batch": 2, "loss": "NaN", "lr": 0.1, "grad_norm": "-Infinity"},
        {**position, "step": 2, "batch": 2, "val_loss": 0.75, "a name": "Infinity"},
    ]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_one_file_is_enough_if_only_one_is_asked_for(tmp_path: Path, format: Any) -> None:
    logger = MetricLogger(every_n_steps=1, formats=[format])
    assert drive(logger, events=steps(2), run_dir=str(tmp_path), run_name="run").result.callback_errors == {}
    assert [path.name for path in (tmp_path / "run").glob("metrics*")] == [f"metrics.{format}"]


@pytest.mark.parametrize("formats", ["csv", [], ["xml"]])
def test_formats_that_cannot_be_are_refused(formats: Any) -> None:
    with pytest.raises(ConfigError, match="formats must be a list of some of csv, jsonl"):
        MetricLogger(formats=formats)


def test_resumed_attempt_cuts_rows_after_the_checkpoint_and_a_row_that_is_half_there(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    header = "time,attempt,epoch,step,batch,loss"
    (run_dir / "metrics.csv").write_text(f"{header}\n10.0,0,0,1,1,0.5\n11.0,0,0,2,2,0.25\n10.0,0,0,3,3,0.1")
    (run_dir / "metrics.jsonl").write_text(
        '{"time":10.0,"step":1}\n{"time":11.0,"step":2}\n{"time":10.0,"step":3'
    )
    logger = MetricLogger(every_n_steps=1)
    run: Any = SimpleNamespace(dir=run_dir)
    logger.on_train_start(TrainStart(attempt=1, resumed_at=10.5, resumed_attempt=0), run)
    logger.on_step_end(StepEnd(loss=0.125, lr=0.1, step=2, batch=2, time=12.0), run)
    logger.close()
    assert [(row["step"], row["loss"], row["attempt"]) for row in rows_of(run_dir / "metrics.csv")] == [
        ("1", "0.5", "0"),
        ("2", "0.125", "1"),
    ]
    assert [line["step"] for line in lines_of(run_dir / "metrics.jsonl")] == [1, 2]


def test_attempt_stands_in_every_row(tmp_path: Path) -> None:
    rows = log(tmp_path, MetricLogger(every_n_steps=1), [TrainStart(attempt=3), *steps(2)])
    assert [row["attempt"] for row in rows] == ["3", "3"]


def test_real_run_logs_what_the_result_has(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), gradient_clip_val=1.0)
    result = trainer.train(
        tiny_loader(4),
        tiny_loader(2),
        epochs=3,
        metrics=["accuracy"],
        callbacks=[MetricLogger(every_n_steps=2)],
    )
    assert result.dir is not None
    rows = rows_of(result.dir / "metrics.csv")
    assert len(rows) == 3 * (2 + 1 + 1)
    epochs = [row for row in rows if row["train_loss"]]
    assert [float(row["val_loss"]) for row in epochs] == [end.metrics["val_loss"] for end in result.history]
    assert float(epochs[-1]["val_accuracy"]) == result.metrics["val_accuracy"]
    assert all(float(row["grad_norm"]) > 0 for row in rows if row["loss"])
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times)
    assert result.callback_errors == {}


def test_second_run_of_the_same_logger_starts_afresh(tmp_path: Path) -> None:
    logger = MetricLogger(every_n_steps=1)
    trainer = tiny_trainer(run_dir=str(tmp_path), callbacks=[logger])
    first, second = (trainer.train(tiny_loader(2), epochs=1).dir for _ in range(2))
    assert first is not None
    assert second is not None
    assert [row["step"] for row in rows_of(first / "metrics.csv")] == ["1", "2", "2"]
    assert [row["step"] for row in rows_of(second / "metrics.csv")] == ["1", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every_seconds": 1.0, "every_n_steps": 1}, "not both"),
        ({"every_seconds": 0.0}, "every_seconds must be a number of seconds above 0, got 0.0"),
        ({"every_seconds": float("nan")}, "every_seconds must be a number of seconds above 0, got nan"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
    ],
)
def test_cadence_that_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MetricLogger(**arguments)


SCRIPT = """
import sys
from offloop.callbacks import MetricLogger
from offloop.engine import Callback
from offloop.engine.testing import tiny_loader, tiny_trainer

class Logger(MetricLogger):
    def on_epoch_end(self, event, run):
        super().on_epoch_end(event, run)
        print(event.epoch, flush=True)

tiny_trainer(run_dir=sys.argv[1], run_name="run").train(
    tiny_loader(3), epochs=10**9, callbacks=[Logger(every_n_steps=1)]
)
"""


@pytest.mark.slow
def test_killed_run_keeps_every_row(tmp_path: Path, warm_python: WarmPython) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with warm_python.start(script, str(tmp_path)) as child:  # it is killed at the end of the block
        logged = [int(child.stdout.readline()) for _ in range(100)]
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    ends = [int(row["epoch"]) for row in rows if row["train_loss"]]
    assert ends[: len(logged)] == logged
    losses = [int(row["step"]) for row in rows if row["loss"]]
    assert losses[:300] == list(range(1, 301))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.endswith("\n")  # each line is there whole or not at all
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines if "train_loss" in line][: len(logged)] == logged
    assert [line["step"] for line in lines if "loss" in line][:300] == list(range(1, 301))


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def step(number: int, **values: Any) -> StepEnd:
    return StepEnd(loss=0.5, lr=0.1, step=number, batch=number, time=float(number), **values)


def test_rows_are_lost_only_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a new column would have the table written anew at that moment."""
    logger = MetricLogger(every_n_steps=1)
    run: Any = SimpleNamespace(dir=tmp_path)
    logger.on_train_start(TrainStart(), run)
    logger.on_step_end(step(1), run)
    with no_file_beyond((tmp_path / "metrics.csv").stat().st_size + 3):
        with pytest.raises(OSError, match="too large"):
            logger.on_step_end(step(2, metrics=Metrics(more=1.0)), run)
        logger.on_step_end(step(3, grad_norm=2.0), run)  # told of once, not for each row
        with pytest.raises(OSError, match="cannot be written"):
            logger.make_durable()
    logger.on_step_end(step(4), run)
    logger.on_step_end(step(5, metrics=Metrics(more=1.0)), run)
    logger.make_durable()
    logger.close()
    assert [(row["step"], row["more"]) for row in rows_of(tmp_path / "metrics.csv")] == [
        ("1", ""), ("4", ""), ("5", "1.0"),
    ]  # fmt: skip
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 4, 5]
    told = [each.getMessage() for each in caplog.records]
    assert sorted(told) == [
        f"{tmp_path / name} can be written again; 2 rows are missing in it"
        for name in ("metrics.csv", "metrics.jsonl")
    ]


def test_one_file_that_fails_does_not_cost_the_other_its_row(tmp_path: Path) -> None:
    logger = MetricLogger(every_n_steps=1)
    run: Any = SimpleNamespace(dir=tmp_path)
    (tmp_path / "metrics.csv").mkdir()  # nothing can take its place
    logger.on_train_start(TrainStart(), run)
    with pytest.raises(OSError, match="directory"):
        logger.on_step_end(step(1), run)
    logger.on_step_end(step(2), run)
    logger.close()
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]


def test_columns_of_ours_cannot_be_overwritten(tmp_path: Path) -> None:
    logger = MetricLogger(every_n_steps=1)
    run: Any = SimpleNamespace(dir=tmp_path)
    logger.on_train_start(TrainStart(), run)
    logger.on_step_end(step(3, metrics=Metrics(time=7.0, step=8.0, attempt=9.0, fine=1.0)), run)
    logger.close()
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert (row["time"], row["step"], row["attempt"], row["fine"]) == ("3.0", "3", "0", "1.0")


def test_resumed_attempt_keeps_the_rows_of_all_attempts_before_it_whatever_their_clocks(
    tmp_path: Path,
) -> None:
    header = "time,attempt,epoch,step,batch,loss"
    rows = [
        "9000.0,0,0,1,1,0.5",
        "10.0,1,0,2,2,0.5",
        "11.0,1,0,3,3,0.5",
        "5.0,2,0,3,3,0.5",
        "garbage,x,0,3,3,0.5",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    fields = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows[:-1]]
    lines = [
        f'{{"time":{each["time"]},"attempt":{each["attempt"]},"step":{each["step"]}}}' for each in fields
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "garbage", ""]))
    logger = MetricLogger(every_n_steps=1)
    run: Any = SimpleNamespace(dir=tmp_path)
    logger.on_train_start(TrainStart(attempt=3, resumed_at=10.5, resumed_attempt=1), run)
    logger.close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2"]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rows_that_a_killed_attempt_had_no_time_for_are_made_from_the_log(tmp_path: Path) -> None:
    events: list[Event] = [
        TrainStart(seq=0, time=1.0),
        StepEnd(loss=0.5, lr=0.1, seq=1, time=2.0, step=1),
        EpochEnd(metrics=Metrics(train_loss=0.5), seq=2, time=3.0, step=1),
        StepEnd(loss=0.25, lr=0.1, seq=3, time=4.0, step=2),
        EpochEnd(metrics=Metrics(train_loss=0.25), seq=4, time=5.0, epoch=1, step=2),
    ]
    (tmp_path / "events.jsonl").write_bytes(b"".join(encode(each) + b"\n" for each in events))
    run: Any = SimpleNamespace(dir=tmp_path)
    first = MetricLogger(every_n_steps=1)
    first.on_train_start(TrainStart(), run)
    first.on_step_end(events[1], run)  # type: ignore[arg-type]  # it is one
    first.close()
    (tmp_path / "metrics.jsonl").write_text("")  # that one was even further behind
    second = MetricLogger(every_n_steps=1)
    second.on_train_start(TrainStart(attempt=1, resumed_at=6.0, resumed_attempt=0), run)
    second.on_step_end(step(3), run)
    second.close()
    found = [
        (row["attempt"], row["step"], row["loss"], row["train_loss"])
        for row in rows_of(tmp_path / "metrics.csv")
    ]
    zero = [("0", "1", "0.5", ""), ("0", "1", "", "0.5"), ("0", "2", "0.25", ""), ("0", "2", "", "0.25")]
    assert found == [*zero, ("1", "3", "0.5", "")]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2, 3]
