"""Callbacks: what reacts to a run, and where each of its methods runs.

    async def on_epoch_end(self, event, run)             observer: on the event loop, beside training
    def on_epoch_end(self, event, run)                   observer: in a worker thread of this callback
    @decides                                             decider: the training thread waits for it
    def / async def on_epoch_end(self, event, run)           in the training thread / on the event loop
    @in_step(every_n_steps=50)                           step hook: in the training thread, inside the
    def after_backward(self, point)                          step, with the tensors at hand

The name of the method says what it handles: `EpochEnd` -> `on_epoch_end`; a handler for a base class
(`on_sample`, `on_event`) gets what no more special handler of the callback takes. Everything that can be
wrong with a callback is found by `Handlers` before the run starts.
"""

import dataclasses
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar, overload

from offloop.engine import checks
from offloop.engine.argument_hints import HANDLERS, explains_arguments
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
    known_events,
)

if TYPE_CHECKING:
    import torch

    from offloop.engine.bus.subscription import OnFull
    from offloop.engine.monitor import Mode

logger = logging.getLogger("offloop")

F = TypeVar("F", bound=Callable[..., Any])
OnError = Literal["raise", "isolate"]
Handler = Callable[..., Any]

MAX_FAILURES_IN_ROW: Final = 10
"""Failures in a row, isolated ones, after which the observers or the step hooks of a callback are called no more."""

BOUNDARY_EVENTS: Final = (TrainStart, Resumed, EpochStart, ValidationStart, ValidationEnd, EpochEnd)
"""Events at which the training thread stands at a boundary, so that somebody can decide there."""

STEP_POINTS: Final = (
    "before_batch",
    "before_forward",
    "before_backward",
    "after_backward",
    "before_optimizer_step",
    "after_step",
)
"""Where step hooks can run inside a step, in its order."""
POINTS: Final = (*STEP_POINTS, "before_validation", "after_validation", "after_training", "before_train_end")
"""Where step hooks can run."""


