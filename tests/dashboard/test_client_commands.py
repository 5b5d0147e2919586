"""dashboard/client: commands and curves of a run that a program watches; test_run_handle.py has the interface."""

import contextlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from cut_proxy import CutProxy
from watched_runs import LONG, port_of, served, serving_process, until

from offloop.dashboard import Dashboard, connect
from offloop.engine import (
    CommandApplied,
    CommandExpiredError,
    CommandLostError,
    CommandRejectedError,
    ConfigError,
    EpochStart,
    Event,
    EventError,
    MetricNotFoundError,
    Run,
    Sample,
    StepEnd,
    WatchLostError,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

pytestmark = pytest.mark.anyio


class Word(Event, frozen=True):
    """A milestone that a program publishes."""

    text: str = ""


class Level(Sample, frozen=True):
    """A curve that is not finite everywhere."""

    value: float = 0.0


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """Load what the first run loads, which would hold the event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), tiny_loader(1), epochs=1, metrics=["accuracy"])


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Hold the training thread within a step boundary: commands are accepted, and do not apply."""
    is_there, leave = threading.Event(), threading.Event()

    def hold(trainer: object) -> None:
        is_there.set()
        leave.wait(LONG)

    run.call_nowait(hold)
    assert is_there.wait(LONG)
    try:
        yield
    finally:
        leave.set()


def accepted(dashboard: Dashboard) -> int:
    """Return how many commands the server has got."""
    assert dashboard._server is not None
    return len(dashboard._server.hub._commands._known)


# Commands ----------------------------------------------------------------------------------------


async def test_a_command_that_the_server_rejects_raises_with_the_reason() -> None:
    async with served() as (dashboard, _), connect(dashboard.url) as watch:
        with pytest.raises(CommandRejectedError) as raised:
            await watch.set_lr(0.5, by="x" * 65)
        why = "by has at most 64 characters, got 65"
        assert (raised.value.command, raised.value.why) == ("set_lr", why)
        assert str(raised.value) == f"set_lr was rejected: {why}"


async def test_more_commands_than_a_server_takes_at_once_all_apply() -> None:
    async with served() as (dashboard, _), connect(dashboard.url) as watch:
        given = [watch.set_lr_nowait(0.001 * number) for number in range(1, 21)]
        for future in given:
            await watch._wait_for(future)
        assert [future.result(0) for future in given] == [None] * 20


async def test_a_command_that_cannot_apply_in_time_expires_and_does_not_apply_later() -> None:
    recorder = Recorder()
    async with served(callbacks=[recorder]) as (dashboard, run):
        async with connect(dashboard.url, command_ttl=0.5) as watch:
            with held(run):
                with pytest.raises(
                    CommandExpiredError, match=r"validate expired: not applied within 0.5 s"
                ) as raised:
                    await watch.validate()
            assert raised.value.command == "validate"
            await watch.stop()
    assert [event.command for event in recorder.of(CommandApplied)] == ["call", "stop"]


async def test_a_reader_may_watch_and_not_steer() -> None:
    async with served() as (dashboard, run), connect(dashboard.read_only_url) as watch:
        assert watch.id == run.id
        await anext(watch.events(StepEnd))
        for command in ("pause", "resume", "stop", "validate", "checkpoint"):
            with pytest.raises(
                ConfigError, match="this token may only watch: connect with the address that may"
            ):
                await getattr(watch, command)()
            assert command in watch.refused
        with pytest.raises(EventError, match="this token may only watch"):
            watch.publish(Word())
        assert run.state == "running"


async def test_a_command_survives_a_lost_connection_and_applies_once() -> None:
    recorder = Recorder()
    async with served(callbacks=[recorder]) as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch:
                async with anyio.create_task_group() as tasks:
                    with held(run):
                        tasks.start_soon(watch.set_lr, 0.125)
                        await until(lambda: accepted(dashboard) == 1)
                        proxy.cut()
                        await until(lambda: not watch.is_connected)
                        # Given without a connection: it goes out with the next one.
                        tasks.start_soon(watch.set_lr, 0.0625)
                        taken_back = watch.set_lr_nowait(0.5)
                        taken_back.cancel()
                        proxy.restore()
                        await until(lambda: accepted(dashboard) == 2)
                await watch.stop()
    applied = [event for event in recorder.of(CommandApplied) if event.command == "set_lr"]
    assert [event.arguments["lr"] for event in applied] == [0.125, 0.0625]


async def test_a_connection_that_is_lost_for_good_says_what_is_known_of_the_commands() -> None:
    async with served() as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url), give_up_after=0.5) as watch:
                with held(run):
                    sent = watch.set_lr_nowait(0.125)
                    await until(lambda: accepted(dashboard) == 1)
                    proxy.cut()
                    await until(lambda: not watch.is_connected)
                    not_sent = watch.set_lr_nowait(0.25)
                    with pytest.raises(
                        WatchLostError, match="there is no connection now, so Word is not published"
                    ):
                        watch.publish(Word())
                    for future, is_applied in ((sent, None), (not_sent, False)):
                        with pytest.raises(CommandLostError, match="before set_lr was answered") as raised:
                            await watch._wait_for(future)
                        assert (raised.value.command, raised.value.is_applied) == ("set_lr", is_applied)
                    with pytest.raises(WatchLostError, match="was lost and could not be made again"):
                        await watch.set_lr(0.5)


