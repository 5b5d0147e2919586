"""engine/replays/pace.py: when events are due, by a clock that the test sets."""

import math

from offloop.engine import Event
from offloop.engine.replays.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def at(seconds: float) -> Event:
    return Event(time=1_000.0 + seconds)


def begun(speed: float, *, is_paused: bool = False) -> tuple[Pace, Clock]:
    clock = Clock()
    pace = Pace(speed, is_paused=is_paused, clock=clock)
    pace.begin(at(0))
    return pace, clock


def test_events_are_due_when_the_recorded_time_has_come() -> None:
    pace, clock = begun(2.0)
    assert pace.is_due(at(0)) and not pace.is_due(at(0.1))
    clock.now += 5
    assert pace.is_due(at(10)) and not pace.is_due(at(10.1))
    assert pace.wait_until_due(at(10))


def test_without_a_pace_all_are_due() -> None:
    pace, _ = begun(math.inf)
    assert pace.is_due(at(1e9)) and pace.wait_until_due(at(1e9))


def test_a_pause_does_not_count() -> None:
    pace, clock = begun(1.0)
    clock.now += 3
    pace.pause()
    clock.now += 1_000
    assert not pace.is_due(at(0))
    pace.resume()
    assert pace.is_due(at(3)) and not pace.is_due(at(3.1))
    clock.now += 1
    assert pace.is_due(at(4)) and not pace.is_due(at(4.1))


def test_another_speed_counts_from_now_on() -> None:
    pace, clock = begun(1.0)
    clock.now += 3
    pace.set_speed(10.0)
    assert not pace.is_due(at(3.1))
    clock.now += 1
    assert pace.is_due(at(13)) and not pace.is_due(at(13.1))
    pace.set_speed(math.inf)
    assert pace.is_due(at(500))
    pace.delivered(at(500))
    pace.set_speed(1.0)
    assert not pace.is_due(at(500.1))
    clock.now += 1
    assert pace.is_due(at(501)) and not pace.is_due(at(501.1))


def test_a_pace_that_is_set_in_a_pause_begins_after_it() -> None:
    pace, clock = begun(1.0, is_paused=True)
    clock.now += 50
    pace.set_speed(2.0)
    clock.now += 50
    pace.resume()
    assert pace.is_due(at(0)) and not pace.is_due(at(0.1))


def test_advancing_goes_to_the_next_event_and_holds_there() -> None:
    pace, clock = begun(1.0)
    advanced = pace.advance(Event)
    assert pace.is_paused and pace.wait_until_due(at(60)) and not pace.is_due(at(60))
    pace.delivered(at(60))
    assert advanced.result(0) == at(60)
    clock.now += 1_000
    pace.resume()
    assert not pace.is_due(at(60.1))


def test_the_end_completes_what_waits() -> None:
    pace, _ = begun(1.0)
    paused, advanced = pace.pause(), pace.advance(Event)
    pace.stop()
    assert not pace.wait_until_due(at(0)) and pace.is_stopped
    pace.end()
    assert paused.result(0) is None and advanced.result(0) is None
