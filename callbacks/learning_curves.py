"""LearningCurves: plots of a run's metrics, drawn at its end, every n epochs, and on request."""

import contextlib
import importlib.util
import math
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    Evaluated,
    Event,
    RunHandle,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    checks,
    first_use,
    read_attempts,
    read_events,
)
from offloop.engine.argument_hints import explains_arguments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS: Final = 1000
"""Points per curve: more than its width in pixels."""
MARKED_POINTS: Final = 60
"""Curves with at most so many points mark each with a dot."""
FORMATS: Final = (".png", ".svg", ".pdf")

# Blue, orange and green, which colour-blind people can tell apart
_TRAIN, _VAL, _EVALUATED, _FAINT = "#2563eb", "#ea580c", "#009e73", "#93b4f4"
# Width and height in inches
_PANEL = (5.2, 3.1)
# matplotlib's font cache and parsers are not thread-safe.
_drawing = threading.Lock()


Point = tuple[float, float]
Points = tuple[list[float], list[float]]


class Curve:
    """A series of points in bounded memory: at `max_points` neighbours are merged into their mean."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self._max_points = max_points
        # Values per point
        self._stride = 1
        # One thread adds, any thread reads: a list is copied in one go, a tuple is replaced whole.
        self._points: list[Point] = []
        # Of the point that is incomplete: number of values, sums of steps and values
        self._open = (0, 0.0, 0.0)

    def add(self, step: int, value: float) -> None:
        """Add a value. NaN is drawn as a gap. One thread at a time."""
        count, steps, values = self._open
        count, steps, values = count + 1, steps + step, values + value
        if count < self._stride:
            self._open = (count, steps, values)
            return
        # In this order a thread that reads meanwhile misses a point rather than seeing it twice.
        self._open = (0, 0.0, 0.0)
        self._points.append((steps / count, values / count))
        if len(self._points) >= self._max_points:
            starts = range(0, len(self._points) - 1, 2)
            self._points = [_mean(self._points[start : start + 2]) for start in starts]
            self._stride *= 2

    def points(self) -> Points:
        """Return steps and values, the latest incomplete point included. Any thread."""
        points = list(self._points)
        count, steps, values = self._open
        if count:
            points.append((steps / count, values / count))
        return [step for step, _ in points], [value for _, value in points]


class LearningCurves(Callback):
    """Draws loss, metrics and learning rate over steps into a file in the run's directory, without a display.

    Each metric has one panel, for training and validation. A resumed attempt continues the curves of earlier attempts.
    `draw` draws at any other moment, from any thread; `read` loads the curves of a finished run. Training never waits
    for it.

    Drawing computes in Python for some tenths of a second, which slows down steps in the same process. So curves that
    are drawn during training (`every_n_epochs`) are drawn in a process of their own; those that are drawn only at the
    end, after the last step, are drawn here. `runs_in` chooses otherwise.

    Requires matplotlib: `pip install 'offloop[plot]'`.
    """

    needs_run_dir = True

    @explains_arguments()
    def __init__(
        self,
        *,
        metrics: Sequence[str] | None = None,
        file: str = "curves.png",
        max_points: int = MAX_POINTS,
        every_n_epochs: int | None = None,
        runs_in: Literal["here", "process"] | None = None,
    ) -> None:
        """Choose what to draw and where.

        Args:
            metrics: Names without `train_` and `val_`, like `"loss"`, `"accuracy"`, `"lr"`. None: all.
            file: Name of the file in the run's directory, ending in .png, .svg or .pdf.
            max_points: Points per curve, at least 16; longer curves are averaged.
            every_n_epochs: Draw after every n-th epoch, too, at least 1. An epoch that ends while earlier curves are
                still being drawn is left to the next drawing. None: only at the end of the run.
            runs_in: `"here"` draws in this process, `"process"` in one of its own. None: `"process"` with
                `every_n_epochs`, else `"here"`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ConfigError: A value is out of range.
        """
        if isinstance(metrics, str):
            raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
        if Path(file).suffix not in FORMATS or Path(file).name != file:
            raise ConfigError(f"file must be a name that ends in {', '.join(FORMATS)}; got {file!r}")
        checks.whole_number("max_points", max_points, at_least=16)
        checks.whole_number("every_n_epochs", every_n_epochs, optional=True)
        checks.choice("runs_in", runs_in, (None, "here", "process"))
        _expect_matplotlib()
        self.every_n_epochs = every_n_epochs
        if runs_in is not None or every_n_epochs is not None:
            self.runs_in = runs_in or "process"
        self.metrics = None if metrics is None else tuple(metrics)
        self.file = file
        self.max_points = max_points
        self.reset()

    def reset(self) -> None:
        # The callback's thread writes these, any thread reads them to draw.
        self._curves: dict[str, Curve] = {}  # by key: "loss" of steps, train_..., val_..., "lr"
        self._title = ""
        self._dir: Path | None = None

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        self._title, self._dir = run.id, run.dir
        if event.attempt:
            assert run.dir is not None  # needs_run_dir
            with contextlib.suppress(FileNotFoundError):
                # The log was cut back to the checkpoint before this event was published.
                self._note_all(each for of, each in read_attempts(run.dir) if of < event.attempt)

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self._note(event)

    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        self._note(event)

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self._note(event)
        every = self.every_n_epochs
        if every is None or (event.epoch + 1) % every:
            return
        # If the next drawing is due already, it shows this epoch, too: slow drawing does not pile up.
        is_outdated = run.epoch > event.epoch + every
        if self._curves and not is_outdated:
            self.draw()

    def on_evaluated(self, event: Evaluated, run: RunHandle) -> None:
        self._note(event)

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self._title = f"{run.id}: {event.status}"
        if self._curves:
            self.draw()

    @classmethod
    def read(cls, run_dir: "Path | str", **options: Any) -> "LearningCurves":
        """Return the curves of a run from its `events.jsonl`, to `draw` them. Blocks on files."""
        curves = cls(**options)
        curves._dir = Path(run_dir).expanduser().absolute()
        curves._title = curves._dir.name
        curves._note_all(read_events(run_dir))
        return curves

    def draw(self, path: "Path | str | None" = None) -> Path:
        """Draw the curves so far and return the file. Any thread; blocks for a tenth of a second or more.

        The file is replaced whole, so a reader sees the old or the new one.

        Args:
            path: The file; its ending determines the format. None: the one in the run's directory.

        Raises:
            RuntimeError: There is nothing to draw.
        """
        # A copy, which is atomic
        curves = {key: curve.points() for key, curve in list(self._curves.items())}
        if not curves and self.runs_in == "process":
            raise RuntimeError(
                "the curves are in the process that draws them: call LearningCurves.read(run_dir).draw(path), "
                'or give runs_in="here"'
            )
        if path is None:
            if self._dir is None:
                raise RuntimeError("there is no run to draw: give path=, or draw during or after a run")
            path = self._dir / self.file
        path = Path(path).expanduser()
        if path.suffix not in FORMATS:
            raise ConfigError(f"path must end in {', '.join(FORMATS)}; got {str(path)!r}")
        if not curves:
            raise RuntimeError("there is nothing to draw before the first step")
        temporary = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}{path.suffix}")
        # A link of that name would be followed.
        temporary.unlink(missing_ok=True)
        try:
            with _drawing:
                _figure(curves, self._title).savefig(temporary, dpi=110)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _note_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._note(event)

    def _note(self, event: Event) -> None:
        step = event.step
        if isinstance(event, StepEnd):
            values = {"lr": event.lr, **event.metrics}
            if event.loss is not None:
                values["loss"] = event.loss
        elif isinstance(event, ValidationEnd):
            values = dict(event.metrics)
        elif isinstance(event, EpochEnd):
            values = {key: value for key, value in event.metrics.items() if key.startswith("train_")}
        elif isinstance(event, Evaluated):
            values, step = dict(event.metrics), event.of_step
        else:
            return
        for key, value in values.items():
            if self.metrics is None or _name(key) in self.metrics:
                if key not in self._curves:
                    self._curves[key] = Curve(self.max_points)
                self._curves[key].add(step, value)


def _mean(points: Sequence[Point]) -> Point:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _name(key: str) -> str:
    """Return the metric of a curve: `loss` for `loss`, `train_loss`, `val_loss` and `eval_loss`."""
    return re.sub("^(train|val|eval)_", "", key)


def _expect_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "LearningCurves draws with matplotlib, which is not installed: pip install 'offloop[plot]'",
            name="matplotlib",
        )


def _figure(curves: dict[str, Points], title: str) -> "Figure":
    """Draw a panel for each metric: loss first, learning rate last."""
    _expect_matplotlib()
    with first_use("matplotlib"):
        # Not through pyplot, which keeps every figure in a global table and may open windows.
        import matplotlib.backends.backend_agg  # noqa: F401 - what savefig() loads
        from matplotlib.figure import Figure

    names = list(dict.fromkeys(_name(key) for key in curves))
    names.sort(key=lambda name: (name == "lr") - (name == "loss"))
    columns = min(len(names), 2)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 0.35), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for place, name in enumerate(names, 1):
        _draw_panel(figure.add_subplot(rows, columns, place), name, curves)
    return figure


def _draw_panel(panel: "Axes", name: str, curves: dict[str, Points]) -> None:
    panel.set_title(name, fontsize=10, loc="left", parse_math=False)
    panel.grid(True, color="#e5e7eb", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    panel.set_xlabel("step", fontsize=8)
    of_steps = curves.get(name)
    others = [
        (curves[prefix + name], color, label)
        for prefix, color, label in (
            ("train_", _TRAIN, "train"),
            ("val_", _VAL, "validation"),
            ("eval_", _EVALUATED, "evaluation"),
        )
        if prefix + name in curves
    ]
    if of_steps is not None:
        is_alone = not others
        label = name if is_alone else "steps"
        panel.plot(*of_steps, color=_TRAIN if is_alone else _FAINT, linewidth=1.0, label=label)
    for points, color, label in others:
        # More dots would look like a thick line.
        marker = "o" if len(points[0]) <= MARKED_POINTS else ""
        panel.plot(*points, color=color, linewidth=1.6, marker=marker, markersize=2.5, label=label)
    if others:
        panel.legend(fontsize=8, frameon=False)
