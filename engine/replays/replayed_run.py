"""ReplayedRun: the handle of a run that is replayed, as one callback has it.

Its state is that of the recorded run at the event which the callback handles. Commands change nothing: what comes next
is recorded. They are noted, and the result of the replay lists them.
"""

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import msgspec

from offloop.engine.bus.commands import Command, Pause, Resume, SetLearningRate, Stop, check
from offloop.engine.bus.deadlock import Places
from offloop.engine.bus.subscription import (
    BUFFER,
    OnFull,
    Subscription,
    SubscriptionStatistics,
    check_arguments,
)
from offloop.engine.bus.waker import result_of
from offloop.engine.encoding import check_new
from offloop.engine.errors import BusClosedError, ConfigError, RunEndedError
from offloop.engine.events import (
    EpochEnd,
    Evaluated,
    Event,
    Metrics,
    Settings,
    StateChanged,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.replays.control import ReplayControl
from offloop.engine.replays.samples import ReplayedSamples
from offloop.engine.run_handle import RunHandle, no_attribute
from offloop.engine.samples.files import SampleFiles

E = TypeVar("E", bound=Event)
T = TypeVar("T")
_set = msgspec.structs.force_setattr

_MODEL: Final = (
    "a replay has no model and trains nothing. Test what needs them with a short training, as of "
    "offloop.engine.testing.tiny_trainer()"
)
_END: Final = "a replay has no result of a training; handle TrainEnd (on_train_end) instead"
NOT_IN_A_REPLAY: Final[Mapping[str, str]] = {
    "call": _MODEL,
    "call_nowait": _MODEL,
    "cancel": "a callback does not end a replay; run.stop_nowait() is noted",
    "failure": _END,
    "result": _END,
    "trainer": _MODEL,
    "wait": _END,
}
"""What a `Run` has and a replayed one has not, and why."""
_WITHOUT_RESULT: Final = (Pause, Resume, SetLearningRate, Stop)


class NotedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command that a callback gave in a replay. It changed nothing."""

    command: Command[Any]
    """What it gave: `Stop(reason=...)`, `SetLearningRate(lr=...)`, ..."""
    by: str
    """Name of the callback."""
    event: Event
    """The event that it handled."""
    attempt: int
    """Attempt of the recorded run to which the event belongs."""
    is_decision: bool
    """True if a decider (`@decides`) gave it: training would have waited for it. What an observer gives takes effect
    when it is given, which may be some steps later."""

    @property
    def step(self) -> int:
        """Optimizer steps done at the event."""
        return self.event.step

    @property
    def epoch(self) -> int:
        """Index of the epoch at the event."""
        return self.event.epoch

    def __str__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in self.command.arguments().items() if value is not None
        )
        return f"{self.by}: {self.command.name}({arguments}) at {type(self.event).__name__}, step {self.step}"


class Facts:
    """What the recorded run was like at the event that callbacks handle. Written by the replay's thread."""

    def __init__(
        self,
        run_id: str,
        directory: Path | None,
        samples: ReplayedSamples,
        monitor: str,
        *,
        has_validation: bool,
    ) -> None:
        """Begin before the first event.

        Args:
            run_id: Of the recorded run.
            directory: Where callbacks write.
            samples: Contents of its samples.
            monitor: Metric of the run's best; empty if unknown.
            has_validation: Whether the recorded run has validated.
        """
        self.run_id = run_id
        self.directory = directory
        self.samples = samples
        self.has_validation = has_validation
        self.state = "starting"
        self.metrics: dict[str, float] = {}
        self.config = Settings()
        self.end: TrainEnd | None = None
        # True once the callbacks of the attempt are closed.
        self.is_over = False
        self._monitor = monitor

    def take(self, event: Event) -> None:
        """Go on to the next event."""
        match event:
            case TrainStart():
                self.state, self.config = "running", event.config
            case ValidationStart():
                self.state = "validating" if self.state == "running" else self.state
            case StateChanged():
                self.state = event.state
            case TrainEnd():
                self.state, self.end = "closing", event
                self.metrics |= event.metrics
            case ValidationEnd() | EpochEnd() | Evaluated():
                self.state = "running" if self.state == "validating" else self.state
                self.metrics |= event.metrics

    @property
    def default_monitor(self) -> str:
        """Metric for callbacks that name none."""
        return self._setting("monitor") or ("val_loss" if self.has_validation else "train_loss")

    @property
    def monitor(self) -> str:
        """Metric of the run's best."""
        return self._monitor or self.default_monitor

    def direction_of(self, metric: str) -> Direction | None:
        """Return whether less or more of a metric is better."""
        mode = self._setting("mode")
        if metric == self.default_monitor and (mode == "min" or mode == "max"):
            return "min" if mode == "min" else "max"
        return metric_direction(metric)

    def _setting(self, name: str) -> str:
        value = self.config.get(name)
        return value if isinstance(value, str) else ""


class Services:
    """What handles need of the attempt that is replayed."""

    def __init__(
        self,
        replay: ReplayControl,
        places: Places,
        subscribe: Callable[..., Subscription[Event]],
        attempt: int,
    ) -> None:
        """Describe an attempt.

        Args:
            replay: Whose attempt it is.
            places: Threads and tasks in which callbacks work.
            subscribe: Subscribes a callback to events.
            attempt: Its number.
        """
        self.replay = replay
        self.places = places
        self.subscribe = subscribe
        self.attempt = attempt
        self.is_deciding: Callable[[], bool] = lambda: False
        self.subscriptions: Callable[[], tuple[SubscriptionStatistics, ...]] = tuple
        self.costs: Callable[[], dict[str, CallbackCosts]] = dict
        self.stack: Callable[[], str] = str


class ReplayedRun(RunHandle):
    """A run that is replayed, as its callbacks have it; see `RunHandle`.

    State and metrics are those of the recorded run at the event that the callback handles. `dir` is a directory of the
    replay. Commands are noted, see `NotedCommand`: pauses, stops and learning rates complete at once and change
    nothing; those with a result (`validate`, `checkpoint`, `tag`) fail with `ConfigError` where that is waited for.

    It has most of the methods of a `Run`, which are many.
    """

    __slots__ = (
        "__weakref__",
        "_facts",
        "_lock",
        "_name",
        "_noted",
        "_numbers",
        "_published",
        "_services",
        "event",
        "is_following",
    )

    def __init__(self, name: str, facts: Facts, services: Services) -> None:
        """Serve the callback `name`."""
        self._name = name
        self._facts = facts
        self._services = services
        # The event that is handled. Written by the replay's thread between events, and by the thread that handles.
        self.event = Event(epoch=0, step=0, batch=0)
        # True while a handler waits for events that it has subscribed to. Written by the consumer.
        self.is_following = False
        # What the callback has published, and the commands that it gave, since they were last taken: each with the
        # `seq` of the event that it handled, and a number. Under the lock.
        self._published: list[tuple[int, int, Event]] = []
        self._noted: list[tuple[int, int, NotedCommand]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @property
    def replay(self) -> ReplayControl:
        """The replay, which may be paused here: `run.replay.pause_nowait()` is a breakpoint."""
        return self._services.replay

    # State

    @property
    def id(self) -> str:
        return self._facts.run_id

    @property
    def dir(self) -> Path | None:
        return self._facts.directory

    @property
    def metrics(self) -> Metrics:
        return Metrics(self._facts.metrics)

    @property
    def state(self) -> str:
        end = self._facts.end
        return end.status if end is not None and self.is_over else self._facts.state

    @property
    def has_end(self) -> bool:
        """True once the recorded end of the attempt (`TrainEnd`) has come."""
        return self._facts.end is not None

    @property
    def is_over(self) -> bool:
        return self._facts.is_over

    @property
    def is_saving(self) -> bool:
        return False

    @property
    def refused(self) -> dict[str, str]:
        return {} if self._facts.has_validation else {"validate": "the recorded run had no val_loader"}

    @property
    def interrupted(self) -> bool:
        return False

    @property
    def epoch(self) -> int:
        return self.event.epoch

    @property
    def step(self) -> int:
        return self.event.step

    @property
    def validation_batch(self) -> int:
        return 0

    @property
    def hyperparameters(self) -> Settings:
        given = self._facts.config.get("hyperparameters")
        return Settings(given if isinstance(given, Mapping) else {})

    @property
    def monitor(self) -> str:
        return self._facts.monitor

    @property
    def default_monitor(self) -> str:
        return self._facts.default_monitor

    def direction_of(self, metric: str) -> Direction | None:
        return self._facts.direction_of(metric)

    @property
    def _directions(self) -> dict[str, Direction]:
        direction = self.direction_of(self.default_monitor)
        return {} if direction is None else {self.default_monitor: direction}

    @property
    def _groups(self) -> dict[str, int]:
        return {}

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
        """Subscribe to events, see `Run.events`. The replay goes no faster than they are read."""
        check_arguments(types, buffer, on_full)
        return self._services.subscribe(
            types or (Event,), name=name, buffer=buffer, on_full=on_full, run=self
        )

    def publish(self, event: Event) -> None:
        """Publish an event of yours. The callbacks of the replay get it after the one that is handled."""
        if self._facts.end is not None:
            raise BusClosedError(f"{type(event).__name__} was published after the run had ended")
        check_new(event)
        self._facts.samples.keep(event)
        cause = self.event
        with self._lock:
            _set(event, "time", cause.time)
            _set(event, "run_id", self.id)
            if event.step < 0:
                for name in ("epoch", "step", "batch"):
                    _set(event, name, getattr(cause, name))
            self._published.append((cause.seq, next(self._numbers), event))

    def _take_published(self) -> list[tuple[int, int, Event]]:
        """Return what was published since the last call."""
        with self._lock:
            taken, self._published = self._published, []
        return taken

    def _take_noted(self) -> list[tuple[int, int, NotedCommand]]:
        """Return the commands that were given since the last call."""
        with self._lock:
            taken, self._noted = self._noted, []
        return taken

    @property
    def samples(self) -> SampleFiles:
        """Contents of pictures and long texts, of the recorded run and of its replay. Any thread."""
        return self._facts.samples

    @property
    def subscriptions(self) -> tuple[SubscriptionStatistics, ...]:
        """Statistics of the subscribers so far."""
        return self._services.subscriptions()

    @property
    def callback_costs(self) -> dict[str, CallbackCosts]:
        """Costs of the callbacks so far, by name."""
        return self._services.costs()

    def stack(self) -> str:
        """Return where the replay's thread is now, as Python prints a stack. Any thread."""
        return self._services.stack()

    # Commands

    def give_nowait(self, command: Command[T], *, by: str | None = None) -> Future[T]:
        """Note a command. The future is done at once: with None, or with `ConfigError` for a command with a result."""
        if self.is_over:
            raise RunEndedError(f"{command.name} came too late: the replay is over")
        check(command, refused=self.refused, groups={})
        event = self.event
        noted = NotedCommand(
            command=command,
            by=by or self._name,
            event=event,
            attempt=self._services.attempt,
            is_decision=self._services.is_deciding(),
        )
        with self._lock:
            self._noted.append((event.seq, next(self._numbers), noted))
        future: Future[Any] = Future()
        if isinstance(command, _WITHOUT_RESULT):
            future.set_result(None)
        else:
            future.set_exception(ConfigError(f"{command.name} was noted, and has no result: {_MODEL}"))
        return future

    async def _wait_for(self, future: Future[T]) -> T | None:
        return await result_of(future)

    def _is_plain(self) -> bool:
        return self._services.places.is_plain()

    def __getattr__(self, name: str) -> Any:
        if (why := NOT_IN_A_REPLAY.get(name)) is not None:
            raise AttributeError(f"there is no run.{name} in a replay: {why}", name=name, obj=self)
        raise no_attribute(self, name)
