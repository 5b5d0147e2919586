"""callbacks/early_stopping.py: when it stops, whatever else happens, and the weights it leaves."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from offloop.callbacks import EarlyStopping, ModelCheckpoint
from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    EpochStart,
    Event,
    MetricNotFoundError,
    Metrics,
    Run,
    StateChanged,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    decides,
)
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import (
    FailingCallback,
    SlowCallback,
    drive,
    drive_async,
    tiny_batches,
    tiny_trainer,
)

NAN, INF = math.nan, math.inf


def validations(values: list[float], key: str = "val_loss") -> list[Event]:
    """Return an epoch for each value, with a step in it."""
    script: list[Event] = []
    for epoch, value in enumerate(values):
        position: dict[str, Any] = {"epoch": epoch, "step": epoch + 1, "batch": epoch + 1}
        script.append(EpochStart(epoch=epoch, step=epoch, batch=epoch))
        script.append(StepEnd(loss=1.0, lr=0.1, **position))
        script.append(ValidationEnd(metrics=Metrics({key: value}), **position))
        script.append(EpochEnd(metrics=Metrics({key: value, "train_loss": 1.0}), **position))
    return script


SEQUENCES = [
    # stops: how many values are looked at until it stops, None for not at all
    pytest.param({"patience": 1}, [5, 4, 3, 2], None, id="improving"),
    pytest.param({"patience": 1}, [1, 2, 0], 2, id="first-miss-with-patience-1"),
    pytest.param({"patience": 2}, [1, 2, 0, 1, 1, 0], 5, id="misses-in-a-row-only"),
    pytest.param({"patience": 3}, [5, 4, 4, 4, 4, 4], 5, id="ties-are-misses"),
    pytest.param({"patience": 3}, [5, 4, 3, 3, 3, 3, 3], 6, id="improving-then-flat"),
    pytest.param({"patience": 3, "check_finite": False}, [NAN, 5, 4, 3, 2], None, id="nan-first-is-no-best"),
    pytest.param({"patience": 2, "check_finite": False}, [NAN, NAN, 1], 2, id="nan-first-is-a-miss"),
    pytest.param({"patience": 2, "check_finite": False}, [5, NAN, 6, 1], 3, id="nan-in-the-middle-is-a-miss"),
    pytest.param(
        {"patience": 2, "check_finite": False}, [5, NAN, 4, NAN, 3], None, id="nan-between-improvements"
    ),
    pytest.param({"patience": 9}, [5, NAN, 4], 2, id="check-finite-stops-at-nan"),
    pytest.param({"patience": 9}, [NAN], 1, id="check-finite-stops-at-nan-first"),
    pytest.param({"patience": 9}, [5, -INF, 4], 2, id="check-finite-stops-at-minus-infinity"),
    pytest.param({"patience": 2}, [0.0, 0.0, 0.0, -1], 3, id="zero-is-a-best"),
    pytest.param({"patience": 2}, [1, 0.0, 0.5, 0.25, -1], 4, id="zero-beats-one"),
    pytest.param({"patience": 2}, [-1, -2, -1.5, -1.75, -9], 4, id="negative"),
    pytest.param({"patience": 2, "mode": "max"}, [-3, -2, -2.5, -2, 0], 4, id="max-negative"),
    pytest.param({"patience": 2, "mode": "max"}, [0.5, 0.6, 0.6, 0.55, 0.9], 4, id="max-flat"),
    pytest.param({"patience": 2, "min_delta": 0.5}, [4, 3.5, 3.0, 2.0], None, id="min-delta-best-stays"),
    pytest.param(
        {"patience": 2, "min_delta": 0.5}, [4, 3.5, 3.5, 2.0], 3, id="min-delta-exactly-met-is-a-miss"
    ),
    pytest.param({"patience": 3, "min_delta": 0.25}, [2, 1.9, 1.8, 1.7, 1.6], None, id="small-gains-add-up"),
    pytest.param({"patience": 9, "stopping_threshold": 1.0}, [2, 1.0, 0.9, 0.5], 3, id="goal-must-be-beaten"),
    pytest.param({"patience": 9, "stopping_threshold": 0.9, "mode": "max"}, [0.5, 0.95], 2, id="max-goal"),
    pytest.param({"patience": 9, "stopping_threshold": 0.0}, [0.0, 1.0, -0.1, -5], 3, id="goal-zero"),
    pytest.param({"patience": 9, "divergence_threshold": 3.0}, [2, 3.0, 3.1, 1], 3, id="divergence"),
    pytest.param(
        {"patience": 9, "divergence_threshold": 0.0, "mode": "max"}, [1, 0.0, -0.1], 3, id="max-divergence"
    ),
    pytest.param(
        {"patience": 9, "stopping_threshold": 0.0, "check_finite": False},
        [1, -INF, 2],
        None,
        id="infinity-is-no-goal",
    ),
    pytest.param(
        {"patience": 9, "divergence_threshold": 3.0, "check_finite": False},
        [1, INF, 2],
        2,
        id="infinity-diverges",
    ),
    # What the tests of other trainers try: a plateau of length patience - 1 in the middle, a best that is the
    # second-last value, patience longer than the run, a late recovery that comes one check too late.
    pytest.param({"patience": 3}, [10, 5, 5, 5, 4, 3], None, id="short-plateau"),
    pytest.param({"patience": 2}, [6, 5, 4, 4, 3, 3], None, id="steps"),
    pytest.param({"patience": 10}, [3, 3, 3, 3], None, id="patience-longer-than-the-run"),
    pytest.param({"patience": 3}, [1, 2, 3, 4, 0], 4, id="recovery-too-late"),
    pytest.param({"patience": 1, "mode": "max"}, [0.1, 0.2, 0.3, 0.2, 0.9], 4, id="max-first-fall"),
]


def check_stop(driven: Any, stops: int | None, total: int) -> None:
    looked_at = [event for event in driven.events if isinstance(event, ValidationEnd)]
    assert len(looked_at) == (stops or total)
    assert driven.result.status == ("completed" if stops is None else "stopped")
    assert [command.command for command in driven.commands] == ([] if stops is None else ["stop"])
    assert all(command.by == "EarlyStopping" for command in driven.commands)


@pytest.mark.parametrize(("arguments", "values", "stops"), SEQUENCES)
def test_stop(arguments: dict[str, Any], values: list[float], stops: int | None) -> None:
    check_stop(drive(EarlyStopping(**arguments), events=validations(values)), stops, len(values))


@pytest.mark.parametrize(("arguments", "values", "stops"), SEQUENCES)
@pytest.mark.anyio
async def test_stop_is_the_same_beside_slow_and_failing_observers(
    arguments: dict[str, Any], values: list[float], stops: int | None
) -> None:
    slow, failing = SlowCallback(0.001), FailingCallback(ValidationEnd)
    driven = await drive_async(slow, EarlyStopping(**arguments), failing, events=validations(values))
    check_stop(driven, stops, len(values))
    assert slow.handled and failing.raised


@pytest.mark.parametrize(
    ("key", "values", "stops"),
    [
        ("val_loss", [1.0, 2.0], 2),
        ("val_accuracy", [0.5, 0.6, 0.4], 3),
        ("val_dice_loss", [1.0, 0.5, 0.6], 3),
        ("val_f1_score", [0.5, 0.4], 2),
    ],
)
def test_auto_mode_reads_the_name(key: str, values: list[float], stops: int) -> None:
    driven = drive(EarlyStopping(key, patience=1), events=validations(values, key))
    check_stop(driven, stops, len(values))


def test_auto_mode_raises_where_the_name_says_nothing() -> None:
    with pytest.raises(ConfigError, match="check the spelling, or give mode="):
        drive(EarlyStopping("val_blub"), events=validations([1.0], "val_blub"))


def test_training_metric_is_checked_at_the_end_of_epochs() -> None:
    script: list[Event] = [
        EpochEnd(metrics=Metrics(train_loss=value), epoch=epoch, step=epoch + 1)
        for epoch, value in enumerate([1.0, 2.0, 0.0])
    ]
    driven = drive(EarlyStopping("train_loss", patience=1), events=script)
    assert driven.result.reason == "train_loss did not improve in 1 checks (best 1 at step 1)"
    assert [event.step for event in driven.events if isinstance(event, EpochEnd)] == [1, 2]


def test_missing_metric_fails_the_run_and_lists_the_keys() -> None:
    with pytest.raises(MetricNotFoundError, match=r"val_accuracy.*val_loss"):
        drive(EarlyStopping("val_accuracy"), events=validations([1.0]))


def test_run_without_the_validation_that_it_watches_is_refused() -> None:
    trainer = tiny_trainer()
    with pytest.raises(
        ConfigError, match=r"monitor='val_loss' needs a validation: give train\(\) a val_loader"
    ):
        trainer.train(tiny_batches(2), epochs=2, callbacks=[EarlyStopping("val_loss")])
    assert trainer.last_run is None


@pytest.mark.parametrize(
    ("arguments", "values", "reason"),
    [
        ({"patience": 2}, [1, 2, 2], "val_loss did not improve in 2 checks (best 1 at step 1)"),
        ({}, [1, NAN], "val_loss is nan"),
        (
            {"patience": 1, "check_finite": False},
            [NAN],
            "val_loss did not improve in 1 checks (never finite at step 0)",
        ),
        ({"stopping_threshold": 0.5}, [0.25], "val_loss is 0.25, beyond stopping_threshold=0.5"),
        ({"divergence_threshold": 9}, [10], "val_loss is 10, worse than divergence_threshold=9"),
    ],
)
def test_reason_says_what_happened(arguments: dict[str, Any], values: list[float], reason: str) -> None:
    assert drive(EarlyStopping(**arguments), events=validations(values)).result.reason == reason


@pytest.mark.parametrize("patience", [0, -1, 1.5, True, None])
def test_patience_out_of_range_is_refused(patience: Any) -> None:
    with pytest.raises(ConfigError, match="patience must be a whole number of at least 1"):
        EarlyStopping(patience=patience)


def test_next_run_begins_anew() -> None:
    stopping = EarlyStopping(patience=2)
    assert drive(stopping, events=validations([1, 2])).result.status == "completed"
    assert drive(stopping, events=validations([5, 6])).result.status == "completed"
    assert (stopping.misses, stopping.monitor.best) == (1, 5)


# With a model --------------------------------------------------------------------------------------


class Weights(Callback):
    """Keeps the weights as of each validation."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self.at[event.step] = {name: each.clone() for name, each in run.trainer.model.state_dict().items()}


