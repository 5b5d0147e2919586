"""engine/bus/forked.py: children of `os.fork` inside a run end by themselves, and the run does not notice."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offloop.engine import read_events

SCRIPT = """
import os, signal, sys, threading, warnings
import anyio
from offloop.callbacks import ModelCheckpoint
from offloop.engine import Callback, Trainer, decides, in_step
from offloop.engine.testing import tiny_loader, tiny_trainer

place, how = PLACE, HOW
parent, codes, closes = os.getpid(), [], []
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads

def fork(at):
    if at != place or codes:
        return
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs fails the test
        if how == "exits":
            sys.exit(3)
        if how == "exits with words":
            sys.exit("the child has spoken")
        if how == "raises":
            raise ValueError("in the child")
        return
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

class Steps(Trainer):
    def training_step(self, batch):
        if self.step == 1:
            fork("step")
        return super().training_step(batch)

class Everywhere(Callback):
    on_error = "isolate"
    @in_step
    def after_step(self, point):
        fork("step hook")
    @decides
    def on_epoch_start(self, event, run):
        fork("decider")
    @decides
    async def on_validation_end(self, event, run):
        await anyio.lowlevel.checkpoint()
        fork("async decider")
    def state_dict(self):
        fork("state_dict")
        return {}

class Observes(Callback):
    def on_epoch_end(self, event, run):
        fork("plain observer")
    async def on_train_end(self, event, run):
        await anyio.lowlevel.checkpoint()
        fork("async observer")
    def close(self):
        fork("close")
        closes.append(os.getpid())

class Commands(Callback):
    @decides
    def on_epoch_start(self, event, run):
        run.call_nowait(lambda trainer: fork("call"))

trainer = tiny_trainer(Steps, run_dir="runs", run_name="run")
callbacks = [ModelCheckpoint(every_n_steps=1), Everywhere(), Observes(), Commands()]
result = trainer.train(tiny_loader(3), tiny_loader(1), epochs=2, callbacks=callbacks)
assert os.getpid() == parent, "a child went on"
assert closes == [parent]
print(result.status, result.steps, result.callback_errors, codes)
"""

PLACES = [
    "step",
    "step hook",
    "decider",
    "async decider",
    "state_dict",
    "plain observer",
    "async observer",
    "close",
    "call",
]

THREADS = ["step", "async decider", "plain observer"]
"""A place for each thread that runs a user's code."""


@pytest.fixture
def run(tmp_path: Path, warm_python: Any) -> Callable[[str, str], Any]:
    def run(place: str, how: str) -> Any:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.replace("PLACE", repr(place)).replace("HOW", repr(how)))
        return warm_python.run(script)

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    ("how", "code", "said", "place"),
    [
        *(("exits", 3, "", place) for place in PLACES),
        ("exits with words", 1, "the child has spoken", "step"),
        *(("raises", 1, "ValueError: in the child", place) for place in THREADS),
        *(("returns", 1, "has returned into the run", place) for place in THREADS),
    ],
)
def test_child_ends_as_a_script_would_and_the_run_goes_on(
    run: Callable[[str, str], Any], tmp_path: Path, how: str, code: int, said: str, place: str
) -> None:
    done = run(place, how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"completed 6 {{}} [{code}]\n"
    assert said in done.stderr
    assert [path.name for path in tmp_path.glob("runs/run/*.new")] == []
    events = list(read_events(tmp_path / "runs" / "run"))
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(type(event).__name__ == "TrainEnd" for event in events) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_child_obeys_a_signal_as_it_would_without_a_run(tmp_path: Path, warm_python: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import os, signal, time, warnings
from offloop.engine import Callback, in_step
from offloop.engine.testing import tiny_loader, tiny_trainer

codes = []
warnings.simplefilter("ignore", DeprecationWarning)

class Forks(Callback):
    @in_step
    def after_step(self, point):
        ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            time.sleep(60)
            os._exit(0)
        os.read(ready[0], 1)
        os.kill(child, signal.SIGTERM)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

print(tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[Forks()]).status, codes)
"""
    )
    done = warm_python.run(script)
    assert done.stdout == f"completed [{-signal.SIGTERM}]\n", done.stderr
