"""MetricLogger: the numbers of a run in `metrics.csv`, for a spreadsheet or pandas."""

import csv
import io
import os
from typing import Any, Final

from offloop.engine import Callback, EpochEnd, Run, StepEnd, TrainStart, ValidationEnd

FILE_NAME: Final = "metrics.csv"
EVERY_SECONDS: Final = 1.0
"""Default cadence: a row a second makes 36,000 rows in ten hours, and a short run shows its every epoch."""

_POSITION: Final = ("time", "attempt", "epoch", "step", "batch")


class MetricLogger(Callback):
    """Writes a row for steps at a cadence, and for each validation and epoch, to `metrics.csv`.

    Columns: time (Unix seconds), attempt, epoch, step, batch, then each metric when it first appears. A row of
    a step has `loss`, `lr`, `grad_norm` and what the step logged; rows of validations and epochs have
    their metrics. The last step of each epoch always has a row, so that short runs never look empty. Each
    row is with the operating system before the next one is written: a killed run loses none. A resumed attempt
    goes on in the same file, after cutting what came after the checkpoint that it continues.

    Runs in a thread of its own; training never waits for it.
    """

    needs_run_dir = True

    def __init__(self, *, every_seconds: float | None = None, every_n_steps: int | None = None) -> None:
        """Choose the cadence of step rows: by time (a second by default), or by steps.

        Args:
            every_seconds: Seconds between two step rows, above 0. Which steps get a row depends on the machine.
            every_n_steps: Steps between two step rows, at least 1: the same rows on every machine.
        """
        if every_seconds is not None and every_n_steps is not None:
            raise ValueError("give every_seconds or every_n_steps, not both")
        if every_seconds is not None and not every_seconds > 0:
            raise ValueError(f"every_seconds must be above 0, got {every_seconds}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.every_seconds = EVERY_SECONDS if every_seconds is None else every_seconds
        self.reset()

    def reset(self) -> None:
        self._file: io.TextIOWrapper | None = None
        self._columns: list[str] = list(_POSITION)
        self._attempt = 0
        self._written_at = 0.0
        self._unwritten: StepEnd | None = None  # the latest step, if it has no row yet

    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self._attempt = event.attempt
        self._path = run.dir / FILE_NAME
        self._rewrite(self._rows_until(event.resumed_at) if event.attempt else [])

    def on_step_end(self, event: StepEnd, run: Run) -> None:
        if self.every_n_steps is not None:
            due = event.step % self.every_n_steps == 0
        else:
            due = event.time - self._written_at >= self.every_seconds
        if due:
            self._write_step(event)
        else:
            self._unwritten = event

    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self._write_latest_step()
        self._write(event, dict(event.metrics))

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._write_latest_step()
        self._write(event, dict(event.metrics))

    def close(self) -> None:
        if self._file is not None:
            self._write_latest_step()
            self._file.close()

    def _write_latest_step(self) -> None:
        if self._unwritten is not None:
            self._write_step(self._unwritten)

    def _write_step(self, event: StepEnd) -> None:
        self._written_at = event.time
        self._unwritten = None
        values: dict[str, Any] = {"loss": event.loss, "lr": event.lr}
        if event.grad_norm is not None:
            values["grad_norm"] = event.grad_norm
        self._write(event, {**values, **event.metrics})

    def _write(self, event: StepEnd | ValidationEnd | EpochEnd, values: dict[str, Any]) -> None:
        assert self._file is not None
        new = [name for name in values if name not in self._columns]
        if new:
            self._add_columns(new)
        position = {name: getattr(event, name) for name in _POSITION if name != "attempt"}
        row = {**position, "attempt": self._attempt, **values}
        csv.writer(self._file).writerow([row.get(name, "") for name in self._columns])
        self._file.flush()

    def _rows_until(self, moment: float | None) -> list[list[str]]:
        """Return what an earlier attempt wrote up to the checkpoint that is continued, and take its columns over."""
        if moment is None or not self._path.exists():
            return []
        with open(self._path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        self._columns = header
        return [row for row in rows if len(row) == len(header) and float(row[0]) <= moment]

    def _add_columns(self, names: list[str]) -> None:
        """Rewrite the file with a wider header: rare, as all columns show within the first epochs."""
        assert self._file is not None
        self._file.close()
        with open(self._path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        self._columns += names
        self._rewrite(rows)

    def _rewrite(self, rows: list[list[str]]) -> None:
        """Write the file anew with the columns of now, whole or not at all, and go on after its end."""
        temporary = self._path.with_suffix(".csv.new")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            writer.writerows([*row, *[""] * (len(self._columns) - len(row))] for row in rows)
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", newline="", encoding="utf-8")
