"""RunSamples: the texts, pictures and tables of one run, as viewers ask for them."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, Literal, TypeAlias

import msgspec

from offloop.dashboard.protocol.encoding import encode_event, encode_message
from offloop.dashboard.protocol.from_server import SampleEntry, SampleIndex
from offloop.engine import (
    Event,
    Picture,
    PictureSample,
    SampleFileError,
    SampleFiles,
    TableSample,
    TextSample,
)

AnySample: TypeAlias = TextSample | PictureSample | TableSample
SAMPLES: Final = (TextSample, PictureSample, TableSample)

SAMPLES_KEPT: Final = 10_000
"""Latest samples of a run that viewers can ask for."""
SAMPLE_MEMORY: Final = 64 * 1024 * 1024
"""Bytes that their events may take together: short texts and the rows of tables, the rest is in files."""
_KINDS: Final[dict[type[Event], Literal["text", "picture", "table"]]] = {
    TextSample: "text",
    PictureSample: "picture",
    TableSample: "table",
}


class RunSamples:
    """The samples of a run, oldest first. Beyond a bound the oldest go. One thread at a time, except for `files`."""

    def __init__(self, run: str, files: SampleFiles) -> None:
        """Keep none yet.

        Args:
            run: Key of the run.
            files: Where the contents are; only threads of their own may read there.
        """
        self.run = run
        self.files = files
        self.count = 0
        """Samples so far, with those that are no longer kept."""
        self._bytes = 0
        # By seq; a dict, because viewers ask by it.
        self._kept: dict[int, tuple[AnySample, int]] = {}
        self._index: deque[SampleEntry] = deque()

    def add(self, event: Event) -> None:
        """Keep an event, if it is a sample."""
        if not isinstance(event, SAMPLES):
            return
        size = len(encode_event(event))
        self._kept[event.seq] = event, size
        kind = _KINDS[type(event)]
        self._index.append(SampleEntry(event.seq, event.key, kind, event.step, event.epoch, event.time))
        self.count += 1
        self._bytes += size
        while len(self._index) > SAMPLES_KEPT or (self._bytes > SAMPLE_MEMORY and len(self._index) > 1):
            _, size = self._kept.pop(self._index.popleft().seq, (None, 0))
            self._bytes -= size

    def find(self, seq: int) -> AnySample | None:
        """Return a sample; None if there is none of this number, or it is no longer kept."""
        return self._kept.get(seq, (None, 0))[0]

    def since(self, count: int) -> bytes | None:
        """Return the message that names the samples since there were `count`; None if there are no new ones."""
        if count >= self.count:
            return None
        known = max(0, count - (self.count - len(self._index)))
        return encode_message(
            SampleIndex(run=self.run, samples=list(itertools.islice(self._index, known, None)))
        )

    def events(self) -> Iterator[msgspec.Raw]:
        """Yield the kept samples, encoded."""
        for event, _ in self._kept.values():
            yield msgspec.Raw(encode_event(event))

    def restore(self, events: Iterable[Event]) -> None:
        """Keep exactly these instead."""
        self._kept.clear()
        self._index.clear()
        self._bytes = self.count = 0
        for event in events:
            self.add(event)


def content_of(sample: AnySample, picture: int | None) -> Picture | TextSample | None:
    """Return what has the content that a viewer asks for; None for a table without its pictures.

    Raises:
        SampleFileError: The table has no such picture.
    """
    if isinstance(sample, TableSample):
        if picture is None:
            return None
        if not 0 <= picture < len(sample.pictures):
            raise SampleFileError(
                f"the table has {len(sample.pictures)} pictures, not one with the number {picture}"
            )
        return sample.pictures[picture]
    return sample.picture if isinstance(sample, PictureSample) else sample


def brief(event: Event) -> Event:
    """Return an event without what viewers ask for by `sample`: the text, the rows."""
    if isinstance(event, TextSample):
        return msgspec.structs.replace(event, text="")
    if isinstance(event, TableSample):
        return msgspec.structs.replace(event, rows=())
    return event
