"""ProgressBar: how far a run is, on a terminal; a plain line now and then elsewhere."""

import contextlib
import io
import os
import sys
import time
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Run,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)

REDRAW_INTERVAL: Final = 0.1
"""Seconds between two redraws at least: ten a second look smooth."""
REDRAW_SHARE: Final = 100
"""A redraw's CPU time is waited for this many times before the next one: at most 1 % of the interpreter."""
LINE_INTERVAL: Final = 10.0
"""Seconds between two plain lines where there is no terminal."""


class ProgressBar(Callback):
    """Shows epoch, step, loss, learning rate, speed and time left, drawn from the newest step only.

    Training never waits for it, and neither stdout nor stderr is redirected: it draws through a stream of
    its own, because a worker process forked in the middle of a redraw would otherwise inherit a held lock.
    """

    buffer = 1  # the newest step is all it needs

    def __init__(self, *, metrics: tuple[str, ...] | list[str] = (), file: TextIO | None = None) -> None:
        """Choose what to show beside the standard values.

        Args:
            metrics: Further metrics by key, like `"val_accuracy"`, as they become known.
            file: Where to draw; standard error by default.
        """
        if isinstance(metrics, str):
            raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
        self.metrics = tuple(metrics)
        self._given_file = file
        self.reset()

    def reset(self) -> None:
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        self._start: TrainStart | None = None
        self._values: dict[str, float] = {}
        self._doing = ""
        self._drawn_at = -LINE_INTERVAL
        self._pause = REDRAW_INTERVAL
        self._speed = 0.0
        self._speed_from: tuple[int, float] | None = None
        self._epoch = self._step = 0

    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self._start = event
        self._file = self._given_file or _own_stderr()
        console = Console(file=self._file)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _StatusColumn(self),
                console=console,
                auto_refresh=False,  # no thread that draws behind our back
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("", total=self._total_steps())
            self._progress.start()
        else:
            self._drawn_at = time.monotonic()  # the first line after an interval, or at the first milestone

    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        self._epoch = event.epoch

    def on_step_end(self, event: StepEnd, run: Run) -> None:
        self._step, self._epoch = event.step, event.epoch
        self._values.update(loss=event.loss, lr=event.lr)
        self._measure_speed(event)
        self._draw()

    def on_validation_start(self, event: ValidationStart, run: Run) -> None:
        self._doing = "validating"
        self._draw()

    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self._doing = ""
        self._values.update(event.metrics)
        self._speed_from = None  # a validation is no slow step
        self._draw()

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._values.update(event.metrics)
        self._draw()

    def on_state_changed(self, event: StateChanged, run: Run) -> None:
        self._doing = "" if event.state == "running" else event.state
        self._speed_from = None
        self._draw(now=True)

    def on_train_end(self, event: TrainEnd, run: Run) -> None:
        self._doing = event.status
        self._values.update(event.metrics)
        self._draw(now=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file not in (None, self._given_file, sys.stderr):
            with contextlib.suppress(OSError):
                self._file.close()

    def status(self) -> str:
        """Return the values as one line."""
        start = self._start
        parts = []
        if start is not None:
            total = self._total_steps()
            parts.append(f"step {self._step}" + (f"/{total}" if total else ""))
        shown = dict.fromkeys(("loss", "val_loss", *self.metrics, "lr"))
        parts += [f"{name} {self._values[name]:.4g}" for name in shown if name in self._values]
        if self._speed:
            parts.append(f"{self._speed:.3g} steps/s")
            left = self._seconds_left()
            if left is not None and not self._doing:
                parts.append(f"{_duration(left)} left")
        if self._doing:
            parts.append(self._doing)
        return "  ".join(parts)

    def _total_steps(self) -> int | None:
        start = self._start
        if start is None:
            return None
        by_epochs = None
        if start.epochs is not None and start.steps_per_epoch is not None:
            by_epochs = start.epochs * start.steps_per_epoch
        totals = [total for total in (start.max_steps, by_epochs) if total is not None]
        return min(totals, default=None)

    def _seconds_left(self) -> float | None:
        total = self._total_steps()
        return None if total is None else max(0, total - self._step) / self._speed

    def _describe_epoch(self) -> str:
        epochs = None if self._start is None else self._start.epochs
        return f"epoch {self._epoch + 1}" + (f"/{epochs}" if epochs else "")

    def _measure_speed(self, event: StepEnd) -> None:
        if self._speed_from is None:
            self._speed_from = event.step, event.time
            return
        step, since = self._speed_from
        if event.time - since >= 0.5:  # long enough for a steady figure
            speed = (event.step - step) / (event.time - since)
            self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
            self._speed_from = event.step, event.time

    def _draw(self, now: bool = False) -> None:
        interval = self._pause if self._progress is not None else LINE_INTERVAL
        if not now and time.monotonic() - self._drawn_at < interval:
            return
        cpu = time.thread_time()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._step, description=self._describe_epoch())
            self._progress.refresh()
        elif self._file is not None:
            self._file.write(f"{self._describe_epoch()}  {self.status()}\n")
            self._file.flush()
        self._pause = max(REDRAW_INTERVAL, REDRAW_SHARE * (time.thread_time() - cpu))
        self._drawn_at = time.monotonic()


class _StatusColumn(ProgressColumn):
    """The values beside the bar."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(self._bar.status(), no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    """Format seconds like a clock: `1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _own_stderr() -> TextIO:
    """Return a stream to standard error that shares no lock with `sys.stderr`."""
    try:
        return open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    except (AttributeError, OSError, io.UnsupportedOperation):  # captured, or none at all
        return sys.stderr
