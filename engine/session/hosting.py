"""Where a run is hosted: on a new event loop in the caller's thread or in a helper thread, or on the caller's.

caller of train()                          event loop of the run
─────────────────                          ─────────────────────
plain thread ───────────────────────────>  in that thread
inside a running event loop (a notebook)   in a helper thread, while the caller's thread blocks
caller of train_async() ────────────────>  the caller's
"""

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import anyio

from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import runs_event_loop
from offloop.engine.errors import Preempted
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session.process import handled_signals
from offloop.engine.session.session import Session

LAUNCHERS_SIGNALS: Final = 2.0
"""Seconds in which further signals to one rank of several are the first one again: schedulers send it to all processes,
and torchrun passes its own on. A person who wants to leave in haste waits longer."""


def run_blocking(session: Session) -> RunResult:
    """Run to the end and return the result. Blocks."""
    if runs_event_loop():
        return _run_in_helper_thread(session)
    signals = _Signals(session)
    with signals.handled(force=False):
        anyio.run(session.run_to_end, _ignore)
    return signals.outcome()


def _run_in_helper_thread(session: Session) -> RunResult:
    """Run on an event loop in another thread while this call blocks the one that it was made in."""
    if not _is_inside_ipython():
        warnings.warn(
            "train() blocks the event loop that it was called in: await train_async(...) instead",
            RuntimeWarning,
            stacklevel=5,  # the caller of train(), which is decorated
        )
    failure: list[BaseException] = []
    signals = _Signals(session, third_is_final=False)

    def run() -> None:
        try:
            anyio.run(session.run_to_end, _ignore)
        except BaseException as error:
            failure.append(error)

    host = Thread(run, name=f"offloop-host-{session.run_id}", daemon=False)
    # Ctrl-C, or a notebook's stop button, must not raise here, which would separate train() from its run: train()
    # returns when the run is over. SIGTERM stays with the application, and no number of interrupts ends the process.
    with signals.handled(force=False, only=(signal.SIGINT,), asks_application=True):
        host.start()
        while not host.is_over:
            host.join()
    if failure:
        raise failure.pop()
    return signals.outcome()


async def run_awaited(session: Session, started: Callable[[Run], None], *, handle_signals: bool) -> RunResult:
    """Run to the end on this event loop and return the result.

    Args:
        session: Of the run.
        started: Called with the run once it continues by itself.
        handle_signals: Whether the run takes SIGINT and SIGTERM, in the main thread.
    """
    if not handle_signals:
        await session.run_to_end(started)
        return session.outcome()
    signals = _Signals(session)
    with signals.handled(force=True):
        await session.run_to_end(started)
    return signals.outcome()


class _Signals:
    """Passes signals to a run, and raises at its end what they stand for."""

    def __init__(self, session: Session, *, third_is_final: bool = True) -> None:
        self._session = session
        self._third_is_final = third_is_final
        self._seen: list[str] = []  # written by signal handlers in the main thread, read when the run is over

    @contextlib.contextmanager
    def handled(self, **options: Any) -> Iterator[None]:
        """Handle signals in the block; `options` are those of `handled_signals`."""
        third_is_final, lifetime = self._third_is_final, self._session.lifetime
        one_within = LAUNCHERS_SIGNALS if self._session.has_other_ranks else 0.0
        with handled_signals(
            self._note, third_is_final=third_is_final, one_within=one_within, **options
        ) as is_handled:
            lifetime.handles_signals = is_handled
            yield

    def _note(self, number: Any, count: int) -> None:
        """Handle a signal. Main thread; does not block."""
        self._seen.append(number.name)
        self._session.lifetime.on_signal(number.name, count, third_is_final=self._third_is_final)

    def outcome(self) -> RunResult:
        """Return the result, or raise what the run failed with, or `Preempted` or KeyboardInterrupt.

        Called outside of the event loop, whose task would keep the exception.
        """
        result = self._session.outcome()
        elsewhere = self._session.lifetime.signal_elsewhere
        if "SIGTERM" in (*self._seen, elsewhere):
            if elsewhere is not None and threading.current_thread() is threading.main_thread():
                # torchrun sends one more as the first process of a group ends. All is saved
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise Preempted
        if self._seen or elsewhere is not None:
            raise KeyboardInterrupt
        return result


def _ignore(run: Run) -> None:
    pass


def _is_inside_ipython() -> bool:
    """True in a notebook or IPython's shell. Other libraries may have imported IPython anywhere else."""
    # No such function while another thread is importing IPython.
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and get_ipython() is not None
