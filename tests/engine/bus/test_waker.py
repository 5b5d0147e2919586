"""engine/bus/waker.py: a task is woken from any thread, at any time."""

import os
import signal
import threading
from concurrent.futures import Future

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from offloop.engine.bus.waker import Waker, result_of


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_wake_from_a_thread_ends_the_wait() -> None:
    waker = Waker()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waker.wait)
            await anyio.wait_all_tasks_blocked()
            thread = threading.Thread(target=waker.wake)
            thread.start()
        thread.join()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_wakes_before_the_wait_count_as_one() -> None:
    waker = Waker()
    with anyio.fail_after(5):
        for _ in range(100):
            waker.wake()
        await waker.wait()
        with anyio.move_on_after(0) as nothing_left:
            await waker.wait()
        assert nothing_left.cancelled_caught


@pytest.mark.anyio
async def test_wakes_without_a_wait_do_not_block_or_add_up() -> None:
    waker = Waker()
    with anyio.fail_after(5):
        for _ in range(100_000):
            waker.wake()
        await waker.wait()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_cancelled_wait_loses_no_wake() -> None:
    woken = False
    waker = Waker()
    with anyio.fail_after(5):
        waker.wake()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await waker.wait()
            woken = True  # on uvloop the byte may come before the cancellation
        if not woken:
            await waker.wait()


@pytest.mark.anyio
@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="signals")
async def test_signal_handler_may_wake() -> None:
    waker = Waker()
    with anyio.fail_after(5):
        before = signal.signal(signal.SIGUSR1, lambda *_: waker.wake())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(waker.wait)
                await anyio.wait_all_tasks_blocked()
                os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_waking_where_nobody_waits_is_fine() -> None:
    waker = Waker()
    waker.wake()
    waker.wake()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_no_wake_is_lost_however_it_meets_the_wait() -> None:
    """A thread answers each wake with one: a lost one would stop both."""
    ours, rounds = Waker(), 2000
    theirs = threading.Semaphore(0)

    def answer() -> None:
        for _ in range(rounds):
            assert theirs.acquire(timeout=5)
            ours.wake()

    thread = threading.Thread(target=answer)
    thread.start()
    with anyio.fail_after(30):
        for _ in range(rounds):
            theirs.release()
            await ours.wait()
    thread.join()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_a_task_that_is_woken_all_the_time_lets_others_run() -> None:
    is_over = False

    async def end() -> None:
        nonlocal is_over
        is_over = True

    waker = Waker()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            while not is_over:
                waker.wake()
                await waker.wait()


def test_waking_a_task_whose_event_loop_has_ended_is_fine() -> None:
    for backend in ("asyncio", "trio"):
        waker = Waker()
        wakes: list[object] = []

        async def keep(waker: Waker = waker, wakes: list[object] = wakes) -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(waker.wait)
                await anyio.wait_all_tasks_blocked()
                wakes.append(waker._wake_task)
                tasks.cancel_scope.cancel()

        anyio.run(keep, backend=backend)
        # A thread that took it just before.
        waker._wake_task = wakes[0]  # type: ignore[assignment]
        waker.wake()


@pytest.mark.anyio
async def test_a_forked_process_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a copy of the event loop, whose pipe and locks belong to the process that goes on."""
    waker = Waker()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waker.wait)
            await anyio.wait_all_tasks_blocked()
            wake_task = waker._wake_task
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 0)
                waker.wake()
            await anyio.wait_all_tasks_blocked()
            assert len(tasks_waiting()) == 1
            waker._wake_task = wake_task
            waker.wake()


def tasks_waiting() -> list[anyio.TaskInfo]:
    return [task for task in anyio.get_running_tasks() if "wait" in str(task.name)]


@pytest.mark.anyio
async def test_waiting_takes_no_file_descriptors() -> None:
    async def wait() -> None:
        await Waker().wait()

    def count() -> int:
        return len(os.listdir("/dev/fd"))

    before = count()
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        during = count()
        tasks.cancel_scope.cancel()
    assert during == before


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_result_of_a_future_that_a_thread_completes() -> None:
    future: Future[int] = Future()
    results: list[int] = []

    async def wait() -> None:
        results.append(await result_of(future))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(future.set_result, 3)
        assert results == [3]
        assert await result_of(future) == 3


@pytest.mark.anyio
async def test_result_of_a_failed_future_raises_and_a_cancelled_wait_leaves_it_alone() -> None:
    future: Future[int] = Future()
    with anyio.fail_after(5):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await result_of(future)
        assert scope.cancelled_caught and not future.cancelled()
        future.set_exception(KeyError("x"))
        with pytest.raises(KeyError):
            await result_of(future)
