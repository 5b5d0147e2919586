"""Signals: `train()` in real processes that are told to stop, in order, in haste and at once."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import trio
from interruptions import StopAfter
from warm_python import ScriptProcess, WarmPython

from offloop.engine import (
    Callback,
    Preempted,
    Run,
    StateChanged,
    StepPoint,
    TrainEnd,
    TrainStart,
    in_step,
    read_events,
)
from offloop.engine.checkpoint import CheckpointInfo, CheckpointReader
from offloop.engine.session.process import handled_signals
from offloop.engine.testing import EndlessLoader, Recorder, reproducible, tiny_trainer

ENDLESS = 1_000_000_000

SCRIPT = """
import asyncio, contextlib, signal, sys, threading
from offloop.engine import Callback, in_step
from offloop.engine.testing import EndlessLoader, tiny_trainer

def say(text):
    print(text, flush=True)

class Report(Callback):
    async def on_state_changed(self, event, run):
        say(f"state {event.state}")
    async def on_train_end(self, event, run):
        say(f"TrainEnd {event.status} {event.reason}")
        if "hanging callback" in sys.argv:
            await asyncio.sleep(3600)
        while "swallowing callback" in sys.argv:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(3600)
    async def close(self):
        say("closed")

class Step(Callback):
    said = False
    @in_step
    def after_step(self, point):
        if not self.said:
            self.said = True
            say("stepping")
            if "hanging step" in sys.argv:
                threading.Event().wait(3600)

def train():
    trainer, given = tiny_trainer(drain_timeout=3600.0), dict(max_steps=10**9, callbacks=[Report(), Step()])
    if "async" in sys.argv:
        asyncio.run(trainer.train_async(EndlessLoader(), **given, handle_signals=True))
    else:
        trainer.train(EndlessLoader(), **given)

try:
    train()
except BaseException as error:
    default = (signal.default_int_handler, signal.SIG_DFL)
    restored = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == default
    say(f"{type(error).__name__}, handlers restored: {restored}")
    raise
