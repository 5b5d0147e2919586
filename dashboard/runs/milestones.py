"""Milestones: what the page keeps of a run's milestones, as messages, bounded in number and in bytes."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from offloop.dashboard.masking import masked
from offloop.dashboard.protocol.encoding import encode_event, encode_message
from offloop.dashboard.protocol.from_server import Milestone, MilestonesMissed
from offloop.dashboard.runs.run_samples import brief
from offloop.engine import (
    CallbackFailed,
    CommandApplied,
    Event,
    Settings,
    StateChanged,
    TrainStart,
)

MILESTONES_KEPT: Final = 2_000
"""Latest milestones that a new viewer receives."""
MILESTONE_BYTES: Final = 64 * 1024 * 1024
"""Bytes that their messages may take together."""


_decode = msgspec.json.Decoder(Milestone).decode


class KeptMilestone:
    """A milestone as the message of each role, until it is dropped. Queues of viewers hold it, too."""

    __slots__ = ("_brief", "_control", "_reader", "keeper", "seq", "size", "time")

    def __init__(self, keeper: "Milestones", event: Event) -> None:
        self.keeper = keeper
        self.seq = event.seq
        self.time = event.time
        self._control: bytes | None = _message(keeper.run, event)
        seen = _for_readers(event)
        # For most events one message serves both roles.
        self._reader = (
            self._control if seen is event else None if seen is None else _message(keeper.run, seen)
        )
        # For viewers that ask for samples: readers see all of them, too.
        short = brief(event)
        self._brief = None if short is event else _message(keeper.run, short)
        self.size = len(self._control or b"") + len(self._brief or b"")
        if self._reader is not self._control:
            self.size += len(self._reader or b"")

    def message(self, *, is_control: bool, is_brief: bool = False) -> bytes | None:
        """Return the message for a role; None if the role may not see the milestone, or it was dropped.

        Args:
            is_control: The role.
            is_brief: Without what a viewer asks for by `sample`.
        """
        if is_brief and self._brief is not None:
            return self._brief
        return self._control if is_control else self._reader

    def is_visible(self, *, is_control: bool) -> bool:
        """False if the role may not see the milestone."""
        return self.is_dropped or self.message(is_control=is_control) is not None

    @property
    def is_dropped(self) -> bool:
        """True if its messages are gone."""
        return self._control is None

    def drop(self) -> None:
        """Free the memory, whichever queue holds this object."""
        self._control = self._reader = self._brief = None


class Milestones:
    """The latest milestones of a run, oldest first. Beyond a bound the oldest go; the newest always stays."""

    def __init__(self, run: str, *, most_bytes: int = MILESTONE_BYTES) -> None:
        """Keep none yet.

        Args:
            run: Key of the run.
            most_bytes: Limit of the memory for the messages.
        """
        self.run = run
        self.dropped = 0
        """Milestones that are no longer kept."""
        self.bytes = 0
        """Bytes of the messages of those that are."""
        self._most_bytes = most_bytes
        self._kept: deque[KeptMilestone] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[KeptMilestone]:
        return iter(self._kept)

    def events(self) -> Iterator[msgspec.Raw]:
        """Yield the kept milestones as events that control viewers see, encoded."""
        for each in self._kept:
            message = each.message(is_control=True)
            if message is not None:
                yield _decode(message).event

    @property
    def last(self) -> KeptMilestone | None:
        """The newest one."""
        return self._kept[-1] if self._kept else None

    def add(self, events: Iterable[Event]) -> list[KeptMilestone]:
        """Keep events and return them as they are kept; some may be dropped already."""
        kept = self._kept
        added: list[KeptMilestone] = []
        for event in events:
            milestone = KeptMilestone(self, event)
            added.append(milestone)
            kept.append(milestone)
            self.bytes += milestone.size
            while len(kept) > MILESTONES_KEPT or (self.bytes > self._most_bytes and len(kept) > 1):
                oldest = kept.popleft()
                self.bytes -= oldest.size
                self.dropped += 1
                oldest.drop()
        return added

    def missed(self) -> bytes:
        """Return the message about those that are no longer kept."""
        return encode_message(MilestonesMissed(run=self.run, count=self.dropped))


def _for_readers(event: Event) -> Event | None:
    """Return what readers see of an event: no tracebacks, no names and no commands, for which it is None."""
    if isinstance(event, CommandApplied):
        return None
    if isinstance(event, CallbackFailed):
        return msgspec.structs.replace(event, traceback="")
    if isinstance(event, StateChanged):
        return msgspec.structs.replace(event, by="")
    return event


def _message(run: str, event: Event) -> bytes:
    if isinstance(event, TrainStart):
        event = msgspec.structs.replace(
            event,
            config=Settings(masked(event.config)),
            hyperparameters=Settings(masked(event.hyperparameters)),
        )
    return encode_message(Milestone(run=run, event=msgspec.Raw(encode_event(event))))
