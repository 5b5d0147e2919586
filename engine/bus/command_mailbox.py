"""The mailbox: the only module through which commands cross threads.

    any task, thread, decider, viewer              training thread
    ──────────────────────────────────             ───────────────
    give(command) ──append──> envelopes ─────────> collect() at a boundary, then apply
         │                       │
         │              attention = True           one attribute read per batch, nothing else
         ▼
    Future <──────────────────── result ────────── after the command applied

The training thread waits for others in exactly one place, here, for three reasons: the run is paused, an async
decider is at work, or a `block` subscription is full. What it waits for must never wait for the training thread in
turn. So while it waits for a decider or a subscription, an awaited command returns on acceptance (`wait_for`).
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Final, Generic, TypeVar

from offloop.engine.bus.commands import Command, Place, SaveCheckpoint
from offloop.engine.bus.deadlock import CommandFuture, Places
from offloop.engine.bus.waker import Waker
from offloop.engine.errors import RunEndedError, encodable

logger = logging.getLogger("offloop")
T = TypeVar("T")

WAIT_WARNING: Final = 10.0
"""Seconds that the training thread waits for a decider or a full subscription between two warnings."""

BEST: Final = SaveCheckpoint("best")
INTERVAL: Final = SaveCheckpoint("interval")
"""What callbacks give that save by a policy."""

actor: contextvars.ContextVar[str] = contextvars.ContextVar("offloop_actor", default="user")
"""Who acts in this context: the name of the callback whose handler runs, else `user`."""
deciding: contextvars.ContextVar[object] = contextvars.ContextVar("offloop_deciding", default=None)
"""In the context of a decider, the `Mailbox` of the run that it decides about; else None."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Envelope(Generic[T]):
    """A command on its way to the training thread."""

    command: Command[T]
    id: int
    """Number within the run, from 0 in order of arrival."""
    by: str
    """Who gave the command: a callback, `user`, a viewer, a signal."""
    from_decider: bool
    future: Future[T]
    """The result. Completed by the training thread or, for checkpoints, by their writer."""
    also_by: tuple[str, ...] = ()
    """Who gave the commands that were merged into this one."""

    @property
    def givers(self) -> tuple[str, ...]:
        """All who gave the command."""
        return (self.by, *self.also_by)

    def __repr__(self) -> str:
        return f"<{self.command.name} #{self.id} by {self.by}>"


