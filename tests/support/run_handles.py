"""Callbacks that use all of a run's handle and tell what they saw. Without torch: child processes load this module."""

import json
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Literal

import anyio

from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Event,
    RunHandle,
    SetLearningRate,
    Settings,
    TrainEnd,
    TrainStart,
    ValidationEnd,
)
from offloop.engine.run_handle import NOT_EVERYWHERE

Place = Literal["here", "process", "client"]
"""Where a handler has its run: in the process that trains, in a process of its callback, in a program elsewhere."""
LONG: Final = 30.0
"""Seconds that nothing here should take, also on a busy machine."""


class Saw(Event, frozen=True):
    """What a handler saw."""

    what: str = ""
    values: Settings = Settings()


class Go(Event, frozen=True):
    """Tells a handler to begin."""


class InStep(Event, frozen=True):
    """Tells that training is held in a step: no command applies meanwhile."""


class Standing(Event, frozen=True):
    """Tells that training waits for a decider."""


class Holds(Event, frozen=True):
    """Holds anything, also what no event may hold."""

    anything: Any = None


class InPlace(Callback):
    """A callback whose handlers run in this process or in one of their own. What they raise ends the run."""

    on_error = "raise"

    def __init__(self, place: Place) -> None:
        """Run in a place. A callback for a client is not given to the run: `AtClient` drives it."""
        if place == "process":
            self.runs_in = "process"