def is_equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


VAL = [
    (-inputs, targets) for inputs, targets in tiny_batches(2, seed=1)
]  # gets worse as training gets better


def train_worse(*callbacks: Callback, **limits: Any) -> Any:
    """Train so that the first validation is the best; returns the trainer and the result."""
    trainer = tiny_trainer(lr=0.5, **limits.pop("knobs", {}))
    result = trainer.train(tiny_batches(4), VAL, callbacks=callbacks, **limits)
    scores = [event.metrics["val_loss"] for event in result.history]
    assert min(scores) == scores[0]
    return trainer, result


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        pytest.param({"epochs": 9}, "stopped", id="its-own-stop"),
        pytest.param({"epochs": 3}, "completed", id="last-epoch"),
        pytest.param({"max_steps": 12}, "completed", id="max-steps-at-the-end-of-an-epoch"),
        pytest.param({"max_steps": 10}, "completed", id="max-steps-in-an-epoch"),
    ],
)
def test_restore_best_leaves_the_weights_of_the_best_check(limits: dict[str, Any], status: str) -> None:
    weights = Weights()
    trainer, result = train_worse(weights, EarlyStopping(patience=4, restore_best=True), **limits)
    assert result.status == status
    assert is_equal(trainer.model.state_dict(), weights.at[4])
    assert not is_equal(weights.at[4], weights.at[max(weights.at)])


