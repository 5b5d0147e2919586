"""callbacks/alerts.py: which rules speak when, to whom, and that nothing of it is left behind."""

import math
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from offloop.callbacks.alerts import Above, Alert, Alerts, Below, Failed, NonFinite, Rule, Spike, Stalled
from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    Event,
    LossError,
    Metrics,
    Run,
    StepEnd,
    StepPoint,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    decode,
    encode,
    in_step,
)
from offloop.engine.testing import (
    Recorder,
    SlowCallback,
    WaitsFor,
    drive,
    drive_async,
    tiny_batches,
    tiny_trainer,
)

NAN, INF = math.nan, math.inf


class Told:
    """The function of a user."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    async def __call__(self, alert: Alert) -> None:
        await anyio.lowlevel.checkpoint()
        self.alerts.append(alert)


def steps(losses: list[float], **metrics: float) -> list[Event]:
    return [
        StepEnd(loss=loss, lr=0.1, step=number, metrics=Metrics(metrics))
        for number, loss in enumerate(losses, 1)
    ]


def validations(values: list[float], key: str = "val_loss") -> list[Event]:
    return [
        ValidationEnd(metrics=Metrics({key: value}), step=number) for number, value in enumerate(values, 1)
    ]


CASES = [
    # at which values, counted from 1, it speaks
    pytest.param(NonFinite(), steps([1, 2, 3]), [], id="finite"),
    pytest.param(NonFinite(), steps([1, NAN, 3, INF, -INF, 1]), [2, 4], id="nan-and-infinity"),
    pytest.param(NonFinite(), steps([NAN, NAN, NAN]), [1], id="once-while-it-lasts"),
    pytest.param(NonFinite("val_loss"), validations([NAN, 1.0, NAN]), [1, 3], id="validation"),
    pytest.param(NonFinite("entropy"), steps([1], entropy=NAN), [1], id="logged-by-the-step"),
    pytest.param(Above("loss", 2), steps([1, 2, 2.5, 3, 1, 9]), [3, 6], id="above"),
    pytest.param(Above("loss", 2), steps([NAN, INF]), [2], id="above-nan-is-no-number"),
    pytest.param(Above("loss", 0), steps([0.0, -1, 1e-9]), [3], id="above-zero"),
    pytest.param(
        Below("val_accuracy", 0.5), validations([0.6, 0.5, 0.4, 0.3], "val_accuracy"), [3], id="below"
    ),
    pytest.param(Below("lr", 0.2), steps([1, 1]), [1], id="lr"),
    pytest.param(Spike(window=8, factor=3), steps([1, 1, 3, 3.1, 1, 9]), [4, 6], id="spike"),
    pytest.param(Spike(window=8, factor=3), steps([1, 9, 1]), [], id="spike-needs-a-quarter-of-its-window"),
    pytest.param(Spike(window=8, factor=3), steps([1, 1, NAN, 1, 5]), [5], id="spike-nan-does-not-count"),
    pytest.param(Spike(window=8, factor=3), steps([-1, -1, -1, 5]), [], id="spike-negative-median"),
    pytest.param(Spike(window=8, factor=3), steps([0.0, 0.0, 0.0, 5]), [], id="spike-median-zero"),
    pytest.param(
        Spike(window=4, factor=2), steps([1, 1, 1, 1, 2, 2, 2, 2, 4, 4.1]), [10], id="spike-window-moves"
    ),
]


@pytest.mark.parametrize(("rule", "events", "speaks_at"), CASES)
def test_rule(rule: Rule, events: list[Event], speaks_at: list[int]) -> None:
    told = Told()
    driven = drive(Alerts(told, rule), events=events)
    published = [event for event in driven.events if isinstance(event, Alert)]
    values = [_value(events[place - 1], rule.key) for place in speaks_at]
    assert [_text(alert.value) for alert in told.alerts] == [_text(value) for value in values]
    assert {alert.rule for alert in told.alerts} <= {repr(rule)}
    assert all(any(alert is each for each in told.alerts) for alert in published)
    assert driven.result.callback_errors == {}


def _value(event: Any, key: str | None) -> float:
    assert key is not None
    values = {**event.metrics, "loss": getattr(event, "loss", None), "lr": getattr(event, "lr", None)}
    return float(values[key])


def _text(value: float | None) -> str:
    return repr(None if value is None else float(value))  # as text: NaN equals nothing


@pytest.mark.anyio
@pytest.mark.parametrize(("rule", "events", "speaks_at"), CASES[:4])
async def test_rule_on_every_event_loop(rule: Rule, events: list[Event], speaks_at: list[int]) -> None:
    told = Told()
    await drive_async(SlowCallback(0.001), Alerts(told, rule), events=events)
    assert len(told.alerts) == len(speaks_at)


def test_a_step_without_a_loss_breaks_no_rule() -> None:
    told = Told()
    events = [StepEnd(lr=0.1, step=1), *steps([1.0]), StepEnd(lr=0.1, step=3)]
    drive(Alerts(told, NonFinite("loss")), events=events)
    assert told.alerts == []


def test_message_says_what_is_the_matter() -> None:
    told = Told()
    script = steps([1, 1, 1, 1, 8]) + validations([0.25])
    drive(Alerts(told, Spike(window=8), Above("loss", 7), Below("val_loss", 0.5)), events=script)
    assert [alert.message for alert in told.alerts] == [
        "loss is 8, 8 times its running median 1",
        "loss is 8, above 7",
        "val_loss is 0.25, below 0.5",
    ]


def test_rules_remember_nothing_of_the_run_before() -> None:
    told = Told()
    alerts = Alerts(told, NonFinite(), Spike(window=8))
    drive(alerts, events=steps([1, 1, NAN]))
    drive(alerts, events=steps([9, NAN]))  # no spike: its median has gone; NaN again is news
    assert [alert.message for alert in told.alerts] == ["loss is nan", "loss is nan"]


def test_alert_goes_over_a_wire() -> None:
    made = Alert(rule="NonFinite('loss')", message="loss is nan", value=NAN)
    again = decode(encode(made))
    assert isinstance(again, Alert) and again.value is not None
    assert (again.rule, again.message, math.isnan(again.value)) == (made.rule, made.message, True)


@pytest.mark.anyio
async def test_published_alert_reaches_other_callbacks_and_each_instance_tells_only_its_own() -> None:
    first, second, seen = Told(), Told(), Recorder()
    arrived = threading.Event()

    class Hold(Callback):
        """Keeps the run going until the alert has been seen by all."""

        async def on_alert(self, event: Alert, run: Run) -> None:
            arrived.set()

        @in_step
        def before_batch(self, point: StepPoint) -> None:
            if point.step == 2:
                assert arrived.wait(30)

    with anyio.fail_after(60):
        await tiny_trainer().train_async(
            tiny_batches(4),
            epochs=1,
            callbacks=[seen, Alerts(first, Above("lr", 0.0)), Alerts(second, Above("lr", 9.0)), Hold()],
        )
    (alert,) = seen.of(Alert)
    assert alert.message == "lr is 0.05, above 0" and alert.seq >= 0 and alert.run_id
    assert first.alerts == [alert] and second.alerts == []


def test_alert_stands_at_the_step_that_broke_the_rule_however_late_it_is() -> None:
    seen, went_on = Recorder(), threading.Event()

    class Late(Above):
        def look(self, value: float) -> str:
            assert went_on.wait(30)
            return super().look(value)

    class GoOn(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 3:
                went_on.set()

    alerts = Alerts(None, Late("loss", 0.0))
    callbacks = [seen, WaitsFor(seen, Alert), alerts, GoOn()]
    tiny_trainer().train(tiny_batches(4), epochs=2, callbacks=callbacks)
    (alert,) = seen.of(Alert)
    assert (alert.epoch, alert.step, alert.batch) == (0, 1, 1)


def test_failed_run_is_told_though_its_events_are_over() -> None:
    told = Told()
    batches = [(inputs * NAN, targets) for inputs, targets in tiny_batches(1)]
    with pytest.raises(LossError):
        tiny_trainer().train(batches, epochs=1, callbacks=[Alerts(told, Failed(), NonFinite())])
    (alert,) = told.alerts
    assert alert.rule == "Failed()" and "LossError" in alert.message
    assert alert.run_id and alert.step >= 0 and alert.time > 0  # though nothing is published any more


def test_without_rules_there_are_three() -> None:
    assert [repr(rule) for rule in Alerts().rules] == [
        "NonFinite('loss')",
        "Spike('loss', factor=3, window=100)",
        "Failed()",
    ]


def test_function_that_raises_is_reported_and_later_alerts_still_come() -> None:
    told: list[str] = []

    async def tell(alert: Alert) -> None:
        told.append(alert.message)
        raise ConnectionError("no network")

    driven = drive(
        Alerts(tell, NonFinite(), Below("val_loss", 1)), events=[*steps([NAN]), *validations([0.5])]
    )
    assert len(told) == 2
    assert driven.result.status == "completed"
    assert len(driven.result.callback_errors["Alerts"]) == 2


@pytest.mark.parametrize(
    ("rule", "event"),
    [
        (Below("val_acuracy", 0.5), ValidationEnd(metrics=Metrics(val_accuracy=1.0))),
        (Above("train_los", 0.5), EpochEnd(metrics=Metrics(train_loss=1.0))),
    ],
)
def test_mistyped_key_is_reported_with_the_keys_there_are(rule: Rule, event: Any) -> None:
    driven = drive(Alerts(None, rule), events=[event])
    (error,) = driven.result.callback_errors["Alerts"]
    assert str(rule.key) in error and next(iter(event.metrics)) in error


def test_own_rule() -> None:
    class Odd(Rule):
        key = "loss"

        def look(self, value: float) -> str:
            return "odd" if value % 2 else ""

    told = Told()
    drive(Alerts(told, Odd()), events=steps([2, 3, 4, 5]))
    assert [(alert.message, alert.value) for alert in told.alerts] == [("odd", 3), ("odd", 5)]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Above("", 1.0), "needs the key of a metric"),
        (lambda: Above("loss", NAN), "limit must be a finite number, got nan"),
        (lambda: Below("loss", INF), "limit must be a finite number, got inf"),
        (lambda: Spike(factor=1.0), "factor must be a finite number above 1"),
        (lambda: Spike(window=3), "window must be a whole number of at least 4"),
        (lambda: Stalled(0), "seconds must be a finite number above 0"),
        (lambda: Stalled(True), "seconds must be a finite number"),
    ],
)
def test_wrong_argument_is_refused(make: Callable[[], Rule], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_rule_where_the_function_belongs_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"notify must be an async function.*rules come after it: Alerts\(None, NonFinite\(\)"
    ):
        Alerts(NonFinite())  # type: ignore[arg-type]  # the mistake
    with pytest.raises(TypeError, match="rules must be instances of Rule"):
        Alerts(None, NonFinite)  # type: ignore[arg-type]  # the mistake


def test_function_that_is_not_async_is_told_of() -> None:
    result = tiny_trainer().train(
        tiny_batches(3),
        epochs=1,
        callbacks=[Alerts(print, Above("loss", 0))],  # type: ignore[arg-type]  # the mistake
    )
    (told,) = result.callback_errors["Alerts"]
    assert "notify must be an async def, but <built-in function print> returned nothing to await" in told


# No step for n seconds -----------------------------------------------------------------------------


class ManualClock:
    """Stands in for the module `time` in alerts.py, whose thread waits by the real one."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    clock = ManualClock()
    monkeypatch.setattr("offloop.callbacks.alerts.time", clock)
    return clock


