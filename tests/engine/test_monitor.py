"""engine/monitor.py: the only meaning of "better"."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from offloop.engine import ConfigError, EpochEnd, MetricNotFoundError, Metrics, ValidationEnd
from offloop.engine.monitor import Monitor

NAN, INF = math.nan, math.inf


def run_with(direction: str | None = None) -> Any:
    """Return what a monitor asks of a run."""
    return SimpleNamespace(direction_of=lambda key: direction, refused={})


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "improved"),
    [
        pytest.param("min", 0.0, [3, 2, 1], [True, True, True], id="falling"),
        pytest.param("min", 0.0, [1, 2, 3], [True, False, False], id="rising"),
        pytest.param("max", 0.0, [1, 2, 3], [True, True, True], id="max-rising"),
        pytest.param("max", 0.0, [3, 2, 3], [True, False, False], id="max-tie-later"),
        pytest.param("min", 0.0, [1, 1, 1], [True, False, False], id="ties"),
        pytest.param("min", 0.0, [NAN, 5, 4], [False, True, True], id="nan-first"),
        pytest.param("max", 0.0, [NAN, 5, 6], [False, True, True], id="max-nan-first"),
        pytest.param("min", 0.0, [5, NAN, 6, 4], [True, False, False, True], id="nan-in-the-middle"),
        pytest.param("min", 0.0, [NAN, NAN], [False, False], id="only-nan"),
        pytest.param("min", 0.0, [-INF, 1, 0.5], [False, True, True], id="minus-infinity-is-no-best"),
        pytest.param("max", 0.0, [INF, 1, 2], [False, True, True], id="infinity-is-no-best"),
        pytest.param(
            "min", 0.0, [1, 0.0, 0.5, 0.0, -0.5], [True, True, False, False, True], id="zero-is-a-value"
        ),
        pytest.param("max", 0.0, [0.0, -1, 0.0, 1], [True, False, False, True], id="max-zero-first"),
        pytest.param("min", 0.0, [0.0, -0.0], [True, False], id="minus-zero-is-a-tie"),
        pytest.param("min", 0.0, [-1, -2, -1.5], [True, True, False], id="negative"),
        pytest.param("max", 0.0, [-2, -1, -1.5], [True, True, False], id="max-negative"),
        pytest.param("min", 0.5, [4, 3.5, 3.4], [True, False, True], id="min-delta-exactly-met-is-a-miss"),
        pytest.param(
            "max", 0.5, [4, 4.5, 4.6], [True, False, True], id="max-min-delta-exactly-met-is-a-miss"
        ),
        pytest.param(
            "min", 0.5, [4, 3.75, 3.5, 3.25], [True, False, False, True], id="best-moves-only-beyond-delta"
        ),
        pytest.param("min", 1.0, [0.5, -0.5, -0.75], [True, False, True], id="min-delta-across-zero"),
        pytest.param("min", 0.0, [3, 2, 2, 2], [True, True, False, False], id="improving-then-flat"),
    ],
)
def test_improvement(mode: Any, min_delta: float, values: list[float], improved: list[bool]) -> None:
    monitor = Monitor("val_loss", mode, min_delta)
    assert [monitor.improves(value) for value in values] == improved
    best = None
    for value, better in zip(values, improved, strict=True):
        best = value if better else best
    assert monitor.best == best


@pytest.mark.parametrize(("known", "better"), [("min", 1.0), ("max", 3.0)])
def test_auto_asks_the_run(known: str, better: float) -> None:
    monitor = Monitor("val_thing")
    monitor.begin(run_with(known))
    assert monitor.direction == known
    assert [monitor.improves(value) for value in (2.0, better)] == [True, True]


def test_auto_raises_where_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"monitor='val_thing'.*mode=\"min\" or mode=\"max\""):
        Monitor("val_thing").begin(run_with(None))


def test_given_mode_is_not_asked_for() -> None:
    monitor = Monitor("val_thing", "max")
    monitor.begin(run_with("min"))
    assert monitor.direction == "max"


def test_a_run_without_validations_is_refused_at_its_start() -> None:
    run = run_with("min")
    run.refused["validate"] = "there is no val_loader to validate on"
    Monitor("train_loss").begin(run)
    with pytest.raises(ConfigError, match="monitor='val_loss' needs a validation"):
        Monitor("val_loss").begin(run)


@pytest.mark.parametrize("key", ["loss", "lr", "", "validation_loss", 3, None])
def test_key_must_be_of_a_training_or_a_validation(key: Any) -> None:
    with pytest.raises(ConfigError, match="must begin with train_ or val_"):
        Monitor(key)


@pytest.mark.parametrize("mode", ["lower", "MIN", None, ""])
def test_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match="mode must be 'auto', 'min' or 'max'"):
        Monitor("val_loss", mode)


@pytest.mark.parametrize("min_delta", [-0.1, NAN, INF, "1", True, None])
def test_min_delta_out_of_range_is_refused(min_delta: Any) -> None:
    with pytest.raises(ConfigError, match="min_delta must be a finite number of at least 0"):
        Monitor("val_loss", "min", min_delta)


@pytest.mark.parametrize(
    ("key", "at_validation", "at_epoch"),
    [("val_loss", 1.0, None), ("train_loss", None, 2.0)],
)
def test_value_is_read_where_it_is_made(
    key: str, at_validation: float | None, at_epoch: float | None
) -> None:
    monitor = Monitor(key, "min")
    monitor.begin(run_with())
    both = Metrics(val_loss=1.0, train_loss=2.0)
    assert monitor.value_at(ValidationEnd(metrics=both, epoch=0)) == at_validation
    assert monitor.value_at(EpochEnd(metrics=both, epoch=0)) == at_epoch


@pytest.mark.parametrize(
    ("key", "event"),
    [
        ("val_accuracy", ValidationEnd(metrics=Metrics(val_loss=1.0), epoch=0)),
        ("train_accuracy", EpochEnd(metrics=Metrics(val_loss=1.0), epoch=0)),
    ],
)
def test_missing_metric_lists_those_there_are(key: str, event: Any) -> None:
    monitor = Monitor(key, "max")
    monitor.begin(run_with())
    with pytest.raises(MetricNotFoundError, match=rf"{key}.*val_loss"):
        monitor.value_at(event)


def test_state_survives_and_another_metrics_best_is_not_taken() -> None:
    monitor = Monitor("val_loss", "min")
    monitor.improves(0.0)
    same, other = Monitor("val_loss", "min"), Monitor("val_error", "min")
    same.load_state_dict(monitor.state_dict())
    other.load_state_dict(monitor.state_dict())
    assert (same.best, other.best) == (0.0, None)
