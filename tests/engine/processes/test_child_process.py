"""engine/processes/: callbacks with runs_in = "process", in real child processes."""

import ctypes
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from offloop.engine import (
    Callback,
    CallbackFailed,
    CallbackProcessError,
    CheckpointSaved,
    ConfigError,
    EpochEnd,
    Event,
    EventsDropped,
    RunHandle,
    Sample,
    StepEnd,
    StepPoint,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

LONG: Final = 60.0  # seconds; a bound for what takes a moment


class Seen(Event, frozen=True):
    """What a handler saw, on its way to the test."""

    what: str
    values: list[Any] = []  # noqa: RUF012 - a field of a struct


class Gate(Callback):
    """Holds the training thread in one of its steps until an event of a child has come."""

    def __init__(self, until: str, step: int = 1) -> None:
        self.until, self.step = until, step
        self.open = threading.Event()

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step >= self.step:
            assert self.open.wait(LONG)

    def on_seen(self, event: Seen, run: RunHandle) -> None:
        if event.what == self.until:
            self.open.set()

    def on_callback_failed(self, event: CallbackFailed, run: RunHandle) -> None:
        if event.event == self.until:
            self.open.set()


class InProcess(Callback):
    runs_in = "process"


def seen(recorder: Recorder) -> dict[str, list[Any]]:
    return {event.what: event.values for event in recorder.of(Seen)}


# What a child sees -------------------------------------------------------------------------------


class Looks(InProcess):
    """Plain and async handlers, one order."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.order: list[int] = []
        self.names: list[str] = []

    def on_event(self, event: Event, run: RunHandle) -> None:
        self.order.append(event.seq)
        self.names.append(type(event).__name__)

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.order.append(event.seq)
        self.names.append("EpochEnd")
        if event.epoch == 1:
            pids = [os.getpid(), os.getppid()]
            run.publish(Seen(what="child", values=[self.order, self.names, pids]))

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.log.write_text(f"{event.status} {run.state} {self.names.count('StepEnd')}\n")

    def close(self) -> None:
        with self.log.open("a") as file:
            file.write("closed\n")


def test_a_child_handles_all_events_in_order_and_is_closed(tmp_path: Path) -> None:
    recorder = Recorder()
    log = tmp_path / "log"
    result = tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[Looks(log), recorder])
    order, names, (pid, parent) = seen(recorder)["child"]
    assert parent == os.getpid() != pid
    assert order == list(range(len(order)))
    expected = [each for each in recorder.names() if each not in ("Seen", "TrainEnd")]
    assert names == expected[: len(names)]
    assert log.read_text().splitlines() == [f"completed closing {result.steps}", "closed"]
    costs = result.callback_costs["Looks"]
    assert costs.events > result.steps and costs.cpu > 0 and costs.failures == costs.dropped == 0
    assert not _is_alive(pid)


class Lags(InProcess):
    """Handles nothing until it may, with room for ten samples."""

    buffer = 10

    def __init__(self, go: Path) -> None:
        self.go = go
        self.steps: list[int] = []
        self.milestones = 0

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Seen(what="busy"))
        while not self.go.exists():
            os.sched_yield()

    def on_sample(self, event: Sample, run: RunHandle) -> None:
        self.steps.append(event.step)

    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        self.milestones += 1

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.milestones += 1
        if event.epoch == 4:
            run.publish(Seen(what="lag", values=[self.steps, self.milestones]))


class LetsGo(Callback):
    def __init__(self, go: Path) -> None:
        self.go = go

    @in_step
    def after_training(self, point: StepPoint) -> None:
        self.go.touch()


def test_a_child_that_lags_loses_samples_which_are_counted_and_no_milestone(tmp_path: Path) -> None:
    recorder, go = Recorder(), tmp_path / "go"
    result = tiny_trainer().train(
        tiny_loader(), tiny_loader(), epochs=5, callbacks=[Lags(go), Gate("busy"), LetsGo(go), recorder]
    )
    steps, milestones = seen(recorder)["lag"]
    assert milestones == 10
    dropped = result.callback_costs["Lags"].dropped
    assert 0 < dropped == result.steps - len(steps)
    assert sum(event.count for event in recorder.of(EventsDropped)) == dropped
    assert steps[-1] == result.steps


# Failures ----------------------------------------------------------------------------------------


class OwnError(Exception):
    def __init__(self, text: str, code: int) -> None:
        super().__init__(f"{text}!")
        self.code = code


class Raises(InProcess):
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        if event.epoch == 0:
            raise OwnError("boo", 3)
        run.publish(Seen(what="goes on"))


def test_a_failure_is_reported_with_the_traceback_of_the_child(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[Raises(), recorder])
    assert result.status == "completed"
    assert result.callback_errors == {"Raises": ("EpochEnd: OwnError: boo!",)}
    (failed,) = recorder.of(CallbackFailed)
    assert (failed.callback, failed.event, failed.disabled) == ("Raises", "EpochEnd", False)
    assert 'raise OwnError("boo", 3)' in failed.traceback
    assert "goes on" in seen(recorder)
    record = next(each for each in caplog.records if "Raises failed" in each.message)
    assert record.levelno == logging.ERROR and record.process != os.getpid()


def test_on_error_raise_brings_the_exception_itself_to_the_caller() -> None:
    callback = Raises()
    callback.on_error = "raise"  # type: ignore[misc]  # of this one only
    with pytest.raises(OwnError, match=r"^boo!\n") as raised:
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])
    assert raised.value.code == 3
    assert any("in the process of Raises" in note for note in raised.value.__notes__)


class Exits(InProcess):
    """Ends its process in one of several ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        if self.how == "exit":
            os._exit(3)
        elif self.how == "exit 0":
            os._exit(0)
        elif self.how == "segfault":
            ctypes.string_at(0)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("exit", 3, "ended with exit code 3: the callback gets no more events, and is not restarted"),
        ("exit 0", 0, "ended with exit code 0, by its own doing"),
        ("segfault", -signal.SIGSEGV, r"ended with SIGSEGV \(exit code -11\)"),
        (
            "kill",
            -signal.SIGKILL,
            r"ended with SIGKILL \(exit code -9\); that is how Linux ends a process for",
        ),
    ],
)
def test_a_child_that_crashes_is_reported_and_the_run_goes_on(
    how: str, code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    # The report comes while training goes on: it waits for it.
    result = tiny_trainer().train(
        tiny_loader(), epochs=3, callbacks=[Exits(how), recorder, Gate("its process", step=9)]
    )
    assert (result.status, result.epochs) == ("completed", 3)
    (failed,) = recorder.of(CallbackFailed)
    assert (failed.callback, failed.event, failed.disabled) == ("Exits", "its process", True)
    assert re.search(text, failed.error)
    assert len(recorder.of(EpochEnd)) == 3
    with pytest.raises(CallbackProcessError, match=text) as raised:
        callback = Exits(how)
        callback.on_error = "raise"  # type: ignore[misc]
        tiny_trainer().train(tiny_loader(), epochs=10**6, callbacks=[callback])
    assert raised.value.exit_code == code


# Bad input ---------------------------------------------------------------------------------------


class Holds(InProcess):
    def __init__(self, value: object) -> None:
        self.settings = {"log": value}

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...


def test_what_cannot_go_to_another_process_is_an_error_before_the_run_starts() -> None:
    trainer = tiny_trainer()
    for value, what in (
        (threading.Lock(), "a _thread.lock"),
        (open(__file__), "a _io.TextIOWrapper"),
        (torch.zeros(1, device="meta"), "a tensor on meta"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"Holds.settings['log'] holds {what}")):
            trainer.train(tiny_loader(), epochs=1, callbacks=[Holds(value)])
        if hasattr(value, "close"):
            value.close()
    # Nothing is taken.
    assert trainer.train(tiny_loader(), epochs=1, callbacks=[Holds(1)]).status == "completed"


class Decides(InProcess):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...


class Hooks(InProcess):
    @in_step
    def after_step(self, point: StepPoint) -> None: ...


@pytest.mark.parametrize(("callback", "name"), [(Decides(), "on_epoch_end"), (Hooks(), "after_step")])
def test_deciders_and_step_hooks_stay_in_the_training_thread(callback: Callback, name: str) -> None:
    text = f'runs_in="process" and {name}, which runs in the training thread: split it into two callbacks'
    with pytest.raises(ConfigError, match=text):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])


