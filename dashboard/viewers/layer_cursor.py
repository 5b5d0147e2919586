"""LayerCursor: what one viewer has received of a run's layers, and what it is due next.

A frame is made from the tables of the run when there is credit for it. The viewer has the rows that it was sent; those
that have changed since, and all after them, are sent again. Rows change when they are thinned out, and the newest one
when a second callback measures the same step.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from offloop.dashboard.curves.layer_frame import LayerFrame, LayerHeader, encode_layers
from offloop.dashboard.curves.layer_history import STATISTICS, LayerRow, LayerTable
from offloop.dashboard.protocol.from_viewer import LayersQuery
from offloop.dashboard.protocol.limits import MAX_CHART_FRAME
from offloop.dashboard.runs.live_run import LiveRun

KINDS: Final = ("weights", "gradients", "activations")
"""Kinds of tensors in the order in which they are shown, if nobody has chosen one."""
_STATISTICS_BYTES: Final = 8 + 4 * len(STATISTICS) + 2


class _Sent:
    """Rows that a viewer has."""

    def __init__(self) -> None:
        self.rows: list[tuple[LayerRow, int]] = []
        self.layers = 0
        # Revision of the table whose rows are all sent.
        self.revision = -1

    def first(self, table: LayerTable) -> int:
        """Return the number of the first row that is to be sent."""
        if self.layers != len(table.names):
            return 0
        for number, (row, (sent, revision)) in enumerate(zip(table.rows, self.rows, strict=False)):
            if row is not sent or row.revision != revision:
                return number
        return min(len(table.rows), len(self.rows))

    def note(self, table: LayerTable, first: int, end: int) -> None:
        self.layers = len(table.names)
        self.rows[first:] = [(row, row.revision) for row in table.rows[first:end]]
        if end == len(table.rows):
            self.revision = table.revision


class LayerCursor:
    """A viewer's place in the layers of one run. Event loop of the dashboard only."""

    def __init__(self, live: LiveRun) -> None:
        self._live = live
        # The rate limit allows a frame with new measurements.
        self.is_due = True
        # What is looked at; None for nothing.
        self._query: LayersQuery | None = None
        self._kind = ""
        self._all = _Sent()
        self._one = _Sent()

    def ask(self, query: LayersQuery) -> None:
        """Set what is looked at."""
        before, self._query = self._query, query if query.on else None
        self.is_due = True
        if self._query is None or before is None or before.kind != query.kind:
            self._all, self._one, self._kind = _Sent(), _Sent(), ""
            return
        if before.statistic != query.statistic:
            self._all = _Sent()
        if before.layer != query.layer:
            self._one = _Sent()

    def wants_frame(self, *, at_once: bool = False) -> bool:
        """Return whether there is data for a frame that may go now; `at_once`: whatever the rate limit says."""
        return self._query is not None and self._is_behind and (self.is_due or at_once or self._live.is_over)

    @property
    def _table(self) -> LayerTable | None:
        tables, query = self._live.layers.tables, self._query
        if query is None or not tables:
            return None
        kind = query.kind if query.kind in tables else min(tables, key=_rank)
        if kind != self._kind:
            # The kind that was asked for has come.
            self._kind, self._all, self._one = kind, _Sent(), _Sent()
        return tables[kind]

    @property
    def _is_behind(self) -> bool:
        table = self._table
        if table is None or self._query is None:
            return False
        if self._all.revision != table.revision:
            return True
        return self._one.revision != table.revision and self._query.layer in (None, *table.names)

    def next_frame(self) -> bytes | None:
        """Make the next frame; None without data for one."""
        table = self._table
        if table is None or not self._is_behind:
            return None
        frame = self._of_one(table) if self._all.revision == table.revision else self._of_all(table)
        self.is_due = self._is_behind
        return encode_layers(frame)

    def _of_all(self, table: LayerTable) -> LayerFrame:
        assert self._query is not None
        first = self._all.first(table)
        # At least one row, however many layers there are.
        end = min(len(table.rows), first + max(1, MAX_CHART_FRAME // (8 + 4 * len(table.names))))
        self._all.note(table, first, end)
        header = LayerHeader(
            run=self._live.key,
            kind=self._kind,
            kinds=list(self._live.layers.tables),
            statistic=self._query.statistic,
            statistics=table.statistics(),
            names=table.names if first == 0 else [],
            layers=len(table.names),
            first=first,
            rows=end - first,
            spacing=table.spacing,
            more=end < len(table.rows),
        )
        values = table.overview(self._query.statistic, first, end)
        return LayerFrame(
            header=header, steps=_steps(table, first, end), values=values, summary=table.summary()
        )

    def _of_one(self, table: LayerTable) -> LayerFrame:
        assert self._query is not None
        layer = table.names[0] if self._query.layer is None else self._query.layer
        first = self._one.first(table)
        bins = max(row.histogram.shape[1] for row in table.rows)
        end = min(len(table.rows), first + max(1, MAX_CHART_FRAME // (_STATISTICS_BYTES + 2 * bins)))
        self._one.note(table, first, end)
        values, histogram, counts = table.layer(table.names.index(layer), first, end)
        header = LayerHeader(
            run=self._live.key,
            kind=self._kind,
            layer=layer,
            layers=len(table.names),
            first=first,
            rows=end - first,
            bins=histogram.shape[1],
            spacing=table.spacing,
            more=end < len(table.rows),
        )
        return LayerFrame(
            header=header,
            steps=_steps(table, first, end),
            values=values,
            bins=np.array(counts, np.uint16),
            histogram=histogram,
        )


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _steps(table: LayerTable, first: int, end: int) -> npt.NDArray[np.float64]:
    return np.array([row.step for row in table.rows[first:end]], np.float64)
