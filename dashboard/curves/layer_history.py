"""LayerHistory: what a run has measured of each layer, over its steps.

Layers are many: as curves, 500 of them with four statistics of three kinds of tensors would be 6,000. So what is known
of a layer is not among the curves. It is a table for each kind, with a row for each measured step:

    step   norm, update_ratio, dead, mean, ... (statistics, layers) float32   histogram (layers, bins) uint16

A histogram holds shares on a logarithmic scale, see `levels_of`. Once all rows take more than the limit, every second
one of a table goes, and later ones are kept at that distance too; the newest is always there.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

LAYER_BYTES: Final = 64 * 1024 * 1024
"""Limit of the memory for the layers of one run: about 450 measurements of 500 layers with weights, gradients and
activations."""
MAX_LAYERS: Final = 5_000
"""Most layers of a kind; further ones are left out."""
MAX_KINDS: Final = 10
MAX_ROWS: Final = 1_000
"""Rows of a table from which on every second one goes: a picture has no more columns."""
MAX_NAME: Final = 300
"""Characters of the longest name of a layer or kind; longer ones are left out."""
MAX_BINS: Final = 512
CHANGE_OVER: Final = 10
"""Measurements over which the change of a layer is taken."""
STATISTICS: Final = ("norm", "update_ratio", "dead", "mean", "std", "minimum", "maximum", "elements")
"""What is known of a layer in one step, in this order. `elements` is their number, from the histogram."""
SUMMARY: Final = ("norm", "update_ratio", "dead", "change")
"""What is told of every layer at once."""
LEAST_SHARE: Final = 1e-9
"""Smallest share of the elements that a histogram tells from none."""

Float32s = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint16]

_FIELDS: Final = {
    "LayersMeasured": ("norm", "dead", "mean", "std", "minimum", "maximum"),
    "GradientStatistics": ("norms", "update_ratios"),
}
"""By the name of the class: fields with a number for each layer."""


class LayerFigures(NamedTuple):
    """What an event says about layers."""

    kind: str
    statistics: Mapping[str, Mapping[str, Any]]
    """By the name of the statistic, then of the layer."""
    histogram: Mapping[str, Any]


def says_layers(event_type: str) -> bool:
    """Return whether events of a type have numbers by layer."""
    return event_type in _FIELDS


def figures_of(event_type: str, fields: Mapping[str, Any]) -> list[LayerFigures]:
    """Return what an event says about layers; fields that are none are left out.

    Args:
        event_type: Name of its class.
        fields: Its fields, from memory or from JSON.
    """

    def field(name: str) -> Mapping[str, Any]:
        value = fields.get(name)
        return value if isinstance(value, Mapping) else {}

    if event_type == "GradientStatistics":
        return [
            LayerFigures("gradients", {"norm": field("norms")}, {}),
            LayerFigures("weights", {"update_ratio": field("update_ratios")}, {}),
        ]
    kind = fields.get("kind")
    if not isinstance(kind, str):
        return []
    statistics = {name: field(name) for name in _FIELDS["LayersMeasured"]}
    return [LayerFigures(kind, statistics, field("histogram"))]


def without_layers(event_type: str, numbers: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield those numbers of an event that are not by layer: `gradient_statistics/norm`, not `.../norms/0.weight`."""
    if event_type == "LayersMeasured":
        # All of its are.
        return
    for key, value in numbers:
        if key.split("/", 2)[1] not in _FIELDS[event_type]:
            yield key, value


