"""dashboard/curves/steps.py: a recorded run is read many steps at a time; its curves are those of single steps."""

from fake_run import FakeRun, source_of
from histories import content_of
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.dashboard.runs.live_run import LiveRun
from offloop.engine import EpochStart, Event, StepEnd, TrainStart, ValidationEnd
from offloop.engine.events import Metrics

NUMBERS = st.floats() | st.integers(-5, 5)


def live_run() -> LiveRun:
    return LiveRun(source_of(FakeRun("run")), TrainStart(run_id="run", step=0, epoch=0, time=1.0))


@st.composite
def recorded(draw: st.DrawFn) -> list[Event]:
    """Return events of a run whose figures change now and then, with gaps, epochs and validations."""
    events: list[Event] = []
    step = 0
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["steps", "steps", "epoch", "validation"]))
        if kind == "epoch":
            events.append(EpochStart(run_id="run", step=step, epoch=step // 10, time=float(step)))
        elif kind == "validation":
            events.append(
                ValidationEnd(
                    run_id="run", step=step, time=float(step), metrics=Metrics({"val_loss": draw(NUMBERS)})
                )
            )
        else:
            names = sorted(draw(st.sets(st.sampled_from("abc"))))
            has_loss, has_norm = draw(st.booleans()), draw(st.booleans())
            step += draw(st.integers(1, 3))
            for value in draw(st.lists(NUMBERS, min_size=1, max_size=60)):
                events.append(
                    StepEnd(
                        run_id="run",
                        step=step,
                        time=float(step),
                        lr=0.5,
                        loss=value if has_loss else None,
                        grad_norm=float(step) if has_norm else None,
                        metrics=Metrics(dict.fromkeys(names, value)),
                        samples=2,
                        data_time=0.1,
                        step_time=0.2,
                    )
                )
                step += 1
    return events


@given(events=recorded())
@settings(max_examples=80)
def test_steps_at_once_give_the_curves_of_steps_one_by_one(events: list[Event]) -> None:
    one, many = live_run(), live_run()
    for event in events:
        one.take_in([event])
    many.take_in(events)
    assert many.series == one.series
    assert content_of(many.history) == content_of(one.history)
    status, expected = (run.status(viewers=0, is_control=True) for run in (many, one))
    assert (status.step, status.loss, status.lr, status.dropped) == (
        expected.step,
        expected.loss,
        expected.lr,
        expected.dropped,
    )
