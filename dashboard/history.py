"""History: the curves of one run, for viewers that come late or zoom in. Bounded; nothing shown ever moves.

All curves share one axis, a row for each moment at which something was measured. A curve is a list of points,
each a row and a value, and above it coarser lists of points:

    level 0    every point
    level 1    of each 8 points the least and the greatest
    level 2    of each 8 such buckets the least and the greatest, ...

Every list holds true points at their true place: a spike is on every level, and what was drawn from a coarse
level is still right when finer points are drawn around it. Buckets are counted from the first point, so that
more points never change those that stand.

When the history outgrows its limit, the finest level of its oldest part goes; the coarser ones stay.

One thread uses a history; nothing here waits or locks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from offloop.dashboard.column import BLOCK, Column
from offloop.dashboard.protocol import Float64s, Gap, NonFinite
from offloop.engine import checks

HISTORY_BYTES: Final = 256 * 1024 * 1024
"""Bytes that the curves of one run may take: about 15 million points."""
BUCKET: Final = 8
"""Points in a bucket. A level then holds a quarter of the entries of the one below, all of them a third."""
MAX_STRETCHES: Final = 1_000
"""Gaps, and stretches without a finite value of one curve, that are told apart."""
POINT_BYTES: Final = 12
AXIS_BYTES: Final = 24

Rows = npt.NDArray[np.uint32]
AxisName = Literal["step", "time", "epoch"]
AXES: Final[tuple[AxisName, ...]] = ("step", "time", "epoch")


class Axis:
    """What the points of all curves stand over: step, time and epoch of each row, none of them ever falling."""

    def __init__(self) -> None:
        self.rows = 0  # in all, also those that were trimmed
        self._first = 0  # the first row that is in the dense columns
        self._last = (-math.inf, -math.inf, -math.inf)
        self._dense = {name: Column("d") for name in AXES}
        # Rows before `_first` that coarse levels still refer to.
        self._old_rows: Rows = np.empty(0, np.uint32)
        self._old: dict[AxisName, Float64s] = {name: np.empty(0) for name in AXES}

    def append(self, step: float, time: float, epoch: float) -> int:
        """Add a row and return its number. What would fall stays where the row before is.

        A sample that another thread publishes may be stamped a moment after a step that arrives behind it.
        """
        last_step, last_time, last_epoch = self._last
        self._last = max(step, last_step), max(time, last_time), max(epoch, last_epoch)
        for column, value in zip(self._dense.values(), self._last, strict=True):
            column.append(value)
        self.rows += 1
        if not self.rows % BLOCK:
            for column in self._dense.values():
                column.seal()
        return self.rows - 1

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return AXIS_BYTES * (self.rows - self._first) + (AXIS_BYTES + 4) * len(self._old_rows)

    def last(self, name: AxisName) -> float:
        """Return the last value of a column; NaN if there is none."""
        column = self._dense[name]
        return float(column[-1]) if len(column) else math.nan

    def at(self, rows: Rows) -> dict[AxisName, Float64s]:
        """Return the columns at some rows, which must be kept and in rising order. Shapes: (len(rows),)."""
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

    def trim(self, first: int, referred: Rows) -> None:
        """Keep, of the rows before `first`, only those in `referred`, which is sorted."""
        kept = referred[referred < first]
        self._old = self.at(kept)
        self._old_rows = kept
        for column in self._dense.values():
            column.drop(first - self._first)
        self._first = first


class _Level:
    """One list of points of a curve."""

    __slots__ = ("covered", "rows", "start", "values")

    def __init__(self) -> None:
        self.rows = Column("I")
        self.values = Column("d")
        self.start = 0  # first row from which on this level is complete
        self.covered = -1  # last row whose point has gone into this level; not used on level 0

    def drop_before(self, row: int) -> None:
        count = self.rows.search(row)
        self.rows.drop(count)
        self.values.drop(count)
        self.start = max(self.start, row)


class Curve:
    """The points of one metric."""

    def __init__(self) -> None:
        self.points = 0  # in all, also those that were trimmed
        self.levels = [_Level()]
        self.marks: list[NonFinite] = []  # by step
        self.last = math.nan
        self.least: tuple[float, int] | None = None  # value and step of the least finite one
        self.greatest: tuple[float, int] | None = None

    @property
    def bytes(self) -> int:
        """Bytes its points take."""
        return POINT_BYTES * sum(len(level.rows) for level in self.levels)

    @property
    def reduced_before(self) -> int:
        """First row from which on every point is kept."""
        return self.levels[0].start

    def append(self, row: int, value: float, step: int) -> None:
        """Add a point; rows rise. A value that is not finite becomes NaN in the points and a mark."""
        self.last = value
        if not math.isfinite(value):
            self._mark(value, step)
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

    def _mark(self, value: float, step: int) -> None:
        kind: Literal["nan", "inf", "-inf", "mixed"] = (
            "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        )
        before = self.marks[-1] if self.marks else None
        follows = before is not None and math.isnan(self.levels[0].values[-1])  # no finite point between
        if before is not None and (follows or len(self.marks) >= MAX_STRETCHES):
            kind = kind if follows and kind == before.kind else "mixed"
            self.marks[-1] = NonFinite(before.start, step, kind, before.count + 1)
        else:
            self.marks.append(NonFinite(step, step, kind, 1))

    def _close_bucket(self, row: int) -> None:
        """Put the least and the greatest of the last bucket into the level above, and so on upwards."""
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
        """Return the points in the rows from `first` to before `end`, at most about `points` of them.

        Args:
            first: First row.
            end: Row after the last one.
            points: None for all there are. Of neighbours beyond that the least and the greatest stay.
            margin: With the neighbours on both sides, so that a line goes to the edges.

        Returns:
            Rows (n,) uint32 rising, values (n,) float64 with NaN for what is not finite, and whether points
            of this stretch are left out.
        """
        number = 0
        if points is not None:
            # One level finer than needed is read, and merged to just what is asked for.
            while number + 1 < len(self.levels) and self._count(number, first, end) > BUCKET * points:
                number += 1
        rows, values = self._entries(number, first, end)
        reduced = number > 0 or first < self.reduced_before
        if points is not None and len(rows) > points:
            before = len(rows)
            rows, values = _merge(rows, values, points)
            reduced = reduced or len(rows) < before  # a bucket of two keeps both
        if margin:
            rows, values = self._with_margin(rows, values, first, end)
        return rows, values, reduced

    def _count(self, number: int, first: int, end: int) -> int:
        rows = self.levels[number].rows
        return rows.search(end) - rows.search(first)

    def _entries(self, number: int, first: int, end: int) -> tuple[Rows, Float64s]:
        """Return a level's points: before its start those of coarser levels, behind its end those of finer ones."""
        parts = self._kept(number, first, end)
        while number and self.levels[number].covered + 1 < end:
            behind = max(first, self.levels[number].covered + 1)
            number -= 1
            # A finer level ends with its own last bucket; what is behind that comes from the one below it.
            parts.append(_cut(self.levels[number], behind, end))
        rows = np.concatenate([rows for rows, _ in parts])
        values = np.concatenate([values for _, values in parts])
        new = np.ones(len(rows), bool)
        new[1:] = rows[1:] > rows[:-1]  # the least is the greatest too in a flat bucket
        return rows[new], values[new]

    def _kept(self, number: int, first: int, end: int) -> list[tuple[Rows, Float64s]]:
        """Return a level's points, and those of coarser levels where its own are gone; in order."""
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
        """Drop the points before a row from a level, unless there is none above that has them."""
        if number + 1 < len(self.levels):
            # Never beyond what the level above covers: what has not gone into it stands here alone.
            self.levels[number].drop_before(min(row, self.levels[number + 1].covered + 1))

    def referred(self) -> Iterable[Rows]:
        """Yield the rows of its points, level after level."""
        for level in self.levels:
            if len(level.rows):
                yield level.rows.read()