async def test_the_server_is_killed_in_the_middle_of_a_command(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with serving_process(tmp_path) as (process, url), connect(url, give_up_after=0) as watch:
            future = watch.checkpoint_nowait()
            process.kill()
            with contextlib.suppress(CommandLostError):
                await watch._wait_for(future)
            error = future.exception(0)
            assert error is None or isinstance(error, CommandLostError)


async def test_leaving_while_a_command_waits_tells_who_waits() -> None:
    async with served() as (dashboard, run):
        # Until then the run needs the event loop.
        await until(lambda: run.step > 0)
        with held(run):
            async with connect(dashboard.url) as watch:
                future = watch.stop_nowait()
                await until(lambda: accepted(dashboard) == 1)
            with pytest.raises(
                CommandLostError, match="the connection was closed before stop was answered: whether"
            ):
                future.result(0)
            with pytest.raises(WatchLostError, match="the connection was closed"):
                watch.pause_nowait()


async def test_a_cancelled_wait_leaves_the_command_given() -> None:
    recorder = Recorder()
    async with served(callbacks=[recorder]) as (dashboard, run), connect(dashboard.url) as watch:
        with held(run):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch.set_lr, 0.125)
                await until(lambda: accepted(dashboard) == 1)
                tasks.cancel_scope.cancel()
        await watch.stop()
    assert [event.command for event in recorder.of(CommandApplied)] == ["call", "set_lr", "stop"]


# Events of the program ---------------------------------------------------------------------------


async def test_a_program_publishes_events_of_classes_that_both_know(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (dashboard, run), connect(dashboard.url) as watch:
        word = Word(text="hello")
        watch.publish(word)
        assert (await anext(run.events(Word))).text == "hello"
        assert (await anext(watch.events(Word))).text == "hello"
        with pytest.raises(EventError, match="was published before"):
            watch.publish(word)
        with pytest.raises(EventError, match="a message to the server at most 65,536"):
            watch.publish(Word(text="x" * 70_000))
        watch.publish(EpochStart())
        await until(lambda: "EpochStart is published by offloop itself" in caplog.text)


# Curves ------------------------------------------------------------------------------------------


async def test_history_has_every_point_also_where_a_value_is_not_finite() -> None:
    recorder = Recorder()
    async with served(callbacks=[recorder]) as (dashboard, run), connect(dashboard.url) as watch:
        for value in (1.0, math.nan, math.inf, 2.0):
            run.publish(Level(value=value))
        await until(lambda: run.step > 3_000)
        await watch.stop()
        assert [event async for event in watch.events(Word)] == []
        loss, lr = await watch.history("loss"), await watch.history("lr")
        level = await watch.history("level/value")
    steps = recorder.of(StepEnd)
    assert loss.step.tolist() == [event.step for event in steps] and len(loss) == run.step
    assert loss.value.tolist() == [event.loss for event in steps]
    assert loss.time.tolist() == [event.time for event in steps]
    assert lr.value.tolist() == [event.lr for event in steps] and lr.reduced_before is None
    np.testing.assert_array_equal(level.value, [1.0, math.nan, math.nan, 2.0])
    assert all(isinstance(each, np.ndarray) for each in (loss.step, loss.time, loss.epoch, loss.value))


async def test_a_metric_that_does_not_exist_is_named_with_those_that_do() -> None:
    async with served() as (dashboard, _), connect(dashboard.url) as watch:
        await until(lambda: "loss" in watch.curves)
        with pytest.raises(
            MetricNotFoundError, match=r"no metric 'los' here; there are: .*loss.*; did you mean 'loss'"
        ):
            await watch.history("los")


async def test_history_waits_for_the_next_connection() -> None:
    async with served() as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch:
                await until(lambda: "loss" in watch.curves)
                proxy.cut()
                await until(lambda: not watch.is_connected)
                found: list[Any] = []

                async def ask() -> None:
                    found.append(await watch.history("loss"))

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask)
                    proxy.restore()
                assert len(found[0]) > 0 and found[0].step[-1] <= run.step
