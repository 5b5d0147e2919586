"""Recorded samples: the texts, pictures and tables of a run that go into a file, as answers to what viewers ask."""

import itertools
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from offloop.dashboard.protocol.encoding import encode_event
from offloop.dashboard.protocol.from_server import SampleEntry
from offloop.dashboard.runs.run_samples import AnySample, RunSamples, brief, content_of
from offloop.engine import SampleFileError, TableSample, TextSample

MOST_COMPRESSED: Final = 20
"""How many times smaller a text may become: one that could be small enough only beyond that is not even read."""
DAMAGED: Final = "its file was missing when this page was saved, or not what was published"


class _Content(NamedTuple):
    """An answer: a text, a picture, or a table without its pictures."""

    picture: int | None
    event: bytes | None
    media_type: str
    data: bytes
    error: str


class RecordedSamples(NamedTuple):
    """Samples for a file."""

    kept: frozenset[int]
    """`seq` of each."""
    left_out: int
    parts: Sequence[bytes]
    """Length of the head as u32, the head in JSON, then the contents; empty without samples."""


class _Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer in the file, whose content is at `at` behind the head."""

    seq: int
    at: int
    size: int
    picture: int | None = None
    media_type: str = ""
    error: str = ""
    event: msgspec.Raw | None = None


def record_samples(samples: RunSamples, entries: Sequence[SampleEntry], most_bytes: int) -> RecordedSamples:
    """Take as many samples as fit into some bytes once compressed. Blocks on the file system.

    Of each key the last comes first, then the first, then those between at ever finer distances: whoever moves the
    slider sees the whole of the run. Keys take turns.
    """
    answers: list[_Answer] = []
    contents: list[bytes] = []
    # By content: the same picture may be in many samples.
    places: dict[bytes, int] = {}
    left, end, kept = most_bytes, 0, set[int]()
    for entry in _in_order(entries):
        sample = samples.find(entry.seq)
        if sample is None or _least_size(sample) > left:
            continue
        made = list(_contents_of(samples, sample))
        size = sum(_size_of(each) for each in made if each.data not in places)
        if size > left:
            continue
        left -= size
        kept.add(entry.seq)
        for each in made:
            place = places.get(each.data)
            if place is None:
                place = places[each.data] = end
                contents.append(each.data)
                end += len(each.data)
            event = None if each.event is None else msgspec.Raw(each.event)
            answers.append(
                _Answer(entry.seq, place, len(each.data), each.picture, each.media_type, each.error, event)
            )
    head = msgspec.json.encode(answers)
    parts = [len(head).to_bytes(4, "little"), head, *contents] if answers else []
    return RecordedSamples(frozenset(kept), len(entries) - len(kept), parts)


def _in_order(entries: Sequence[SampleEntry]) -> Iterator[SampleEntry]:
    keys: dict[str, list[SampleEntry]] = {}
    for entry in entries:
        keys.setdefault(entry.key, []).append(entry)
    turns = [[each[place] for place in _spread(len(each))] for each in keys.values()]
    for turn in itertools.zip_longest(*turns):
        yield from (entry for entry in turn if entry is not None)


def _spread(count: int) -> Iterator[int]:
    """Yield all places from 0: the last, the first, that in the middle, those in the middle of both halves, ..."""
    if count > 0:
        yield count - 1
    if count > 1:
        yield 0
    parts = deque([(0, count - 1)])
    while parts:
        low, high = parts.popleft()
        if high - low > 1:
            middle = (low + high) // 2
            yield middle
            parts += (low, middle), (middle, high)


def _least_size(sample: AnySample) -> int:
    """Return about what a sample takes at least, without reading its files: pictures are compressed already."""
    if isinstance(sample, TextSample):
        return max(len(sample.text), sample.size) // MOST_COMPRESSED
    pictures = sample.pictures if isinstance(sample, TableSample) else [sample.picture]
    return sum({each.sha256: each.size for each in pictures}.values())


def _size_of(content: _Content) -> int:
    data = content.data if content.media_type.startswith("image/") else zlib.compress(content.data)
    return len(data) + len(zlib.compress(content.event or b""))


def _contents_of(samples: RunSamples, sample: AnySample) -> Iterator[_Content]:
    yield _content(samples, sample, None)
    if isinstance(sample, TableSample):
        for number in range(len(sample.pictures)):
            yield _content(samples, sample, number)


def _content(samples: RunSamples, sample: AnySample, picture: int | None) -> _Content:
    content = content_of(sample, picture)
    event = (
        encode_event(brief(sample) if isinstance(sample, TextSample) else sample) if picture is None else None
    )
    if content is None:
        return _Content(picture, event, "", b"", "")
    media_type = content.media_type
    try:
        if isinstance(content, TextSample) and not content.sha256:
            data = content.text.encode(errors="backslashreplace")
        else:
            data = samples.files.read(content)
    except (SampleFileError, OSError):
        return _Content(picture, event, media_type, b"", DAMAGED)
    return _Content(picture, event, media_type, data, "")
