"""engine/bus/step_times.py: steps beside a computation are compared with those beside none."""

import pytest

from offloop.engine.bus.step_times import FEWEST_OTHERS, Span, StepTimes
from offloop.engine.events import Event, StepEnd, TrainEnd, ValidationEnd


def steps(start: float, count: int, step_time: float) -> list[Event]:
    """Return steps of a length. The first one ends after `start`."""
    return [StepEnd(loss=0.0, lr=0.1, time=start + step_time * (number + 1)) for number in range(count)]


def test_steps_beside_a_computation_are_compared_with_the_others() -> None:
    times = StepTimes(100.0)  # events are ahead of the clock of spans
    times.take(steps(100.0, 100, 0.01), has_milestones=False)
    times.take(steps(101.0, 10, 0.05), has_milestones=False)
    times.take(steps(101.5, 100, 0.01), has_milestones=False)
    times.add(Span("Mine", 1.0, 1.5))
    delay = times.compare("Mine")
    assert delay is not None
    assert delay.steps in (10, 11)  # rounding
    assert delay.beside == pytest.approx(0.5)
    assert delay.lost == pytest.approx(0.4)
    assert delay.slowdown == pytest.approx(5.0, rel=0.1)
    assert delay.is_sure and delay.lost_at_most >= delay.lost
    assert times.compare("Other") is None


def test_steps_beside_others_computing_count_on_neither_side() -> None:
    times = StepTimes(0.0)
    times.take(steps(0.0, 100, 0.01), has_milestones=False)
    times.take(steps(1.0, 10, 0.05), has_milestones=False)  # beside the other
    times.take(steps(1.5, 50, 0.01), has_milestones=False)  # beside mine
    times.add(Span("Other", 0.995, 1.505))
    times.add(Span("Mine", 1.512, 1.995))
    delay = times.compare("Mine")
    assert delay is not None
    assert delay.slowdown == pytest.approx(1.0) and not delay.is_sure


def test_a_step_loses_no_more_than_the_time_of_the_computation_beside_it() -> None:
    times = StepTimes(0.0)
    times.take(steps(0.0, 100, 0.01), has_milestones=False)
    times.take(steps(1.0, 1, 2.0), has_milestones=False)  # the loader hung
    times.add(Span("Mine", 2.0, 2.005))
    delay = times.compare("Mine")
    assert delay is not None
    assert delay.steps == 1 and delay.lost <= 0.005 + 1e-9


def test_what_comes_between_two_steps_is_no_step() -> None:
    times = StepTimes(0.0)
    validation = ValidationEnd(time=5.0)
    batch = [*steps(0.0, 50, 0.01), validation, *steps(5.0, 50, 0.01), TrainEnd(status="completed", time=6.0)]
    times.take(batch, has_milestones=True)
    times.add(Span("Mine", 1.0, 4.0))
    assert times.compare("Mine") is None
    assert times.has_ended


def test_a_comparison_needs_other_steps() -> None:
    times = StepTimes(0.0)
    times.take(steps(0.0, FEWEST_OTHERS, 0.01), has_milestones=False)  # one less has a beginning
    times.take(steps(FEWEST_OTHERS * 0.01, 1, 0.1), has_milestones=False)
    times.add(Span("Mine", FEWEST_OTHERS * 0.01 + 0.05, 1.0))
    assert times.compare("Mine") is None


def test_what_waits_for_the_next_steps_is_called_once() -> None:
    times, called = StepTimes(0.0), []
    times.after_next(lambda: called.append(times.has_ended))
    assert not called
    times.take([TrainEnd(status="completed")], has_milestones=True)
    times.take([], has_milestones=False)
    assert called == [True]
