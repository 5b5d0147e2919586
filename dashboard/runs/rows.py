"""RunList: the rows of the list of runs, and what each viewer has received of them.

A viewer is a cursor into the list, as it is into a run's history: every change of a row gets the next number, and a
message is made from all rows that have changed since the number that the viewer was sent last. A row that changes
twice before a slow viewer takes it is sent once.
"""

from itertools import takewhile
from typing import Final

from offloop.dashboard.masking import masked
from offloop.dashboard.protocol.encoding import encode_message, number
from offloop.dashboard.protocol.from_server import Figure, Rows, RunRow
from offloop.dashboard.runs.live_run import LiveRun
from offloop.engine import RunLabels, RunRecord
from offloop.engine.visible_text import visible

ROWS_AT_ONCE: Final = 200
"""Most rows in a message."""
MAX_FIGURES: Final = 500
"""Most metrics of a row; those that came first are kept, and the monitored one."""
SPARKLINE_POINTS: Final = 32


class RunList:
    """Rows of runs by key, and the order in which they changed. Event loop of the dashboard only."""

    def __init__(self) -> None:
        self.rows: dict[str, RunRow] = {}
        # False until all directories were looked at: further rows follow.
        self._is_whole = True
        # Number of the last change of each key, in ascending order; also of keys that are gone.
        self._changes: dict[str, int] = {}
        self._last = 0
        # By the number that a viewer has: the message for it, and the number it has then.
        self._messages: dict[int, tuple[bytes, int]] = {}

    @property
    def last(self) -> int:
        """Number of the newest change."""
        return self._last

    @property
    def is_whole(self) -> bool:
        """Whether all runs are in the list that there were when it was asked for."""
        return self._is_whole

    @is_whole.setter
    def is_whole(self, is_whole: bool) -> None:
        self._is_whole = is_whole
        self._messages.clear()

    def put(self, row: RunRow) -> None:
        """Add a row or replace the one with its key; one that is equal changes nothing."""
        if self.rows.get(row.key) != row:
            self.rows[row.key] = row
            self._changed(row.key)

    def remove(self, key: str) -> None:
        """Remove a row, if there is one with this key."""
        if self.rows.pop(key, None) is not None:
            self._changed(key)

    def _changed(self, key: str) -> None:
        self._last += 1
        self._changes.pop(key, None)
        self._changes[key] = self._last
        self._messages.clear()

    def after(self, change: int) -> tuple[bytes, int]:
        """Return the message with the next rows after a change, and the number of the last change in it.

        The message may have no rows: the list is empty, or has not changed.
        """
        if change not in self._messages:
            newer = list(takewhile(lambda each: each[1] > change, reversed(self._changes.items())))
            taken = newer[-ROWS_AT_ONCE:][::-1]
            message = Rows(
                rows=[self.rows[key] for key, _ in taken if key in self.rows],
                removed=[key for key, _ in taken if key not in self.rows],
                more=len(newer) > len(taken) or not self._is_whole,
                total=len(self.rows),
            )
            self._messages[change] = encode_message(message), taken[-1][1] if taken else change
        return self._messages[change]


class RowCursor:
    """What one viewer has received of the list."""

    def __init__(self, runs: RunList) -> None:
        self._runs = runs
        self._sent = 0
        # The first message is due even if the list is empty, and one that says that it is whole.
        self._is_due = True
        self._is_told_whole = False

    def allow(self) -> None:
        """Allow the viewer what has changed."""
        self._is_due = (
            self._is_due or self._sent < self._runs.last or self._runs.is_whole > self._is_told_whole
        )

    def next(self) -> bytes | None:
        """Return the next message for the viewer; None if it has all that it may have now."""
        if not self._is_due:
            return None
        message, self._sent = self._runs.after(self._sent)
        self._is_due = self._sent < self._runs.last
        self._is_told_whole = self._runs.is_whole
        return message


def row_of(live: LiveRun, record: RunRecord | None = None) -> RunRow:
    """Return the row of a run of this process as it stands now, with what its directory says about it."""
    labels = RunLabels() if record is None else record.labels
    info = live.info
    status = live.status(viewers=0, is_control=False)
    last = live.milestones.last
    times = [live.started, live.history.axis.last("time"), 0.0 if last is None else last.time]
    return RunRow(
        key=live.key,
        id=live.name,
        name=labels.name or live.name,
        state=status.state,
        why=status.error or status.reason,
        live=not live.is_over,
        attempt=info.attempt,
        host=info.host,
        directory=info.directory,
        started=info.started,
        heard=max(time for time in times if time == time),
        seconds=status.seconds,
        step=status.step,
        epoch=status.epoch,
        device=info.device,
        progress=status.progress,
        monitor=info.monitor,
        figures=_figures_of(live),
        metrics=len(live.series),
        hyperparameters=info.hyperparameters,
        tags=list(labels.tags),
        note=labels.note,
        archived=labels.archived,
        version=labels.version,
        sparkline=_sparkline_of(live),
    )


def row_of_record(record: RunRecord, page: str | None) -> RunRow:
    """Return the row of a run directory. Any thread.

    Args:
        record: What the directory says.
        page: Address of the run's own page, if it has one.
    """
    names = list(record.metrics)[:MAX_FIGURES]
    if record.monitor in record.metrics and record.monitor not in names:
        names.append(record.monitor)
    labels = record.labels
    return RunRow(
        key=record.key,
        id=visible(record.id),
        name=record.name,
        state=record.state,  # type: ignore[arg-type]  # a str that is a `State`
        why=record.why,
        page=page,
        attempt=record.attempt,
        host=record.host,
        directory=record.directory,
        started=record.started,
        heard=record.heard,
        seconds=record.seconds,
        step=record.step,
        epoch=record.epoch,
        device=record.device,
        progress=record.progress,
        monitor=record.monitor,
        figures={
            name: Figure(number(each.last), each.best) for name in names if (each := record.metrics[name])
        },
        metrics=len(record.metrics),
        hyperparameters=masked(record.hyperparameters),
        tags=list(labels.tags),
        note=labels.note,
        archived=labels.archived,
        version=labels.version,
        sparkline=list(record.sparkline),
    )


def _figures_of(live: LiveRun) -> dict[str, Figure]:
    monitor = live.info.monitor
    figures: dict[str, Figure] = {}
    for series in live.series:
        if len(figures) < MAX_FIGURES or series.key == monitor:
            curve = live.history.curves[series.id]
            best = {"min": curve.least, "max": curve.greatest}.get(series.better or "")
            figures[series.key] = Figure(number(curve.last), None if best is None else best[0])
    return figures


def _sparkline_of(live: LiveRun) -> list[float]:
    """Return a few finite values of the monitored metric; of the loss until there are two of it."""
    for name in (live.info.monitor, "loss"):
        for series in live.series:
            curve = live.history.curves[series.id]
            if series.key == name and curve.points > 1:
                _, values, _ = curve.view(0, live.history.axis.rows, SPARKLINE_POINTS)
                return [float(f"{value:.4g}") for value in values if value == value]
    return []
