"""RunHandle: what a callback or a program may ask of a run, and tell it, wherever it is.

    here: a `Run`           in the process of a callback: a `ChildRun`    in a program elsewhere: a `Watch`
    ────────────────────    ─────────────────────────────────────────    ─────────────────────────────────────
    reads the session       reads what the parent sends with events       reads what the server of the page says
    gives to the mailbox    gives over a socket pair, to the mailbox      gives over a websocket, to the mailbox

Each command is written once, here. An implementation only carries it to the run (`give_nowait`), and waits for its
result (`_wait_for`); what the two in other processes share of that is in `remote_run.py`. All else that a handle has is
plain values, which can be sent. What cannot be sent is in `Run` alone, and `NOT_EVERYWHERE` says why.
"""

import abc
import functools
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar

from offloop.engine.bus.commands import (
    Command,
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)
from offloop.engine.events import CheckpointSaved, Event, Metrics, Settings
from offloop.engine.monitor import Direction

Handle = TypeVar("Handle", bound="RunHandle")
T = TypeVar("T")
P = ParamSpec("P")

_STOP: Final = 'a run is not stopped by an attribute: call run.stop_nowait("why"), or await run.stop("why")'

_MODEL: Final = "the model is in the process that trains; use it in a callback that runs there"
_COUNTED: Final = "subscribers are counted in the process that trains; result.callback_costs has the figures"
_END: Final = "the result is in the process that trains; handle TrainEnd (on_train_end) instead"
NOT_EVERYWHERE: Final[Mapping[str, str]] = {
    "call": _MODEL,
    "call_nowait": _MODEL,
    "callback_costs": _COUNTED,
    "cancel": "only the process that trains may cancel its run; run.stop_nowait() stops it in order",
    "events": "a process gets the events that its callback handles; define handlers (on_step_end, ...) instead",
    "failure": _END,
    "result": _END,
    "samples": "the process that trains has the contents of samples; event.picture.read(run.dir) reads a file",
    "stack": "the training thread is in the process that trains",
    "subscriptions": _COUNTED,
    "trainer": _MODEL,
    "wait": _END,
}
"""What only a `Run` has, and why a handle in another process has not."""


def no_attribute(run: "RunHandle", name: str) -> AttributeError:
    """Return the error for an attribute that a handle does not have, for the `__getattr__` of a handle elsewhere."""
    if (why := NOT_EVERYWHERE.get(name)) is not None:
        text = f"there is no run.{name} here: {why}"
    else:
        # A property that raises AttributeError ends here, too.
        text = _STOP if name == "should_stop" else f"{type(run).__name__!r} object has no attribute {name!r}"
    return AttributeError(text, name=name, obj=run)


