"""engine/callback.py: which method handles what, and everything that can be wrong with a callback."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from offloop.engine.callback import POINTS, Callback, Handlers, decides, in_step, lookup
from offloop.engine.errors import ConfigError
from offloop.engine.events import (
    EpochEnd,
    EpochStart,
    Event,
    Sample,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
)


class Finding(Event, frozen=True):
    """A user's milestone."""


class Pulse(Sample, frozen=True):
    """A user's sample."""


class DetailedStep(StepEnd, frozen=True):
    """A user's kind of step."""


def handlers_of(callback: Any) -> Handlers:
    return Handlers(callback, type(callback).__name__)


def with_method(name: str, method: Callable[..., Any]) -> Callback:
    """Return an instance of a callback class with this one method."""
    callback = type("Mine", (Callback,), {name: method})()
    assert isinstance(callback, Callback)
    return callback


def observe(self: Any, event: Any, run: Any) -> None: ...


def decide(self: Any, event: Any, run: Any) -> None: ...


async def observe_async(self: Any, event: Any, run: Any) -> None: ...


# Lookup --------------------------------------------------------------------------------------------


def test_methods_are_found_by_name_and_kind() -> None:
    class Mixed(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Any) -> None: ...

        @decides(timeout=5.0)
        async def on_validation_end(self, event: ValidationEnd, run: Any) -> None: ...

        @in_step
        def after_step(self, point: Any) -> None: ...

        @in_step(every_n_steps=50)
        def before_forward(self, point: Any) -> None: ...

        async def on_train_end(self, event: TrainEnd, run: Any) -> None: ...

        def on_finding(self, event: Finding, run: Any) -> None: ...

        def helper(self) -> None: ...

    callback = Mixed()
    found = handlers_of(callback)
    assert set(found.observers) == {"on_train_end", "on_finding"}
    assert found.place_of(Finding) == "thread"
    assert found.place_of(TrainEnd) == "loop"
    assert found.place_of(EpochEnd) == "nowhere", "it is decided about instead"
    plain, asynchronous = found.deciders["on_epoch_end"], found.deciders["on_validation_end"]
    assert (plain.callback, plain.is_async, plain.timeout) == ("Mixed", False, None)
    assert (asynchronous.is_async, asynchronous.timeout) == (True, 5.0)
    hooks = {hook.point: (hook.every_n_steps, hook.on_error) for hook in found.hooks}
    assert hooks == {"after_step": (1, "raise"), "before_forward": (50, "raise")}
    assert set(found.observed_types()) == {TrainEnd, Finding}


def test_most_special_handler_takes_the_event() -> None:
    class Several(Callback):
        def on_event(self, event: Event, run: Any) -> None: ...

        def on_sample(self, event: Sample, run: Any) -> None: ...

        def on_step_end(self, event: StepEnd, run: Any) -> None: ...

    found = handlers_of(Several())

    def name_for(event_class: type[Event]) -> str | None:
        handler = found.handler_for(event_class)
        return None if handler is None else handler.__name__

    assert name_for(StepEnd) == name_for(DetailedStep) == "on_step_end"
    assert name_for(Pulse) == "on_sample"
    assert name_for(EpochEnd) == name_for(Finding) == "on_event"
    assert found.observed_types() == (Event,)
    assert handlers_of(with_method("on_epoch_end", observe)).handler_for(EpochStart) is None


def test_event_that_is_decided_about_is_not_observed_too() -> None:
    class Both(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Any) -> None: ...

        def on_epoch_start(self, event: EpochStart, run: Any) -> None: ...

    found = handlers_of(Both())
    assert found.handler_for(EpochEnd) is None
    assert found.handler_for(EpochStart) is not None


def test_handlers_may_be_inherited_overridden_and_set_on_the_instance() -> None:
    class Parent(Callback):
        def on_epoch_end(self, event: EpochEnd, run: Any) -> None: ...

        def on_epoch_start(self, event: EpochStart, run: Any) -> None: ...

    class Child(Parent):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Any) -> None: ...

    child = Child()
    child.on_train_start = functools.partial(observe_async, child)  # type: ignore[attr-defined]  # the point
    found = handlers_of(child)
    assert set(found.deciders) == {"on_epoch_end"}
    assert set(found.observers) == {"on_epoch_start", "on_train_start"}
    assert found.place_of(TrainStart) == "loop"


