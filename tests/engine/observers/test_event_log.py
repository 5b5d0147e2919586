"""engine/observers/event_log.py: what is written, when, and what a reader gets back from a damaged file."""

import contextlib
import json
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from warm_python import WarmPython

from offloop.engine import (
    Callback,
    EpochEnd,
    Event,
    EventError,
    EventLog,
    Run,
    Sample,
    StepEnd,
    StepPoint,
    TrainEnd,
    UnknownEvent,
    encode,
    in_step,
    read_events,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

RUN = "the-run"


class Noted(Event, frozen=True):
    """An event of the tests' that can be changed."""

    notes: list[object]


def train(run_dir: Path, *callbacks: Callback, epochs: int = 2) -> Recorder:
    recorder = Recorder()
    tiny_trainer(run_dir=str(run_dir), run_name=RUN).train(
        tiny_loader(3), tiny_loader(1), epochs=epochs, callbacks=[recorder, *callbacks]
    )
    return recorder


def test_log_holds_every_event_of_the_run_as_it_was(tmp_path: Path) -> None:
    recorder = train(tmp_path)
    path = tmp_path / RUN / "events.jsonl"
    assert list(read_events(path)) == recorder.events
    assert list(read_events(tmp_path / RUN)) == recorder.events
    assert list(read_events(str(path))) == recorder.events
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()] == recorder.names()


def test_log_is_on_wherever_a_callback_needs_a_directory_and_there_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writes(Callback):
        needs_run_dir = True

    monkeypatch.chdir(tmp_path)
    tiny_trainer().train(tiny_loader(1), epochs=1)
    assert list(tmp_path.iterdir()) == []
    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Writes()])
    assert result.dir is not None
    assert result.dir.resolve().parent == tmp_path / "runs"
    assert isinstance(list(read_events(result.dir))[-1], TrainEnd)


def test_log_given_by_hand_is_the_only_one(tmp_path: Path) -> None:
    recorder = train(tmp_path, EventLog())
    assert list(read_events(tmp_path / RUN)) == recorder.events


def test_half_a_last_line_is_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = train(tmp_path)
    path = tmp_path / RUN / "events.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, last + 20, len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert list(read_events(path)) == recorder.events[:-1]
    path.write_bytes(whole[:-1])  # only the newline is missing: the event is whole
    assert list(read_events(path)) == recorder.events
    assert caplog.records == []


@pytest.mark.parametrize("damage", [b"{broken\n", b"\n", b"{}\n", b"\x00\x00\xff\xfe\n", b'"text"\n'])
def test_broken_line_in_the_middle_is_left_out_with_a_warning(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = train(tmp_path)
    path = tmp_path / RUN / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    assert list(read_events(path)) == recorder.events
    assert [record.getMessage() for record in caplog.records] == [f"{path}:3 is no event and was skipped"]


def test_unknown_events_are_kept_and_written_back_unchanged(tmp_path: Path) -> None:
    raw = b'{"type":"FromTheFuture","seq":3,"step":7,"what":[1,2]}'
    path = tmp_path / "events.jsonl"
    path.write_bytes(raw + b"\n")
    (event,) = read_events(path)
    assert isinstance(event, UnknownEvent)
    assert (event.type, event.seq, event.step) == ("FromTheFuture", 3, 7)
    assert encode(event) == raw


def test_fields_of_a_later_version_are_no_reason_to_lose_an_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(EpochEnd(epoch=2))[:-1] + b',"later":{"x":1}}\n')
    assert list(read_events(path)) == [EpochEnd(epoch=2)]


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_events(tmp_path))


def test_milestones_are_on_disk_when_they_were_handled_and_samples_with_them(tmp_path: Path) -> None:
    """Milestones are flushed; what was written before them goes with them."""

    class Look(EventLog):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []

        def on_event(self, event: Event, run: Run) -> None:
            super().on_event(event, run)
            if not isinstance(event, Sample):
                assert run.dir is not None
                on_disk = list(read_events(run.dir))
                self.seen.append(on_disk[-1] == event)

    look = Look()
    recorder = train(tmp_path, look)
    assert look.seen == [True] * len([each for each in recorder.events if not isinstance(each, Sample)])


