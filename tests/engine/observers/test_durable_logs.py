"""durable_logs.py: a checkpoint is announced when the logs have what came before it, and a resume completes them."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from offloop.callbacks import MetricLogger, ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointSaved,
    EpochEnd,
    Event,
    EventLog,
    Run,
    StepPoint,
    TrainStart,
    in_step,
    read_attempts,
    read_events,
)
from offloop.engine.observers import durable_logs as logs_module
from offloop.engine.observers.event_log import rewind
from offloop.engine.testing import Recorder, tiny_batches, tiny_trainer


def train(run_dir: Path, epochs: int, *callbacks: Callback, resume: str | None = "auto") -> Any:
    return tiny_trainer(run_dir=run_dir, run_name="run").train(
        tiny_batches(2), epochs=epochs, callbacks=[ModelCheckpoint(), *callbacks], resume=resume
    )


class SlowLog(EventLog):
    """Takes its time, as on a disk that is busy."""

    def on_event(self, event: Event, run: Run) -> None:
        time.sleep(0.002)
        super().on_event(event, run)


class BlockedLog(EventLog):
    """Does not get beyond the end of the first epoch before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def on_event(self, event: Event, run: Run) -> None:
        if isinstance(event, EpochEnd) and event.epoch == 0:
            assert self.go_on.wait(60)
        super().on_event(event, run)


class WaitsForTheDisk(Callback):
    """Goes on when the checkpoint of the epoch before is on disk, announced or not."""

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.epoch and point.step % 2:
            place = point.run.dir / "checkpoints"
            while not list(place.glob(f"step-{point.step - 1:09d}-*")):
                time.sleep(0.001)


class WaitsForTheLog(Callback):
    """Goes on when the checkpoint of the epoch before is announced: the log then has what came before it."""

    def __init__(self) -> None:
        self.saved = 0
        self.changed = threading.Condition()

    def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        with self.changed:
            self.saved = event.saved_step
            self.changed.notify_all()

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.epoch and point.step % 2:
            with self.changed:
                assert self.changed.wait_for(lambda: self.saved >= point.step - 1, 60)


class Looks(Callback):
    """Lets the log go on when three checkpoints are on disk, and knows what was announced until then and after."""

    def __init__(self, log: BlockedLog) -> None:
        self.log = log
        self.early: list[int] = []
        self.announced: list[tuple[int, int]] = []

    async def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        assert run.dir is not None
        logged = [each.step for each in read_events(run.dir) if isinstance(each, EpochEnd)]
        self.announced.append((event.saved_step, event.saved_step in logged))

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 7:
            self.early = [step for step, _ in self.announced]
            self.log.go_on.set()


def test_checkpoint_is_announced_when_the_log_has_what_came_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "LOG_DEADLINE", 60.0)
    log = BlockedLog()
    looks = Looks(log)
    result = train(tmp_path, 5, log, WaitsForTheDisk(), looks)
    assert result.callback_errors == {}
    assert looks.early == []
    assert looks.announced == [(step, True) for step in (2, 4, 6, 8, 10)]


class HoldsTheEventLoop(Callback):
    """Until training is over, as a callback that computes does."""

    def __init__(self) -> None:
        self.over = threading.Event()

    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        if event.epoch == 1:
            self.over.wait(60)

    @in_step
    def before_train_end(self, point: StepPoint) -> None:
        self.over.set()


def test_neither_training_nor_writing_waits_for_a_log_that_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs_module, "LOG_DEADLINE", 0.0)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, logger="offloop"):
        result = train(tmp_path, 6, HoldsTheEventLoop(), WaitsForTheDisk(), recorder)
    assert result.status == "completed"
    saved = [each.saved_step for each in recorder.of(CheckpointSaved)]
    assert saved == [2, 4, 6, 8, 10, 12]  # each announced, in order
    (told,) = {each.getMessage() for each in caplog.records if "is announced before" in each.getMessage()}
    assert "EventLog: behind by more than" in told


