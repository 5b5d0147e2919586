"""Callbacks that note what happens to them. Without torch: child processes load this module."""

import os
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import anyio.lowlevel

from offloop.engine import (
    Callback,
    CheckpointSaved,
    EpochEnd,
    EpochStart,
    Event,
    RunHandle,
    Sample,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    in_step,
)
from offloop.engine.errors import DeadlockError

if TYPE_CHECKING:
    from offloop.engine import StepPoint

Place = Literal["here", "process"]
Form = Literal["plain", "async"]
LONG: Final = 60.0
"""Seconds that nothing here should take, also on a busy machine."""


class Told(Event, frozen=True):
    """Tells the test that a handler has come to some point."""

    what: str


class Placed(Callback):
    """A callback whose handlers run in this process or in one of their own, and note into a file what they do."""

    def __init__(self, place: Place, notes: Path, **settings: Any) -> None:
        """Run in a place.

        Args:
            place: The place.
            notes: A file.
            settings: Attributes of the callback, such as `buffer`.
        """
        if place == "process":
            self.runs_in = "process"
        self.notes = notes
        for name, value in settings.items():
            setattr(self, name, value)

    def note(self, what: object) -> None:
        """Append a line to the file. Any thread."""
        with self.notes.open("a") as file:
            file.write(f"{what}\n")

    def noted(self) -> list[str]:
        """Return the lines of the file."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def close(self) -> None:
        self.note("close")


def wait_for(file: Path) -> None:
    """Block until a file exists."""
    deadline = time.monotonic() + LONG
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


async def exists(file: Path) -> None:
    """Wait until a file exists."""
    with anyio.fail_after(LONG):
        while not await anyio.Path(file).exists():  # noqa: ASYNC110 - another process makes it
            await anyio.sleep(0.002)


class Gate(Callback):
    """Holds the first step until a handler has told something, and opens a file for it after the last step."""

    def __init__(self, go: Path | None = None) -> None:
        """Open a file."""
        self.go = go
        self.is_told = threading.Event()

    @in_step
    def before_forward(self, point: "StepPoint") -> None:
        assert self.is_told.wait(LONG)

    @in_step
    def after_training(self, point: "StepPoint") -> None:
        if self.go is not None:
            self.go.touch()

    def on_told(self, event: Told, run: RunHandle) -> None:
        self.is_told.set()


# Order and buffers -------------------------------------------------------------------------------


class Orders(Placed):
    """Plain and async handlers: notes the `seq` of all events."""

    def on_event(self, event: Event, run: RunHandle) -> None:
        self.note(event.seq)

    async def on_sample(self, event: Sample, run: RunHandle) -> None:
        await anyio.lowlevel.checkpoint()
        self.note(event.seq)

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.note(event.seq)


class Lags(Placed):
    """Handles nothing until a file is there."""

    go: Path

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Told(what="busy"))
        wait_for(self.go)

    def on_sample(self, event: Sample, run: RunHandle) -> None:
        self.note(f"sample {event.step}")

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.note(f"epoch {event.epoch}")

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.note(event.status)


class BlocksPlain(Placed):
    """Has training wait for it, and blocks for a command until that is refused."""

    buffer, on_full = 2, "block"
    steps = 0

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.steps += 1
        if self.steps == 1:
            try:
                while True:
                    run.validate_nowait().result(LONG)
            except DeadlockError as error:
                self.note(error)
        if self.steps == event.step == 50:
            self.note("no step is missing")
            run.stop_nowait()


class BlocksAsync(Placed):
    """Has training wait for it, and awaits a command until that returns before it has applied."""

    buffer, on_full = 2, "block"
    steps = 0

    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.steps += 1
        if self.steps == 1:
            while await run.validate() is not None:
                pass
        if self.steps == event.step == 50:
            self.note("no step is missing")
            await run.stop()


# Failures ----------------------------------------------------------------------------------------


class OwnError(Exception):
    """Takes other arguments than it passes on."""

    def __init__(self, text: str, code: int) -> None:
        """Hold a code."""
        super().__init__(f"{text}!")
        self.code = code


class UnpicklableError(OwnError):
    """Holds what cannot be pickled."""

    def __init__(self, text: str, code: int) -> None:
        """Hold a lock, too."""
        super().__init__(text, code)
        self.args = (*self.args, threading.Lock())
        self.lock = threading.Lock()


class _Handles(Placed):
    """Calls `handle` at the end of each epoch, in a handler of either form."""

    def __init__(self, place: Place, form: Form, notes: Path, **settings: Any) -> None:
        super().__init__(place, notes, **settings)
        self.on_epoch_end = self._plain if form == "plain" else self._async

    def _plain(self, event: EpochEnd, run: RunHandle) -> Any:
        return self.handle(event, run)

    async def _async(self, event: EpochEnd, run: RunHandle) -> None:
        self.handle(event, run)

    def handle(self, event: EpochEnd, run: RunHandle) -> Any:
        raise NotImplementedError


class FailsIn(_Handles):
    """Raises in some epochs."""

    epochs: tuple[int, ...]

    def handle(self, event: EpochEnd, run: RunHandle) -> None:
        self.note(event.epoch)
        if event.epoch in self.epochs:
            raise ValueError(f"in epoch {event.epoch}")


class Raises(_Handles):
    """Raises an exception by its name, at once, again and again."""

    error: str

    def handle(self, event: EpochEnd, run: RunHandle) -> None:
        raise self.make()

    def make(self) -> BaseException:
        class LocalError(Exception):
            pass

        class UnprintableError(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no text")

        errors: dict[str, BaseException] = {
            "own": OwnError("boo", 3),
            "unpicklable": UnpicklableError("boo", 3),
            "local": LocalError("boo"),
            "unprintable": UnprintableError(),
            "unencodable": OSError("caf\udce9"),
            "exit": SystemExit(3),
            "interrupt": KeyboardInterrupt("boo"),
        }
        return errors[self.error]


class Forgets(_Handles):
    """A plain def that returns an awaitable."""

    def handle(self, event: EpochEnd, run: RunHandle) -> Awaitable[None]:
        return anyio.sleep(1)


# Ends --------------------------------------------------------------------------------------------


class Counts(Placed):
    """Counts steps, in state that `reset` discards."""

    def reset(self) -> None:
        self.steps = 0

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        self.note("begin")

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.steps += 1

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.note(f"{event.status} after {self.steps}, {run.state}")


class ClosesAsync(Placed):
    """Closes on the event loop."""

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.note(event.status)

    async def close(self) -> None:  # type: ignore[override]  # as users may
        await anyio.lowlevel.checkpoint()
        self.note("close")


class ReturnsClose(ClosesAsync):
    """Its plain `close` returns an awaitable."""

    def close(self) -> Awaitable[None]:  # type: ignore[override]  # as users may
        return super().close()


class FailsToClose(Placed):
    """Raises in `close`, after its only call."""

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...

    def close(self) -> None:
        super().close()
        raise OSError("disk full")


class Hangs(Placed):
    """Never returns from its first handler, in one of several ways."""

    def __init__(self, place: Place, way: str, notes: Path, **settings: Any) -> None:
        """Hang by awaiting, by computing in a thread, or by swallowing the cancellation."""
        super().__init__(place, notes, **settings)
        self.way = way
        self.release = notes.with_suffix(".release")
        self.on_train_start = self._compute if way == "computes" else self._await

    def _compute(self, event: TrainStart, run: RunHandle) -> None:
        self.note(f"hangs in {os.getpid()}")
        run.publish(Told(what="hangs"))
        while not self.release.exists():
            sum(range(1000))

    async def _await(self, event: TrainStart, run: RunHandle) -> None:
        self.note(f"hangs in {os.getpid()}")
        run.publish(Told(what="hangs"))
        try:
            await anyio.sleep_forever()
        except BaseException:
            self.note("is cancelled")
            while self.way == "swallows":
                try:
                    await anyio.sleep_forever()
                except BaseException:
                    await anyio.lowlevel.cancel_shielded_checkpoint()
            raise


class HangsAtTheEnd(Placed):
    """Handles the end of training for ever."""

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Told(what="begin"))

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.note(event.status)
        await anyio.sleep_forever()


# Commands, pauses and checkpoints ----------------------------------------------------------------


class PausesAndStops(Placed):
    """Pauses the run, resumes it once it hears of the pause, and stops it once it hears of that."""

    async def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None:
        if event.epoch == 0:
            await run.pause("a look")
            self.note(run.state)

    def on_state_changed(self, event: StateChanged, run: RunHandle) -> None:
        self.note(f"{event.state} by {event.by}")
        if event.state == "paused":
            run.resume_nowait()
        elif event.state == "running":
            run.stop_nowait("seen enough")


class KeepsLog(Placed):
    """Keeps a log that checkpoints wait for."""

    needs_run_dir = True

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.note(f"step {event.step}")

    async def make_durable(self) -> None:
        self.note("durable")

    def on_checkpoint_saved(self, event: CheckpointSaved, run: RunHandle) -> None:
        self.note(f"saved {event.saved_step}")


class FailsToKeepLog(Placed):
    """Cannot make its log durable."""

    needs_run_dir = True

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None: ...

    def make_durable(self) -> None:
        raise OSError("disk full")
