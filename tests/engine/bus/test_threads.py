"""engine/bus/threads.py: the end of a thread is known, whatever interrupts the wait for it."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator

import pytest

from offloop.engine.bus.threads import Latch, Thread, has_ended


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def make_thread(release: threading.Event) -> Thread:
    return Thread(release.wait, 60.0, name="offloop-test", daemon=True)


def interrupt_main_thread_in(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in the main thread while it waits in `join`."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.0, signal.pthread_kill, (main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        thread.join(60.0)
    timer.join()


def test_interrupted_join_leaves_the_thread_to_be_joined_again(release: threading.Event) -> None:
    thread = make_thread(release)
    thread.start()
    for _ in range(20):
        interrupt_main_thread_in(thread)
        assert not thread.is_over
        assert not has_ended(thread)
    thread.join(0.0)
    assert not thread.is_over
    release.set()
    thread.join()
    assert thread.is_over
    assert has_ended(thread)


def test_latch_is_open_for_everyone_once_it_was_opened() -> None:
    latch = Latch()
    assert not latch.wait(0.0)
    assert not latch.wait(0.001)
    waiting = [threading.Thread(target=latch.wait, args=(60.0,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    latch.open()
    latch.open()
    for thread in waiting:
        thread.join(60.0)
        assert not thread.is_alive()
    assert latch.is_open and latch.wait() and latch.wait(0.0)


def test_thread_that_raises_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError

    raised: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    thread = Thread(fail, name="offloop-test", daemon=True)
    thread.start()
    thread.join()
    assert thread.is_over
    assert raised[0].exc_type is ValueError


def test_thread_that_was_not_started_cannot_be_joined() -> None:
    with pytest.raises(RuntimeError, match="before it is started"):
        Thread(print, name="offloop-test", daemon=True).join()


def test_thread_cannot_join_itself() -> None:
    errors: list[Exception] = []

    def join_itself() -> None:
        try:
            thread.join()
        except RuntimeError as error:
            errors.append(error)

    thread = Thread(join_itself, name="offloop-test", daemon=True)
    thread.start()
    thread.join()
    assert "cannot join current thread" in str(errors[0])


def test_thread_of_the_application_is_alive_although_its_join_was_interrupted(
    release: threading.Event,
) -> None:
    """Before Python 3.13, `is_alive` is False for it."""
    thread = threading.Thread(target=release.wait, args=(60.0,), daemon=True)
    thread.start()
    interrupt_main_thread_in(thread)
    assert not has_ended(thread)
    release.set()
    while not has_ended(thread):
        pass


def test_in_a_forked_child_no_other_thread_is_waited_for(release: threading.Event) -> None:
    thread = make_thread(release)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        thread.join()
        os._exit(0 if thread.is_over else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not thread.is_over


def test_main_thread_has_not_ended() -> None:
    assert not has_ended(threading.main_thread())