class Dies(Callback):
    """Is killed as soon as a checkpoint of the fifth epoch is on disk."""

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 11:
            place = point.run.dir / "checkpoints"
            while not list(place.glob("step-000000010-*")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # fork in a process with threads, from 3.12 on
def test_killed_run_lacks_no_epoch_in_its_logs_once_it_has_gone_on(tmp_path: Path) -> None:
    """The event loop was held from the second epoch on: no log has heard of what the checkpoints hold."""
    child = os.fork()
    if child == 0:
        try:
            train(tmp_path, 100, MetricLogger(), HoldsTheEventLoop(), WaitsForTheDisk(), Dies())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    logged = [each.epoch for each in read_events(tmp_path / "run") if isinstance(each, EpochEnd)]
    assert len(logged) < 4
    result = train(tmp_path, 7, MetricLogger())
    assert result.callback_errors == {}
    events = list(read_attempts(result.dir))
    assert [each.epoch for _, each in events if isinstance(each, EpochEnd)] == list(range(7))
    assert [of for of, each in events if isinstance(each, EpochEnd)] == [0] * 5 + [1] * 2
    for number in (0, 1):
        seqs = [each.seq for of, each in events if of == number]
        assert seqs == sorted(set(seqs))
    text = (result.dir / "metrics.jsonl").read_text()
    assert text.count("train_loss") == 7


def test_what_is_in_the_log_is_not_carried_by_later_checkpoints(tmp_path: Path) -> None:
    from offloop.engine.checkpoint import CheckpointReader

    train(tmp_path, 30, WaitsForTheLog())
    state: Any = CheckpointReader(tmp_path / "run").load().state
    assert len(state["milestones"]) < 20  # of 30 epochs with two each, and what began the run


def test_log_whose_sync_fails_is_reported_and_the_checkpoint_announced(tmp_path: Path) -> None:
    class NoDisk(Callback):
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            pass

        def make_durable(self) -> None:
            raise OSError("injected")

    recorder = Recorder()
    result = train(tmp_path, 2, NoDisk(), recorder)
    assert [each.saved_step for each in recorder.of(CheckpointSaved)] == [2, 4]
    assert set(result.callback_errors["NoDisk"]) == {"make_durable: OSError: injected"}


# Where a log is cut ------------------------------------------------------------------------------------


def test_attempts_are_told_apart_by_number_and_not_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's clock is set back by an hour between the first attempt and the second."""
    logger = MetricLogger
    train(tmp_path, 2, logger())
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600.0)
    train(tmp_path, 4, logger())
    monkeypatch.undo()
    result = train(tmp_path, 6, logger())
    events = list(read_attempts(result.dir))
    assert [(of, each.epoch) for of, each in events if isinstance(each, EpochEnd)] == [
        (0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5),
    ]  # fmt: skip
    rows = [line for line in (result.dir / "metrics.jsonl").read_text().splitlines() if "train_loss" in line]
    assert len(rows) == 6
    assert len((result.dir / "metrics.csv").read_text().splitlines()) == 1 + len(
        (result.dir / "metrics.jsonl").read_text().splitlines()
    )


def write_log(directory: Path, *lines: str, end: str = "") -> Path:
    path = directory / "events.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines) + end)
    return path


def start(attempt: int, time: float) -> str:
    return f'{{"type":"TrainStart","seq":0,"time":{time},"attempt":{attempt}}}'


def end(epoch: int, seq: int, time: float) -> str:
    return f'{{"type":"EpochEnd","seq":{seq},"time":{time},"epoch":{epoch},"step":{epoch},"batch":{epoch}}}'