def levels_of(counts: npt.NDArray[np.float64]) -> Levels:
    """Return the shares of bins on a logarithmic scale: 0 is none, 1 a share of 1e-9, 65,535 all elements.

    Args:
        counts: Elements by layer and bin, (layers, bins).
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        counts = np.where(counts > 0, counts, 0.0)
        shares = counts / counts.sum(axis=1, keepdims=True)
        places = 1 - np.log(shares) / math.log(LEAST_SHARE)
        levels = 1 + np.rint(np.clip(places, 0, 1) * 65_534)
    return np.where(shares > 0, levels, 0).astype(np.uint16)


def shares_of(levels: Levels) -> npt.NDArray[np.float64]:
    """Return the shares that levels stand for, to 0.02 %."""
    shares: npt.NDArray[np.float64] = LEAST_SHARE ** (1 - (levels.astype(np.float64) - 1) / 65_534)
    return np.where(levels > 0, shares, 0.0)


class LayerRow:
    """The layers in one step. Its arrays are never changed, but replaced."""

    __slots__ = ("histogram", "revision", "step", "values")

    def __init__(self, step: float, values: Float32s, histogram: Levels) -> None:
        """Keep a row.

        Args:
            step: Optimizer steps done.
            values: (statistics, layers); NaN where nothing was measured, infinite where a measured value is not finite.
            histogram: (layers, bins); a layer without one has zeros.
        """
        self.step = step
        self.values = values
        self.histogram = histogram
        self.revision = 0

    @property
    def has_histograms(self) -> bool:
        return self.histogram.size > 0

    @property
    def bytes(self) -> int:
        return self.values.nbytes + self.histogram.nbytes

    def merge(self, other: "LayerRow") -> None:
        """Take over what another event says about the same step."""
        layers = max(self.values.shape[1], other.values.shape[1])
        values = _wider(self.values, layers)
        added = _wider(other.values, layers)
        self.values = np.where(np.isnan(added), values, added)
        if other.has_histograms:
            self.histogram = other.histogram
        self.revision += 1


class TableFacts(msgspec.Struct, frozen=True):
    """What is kept of a table beside its columns."""

    kind: str
    names: list[str]
    spacing: float
    steps: list[float]
    shapes: list[tuple[int, int]]
    """Layers and bins of each row."""


class LayerTable:
    """What is known of one kind of tensors. Rows ascend by step."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: list[str] = list(names)
        self.rows: list[LayerRow] = []
        self.revision = 0
        """Grows with every change."""
        self.spacing = 0.0
        """Least distance between two rows in steps; 0 while every measurement is kept."""
        self._places: dict[str, int] = {name: place for place, name in enumerate(self.names)}

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def add(self, step: float, figures: LayerFigures) -> None:
        """Add what an event says. One of an earlier step than the newest is left out."""
        if self.rows and step < self.rows[-1].step:
            return
        found = {name: _numbers(values) for name, values in figures.statistics.items() if values}
        counts = _counts(figures.histogram)
        mappings = [*(figures.statistics[name] for name in found), dict.fromkeys(counts)]
        if not any(mappings):
            return
        places = [np.array([self._place(name) for name in each], np.int64) for each in mappings]
        values = np.full((len(STATISTICS), len(self.names)), np.nan, np.float32)
        for statistic, numbers, where in zip(found, found.values(), places, strict=False):
            values[STATISTICS.index(statistic), where[where >= 0]] = numbers[where >= 0]
        histogram: Levels = np.empty((0, 0), np.uint16)
        if counts:
            where = places[-1]
            stacked = np.stack(list(counts.values()))
            histogram = np.zeros((len(self.names), stacked.shape[1]), np.uint16)
            histogram[where[where >= 0]] = levels_of(stacked)[where >= 0]
            with np.errstate(over="ignore"):
                elements = np.where(stacked > 0, stacked, 0).sum(axis=1).astype(np.float32)
            values[STATISTICS.index("elements"), where[where >= 0]] = elements[where >= 0]
        self.revision += 1
        row = LayerRow(step, values, histogram)
        if self.rows and step == self.rows[-1].step:
            self.rows[-1].merge(row)
        else:
            self.rows.append(row)
        self._space()

    def _place(self, name: str) -> int:
        """Return the place of a layer, added if it is new; -1 for one that is left out."""
        place = self._places.get(name, -1)
        # Names that are left out are not remembered: a log may have ever new ones.
        if place < 0 and len(self.names) < MAX_LAYERS and len(name) <= MAX_NAME:
            place = self._places[name] = len(self.names)
            self.names.append(name.encode(errors="backslashreplace").decode())
        return place

    def _space(self) -> None:
        """Drop rows that are not the newest any more and too near to the one before them."""
        if not self.spacing:
            return
        # Rows with and without histograms come from different callbacks, each at its own pace.
        for has_histograms in (False, True):
            places = range(len(self.rows) - 1, -1, -1)
            alike = (each for each in places if self.rows[each].has_histograms == has_histograms)
            newest, middle, before = next(alike, -1), next(alike, -1), next(alike, -1)
            if min(newest, middle, before) < 0:
                continue
            if self.rows[middle].step - self.rows[before].step < self.spacing:
                del self.rows[middle]

    def thin(self) -> bool:
        """Drop every second row; False if there are too few."""
        if len(self.rows) < 8:
            return False
        before = len(self.rows)
        # A little less than twice the usual distance: then it also fits steps that are not quite regular.
        self.spacing = 2 * self.spacing or 1.99 * float(np.median(np.diff([row.step for row in self.rows])))
        while True:
            self._keep_spaced()
            if len(self.rows) < before:
                break
            self.spacing *= 2
        self.revision += 1
        return True

    def _keep_spaced(self) -> None:
        kept: list[LayerRow] = []
        last: dict[bool, float] = {}
        for row in self.rows:
            is_newest = row is self.rows[-1]
            if is_newest or row.step - last.get(row.has_histograms, -math.inf) >= self.spacing:
                last[row.has_histograms] = row.step
                kept.append(row)
        self.rows = kept

    # What viewers get

    def statistics(self) -> list[str]:
        """Return which statistics are known of any layer."""
        known = np.zeros(len(STATISTICS), bool)
        for row in self.rows[-4:]:
            known |= ~np.isnan(row.values).all(axis=1)
        return [name for name, is_known in zip(STATISTICS, known, strict=True) if is_known]

    def overview(self, statistic: str, first: int, end: int) -> Float32s:
        """Return one statistic of all layers, (rows, layers)."""
        found = np.full((end - first, len(self.names)), np.nan, np.float32)
        place = STATISTICS.index(statistic)
        for number, row in enumerate(self.rows[first:end]):
            found[number, : row.values.shape[1]] = row.values[place]
        return found

    def layer(self, place: int, first: int, end: int) -> tuple[Float32s, Levels, list[int]]:
        """Return what is known of one layer.

        Returns:
            (statistics, rows); the histograms (rows, most bins), and the number of bins of each row.
        """
        rows = self.rows[first:end]
        values = np.full((len(STATISTICS), len(rows)), np.nan, np.float32)
        bins = [row.histogram.shape[1] if place < len(row.histogram) else 0 for row in rows]
        histograms = np.zeros((len(rows), max(bins, default=0)), np.uint16)
        for number, row in enumerate(rows):
            if place < row.values.shape[1]:
                values[:, number] = row.values[:, place]
            if bins[number]:
                histograms[number, : bins[number]] = row.histogram[place]
        return values, histograms, bins

    def summary(self) -> Float32s:
        """Return the newest norm, update ratio and share of dead units, and the change, (4, layers).

        The change is how far mean and standard deviation have moved over the last ten measurements, as a share of the
        root mean square of the elements, then or now, whichever is larger. Without a mean it is that of the norm.
        """
        layers = len(self.names)
        found = np.full((len(SUMMARY), layers), np.nan, np.float32)
        for row in reversed(self.rows[-4:]):
            known = row.values[: len(SUMMARY) - 1]
            part = found[:-1, : known.shape[1]]
            part[:] = np.where(np.isnan(part), known, part)
        found[-1] = self._change(layers)
        return found

    def _change(self, layers: int) -> Float32s:
        mean, std, norm = (STATISTICS.index(name) for name in ("mean", "std", "norm"))
        rows = [row for row in self.rows if not np.isnan(row.values[mean]).all()]
        if not rows:
            rows = [row for row in self.rows if not np.isnan(row.values[norm]).all()]
            mean, std = norm, -1
        if len(rows) < 2:
            return np.full(layers, np.nan, np.float32)
        now, then = (
            _wider(row.values, layers) for row in (rows[-1], rows[max(0, len(rows) - 1 - CHANGE_OVER)])
        )
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            zero = np.zeros(layers, np.float32)
            stds = (zero, zero) if std < 0 else (now[std], then[std])
            moved = np.hypot(now[mean] - then[mean], stds[0] - stds[1])
            size = np.maximum(np.hypot(now[mean], stds[0]), np.hypot(then[mean], stds[1]))
            change = np.where(moved == 0, zero, moved / size)
        # What is not finite has changed most.
        known = ~np.isnan(now[mean]) & ~np.isnan(then[mean])
        return np.where(known & np.isnan(change), np.float32(np.inf), change).astype(np.float32)


