"""callbacks/learning_curves.py: the picture is there, holds what the run said, and costs bounded memory."""

import ast
import builtins
import importlib.util
import math
import os
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from interruptions import StopAfter

from offloop.callbacks import ModelCheckpoint
from offloop.callbacks.learning_curves import Curve, LearningCurves
from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    Event,
    Metrics,
    Run,
    StepEnd,
    StepPoint,
    ValidationEnd,
    in_step,
)
from offloop.engine.testing import drive, tiny_batches, tiny_trainer

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def train(tmp_path: Path, *callbacks: Callback, name: str = "run", **arguments: Any) -> Any:
    arguments.setdefault("epochs", 2)
    return tiny_trainer(run_dir=str(tmp_path), run_name=name).train(
        tiny_batches(3), tiny_batches(1, seed=1), callbacks=callbacks, **arguments
    )


def texts_of(svg: Path) -> str:
    """Return the comments in which matplotlib's SVG keeps each text that it draws as outlines."""
    ElementTree.parse(svg)  # it is well-formed
    return svg.read_text(encoding="utf-8")


def test_picture_is_there_at_the_end(tmp_path: Path) -> None:
    result = train(tmp_path, LearningCurves())
    assert result.callback_errors == {}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("file", "begins"), [("a.svg", b"<?xml"), ("a.png", PNG), ("a.pdf", b"%PDF")])
def test_ending_says_the_format(tmp_path: Path, file: str, begins: bytes) -> None:
    train(tmp_path, LearningCurves(file=file))
    assert (tmp_path / "run" / file).read_bytes().startswith(begins)


def test_panels_are_the_metrics_and_training_and_validation_share_one(tmp_path: Path) -> None:
    train(tmp_path, LearningCurves(file="a.svg"), metrics=["accuracy"])
    svg = texts_of(tmp_path / "run" / "a.svg")
    for text in ("run: completed", "loss", "accuracy", "lr", "train", "validation", "steps"):
        assert f"<!-- {text} -->" in svg, text
    assert "<!-- val_loss -->" not in svg
    assert svg.count('id="axes_') == 3


def test_chosen_metrics_only(tmp_path: Path) -> None:
    train(tmp_path, LearningCurves(metrics=["accuracy"], file="a.svg"), metrics=["accuracy"])
    svg = texts_of(tmp_path / "run" / "a.svg")
    assert "<!-- accuracy -->" in svg and "<!-- lr -->" not in svg


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    script = [StepEnd(loss=1.0, lr=0.1, step=1, metrics=Metrics({"_a$x^{$<b>": 1.0}))]
    curves = LearningCurves(file="a.svg")
    driven = drive(curves, events=script, run_dir=str(tmp_path))
    assert driven.result.callback_errors == {}
    assert driven.result.dir is not None
    assert "_a$x^{$" in texts_of(driven.result.dir / "a.svg")


def test_run_without_a_step_has_no_picture(tmp_path: Path) -> None:
    driven = drive(LearningCurves(), events=[], run_dir=str(tmp_path))
    assert driven.result.callback_errors == {}
    assert driven.result.dir is not None and not (driven.result.dir / "curves.png").exists()


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    script: list[Event] = [
        StepEnd(loss=loss, lr=0.1, step=step) for step, loss in enumerate([1.0, math.nan, math.inf, 0.5], 1)
    ]
    curves = LearningCurves()
    driven = drive(curves, events=script, run_dir=str(tmp_path))
    assert driven.result.callback_errors == {}
    steps, values = curves._curves["loss"].points()
    assert steps == [1, 2, 3, 4] and str(values) == "[1.0, nan, inf, 0.5]"


def test_curves_hold_what_the_events_said(tmp_path: Path) -> None:
    script: list[Event] = [
        StepEnd(loss=2.0, lr=0.1, step=1, metrics=Metrics(extra=7.0)),
        ValidationEnd(metrics=Metrics(val_loss=3.0), step=1),
        EpochEnd(metrics=Metrics(train_loss=2.5, val_loss=3.0, lr=0.1), step=1),
    ]
    curves = LearningCurves()
    drive(curves, events=script, run_dir=str(tmp_path))
    assert {key: curve.points() for key, curve in curves._curves.items()} == {
        "loss": ([1], [2.0]),
        "lr": ([1], [0.1]),
        "extra": ([1], [7.0]),
        "val_loss": ([1], [3.0]),  # once, though the epoch says it again
        "train_loss": ([1], [2.5]),
    }