@pytest.mark.parametrize("kind", [ValidationStart, EpochEnd, EpochStart])
def test_restore_best_when_the_time_is_up_between_two_epochs(
    kind: type[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, real = 0.0, time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed)

    class TakesLong(Callback):
        """At one boundary of the third epoch."""

        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            self.wait_at(event)

        @decides
        def on_validation_start(self, event: ValidationStart, run: Run) -> None:
            self.wait_at(event)

        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            self.wait_at(event)

        def wait_at(self, event: Event) -> None:
            nonlocal passed
            if isinstance(event, kind) and event.epoch == 2:
                passed = 1000.0

    weights = Weights()
    stopping = EarlyStopping(patience=9, restore_best=True)
    trainer, result = train_worse(weights, stopping, TakesLong(), max_time=500.0)
    assert (result.status, result.reason) == ("completed", "max_time=500.0")
    assert [event.final for event in result.history[-2:]] == [False, True]
    assert is_equal(trainer.model.state_dict(), weights.at[4])


class EndsBetween(Callback):
    """Ends a run between its third and its fourth epoch."""

    def __init__(self, how: str) -> None:
        self.how = how

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        if event.epoch == 2 and self.how != "stopped at EpochStart":
            if self.how == "stopped at EpochEnd":
                run.stop_nowait("enough")
            elif self.how == "stopped in a pause":
                run.pause_nowait("a look")
            elif self.how == "cancelled":
                run.cancel()
            else:
                raise ZeroDivisionError

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == 3:
            run.stop_nowait("enough")

    async def on_state_changed(self, event: StateChanged, run: Run) -> None:
        if event.state == "paused":
            await run.stop("enough")


@pytest.mark.parametrize(
    "how", ["stopped at EpochEnd", "stopped at EpochStart", "stopped in a pause", "cancelled", "failed"]
)
def test_restore_best_where_a_run_ends_between_two_epochs(how: str, tmp_path: Path) -> None:
    """And where it is to go on, the checkpoint has what was trained."""
    weights = Weights()
    callbacks = [weights, EarlyStopping(patience=9, restore_best=True), ModelCheckpoint(), EndsBetween(how)]
    trainer = tiny_trainer(lr=0.5, run_dir=tmp_path, run_name="a")
    with pytest.raises(ZeroDivisionError) if how == "failed" else contextlib.nullcontext():
        result = trainer.train(tiny_batches(4), VAL, epochs=9, callbacks=callbacks)
        assert (result.status, result.steps) == (how.split()[0], 12)
    expected = weights.at[4 if how.startswith("stopped") else 12]
    assert is_equal(trainer.model.state_dict(), expected)
    if how != "failed":
        saved: Any = CheckpointReader(tmp_path / "a").load("last").state
        assert is_equal(saved["model"], weights.at[12])


def test_restore_best_when_there_is_nothing_left_to_train_after_a_resume(tmp_path: Path) -> None:
    def train(epochs: int, *more: Callback, resume: Any = None) -> Any:
        weights = Weights()
        trainer = tiny_trainer(lr=0.5, run_dir=tmp_path, run_name="a")
        callbacks = [weights, EarlyStopping(patience=9, restore_best=True), ModelCheckpoint(), *more]
        trainer.train(tiny_batches(4), VAL, epochs=epochs, callbacks=callbacks, resume=resume)
        return weights, trainer

    weights, _ = train(9, StopAt(3))
    _, resumed = train(2, resume="must")
    assert is_equal(resumed.model.state_dict(), weights.at[4])


def test_run_that_goes_on_after_its_limit_is_the_longer_run_bit_for_bit(tmp_path: Path) -> None:
    def train(name: str, epochs: int, resume: Any = None) -> dict[str, torch.Tensor]:
        weights = Weights()
        trainer = tiny_trainer(lr=0.5, run_dir=tmp_path, run_name=name)
        callbacks = [weights, EarlyStopping(patience=9, restore_best=True), ModelCheckpoint()]
        trainer.train(tiny_batches(4), VAL, epochs=epochs, callbacks=callbacks, resume=resume)
        return weights.at[max(weights.at)]

    train("parts", 3)
    assert is_equal(train("parts", 5, resume="last"), train("whole", 5))


def test_without_restore_best_the_last_weights_stay() -> None:
    weights = Weights()
    trainer, _ = train_worse(weights, EarlyStopping(patience=2), epochs=9)
    assert is_equal(trainer.model.state_dict(), weights.at[max(weights.at)])


def test_same_step_and_weights_beside_slow_and_failing_observers() -> None:
    alone, first = train_worse(EarlyStopping(patience=3), epochs=9)
    beside, second = train_worse(
        SlowCallback(0.001), EarlyStopping(patience=3), FailingCallback(EpochEnd), epochs=9
    )
    assert (first.steps, first.reason) == (second.steps, second.reason)
    assert is_equal(alone.model.state_dict(), beside.model.state_dict())


class StopAt(Callback):
    """Interrupts a run after a step."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == self.epoch:
            run.stop_nowait("interrupted")


@pytest.mark.parametrize("restore_best", [False, True])
@pytest.mark.parametrize("interrupted_at", [1, 2, 4])
def test_resumed_run_stops_where_the_uninterrupted_one_does(
    tmp_path: Path, interrupted_at: int, restore_best: bool
) -> None:
    def train(name: str, *more: Callback, resume: Any = None) -> Any:
        trainer = tiny_trainer(lr=0.5, run_dir=str(tmp_path), run_name=name)
        callbacks = [EarlyStopping(patience=5, restore_best=restore_best), ModelCheckpoint(), *more]
        return trainer, trainer.train(tiny_batches(4), VAL, epochs=20, callbacks=callbacks, resume=resume)

    whole, expected = train("whole")
    assert expected.status == "stopped"
    assert train("parts", StopAt(interrupted_at))[1].reason == "interrupted"
    resumed, result = train("parts", resume="last")
    assert (result.steps, result.reason) == (expected.steps, expected.reason)
    assert is_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_state_of_another_metric_is_not_taken_over() -> None:
    before, after = EarlyStopping("val_loss"), EarlyStopping("val_error")
    drive(before, events=validations([1, 2, 2]))
    assert before.misses == 2
    after.load_state_dict(before.state_dict())
    assert (after.misses, after.monitor.best) == (0, None)


def test_model_is_not_copied_without_restore_best() -> None:
    stopping = EarlyStopping()
    drive(stopping, events=validations([1, 2]))
    assert stopping.state_dict()["best_weights"] is None