def _cut(level: _Level, first: int, end: int) -> tuple[Rows, Float64s]:
    start, stop = level.rows.search(first), level.rows.search(end)
    if start >= stop:
        return np.empty(0, np.uint32), np.empty(0)
    return level.rows.read(start, stop), level.values.read(start, stop)


def _merge(rows: Rows, values: Float64s, points: int) -> tuple[Rows, Float64s]:
    """Keep the least and the greatest of each bucket of rows; buckets are powers of two and start at row 0.

    So those of a longer history nest in those of a shorter one, and a point that stays stays where it is.
    """
    span = int(rows[-1]) - int(rows[0]) + 1
    width = 1
    while 2 * math.ceil(span / width) > points:
        width *= 2
    buckets = rows // np.uint32(width)
    starts = np.flatnonzero(np.concatenate(([True], buckets[1:] != buckets[:-1])))
    lengths = np.diff(np.append(starts, len(rows)))
    keep = np.zeros(len(rows), bool)
    for extreme in (np.fmin, np.fmax):  # both pass over NaN where there is anything else
        wanted = np.repeat(extreme.reduceat(values, starts), lengths)
        found = np.flatnonzero((values == wanted) | (np.isnan(wanted) & np.isnan(values)))
        _, firsts = np.unique(buckets[found], return_index=True)
        keep[found[firsts]] = True
    return rows[keep], values[keep]