class Story(Callback):
    """Turns the clock before steps: how many seconds pass, and whether the run is looked at then."""

    def __init__(self, alerts: Alerts, clock: ManualClock, passing: dict[int, list[float]]) -> None:
        self.alerts, self.clock, self.passing = alerts, clock, passing
        self.has_started = threading.Event()

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        watchdog = self._wait_for_watchdog()
        for seconds in [0.0, *self.passing.get(point.step, [])]:
            self.clock.now += seconds
            watchdog._look()

    def _wait_for_watchdog(self) -> Any:
        assert self.has_started.wait(30)
        return self.alerts._watchdog

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        while self.alerts._watchdog is None:
            await anyio.lowlevel.checkpoint()
        self.has_started.set()


@pytest.mark.parametrize(
    ("passing", "messages"),
    [
        pytest.param({1: [59.0]}, [], id="not-yet"),
        pytest.param({1: [60.0]}, ["no step for 60 s after step 1 (running)"], id="exactly"),
        pytest.param({1: [59.0, 2.0]}, ["no step for 61 s after step 1 (running)"], id="in-two-looks"),
        pytest.param(
            {1: [60.0, 60.0, 60.0]}, ["no step for 60 s after step 1 (running)"], id="once-while-it-lasts"
        ),
        pytest.param({1: [59.0], 2: [59.0]}, [], id="a-step-in-between"),
        pytest.param(
            {1: [60.0], 2: [59.0], 3: [70.0]},
            ["no step for 60 s after step 1 (running)", "no step for 70 s after step 3 (running)"],
            id="again",
        ),
    ],
)
def test_stalled(clock: ManualClock, passing: dict[int, list[float]], messages: list[str]) -> None:
    told = Told()
    alerts = Alerts(told, Stalled(60))
    recorder = Recorder()
    tiny_trainer().train(
        tiny_batches(5), epochs=1, callbacks=[alerts, recorder, Story(alerts, clock, passing)]
    )
    assert [alert.message for alert in recorder.of(Alert)] == messages
    assert [alert.message for alert in told.alerts] == messages


