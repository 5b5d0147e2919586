"""Callbacks for tests of child processes. Without torch: the children load this module."""

import ctypes
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from offloop.engine import (
    Callback,
    CallbackFailed,
    EpochEnd,
    Event,
    RunHandle,
    Sample,
    TrainStart,
    decides,
    in_step,
)

if TYPE_CHECKING:
    from offloop.engine import StepPoint

LONG: Final = 60.0
"""Seconds that nothing here should take, also on a busy machine."""


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
    def after_step(self, point: "StepPoint") -> None:
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


class Looks(InProcess):
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Seen(what="child", values=[os.getpid(), os.getppid(), "torch" in sys.modules]))


class Raises(InProcess):
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        raise ValueError("boo")


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


class Holds(InProcess):
    def __init__(self, value: object) -> None:
        self.settings = {"log": value}

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...


class Decides(InProcess):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...


class Hooks(InProcess):
    @in_step
    def after_step(self, point: "StepPoint") -> None: ...


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


class Hangs(InProcess):
    """Never returns from a handler, in code of C."""

    drain_timeout = 0.2

    def __init__(self, log: Path) -> None:
        self.log = log

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Seen(what="hangs", values=[os.getpid()]))
        # Holds the interpreter of the child for ever.
        re.match(r"(a+)+$", "a" * 60 + "b")

    def close(self) -> None:
        self.log.write_text("closed")


class Slow(InProcess):
    def on_sample(self, event: Sample, run: RunHandle) -> None:
        sum(range(10_000))
