"""The mailbox: the only module through which commands cross threads.

    any task, thread, decider, viewer              training thread
    ──────────────────────────────────             ───────────────
    give(command) ──append──> commands ──────────> collect() at a batch or step boundary, applies them
         │                       │
         │              attention = True           one attribute look per batch; else nothing
         ▼
    Future <──────────────────── result ────────── after it was applied

The training thread waits for others in exactly one place, here, for three reasons: it is paused,
an async decider is at work, or a `block` subscription is full. Whoever it waits for must never wait for
it in turn, or both would wait for ever; so while it stands there, awaiting a command returns as soon as
the command is accepted, for everybody (`wait_for`).
"""

import contextlib
import contextvars
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Final, Literal, TypeVar

from offloop.engine.bus.deadlock import CommandFuture, Places
from offloop.engine.bus.waker import Waker
from offloop.engine.errors import RunEndedError, encodable

logger = logging.getLogger("offloop")
T = TypeVar("T")

WAIT_WARNING: Final = 10.0
"""Seconds that the training thread waits for a decider or a full subscription before it says for whom, and again."""

CommandName = Literal["pause", "resume", "stop", "set_lr", "checkpoint", "tag", "validate", "call"]
AT_ANY_BATCH: Final = frozenset({"pause", "resume"})
"""Commands that apply at the next batch; the others wait for the end of the accumulation window."""

POLICY_REASONS: Final = frozenset({"best", "interval"})
"""Why callbacks take checkpoints at a boundary; those of one state are one checkpoint."""

actor: contextvars.ContextVar[str] = contextvars.ContextVar("offloop_actor", default="user")
"""Who acts in this context: the name of the callback whose handler runs, else `user`."""
deciding: contextvars.ContextVar[object] = contextvars.ContextVar("offloop_deciding", default=None)
"""The `Mailbox` whose boundary a decider of this context stands at, else None."""


class Command:
    """A wish on its way to the training thread."""

    __slots__ = ("also_by", "arguments", "by", "from_decider", "future", "id", "name")

    def __init__(
        self,
        name: CommandName,
        id: int,
        arguments: dict[str, Any],
        by: str,
        from_decider: bool,
        future: Future[Any],
    ) -> None:
        self.name = name
        self.id = id
        self.arguments = arguments
        self.by = by
        self.also_by: tuple[str, ...] = ()  # who gave commands that this one serves as well
        self.from_decider = from_decider
        self.future = future

    def __repr__(self) -> str:
        return f"<{self.name} #{self.id} by {self.by}>"


