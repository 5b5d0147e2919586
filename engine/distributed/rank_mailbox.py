"""The mailbox of a loop that trains with other ranks: what they agree on reaches it, and nothing else.

    any thread of rank 0, signals anywhere        training thread of each rank
    ──────────────────────────────────────        ─────────────────────────────
    give(command) ──> mailbox of the run ──exchange──> this mailbox ──> the boundary of the loop

Commands reach all ranks in an exchange, at the same step boundary. In a validation the ranks read different numbers
of batches, so no exchange is possible there: rank 0 posts its commands to the store, where the others look.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from offloop.engine.bus.command_mailbox import Envelope, Mailbox
from offloop.engine.bus.commands import Command, Place
from offloop.engine.distributed.agreement import Agreement
from offloop.engine.distributed.signs_of_life import SignsOfLife

T = TypeVar("T")

LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks at the store in a validation."""


class RankMailbox(Mailbox):
    """The mailbox of one loop. Training thread only, unless a method says otherwise."""

    def __init__(self, given: Mailbox) -> None:
        """Begin empty.

        Args:
            given: The mailbox of the run, where commands are given on this rank.
        """
        self.given = given
        self._urgent = False
        self._looked = 0.0
        self.is_in_pass = False
        """True inside a pass over a validation's batches, where ranks cannot exchange. Written by the strategy."""
        # Changes of the run's mailbox that the last exchange has seen
        self._seen = 0
        # Set when the process group is there
        self._agreement: Agreement | None = None
        super().__init__()

    def attach(self, agreement: Agreement, life: SignsOfLife) -> None:
        """Exchange from now on: the process group is there."""
        self._agreement, self._life = agreement, life

    @property
    def attention(self) -> bool:
        """True when the loop must visit the mailbox: on all ranks alike, except inside a validation."""
        if self._urgent or self.given.is_forked:
            return True
        if self._agreement is None:
            return False
        if not self.is_in_pass:
            return self._agreement.is_due()
        if self._agreement.is_first:
            return self.given.attention
        return time.monotonic() - self._looked >= LOOK_INTERVAL

    @attention.setter
    def attention(self, value: bool) -> None:
        self._urgent = value

    @property
    def wants_attention(self) -> bool:
        """True from a command or a cancellation on this rank until all ranks have it: rank 0 must not wait. Any thread.

        An exchange takes a command out of the mailbox, and may then wait for rank 0, which stands in a pause.
        """
        agreement = self._agreement
        return self.given.attention or (agreement is not None and agreement.has_sent)

    @property
    def is_forked(self) -> bool:
        """True in a forked child, whose training thread then leaves."""
        return self.given.is_forked

    @is_forked.setter
    def is_forked(self, value: bool) -> None:
        if value:
            self.given.is_forked = True

    def give(self, command: Command[T], by: str | None = None) -> Future[T]:
        """Give a command to the run. Any thread."""
        return self.given.give(command, by)

    def feed(self, envelopes: Sequence[Envelope[Any]], cancelled: str | None) -> None:
        """Take commands that all ranks apply, and the cancellation of the run."""
        with self._lock:
            self._envelopes.extend(envelopes)
            self._urgent |= bool(envelopes)
        if cancelled is not None and not self.cancelled:
            self.cancel(cancelled)

    def collect(self, place: Place, *, deciders_only: bool = False) -> list[Envelope[Any]]:
        """Exchange with the other ranks, or look for news in a validation; then as `Mailbox.collect`."""
        assert self._agreement is not None
        self._seen = self.given.changes
        if self.is_in_pass:
            self._looked = time.monotonic()
            self._agreement.look()
        else:
            self._agreement.exchange()
        return super().collect(place, deciders_only=deciders_only)

    def put_back(self, envelopes: Sequence[Envelope[Any]]) -> None:
        """Put back what a stop leaves over. It fails as the run ends; no rank visits the mailbox for it alone."""
        is_urgent = self._urgent
        super().put_back(envelopes)
        self._urgent = is_urgent

    def wait_for_change(self, seen: int) -> None:
        """Wait in a pause: rank 0 for a change, the others for rank 0."""
        assert self._agreement is not None
        if self._agreement.is_first:
            with self._life.excusing():
                self.given.wait_for_change(self._seen)
        elif self.is_in_pass:
            # In slices: a command or a signal may come on this rank
            with self._life.excusing():
                time.sleep(LOOK_INTERVAL)

    def stand(self, until: Callable[[], bool], waiting_for: str, *, callback: str | None = None) -> None:
        """Wait on rank 0, see `Mailbox.stand`. The others wait for rank 0 in the next exchange."""
        agreement = self._agreement
        assert agreement is not None
        if agreement.is_first:
            # What all ranks know of the hold is as old as their last exchange
            with self._life.excusing():
                self.given.stand(
                    lambda: self.given.cancelled or not agreement.is_held_here() or until(),
                    waiting_for,
                    callback=callback,
                )
