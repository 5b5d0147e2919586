"""Callbacks, and where each of their methods runs.

    async def on_epoch_end(self, event, run)             observer: on the event loop, while training continues
    def on_epoch_end(self, event, run)                   observer: in the callback's worker thread
    runs_in = "process"                                  ... both in a process of the callback's own
    @decides                                             decider: the training thread waits for it
    def / async def on_epoch_end(self, event, run)           in the training thread / on the event loop
    @in_step(every_n_steps=50)                           step hook: in the training thread, inside the
    def after_backward(self, point)                          step, with access to the tensors

A method handles the event that it is named after: `EpochEnd` -> `on_epoch_end`. A handler of a base class
(`on_sample`, `on_event`) gets the events for which the callback has no more specific handler. `Handlers` checks all
methods of a callback before the run starts.
"""

import dataclasses
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeVar, overload

from offloop.engine import checks
from offloop.engine.argument_hints import HANDLERS
from offloop.engine.errors import ConfigError, nearest
from offloop.engine.events import (
    EpochEnd,
    EpochStart,
    Event,
    Resumed,
    Sample,
    TrainStart,
    ValidationEnd,
    ValidationStart,
    define_now,
    known_events,
)

if TYPE_CHECKING:
    import torch

    from offloop.engine.bus.subscription import OnFull
    from offloop.engine.config import TrainerConfig
    from offloop.engine.monitor import Mode

logger = logging.getLogger("offloop")

F = TypeVar("F", bound=Callable[..., Any])
OnError = Literal["raise", "isolate"]
Handler = Callable[..., Any]
Place = Literal["loop", "thread", "nowhere"]

MAX_FAILURES_IN_ROW: Final = 10
"""Isolated failures in a row after which a callback's observers or step hooks are disabled."""

BOUNDARY_EVENTS: Final = (TrainStart, Resumed, EpochStart, ValidationStart, ValidationEnd, EpochEnd)
"""Events that are published at a boundary, where the training thread can wait for a decision."""

STEP_POINTS: Final = (
    "before_batch",
    "before_forward",
    "before_backward",
    "after_backward",
    "before_optimizer_step",
    "after_step",
)
"""Points inside a step where step hooks can run, in order."""
POINTS: Final = (*STEP_POINTS, "before_validation", "after_validation", "after_training", "before_train_end")
"""All points where step hooks can run."""


class TrainerParts(Protocol):
    """What `Callback.prepare` may take from a trainer: `model`, `optimizers` by name, `config` and `device`."""

    model: "torch.nn.Module"
    optimizers: "dict[str, torch.optim.Optimizer]"
    config: "TrainerConfig"

    @property
    def device(self) -> "torch.device":
        """The model's device."""