class Mailbox:
    """The mailbox of one run."""

    def __init__(self) -> None:
        # Read by the training thread at every batch without a lock; set by everybody who wants it to look.
        self.attention = False
        self.cancelled = False  # set by any thread, once; read by the training thread
        self.cancel_reason = ""
        self.changes = 0  # grows with each command and poke, under the condition's lock
        self.ended = False  # set by the training thread when it applies no more commands
        # Set in a child that was forked from this process, whose training thread then leaves; see `forked.py`.
        self.is_forked = False
        self.is_blocked_on_others = (
            False  # True while the training thread waits for a decider or a full subscription
        )
        self.places = Places(lambda: self.is_blocked_on_others and deciding.get() is self)
        self._commands: deque[Command] = deque()
        # Entered by this lock, which no interrupt can leave taken, see threads.py.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._numbers = itertools.count()
        self._on_cancel: list[Callable[[], None]] = []
        self._awaiting: set[Waker] = set()  # tasks that await a command; under the condition's lock

    # Anybody's side

    def give(self, name: CommandName, arguments: dict[str, Any], by: str | None = None) -> Future[Any]:
        """Put a command into the mailbox. Any thread; never waits.

        Returns:
            Its result, once it was applied. It fails with `RunEndedError` if the run ends first.

        Raises:
            RunEndedError: The run is over.
        """
        by, from_decider = encodable(by or actor.get()), deciding.get() is self
        arguments = {
            key: encodable(each) if isinstance(each, str) else each for key, each in arguments.items()
        }
        with self._lock:
            if self.ended:
                raise RunEndedError(f"{name} came too late: the run is over")
            future: CommandFuture[Any] = CommandFuture(self.places, name)
            command = Command(name, next(self._numbers), arguments, by, from_decider, future)
            self._commands.append(command)
            self.changes += 1
            self.attention = True
            self._changed.notify_all()
        return command.future

    def cancel(self, reason: str) -> None:
        """Make the training thread leave at its next batch, out of any wait. Any thread, also a signal handler."""
        if not self.cancelled:
            self.cancel_reason = encodable(reason)
            self.cancelled = True
        self.poke()
        for tell in tuple(self._on_cancel):
            tell()

    def poke(self) -> None:
        """Make the training thread look up, from a wait too. Any thread.

        Safe in a signal handler of the main thread: the lock is reentrant and never held for long.
        """
        self.attention = True
        with self._lock:
            self.changes += 1
            self._changed.notify_all()

    async def wait_for(self, future: Future[T]) -> T | None:
        """Wait until a command was applied and return its result; None if it is only accepted for now.

        That is so while the training thread stands at a decider or a full `block` subscription: it may be
        waiting for the very task that waits here. Any event loop. Cancellation: the command stays given.

        Raises:
            RunEndedError: The run ended before the command could be applied.
        """
        with Waker() as waker:
            with self._lock:
                self._awaiting.add(waker)
            try:
                future.add_done_callback(lambda _: waker.wake())
                while not future.done() and not self.is_blocked_on_others:
                    await waker.wait()
            finally:
                with self._lock:
                    self._awaiting.discard(waker)
        return future.result() if future.done() else None

    @contextlib.contextmanager
    def on_cancel(self, tell: Callable[[], None]) -> Iterator[None]:
        """Have `tell` called when the run is cancelled, or at once if it is already. It must not block."""
        self._on_cancel.append(tell)
        if self.cancelled:
            tell()
        try:
            yield
        finally:
            self._on_cancel.remove(tell)

    # Training thread's side

    def collect(
        self, *, step_boundary: bool, stop_only: bool = False, deciders_only: bool = False
    ) -> list[Command]:
        """Take out the commands that can be applied here, in the order in which they apply.

        Deciders' commands come first, in declared order, then outside ones by arrival, `stop` last.

        Args:
            step_boundary: All commands can be applied here; else only those for any batch.
            stop_only: In a validation: `stop` can be applied too, the others after it.
            deciders_only: At a step boundary, leave for later what did not come from a decider. What applies at
                any batch, and `stop`, applies here too.
        """
        applicable: list[Command] = []
        left: deque[Command] = deque()
        with self._lock:
            for command in self._commands:
                is_stop = command.name == "stop"
                if command.name in AT_ANY_BATCH:
                    is_applicable = True
                elif step_boundary:
                    is_applicable = not deciders_only or is_stop or command.from_decider
                else:
                    is_applicable = stop_only and is_stop
                (applicable if is_applicable else left).append(command)
            self._commands = left
            # Still true if something waits for another boundary: then each batch looks again.
            self.attention = bool(left) or self.cancelled or self.is_forked
        return _merged(
            sorted(applicable, key=lambda command: (command.name == "stop", not command.from_decider))
        )

    def put_back(self, commands: Sequence[Command]) -> None:
        """Put back what was collected and could not be applied."""
        if commands:
            with self._lock:
                self._commands.extendleft(reversed(commands))
                self.attention = True

    @property
    def is_waited_for(self) -> bool:
        """True if a command waits for its boundary, and nobody has taken it back."""
        with self._lock:
            return any(not command.future.cancelled() for command in self._commands)

    def wait_for_change(self, seen: int) -> None:
        """Wait until `changes` is no longer `seen`: a command or a `poke` has come. For a pause."""
        with self._lock:
            while self.changes == seen:
                self._changed.wait()

    def stand(self, until: Callable[[], bool], waiting_for: str, *, callback: str | None = None) -> None:
        """Wait for somebody who must not wait for us: awaited commands return on acceptance.

        Args:
            until: True when the wait is over; looked at after each command and `poke`.
            waiting_for: For the log.
            callback: Name of the one that is waited for; None for full `block` subscriptions.
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
        """Release everybody who awaits a command, now and while this lasts."""
        with self._lock:
            self.is_blocked_on_others = True
            for waker in self._awaiting:
                waker.wake()
        self.places.awaited = callback
        self.places.changed()
        try:
            yield
        finally:
            self.places.awaited = None
            self.is_blocked_on_others = False

    def end(self) -> None:
        """Apply no more commands: those still waiting fail with `RunEndedError`."""
        with self._lock:
            self.ended = True
            rest = list(self._commands)
            self._commands.clear()
        for command in rest:
            try:
                # False if the giver has taken the command back.
                if command.future.set_running_or_notify_cancel():
                    command.future.set_exception(
                        RunEndedError(f"the run ended before {command.name} could be applied")
                    )
            except BaseException:  # out of a callback of the future; the other givers are told all the same
                logger.exception("a callback of the future of %s failed", command)


def _merged(commands: list[Command]) -> list[Command]:
    """Let one checkpoint serve all policies that ask for one of the very same state, one right after the other."""
    merged: list[Command] = []
    for command in commands:
        first = merged[-1] if merged else command
        is_same = first is not command and all(
            each.name == "checkpoint" and each.arguments.get("reason") in POLICY_REASONS
            for each in (first, command)
        )
        if not is_same:
            merged.append(command)
            continue
        if not command.future.set_running_or_notify_cancel():
            continue  # whoever gave it has taken it back
        first.also_by += (command.by,)
        if command.arguments["reason"] == "best":
            first.arguments = command.arguments
        first.future.add_done_callback(functools.partial(_pass_on, to=command.future))
    return merged


def _pass_on(done: Future[Any], *, to: Future[Any]) -> None:
    error = CancelledError() if done.cancelled() else done.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())
