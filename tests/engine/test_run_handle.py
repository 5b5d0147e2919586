"""engine/run_handle.py: a run's handle is the same thing in every place where a callback may run."""

import json
import threading
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from client_callbacks import placed
from run_handles import (
    COMMANDS,
    LONG,
    Awaits,
    Blocks,
    Ends,
    Go,
    InStep,
    IsHeldUp,
    Looks,
    Mistakes,
    Place,
    Saw,
    Standing,
    TakesBack,
)

from offloop.engine import (
    Callback,
    CheckpointSaved,
    CommandApplied,
    EpochEnd,
    EpochStart,
    LearningRateChanged,
    Run,
    RunHandle,
    StepEnd,
    StepPoint,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine.run_handle import NOT_EVERYWHERE, no_attribute
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

ENDLESS: Final = 1_000_000_000  # steps
VIEWER: Final = "viewer 127.0.0.1"
"""What the page's server says of a program that gives commands, before what that says itself."""

in_every_place = pytest.mark.parametrize("place", ["here", "process", "client"])
where_callbacks_run = pytest.mark.parametrize("place", ["here", "process"])
pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """Load what the first run loads, which would hold the event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), tiny_loader(1), epochs=1, metrics=["accuracy"])


class Gate(Callback):
    """Holds the training thread in its first step until a handler has seen something."""

    def __init__(self, until: str) -> None:
        self.until = until
        self.open = threading.Event()

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        if not self.open.is_set():
            point.run.publish(InStep())
            assert self.open.wait(LONG)

    async def on_saw(self, event: Saw, run: Run) -> None:
        if event.what == self.until:
            self.open.set()


def seen_by(recorder: Recorder) -> dict[str, Any]:
    """Return what handlers saw, by its name."""
    return {event.what: event.values for event in recorder.of(Saw)}


async def saw(run: Run, what: str) -> Saw:
    """Wait until a handler has seen something."""
    async with run.events(Saw) as events:
        async for event in events:
            if event.what == what:
                return event
    raise AssertionError(f"no handler has seen {what!r}")


# Commands ----------------------------------------------------------------------------------------


@in_every_place
@pytest.mark.parametrize("form", [Awaits, Blocks])
async def test_every_command_has_its_result_and_is_signed(
    place: Place, form: type[Awaits] | type[Blocks], tmp_path: Path
) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer(run_dir=tmp_path, callbacks=[placed(form(place), place), recorder]).start(
            EndlessLoader(), tiny_loader(2), max_steps=ENDLESS
        ) as run:
            pass
    seen = seen_by(recorder)["commands"]
    validated, mine = recorder.of(ValidationEnd)[0], recorder.of(CheckpointSaved)[0]
    assert seen == {
        "none": [None] * 3,
        "paused": "paused",
        "step": validated.step,
        "validate": validated.metrics,
        "saved": [mine.path, validated.step, mine.reason],
        "tagged": [mine.path, validated.step],
        "still": ["paused", True],
        "resumed": "running",
        "taken": seen["taken"],
        "moved": True,
    }
    assert "good" in seen["taken"] and "move=True" in seen["taken"]
    assert (run.result.status, run.result.reason) == ("stopped", "seen enough")
    assert run.result.callback_errors == {}

    applied = recorder.of(CommandApplied)
    if form is Blocks:
        from_thread = applied.pop(0)
        # A thread of its own
        assert (from_thread.command, from_thread.by) == ("set_lr", VIEWER if place == "client" else "user")
    name = VIEWER if place == "client" else form.__name__
    assert [(event.command, event.by) for event in applied[:6]] == [
        ("pause", name),
        ("validate", name),
        ("set_lr", name),
        ("checkpoint", name),
        ("tag", name),
        ("resume", f"{VIEWER}: another" if place == "client" else "another"),
    ]
    assert [event.command for event in applied[-3:]] == ["tag", "tag", "stop"]
    assert applied[0].arguments == {"reason": "a look"}
    assert applied[2].arguments == {"lr": 0.25, "group": None, "optimizer": None}


@in_every_place
async def test_a_mistake_has_the_same_error_in_every_place(place: Place) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer(callbacks=[placed(Mistakes(place), place), Gate("blocking"), recorder]).start(
            EndlessLoader(), max_steps=ENDLESS
        ) as run:
            pass
    seen = seen_by(recorder)
    no_loader = "there is no val_loader to validate on: give one to train()"
    no_dir = "the run has no directory to save into: give Trainer(run_dir=...)"
    mistakes = [
        "ConfigError: lr must be a finite number above 0, got 0.0",
        "ConfigError: lr must be a finite number above 0, got nan",
        "ConfigError: lr must be a finite number above 0, got True",
        "ConfigError: group must be from 0 to 0, got 1",
        "ConfigError: there is no optimizer 'other'; there are optimizer",
        "TypeError: reason must be a string, got 3",
        seen["awaited"]["errors"][6],
        f"ConfigError: {no_loader}",
        f"ConfigError: {no_dir}",
        f"ConfigError: {no_dir}",
    ]
    assert seen["at once"]["errors"] == seen["awaited"]["errors"] == mistakes
    assert mistakes[6].startswith("ConfigError: tag must be letters")
    refused = {"validate": no_loader, "checkpoint": no_dir, "tag": no_dir}
    assert seen["refused"] == refused | ({} if place == "here" else {"call": NOT_EVERYWHERE["call"]})
    assert (
        seen["blocking"]["errors"]
        == [
            "DeadlockError: run.set_lr_nowait(...).result() would block the event loop, which the run needs: "
            "write await run.set_lr(...)"
        ]
        * 2
    )
    assert seen["plain"]["errors"] == [
        f"RuntimeError: run.{command}() must be awaited, and this is a plain def, in a thread without an event loop: "
        f"write run.{command}_nowait(...), or make it an async def"
        for command in COMMANDS
    ]
    not_plain, no_event, again = seen["publish"]["errors"]
    assert not_plain.startswith("EventError: Holds") and again.startswith("EventError: ")
    assert no_event.startswith("EventError: publish takes an event, got a str")
    hint = 'AttributeError: a run is not stopped by an attribute: call run.stop_nowait("why"), or await run.stop("why")'
    kind = {"here": "Run", "process": "ChildRun", "client": "Watch"}[place]
    assert seen["attributes"]["errors"] == [
        f"AttributeError: {kind!r} object has no attribute 'anything'",
        hint,
        hint,
        f"AttributeError: {kind!r} object has no attribute 'stopp'",
    ]
    if place != "here":
        missing = {
            name: f"AttributeError: there is no run.{name} here: {why}"
            for name, why in NOT_EVERYWHERE.items()
        }
        assert seen["missing"] == missing | ({"events": "nothing"} if place == "client" else {})
    assert run.result.status == "stopped"


@in_every_place
async def test_a_command_that_was_taken_back_does_not_apply(place: Place) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer(
            callbacks=[placed(TakesBack(place), place), Gate("taken back"), recorder]
        ).start(EndlessLoader(), max_steps=ENDLESS):
            pass
    seen = seen_by(recorder)
    assert seen["taken back"] == {"cancelled": [True, True, False]}
    assert seen["after"] == {"done": True, "result": None}
    assert "done" in seen
    assert [event.lr for event in recorder.of(LearningRateChanged)] == [0.25, 0.5]
    givers = [f"{VIEWER}: another", VIEWER] if place == "client" else ["another", "TakesBack"]
    assert [event.by for event in recorder.of(CommandApplied)][:2] == givers


# While training waits for others -----------------------------------------------------------------


class Stands(Callback):
    """Lets training wait until a handler has awaited commands."""

    def __init__(self) -> None:
        self.returned = anyio.Event()

    @decides
    async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        run.publish(Standing())
        await self.returned.wait()


class Frees(Callback):
    """Ends the wait of `Stands`."""

    def __init__(self, stands: Stands) -> None:
        self.stands = stands

    async def on_saw(self, event: Saw, run: Run) -> None:
        self.stands.returned.set()


@where_callbacks_run
async def test_an_awaited_command_returns_on_acceptance_while_training_waits_for_others(
    place: Place, tmp_path: Path
) -> None:
    recorder, stands = Recorder(), Stands()
    with anyio.fail_after(LONG):
        async with tiny_trainer(
            run_dir=tmp_path,
            flush_interval=0.001,
            callbacks=[IsHeldUp(place), stands, Frees(stands), recorder],
        ).start(EndlessLoader(), tiny_loader(1), max_steps=ENDLESS) as run:
            assert (await saw(run, "decider")).values == {"results": [None, None, None]}
            async for _ in run.events(LearningRateChanged):
                break  # accepted is not dropped
            with run.events(StepEnd, buffer=1, on_full="block"):
                run.publish(Go())
                await saw(run, "subscription")
            await run.stop()
    applied = [(event.command, event.by) for event in recorder.of(CommandApplied)]
    assert applied[:3] == [(command, "IsHeldUp") for command in ("validate", "checkpoint", "set_lr")]


# The end -----------------------------------------------------------------------------------------


@in_every_place
async def test_commands_and_events_after_the_end_say_so(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    with anyio.fail_after(LONG):
        async with tiny_trainer(
            run_dir=tmp_path,
            accumulate_grad_batches=2,
            callbacks=[placed(Ends(place, path), place), Gate("cancelled")],
        ).start(EndlessLoader(), tiny_loader(1), max_steps=ENDLESS) as run:
            await saw(run, "given")
            run.cancel()  # in the middle of a window: no step boundary comes any more
            run.publish(Saw(what="cancelled"))
    assert run.result.status == "cancelled"
    seen = json.loads(path.read_text())
    commands = ["pause", "resume", "stop", "set_lr", "validate", "checkpoint", "tag"]
    assert seen == {
        "awaited": "RunEndedError",
        "given": [
            f"RunEndedError: the run ended before {command} could be applied"
            for command in ("set_lr", "validate")
        ],
        # A program cannot tell the last event from the end.
        "state": [place == "client", False, True, True],
        "nowait": [f"RunEndedError: {command} came too late: the run is over" for command in commands],
        "late": [
            f"RunEndedError: {command} came too late: the run is over"
            for command in ("stop", "validate", "tag")
        ],
        "publish": "BusClosedError",
    }


# State -------------------------------------------------------------------------------------------


class Pauses(Callback):
    """Pauses after the first epoch."""

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        if event.epoch == 0:
            run.pause_nowait()


@in_every_place
async def test_state_is_as_new_as_the_event_that_is_handled_or_the_last_command(
    place: Place, tmp_path: Path
) -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with tiny_trainer(
            run_dir=tmp_path,
            monitor="val_accuracy",
            hyperparameters={"width": 8, "name": "wide"},
            callbacks=[placed(Looks(place), place), Pauses(), recorder],
        ).start(tiny_loader(2), tiny_loader(3), epochs=2, metrics=["accuracy"]) as run:
            pass
    seen = seen_by(recorder)
    assert seen["facts"] == {
        "id": run.id,
        "dir": str(tmp_path / run.id),
        "monitors": ["val_accuracy", "val_accuracy"],
        "hyperparameters": {"width": 8, "name": "wide"},
        "refused": {} if place == "here" else {"call": NOT_EVERYWHERE["call"]},
        "directions": ["min", "max", "min", None],
        "is_handle": True,
        "flags": [False, False, False],
    }
    looks = [event.values for event in recorder.of(Saw) if event.what == "new"]
    # A program elsewhere may look at the last one when the run is over, and then cannot publish what it saw.
    assert looks == [{"is_new": [True] * 5}] * (len(looks) if place == "client" else 2) and looks
    assert seen["now"] == {
        "now": ["paused", 0, 2, 3],
        "metrics": True,
        "shown": ": paused, epoch 0, step 2>",
    }
    assert run.result.status == "completed"


# The interface -----------------------------------------------------------------------------------


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_what_only_a_run_has_is_listed_with_the_reason() -> None:
    assert list(NOT_EVERYWHERE) == sorted(public(Run) - public(RunHandle))


async def test_an_attribute_that_a_handle_elsewhere_does_not_have_is_explained() -> None:
    async with tiny_trainer().start(tiny_loader(1), epochs=1) as run:
        texts = [str(no_attribute(run, name)) for name in ("trainer", "should_stop", "stopp")]
    assert texts == [
        "there is no run.trainer here: the model is in the process that trains; use it in a callback that runs there",
        'a run is not stopped by an attribute: call run.stop_nowait("why"), or await run.stop("why")',
        "'Run' object has no attribute 'stopp'",
    ]
