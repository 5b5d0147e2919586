"""RunFacts: what a server has told about the run that a program watches. Types only; no socket."""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from offloop.dashboard.protocol.from_server import Hello, RunInfo, RunSummary, Series, SeriesInfo, Status
from offloop.dashboard.protocol.limits import Role
from offloop.engine import (
    EpochEnd,
    Evaluated,
    Event,
    StateChanged,
    TrainEnd,
    ValidationEnd,
)

FINAL_STATES: Final = frozenset({"completed", "stopped", "cancelled", "failed", "lost"})
REMEMBERED: Final = 4_096
"""Latest milestones that are recognised if they come again; a server keeps 2,000."""


class RunFacts:
    """What is known about the run and its server. The client's event loop writes, any thread reads.

    Attributes are replaced and not changed, so that other threads see each of them whole.
    """

    def __init__(self) -> None:
        self.server: str | None = None
        """Identity of the server; None before the first connection."""
        self.role: Role = "read_only"
        self.runs: tuple[RunSummary, ...] = ()
        """The server's runs."""
        self.key: str | None = None
        """Key of the run; None before it is there."""
        self.info: RunInfo | None = None
        self.status: Status | None = None
        self.curves: Mapping[str, SeriesInfo] = MappingProxyType({})
        """Curves by the name of their metric."""
        self.metrics: Mapping[str, float] = MappingProxyType({})
        """Latest values that milestones have told."""
        self.last_seq = -1
        """`seq` of the last milestone."""
        self.received = 0
        """Milestones that have come."""
        self.missed = 0
        """Milestones that the server had no longer."""
        self.is_gone = False
        """True once the server has let go of the run."""
        # What tells of the run's end before the status does
        self.has_ended = False
        # Positions that the last milestone told, ahead of the status.
        self.state = "starting"
        self.epoch = 0
        self.step = 0
        self.validation_batch = 0
        self._seen: OrderedDict[tuple[int, float], None] = OrderedDict()

    def hello(self, message: Hello) -> None:
        """Note who the server is."""
        self.server, self.role, self.runs = message.server, message.role, tuple(message.runs)

    def describe(self, message: RunInfo) -> None:
        """Note the fixed facts; what was said about the run's curves counts no longer."""
        before = self.info
        if before is None or (before.key, before.attempt, before.started) != (
            message.key,
            message.attempt,
            message.started,
        ):
            self.last_seq, self.step, self.has_ended = -1, 0, False
        self.key, self.info, self.is_gone = message.key, message, False
        self.curves = MappingProxyType({})

    def add_curves(self, message: Series) -> None:
        """Note new curves."""
        self.curves = MappingProxyType({**self.curves, **{each.key: each for each in message.series}})

    def tell(self, status: Status) -> None:
        """Note how the run stands."""
        self.status = status
        # The page says `waiting` before the first step; a run does not.
        self.state = "running" if status.state == "waiting" else status.state
        self.epoch = max(self.epoch, status.epoch)
        self.step = max(self.step, status.step)
        self.validation_batch = status.validation_batch or self.validation_batch

    @property
    def is_over(self) -> bool:
        """True if the run has ended."""
        return self.has_ended or self.state in FINAL_STATES

    def is_new(self, event: Event) -> bool:
        """Return whether a milestone has not come before, and remember it."""
        place = event.seq, event.time
        if place in self._seen:
            return False
        self._seen[place] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return True

    def follow(self, event: Event) -> None:
        """Note what a new milestone tells."""
        self.received += 1
        self.last_seq = max(self.last_seq, event.seq)
        self.epoch = max(self.epoch, event.epoch)
        self.step = max(self.step, event.step)
        self.has_ended = isinstance(event, TrainEnd)
        if isinstance(event, StateChanged):
            self.state = event.state
        elif isinstance(event, TrainEnd):
            self.state = event.status
        if isinstance(event, ValidationEnd | EpochEnd | Evaluated | TrainEnd):
            self.metrics = MappingProxyType({**self.metrics, **event.metrics})

    def newly_missed(self, count: int) -> int:
        """Return how many milestones are lost that were not before, given how many the server has dropped in all."""
        before = self.missed
        self.missed = max(before, count - self.received)
        return self.missed - before
