"""engine/bus/waker.py: a byte that wakes a task, from any thread, at any time."""

import gc
import os
import signal
import socket
import threading
from concurrent.futures import Future

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from offloop.engine.bus import waker as waker_module
from offloop.engine.bus.waker import Waker, result_of


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_wake_from_a_thread_ends_the_wait() -> None:
    with anyio.fail_after(5), Waker() as waker:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waker.wait)
            await anyio.wait_all_tasks_blocked()
            thread = threading.Thread(target=waker.wake)
            thread.start()
        thread.join()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_wakes_before_the_wait_count_as_one() -> None:
    with anyio.fail_after(5), Waker() as waker:
        for _ in range(100):
            waker.wake()
        await waker.wait()
        with anyio.move_on_after(0) as nothing_left:
            await waker.wait()
        assert nothing_left.cancelled_caught


@pytest.mark.anyio
async def test_more_wakes_than_the_socket_holds_do_not_block() -> None:
    with anyio.fail_after(5), Waker() as waker:
        for _ in range(100_000):
            waker.wake()
        await waker.wait()


@pytest.mark.anyio
@pytest.mark.uvloop
async def test_cancelled_wait_loses_no_wake() -> None:
    woken = False
    with anyio.fail_after(5), Waker() as waker:
        waker.wake()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await waker.wait()
            woken = True  # on uvloop the byte may come before the cancellation
        if not woken:
            await waker.wait()


@pytest.mark.anyio
async def test_spurious_readiness_is_no_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    async def ready_without_a_byte(reader: object) -> None:
        looks.append(reader)
        if len(looks) == 3:
            waker.wake()
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "wait_readable", ready_without_a_byte)
    with anyio.fail_after(5), Waker() as waker:
        await waker.wait()
    assert len(looks) == 3


@pytest.mark.anyio
@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="signals")
async def test_signal_handler_may_wake() -> None:
    with anyio.fail_after(5), Waker() as waker:
        before = signal.signal(signal.SIGUSR1, lambda *_: waker.wake())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(waker.wait)
                await anyio.wait_all_tasks_blocked()
                os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_waking_and_closing_after_the_end_is_fine() -> None:
    waker = Waker()
    waker.close()
    waker.close()
    waker.wake()


def test_wake_while_another_thread_closes_reaches_no_strangers_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of a closed descriptor belongs to whoever opens the next one."""

    def interrupted(writer: socket.socket, data: bytes) -> int:
        number = writer.fileno()
        waker.close()  # in another thread, between looking the number up and sending
        open_numbers.append(writer.fileno() == number)
        return len(data)

    open_numbers: list[bool] = []
    waker = Waker()
    monkeypatch.setattr(waker_module._Socket, "send", interrupted)
    waker.wake()
    assert open_numbers == [True]


def test_forgotten_waker_is_closed_without_a_warning() -> None:
    waker = Waker()
    number = waker._reader.fileno()
    circle: list[object] = [waker]
    circle.append(circle)
    del waker, circle
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)


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
