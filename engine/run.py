"""Run: the handle of a training run, for any task and thread.

A `Run` holds no state. It reads that of its session, and gives commands to the session's mailbox.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from offloop.engine.bus.command_mailbox import Mailbox, actor
from offloop.engine.bus.commands import Call, Command, Need, check, refused_for
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.subscription import (
    BUFFER,
    OnFull,
    Subscription,
    SubscriptionStatistics,
    check_arguments,
)
from offloop.engine.bus.waker import result_of
from offloop.engine.config import TrainerConfig
from offloop.engine.errors import DeadlockError
from offloop.engine.events import Event, Metrics, Settings
from offloop.engine.monitor import Direction
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.result import RunResult
from offloop.engine.run_handle import RunHandle, awaited
from offloop.engine.samples.files import SampleFiles
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.monitors import Monitors
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.progress import Progress

E = TypeVar("E", bound=Event)
T = TypeVar("T")


class Source(Protocol):
    """What a `Run` needs of the session behind it. Any thread reads it, during the run and after its end."""

    run_id: str
    config: TrainerConfig
    monitors: Monitors
    mailbox: Mailbox
    evaluations: Evaluations
    samples: SampleFiles
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


class Run(RunHandle):
    """A run in this process, from its start to its result. Usable from any task, thread or event loop.

    To what every `RunHandle` has it adds what cannot be sent to another process: the live trainer, also for `call`;
    events and figures of the callbacks; `cancel`, and the result.

    All that a program may ask of a run is here, so the class has many methods. Most have one line.
    """

    __slots__ = ("__weakref__", "_bus", "_mailbox", "_session")

    def __init__(self, session: Source) -> None:
        self._session = session
        self._mailbox = session.mailbox
        self._bus = session.bus

    # State

    @property
    def id(self) -> str:
        return self._session.run_id

    @property
    def dir(self) -> Path | None:
        return self._session.dir

    @property
    def metrics(self) -> Metrics:
        result = self._session.result
        if result is not None:
            return result.metrics
        return Metrics({**self._session.progress.latest, **self._session.evaluations.latest()})

    @property
    def state(self) -> str:
        return self._session.state

    @property
    def is_over(self) -> bool:
        return self._session.result is not None

    @property
    def is_saving(self) -> bool:
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
        lacking = set()
        if not self._session.has_validation:
            lacking.add(Need.VAL_LOADER)
        if self.dir is None:
            lacking.add(Need.DIRECTORY)
        return refused_for(lacking)

    @property
    def interrupted(self) -> bool:
        return self._session.lifetime.signal_count > 0

    @property
    def epoch(self) -> int:
        return self._session.progress.epoch

    @property
    def step(self) -> int:
        return self._session.progress.step

    @property
    def validation_batch(self) -> int:
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
        return Settings(self._session.config.hyperparameters or {})

    @property
    def monitor(self) -> str:
        return self._session.monitors.best

    @property
    def default_monitor(self) -> str:
        return self._session.monitors.default

    def direction_of(self, metric: str) -> Direction | None:
        return self._session.monitors.direction_of(metric)

    @property
    def _directions(self) -> dict[str, Direction]:
        """Directions of the metrics that the run computes."""
        return self._session.monitors.directions

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
        check_arguments(types, buffer, on_full)
        return self._bus.subscribe(
            types or (Event,), name=name, buffer=buffer, on_full=on_full, replay=True, owner=actor.get()
        )

    def publish(self, event: Event) -> None:
        self._session.publish(event)

    @property
    def samples(self) -> SampleFiles:
        """Contents of the pictures and long texts that the run has published. Any thread, also after the end."""
        return self._session.samples

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
        if not self._mailbox.ended:
            check(command, refused=self.refused, groups=self._groups)
        return self._mailbox.give(command, by)

    @property
    def _groups(self) -> dict[str, int]:
        """How many parameter groups each optimizer has, by its name. Empty if the trainer is gone."""
        trainer = self._session.weak_trainer()
        optimizers = {} if trainer is None else trainer.optimizers
        return {name: len(each.param_groups) for name, each in optimizers.items()}

    async def _wait_for(self, future: Future[T]) -> T | None:
        return await self._mailbox.wait_for(future)

    def _is_plain(self) -> bool:
        return self._mailbox.places.is_plain()

    def call_nowait(self, function: Callable[[Any], T], *, by: str | None = None) -> Future[T]:
        """Run `function(trainer)` in the training thread at the next step boundary: the safe way to a live model.

        An exception of the function goes to the future, not to the run.
        """
        return self.give_nowait(Call(function), by=by)

    @awaited
    async def call(self, function: Callable[[Any], T], *, by: str | None = None) -> T | None:
        """Run `function(trainer)` in the training thread at a step boundary and return its result."""
        return await self._wait_for(self.call_nowait(function, by=by))

    def cancel(self, reason: str = "cancelled") -> None:
        """End the run at its next batch, out of any wait, with `status="cancelled"`. Any thread; does not wait.

        Calling it after the end, or twice, is fine.
        """
        self._session.lifetime.cancel(reason)