class Callback:
    """Base class of callbacks.

    Define methods named after events; see the top of `engine/callback.py`. An instance serves one run at a time.

    Observers may be slow, lag or fail without affecting training. They handle one event at a time, in order.
    Commands of a decider (`run.stop_nowait("...")`) take effect at the boundary where it decides.
    """

    on_error: ClassVar[OnError | None] = None
    """What a failure does: `"isolate"` reports it and training continues, `"raise"` ends the run as failed.
    None: observers isolate, deciders and step hooks raise."""
    buffer: ClassVar[int | None] = None
    """Samples buffered for the callback's observers, at least 1; None for the default of the bus."""
    sample_interval: ClassVar[float] = 0.0
    """Least seconds between two batches of samples, at least 0. Milestones come at once, with the samples before them,
    and samples come sooner if the buffer is half full. Being woken costs more than handling a few events: set it where
    samples may come late, as for a log. 0: as often as the run's events are delivered, every 50 ms."""
    runs_in: Literal["here", "process"] = "here"
    """Where observers run. `"here"`: in the process that trains. `"process"`: in a child process of the callback's own,
    for handlers that compute in Python, which would slow training down here.

    The child is a fresh interpreter, started beside the run. The callback is pickled after `reset` and `prepare`
    (`cloudpickle`), and handles its events there; `close` and `make_durable` are called there, too. This instance does
    not change any more: publish events to send results back. The handlers get a `RunHandle`. If the process ends early,
    that is reported; it is not restarted."""
    drain_timeout: float | None = None
    """Seconds to handle what is left when training has ended, and then for `close`; None for that of the trainer."""
    on_full: ClassVar["OnFull"] = "drop_oldest"
    """What a full buffer does; `"block"` allows the callback to slow training down."""
    needs_run_dir: ClassVar[bool] = False
    """True if the callback writes into `run.dir`. The run then has a directory, and `run.dir` is not None."""
    steers: ClassVar[bool] = True
    """False if deciders and step hooks only store or report, and never change the training.

    A run may validate once more only because it ends; a run resumed from it does not have that validation. So the
    checkpoint leaves out what a callback that steers remembers of it, and keeps what other callbacks remember."""
    ranks: ClassVar[Literal["first", "all"] | None] = None
    """Where it runs in a run of several processes ("ranks"). None: observers and deciders on rank 0, step hooks on
    every rank, because they touch tensors. `"first"`: all on rank 0. `"all"`: all on every rank; commands count on rank
    0 alone."""
    evaluates_every: int | None = None
    """Set by a callback that evaluates every so many checkpoints beside training, at least 1, and publishes `Evaluated`
    for each of them in order. Such a checkpoint is kept until then, and the end of the run waits for it. A run has at
    most one such callback."""
    best_by: "tuple[str, Mode] | None" = None
    """Key and mode of the metric by which the run chooses its best, unless `Trainer(monitor=...)` names one.

    The first callback that sets it decides.
    """

    needs_metrics: tuple[str, ...] = ()
    """Keys of metrics by which the callback decides. A run that cannot compute one is refused before it starts."""

    def reset(self) -> None:
        """Discard the state of the previous run. Called before each new run, in the thread that starts it."""

    def prepare(self, trainer: "TrainerParts") -> None:
        """Take what is needed from the trainer, whose model is as it was given to it.

        Called before each new run, after the `reset` of all callbacks, in the thread that starts it. An exception
        refuses the run.
        """

    def close(self) -> Awaitable[None] | None:
        """Release resources. Called exactly once, after the last event, however the run ended.

        A plain method runs in the callback's worker thread, an `async def` on the event loop. If the run is refused
        after `reset`, a plain method is called in the thread that tried to start it.
        """

    def events_handled(self) -> None:
        """Write what was gathered. Called after each batch of events, in the worker thread, also if one has failed.

        For plain handlers that write several events together: after a batch, the next event may come in a second or in
        an hour. A plain method.
        """

    def make_durable(self) -> Awaitable[None] | None:
        """Flush to disk what has been written so far. For callbacks that keep a log.

        If it is overridden, a checkpoint becomes durable (`CheckpointSaved`) only once the callback has handled all
        earlier events and this method has returned; the run waits at most five seconds. A plain method runs in the
        callback's worker thread, an `async def` on the event loop. Exceptions are reported.
        """

    @property
    def validates_average(self) -> bool:
        """Whether validations use `averaged_weights`. Read before the run and during it."""
        return False

    @property
    def validates_live(self) -> bool:
        """Whether validations also use the weights in training, as `val_live_loss`. Read before the run."""
        return False

    @property
    def sets_final_weights(self) -> bool:
        """Whether it sets the model's weights at `before_train_end`. Only one callback of a run may."""
        return False

    def averaged_weights(self) -> "Mapping[str, torch.Tensor]":
        """Return the averaged entries of the model's state dict; empty if there are none yet.

        Checkpoints store them under the key `average`. Called in the training thread; the tensors are live.
        """
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state that deciders and step hooks need after a resume.

        Called in the training thread, at a boundary.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Called in the training thread, before `TrainStart`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Decides:
    timeout: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class _InStep:
    every_n_steps: int | str
    phase: int


@overload
def decides(handler: F, /) -> F: ...


@overload
def decides(*, timeout: float | None = None) -> Callable[[F], F]: ...