def test_another_place_is_refused() -> None:
    callback = Holds(1)
    callback.runs_in = "thread"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="runs_in must be 'here' or 'process'"):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])


class Talks(InProcess):
    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        print("a" * 1_000_000)
        print("to stderr", file=sys.stderr)
        logging.getLogger("mine").info("a record")

        class Local(Event, frozen=True):
            number: int

        run.publish(Local(number=7))

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> Any:
        return _coroutine()


async def _coroutine() -> None: ...


def test_output_log_records_and_events_of_a_child_arrive(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "mine"):
        result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Talks(), recorder])
    captured = capsys.readouterr()
    assert "a" * 1_000_000 in captured.out
    assert "to stderr" in captured.err
    assert [each.message for each in caplog.records if each.name == "mine"] == ["a record"]
    (unknown,) = recorder.of(UnknownEvent)
    assert unknown.type.endswith("Local")
    assert "on_epoch_end is a plain def that returned an awaitable" in result.callback_errors["Talks"][0]


def test_a_process_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: b"/no/such/python")
    result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Holds(1)])
    assert result.status == "completed"
    (error,) = result.callback_errors["Holds"]
    assert error.startswith(
        "its process: CallbackProcessError: the process of Holds could not be started: FileNotFound"
    )


# Ends --------------------------------------------------------------------------------------------


