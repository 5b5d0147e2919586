"""engine/session/process.py: Python's switch interval, which runs hold short and give back."""

import sys
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from offloop.engine import ConfigError, TrainerConfig
from offloop.engine.config import SWITCH_INTERVAL
from offloop.engine.session.process import SwitchInterval
from offloop.engine.testing import tiny_loader, tiny_trainer

PYTHONS = SwitchInterval.PYTHONS


@pytest.fixture(autouse=True)
def interval_is_put_back() -> Iterator[None]:
    before = sys.getswitchinterval()
    assert before == PYTHONS, "an earlier test has left it changed"
    yield
    sys.setswitchinterval(before)


def in_a_run(**knobs: Any) -> float:
    """Return the interval in a step of a run."""
    seen: list[float] = []

    def batches() -> Iterator[Any]:
        seen.append(sys.getswitchinterval())
        yield from tiny_loader(1)

    tiny_trainer(**knobs).train(batches(), epochs=1)
    return seen[0]


def test_it_is_short_in_a_run_and_back_after_it() -> None:
    assert in_a_run() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == PYTHONS
    assert in_a_run(switch_interval=0.002) == pytest.approx(0.002)
    assert sys.getswitchinterval() == PYTHONS


def test_none_leaves_it_alone() -> None:
    assert in_a_run(switch_interval=None) == PYTHONS


def test_a_process_that_has_set_its_own_keeps_it() -> None:
    sys.setswitchinterval(0.001)
    assert in_a_run() == pytest.approx(0.001)
    assert sys.getswitchinterval() == pytest.approx(0.001)


def test_it_is_back_after_a_run_that_fails() -> None:
    def batches() -> Iterator[Any]:
        yield from tiny_loader(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny_trainer().train(batches(), epochs=1)
    assert sys.getswitchinterval() == PYTHONS


def test_it_is_back_after_a_run_that_is_refused() -> None:
    with pytest.raises(ConfigError):
        tiny_trainer().train(tiny_loader(1))
    assert sys.getswitchinterval() == PYTHONS


@pytest.mark.anyio
async def test_the_shortest_of_several_runs_holds_until_the_last_one_ends() -> None:
    def first(trainer: Any) -> float:
        return sys.getswitchinterval()

    with anyio.fail_after(60):
        async with tiny_trainer(switch_interval=0.001).start(tiny_loader(1), epochs=10**9) as one:
            assert await one.call(first) == pytest.approx(0.001)
            async with tiny_trainer(switch_interval=0.0002).start(tiny_loader(1), epochs=10**9) as other:
                assert await one.call(first) == pytest.approx(0.0002)
                await other.stop()
                await other.wait()
            assert await one.call(first) == pytest.approx(0.001)
            async with tiny_trainer(switch_interval=None).start(tiny_loader(1), epochs=1):
                pass
            assert await one.call(first) == pytest.approx(0.001)
            await one.stop()
    assert sys.getswitchinterval() == PYTHONS


def test_what_the_application_sets_meanwhile_stays() -> None:
    interval = SwitchInterval()
    interval.enter("one", 0.0001)
    sys.setswitchinterval(0.0003)
    interval.enter("two", 0.00005)
    assert sys.getswitchinterval() == pytest.approx(0.0003)
    interval.leave("one")
    interval.leave("two")
    interval.leave("two")
    assert sys.getswitchinterval() == pytest.approx(0.0003)


@pytest.mark.parametrize("value", [0, -1, True, "fast", float("inf")])
def test_it_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(ConfigError, match="switch_interval must be"):
        TrainerConfig(switch_interval=value)