def test_log_is_cut_at_the_checkpoint_of_its_attempt_and_completed(tmp_path: Path) -> None:
    first = [start(0, 100.0), end(0, 1, 101.0)]
    second = [start(1, 50.0), end(1, 1, 51.0)]
    path = write_log(tmp_path, *first, *second, end(2, 2, 53.0), start(2, 10.0), end='{"type":"Epo')
    milestones = [end(1, -1, 51.0), end(7, -1, 51.5)]
    rewind(tmp_path, attempt=1, taken=52.0, milestones=milestones)
    found = list(read_attempts(path))
    assert [(of, each.seq, each.epoch) for of, each in found] == [
        (0, 0, -1), (0, 1, 0), (1, 0, -1), (1, 1, 1), (1, 2, 7),
    ]  # fmt: skip
    assert found[-1][1].run_id == tmp_path.name
    rewind(tmp_path, attempt=1, taken=52.0, milestones=milestones)  # killed, and begun again
    assert list(read_attempts(path)) == found


def test_events_before_the_start_of_an_attempt_are_that_attempts(tmp_path: Path) -> None:
    early = '{"type":"UploadFailed","seq":0,"time":5.0,"url":"","error":""}'
    path = write_log(
        tmp_path, start(0, 1.0), end(0, 1, 2.0), early, start(1, 6.0).replace('"seq":0', '"seq":1')
    )
    assert [of for of, _ in read_attempts(path)] == [0, 0, 1, 1]
    rewind(tmp_path, attempt=0, taken=9.0)
    assert [of for of, _ in read_attempts(path)] == [0, 0]


def test_lines_that_are_no_events_stay_where_they_are(tmp_path: Path) -> None:
    path = write_log(tmp_path, start(0, 1.0), "garbage", end(0, 1, 2.0), end(1, 2, 4.0))
    rewind(tmp_path, attempt=0, taken=3.0)
    assert path.read_text().splitlines() == [start(0, 1.0), "garbage", end(0, 1, 2.0)]


@pytest.mark.parametrize("is_there", [True, False])
def test_log_that_is_a_link_becomes_a_file_of_the_runs_own(tmp_path: Path, is_there: bool) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    if is_there:
        victim.write_text(f"{start(0, 1.0)}\n{end(0, 1, 5.0)}\n")
    (run / "events.jsonl").symlink_to(victim)
    rewind(run, attempt=0, taken=3.0, milestones=[end(3, -1, 2.0)])
    assert victim.exists() is is_there
    assert not is_there or victim.read_text() == f"{start(0, 1.0)}\n{end(0, 1, 5.0)}\n"
    kinds = [type(each) for each in read_events(run)]
    assert kinds == ([TrainStart] if is_there else []) + [EpochEnd]


def test_run_without_a_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    tiny_trainer(run_dir=tmp_path, run_name="run").train(tiny_batches(1), epochs=1)
    tiny_trainer(run_dir=tmp_path, run_name="run").train(tiny_batches(1), epochs=1, resume="auto")
    assert [each.attempt for each in read_events(tmp_path / "run") if isinstance(each, TrainStart)] == [1]


def test_step_hook_may_wait_for_a_checkpoint_that_was_taken_before(tmp_path: Path) -> None:
    """It is on its way to the disk and waits for the logs, neither of which needs the training thread."""

    class Waits(Callback):
        steps: tuple[int, ...] = ()

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                self.future = point.run.checkpoint_nowait()
            else:
                self.steps += (self.future.result(timeout=60).saved_step,)

    waits = Waits()
    tiny_trainer(run_dir=tmp_path).train(tiny_batches(2), epochs=1, callbacks=[SlowLog(), waits])
    assert waits.steps == (1,)


def test_checkpoint_is_announced_where_the_system_gives_no_thread_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "offloop-announcements":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    recorder = Recorder()
    trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
    result = trainer.train(tiny_batches(2), epochs=2, callbacks=[ModelCheckpoint(), recorder])
    assert result.status == "completed"
    assert [event.saved_step for event in recorder.of(CheckpointSaved)] == [2, 4]