def error_of(act: Callable[[], object]) -> str:
    """Return type and text of what a call raises."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Commands, in both forms -------------------------------------------------------------------------

Asked = tuple[str, tuple[Any, ...], dict[str, Any]]
Script = Generator[Asked, Any, dict[str, Any]]
"""Yields commands, gets what each returned or raised, and returns what it saw."""


def do(command: str, *arguments: Any, **options: Any) -> Asked:
    """Return a command for a driver."""
    return command, arguments, options


async def awaiting(run: RunHandle, script: Script) -> Settings:
    """Await each command of a script."""
    try:
        command, arguments, options = next(script)
        while True:
            try:
                result = await getattr(run, command)(*arguments, **options)
            except Exception as error:
                command, arguments, options = script.throw(error)
            else:
                command, arguments, options = script.send(result)
    except StopIteration as end:
        return Settings(end.value)


def blocking(run: RunHandle, script: Script) -> Settings:
    """Give each command of a script by its `_nowait` form, and block until it has applied."""
    try:
        command, arguments, options = next(script)
        while True:
            try:
                result = getattr(run, f"{command}_nowait")(*arguments, **options).result(LONG)
            except Exception as error:
                command, arguments, options = script.throw(error)
            else:
                command, arguments, options = script.send(result)
    except StopIteration as end:
        return Settings(end.value)


def every_command(run: RunHandle) -> Script:
    """Give every command, and look at the state after each."""
    seen: dict[str, Any] = {"none": []}
    seen["none"].append((yield do("pause", "a look")))
    seen["paused"] = run.state
    seen["step"] = run.step
    seen["validate"] = yield do("validate")
    seen["none"].append((yield do("set_lr", 0.25)))
    saved = yield do("checkpoint", "mine")
    tagged = yield do("tag", "good")
    seen["saved"] = [saved.path, saved.saved_step, saved.reason]
    seen["tagged"] = [tagged.path, tagged.saved_step]
    seen["still"] = [run.state, run.step == seen["step"]]
    seen["none"].append((yield do("resume", by="another")))
    seen["resumed"] = run.state
    while run.step == seen["step"]:
        yield do("set_lr", 0.25, group=0)
    try:
        yield do("tag", "good")
    except ValueError as error:
        seen["taken"] = str(error)
    moved = yield do("tag", "good", move=True)
    seen["moved"] = moved.saved_step > saved.saved_step
    return seen


class Awaits(InPlace):
    """Awaits every command."""

    async def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None:
        run.publish(Saw(what="commands", values=await awaiting(run, every_command(run))))
        assert await run.stop("seen enough") is None  # type: ignore[func-returns-value]


class Blocks(InPlace):
    """Blocks for the result of every command."""

    def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None:
        thread = threading.Thread(target=lambda: run.set_lr_nowait(0.5).result(LONG))
        thread.start()
        thread.join()
        run.publish(Saw(what="commands", values=blocking(run, every_command(run))))
        assert run.stop_nowait("seen enough").result(LONG) is None


# What is refused ---------------------------------------------------------------------------------

MISTAKES: Final[tuple[Asked, ...]] = (
    do("set_lr", 0.0),
    do("set_lr", float("nan")),
    do("set_lr", True),
    do("set_lr", 0.1, group=1),
    do("set_lr", 0.1, optimizer="other"),
    do("stop", 3),
    do("tag", "last"),
    do("validate"),
    do("checkpoint"),
    do("tag", "good"),
)
COMMANDS: Final = ("pause", "resume", "stop", "set_lr", "validate", "checkpoint", "tag")


class Mistakes(InPlace):
    """Does what must not be done, in a run without a val_loader and a directory, and tells what that raises."""

    async def on_in_step(self, event: InStep, run: RunHandle) -> None:
        awaited, at_once = [], []
        for command, arguments, options in MISTAKES:
            at_once.append(error_of(lambda: getattr(run, f"{command}_nowait")(*arguments, **options)))  # noqa: B023 - called at once
            try:
                await getattr(run, command)(*arguments, **options)
            except Exception as error:
                awaited.append(f"{type(error).__name__}: {error}")
        run.publish(Saw(what="awaited", values=Settings(errors=awaited)))
        run.publish(Saw(what="at once", values=Settings(errors=at_once)))
        run.publish(Saw(what="refused", values=Settings(run.refused)))
        given = run.set_lr_nowait(0.5)
        run.publish(
            Saw(
                what="blocking",
                values=Settings(
                    errors=[error_of(lambda: given.result(LONG)), error_of(lambda: given.exception(LONG))]
                ),
            )
        )

        run.publish(Go())

    def on_go(self, event: Go, run: RunHandle) -> None:
        calls = [getattr(run, command) for command in COMMANDS]
        run.publish(Saw(what="plain", values=Settings(errors=[error_of(call) for call in calls])))
        once = Saw(what="published")
        errors = [
            error_of(lambda: run.publish(Holds(anything=object()))),
            error_of(lambda: run.publish("an event")),  # type: ignore[arg-type]  # the point
        ]
        run.publish(once)
        errors.append(error_of(lambda: run.publish(once)))
        run.publish(Saw(what="publish", values=Settings(errors=errors)))
        errors = [
            error_of(lambda: setattr(run, "anything", True)),
            error_of(lambda: setattr(run, "should_stop", True)),
            error_of(lambda: getattr(run, "should_stop")),  # noqa: B009 - the look-up is the point
            error_of(lambda: getattr(run, "stopp")),  # noqa: B009
        ]
        run.publish(Saw(what="attributes", values=Settings(errors=errors)))
        missing = {name: error_of(lambda: getattr(run, name)) for name in NOT_EVERYWHERE}  # noqa: B023
        run.publish(Saw(what="missing", values=Settings(missing)))
        run.stop_nowait()


# Futures -----------------------------------------------------------------------------------------


class TakesBack(InPlace):
    """Gives two commands and takes the first one back."""

    async def on_in_step(self, event: InStep, run: RunHandle) -> None:
        taken, kept = run.set_lr_nowait(0.125), run.give_nowait(SetLearningRate(0.25), by="another")
        kept.add_done_callback(lambda _: run.publish(Saw(what="done")))
        is_taken = taken.cancel()
        run.publish(
            Saw(what="taken back", values=Settings(cancelled=[is_taken, taken.cancelled(), kept.done()]))
        )
        await run.set_lr(0.5)
        run.publish(Saw(what="after", values=Settings(done=kept.done(), result=kept.result(0))))
        await run.stop()


# While training waits for others -----------------------------------------------------------------


class IsHeldUp(InPlace):
    """Awaits commands while training waits for a decider, and while it waits for a subscription."""

    async def on_standing(self, event: Standing, run: RunHandle) -> None:
        results = [await run.validate(), await run.checkpoint(), await run.set_lr(0.25)]  # type: ignore[func-returns-value]
        run.publish(Saw(what="decider", values=Settings(results=results)))

    async def on_go(self, event: Go, run: RunHandle) -> None:
        while await run.validate() is not None:
            pass
        run.publish(Saw(what="subscription"))


# The end -----------------------------------------------------------------------------------------


class Ends(InPlace):
    """Gives commands that do not apply any more. Writes what it saw into a file: no event comes after the end."""

    def __init__(self, place: Place, path: Path) -> None:
        """Write into a file."""
        super().__init__(place)
        self.path = path
        self.seen: dict[str, Any] = {}

    async def on_in_step(self, event: InStep, run: RunHandle) -> None:
        given: list[Future[Any]] = [run.set_lr_nowait(0.5), run.validate_nowait()]
        run.publish(Saw(what="given"))
        try:
            await run.set_lr(0.25)
        except Exception as error:
            self.seen["awaited"] = type(error).__name__
        self.seen["given"] = [error_of(lambda: each.result(0)) for each in given]  # noqa: B023 - called at once

    async def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.seen["state"] = [
            run.is_over,
            run.interrupted,
            run.step == event.step,
            run.metrics == event.metrics,
        ]
        self.seen["nowait"] = [
            error_of(run.pause_nowait),
            error_of(run.resume_nowait),
            error_of(run.stop_nowait),
            error_of(lambda: run.set_lr_nowait(0.5)),
            error_of(run.validate_nowait),
            error_of(run.checkpoint_nowait),
            error_of(lambda: run.tag_nowait("good")),
        ]
        self.seen["late"] = []
        for command, *arguments in (("stop",), ("validate",), ("tag", "good")):
            try:
                await getattr(run, command)(*arguments)
            except Exception as error:
                self.seen["late"].append(f"{type(error).__name__}: {error}")
        self.seen["publish"] = error_of(lambda: run.publish(Saw())).partition(":")[0]

    async def close(self) -> None:
        await anyio.Path(self.path).write_text(json.dumps(self.seen))


# State -------------------------------------------------------------------------------------------


class Looks(InPlace):
    """Reads the state in handlers: it is never older than the event that is handled."""

    async def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        values = Settings(
            id=run.id,
            dir=str(run.dir),
            monitors=[run.monitor, run.default_monitor],
            hyperparameters=dict(run.hyperparameters),
            refused=dict(run.refused),
            directions=[
                run.direction_of(name)
                for name in ("val_loss", "val_accuracy", "train_dice_loss", "val_unheard_of")
            ],
            is_handle=isinstance(run, RunHandle),
            flags=[run.is_over, run.interrupted, run.is_saving],
        )
        run.publish(Saw(what="facts", values=values))

    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        is_new = [
            run.epoch >= event.epoch,
            run.step >= event.step,
            # A program elsewhere is told it a moment later.
            run.validation_batch > 0 or type(run).__name__ == "Watch",
            all(name in run.metrics for name in event.metrics),
            error_of(lambda: run.metrics["val_other"]).startswith("MetricNotFoundError: "),
        ]
        run.publish(Saw(what="new", values=Settings(is_new=is_new)))

    async def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        if event.epoch == 0:
            await run.pause()
            values = Settings(
                now=[run.state, run.epoch, run.step, run.validation_batch],
                metrics=run.metrics == event.metrics,
                shown=repr(run).removeprefix(f"<{type(run).__name__} {run.id}"),
            )
            await run.resume()
            run.publish(Saw(what="now", values=values))
