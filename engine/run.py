"""Run: the handle of a training run, for any task and thread.

A `Run` holds no state. It reads that of its session, and gives commands to the session's mailbox.
"""

import functools
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, Protocol, TypeVar, overload

from offloop.engine import checks
from offloop.engine.bus.command_mailbox import Mailbox, actor
from offloop.engine.bus.commands import (
    Call,
    Command,
    Need,
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
    check,
    refused,
)
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.subscription import BUFFER, OnFull, Subscription, SubscriptionStatistics
from offloop.engine.bus.waker import result_of
from offloop.engine.config import TrainerConfig
from offloop.engine.errors import DeadlockError
from offloop.engine.events import CheckpointSaved, Event, Metrics, Settings
from offloop.engine.monitor import Direction
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.result import RunResult
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.monitors import Monitors
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.progress import Progress

E = TypeVar("E", bound=Event)
T = TypeVar("T")
P = ParamSpec("P")

_STOP: Final = 'a run is not stopped by an attribute: call run.stop_nowait("why"), or await run.stop("why")'


class Source(Protocol):
    """What a `Run` needs of the session behind it. Any thread reads it, during the run and after its end."""

    run_id: str
    config: TrainerConfig
    monitors: Monitors
    mailbox: Mailbox
    bus: Bus
    lifetime: Lifetime
    progress: Progress
    has_validation: bool
    weak_trainer: weakref.ref[TrainingProgram]
    result: RunResult | None
    finished: Future[RunResult]

    @property
    def dir(self) -> Path | None: ...
    @property
    def state(self) -> str: ...
    @property
    def is_saving(self) -> bool: ...
    @property
    def callback_costs(self) -> dict[str, CallbackCosts]: ...
    def publish(self, event: Event, /) -> None: ...
    def stack(self) -> str: ...


