"""History: the curves of one run, for viewers that connect late or zoom in. Bounded; drawn points never move.

All curves share one axis, with a row for every moment of a measurement. A curve is a list of points, each a row and
a value, and above it coarser lists of points:

    level 0    every point
    level 1    the minimum and the maximum of every 8 points
    level 2    the minimum and the maximum of every 8 such buckets, ...

Every list holds true points at their true place: a spike is on every level, and a curve drawn from a coarse level
stays right when finer points are drawn around it. Buckets are counted from the first point, so that new points never
change existing buckets.

When the history outgrows its limit, it drops the finest level of its oldest part and keeps the coarser ones.

Only one thread uses a history; nothing here waits or locks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, Self

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.chart_frame import Float64s, Gap, NonFinite
from offloop.dashboard.curves.column import BLOCK, Column
from offloop.dashboard.protocol.encoding import number as as_json
from offloop.engine import checks

HISTORY_BYTES: Final = 256 * 1024 * 1024
"""Default limit of the bytes for the curves of one run: about 15 million points."""
BUCKET: Final = 8
"""Points in a bucket. A level has a quarter of the entries of the one below; all levels add a third to level 0."""
MAX_STRETCHES: Final = 1_000
"""Most gaps of a run, and most ranges of a curve without a finite value; further ones are merged into the last."""
POINT_BYTES: Final = 12
AXIS_BYTES: Final = 32

Rows = npt.NDArray[np.uint32]
AxisName = Literal["step", "time", "epoch", "samples"]
AXES: Final[tuple[AxisName, ...]] = ("step", "time", "epoch", "samples")


class AxisFacts(msgspec.Struct, frozen=True):
    """What an axis is beside its columns."""

    rows: int
    first: int
    last: tuple[Any, Any, Any, Any]


class CurveFacts(msgspec.Struct, frozen=True):
    """What a curve is beside its columns; numbers that may not be finite are as in messages."""

    points: int
    last: Any
    marks: list[NonFinite]
    least: tuple[float, int] | None
    greatest: tuple[float, int] | None
    levels: list[tuple[int, int]]
    """`start` and `covered` of each level."""


class Axis:
    """The shared axis: step, time, epoch and samples seen of every row, none of which ever decreases."""

    def __init__(self) -> None:
        # All rows, including trimmed ones.
        self.rows = 0
        # The first row in the dense columns.
        self._first = 0
        self._last = (-math.inf, -math.inf, -math.inf, 0.0)
        self._dense = {name: Column("d") for name in AXES}
        # Rows before `_first` that coarse levels still use.
        self._old_rows: Rows = np.empty(0, np.uint32)
        self._old: dict[AxisName, Float64s] = {name: np.empty(0) for name in AXES}

    def append(self, step: float, time: float, epoch: float, samples: float = 0.0) -> int:
        """Add a row and return its number. A value that would decrease repeats the previous row's.

        A sample from another thread can have a later time than a step that arrives after it.
        """
        last_step, last_time, last_epoch, last_samples = self._last
        self._last = (
            max(step, last_step),
            max(time, last_time),
            max(epoch, last_epoch),
            max(samples, last_samples),
        )
        for column, value in zip(self._dense.values(), self._last, strict=True):
            column.append(value)
        self.rows += 1
        if not self.rows % BLOCK:
            for column in self._dense.values():
                column.seal()
        return self.rows - 1

    def extend(self, step: Float64s, time: Float64s, epoch: Float64s, samples: Float64s) -> int:
        """Add rows as `append` would one by one, and return the number of the first; shapes (n,)."""
        first = self.rows
        latest = []
        given = (step, time, epoch, samples)
        for column, last, numbers in zip(self._dense.values(), self._last, given, strict=True):
            rising = np.maximum.accumulate(np.maximum(numbers, last))
            column.extend(rising)
            latest.append(float(rising[-1]))
        self._last = (latest[0], latest[1], latest[2], latest[3])
        self.rows += len(step)
        return first

    @property
    def bytes(self) -> int:
        """Bytes of the axis."""
        return AXIS_BYTES * (self.rows - self._first) + (AXIS_BYTES + 4) * len(self._old_rows)

    @property
    def first_step(self) -> float:
        """Step of the first kept row; infinity if there is none."""
        old = self._old["step"]
        dense = self._dense["step"]
        return float(old[0]) if len(old) else float(dense[0]) if len(dense) else math.inf

    def last(self, name: AxisName) -> float:
        """Return the last value of a column; NaN if it is empty."""
        column = self._dense[name]
        return float(column[-1]) if len(column) else math.nan

    def at(self, rows: Rows) -> dict[AxisName, Float64s]:
        """Return the columns at some kept rows in ascending order; shapes (len(rows),)."""
        split = int(np.searchsorted(rows, self._first))
        old = np.searchsorted(self._old_rows, rows[:split])
        if split == len(rows):
            return {name: self._old[name][old] for name in AXES}
        start, stop = int(rows[split]) - self._first, int(rows[-1]) - self._first + 1
        new = rows[split:].astype(np.int64) - int(rows[split])
        return {
            name: np.concatenate((self._old[name][old], self._dense[name].read(start, stop)[new]))
            for name in AXES
        }

    def row_of(self, name: AxisName, value: float) -> int:
        """Return the first kept row whose column is at least `value`; `rows` if there is none."""
        old = self._old[name]
        if len(old) and value <= old[-1]:
            return int(self._old_rows[int(np.searchsorted(old, value))])
        return self._first + self._dense[name].search(value)

    def facts(self) -> AxisFacts:
        """Return what is needed beside `columns` to make this axis again."""
        step, time, epoch, samples = (as_json(each) for each in self._last)
        return AxisFacts(self.rows, self._first, (step, time, epoch, samples))

    def columns(self) -> Iterator[npt.NDArray[Any] | Column]:
        """Yield all columns: rows of the trimmed part, its four columns, and the four of the kept part."""
        yield self._old_rows
        yield from self._old.values()
        yield from self._dense.values()

    @classmethod
    def of(cls, facts: AxisFacts, columns: Iterator[npt.NDArray[Any]]) -> Self:
        """Make an axis of what another one returned; columns are views of what was given."""
        axis = cls()
        axis.rows, axis._first = facts.rows, facts.first
        step, time, epoch, samples = (float(each) for each in facts.last)
        axis._last = (step, time, epoch, samples)
        axis._old_rows = next(columns)
        axis._old = {name: next(columns) for name in AXES}
        axis._dense = {name: Column.of("d", next(columns)) for name in AXES}
        return axis

    def trim(self, first: int, referred: Rows) -> None:
        """Keep, of the rows before `first`, only those in `referred`, which is sorted."""
        self._old = self.at(referred)
        self._old_rows = referred
        for column in self._dense.values():
            column.drop(first - self._first)
        self._first = first


class _Level:
    """One list of points of a curve."""

    __slots__ = ("covered", "rows", "start", "values")

    def __init__(self) -> None:
        self.rows = Column("I")
        self.values = Column("d")
        # This level is complete from this row on.
        self.start = 0
        # The last row whose point is in this level; unused on level 0.
        self.covered = -1

    def drop_before(self, row: int) -> None:
        count = self.rows.search(row)
        self.rows.drop(count)
        self.values.drop(count)
        self.start = max(self.start, row)


class Curve:
    """The points of one metric."""

    def __init__(self) -> None:
        # All points, including trimmed ones.
        self.points = 0
        self.levels = [_Level()]
        # By step.
        self.marks: list[NonFinite] = []
        self.last = math.nan
        # Value and step of the extreme finite points.
        self.least: tuple[float, int] | None = None
        self.greatest: tuple[float, int] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the points."""
        return POINT_BYTES * sum(len(level.rows) for level in self.levels)

    @property
    def last_row(self) -> int:
        """Row of the newest point; -1 if there is none."""
        rows = self.levels[0].rows
        return int(rows[-1]) if len(rows) else -1

    @property
    def reduced_before(self) -> int:
        """Row from which on every point is kept."""
        return self.levels[0].start

    def append(self, row: int, value: float, step: int) -> None:
        """Add a point; rows must ascend. A value that is not finite is stored as NaN and as a mark."""
        self.last = value
        if not math.isfinite(value):
            self._mark(value, step, follows=self._ends_without_value)
            value = math.nan
        else:
            if self.least is None or value < self.least[0]:
                self.least = value, step
            if self.greatest is None or value > self.greatest[0]:
                self.greatest = value, step
        level = self.levels[0]
        level.rows.append(row)
        level.values.append(value)
        self.points += 1
        if not self.points % BUCKET:
            self._close_bucket(row)

    def extend(self, rows: Rows, values: Float64s, steps: Float64s) -> None:
        """Add points as `append` would one by one; shapes (n,), n > 0."""
        finite = np.isfinite(values)
        self.last = float(values[-1])
        if finite.all():
            stored = values
        else:
            for place in np.flatnonzero(~finite).tolist():
                follows = not finite[place - 1] if place else self._ends_without_value
                self._mark(float(values[place]), int(steps[place]), follows=follows)
            stored = np.where(finite, values, math.nan)
        if finite.any():
            least = int(np.nanargmin(stored))
            greatest = int(np.nanargmax(stored))
            if self.least is None or stored[least] < self.least[0]:
                self.least = float(stored[least]), int(steps[least])
            if self.greatest is None or stored[greatest] > self.greatest[0]:
                self.greatest = float(stored[greatest]), int(steps[greatest])
        self._extend_levels(rows, stored)

    def _extend_levels(self, rows: Rows, values: Float64s) -> None:
        """Add points to level 0, and minima and maxima of the buckets that they complete to the levels above."""
        # Buckets of this level that are complete, and in how many entries of it a bucket is.
        entries, size, number = self.points, BUCKET, 0
        self.points += len(values)
        level = self.levels[0]
        # Rows at which entries of this level were complete: for level 0, of each point.
        completed = rows
        while True:
            pending = entries % BUCKET
            waiting = pending * size // BUCKET
            new_rows = np.concatenate((np.array(level.rows.last(waiting), np.uint32), rows))
            new_values = np.concatenate((np.array(level.values.last(waiting)), values))
            level.rows.extend(rows)
            level.values.extend(values)
            count = (pending + len(completed)) // BUCKET
            if not count:
                return
            # The row of the entry that completes each bucket.
            completed = completed[BUCKET - 1 - pending :: BUCKET]
            buckets = new_values[: count * size].reshape(count, size)
            empty = np.isnan(buckets)
            least = np.where(empty, np.inf, buckets).argmin(axis=1)
            greatest = np.where(empty, -np.inf, buckets).argmax(axis=1)
            places = np.sort(np.stack((least, greatest), axis=1), axis=1)
            flat = (places + size * np.arange(count)[:, None]).ravel()
            rows, values = new_rows[flat], new_values[flat]
            if number + 1 == len(self.levels):
                self.levels.append(_Level())
                self.levels[-1].start = level.start
            number += 1
            level = self.levels[number]
            level.covered = int(completed[-1])
            entries, size = entries // BUCKET, 2 * BUCKET

    @property
    def _ends_without_value(self) -> bool:
        """True if the newest point is not finite."""
        values = self.levels[0].values
        return len(values) > 0 and math.isnan(values[-1])

    def _mark(self, value: float, step: int, *, follows: bool) -> None:
        """Record a point that is not finite; `follows` one that is not finite either, without a point in between."""
        kind: Literal["nan", "inf", "-inf", "mixed"] = (
            "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        )
        before = self.marks[-1] if self.marks else None
        follows = follows and before is not None
        if before is not None and (follows or len(self.marks) >= MAX_STRETCHES):
            kind = kind if follows and kind == before.kind else "mixed"
            self.marks[-1] = NonFinite(before.start, step, kind, before.count + 1)
        else:
            self.marks.append(NonFinite(step, step, kind, 1))

    def _close_bucket(self, row: int) -> None:
        """Add the minimum and the maximum of the last bucket to the level above, and likewise further up."""
        count, size = self.points, BUCKET
        for number, level in enumerate(self.levels):
            rows, values = level.rows.last(size), level.values.last(size)
            level.rows.seal()
            level.values.seal()
            least = greatest = 0
            for place, value in enumerate(values):
                if value < values[least] or values[least] != values[least]:
                    least = place
                if value > values[greatest] or values[greatest] != values[greatest]:
                    greatest = place
            if number + 1 == len(self.levels):
                self.levels.append(_Level())
                self.levels[-1].start = level.start
            above = self.levels[number + 1]
            for place in sorted((least, greatest)):
                above.rows.append(rows[place])
                above.values.append(values[place])
            above.covered = row
            count //= BUCKET
            size = 2 * BUCKET
            if count % BUCKET:
                return

    def view(
        self, first: int, end: int, points: int | None, *, margin: bool = False
    ) -> tuple[Rows, Float64s, bool]:
        """Return the points in the rows from `first` up to but not including `end`.

        Args:
            first: First row.
            end: Row after the last one.
            points: About the most points to return: neighbours are reduced to minima and maxima. None for all.
            margin: Include the next point on either side, so that a line reaches the edges.

        Returns:
            Rows (n,) uint32, ascending; values (n,) float64, NaN if not finite; whether points are left out.
        """
        number = 0
        if points is not None:
            # Read one level finer than needed, and merge it down to `points`.
            while number + 1 < len(self.levels) and self._count(number, first, end) > BUCKET * points:
                number += 1
        rows, values = self._entries(number, first, end)
        reduced = number > 0 or first < self.reduced_before
        if points is not None and len(rows) > points:
            before = len(rows)
            rows, values = merge(rows, values, points)
            # Merging keeps both points of a bucket of two.
            reduced = reduced or len(rows) < before
        if margin:
            rows, values = self._with_margin(rows, values, first, end)
        return rows, values, reduced

    def _count(self, number: int, first: int, end: int) -> int:
        rows = self.levels[number].rows
        return rows.search(end) - rows.search(first)

    def _entries(self, number: int, first: int, end: int) -> tuple[Rows, Float64s]:
        """Return a level's points: before its start those of coarser levels, after its end those of finer ones."""
        parts = self._kept(number, first, end)
        while number and self.levels[number].covered + 1 < end:
            behind = max(first, self.levels[number].covered + 1)
            number -= 1
            # A finer level ends with its own last bucket; later points come from the level below.
            parts.append(_cut(self.levels[number], behind, end))
        rows = np.concatenate([rows for rows, _ in parts])
        values = np.concatenate([values for _, values in parts])
        new = np.ones(len(rows), bool)
        # In a flat bucket the minimum is also the maximum.
        new[1:] = rows[1:] > rows[:-1]
        return rows[new], values[new]

    def _kept(self, number: int, first: int, end: int) -> list[tuple[Rows, Float64s]]:
        """Return a level's points in order, with those of coarser levels where its own were trimmed."""
        level = self.levels[number]
        before = min(end, level.start)
        is_above = first < before and number + 1 < len(self.levels)
        above = self._kept(number + 1, first, before) if is_above else []
        return [*above, _cut(level, max(first, level.start), end)]

    def _with_margin(self, rows: Rows, values: Float64s, first: int, end: int) -> tuple[Rows, Float64s]:
        for number in range(len(self.levels)):
            level = self.levels[number]
            place = level.rows.search(first) - 1
            if place >= 0:
                rows = np.insert(rows, 0, level.rows[place])
                values = np.insert(values, 0, level.values[place])
                break
        level = self.levels[0]
        place = level.rows.search(end)
        if place < len(level.rows):
            rows = np.append(rows, np.uint32(level.rows[place]))
            values = np.append(values, level.values[place])
        return rows, values

    def trim(self, number: int, row: int) -> None:
        """Drop the points before a row from a level that has a coarser level above it."""
        if number + 1 < len(self.levels):
            # Keep points that the level above does not cover yet.
            self.levels[number].drop_before(min(row, self.levels[number + 1].covered + 1))

    def facts(self) -> CurveFacts:
        """Return what is needed beside `columns` to make this curve again."""
        levels = [(level.start, level.covered) for level in self.levels]
        return CurveFacts(self.points, as_json(self.last), self.marks, self.least, self.greatest, levels)

    def columns(self) -> Iterator[Column]:
        """Yield rows and values of each level."""
        for level in self.levels:
            yield level.rows
            yield level.values

    @classmethod
    def of(cls, facts: CurveFacts, columns: Iterator[npt.NDArray[Any]]) -> Self:
        """Make a curve of what another one returned; columns are views of what was given."""
        curve = cls()
        curve.points, curve.last, curve.marks = facts.points, float(facts.last), facts.marks
        curve.least, curve.greatest = facts.least, facts.greatest
        curve.levels = []
        for start, covered in facts.levels:
            level = _Level()
            level.start, level.covered = start, covered
            level.rows, level.values = Column.of("I", next(columns)), Column.of("d", next(columns))
            curve.levels.append(level)
        return curve

    def referred(self, end: int) -> Iterable[Rows]:
        """Yield the rows of the points before row `end`, level by level."""
        for level in self.levels:
            if count := level.rows.search(end):
                yield level.rows.read(0, count)


def _cut(level: _Level, first: int, end: int) -> tuple[Rows, Float64s]:
    start, stop = level.rows.search(first), level.rows.search(end)
    if start >= stop:
        return np.empty(0, np.uint32), np.empty(0)
    return level.rows.read(start, stop), level.values.read(start, stop)


def merge(rows: Rows, values: Float64s, points: int) -> tuple[Rows, Float64s]:
    """Keep the minimum and the maximum of every bucket of rows; bucket widths are powers of two from row 0.

    The buckets of a shorter history nest in those of a longer one, so that kept points do not move.
    """
    span = int(rows[-1]) - int(rows[0]) + 1
    width = 1
    while 2 * math.ceil(span / width) > points:
        width *= 2
    buckets = rows // np.uint32(width)
    starts = np.flatnonzero(np.concatenate(([True], buckets[1:] != buckets[:-1])))
    lengths = np.diff(np.append(starts, len(rows)))
    keep = np.zeros(len(rows), bool)
    # Both ignore NaN unless all values of a bucket are NaN.
    for extreme in (np.fmin, np.fmax):
        wanted = np.repeat(extreme.reduceat(values, starts), lengths)
        found = np.flatnonzero((values == wanted) | (np.isnan(wanted) & np.isnan(values)))
        _, firsts = np.unique(buckets[found], return_index=True)
        keep[found[firsts]] = True
    return rows[keep], values[keep]


class History:
    """All curves of one run."""

    def __init__(self, limit: int = HISTORY_BYTES) -> None:
        """Limit the history to about `limit` bytes, at least 1,000,000."""
        checks.whole_number("history_bytes", limit, at_least=1_000_000)
        self.axis = Axis()
        self.curves: list[Curve] = []
        self.gaps: list[Gap] = []
        self._limit = limit
        # Number of rows at which to check the size again: computing it takes time, too.
        self._check_at = 4096

    @property
    def bytes(self) -> int:
        """Bytes of the axis and the curves."""
        return self.axis.bytes + sum(curve.bytes for curve in self.curves)

    @property
    def trimmed(self) -> float | None:
        """Step before which points were trimmed; None if none were."""
        first = max((curve.reduced_before for curve in self.curves), default=0)
        if first == 0:
            return None
        first = min(first, self.axis.rows - 1)
        return float(self.axis.at(np.array([first], np.uint32))["step"][0])

    def add_curve(self) -> int:
        """Add a curve and return its number."""
        self.curves.append(Curve())
        return len(self.curves) - 1

    def add_gap(self, after: float, before: float, count: int) -> None:
        """Record that `count` steps are missing between two steps."""
        if len(self.gaps) >= MAX_STRETCHES:
            last = self.gaps.pop()
            after, count = last.after, last.count + count
        self.gaps.append(Gap(after, before, count))

    def check_size(self) -> None:
        """Trim a history that has outgrown its limit. Call it after adding rows."""
        if self.axis.rows < self._check_at:
            return
        self._check_at = self.axis.rows + 4096
        while self.bytes > self._limit and self._trim():
            pass

    def _trim(self) -> bool:
        """Drop the oldest quarter of the largest level; False if that frees nothing."""
        before = self.bytes
        totals: dict[int, int] = {}
        for curve in self.curves:
            for number, level in enumerate(curve.levels[:-1]):
                totals[number] = totals.get(number, 0) + len(level.rows)
        for number in sorted(totals, key=lambda each: -totals[each]):
            oldest = max(
                curve.levels[number].start for curve in self.curves if number < len(curve.levels) - 1
            )
            cut = oldest + max(1, (self.axis.rows - oldest) // 4)
            for curve in self.curves:
                curve.trim(number, cut)
            self._trim_axis()
            if self.bytes < before:
                return True
        return False

    def _trim_axis(self) -> None:
        # A curve with few points still has all of them: keep their rows, however old.
        first = max((curve.reduced_before for curve in self.curves), default=0)
        is_referred = np.zeros(first, bool)
        for curve in self.curves:
            for rows in curve.referred(first):
                is_referred[rows] = True
        self.axis.trim(first, np.flatnonzero(is_referred).astype(np.uint32))

    def columns(
        self, ids: Sequence[int], first: int, end: int, points: int | None, *, margin: bool = False
    ) -> tuple[dict[AxisName, Float64s], list[tuple[int, Rows, Float64s, bool]]]:
        """Return a range of some curves over one axis; see `Curve.view` for the arguments.

        Returns:
            The axis columns (rows,), and for each curve: its number, the indices of its points' rows (n,) uint32,
            their values (n,), and whether points are left out.
        """
        views = [(id, *self.curves[id].view(first, end, points, margin=margin)) for id in ids]
        rows: Rows = (
            np.unique(np.concatenate([rows for _, rows, _, _ in views])) if views else np.empty(0, np.uint32)
        )
        placed: list[tuple[int, Any, Float64s, bool]] = [
            (id, np.searchsorted(rows, mine).astype(np.uint32), values, reduced)
            for id, mine, values, reduced in views
        ]
        return self.axis.at(rows), placed