class Mailbox:
    """The mailbox of one run."""

    def __init__(self) -> None:
        # True when the training thread must visit the mailbox. Set by any thread, cleared by the training thread
        # under the lock. The training thread reads it at every batch without the lock: it is set after the change
        # that it announces, so a read that misses it is followed by one that does not.
        self.attention = False
        # Set once by any thread, reason first; read by the training thread.
        self.cancelled = False
        self.cancel_reason = ""
        # Grows with each command and poke. Written under the lock by any thread, read by the training thread.
        self.changes = 0
        # True when no more commands apply. Set by the training thread under the lock; read by any thread.
        self.ended = False
        # True in a forked child, whose training thread then leaves. Set by `forked.py`.
        self.is_forked = False
        # True while the training thread waits for a decider or a full subscription. Written by the training thread
        # under the lock; read by the tasks that await commands.
        self.is_blocked_on_others = False
        self.places = Places(lambda: self.is_blocked_on_others and deciding.get() is self)
        # Appended to by any thread, emptied by the training thread; under the lock.
        self._envelopes: deque[Envelope[Any]] = deque()
        # Reentrant, for signal handlers. No interrupt can leave it locked, see `threads.py`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._numbers = itertools.count()
        self._on_cancel: list[Callable[[], None]] = []
        # Let go of the tasks that await a command; under the lock.
        self._awaiting: set[Callable[[], None]] = set()

    # Any thread

    def give(self, command: Command[T], by: str | None = None) -> Future[T]:
        """Put a command into the mailbox. Any thread; never waits.

        Args:
            command: The command.
            by: Who gives it; None for the callback whose handler runs, or `user`.

        Returns:
            The result, once the command applied. It fails with `RunEndedError` if the run ends first.

        Raises:
            RunEndedError: The run is over.
        """
        by, from_decider = encodable(by or actor.get()), deciding.get() is self
        with self._lock:
            if self.ended:
                raise RunEndedError(f"{command.name} came too late: the run is over")
            future: CommandFuture[T] = CommandFuture(self.places, command)
            self._envelopes.append(Envelope(command, next(self._numbers), by, from_decider, future))
            self.changes += 1
            self.attention = True
            self._changed.notify_all()
        return future

    def cancel(self, reason: str) -> None:
        """Make the training thread leave at its next batch, out of any wait. Any thread, also a signal handler."""
        if not self.cancelled:
            self.cancel_reason = encodable(reason)
            self.cancelled = True
        self.poke()
        for tell in tuple(self._on_cancel):
            tell()

    def poke(self) -> None:
        """Make the training thread process commands, and check what it waits for. Any thread.

        Safe in a signal handler of the main thread: the lock is reentrant and never held for long.
        """
        self.attention = True
        with self._lock:
            self.changes += 1
            self._changed.notify_all()

    async def wait_for(self, future: Future[T]) -> T | None:
        """Wait until a command applied and return its result; None if the command is only accepted so far.

        It returns None while the training thread waits for a decider or a full `block` subscription, because the
        training thread may be waiting for the very task that waits here.
        Any event loop. Cancellation: the command stays given.

        Raises:
            RunEndedError: The run ended before the command applied.
        """
        waker = Waker()
        with self._lock:
            self._awaiting.add(waker.wake)
        try:
            future.add_done_callback(lambda _: waker.wake())
            while not future.done() and not self.is_blocked_on_others:
                await waker.wait()
        finally:
            with self._lock:
                self._awaiting.discard(waker.wake)
        return future.result() if future.done() else None

    def let_go(self, future: Future[Any], go_on: Callable[[], None]) -> None:
        """Call `go_on` if training waits for others before a command has applied, each time that it begins to.

        The task that awaits the command in another process must then return, as in `wait_for`. Any thread.

        Args:
            future: The command's.
            go_on: Called at once, or by the training thread, which must not wait in it.
        """
        with self._lock:
            self._awaiting.add(go_on)
            if self.is_blocked_on_others:
                go_on()
        future.add_done_callback(lambda _: self._forget(go_on))

    def _forget(self, go_on: Callable[[], None]) -> None:
        with self._lock:
            self._awaiting.discard(go_on)

    @contextlib.contextmanager
    def on_cancel(self, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell` when the run is cancelled, or at once if it already is. `tell` must not block."""
        self._on_cancel.append(tell)
        if self.cancelled:
            tell()
        try:
            yield
        finally:
            self._on_cancel.remove(tell)

    # Training thread

    def collect(self, place: Place, *, deciders_only: bool = False) -> list[Envelope[Any]]:
        """Take out the commands that apply at a place, in the order in which they apply.

        Commands of deciders come first, in declared order; then those of others by arrival; `Stop` comes last.

        Args:
            place: Where the training thread is.
            deciders_only: Leave what did not come from a decider, except for commands that interrupt (`Rule`).
        """
        applicable: list[Envelope[Any]] = []
        left: deque[Envelope[Any]] = deque()
        with self._lock:
            for envelope in self._envelopes:
                rule = envelope.command.rule
                is_applicable = place in rule.place and (
                    not deciders_only or rule.interrupts or envelope.from_decider
                )
                (applicable if is_applicable else left).append(envelope)
            self._envelopes = left
            # Stays true while a command waits for another place, so that the next batch looks again.
            self.attention = bool(left) or self.cancelled or self.is_forked
        applicable.sort(key=lambda envelope: (envelope.command.rule.is_last, not envelope.from_decider))
        return _merged(applicable)

    def take(self) -> list[Envelope[Any]]:
        """Take out all commands, in the order of arrival: several processes apply them together."""
        with self._lock:
            taken = list(self._envelopes)
            self._envelopes.clear()
            self.attention = self.cancelled or self.is_forked
        return taken

    def put_back(self, envelopes: Sequence[Envelope[Any]]) -> None:
        """Put back what was collected and could not be applied."""
        if envelopes:
            with self._lock:
                self._envelopes.extendleft(reversed(envelopes))
                self.attention = True

    @property
    def is_waited_for(self) -> bool:
        """True if a command waits for its boundary and was not taken back."""
        with self._lock:
            return any(not envelope.future.cancelled() for envelope in self._envelopes)

    def wait_for_change(self, seen: int) -> None:
        """Wait until `changes` differs from `seen`, by a command or a `poke`. For a pause."""
        with self._lock:
            while self.changes == seen:
                self._changed.wait()

    def stand(self, until: Callable[[], bool], waiting_for: str, *, callback: str | None = None) -> None:
        """Wait for what must not wait for the training thread: awaited commands return on acceptance.

        Args:
            until: True when the wait is over. Called after each command and `poke`.
            waiting_for: What the warning in the log names.
            callback: Name of the callback that is waited for; None for full `block` subscriptions.
        """
        started = warned = time.perf_counter()
        with self.standing_still(callback), self._lock:
            while not until():
                self._changed.wait(WAIT_WARNING)
                now = time.perf_counter()
                if now - warned >= WAIT_WARNING:
                    warned = now
                    logger.warning("training has waited %.0f s for %s", now - started, waiting_for)

    @contextlib.contextmanager
    def standing_still(self, callback: str | None = None) -> Iterator[None]:
        """Release the tasks that await a command, now and for the duration of the block."""
        with self._lock:
            self.is_blocked_on_others = True
            for go_on in self._awaiting:
                go_on()
        self.places.awaited = callback
        self.places.changed()
        try:
            yield
        finally:
            self.places.awaited = None
            self.is_blocked_on_others = False

    def end(self) -> None:
        """Accept no more commands. The futures of those still waiting fail with `RunEndedError`."""
        with self._lock:
            self.ended = True
            rest = list(self._envelopes)
            self._envelopes.clear()
        for envelope in rest:
            try:
                # False if the command was taken back.
                if envelope.future.set_running_or_notify_cancel():
                    envelope.future.set_exception(
                        RunEndedError(f"the run ended before {envelope.command.name} could be applied")
                    )
            except BaseException:  # raised by a callback of the future; the other futures fail all the same
                logger.exception("a callback of the future of %s failed", envelope)


def _merged(envelopes: list[Envelope[Any]]) -> list[Envelope[Any]]:
    """Merge neighbouring checkpoints of policies: they would hold the same state, so one serves them all."""
    merged: list[Envelope[Any]] = []
    for is_by_policy, group in itertools.groupby(envelopes, lambda each: each.command in (BEST, INTERVAL)):
        neighbours = list(group)
        merged += _merge(neighbours) if is_by_policy else neighbours
    return merged


def _merge(envelopes: list[Envelope[Any]]) -> list[Envelope[Any]]:
    """Merge checkpoints into one, `best` if one of them is. None is left if all were taken back."""
    if len(envelopes) == 1:
        return envelopes
    # From here on they cannot be taken back, and neither can the one that replaces them.
    envelopes = [each for each in envelopes if each.future.set_running_or_notify_cancel()]
    if not envelopes:
        return []
    future: Future[Any] = Future()
    for each in envelopes:
        future.add_done_callback(functools.partial(_pass_on, to=each.future))
    command = BEST if any(each.command == BEST for each in envelopes) else INTERVAL
    also_by = tuple(giver for each in envelopes for giver in each.givers)[1:]
    return [dataclasses.replace(envelopes[0], command=command, future=future, also_by=also_by)]


def _pass_on(done: Future[Any], *, to: Future[Any]) -> None:
    if (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())
