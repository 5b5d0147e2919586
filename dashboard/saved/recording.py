"""Recording: what a viewer with the read-only role would get of a run, for a file that other people receive.

The messages are those of the live page, so that the page needs nothing else to show them. Left out is what says on
whose machine the run was: host, process, command line and directory, and names of users in paths.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from offloop.dashboard.curves.chart_frame import Float64s, Gap, NonFinite
from offloop.dashboard.curves.history import HISTORY_BYTES, AxisName, Rows, merge
from offloop.dashboard.protocol.encoding import encode_message, printable
from offloop.dashboard.protocol.from_server import (
    Checkpoints,
    MilestonesMissed,
    RunRow,
    SampleEntry,
    SampleIndex,
)
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import MILESTONE_BYTES
from offloop.dashboard.runs.rows import row_of
from offloop.dashboard.runs.run_reader import RunReader
from offloop.dashboard.saved.packed_column import (
    Layout,
    PackedColumn,
    pack_decimals,
    pack_floats,
    pack_whole,
)
from offloop.dashboard.saved.recorded_samples import RecordedSamples, record_samples
from offloop.dashboard.viewers.run_checkpoints import checkpoint_rows
from offloop.dashboard.viewers.viewer import Viewer
from offloop.engine import OffloopError, RunRecord
from offloop.engine.checkpoint import CheckpointReader

_USERS: Final = re.compile(rb"(/(?:home|Users)/)[^/\s\"'\\:;,]+")
_EXACT: Final = frozenset({"time", "seconds"})
"""Fields of events that are not rounded: a time has ten digits before the point."""


class Detail(NamedTuple):
    """How much of a recording goes into a file."""

    digits: int | None
    """Significant digits of values; None for all."""
    points: int
    """Most points of a curve that has more than were recorded."""
    events: int
    """Most events of a run, the latest."""


class RecordedCurve(NamedTuple):
    """A curve."""

    id: int
    rows: Rows
    values: Float64s
    is_reduced: bool
    marks: Sequence[NonFinite]


class Recording(NamedTuple):
    """A run as it is recorded."""

    directory: Path
    row: RunRow
    started: float
    texts: Sequence[bytes]
    """Messages before the events."""
    missed: int
    """Events that came before those that are kept."""
    events: Sequence[bytes]
    """Messages, oldest first."""
    latest: bytes
    checkpoints: bytes
    """Message that lists them."""
    samples: RecordedSamples
    curves: Sequence[RecordedCurve]
    axis: dict[AxisName, Float64s]
    """At `rows`."""
    rows: Rows
    """Every row that a curve has a point in, ascending."""
    gaps: Sequence[Gap]
    trimmed: float | None
    skipped: int
    """Lines of the log that hold no event."""


class _Curve(msgspec.Struct, frozen=True):
    """A curve in the file."""

    id: int
    points: int
    reduced: bool
    marks: Sequence[NonFinite]
    rows: int
    """Number of the column with its rows, which is followed by that of what its steps are above them."""
    values: int


class _Head(msgspec.Struct, frozen=True):
    """What stands before the columns of a run in the file."""

    texts: Sequence[msgspec.Raw]
    """Messages in the order in which a viewer gets them."""
    answers: dict[str, msgspec.Raw]
    """Messages that answer questions about the run, by the kind of the question."""
    curves: Sequence[_Curve]
    gaps: Sequence[Gap]
    trimmed: float | None
    columns: Sequence[Layout]
    """The first four are rows, and their time, epoch and samples seen; between two such rows all grow in proportion."""


def record(run: RunRecord, *, points: int, sample_bytes: int) -> Recording:
    """Read a run as it stands now. Blocks for about a second per 30 MB of its log.

    Args:
        run: The run.
        points: Most points of a curve; one that has more gets minima and maxima of neighbours.
        sample_bytes: Most bytes of texts, pictures and tables, compressed.

    Raises:
        OSError: Its log cannot be read.
    """
    reader = RunReader(run, history_bytes=HISTORY_BYTES, milestone_bytes=MILESTONE_BYTES)
    live = reader.fill()
    private = {"host": "", "pid": 0, "command": [], "directory": "", "page": None, "refused": {}}
    live.info = msgspec.structs.replace(live.info, **private)
    row = msgspec.structs.replace(row_of(live, run), host="", directory=None, page=None, live=False)
    texts, events, entries = _messages(live)
    samples = record_samples(live.samples, entries, sample_bytes)
    if samples.kept:
        index = SampleIndex(run=live.key, samples=[each for each in entries if each.seq in samples.kept])
        texts.append(encode_message(index))
    curves = list(_curves(live, points))
    rows = np.unique(np.concatenate([each.rows for each in curves])) if curves else np.empty(0, np.uint32)
    return Recording(
        directory=Path(run.directory),
        row=row,
        started=live.info.started,
        texts=texts,
        missed=live.milestones.dropped,
        events=events,
        latest=encode_message(live.latest()),
        checkpoints=encode_message(_checkpoints_of(run)),
        samples=samples,
        curves=curves,
        axis=live.history.axis.at(rows),
        rows=rows,
        gaps=live.history.gaps,
        trimmed=live.history.trimmed,
        skipped=reader.skipped,
    )


def _messages(live: LiveRun) -> tuple[list[bytes], list[bytes], list[SampleEntry]]:
    """Return what a viewer gets: messages about the run, its events, and which samples it has."""
    viewer = Viewer("read_only", "", has_index=True)
    # What was measured by layer is not recorded.
    status = msgspec.structs.replace(live.status(viewers=1, is_control=False), layers=0)
    viewer.watch(live, encode_message(status))
    texts: list[bytes] = []
    events: list[bytes] = []
    entries: list[SampleEntry] = []
    while (text := viewer.next_text()) is not None:
        kind = msgspec.json.decode(text, type=_Kind).type
        if kind == "milestone":
            events.append(text)
        elif kind == "samples":
            entries += msgspec.json.decode(text, type=SampleIndex).samples
        elif kind != "missed":
            texts.append(text)
    return texts, events, entries


def _checkpoints_of(run: RunRecord) -> Checkpoints:
    try:
        return Checkpoints(run=run.key, rows=checkpoint_rows(CheckpointReader(run.directory)))
    except (OffloopError, OSError) as error:
        return Checkpoints(run=run.key, rows=[], error=str(error))


class _Kind(msgspec.Struct):
    type: str


def _curves(live: LiveRun, points: int) -> Iterator[RecordedCurve]:
    history = live.history
    for each in live.series:
        curve = history.curves[each.id]
        rows, values, is_reduced = curve.view(0, history.axis.rows, points)
        yield RecordedCurve(each.id, rows, values, is_reduced, curve.marks)


# In the file -------------------------------------------------------------------------------------


def packed(recording: Recording, detail: Detail) -> list[bytes]:
    """Return a recording for the file, as parts that are compressed best one by one.

    u32      length of the head
    head     JSON
    columns  one after the other, each with its planes
    """
    columns: list[PackedColumn] = []
    places: dict[bytes, int] = {}

    def add(column: PackedColumn) -> int:
        columns.append(column)
        return len(columns) - 1

    _add_axis(recording, detail, add)
    curves = []
    for curve in recording.curves:
        rows, values = curve.rows, curve.values
        if curve.is_reduced and len(rows) > detail.points:
            rows, values = merge(rows, values, detail.points)
        place = places.get(rows.tobytes())
        if place is None:
            step = recording.axis["step"][np.searchsorted(recording.rows, rows)]
            place = places[rows.tobytes()] = add(pack_whole(rows.astype(float)))
            add(pack_whole(step - rows))
        known = pack_floats(values) if detail.digits is None else pack_decimals(values, detail.digits)
        curves.append(_Curve(curve.id, len(rows), curve.is_reduced, curve.marks, place, add(known)))
    head = _Head(
        texts=[msgspec.Raw(each) for each in _texts(recording, detail)],
        answers={"checkpoints": msgspec.Raw(recording.checkpoints)},
        curves=curves,
        gaps=recording.gaps,
        trimmed=recording.trimmed,
        columns=[each.layout for each in columns],
    )
    text = shareable(msgspec.json.encode(head), [recording.directory])
    return [len(text).to_bytes(4, "little"), text, *(plane for each in columns for plane in each.planes)]


def _add_axis(recording: Recording, detail: Detail, add: Any) -> None:
    rows, time = recording.rows, recording.axis["time"]
    if len(rows) > 2 * detail.points:
        # Even in rows and in time, so that both are right to less than a pixel between two of them.
        even = np.linspace(0, len(rows) - 1, detail.points).astype(np.int64)
        ticks = np.searchsorted(time, np.linspace(time[0], time[-1], detail.points))
        kept = np.unique(np.concatenate((even, ticks, np.maximum(ticks - 1, 0))))
    else:
        kept = np.arange(len(rows))
    add(pack_whole(rows[kept].astype(float)))
    add(pack_whole(time[kept], 1_000, is_exact=False))
    add(pack_whole(recording.axis["epoch"][kept], 1_000_000, is_exact=False))
    add(pack_whole(recording.axis["samples"][kept]))


def _texts(recording: Recording, detail: Detail) -> Iterator[bytes]:
    yield from recording.texts
    left_out = max(0, len(recording.events) - detail.events)
    if missed := recording.missed + left_out:
        yield encode_message(MilestonesMissed(run=recording.row.key, count=missed))
    for event in recording.events[left_out:]:
        yield event if detail.digits is None else _rounded_event(event, detail.digits)
    yield recording.latest


def _rounded_event(message: bytes, digits: int) -> bytes:
    return msgspec.json.encode(_rounded(msgspec.json.decode(message), digits))


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: item if key in _EXACT else _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def shareable(text: bytes, directories: Iterable[Path]) -> bytes:
    """Return JSON without what paths tell about a machine.

    The directory of a run becomes its name, and the one above it `.`. Names of users become `~`: `/home/~/data`.
    """
    shown: dict[Path, str] = {}
    for directory in directories:
        for each in (directory, directory.resolve()):
            shown |= {each: each.name, each.parent: "."}
    home = Path.home()
    if len(home.parts) > 2:
        # Wherever this system has them
        shown[home] = str(home.parent / "~")
    # Longer ones first: they may begin with others.
    for path in sorted(shown, key=lambda each: -len(each.parts)):
        if len(path.parts) > 1:
            pattern = rb"(?<![\w/.-])" + re.escape(_in_json(str(path))) + rb"(?![\w.-])"
            text = _in_json(shown[path]).join(re.split(pattern, text))
    return _USERS.sub(rb"\1~", text)


def _in_json(text: str) -> bytes:
    return msgspec.json.encode(printable(text))[1:-1]
