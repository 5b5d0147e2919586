"""Kept runs: what the live page has read of a long log, put into a column file and taken out again."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from offloop.dashboard.curves import column_file
from offloop.dashboard.curves.history import History
from offloop.dashboard.curves.layer_history import LayerHistory
from offloop.dashboard.runs.live_run import KeptFacts, LiveRun
from offloop.engine import Event, LogPlace, TrainEnd, TrainStart, decode


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a column file."""

    place: LogPlace
    """Where the curves end in the log."""
    count: int
    """Events of the log before it."""
    facts: KeptFacts
    milestones: list[msgspec.Raw]
    samples: list[msgspec.Raw]


class KeptRun:
    """A run as it was kept."""

    def __init__(self, state: _State, history: History, layers: LayerHistory) -> None:
        self.place = state.place
        self.count = state.count
        self.history = history
        self.layers = layers
        self.facts = state.facts
        self.start = _event(state.facts.start)
        self.samples = [_event(each) for each in state.samples]
        self.milestones: Sequence[Event] = [_event(each) for each in state.milestones]

    @property
    def events(self) -> Sequence[Event]:
        """Milestones and the last step, in an order that leads to the run's state."""
        steps = [_event(each) for each in self.facts.last_step]
        if self.milestones and isinstance(self.milestones[-1], TrainEnd):
            return [*self.milestones[:-1], *steps, self.milestones[-1]]
        return [*self.milestones, *steps]


def find_run(log: Path, *, history_bytes: int) -> KeptRun | None:
    """Return what is kept of a log; None if nothing is, or it cannot be used. Blocks.

    Whether the log is still the same tells an `EventTail` that continues at `place`.
    """
    kept = column_file.find(column_file.place_of(log), limit=history_bytes)
    if kept is None:
        return None
    with contextlib.suppress(msgspec.MsgspecError):
        run = KeptRun(msgspec.json.decode(kept.state, type=_State), kept.history, kept.layers)
        if isinstance(run.start, TrainStart):
            return run
    return None


def keep_run(log: Path, live: LiveRun, place: LogPlace, count: int) -> None:
    """Keep what was read of a log. Blocks for some seconds per GB.

    Args:
        log: The log.
        live: The run, with all events up to `place` taken in.
        place: Where the reader stands.
        count: Events before it.

    Raises:
        OSError: The file cannot be written.
    """
    state = _State(
        place=place,
        count=count,
        facts=live.facts(),
        milestones=list(live.milestones.events()),
        samples=list(live.samples.events()),
    )
    column_file.keep(column_file.place_of(log), live.history, live.layers, msgspec.json.encode(state))


def _event(raw: msgspec.Raw) -> Event:
    return decode(bytes(raw))