def awaited(
    method: Callable[Concatenate[Handle, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Handle, P], Coroutine[Any, Any, T]]:
    """Make a method of a handle raise where nothing can be awaited: the coroutine would be dropped silently."""

    @functools.wraps(method)
    def call(run: Handle, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        if run._is_plain():
            name = method.__name__
            instead = f"write run.{name}_nowait(...)" if name != "wait" else "handle TrainEnd (on_train_end)"
            raise RuntimeError(
                f"run.{name}() must be awaited, and this is a plain def, in a thread without an event loop: {instead}, "
                "or make it an async def"
            )
        return method(run, *args, **kwargs)

    return call


class RunHandle(abc.ABC):
    """A run, as its callbacks have it: in the process that trains it is a `Run`, in others it is not.

    A program that watches the run from elsewhere has a `Watch`, see `connect`.

    Its state is plain values. Where the handle is in another process, they are those that were sent last: never older
    than the event that is handled.

    Commands come in two forms. `await run.stop()` returns when the command has been applied. While the training
    thread waits for a decider or a full `block` subscription, it returns `None` on acceptance, because the training
    thread may be waiting for the task that awaits. `run.stop_nowait()` returns a `concurrent.futures.Future` at once.
    Both raise `RunEndedError` when the run is over. `pause` and `resume` apply at the next batch, the other commands
    at the next step boundary.

    All that a callback may ask of its run is here, so the class has many methods. Most have one line.
    """

    # Without a __dict__, `run.anything = True` is an error.
    __slots__ = ()

    # State

    @property
    @abc.abstractmethod
    def id(self) -> str:
        """Identity of the run, and the name of its directory."""

    @property
    @abc.abstractmethod
    def dir(self) -> Path | None:
        """Directory of the run, None if it has none.

        A run has one with `Trainer(run_dir=...)`, with `remote_dir=...`, or if a callback sets `needs_run_dir = True`.
        """

    @property
    @abc.abstractmethod
    def metrics(self) -> Metrics:
        """The latest value of each metric so far, as in `RunResult.metrics`. Any thread, also after the end.

        A copy: it does not change later. A missing key raises and lists the keys; `get` returns None for it.
        """

    @property
    @abc.abstractmethod
    def state(self) -> str:
        """`starting`, `running`, `validating`, `paused`, `stopping`, `closing` or the status of the result."""

    @property
    @abc.abstractmethod
    def is_over(self) -> bool:
        """True once the result is there. Any thread."""

    @property
    @abc.abstractmethod
    def is_saving(self) -> bool:
        """True while a checkpoint is taken or written."""

    @property
    @abc.abstractmethod
    def refused(self) -> dict[str, str]:
        """Commands that this run cannot apply at all, and why: `{"validate": "there is no val_loader ..."}`."""

    @property
    @abc.abstractmethod
    def interrupted(self) -> bool:
        """True if a signal has asked the run to stop: Ctrl-C or SIGTERM."""

    @property
    @abc.abstractmethod
    def epoch(self) -> int:
        """Index of the epoch in progress, from 0."""

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Optimizer steps done so far."""

    @property
    @abc.abstractmethod
    def validation_batch(self) -> int:
        """Batches given to the validation in progress, or to the last one."""

    @property
    @abc.abstractmethod
    def hyperparameters(self) -> Settings:
        """The argument `Trainer(hyperparameters=...)`; a copy of plain values. Any thread."""

    @property
    @abc.abstractmethod
    def monitor(self) -> str:
        """Key of the metric by which `result.best` is chosen."""

    @property
    @abc.abstractmethod
    def default_monitor(self) -> str:
        """Key of the metric for callbacks that name none: `Trainer(monitor=...)`, else `val_loss` or `train_loss`."""

    @abc.abstractmethod
    def direction_of(self, metric: str) -> Direction | None:
        """Return whether less or more of a metric is better, None if neither the metric nor its name tells."""

    @abc.abstractmethod
    def publish(self, event: Event) -> None:
        """Publish an event of a class that you define. Any thread; never waits.

        Raises:
            EventError: The event holds more than plain values, or was published before.
            BusClosedError: The run is over.
        """

    # What carries commands

    @abc.abstractmethod
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

    @abc.abstractmethod
    async def _wait_for(self, future: Future[T]) -> T | None:
        """Wait until a command applied and return its result.

        While the training thread waits for a decider or a full `block` subscription, return None at once: it may be
        waiting for the very task that waits here. Any event loop. Cancellation: the command stays given.

        Raises:
            RunEndedError: The run ended before the command applied.
        """

    @abc.abstractmethod
    def _is_plain(self) -> bool:
        """True where nothing can be awaited: in the training thread, and in a callback's worker thread."""

    # Commands

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

    def tag_nowait(
        self, tag: str, checkpoint: str | int | None = None, *, move: bool = False, by: str | None = None
    ) -> Future[CheckpointSaved]:
        """Give a checkpoint a name that keeps it from being deleted.

        Without `checkpoint`, it is that of the next step boundary: one is saved if there is none of that step. The
        future completes with the checkpoint when it and the tag are durable. It fails with `ValueError` if the tag is
        on another checkpoint of this run, with `CheckpointNotFoundError` if there is no such checkpoint.

        Args:
            tag: Letters, digits, `.`, `_` and `-`, at most 64; not `last`, `best`, `auto`, `must` or `never`.
            checkpoint: A saved one: `"last"`, `"best"`, a tag, a step, or its name.
            move: Take the tag off the checkpoint that has it; that one may then be deleted.
            by: Who gives the command, for the record.

        Raises:
            ConfigError: The run has no directory to save into, or an argument is not legal.
        """
        return self.give_nowait(TagCheckpoint(tag, move, checkpoint), by=by)

    @awaited
    async def pause(self, reason: str = "", *, by: str | None = None) -> None:
        """Pause at the next batch, also of a validation; everything stays on the device."""
        await self._wait_for(self.pause_nowait(reason, by=by))

    @awaited
    async def resume(self, *, by: str | None = None) -> None:
        """Continue after a pause."""
        await self._wait_for(self.resume_nowait(by=by))

    @awaited
    async def stop(self, reason: str = "asked to stop", *, by: str | None = None) -> None:
        """Stop at the next step boundary; returns when the command has been applied. `Run.wait` waits for the end."""
        await self._wait_for(self.stop_nowait(reason, by=by))

    @awaited
    async def set_lr(
        self, lr: float, group: int | None = None, optimizer: str | None = None, *, by: str | None = None
    ) -> None:
        """Set a learning rate, see `set_lr_nowait`."""
        await self._wait_for(self.set_lr_nowait(lr, group, optimizer, by=by))

    @awaited
    async def validate(self, *, by: str | None = None) -> Metrics | None:
        """Validate at the next step boundary and return the metrics."""
        return await self._wait_for(self.validate_nowait(by=by))

    @awaited
    async def checkpoint(self, reason: str = "command", *, by: str | None = None) -> CheckpointSaved | None:
        """Save a checkpoint at the next step boundary; returns when it is durable."""
        return await self._wait_for(self.checkpoint_nowait(reason, by=by))

    @awaited
    async def tag(
        self, tag: str, checkpoint: str | int | None = None, *, move: bool = False, by: str | None = None
    ) -> CheckpointSaved | None:
        """Tag a checkpoint, or that of the next step boundary, see `tag_nowait`; returns when both are durable."""
        return await self._wait_for(self.tag_nowait(tag, checkpoint, move=move, by=by))

    @property
    def should_stop(self) -> NoReturn:
        """No attribute of a run: `stop` stops it."""
        raise AttributeError(_STOP)

    @should_stop.setter
    def should_stop(self, value: object) -> NoReturn:
        raise AttributeError(_STOP)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self.state}, epoch {self.epoch}, step {self.step}>"