class History:
    """All curves of one run."""

    def __init__(self, limit: int = HISTORY_BYTES) -> None:
        """Keep at most about `limit` bytes."""
        checks.whole_number("history_bytes", limit, at_least=1_000_000)
        self.axis = Axis()
        self.curves: list[Curve] = []
        self.gaps: list[Gap] = []
        self._limit = limit
        self._check_at = 4096  # rows at which the size is looked at again: summing up costs too

    @property
    def bytes(self) -> int:
        """Bytes that axis and curves take."""
        return self.axis.bytes + sum(curve.bytes for curve in self.curves)

    @property
    def trimmed(self) -> float | None:
        """Step before which not every point is kept; None while all are."""
        first = max((curve.reduced_before for curve in self.curves), default=0)
        if first == 0:
            return None
        first = min(first, self.axis.rows - 1)
        return float(self.axis.at(np.array([first], np.uint32))["step"][0])

    def add_curve(self) -> int:
        """Make a curve and return its number."""
        self.curves.append(Curve())
        return len(self.curves) - 1

    def add_gap(self, after: float, before: float, count: int) -> None:
        """Note that steps are missing."""
        if len(self.gaps) >= MAX_STRETCHES:
            last = self.gaps.pop()
            after, count = last.after, last.count + count
        self.gaps.append(Gap(after, before, count))

    def check_size(self) -> None:
        """Trim if the history has outgrown its limit. Called now and then, when rows have been added."""
        if self.axis.rows < self._check_at:
            return
        self._check_at = self.axis.rows + 4096
        while self.bytes > self._limit and self._trim():
            pass

    def _trim(self) -> bool:
        """Drop the oldest quarter of the level that takes the most; False if that changes nothing."""
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
        # A curve with few points has them all still: they are referred to, however old.
        first = max((curve.reduced_before for curve in self.curves), default=0)
        rows = [rows for curve in self.curves for rows in curve.referred()]
        self.axis.trim(first, np.unique(np.concatenate(rows)))

    def columns(
        self, ids: Sequence[int], first: int, end: int, points: int | None, *, margin: bool = False
    ) -> tuple[dict[AxisName, Float64s], list[tuple[int, Rows, Float64s, bool]]]:
        """Return a stretch of some curves over one axis.

        Returns:
            The axis columns (rows,), and for each curve its number, which of these rows its points are in
            (n,) uint32, their values (n,), and whether points are left out.
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