class Stalls(Callback):
    """Holds the training in a step until all steps before it are on disk."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step
        self.on_disk: list[int] = []

    @in_step
    def after_step(self, point: StepPoint) -> None:
        deadline = time.monotonic() + 30
        while point.step == self.at_step and len(self.on_disk) < self.at_step - 1:
            assert time.monotonic() < deadline, f"only steps {self.on_disk} are on disk"
            time.sleep(0.001)
            # The first event may not have reached the disk yet
            with contextlib.suppress(FileNotFoundError):
                events = list(read_events(point.run.dir))
                self.on_disk = [event.step for event in events if isinstance(event, StepEnd)]


def test_the_last_steps_before_a_stall_are_on_disk_though_no_event_follows(tmp_path: Path) -> None:
    stalls = Stalls(at_step=8)
    train(tmp_path, stalls, epochs=3)
    assert stalls.on_disk == list(range(1, 8))


class Gathers(Callback):
    """Writes the events of a batch together."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.waiting: list[Event] = []
        self.written: list[Event] = []

    def on_event(self, event: Event, run: Any) -> None:
        self.waiting.append(event)

    def events_handled(self) -> None:
        self.written += self.waiting
        self.waiting.clear()
        if self.fails:
            raise OSError("no room")


def test_after_each_batch_a_callback_may_write_what_it_gathered(tmp_path: Path) -> None:
    writes, fails = Gathers(), Gathers(fails=True)
    result = tiny_trainer().train(tiny_loader(3), epochs=2, callbacks=[writes, fails])
    assert [type(each) for each in writes.written] == [type(each) for each in fails.written]
    assert isinstance(writes.written[-1], TrainEnd) and not writes.waiting
    assert set(result.callback_errors) == {"Gathers#2"}
    assert result.callback_errors["Gathers#2"][-1].endswith("OSError: no room")


def test_an_event_that_cannot_be_encoded_takes_no_other_with_it(tmp_path: Path) -> None:
    """Events are checked as they are published; a list in one may grow afterwards."""
    note = Noted(notes=["fine"])
    log, run = EventLog(), SimpleNamespace(dir=tmp_path)
    log.on_event(StepEnd(loss=1.0, lr=0.1, step=1), run)
    log.on_event(StepEnd(loss=1.0, lr=0.1, step=2), run)
    note.notes.append(object())
    with pytest.raises(EventError, match="notes"):
        log.on_event(note, run)
    log.on_event(EpochEnd(step=2), run)
    log.close()
    assert [event.step for event in read_events(tmp_path)] == [1, 2, 2]


SCRIPT = """
import sys
from offloop.engine import Callback
from offloop.engine.testing import tiny_loader, tiny_trainer

class Say(Callback):
    async def on_epoch_end(self, event, run):
        print(event.seq, flush=True)

tiny_trainer(run_dir=sys.argv[1], run_name="the-run").train(tiny_loader(3), epochs=10**9, callbacks=[Say()])
"""


@pytest.mark.slow
def test_kill_9_leaves_all_milestones_readable(tmp_path: Path, warm_python: WarmPython) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with warm_python.start(script, str(tmp_path)) as child:  # it is killed at the end of the block
        seen = [int(child.stdout.readline()) for _ in range(200)]
    events = list(read_events(tmp_path / RUN))
    milestones = [event for event in events if not isinstance(event, StepEnd)]
    written = {event.seq for event in milestones}
    assert [event.seq for event in events] == list(range(len(events)))  # nothing is missing, samples included
    # The log runs in a thread of its own beside the callback that spoke: it may be a hand-over behind, not more.
    assert written >= set(seen[:100])
    assert json.loads((tmp_path / RUN / "run.json").read_text())["status"] == "running"


class DiskIsFull(Callback):
    """From one step to another: no file may grow any more."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step in (self.first, self.last):
            path = point.run.dir / "events.jsonl"
            while not path.exists() or not path.stat().st_size:
                time.sleep(0.001)
            room = path.stat().st_size + 100 if point.step == self.first else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


class Log(EventLog):
    """Tells when it has failed, so that the disk can be full until then."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = threading.Event()

    def on_event(self, event: Event, run: Run) -> None:
        try:
            super().on_event(event, run)
        except OSError:
            self.failed.set()
            raise


def test_disk_that_is_full_for_a_moment_costs_no_milestone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log()

    class WaitForTheFailure(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 29:
                assert log.failed.wait(60)

    result = tiny_trainer(run_dir=tmp_path, run_name=RUN).train(
        tiny_loader(2), epochs=20, callbacks=[WaitForTheFailure(), DiskIsFull(5, 30), log]
    )
    events = list(read_events(tmp_path / RUN))
    assert [each.epoch for each in events if isinstance(each, EpochEnd)] == list(range(20))
    assert isinstance(events[-1], TrainEnd)
    seqs = [each.seq for each in events]
    assert seqs == sorted(set(seqs))
    assert len(result.callback_errors["Log"]) == 1  # once for the whole time, not for each event
    assert sum("can be written again" in each.getMessage() for each in caplog.records) == 1
    assert "is no event" not in caplog.text  # no line that was glued to another