"""


class Script:
    """A training script in a process of its own."""

    def __init__(self, process: ScriptProcess) -> None:
        self.process = process

    def expect(self, line: str) -> None:
        said = self.process.stdout.readline().rstrip()
        if not said:
            assert self.process.stderr is not None
            pytest.fail(f"no {line!r}: {self.process.stderr.read()}")
        assert said == line

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait()


@pytest.fixture
def start(tmp_path: Path, warm_python: WarmPython) -> Iterator[Callable[..., Script]]:
    """Start the script with arguments."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Script:
            script = tmp_path / "script.py"
            script.write_text(SCRIPT)
            return Script(stack.enter_context(warm_python.start(script, *arguments)))

        yield start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "number", "raised", "code"),
    [
        ("blocking", signal.SIGTERM, "Preempted", 75),
        ("async", signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_first_signal_stops_the_run_in_order(
    how: str, number: signal.Signals, raised: str, code: int, tmp_path: Path, start: Callable[..., Script]
) -> None:
    child = start(how)
    child.expect("stepping")
    child.send(number)
    child.expect("state stopping")
    child.expect(f"TrainEnd stopped {number.name}")
    child.expect("closed")
    child.expect(f"{raised}, handlers restored: True")
    assert child.end() == code


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hanging callback", "swallowing callback"])
def test_second_signal_does_not_wait_for_a_callback_that_hangs(
    how: str, tmp_path: Path, start: Callable[..., Script]
) -> None:
    child = start(how)
    child.expect("stepping")
    child.send(signal.SIGTERM)
    child.expect("state stopping")
    child.expect("TrainEnd stopped SIGTERM")
    child.send(signal.SIGTERM)  # its callback would hold the drain for an hour
    child.expect("closed")
    child.expect("Preempted, handlers restored: True")
    assert child.end() == 75


@pytest.mark.slow
def test_third_signal_ends_the_process_also_in_a_step_that_never_returns(
    tmp_path: Path, start: Callable[..., Script]
) -> None:
    number = signal.SIGINT
    child = start("hanging step")
    child.expect("stepping")
    assert child.process.stderr is not None
    child.send(number)
    assert "stopping; once more to leave in haste" in child.process.stderr.readline()
    child.send(number)
    assert "a third time" in child.process.stderr.readline()
    child.send(number)
    assert child.end() == -number


# What is left behind, and that it goes on ------------------------------------------------------------

SAVING_SCRIPT = """
import faulthandler, multiprocessing, os, sys, threading
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, Trainer, decides, in_step
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.testing import tiny_loader, tiny_model

PLACES = ("step", "validation", "disk", "sample", "epoch_end", "epoch_start", "iterator")
GATES = {name: multiprocessing.Event() for name in PLACES}
where = ""

def open_gates():
    # not sys.stdin, which a forked worker closes: its lock would be held for ever there
    while line := os.read(0, 100).decode():
        for name in line.split():
            GATES[name].set()

def hold(name):
    os.write(1, f"at {name}\\n".encode())
    GATES[name].wait()

class Samples(Dataset):
    samples = tiny_loader(12).dataset
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        if where == "sample" and index in (20, 24):  # the sixth and the seventh batch: one in each worker
            hold("sample")
        return self.samples[index]

class Batches(BatchSampler):
    epochs = 0
    def __iter__(self):  # called by iter(loader)
        self.epochs += 1
        if where == "iterator" and self.epochs == 2:
            hold("iterator")
        return super().__iter__()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.validations = tiny_model(dropout=0.3), 0
    def forward(self, x):
        if not self.training and where == "validation":
            self.validations += 1
            if self.validations == 4:  # the second of two batches, the second time
                hold("validation")
        return self.inner(x)

class Hold(Callback):
    @in_step
    def after_step(self, point):
        if where == "disk" and point.step == 9:
            hold("step")
        if where == "sample" and point.step == 5:
            os.write(1, b"at step\\n")
    @decides
    def on_epoch_end(self, event, run):
        if where == "epoch_end" and event.epoch == 0:
            hold("epoch_end")
    @decides
    def on_epoch_start(self, event, run):
        if where == "epoch_start" and event.epoch == 1:
            hold("epoch_start")

def make(directory, of, *callbacks):
    torch.manual_seed(5)
    model = Model()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=torch.nn.functional.cross_entropy, device="cpu", run_dir=directory, run_name="run",
        val_every_n_steps=4 if of == "validation" else None,
        callbacks=[ModelCheckpoint(every_n_steps=2), *callbacks],
    )
    data, workers = Samples(), 2 if of == "sample" else 0
    order = SequentialSampler(data) if workers else RandomSampler(data)
    loader = DataLoader(data, batch_sampler=Batches(order, 4, drop_last=False), num_workers=workers)
    return trainer, dict(train_loader=loader, val_loader=tiny_loader(2, seed=4), epochs=2)

if __name__ == "__main__":  # the tests import the rest
    faulthandler.dump_traceback_later(90, exit=True)  # whatever hangs says where
    where = sys.argv[2]
    threading.Thread(target=open_gates, daemon=True).start()
    sync, syncs = FileSystem.sync, 0
    def slow_sync(self, file):
        global syncs
        syncs += 1
        if where == "disk" and syncs == 8:  # the second checkpoint, which is never the last one
            hold("disk")
        sync(self, file)
    FileSystem.sync = slow_sync
    trainer, given = make(sys.argv[1], where, Hold())
    trainer.train(**given)
    print("completed", flush=True)
"""


class SavingScript(Script):
    """A run that saves, held at chosen points, in a session of its own so that its workers can be signalled too."""

    def open(self, gate: str) -> None:
        self.process.stdin.write(f"{gate}\n")
        self.process.stdin.flush()

    def expect_all(self, *lines: str) -> None:
        assert sorted(self.process.stdout.readline().rstrip() for _ in lines) == sorted(lines)

    def warns(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return
        pytest.fail(f"never said {text!r}")

    def end(self) -> int:
        """Wait for the end; if it is none that a signal leads to, show what was said."""
        code = self.process.wait()
        if code == 1 and self.process.stderr is not None:
            pytest.fail(self.process.stderr.read())
        return code

    def send_to_all(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@pytest.fixture
def start_saving(tmp_path: Path, warm_python: WarmPython) -> Iterator[Callable[[str], SavingScript]]:
    """Start a run that saves and is held at a place."""
    with contextlib.ExitStack() as stack:

        def start(where: str) -> SavingScript:
            script = tmp_path / "saving.py"
            script.write_text(SAVING_SCRIPT)
            child = warm_python.start(script, str(tmp_path), where, new_session=True)
            return SavingScript(stack.enter_context(child))

        yield start


def goes_on(directory: Path, where: str) -> tuple[int, CheckpointInfo]:
    """Resume the run of a child, see that it ends as if nothing had happened; return what it went on from."""
    spec = importlib.util.spec_from_file_location("saving", directory / "saving.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["saving"] = script
    try:
        spec.loader.exec_module(script)
        reader = CheckpointReader(directory / "run")
        for each in reader.checkpoints():
            reader.verify(each)
        assert not reader.damaged()
        last = reader.find("last")

        whole, given = script.make(str(directory / "whole"), where)
        whole.train(**given)
        recorder = Recorder()
        resumed, given = script.make(str(directory), where, recorder)
        resumed.train(**given, resume="auto")
    finally:
        del sys.modules["saving"]
    (start,) = recorder.of(TrainStart)
    assert start.resumed_from == str(last.path)
    expected = whole.model.state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in resumed.model.state_dict().items())

    def story(run: Path) -> Any:
        names = ("EpochStart", "StepEnd", "ValidationEnd", "EpochEnd")
        return [each for each in reproducible(read_events(run)) if each[0] in names]

    assert story(directory / "run") == story(directory / "whole" / "run")
    return start.step, last


@pytest.mark.slow
def test_signal_in_a_validation_leaves_a_checkpoint_of_that_step(
    tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    child = start_saving("validation")
    child.expect("at validation")
    child.send(signal.SIGINT)
    child.warns("SIGINT: stopping")
    child.open("validation")
    assert child.end() == -signal.SIGINT
    assert goes_on(tmp_path, "validation")[0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number"),
    [
        pytest.param("epoch_end", signal.SIGTERM, id="before-the-end-of-an-epoch-is-over"),
        pytest.param("epoch_start", signal.SIGINT, id="before-the-next-one-has-an-iterator"),
        pytest.param("iterator", signal.SIGTERM, id="while-the-iterator-is-made"),
    ],
)
def test_signal_between_two_epochs_leaves_a_checkpoint_of_that_boundary(
    place: str, number: signal.Signals, tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    child = start_saving(place)
    child.expect(f"at {place}")
    child.send(number)
    child.warns(f"{number.name}: stopping")
    child.open(place)
    assert child.end() == (75 if number == signal.SIGTERM else -number)
    step, last = goes_on(tmp_path, place)
    assert (step, last.manifest.epoch, last.manifest.batch) == (12, 1, 12)
    assert last.manifest.reason == "preempt"


@pytest.mark.slow
def test_signal_while_a_checkpoint_is_written_leaves_that_and_one_of_the_step(
    tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    child = start_saving("disk")
    child.expect_all("at disk", "at step")
    child.send(signal.SIGTERM)
    child.warns("SIGTERM: stopping")
    child.open("step")
    child.open("disk")
    assert child.end() == 75
    step, last = goes_on(tmp_path, "disk")
    assert (step, last.manifest.reason) == (9, "preempt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_while_loader_workers_are_busy(
    number: signal.Signals, tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    """As a terminal's Ctrl-C, Slurm or systemd send it."""
    child = start_saving("sample")
    child.expect_all("at sample", "at sample", "at step")
    child.send_to_all(number)
    child.warns(f"{number.name}: stopping")
    child.open("sample")
    assert child.end() == (75 if number == signal.SIGTERM else -number)
    assert child.process.stderr is not None
    assert "stopping" not in child.process.stderr.read()  # workers have no part in it
    assert goes_on(tmp_path, "sample")[0] in (5, 6)  # 6 is the step that the held sample is for


@pytest.mark.slow
def test_second_signal_leaves_a_disk_that_hangs(
    tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    child = start_saving("disk")
    child.expect_all("at disk", "at step")
    child.send(signal.SIGTERM)
    child.warns("SIGTERM: stopping")
    child.open("step")
    child.send(signal.SIGTERM)
    assert child.end() == 75  # nobody has let the disk go on
    assert goes_on(tmp_path, "disk")[0] == 2


@pytest.mark.slow
def test_third_signal_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, start_saving: Callable[[str], SavingScript]
) -> None:
    child = start_saving("disk")
    child.expect_all("at disk", "at step")
    for said in ("SIGTERM: stopping", "SIGTERM: leaving in haste"):
        child.send(signal.SIGTERM)
        child.warns(said)
    child.send(signal.SIGTERM)
    assert child.end() == -signal.SIGTERM
    assert goes_on(tmp_path, "disk")[0] == 2


# In this process -----------------------------------------------------------------------------------


class Signal(Callback):
    """Sends signals to this process from the training thread."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = list(numbers)
        self.handlers: list[Any] = []

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        if self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))


def test_keyboard_interrupt_comes_after_train_end() -> None:
    recorder, trainer = Recorder(), tiny_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(signal.SIGINT), recorder])
    assert recorder.names()[-1] == "TrainEnd"
    assert [event.by for event in recorder.of(StateChanged)] == ["signal"]
    assert recorder.is_closed
    assert trainer.last_run is not None
    assert (trainer.last_run.result.status, trainer.last_run.result.reason) == ("stopped", "SIGINT")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_preempted_with_code_75() -> None:
    with pytest.raises(Preempted) as caught:
        tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(signal.SIGTERM)])
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_json_tells_whether_the_run_was_preempted(number: signal.Signals, tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    with pytest.raises((Preempted, KeyboardInterrupt)):
        trainer.train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(number)])
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (described["status"], described["reason"]) == ("stopped", number.name)
    assert described.get("preempted", False) == (number is signal.SIGTERM)


def test_a_stop_with_the_name_of_a_signal_is_no_preemption(tmp_path: Path) -> None:
    class Stop(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.run.stop_nowait("SIGTERM")

    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    trainer.train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Stop()])
    assert "preempted" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_signal_ends_a_pause() -> None:
    class Pause(Callback):
        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                os.kill(os.getpid(), signal.SIGTERM)

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                point.run.pause_nowait()

    with pytest.raises(Preempted):
        tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[Pause()])


@pytest.mark.parametrize(("one_within", "seen"), [(0.0, ["SIGTERM", "SIGINT"]), (3600.0, ["SIGTERM"])])
def test_signals_that_launchers_repeat_are_one(one_within: float, seen: list[str]) -> None:
    heard: list[str] = []
    with handled_signals(lambda number, _: heard.append(number.name), force=True, one_within=one_within):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert heard == seen


def test_hosts_own_handler_is_left_alone() -> None:
    seen: list[int] = []

    def mine(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    spy = Signal(signal.SIGTERM)
    try:
        result = tiny_trainer().train(EndlessLoader(), max_steps=ENDLESS, callbacks=[spy, StopAfter(50)])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.reason == "interrupted"
    assert seen == [signal.SIGTERM]
    assert spy.handlers[1] is mine
    assert spy.handlers[0] not in (mine, signal.default_int_handler)  # that one was ours to take


@pytest.mark.anyio
async def test_async_run_takes_signals_only_when_asked_to() -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    spy = Signal()
    with anyio.fail_after(30):
        await tiny_trainer().train_async(EndlessLoader(), max_steps=3, callbacks=[spy])
        assert spy.handlers == before
        await tiny_trainer().train_async(EndlessLoader(), max_steps=3, callbacks=[spy], handle_signals=True)
    assert spy.handlers[0] is spy.handlers[1]
    assert spy.handlers != before
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_run_in_another_thread_leaves_signals_alone() -> None:
    spy, recorder = Signal(), Recorder()
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    thread = threading.Thread(
        target=lambda: tiny_trainer().train(EndlessLoader(), max_steps=3, callbacks=[spy, recorder])
    )
    thread.start()
    thread.join(30)
    assert spy.handlers == before
    assert recorder.of(TrainEnd)[0].status == "completed"


# Inside a running event loop, as in a notebook cell ------------------------------------------------


def interrupted_beside_a_loop(
    run: Callable[[Callable[[], Coroutine[Any, Any, None]]], object], count: int
) -> None:
    """Call `train()` on the main thread beside a running event loop, and interrupt it."""

    async def cell() -> None:
        with pytest.warns(RuntimeWarning, match="blocks the event loop"), pytest.raises(KeyboardInterrupt):
            trainer.train(
                EndlessLoader(), max_steps=ENDLESS, callbacks=[Signal(*[signal.SIGINT] * count), recorder]
            )
        assert trainer.last_run is not None
        assert trainer.last_run.state == trainer.last_run.result.status  # it was over when train() raised

    trainer, recorder = tiny_trainer(), Recorder()
    run(cell)
    assert trainer.last_run is not None
    assert trainer.last_run.state in (("stopped",) if count == 1 else ("stopped", "cancelled"))
    assert recorder.names()[-1] == "TrainEnd"
    assert recorder.is_closed


def run_like_a_notebook(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on a loop that leaves SIGINT to Python's default handler."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(main())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_interrupted_notebook_cell_ends_when_the_run_is_over(count: int) -> None:
    interrupted_beside_a_loop(run_like_a_notebook, count)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("count", [1, 3])
def test_hosts_handler_that_raises_in_a_cell_does_not_part_train_from_its_run(count: int) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        interrupted_beside_a_loop(run_like_a_notebook, count)
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_beside_trio_ends_when_the_run_is_over() -> None:
    interrupted_beside_a_loop(trio.run, 1)