def test_looking_up_runs_no_property() -> None:
    class Lazy(Callback):
        @property
        def on_demand(self) -> None:
            raise AssertionError("read too early")

    assert handlers_of(Lazy()).observers == {}


def test_callbacks_are_named_after_their_class_and_numbered() -> None:
    class Mine(Callback): ...

    class Other(Callback): ...

    assert [each.name for each in lookup([Mine(), Other(), Mine(), Mine()])] == [
        "Mine",
        "Other",
        "Mine#2",
        "Mine#3",
    ]


def test_plain_callback_does_nothing() -> None:
    callback = Callback()
    found = handlers_of(callback)
    assert not found.observers and not found.deciders and not found.hooks and found.observed_types() == ()
    callback.reset()
    assert callback.close() is None
    assert callback.state_dict() == {}
    callback.load_state_dict({})


# What can be wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("on_epoch_ends", r"Mine\.on_epoch_ends handles no known event: did you mean on_epoch_end\?"),
        ("on_stepend", r"did you mean on_step_end\?"),
        ("on_evnt", r"did you mean on_event\?"),
        ("on_pulses", r"did you mean on_pulse\?"),
        ("on_zzz", "there are .*on_callback_failed, .*on_validation_start"),
    ],
)
def test_misspelt_handler_is_refused_with_the_nearest_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        handlers_of(with_method(name, observe))


def test_class_instead_of_an_instance_is_refused() -> None:
    class Mine(Callback): ...

    with pytest.raises(TypeError, match=r"callbacks must be instances: write Mine\(\) instead of Mine"):
        lookup([Mine])  # type: ignore[list-item]  # that is the point


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(TypeError, match="callbacks must be Callback instances, got function"):
        lookup([lambda: None])  # type: ignore[list-item]  # that is the point


def test_same_instance_twice_is_refused() -> None:
    callback = with_method("on_epoch_end", observe)
    with pytest.raises(ConfigError, match="the same Mine was given twice"):
        lookup([callback, callback])


@pytest.mark.parametrize(
    "name", ["on_step_end", "on_train_end", "on_checkpoint_saved", "on_event", "on_finding"]
)
def test_decider_where_training_stands_at_no_boundary_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"Mine\.{name} cannot decide: .* only in on_train_start, .*on_epoch_end"
    ):
        handlers_of(with_method(name, decides(lambda self, event, run: None)))


@pytest.mark.parametrize("name", ["on_step_end", "on_sample", "on_event", "on_pulse"])
def test_callback_that_decides_and_observes_samples_is_refused(name: str) -> None:
    methods = {"on_epoch_end": decides(lambda self, event, run: None), name: observe}
    with pytest.raises(ConfigError, match=rf"Mine decides and observes samples \({name}\)"):
        handlers_of(type("Mine", (Callback,), methods)())


def test_async_step_hook_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="after_step is an async def; a step hook runs inside the step"):

        class Mine(Callback):
            @in_step
            async def after_step(self, point: Any) -> None: ...


def test_step_hook_at_no_point_is_refused_with_the_points() -> None:
    with pytest.raises(TypeError, match=f"{', '.join(POINTS)}; got after_everything"):

        class Mine(Callback):
            @in_step(every_n_steps=2)
            def after_everything(self, point: Any) -> None: ...


@pytest.mark.parametrize("point", POINTS)
def test_method_named_like_a_step_hook_that_is_none_is_refused(point: str) -> None:
    with pytest.raises(ConfigError, match=rf"Mine\.{point} is named like a step hook: put @in_step"):
        handlers_of(with_method(point, lambda self, point: None))