def decides(handler: F | None = None, /, *, timeout: float | None = None) -> F | Callable[[F], F]:
    """Let training wait for a handler, at a boundary: `@decides` or `@decides(timeout=5)`.

    For `TrainStart`, `Resumed`, `EpochStart`, `ValidationStart`, `ValidationEnd` and `EpochEnd`. A plain method runs
    in the training thread. An `async def` runs on the event loop while the training thread waits.

    Args:
        handler: The method.
        timeout: Seconds to wait for an `async def`, above 0, before training continues without it. None waits
            indefinitely: with a deadline, results depend on the machine's load.

    Raises:
        TypeError: This is no method, or a plain method has a timeout.
        ValueError: The timeout is out of range.
    """
    if handler is not None and not callable(handler):
        raise TypeError(f"write @decides above a method, or @decides(timeout=...); got decides({handler!r})")
    checks.number("timeout", timeout, above=0, finite=False, optional=True, unit="seconds")

    def mark(handler: F) -> F:
        if timeout is not None and not inspect.iscoroutinefunction(handler):
            raise TypeError(
                f"timeout is for an async def: {handler.__name__} runs in the training thread, "
                "where it cannot be interrupted"
            )
        handler.__offloop_decides__ = _Decides(timeout)  # type: ignore[attr-defined]  # a mark on a function
        return handler

    return mark if handler is None else mark(handler)


@overload
def in_step(hook: F, /) -> F: ...


@overload
def in_step(*, every_n_steps: int | str = 1, phase: int = 0) -> Callable[[F], F]: ...


def in_step(
    hook: F | None = None, /, *, every_n_steps: int | str = 1, phase: int = 0
) -> F | Callable[[F], F]:
    """Make a plain method a step hook: `@in_step` or `@in_step(every_n_steps=50)`.

    A step hook runs in the training thread and takes one argument, a `StepPoint`. It is named after its point:

    - `before_batch`, `before_forward`, `before_backward`
    - `after_backward`: once per batch, the gradients still scaled
    - `before_optimizer_step`: the gradients unscaled and not clipped yet
    - `after_step`
    - `before_validation`, `after_validation`
    - `after_training`: always, also when training failed or was cancelled
    - `before_train_end`: when training completed or was stopped, after its last checkpoint. It sets what the model is
      after the run; no checkpoint contains that.

    Args:
        hook: The method.
        every_n_steps: Run in every n-th step, at least 1; other steps have no overhead. Points outside of steps always
            run. A string names an attribute of the callback that holds the number, or None for no hook; it is read
            when a run is set up.
        phase: Run in steps number phase, phase + n, phase + 2 n, ...; from 0 to n - 1. 1 includes the first step of
            the run, like `i % n == 0` in a loop that counts from 0.

    Raises:
        TypeError: This is no plain method, or it is not named after a point.
        ValueError: A number is out of range.
    """
    if hook is not None and not callable(hook):
        raise TypeError(f"write @in_step(every_n_steps=...) above a method, got in_step({hook!r})")
    if not isinstance(every_n_steps, str):
        checks.whole_number("every_n_steps", every_n_steps)
    checks.whole_number("phase", phase, at_least=0)
    if isinstance(every_n_steps, int) and phase >= every_n_steps:
        raise ConfigError(f"phase must be below every_n_steps={every_n_steps}, got {phase}")

    def mark(hook: F) -> F:
        if inspect.iscoroutinefunction(hook):
            raise TypeError(
                f"{hook.__name__} is an async def; a step hook runs inside the step, in the training thread, "
                "where nothing can be awaited: make it a plain def, and publish an event for async code"
            )
        if hook.__name__ not in POINTS:
            raise TypeError(f"a step hook is named after its point: {', '.join(POINTS)}; got {hook.__name__}")
        hook.__offloop_in_step__ = _InStep(every_n_steps, phase)  # type: ignore[attr-defined]  # a mark on a function
        return hook

    return mark if hook is None else mark(hook)


@dataclasses.dataclass(frozen=True, slots=True)
class Decider:
    """One `@decides` method of one callback."""

    callback: str
    method: Handler
    is_async: bool
    timeout: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class StepHook:
    """One `@in_step` method of one callback."""

    callback: str
    point: str
    method: Callable[[Any], None]
    every_n_steps: int
    phase: int
    """It runs in the steps whose number modulo `every_n_steps` is this."""
    on_error: OnError


