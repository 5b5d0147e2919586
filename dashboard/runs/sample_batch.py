"""SampleBatch: consecutive samples of a run as one message, for viewers that want events and not only curves."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from offloop.dashboard.protocol.encoding import encode_event, encode_message
from offloop.dashboard.protocol.from_server import Streamed
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.engine import Event

SAMPLES_IN_A_MESSAGE: Final = 500
"""Most samples of one message: 100 to 200 KB with usual ones."""


class SampleBatch:
    """Samples that follow each other, encoded once for all viewers when the first one is sent them."""

    __slots__ = ("_events", "_message", "count", "run")

    def __init__(self, run: str, events: Sequence[Event]) -> None:
        """Keep samples of the run with that key."""
        self.run = run
        self.count = len(events)
        self._events = events
        self._message: bytes | None = None

    def message(self) -> bytes:
        """Return them as a message."""
        if self._message is None:
            self._message = encode_message(
                Streamed(run=self.run, events=[msgspec.Raw(encode_event(event)) for event in self._events])
            )
            self._events = ()
        return self._message


def in_order(
    run: str, events: Iterable[tuple[Event, bool]], milestones: Iterable[KeptMilestone]
) -> Iterator[KeptMilestone | SampleBatch]:
    """Yield events as viewers get them: milestones one by one, and the samples between them together.

    Args:
        run: Key of the run.
        events: In order, each with whether it is a sample.
        milestones: The others, as the run keeps them.
    """
    kept = iter(milestones)
    samples: list[Event] = []
    for event, is_sample in events:
        if is_sample:
            samples.append(event)
        if samples and (not is_sample or len(samples) == SAMPLES_IN_A_MESSAGE):
            yield SampleBatch(run, samples)
            samples = []
        if not is_sample:
            yield next(kept)
    if samples:
        yield SampleBatch(run, samples)
