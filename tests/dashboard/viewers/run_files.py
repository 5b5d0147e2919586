"""Run directories as a run writes them, made by hand, and a trainer in a process of its own."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

import msgspec

from offloop.engine import EpochEnd, Event, Metrics, StepEnd, TrainEnd, TrainStart, encode
from offloop.engine.samples.files import SampleFiles

TRAINER: Final = Path(__file__).parent / "train_in_process.py"


def step(number: int, *, time: float | None = None, seq: int = -1, **metrics: float) -> StepEnd:
    """Return the event of a step, with the loss 1 / number."""
    return StepEnd(
        run_id="run",
        seq=number if seq < 0 else seq,
        time=1_000.0 + number if time is None else time,
        epoch=0,
        step=number,
        batch=number,
        loss=1 / number,
        lr=0.1,
        step_time=0.5,
        samples=4,
        metrics=Metrics(metrics),
    )


def events_of(steps: int, *, attempt: int = 0, first: int = 1, end: str | None = "completed") -> list[Event]:
    """Return the events of an attempt that does some steps."""
    start = 1_000.0 + first - 1
    place: dict[str, Any] = {"run_id": "run", "epoch": 0}
    last = first + steps - 1
    events: list[Event] = [
        TrainStart(**place, seq=0, time=start, step=first - 1, attempt=attempt, max_steps=last),
        *(step(number, seq=number - first + 1) for number in range(first, last + 1)),
    ]
    if end is not None:
        at: dict[str, Any] = {"time": 1_001.0 + last, "step": last, "seq": steps + 1}
        events.append(EpochEnd(**place, **at, metrics=Metrics(train_loss=0.5)))
        events.append(TrainEnd(**place, **at | {"seq": steps + 2}, status=end, seconds=float(steps)))
    return events


def lines_of(events: Sequence[Event]) -> bytes:
    """Return the lines of a log."""
    return b"".join(encode(event) + b"\n" for event in events)


def write_run(directory: Path, events: Sequence[Event], **described: Any) -> Path:
    """Write a run's directory."""
    directory.mkdir(parents=True)
    ends = [event for event in events if isinstance(event, TrainEnd)]
    described = {
        "run_id": directory.name,
        "attempt": 0,
        "created": 1_000.0,
        "status": ends[-1].status if ends else "running",
        "host": platform.node(),
        "pid": 1,
        "config": {},
        **described,
    }
    (directory / "run.json").write_text(json.dumps(described))
    (directory / "events.jsonl").write_bytes(lines_of(events))
    return directory


def with_samples(directory: Path, name: str, *samples: Event, steps: int = 5) -> Path:
    """Write a run's directory with samples, as a run does: their files, and their events before the last one."""
    events = events_of(steps)
    path = write_run(directory / name, events[:-1])
    files = SampleFiles(path)
    for number, sample in enumerate(samples):
        files.keep(sample)
        place = {"run_id": "run", "time": 1_002.5 + number, "epoch": 0, "seq": len(events) - 1 + number}
        for field, value in place.items():
            msgspec.structs.force_setattr(sample, field, value)
    files.write()
    end = msgspec.structs.replace(events[-1], seq=len(events) - 1 + len(samples))
    assert isinstance(end, TrainEnd)
    with open(path / "events.jsonl", "ab") as log:
        for event in (*samples, end):
            log.write(msgspec.json.encode(event) + b"\n")
    (path / "run.json").write_text((path / "run.json").read_text().replace('"running"', '"completed"'))
    return path


TOKEN: Final = "0123456789abcdef"
"""Of the page of a trainer in a process of its own."""


class TrainerProcess:
    """A process that trains, step by step."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def steps(self, count: int) -> None:
        """Have it do some steps."""
        self._say("step\n" * count)

    def end(self) -> None:
        """Have it end its run, and wait for that."""
        self._say("end\n")
        assert self.process.wait(60) == 0

    def _say(self, text: str) -> None:
        into = cast("IO[str]", self.process.stdin)
        into.write(text)
        into.flush()


@contextmanager
def trainer_process(name: str, run_dir: Path, *words: str) -> Iterator[TrainerProcess]:
    """A process whose run has begun."""
    arguments = [sys.executable, str(TRAINER), name, str(run_dir), *words]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield TrainerProcess(process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def served(run_dir: Path, *before: str) -> Iterator[str]:
    """`offloop serve` of a directory: the address of its page.

    Args:
        run_dir: The directory.
        before: A command that runs it.
    """
    command = [*before, sys.executable, "-m", "offloop", "serve", str(run_dir), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Live page: "), line
        yield line.removeprefix("Live page: ").strip()
    finally:
        process.kill()
        process.communicate()