class Callback:
    """Base class of everything that reacts to a run.

    Define methods named like events, see the module's first lines. One instance serves one run at a time.

    A callback may be slow, may lag and may fail without training noticing, unless it decides. Its
    observers handle one event at a time, in order. A decider may give commands that take effect at the very
    boundary where it stands (`run.stop_nowait("...")`).
    """

    on_error: ClassVar[OnError | None] = None
    """What a failure means: `"isolate"` (reported, training goes on) or `"raise"` (the run ends as failed).
    None: observers isolate, deciders and step hooks raise."""
    buffer: ClassVar[int | None] = None
    """Samples held for the observers of this callback; None for the bus's default, 1 for "latest only"."""
    on_full: ClassVar["OnFull"] = "drop_oldest"
    """What happens beyond `buffer`; `"block"` gives the callback the right to slow training down."""
    needs_run_dir: ClassVar[bool] = False
    """True if it writes into `run.dir`: the run then has a directory, so that `run.dir` is not None."""
    steers: ClassVar[bool] = True
    """False if its deciders and step hooks only keep or report something, and never change the training.

    A validation that is made only because a run ends is not part of the run that continues it: what a callback
    that steers remembers of it is left out of the checkpoint, what another one remembers is kept."""
    best_by: "tuple[str, Mode] | None" = None
    """Key and mode of the metric that says which moment of the run is best, where `Trainer(monitor=...)` does not.

    Of several callbacks that name one, the first decides what `result.best` is.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = explains_arguments()(cls.__init__)  # type: ignore[method-assign]  # that is the aim

    def reset(self) -> None:
        """Forget the previous run. Called before each new run, in the thread that starts it."""

    def close(self) -> Awaitable[None] | None:
        """Give resources back. Always called once, after the last event, however the run ended.

        A plain method runs in the callback's worker thread, an `async def` on the event loop. Where the run was
        refused after `reset`, a plain one is called in the thread that wanted to start it.
        """

    def make_durable(self) -> Awaitable[None] | None:
        """Put on the disk what was written so far. For callbacks that keep a log.

        Where it is overridden, a checkpoint is announced as durable (`CheckpointSaved`) only after the callback has
        handled all events before that and this has returned, for up to five seconds. A plain method runs in the
        callback's worker thread, an `async def` on the event loop. What it raises is reported.
        """

    @property
    def validates_average(self) -> bool:
        """True if validations run with `averaged_weights`. Read before the run and during it."""
        return False

    @property
    def validates_live(self) -> bool:
        """True if validations run with the weights in training, too: `val_live_loss`. Read before the run."""
        return False

    @property
    def sets_final_weights(self) -> bool:
        """True if it says which weights the model has after the run, at `before_train_end`. One callback may."""
        return False

    def averaged_weights(self) -> "Mapping[str, torch.Tensor]":
        """Return what it has averaged of the model's state dict, by name; empty if there is nothing yet.

        Checkpoints hold it under the key `average`. In the training thread; the tensors are live.
        """
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        """Return what its deciders and step hooks need after a resume. In the training thread, at a boundary."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned. In the training thread, before `TrainStart`."""


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
    """Give a handler the right to make training wait, at a boundary: `@decides` or `@decides(timeout=5)`.

    Legal on `TrainStart`, `Resumed`, `EpochStart`, `ValidationStart`, `ValidationEnd` and `EpochEnd`. A plain method
    runs in the training thread, an `async def` on the event loop while the training thread waits.

    Args:
        handler: The method.
        timeout: Seconds to wait for an `async def`, after which training goes on without it. None, the default,
            waits as long as it takes: with a deadline, results depend on the machine's load.
    """
    if handler is not None and not callable(handler):
        raise TypeError(f"write @decides above a method, or @decides(timeout=...); got decides({handler!r})")
    checks.number("timeout", timeout, above=0, finite=False, optional=True, unit="seconds")

    def mark(handler: F) -> F:
        if timeout is not None and not inspect.iscoroutinefunction(handler):
            raise TypeError(
                f"timeout is for an async def: {handler.__name__} runs in the training thread, "
                "where nothing can end it"
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

    It runs in the training thread and is named after its point: `before_batch`, `before_forward`,
    `before_backward`, `after_backward` (gradients scaled, once per batch), `before_optimizer_step` (unscaled, before
    clipping), `after_step`, `before_validation`, `after_validation`, `after_training` (always, also when training
    failed or was cancelled), `before_train_end` (when training was completed or stopped and its last checkpoint is
    taken: what the model is to be after the run, and in no checkpoint). It takes one argument, a `StepPoint`.

    Args:
        hook: The method.
        every_n_steps: Runs only in steps number n, 2 n, 3 n, ...; the others pay nothing for it.
            Points outside of steps run each time. The name of an attribute of the callback gives each instance
            a cadence of its own, None for no such hook: it is read when a run is set up.
        phase: Moves those steps: number phase, phase + n, phase + 2 n, ... From 0 to n - 1; 1 includes the
            first step of the run. A loop that counts from 0 and tests `i % n == 0` has phase 1.

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
                "where nothing can be awaited: make it a plain def and publish an event for async code"
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
    """Remainder, modulo `every_n_steps`, of the numbers of the steps in which it runs."""
    on_error: OnError


class Handlers:
    """What one callback handles, and how: its methods, looked up and checked once."""

    def __init__(self, callback: Callback, name: str) -> None:
        """Look the methods of `callback` up.

        Raises:
            TypeError: It is no callback.
            ConfigError: One of its methods can never be called, or its rights contradict each other.
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
        self._by_class: dict[type[Event], Handler | None] = {}
        self._places: dict[type[Event], Literal["loop", "thread", "nowhere"]] = {}
        for attribute in dir(type(callback)):
            if callable(inspect.getattr_static(type(callback), attribute)) and not attribute.startswith("__"):
                self._look_at(attribute, getattr(callback, attribute))
        for attribute, method in vars(callback).items():  # handlers set on the instance
            if callable(method) and attribute.startswith("on_"):
                self._look_at(attribute, method)
        self._check_samples()

    def handler_for(self, event_class: type[Event]) -> Handler | None:
        """Return the observer for a class of events: the most special one its ancestors name."""
        try:
            return self._by_class[event_class]
        except KeyError:
            handler = None
            for ancestor in event_class.__mro__:
                if issubclass(ancestor, Event):
                    if ancestor.handler_name in self.deciders:
                        break  # it is decided about instead
                    handler = self.observers.get(ancestor.handler_name)
                    if handler is not None:
                        break
            self._by_class[event_class] = handler
            return handler

    def observed_types(self) -> tuple[type[Event], ...]:
        """Return the classes its observers subscribe to."""
        if "on_event" in self.observers:
            return (Event,)
        return tuple(each for each in known_events() if each.handler_name in self.observers)

    @property
    def has_state(self) -> bool:
        """True if the callback has a state to save."""
        return type(self.callback).state_dict is not Callback.state_dict

    def place_of(self, event_class: type[Event]) -> Literal["loop", "thread", "nowhere"]:
        """Return where events of a class are handled: `async def` on the event loop, `def` in a thread."""
        try:
            return self._places[event_class]
        except KeyError:
            handler = self.handler_for(event_class)
            place: Literal["loop", "thread", "nowhere"]
            if handler is None:
                place = "nowhere"
            else:
                place = "loop" if inspect.iscoroutinefunction(handler) else "thread"
            self._places[event_class] = place
            return place

    def _look_at(self, attribute: str, method: Handler) -> None:
        decides_mark: _Decides | None = getattr(method, "__offloop_decides__", None)
        in_step_mark: _InStep | None = getattr(method, "__offloop_in_step__", None)
        if in_step_mark is not None:
            self._expect_arguments(attribute, method, 1, "point")
            on_error = self.callback.on_error or "raise"
            every = self._cadence(attribute, in_step_mark.every_n_steps)
            if every is not None:
                phase = in_step_mark.phase
                if phase >= every:
                    raise ConfigError(
                        f"{self.name}.{attribute} has phase={phase}, which must be below every_n_steps={every}"
                    )
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
            raise ConfigError(
                f"{self.name}.{attribute} is named like a step hook but is none: put @in_step above it"
            )

    def _cadence(self, attribute: str, every_n_steps: int | str) -> int | None:
        if isinstance(every_n_steps, int):
            return every_n_steps
        value = getattr(self.callback, every_n_steps, 0)
        if value is None:
            return None
        checks.whole_number(f"{self.name}.{every_n_steps}, the cadence of {attribute},", value)
        return value

    def _check_known(self, attribute: str) -> None:
        known = {"on_event", "on_sample"} | {event_class.handler_name for event_class in known_events()}
        if attribute not in known:
            near = nearest(attribute, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
            if attribute in HANDLERS:
                hint = f"use {HANDLERS[attribute]}"
            raise ConfigError(f"{self.name}.{attribute} handles no event that is known: {hint}")

    def _check_boundary(self, attribute: str) -> None:
        legal = [event_class.handler_name for event_class in BOUNDARY_EVENTS]
        if attribute not in legal:
            raise ConfigError(
                f"{self.name}.{attribute} cannot decide: training stands at a boundary only at "
                f"{', '.join(legal)}"
            )

    def _check_settings(self) -> None:
        on_error, buffer, on_full = self.callback.on_error, self.callback.buffer, self.callback.on_full
        checks.choice(f"{self.name}.on_error", on_error, ("raise", "isolate", None))
        checks.whole_number(f"{self.name}.buffer", buffer, optional=True)
        checks.choice(f"{self.name}.on_full", on_full, ("drop_oldest", "block"))

    def _check_samples(self) -> None:
        if not self.deciders:
            return
        for attribute in self.observers:
            is_sample = attribute in ("on_sample", "on_event") or any(
                issubclass(event_class, Sample) and event_class.handler_name == attribute
                for event_class in known_events()
            )
            if is_sample:
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


def lookup(callbacks: Iterable[Callback]) -> list[Handlers]:
    """Look all callbacks up, in declared order, and name them: two of a class are `Name` and `Name#2`.

    Raises:
        TypeError, ConfigError: As `Handlers`; or one instance was given twice.
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
    """Close callbacks that were reset for a run which was then refused. In the thread that wanted to start it.

    An `async def close` is left out: there may be no event loop, and without events there was nothing to do.
    All are closed, whatever one raises: that is only logged, since the caller has the refusal to raise.
    """
    for callback in callbacks:
        if not inspect.iscoroutinefunction(callback.close):
            try:
                callback.close()
            except BaseException:
                logger.exception("%s could not be closed", type(callback).__name__)