def awaited(
    method: Callable[Concatenate["Run", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Run", P], Coroutine[Any, Any, T]]:
    """Make a method of `Run` raise where nothing can be awaited: the coroutine would be dropped silently."""

    @functools.wraps(method)
    def call(run: "Run", /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        if run._mailbox.places.is_plain():
            name = method.__name__
            instead = f"write run.{name}_nowait(...)" if name != "wait" else "handle TrainEnd (on_train_end)"
            raise RuntimeError(
                f"run.{name}() must be awaited, and this is a plain def, in a thread without an event loop: {instead}, "
                "or make it an async def"
            )
        return method(run, *args, **kwargs)

    return call


class Run:
    """A run, from its start to its result. Usable from any task, thread or event loop.

    Commands come in two forms. `await run.stop()` returns when the command has been applied. While the training
    thread waits for a decider or a full `block` subscription, it returns `None` on acceptance, because the training
    thread may be waiting for the task that awaits. `run.stop_nowait()` returns a `concurrent.futures.Future` at once.
    Both raise `RunEndedError` when the run is over. `pause` and `resume` apply at the next batch, the other commands
    at the next step boundary.

    All that a program may ask of a run is here, so the class has many methods. Most have one line.
    """

    # Without a __dict__, `run.anything = True` is an error.
    __slots__ = ("__weakref__", "_bus", "_mailbox", "_session")

    def __init__(self, session: Source) -> None:
        self._session = session
        self._mailbox = session.mailbox
        self._bus = session.bus

    # State

    @property
    def id(self) -> str:
        """Identity of the run, and the name of its directory."""
        return self._session.run_id

    @property
    def dir(self) -> Path | None:
        """Directory of the run, None if it has none.

        A run has one with `Trainer(run_dir=...)`, with `remote_dir=...`, or if a callback sets `needs_run_dir = True`.
        """
        return self._session.dir

    @property
    def metrics(self) -> Metrics:
        """The latest value of each metric so far, as in `RunResult.metrics`. Any thread, also after the end.

        A copy: it does not change later. A missing key raises and lists the keys; `get` returns None for it.
        """
        result = self._session.result
        return Metrics(self._session.progress.latest) if result is None else result.metrics

    @property
    def state(self) -> str:
        """`starting`, `running`, `validating`, `paused`, `stopping`, `closing` or the status of the result."""
        return self._session.state

    @property
    def is_over(self) -> bool:
        """True once the result is there. Any thread."""
        return self._session.result is not None

    @property
    def is_saving(self) -> bool:
        """True while a checkpoint is taken or written."""
        return self._session.is_saving

    @property
    def failure(self) -> BaseException | None:
        """The exception that the run fails with. None if there is none, and once the run has raised it."""
        return self._session.lifetime.failure

    def stack(self) -> str:
        """Return the stack of the training thread as Python prints it; empty when the thread has ended. Any thread."""
        return self._session.stack()

    @property
    def refused(self) -> dict[str, str]:
        """Commands that this run cannot apply at all, and why: `{"validate": "there is no val_loader ..."}`."""
        return refused(self._lacking)

    @property
    def _lacking(self) -> set[Need]:
        lacking = set()
        if not self._session.has_validation:
            lacking.add(Need.VAL_LOADER)
        if self.dir is None:
            lacking.add(Need.DIRECTORY)
        return lacking

    @property
    def interrupted(self) -> bool:
        """True if a signal has asked the run to stop: Ctrl-C or SIGTERM."""
        return self._session.lifetime.signal_count > 0

    @property
    def epoch(self) -> int:
        """Index of the epoch in progress, from 0."""
        return self._session.progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._session.progress.step

    @property
    def validation_batch(self) -> int:
        """Batches given to the validation in progress, or to the last one."""
        return self._session.progress.val_batches

    @property
    def trainer(self) -> TrainingProgram:
        """The trainer. Its model and optimizers are live: touch them in the training thread only, that is in a
        plain decider, a step hook or `call`.

        Raises:
            RuntimeError: The run is over and the program has not kept the trainer.
        """
        trainer = self._session.weak_trainer()
        if trainer is None:
            raise RuntimeError(f"run {self.id} is over, and its trainer is gone: keep the trainer yourself")
        return trainer

    @property
    def hyperparameters(self) -> Settings:
        """The argument `Trainer(hyperparameters=...)`; a copy of plain values. Any thread."""
        return Settings(self._session.config.hyperparameters or {})

    @property
    def monitor(self) -> str:
        """Key of the metric by which `result.best` is chosen."""
        return self._session.monitors.best

    @property
    def default_monitor(self) -> str:
        """Key of the metric for callbacks that name none: `Trainer(monitor=...)`, else `val_loss` or `train_loss`."""
        return self._session.monitors.default

    def direction_of(self, metric: str) -> Direction | None:
        """Return whether less or more of a metric is better, None if neither the metric nor its name tells."""
        return self._session.monitors.direction_of(metric)

    @property
    def result(self) -> RunResult:
        """Outcome of the run.

        Raises:
            RuntimeError: The run is not over.
        """
        result = self._session.result
        if result is None:
            raise RuntimeError(f"run {self.id} is not over (it is {self.state}): await run.wait()")
        return result

    @awaited
    async def wait(self) -> RunResult:
        """Wait for the end, whatever it is, and return the result. Cancellation: the run continues.

        Raises:
            DeadlockError: In a handler of one of the run's callbacks: the end of the run waits for it.
        """
        if self._mailbox.places.is_handling():
            raise DeadlockError(
                "run.wait() in a callback would wait for ever: the run ends when its callbacks have handled their "
                "events. Handle TrainEnd (on_train_end) instead, or wait in a task of your own"
            )
        return await result_of(self._session.finished)

    # Events

    @overload
    def events(
        self, *, buffer: int = BUFFER, on_full: OnFull = "drop_oldest", name: str = "events"
    ) -> Subscription[Event]: ...

    @overload
    def events(
        self, *types: type[E], buffer: int = BUFFER, on_full: OnFull = "drop_oldest", name: str = "events"
    ) -> Subscription[E]: ...

    def events(
        self, *types: type[Event], buffer: int = BUFFER, on_full: OnFull = "drop_oldest", name: str = "events"
    ) -> Subscription[Event]:
        """Subscribe to events, from now on; milestones since the start of the run are replayed.

        The result is an iterator (`async for`) and a context manager. It ends with the run, or when the program drops
        it, as after a `break`. In a plain thread call its `take()`.

        Args:
            types: Event classes; none means all.
            buffer: Samples held for a reader that lags, at least 1.
            on_full: `"drop_oldest"`, or `"block"`: training waits while the buffer is full.
            name: Shown in `subscriptions`.
        """
        for each in types:
            if not (isinstance(each, type) and issubclass(each, Event)):
                raise TypeError(
                    f"events takes event classes like EpochEnd, got {each!r}; several as events(EpochEnd, StepEnd)"
                )
        checks.whole_number("buffer", buffer)
        checks.choice("on_full", on_full, ("drop_oldest", "block"))
        return self._bus.subscribe(
            types or (Event,), name=name, buffer=buffer, on_full=on_full, replay=True, owner=actor.get()
        )

    def publish(self, event: Event) -> None:
        """Publish an event of a class that you define. Any thread; never waits.

        Raises:
            EventError: The event holds more than plain values, or was published before.
            BusClosedError: The run is over.
        """
        self._session.publish(event)

    @property
    def subscriptions(self) -> tuple[SubscriptionStatistics, ...]:
        """Statistics of the subscribers: what they got and missed so far."""
        return self._bus.subscriptions

    @property
    def callback_costs(self) -> dict[str, CallbackCosts]:
        """Costs of the callbacks so far, by name."""
        return self._session.callback_costs

    # Commands

    def give_nowait(self, command: Command[T], *, by: str | None = None) -> Future[T]:
        """Give a command as a value, for code that gets commands from elsewhere: `run.give_nowait(Stop("enough"))`.

        The other `*_nowait` methods do this for one kind of command.

        Args:
            command: The command.
            by: Who gives it, for the record; None for the callback whose handler runs, or `user`.

        Raises:
            ConfigError: This run cannot apply the command.
            RunEndedError: The run is over.
        """
        trainer = self._session.weak_trainer()
        if trainer is not None and not self._mailbox.ended:
            groups = {name: len(each.param_groups) for name, each in trainer.optimizers.items()}
            check(command, lacking=self._lacking, groups=groups)
        return self._mailbox.give(command, by)

    def pause_nowait(self, reason: str = "", *, by: str | None = None) -> Future[None]:
        """Pause at the next batch, also of a validation; everything stays on the device."""
        return self.give_nowait(Pause(reason), by=by)

    def resume_nowait(self, *, by: str | None = None) -> Future[None]:
        """Continue after a pause."""
        return self.give_nowait(Resume(), by=by)

    def stop_nowait(self, reason: str = "asked to stop", *, by: str | None = None) -> Future[None]:
        """Stop at the next step boundary, with `status="stopped"`; it ends a pause and a validation."""
        return self.give_nowait(Stop(reason), by=by)

    def set_lr_nowait(
        self, lr: float, group: int | None = None, optimizer: str | None = None, *, by: str | None = None
    ) -> Future[None]:
        """Set a learning rate; a schedule continues from there, multiplied.

        Args:
            lr: For the largest group, the others are scaled alike; or for `group` alone. Finite, above 0.
            group: Index of one parameter group.
            optimizer: Its name, where the trainer has several.
            by: Who gives the command, for the record.

        Raises:
            ConfigError: No such value, group or optimizer.
        """
        return self.give_nowait(SetLearningRate(lr, group, optimizer), by=by)

    def validate_nowait(self, *, by: str | None = None) -> Future[Metrics]:
        """Validate at the next step boundary; the result is the metrics.

        Raises:
            ConfigError: The run has no val_loader.
        """
        return self.give_nowait(Validate(), by=by)

    def checkpoint_nowait(self, reason: str = "command", *, by: str | None = None) -> Future[CheckpointSaved]:
        """Save a checkpoint at the next step boundary; the future completes when it is durable.

        Raises:
            ConfigError: The run has no directory to save into.
        """
        return self.give_nowait(SaveCheckpoint(reason), by=by)

    def tag_nowait(self, tag: str, *, move: bool = False, by: str | None = None) -> Future[CheckpointSaved]:
        """Give the state of the next step boundary a name that keeps its checkpoint from being deleted.

        If there is a checkpoint of that step, it gets the tag; else one is saved. The future completes with that
        checkpoint when both are durable. It fails with `ValueError` if the tag is on another checkpoint of this run.

        Args:
            tag: Letters, digits, `.`, `_` and `-`, at most 64; not `last`, `best`, `auto`, `must` or `never`.
            move: Take the tag off the checkpoint that has it; that one may then be deleted.
            by: Who gives the command, for the record.

        Raises:
            ConfigError: The run has no directory to save into, or `tag` is not legal.
        """
        return self.give_nowait(TagCheckpoint(tag, move), by=by)

    def call_nowait(self, function: Callable[[Any], T], *, by: str | None = None) -> Future[T]:
        """Run `function(trainer)` in the training thread at the next step boundary: the safe way to a live model.

        An exception of the function goes to the future, not to the run.
        """
        return self.give_nowait(Call(function), by=by)

    @awaited
    async def pause(self, reason: str = "", *, by: str | None = None) -> None:
        """Pause at the next batch, also of a validation; everything stays on the device."""
        await self._mailbox.wait_for(self.pause_nowait(reason, by=by))

    @awaited
    async def resume(self, *, by: str | None = None) -> None:
        """Continue after a pause."""
        await self._mailbox.wait_for(self.resume_nowait(by=by))

    @awaited
    async def stop(self, reason: str = "asked to stop", *, by: str | None = None) -> None:
        """Stop at the next step boundary; returns when the command has been applied. `wait()` waits for the end."""
        await self._mailbox.wait_for(self.stop_nowait(reason, by=by))

    @awaited
    async def set_lr(
        self, lr: float, group: int | None = None, optimizer: str | None = None, *, by: str | None = None
    ) -> None:
        """Set a learning rate, see `set_lr_nowait`."""
        await self._mailbox.wait_for(self.set_lr_nowait(lr, group, optimizer, by=by))

    @awaited
    async def validate(self, *, by: str | None = None) -> Metrics | None:
        """Validate at the next step boundary and return the metrics."""
        return await self._mailbox.wait_for(self.validate_nowait(by=by))

    @awaited
    async def checkpoint(self, reason: str = "command", *, by: str | None = None) -> CheckpointSaved | None:
        """Save a checkpoint at the next step boundary; returns when it is durable."""
        return await self._mailbox.wait_for(self.checkpoint_nowait(reason, by=by))

    @awaited
    async def tag(self, tag: str, *, move: bool = False, by: str | None = None) -> CheckpointSaved | None:
        """Tag the checkpoint of the next step boundary, see `tag_nowait`; returns when both are durable."""
        return await self._mailbox.wait_for(self.tag_nowait(tag, move=move, by=by))

    @awaited
    async def call(self, function: Callable[[Any], T], *, by: str | None = None) -> T | None:
        """Run `function(trainer)` in the training thread at a step boundary and return its result."""
        return await self._mailbox.wait_for(self.call_nowait(function, by=by))

    def cancel(self, reason: str = "cancelled") -> None:
        """End the run at its next batch, out of any wait, with `status="cancelled"`. Any thread; does not wait.

        Calling it after the end, or twice, is fine.
        """
        self._session.lifetime.cancel(reason)

    @property
    def should_stop(self) -> NoReturn:
        """No attribute of a run: `stop` stops it."""
        raise AttributeError(_STOP)

    @should_stop.setter
    def should_stop(self, value: object) -> NoReturn:
        raise AttributeError(_STOP)

    def __repr__(self) -> str:
        progress = self._session.progress
        return f"<Run {self.id}: {self.state}, epoch {progress.epoch}, step {progress.step}>"