class LayerHistory:
    """The tables of a run, by kind of tensor."""

    def __init__(self, limit: int = LAYER_BYTES) -> None:
        self.tables: dict[str, LayerTable] = {}
        self._limit = limit
        self._bytes = 0

    @property
    def count(self) -> int:
        """Number of layers, of the kind that has most."""
        return max((len(table.names) for table in self.tables.values()), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(table.bytes for table in self.tables.values())

    def add(self, step: float, figures: Sequence[LayerFigures]) -> None:
        """Record what an event says about layers."""
        for each in figures:
            table = self.tables.get(each.kind)
            if table is None:
                if len(self.tables) >= MAX_KINDS or not 0 < len(each.kind) <= MAX_NAME:
                    continue
                table = LayerTable()
            table.add(step, each)
            if table.rows:
                self.tables[each.kind] = table
            if len(table.rows) > MAX_ROWS:
                table.thin()
        while self.bytes > self._limit:
            if not any([table.thin() for table in self.tables.values()]):
                break

    # Keeping it in a file

    def facts(self) -> list[TableFacts]:
        return [
            TableFacts(
                kind,
                table.names,
                table.spacing,
                [row.step for row in table.rows],
                [(row.values.shape[1], row.histogram.shape[1]) for row in table.rows],
            )
            for kind, table in self.tables.items()
        ]

    def columns(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the columns of each table: its values, and its histograms."""
        for table in self.tables.values():
            yield np.concatenate([row.values.ravel() for row in table.rows])
            yield np.concatenate([row.histogram.ravel() for row in table.rows])

    @classmethod
    def of(cls, facts: Sequence[TableFacts], columns: Iterator[npt.NDArray[Any]]) -> "LayerHistory":
        """Make a history from what `facts` and `columns` returned.

        Raises:
            ValueError: They do not fit together.
        """
        history = cls()
        for each in facts:
            table = history.tables[each.kind] = LayerTable(each.names)
            table.spacing = each.spacing
            values, histograms = next(columns), next(columns)
            for step, (layers, bins) in zip(each.steps, each.shapes, strict=True):
                count = len(STATISTICS) * layers
                levels = layers * bins
                table.rows.append(
                    LayerRow(
                        step,
                        values[:count].reshape(len(STATISTICS), layers),
                        histograms[:levels].reshape(layers if bins else 0, bins),
                    )
                )
                values, histograms = values[count:], histograms[levels:]
        return history


def _wider(values: Float32s, layers: int) -> Float32s:
    """Return values with columns of NaN for layers that came later."""
    missing = layers - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=np.nan) if missing > 0 else values


def _numbers(values: Mapping[str, Any]) -> Float32s:
    """Return a number for each layer: NaN becomes infinite, what is no number NaN."""
    if set(map(type, values.values())) == {float}:
        found = np.array(list(values.values()), np.float64)
        found[np.isnan(found)] = math.inf
    else:
        found = np.array([_number(each) for each in values.values()], np.float64)
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def _number(value: Any) -> float:
    if isinstance(value, float):
        return math.inf if value != value else value
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if value in ("NaN", "Infinity"):
        return math.inf
    return -math.inf if value == "-Infinity" else math.nan


def _counts(histograms: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the counts of each layer, (bins,); those with another number of bins than the first are left out."""
    try:
        # All at once, as they usually are
        stacked = np.array(list(histograms.values()), np.float64)
    except (TypeError, ValueError, OverflowError):
        stacked = np.empty(0)
    if stacked.ndim == 2 and 0 < stacked.shape[1] <= MAX_BINS and np.isfinite(stacked).all():
        return dict(zip(histograms, stacked, strict=True))
    counts: dict[str, npt.NDArray[np.float64]] = {}
    bins = 0
    for name, values in histograms.items():
        if not isinstance(values, list | tuple) or not 0 < len(values) <= MAX_BINS:
            continue
        try:
            found = np.asarray(values, np.float64)
        except (TypeError, ValueError, OverflowError):
            continue
        bins = bins or found.size
        if found.shape == (bins,) and np.isfinite(found).all():
            counts[name] = found
    return counts