class Hangs(InProcess):
    """Never returns from a handler."""

    drain_timeout = 0.2

    def __init__(self, log: Path, how: str) -> None:
        self.log, self.how = log, how

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Seen(what="hangs", values=[os.getpid()]))
        if self.how == "C":
            # Holds the interpreter of the child for ever.
            re.match(r"(a+)+$", "a" * 60 + "b")
        while True:
            pass

    def close(self) -> None:
        self.log.write_text("closed")


@pytest.mark.parametrize("how", ["Python", "C"])
def test_a_child_that_hangs_is_ended_after_its_drain_timeout(how: str, tmp_path: Path) -> None:
    recorder, log = Recorder(), tmp_path / "log"
    result = tiny_trainer().train(
        tiny_loader(), epochs=1, callbacks=[Hangs(log, how), Gate("hangs"), recorder]
    )
    assert result.status == "completed"
    assert any("still busy 0.2 s after the end" in each for each in result.callback_errors["Hangs"])
    assert log.exists() == (how == "Python")
    (pid,) = seen(recorder)["hangs"]
    assert not _is_alive(pid)


class KeepsLog(InProcess):
    """Keeps a log that checkpoints wait for."""

    needs_run_dir = True

    def __init__(self) -> None:
        self.last = 0
        self.durable: list[int] = []

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.last = event.step

    def make_durable(self) -> None:
        self.durable.append(self.last)

    def on_checkpoint_saved(self, event: CheckpointSaved, run: RunHandle) -> None:
        run.publish(Seen(what=f"durable {event.step}", values=list(self.durable)))


class Saves(Callback):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.checkpoint_nowait()


def test_a_checkpoint_waits_for_the_log_of_a_child(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny_trainer(run_dir=tmp_path).train(tiny_loader(), epochs=1, callbacks=[KeepsLog(), Saves(), recorder])
    assert seen(recorder) == {"durable 8": [8]}


SCRIPT: Final = """
import os, re, sys
import offloop
from offloop.engine.testing import EndlessLoader, tiny_trainer

print("imported", flush=True)


class Note(offloop.Event, frozen=True):
    pid: int
    has_torch: bool


class Busy(offloop.Callback):
    runs_in = "process"

    def on_train_start(self, event, run):
        run.publish(Note(pid=os.getpid(), has_torch="torch" in sys.modules))
        {body}

    def close(self):
        print("closed", flush=True)


class Shows(offloop.Callback):
    def on_note(self, event, run):
        print(f"child {{event.pid}} {{event.has_torch}}", flush=True)


tiny_trainer().train(EndlessLoader(), max_steps=10**9, callbacks=[Busy(), Shows()])
"""


def _start(tmp_path: Path, body: str) -> tuple["subprocess.Popen[str]", int]:
    """Start a script without a `__main__` guard; return it and the pid of its child once that is busy."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=body))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    _, child, has_torch = process.stdout.readline().split()
    # The class went by value: its script is not run again, and torch is not loaded.
    assert has_torch == "False"
    return process, int(child)


@pytest.mark.parametrize("body", ["while True: pass", "re.match(r'(a+)+$', 'a' * 60 + 'b')"])
def test_a_parent_that_is_killed_leaves_no_child(body: str, tmp_path: Path) -> None:
    process, child = _start(tmp_path, body)
    descriptor = os.pidfd_open(child)
    try:
        process.kill()
        process.communicate()
        _wait_for_end(descriptor)
    finally:
        os.close(descriptor)


def test_ctrl_c_reaches_the_parent_only_and_the_child_is_closed(tmp_path: Path) -> None:
    process, child = _start(tmp_path, "pass")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=LONG)
    # Run once, and closed in order.
    assert output.splitlines() == ["closed"]
    assert process.returncode in (1, -signal.SIGINT)
    assert not _is_alive(child)


def _wait_for_end(descriptor: int) -> None:
    """Wait for the end of a process that is no child of this one, two seconds at most: the promise."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(2_000)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Slow(InProcess):
    def on_sample(self, event: Sample, run: RunHandle) -> None:
        sum(range(10_000))


def test_the_weights_do_not_depend_on_process_callbacks() -> None:
    def weights(*callbacks: Callback) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(seed=0)
        trainer.train(tiny_loader(), epochs=3, callbacks=callbacks)
        return trainer.model.state_dict()

    without = weights()
    for each in (weights(Slow(), Slow()), weights(Exits("exit")), weights(Raises())):
        assert all(torch.equal(each[name], without[name]) for name in without)
