"""bus/milestones.py: what is kept of a run's milestones, and what they are taken to weigh."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloop.engine import Event, Settings
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.milestones import Milestones, size_of


class Page(Event, frozen=True, kw_only=True):
    number: int
    text: str = ""
    more: Settings = Settings({})


def page(number: int) -> Page:
    return Page(number=number, text="x" * 1_000)


def numbers(events: list[Any]) -> list[int]:
    return [event.number for event in events]


def test_beyond_the_bytes_the_oldest_go_and_are_counted() -> None:
    kept = Milestones(most_bytes=8 * size_of(page(0)))
    kept.extend(page(number) for number in range(100))
    assert numbers(kept.events()) == list(range(92, 100))
    assert kept.dropped == 92 and len(kept) == 8
    assert kept.bytes == sum(size_of(event) for event in kept.events())


def test_beyond_the_number_the_oldest_go() -> None:
    kept = Milestones(most=3)
    kept.extend(Page(number=number) for number in range(5))
    assert numbers(kept.events()) == [2, 3, 4] and kept.dropped == 2


def test_the_newest_stays_whatever_its_size() -> None:
    kept = Milestones(most_bytes=10)
    kept.extend([Page(number=0), Page(number=1, text="x" * 1_000)])
    assert numbers(kept.events()) == [1] and kept.dropped == 1


def test_what_is_forgotten_is_not_counted_as_dropped() -> None:
    kept = Milestones()
    kept.extend(Page(number=number) for number in range(5))
    kept.forget(3)
    assert numbers(kept.events()) == [3, 4] and kept.dropped == 0
    kept.forget(10)
    assert not kept and kept.bytes == 0


def weight(value: Any) -> int:
    """Return what a value's objects weigh, all of them."""
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(weight(key) + weight(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return size + sum(map(weight, value))
    return size


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**40) | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=30), inner, max_size=8),
    max_leaves=50,
)


@given(PLAIN)
def test_the_estimate_is_near_the_true_size(value: Any) -> None:
    true = weight(value)
    assert true / 3 - 300 <= size_of(value) <= true * 1.5 + 100


@pytest.mark.parametrize("count", [100, 1_500, 50_000])
def test_large_containers_are_estimated_from_a_part(count: int) -> None:
    for value in ([1.5] * count, {f"key {number:08}": "x" * 60 for number in range(count)}):
        assert size_of(value) == pytest.approx(weight(value), rel=0.5)


def test_an_event_of_a_megabyte_weighs_a_megabyte() -> None:
    for event in (
        Page(number=0, text="x" * 1_000_000),
        Page(number=0, more=Settings({"rows": ["x" * 1_000] * 1_000})),
        Page(number=0, more=Settings({f"{place}": {"text": "x" * 10_000} for place in range(100)})),
    ):
        assert size_of(event) == pytest.approx(1_000_000, rel=0.1)
        assert len(json.dumps(event.text) + json.dumps(dict(event.more))) > 900_000


def test_a_late_subscriber_learns_how_many_milestones_are_no_longer_kept() -> None:
    bus = Bus()
    bus._subscribers._history = Milestones(most_bytes=8 * size_of(page(0)))
    early = bus.subscribe((Page,), name="early")
    for number in range(20):
        bus.publish(page(number))
        bus._hand_over()
    late = bus.subscribe((Page,), name="late", replay=True)
    assert numbers(early.take()) == list(range(20)) and early.statistics.not_replayed == 0
    assert numbers(late.take()) == list(range(12, 20)) and late.statistics.not_replayed == 12
    bus.end()