class Handlers:
    """The handlers and hooks of one callback, looked up and checked once."""

    def __init__(self, callback: Callback, name: str) -> None:
        """Look up the methods of `callback`.

        Raises:
            TypeError: It is no callback.
            ConfigError: A method could never be called, or the callback decides and observes samples.
        """
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks must be instances: write {callback.__name__}() instead of {callback.__name__}"
            )
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks must be Callback instances, got {type(callback).__name__}")
        self.callback = callback
        self.name = name
        self._check_settings()
        self.observers: dict[str, Handler] = {}
        self.deciders: dict[str, Decider] = {}
        self.hooks: list[StepHook] = []
        self._by_class: dict[type[Event], tuple[Handler | None, Place]] = {}
        for attribute in dir(type(callback)):
            if callable(inspect.getattr_static(type(callback), attribute)) and not attribute.startswith("__"):
                self._look_at(attribute, getattr(callback, attribute))
        # Handlers can be set on the instance, too.
        for attribute, method in vars(callback).items():
            if callable(method) and attribute.startswith("on_"):
                self._look_at(attribute, method)
        self._check_samples()
        self._check_process()

    def runs_on_other_ranks(self) -> bool:
        """Leave out what runs on rank 0 alone, see `Callback.ranks`; return whether anything is left."""
        if self.callback.ranks != "all":
            self.observers.clear()
            self.deciders.clear()
        if self.callback.ranks == "first":
            self.hooks.clear()
        return bool(self.observers or self.deciders or self.hooks)

    def handler_for(self, event_class: type[Event]) -> Handler | None:
        """Return the observer for a class of events: that of its nearest ancestor; None if there is none."""
        return (self._by_class.get(event_class) or self._look_up(event_class))[0]

    def place_of(self, event_class: type[Event]) -> Place:
        """Return where events of a class are handled: `async def` on the event loop, `def` in a thread."""
        return (self._by_class.get(event_class) or self._look_up(event_class))[1]

    def observed_types(self) -> tuple[type[Event], ...]:
        """Return the classes of events that the observers subscribe to."""
        if "on_event" in self.observers:
            return (Event,)
        return tuple(each for each in known_events() if each.handler_name in self.observers)

    @property
    def has_state(self) -> bool:
        """Whether the callback has a state to save."""
        return type(self.callback).state_dict is not Callback.state_dict

    def _look_up(self, event_class: type[Event]) -> tuple[Handler | None, Place]:
        """Return the observer for a class of events and its place, and remember both: events come in floods."""
        names = [each.handler_name for each in event_class.__mro__ if issubclass(each, Event)]
        nearest = next((name for name in names if name in self.deciders or name in self.observers), "")
        # What is decided about is not observed, too.
        handler = None if nearest in self.deciders else self.observers.get(nearest)
        place: Place = "nowhere"
        if handler is not None:
            place = "loop" if inspect.iscoroutinefunction(handler) else "thread"
        found = self._by_class[event_class] = (handler, place)
        return found

    def _look_at(self, attribute: str, method: Handler) -> None:
        decides_mark: _Decides | None = getattr(method, "__offloop_decides__", None)
        in_step_mark: _InStep | None = getattr(method, "__offloop_in_step__", None)
        if in_step_mark is not None:
            self._expect_arguments(attribute, method, 1, "point")
            every, phase = self._interval(attribute, in_step_mark.every_n_steps), in_step_mark.phase
            if every is None:
                return
            if phase >= every:
                raise ConfigError(
                    f"{self.name}.{attribute} has phase={phase}, which must be below every_n_steps={every}"
                )
            on_error = self.callback.on_error or "raise"
            self.hooks.append(StepHook(self.name, attribute, method, every, phase, on_error))
        elif decides_mark is not None:
            self._check_boundary(attribute)
            self._expect_arguments(attribute, method, 2, "event, run")
            is_async = inspect.iscoroutinefunction(method)
            self.deciders[attribute] = Decider(self.name, method, is_async, decides_mark.timeout)
        elif attribute.startswith("on_"):
            self._check_known(attribute)
            self._expect_arguments(attribute, method, 2, "event, run")
            self.observers[attribute] = method
        elif attribute in POINTS:
            raise ConfigError(f"{self.name}.{attribute} is named like a step hook: put @in_step above it")

    def _interval(self, attribute: str, every_n_steps: int | str) -> int | None:
        if isinstance(every_n_steps, int):
            return every_n_steps
        value: int | None = getattr(self.callback, every_n_steps, 0)
        checks.whole_number(
            f"{self.name}.{every_n_steps}, the interval of {attribute},", value, optional=True
        )
        return value

    def _check_known(self, attribute: str) -> None:
        known = _handler_names()
        if attribute not in known:
            # An event of a built-in callback that the program does not use.
            define_now()
            known = _handler_names()
        if attribute not in known:
            near = nearest(attribute, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
            if attribute in HANDLERS:
                hint = f"use {HANDLERS[attribute]}"
            raise ConfigError(f"{self.name}.{attribute} handles no known event: {hint}")

    def _check_boundary(self, attribute: str) -> None:
        legal = [event_class.handler_name for event_class in BOUNDARY_EVENTS]
        if attribute not in legal:
            raise ConfigError(
                f"{self.name}.{attribute} cannot decide: training is at a boundary only in {', '.join(legal)}"
            )

    def _check_settings(self) -> None:
        callback = self.callback
        checks.choice(f"{self.name}.on_error", callback.on_error, (None, "raise", "isolate"))
        checks.choice(f"{self.name}.ranks", callback.ranks, (None, "first", "all"))
        checks.choice(f"{self.name}.on_full", callback.on_full, ("drop_oldest", "block"))
        checks.whole_number(f"{self.name}.buffer", callback.buffer, optional=True)
        checks.whole_number(f"{self.name}.evaluates_every", callback.evaluates_every, optional=True)
        checks.choice(f"{self.name}.runs_in", callback.runs_in, ("here", "process"))
        checks.number(f"{self.name}.sample_interval", callback.sample_interval, at_least=0, unit="seconds")
        checks.number(f"{self.name}.drain_timeout", callback.drain_timeout, at_least=0, optional=True)

    def _check_process(self) -> None:
        if self.callback.runs_in == "here":
            return
        here = [*self.deciders, *(hook.point for hook in self.hooks)]
        if here:
            raise ConfigError(
                f'{self.name} has runs_in="process" and {here[0]}, which runs in the training thread: leave '
                "runs_in out, or split it into two callbacks, and publish an event there for the one in the process"
            )

    def _check_samples(self) -> None:
        if not self.deciders:
            return
        of_samples = {each.handler_name for each in known_events() if issubclass(each, Sample)}
        for attribute in self.observers:
            if attribute in of_samples or attribute in ("on_sample", "on_event"):
                raise ConfigError(
                    f"{self.name} decides and observes samples ({attribute}): samples may be dropped, so its "
                    "decision would depend on the machine's load. Use event.metrics, or an @in_step hook"
                )

    def _expect_arguments(self, attribute: str, method: Handler, count: int, names: str) -> None:
        try:
            inspect.signature(method).bind(*range(count))
        except TypeError:
            raise ConfigError(
                f"{self.name}.{attribute} must take ({names}); its signature is "
                f"{attribute}{inspect.signature(method)}"
            ) from None
        except ValueError:  # pragma: no cover - a builtin without a signature
            pass


def _handler_names() -> set[str]:
    return {"on_event", "on_sample"} | {event_class.handler_name for event_class in known_events()}


def lookup(callbacks: Iterable[Callback]) -> list[Handlers]:
    """Look up all callbacks, in declared order. Names are those of the classes; a second one gets `Name#2`.

    Raises:
        TypeError: An object is no callback.
        ConfigError: As for `Handlers`, or an instance was given twice.
    """
    found: list[Handlers] = []
    counts: dict[str, int] = {}
    for callback in callbacks:
        if any(callback is earlier.callback for earlier in found):
            raise ConfigError(f"the same {type(callback).__name__} was given twice")
        class_name = type(callback).__name__
        counts[class_name] = number = counts.get(class_name, 0) + 1
        found.append(Handlers(callback, class_name if number == 1 else f"{class_name}#{number}"))
    return found


def close_unused(callbacks: Iterable[Callback]) -> None:
    """Close callbacks that were reset for a run that was then refused. Called in the thread that tried to start it.

    An `async def close` is skipped: there may be no event loop, and the callback has had no event. Exceptions are
    only logged, because the caller raises the refusal.
    """
    for callback in callbacks:
        if not inspect.iscoroutinefunction(callback.close):
            try:
                callback.close()
            except BaseException:
                logger.exception("closing %s failed", type(callback).__name__)