@in_step
def after_step(self: Any, point: Any, more: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "method", "text"),
    [
        (
            "on_epoch_end",
            lambda self: None,
            r"Mine\.on_epoch_end must take \(event, run\); .*on_epoch_end\(\)",
        ),
        ("on_epoch_end", lambda self, event: None, r"its signature is on_epoch_end\(event\)"),
        ("on_epoch_end", lambda self, event, run, more: None, r"must take \(event, run\)"),
        ("on_epoch_end", lambda self, event, run, *, more: None, r"must take \(event, run\)"),
        ("on_epoch_end", decides(lambda self, event: None), r"must take \(event, run\)"),
        ("after_step", after_step, r"must take \(point\)"),
    ],
)
def test_wrong_signature_is_refused(name: str, method: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        handlers_of(with_method(name, method))


@pytest.mark.parametrize(
    "method",
    [
        lambda self, event, run: None,
        lambda self, *arguments: None,
        lambda self, event, run, more=1: None,
        lambda self, event, run, **more: None,
    ],
)
def test_signatures_that_can_be_called_are_accepted(method: Any) -> None:
    assert handlers_of(with_method("on_epoch_end", method)).observers


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("on_error", "ignore", "Mine.on_error must be None, 'raise' or 'isolate', got 'ignore'"),
        ("on_error", observe, "Mine.on_error must be"),
        ("on_full", "drop", "Mine.on_full must be 'drop_oldest' or 'block', got 'drop'"),
        ("buffer", 0, "Mine.buffer must be a whole number of at least 1, got 0"),
        ("buffer", 1.5, "Mine.buffer must be"),
        ("buffer", True, "Mine.buffer must be"),
    ],
)
def test_wrong_setting_is_refused(name: str, value: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        handlers_of(type("Mine", (Callback,), {name: value})())


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_timeout_of_a_decider_must_be_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match=f"timeout must be a number of seconds above 0, got {timeout}"):
        decides(timeout=timeout)


def test_timeout_of_a_plain_decider_is_refused() -> None:
    def on_epoch_end(self: Any, event: Any, run: Any) -> None: ...

    with pytest.raises(
        TypeError, match="timeout is for an async def: on_epoch_end runs in the training thread"
    ):
        decides(timeout=1.0)(on_epoch_end)


def test_interval_of_a_step_hook_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number of at least 1, got 0"):
        in_step(every_n_steps=0)


def test_decorators_that_are_given_a_number_say_how_they_are_written() -> None:
    with pytest.raises(
        TypeError, match=r"write @in_step\(every_n_steps=\.\.\.\) above a method, got in_step\(5\)"
    ):
        in_step(5)  # type: ignore[call-overload]  # the mistake
    with pytest.raises(
        TypeError, match=r"write @decides above a method, or @decides\(timeout=\.\.\.\); got decides"
    ):
        decides(5)  # type: ignore[call-overload]  # the mistake


@pytest.mark.parametrize(
    ("on_error", "expected"), [(None, "raise"), ("raise", "raise"), ("isolate", "isolate")]
)
def test_step_hooks_raise_unless_told_otherwise(on_error: str | None, expected: str) -> None:
    class Mine(Callback):
        @in_step
        def after_step(self, point: Any) -> None: ...

    assert handlers_of(type("Mine", (Mine,), {"on_error": on_error})()).hooks[0].on_error == expected


def test_boundary_events_can_all_be_decided_about() -> None:
    for name in (
        "on_train_start",
        "on_epoch_start",
        "on_validation_start",
        "on_validation_end",
        "on_epoch_end",
    ):
        assert set(handlers_of(with_method(name, decides(decide))).deciders) == {name}
    assert TrainStart.handler_name == "on_train_start"


def test_cadence_of_none_is_no_hook() -> None:
    class Looks(Callback):
        def __init__(self, every: int | None) -> None:
            self.every = every

        @in_step(every_n_steps="every")
        def after_step(self, point: Any) -> None: ...

    assert handlers_of(Looks(None)).hooks == []
    assert [hook.every_n_steps for hook in handlers_of(Looks(7)).hooks] == [7]
    with pytest.raises(ConfigError, match="every, the interval of after_step, must be a whole number"):
        handlers_of(Looks(0))