@pytest.mark.anyio
async def test_pause_is_no_stall(clock: ManualClock) -> None:
    told = Told()
    alerts = Alerts(told, Stalled(60))
    with anyio.fail_after(60):
        async with tiny_trainer().start(tiny_batches(5), epochs=3, callbacks=[alerts]) as run:
            await run.pause()
            while alerts._watchdog is None:
                await anyio.lowlevel.checkpoint()
            for _ in range(3):
                clock.now += 100.0
                alerts._watchdog._look()
            await run.resume()
    assert told.alerts == []


def test_two_stall_rules_speak_each_at_its_time(clock: ManualClock) -> None:
    told = Told()
    alerts = Alerts(told, Stalled(10), Stalled(100))
    story = Story(alerts, clock, {1: [10.0, 50.0, 40.0]})
    tiny_trainer().train(tiny_batches(3), epochs=1, callbacks=[alerts, story])
    assert [alert.rule for alert in told.alerts] == ["Stalled(10)", "Stalled(100)"]


def test_watching_thread_ends_with_the_run_however_it_ends() -> None:
    class Fail(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tiny_trainer().train(tiny_batches(3), epochs=1, callbacks=[Alerts(None, Stalled(60)), Fail()])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offloop-alerts")]


def test_without_a_stall_rule_there_is_no_thread() -> None:
    alerts = Alerts(None, NonFinite())
    names: list[str] = []

    class Look(Callback):
        def on_train_end(self, event: TrainEnd, run: Run) -> None:
            names.extend(thread.name for thread in threading.enumerate())

    tiny_trainer().train(tiny_batches(3), epochs=1, callbacks=[alerts, Look()])
    assert names and not [name for name in names if name.startswith("offloop-alerts")]