# During training -----------------------------------------------------------------------------------


class WaitsForFile(Callback):
    """Holds training after its second epoch until there is a picture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.was_there = False

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 7:
            while not self.path.exists():
                os.sched_yield()
            self.was_there = True


@pytest.mark.parametrize("place", ["here", "process"])
def test_curves_are_drawn_while_training_goes_on(tmp_path: Path, place: Literal["here", "process"]) -> None:
    curves = LearningCurves(every_n_epochs=2, runs_in=place)
    waits = WaitsForFile(tmp_path / "run" / "curves.png")
    result = train(tmp_path, curves, waits, epochs=3)
    assert waits.was_there and result.callback_errors == {}
    assert waits.path.read_bytes().startswith(PNG)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert bool(curves._curves) == (place == "here")


def test_picture_of_a_process_is_the_one_that_is_drawn_here(tmp_path: Path) -> None:
    train(tmp_path / "here", LearningCurves())
    train(tmp_path / "process", LearningCurves(runs_in="process"))
    here, process = ((tmp_path / each / "run" / "curves.png").read_bytes() for each in ("here", "process"))
    assert here == process


class Subclass(LearningCurves):
    runs_in = "process"


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (LearningCurves, "here"),  # drawn after training: nothing to disturb, and no process to start
        (lambda: LearningCurves(every_n_epochs=1), "process"),
        (lambda: LearningCurves(every_n_epochs=1, runs_in="here"), "here"),
        (lambda: LearningCurves(runs_in="process"), "process"),
        (Subclass, "process"),
        (lambda: Subclass(runs_in="here"), "here"),
    ],
)
def test_place_is_chosen_by_when_it_draws(make: Callable[[], LearningCurves], place: str) -> None:
    assert make().runs_in == place


class SlowToDraw(LearningCurves):
    """Is still drawing its first picture when training has ended."""

    def __init__(self) -> None:
        super().__init__(every_n_epochs=1, runs_in="here")
        self.has_trained = threading.Event()
        self.drawn = 0

    def draw(self, path: "Path | str | None" = None) -> Path:
        assert self.has_trained.wait(60)
        self.drawn += 1
        return Path()


class AfterTraining(Callback):
    def __init__(self, then: threading.Event) -> None:
        self.then = then

    @in_step
    def after_training(self, point: StepPoint) -> None:
        self.then.set()


def test_drawings_do_not_pile_up_behind_a_slow_one(tmp_path: Path) -> None:
    curves = SlowToDraw()
    result = train(tmp_path, curves, AfterTraining(curves.has_trained), epochs=50)
    assert result.callback_errors == {}
    # The first epoch, the last two and the end; those between were outdated.
    assert 2 <= curves.drawn <= 4
    assert curves._curves["val_loss"].points()[0] == [3 * epoch for epoch in range(1, 51)]


# On demand -----------------------------------------------------------------------------------------


class DrawAt(Callback):
    """Draws from another thread than the one that notes the points."""

    def __init__(self, curves: LearningCurves, path: Path) -> None:
        self.curves, self.path = curves, path
        self.drawn: list[Path] = []

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 6:
            self.drawn = [self.curves.draw(self.path), self.curves.draw()]


class WaitForPoints(Callback):
    def __init__(self, curves: LearningCurves) -> None:
        self.curves = curves
        self.is_there = threading.Event()

    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        while not self.curves._curves:  # its neighbour's thread is about to note the same event
            self.is_there.wait(0.001)
        self.is_there.set()

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 6:
            assert self.is_there.wait(30)


def test_draw_works_during_the_run_from_any_thread(tmp_path: Path) -> None:
    curves = LearningCurves()
    draw = DrawAt(curves, tmp_path / "now.png")
    train(tmp_path, curves, WaitForPoints(curves), draw)
    assert draw.drawn == [tmp_path / "now.png", tmp_path / "run" / "curves.png"]
    assert all(path.read_bytes().startswith(PNG) for path in draw.drawn)


def test_several_threads_may_draw_at_once(tmp_path: Path) -> None:
    curves = LearningCurves()
    train(tmp_path, curves)
    failures: list[BaseException] = []

    def draw(number: int) -> None:
        try:
            curves.draw(tmp_path / f"{number % 2}.png")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0.png", "1.png"]


def test_curves_of_a_run_that_is_over_can_be_read_back(tmp_path: Path) -> None:
    live = LearningCurves()
    result = train(tmp_path, live)
    back = LearningCurves.read(result.dir, file="again.png")
    assert {key: curve.points() for key, curve in back._curves.items()} == {
        key: curve.points() for key, curve in live._curves.items()
    }
    assert back.draw() == tmp_path / "run" / "again.png"
    assert back.draw().read_bytes().startswith(PNG)


def test_drawing_before_there_is_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no run to draw"):
        LearningCurves().draw()
    with pytest.raises(RuntimeError, match="nothing to draw before the first step"):
        LearningCurves().draw(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match=r"in the process that draws them: call LearningCurves.read"):
        LearningCurves(every_n_epochs=1).draw()
    with pytest.raises(ConfigError, match=r"path must end in .png, .svg, .pdf"):
        LearningCurves().draw(tmp_path / "a.jpg")


def test_resumed_run_goes_on_with_the_curves_before_it(tmp_path: Path) -> None:
    whole, first, second = (LearningCurves() for _ in range(3))
    train(tmp_path, whole, name="whole")
    train(tmp_path, first, ModelCheckpoint(), StopAfter(4))
    assert first._curves["loss"].points()[0] == [1, 2, 3, 4]
    train(tmp_path, second, ModelCheckpoint(), resume="auto")
    assert second._curves["loss"].points() == whole._curves["loss"].points()
    assert second._curves["val_loss"].points() == whole._curves["val_loss"].points()


# Bounded memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 33, 1000, 100_003])
def test_curve_is_bounded_and_keeps_mean_and_ends(count: int) -> None:
    curve = Curve(max_points=16)
    for step in range(1, count + 1):
        curve.add(step, float(step))
        assert len(curve.points()[0]) <= 16
    steps, values = curve.points()
    assert len(steps) <= 16 and steps == values == sorted(steps)
    assert steps[0] <= count / 8 + 1 and steps[-1] >= count - count / 8 - 1
    if count < 16:
        assert steps == list(range(1, count + 1))


def test_thinned_points_are_means_of_neighbours() -> None:
    curve = Curve(max_points=4)
    for step, value in enumerate([1, 3, 5, 7, 10, 20, 9], 1):
        curve.add(step, float(value))
    assert curve.points() == ([1.5, 3.5, 5.5, 7.0], [2.0, 6.0, 15.0, 9.0])


def test_nan_stays_visible_in_a_thinned_curve() -> None:
    curve = Curve(max_points=4)
    for step, value in enumerate([1, 1, math.nan, 1], 1):
        curve.add(step, float(value))
    _, values = curve.points()
    assert values[0] == 1.0 and math.isnan(values[1])


# matplotlib ----------------------------------------------------------------------------------------


def test_missing_matplotlib_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'offloop\[plot\]'"):
        LearningCurves()


def test_matplotlib_is_imported_only_to_draw_and_never_pyplot() -> None:
    found = importlib.util.find_spec("offloop.callbacks.learning_curves")
    assert found is not None and found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [ast.unparse(node) for node in imports if "matplotlib" in ast.unparse(node)]
    assert names and not [name for name in names if "pyplot" in name]
    at_import = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [name for name in at_import if "matplotlib" in name]


def test_drawing_leaves_no_global_figure_and_no_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    real = builtins.__import__

    def spy(name: str, *rest: Any, **options: Any) -> Any:
        imported.append(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", spy)
    train(tmp_path, LearningCurves())
    assert "matplotlib.figure" in imported
    assert "matplotlib.pyplot" not in imported


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"file": "curves.jpg"}, ConfigError, "file must be a name that ends in .png, .svg, .pdf"),
        ({"file": "a/curves.png"}, ConfigError, "file must be a name"),
        ({"max_points": 8}, ConfigError, "max_points must be a whole number of at least 16"),
        ({"every_n_epochs": 0}, ConfigError, "every_n_epochs must be a whole number of at least 1, got 0"),
        ({"runs_in": "thread"}, ConfigError, "runs_in must be None, 'here' or 'process', got 'thread'"),
        ({"metrics": "loss"}, TypeError, "metrics must be a list of names"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LearningCurves(**arguments)
