"""callbacks/learning_rate.py: the same rates, bit for bit, as torch's schedulers stepped by hand."""

import contextlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from offloop.callbacks import EarlyStopping, LearningRateScheduler, ModelCheckpoint
from offloop.callbacks.learning_rate import SCHEDULES
from offloop.engine import (
    Callback,
    CheckpointReader,
    ConfigError,
    EpochEnd,
    EpochStart,
    LearningRateChanged,
    MetricNotFoundError,
    Run,
    StepEnd,
    StepPoint,
    Trainer,
    TrainerConfig,
    ValidationEnd,
    decides,
    in_step,
)
from offloop.engine.testing import (
    FailingCallback,
    Recorder,
    SlowCallback,
    tiny_batches,
    tiny_model,
    tiny_trainer,
)

LR, EPOCHS, BATCHES = 0.1, 4, 3
STEPS = EPOCHS * BATCHES
Make = Callable[[torch.optim.Optimizer, int], LRScheduler]

BY_STEP: dict[str, tuple[dict[str, Any], Make]] = {
    "cosine": ({}, lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps)),
    "one_cycle": ({}, lambda optimizer, steps: OneCycleLR(optimizer, max_lr=LR, total_steps=steps)),
    "linear": ({}, lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, total_iters=steps)),
    "polynomial": (
        {"power": 2.0},
        lambda optimizer, steps: PolynomialLR(optimizer, total_iters=steps, power=2.0),
    ),
}
BY_EPOCH: dict[str, tuple[dict[str, Any], Make]] = {
    "step": ({"step_size": 2, "gamma": 0.5}, lambda optimizer, _: StepLR(optimizer, step_size=2, gamma=0.5)),
    "exponential": ({"gamma": 0.9}, lambda optimizer, _: ExponentialLR(optimizer, gamma=0.9)),
}


def by_hand(make: Make, interval: str, warmup: int) -> list[float]:
    """Return the rate of each step, with torch's schedulers alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = make(optimizer, STEPS - warmup)
    rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup) if warmup else None
    rates = []
    for step in range(1, STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if rise is not None:
            rise.step()
        if interval == "step" and step > warmup:
            schedule.step()
        if interval == "epoch" and step % BATCHES == 0 and step > warmup:
            schedule.step()
    return rates


def train(*callbacks: Callback, val: Any = None, lr: float = LR, **limits: Any) -> Recorder:
    recorder = Recorder()
    knobs = limits.pop("knobs", {})
    tiny_trainer(lr=lr, **knobs).train(
        tiny_batches(BATCHES), val, callbacks=[recorder, *callbacks], **(limits or {"epochs": EPOCHS})
    )
    return recorder


def rates_of(recorder: Recorder) -> list[float]:
    return [event.lr for event in recorder.of(StepEnd)]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", [*BY_STEP, *BY_EPOCH])
def test_rates_are_torchs_bit_for_bit(name: str, warmup: int) -> None:
    arguments, make = (BY_STEP | BY_EPOCH)[name]
    recorder = train(LearningRateScheduler(name, warmup=warmup, **arguments))
    expected = by_hand(make, "step" if name in BY_STEP else "epoch", warmup)
    assert rates_of(recorder) == expected
    assert len(set(expected)) > 1


def test_every_name_has_a_test() -> None:
    assert {*BY_STEP, *BY_EPOCH, "reduce_on_plateau"} == set(SCHEDULES)


@pytest.mark.parametrize("name", [*BY_STEP, *BY_EPOCH])
def test_only_what_steps_by_epoch_is_announced(name: str) -> None:
    arguments, make = (BY_STEP | BY_EPOCH)[name]
    recorder = train(LearningRateScheduler(name, **arguments))
    announced = [(event.previous, event.lr) for event in recorder.of(LearningRateChanged)]
    if name in BY_STEP:
        assert announced == []
    else:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
        schedule, last = make(optimizer, STEPS), [LR]
        for _ in range(EPOCHS):
            optimizer.step()
            schedule.step()
            last.append(optimizer.param_groups[0]["lr"])
        assert announced == [(before, after) for before, after in itertools.pairwise(last) if before != after]
        assert announced
        assert all(event.source == "schedule" for event in recorder.of(LearningRateChanged))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"epochs": EPOCHS}, STEPS), ({"max_steps": 7}, 7), ({"epochs": EPOCHS, "max_steps": 8}, 8)],
)
def test_length_is_that_of_the_run(limits: dict[str, int], steps: int) -> None:
    recorder = train(LearningRateScheduler("linear"), **limits)
    assert rates_of(recorder) == pytest.approx([LR * (1 - step / steps) for step in range(steps)])


def test_accumulation_makes_fewer_steps() -> None:
    recorder = train(LearningRateScheduler("linear"), knobs={"accumulate_grad_batches": 2})
    steps = EPOCHS * 2  # three batches are two steps
    assert rates_of(recorder) == pytest.approx([LR * (1 - step / steps) for step in range(steps)])


def test_interval_can_be_chosen() -> None:
    recorder = train(LearningRateScheduler("linear", interval="epoch"))
    per_epoch = [LR * (1 - epoch / EPOCHS) for epoch in range(EPOCHS)]
    assert rates_of(recorder) == pytest.approx([rate for rate in per_epoch for _ in range(BATCHES)])


def test_warmup_rises_to_the_rate_that_was_given() -> None:
    rates = rates_of(train(LearningRateScheduler("step", step_size=99, warmup=4)))
    assert rates[0] == pytest.approx(0.01 * LR)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == pytest.approx([LR] * (STEPS - 4))


def test_length_that_nobody_knows_is_an_error_that_names_the_argument() -> None:
    with pytest.raises(ConfigError, match=r"'cosine' needs the length of the run.*give T_max="):
        train(LearningRateScheduler("cosine"), max_time=60.0)


def test_length_can_be_given() -> None:
    recorder = train(LearningRateScheduler("linear", total_iters=3))
    assert rates_of(recorder)[3:] == pytest.approx([0.0] * (STEPS - 3), abs=1e-12)


def test_class_with_arguments() -> None:
    recorder = train(LearningRateScheduler(MultiStepLR, milestones=[1, 3], gamma=0.1))
    expected = [LR, LR * 0.1, LR * 0.1, LR * 0.1 * 0.1]
    assert rates_of(recorder)[::BATCHES] == pytest.approx(expected)


def test_a_function_gives_the_rate_of_each_step() -> None:
    def rate(step: int) -> float:
        return 0.1 / (step + 1)

    assert rates_of(train(LearningRateScheduler(rate))) == [0.1 / (step + 1) for step in range(STEPS)]


def test_a_function_of_the_epoch() -> None:
    rates = rates_of(train(LearningRateScheduler(lambda epoch: 0.5**epoch, interval="epoch")))
    assert rates == [0.5**epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]


def test_a_function_gives_the_largest_groups_rate_and_the_others_keep_their_share() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "lr": 0.1}]
    trainer = Trainer(model, torch.optim.SGD(groups), loss=torch.nn.functional.cross_entropy)
    seen: list[float] = []

    class Look(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            seen[:] = [group["lr"] for group in point.optimizer.param_groups]

    trainer.train(tiny_batches(2), max_steps=2, callbacks=[LearningRateScheduler(lambda step: 4.0), Look()])
    assert seen == [pytest.approx(0.4), 4.0]


def test_a_rate_set_by_hand_scales_what_a_function_gives() -> None:
    class Halve(Callback):
        @decides
        def on_epoch_start(self, event: EpochStart, run: Run) -> None:
            if event.epoch == 1:
                run.set_lr_nowait(0.5)

    rates = rates_of(train(LearningRateScheduler(lambda step: 1.0), Halve()))
    assert rates == [1.0] * BATCHES + [0.5] * (STEPS - BATCHES)


@pytest.mark.parametrize("bad", [None, True, "0.1", -1.0, float("nan"), float("inf")])
def test_a_function_that_returns_no_rate_ends_the_run_and_says_for_which_step(bad: Any) -> None:
    schedule = LearningRateScheduler(lambda step: 0.1 if step < 2 else bad)
    with pytest.raises(ValueError, match=re.escape(f"for step 2 it returned {bad!r}")):
        train(schedule)


@pytest.mark.parametrize(
    ("function", "interval", "words"),
    [
        (lambda: 0.1, None, "the number of steps done, and return the learning rate; its signature is ()"),
        (lambda epoch, lr: lr, "epoch", "the number of epochs done"),
    ],
)
def test_a_function_of_something_else_is_refused(function: Any, interval: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        LearningRateScheduler(function, interval=interval)


def test_instance() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    recorder = Recorder()
    callbacks = [recorder, LearningRateScheduler(ExponentialLR(optimizer, gamma=0.5), interval="step")]
    tiny_trainer(model=model, optimizer=optimizer).train(tiny_batches(3), epochs=1, callbacks=callbacks)
    assert rates_of(recorder) == [LR, LR * 0.5, LR * 0.5 * 0.5]


def test_beside_slow_and_failing_observers_the_rates_are_the_same() -> None:
    alone = train(LearningRateScheduler("cosine"))
    beside = train(LearningRateScheduler("cosine"), SlowCallback(0.001), FailingCallback(EpochEnd))
    assert rates_of(alone) == rates_of(beside)


# A person and a schedule ---------------------------------------------------------------------------


class SetAt(Callback):
    """Sets the rate at the start of an epoch."""

    def __init__(self, epoch: int, lr: float) -> None:
        self.epoch, self.lr = epoch, lr

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == self.epoch:
            run.set_lr_nowait(self.lr)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "one_cycle", "step", "exponential"])
def test_schedule_goes_on_multiplied_from_where_it_was_set(name: str) -> None:
    arguments, _ = (BY_STEP | BY_EPOCH)[name]
    alone = rates_of(train(LearningRateScheduler(name, **arguments)))
    recorder = train(LearningRateScheduler(name, **arguments), SetAt(2, 2 * alone[2 * BATCHES]))
    half = 2 * BATCHES
    assert rates_of(recorder)[:half] == alone[:half]
    assert rates_of(recorder)[half:] == pytest.approx([2 * rate for rate in alone[half:]])
    (by_command,) = [event for event in recorder.of(LearningRateChanged) if event.source == "command"]
    assert by_command.lr == 2 * alone[half]


# The plateau ---------------------------------------------------------------------------------------


class Scripted(Trainer):
    """Validates with losses from a list, one for each epoch."""

    losses: list[float]

    def validation_step(self, batch: Any) -> torch.Tensor:
        return torch.tensor(self.losses[self.epoch])


def plateau_trainer(losses: list[float], **knobs: Any) -> Trainer:
    trainer = tiny_trainer(Scripted, lr=LR, on_nonfinite="warn", **knobs)
    assert isinstance(trainer, Scripted)
    trainer.losses = losses
    return trainer


def train_plateau(
    losses: list[float], scheduler: LearningRateScheduler, *others: Callback, **knobs: Any
) -> Recorder:
    recorder = Recorder()
    plateau_trainer(losses, **knobs).train(
        tiny_batches(1), tiny_batches(1), epochs=len(losses), callbacks=[recorder, scheduler, *others]
    )
    return recorder


NAN = float("nan")


PLATEAUS = [
    pytest.param("min", 2, [1, 1, 1, 1, 1, 1, 1], [4, 7], id="flat-fires-beyond-patience"),
    pytest.param("min", 0, [1, 2, 3], [2, 3], id="no-patience"),
    pytest.param("min", 1, [3, 2, 1, 0.5, 0.4], [], id="improving"),
    pytest.param("min", 1, [NAN, NAN, 1, 0.5], [2], id="nan-first-is-a-miss"),
    pytest.param("min", 1, [1, NAN, 0.5, NAN, NAN, 0.1], [5], id="nan-in-the-middle"),
    pytest.param("min", 1, [0.0, 0.0, 0.0, -1.0], [3], id="zero"),
    pytest.param("min", 1, [1, 1, 0.5, 0.5, 0.5], [5], id="recovery-counts-anew"),
    pytest.param("min", 1, [3, 2, 1, 1, 1], [5], id="improving-then-flat"),
    pytest.param("min", 1, [1, 1, 1, 0.5, 0.5], [3], id="tie-is-a-miss"),
    pytest.param("max", 1, [1, 2, 3, 3, 3], [5], id="max"),
]


@pytest.mark.parametrize(("mode", "patience", "losses", "reduced_after"), PLATEAUS)
def test_plateau_keeps_torchs_rule(
    mode: Any, patience: int, losses: list[float], reduced_after: list[int]
) -> None:
    scheduler = LearningRateScheduler(
        "reduce_on_plateau", monitor="val_loss", mode=mode, patience=patience, factor=0.5
    )
    recorder = train_plateau([float(loss) for loss in losses], scheduler)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    torchs = ReduceLROnPlateau(optimizer, mode=mode, patience=patience, factor=0.5)
    expected = []
    for loss in losses:
        expected.append(optimizer.param_groups[0]["lr"])
        torchs.step(loss)
    assert rates_of(recorder) == expected
    changed = recorder.of(LearningRateChanged)
    assert [event.epoch + 1 for event in changed] == reduced_after
    assert all((event.source, event.lr) == ("schedule", event.previous * 0.5) for event in changed)


@pytest.mark.parametrize(("mode", "patience", "losses", "reduced_after"), PLATEAUS)
@pytest.mark.anyio
async def test_plateau_is_the_same_beside_slow_and_failing_observers(
    mode: Any, patience: int, losses: list[float], reduced_after: list[int]
) -> None:
    recorder, slow, failing = Recorder(), SlowCallback(0.001), FailingCallback(ValidationEnd)
    scheduler = LearningRateScheduler("reduce_on_plateau", monitor="val_loss", mode=mode, patience=patience)
    callbacks = [slow, recorder, scheduler, failing]
    trainer = plateau_trainer([float(loss) for loss in losses])
    await trainer.train_async(tiny_batches(1), tiny_batches(1), epochs=len(losses), callbacks=callbacks)
    assert [event.epoch + 1 for event in recorder.of(LearningRateChanged)] == reduced_after
    assert slow.handled and failing.raised


@pytest.mark.parametrize(
    ("mode", "losses", "reduced_after"),
    [
        pytest.param("min", [-5, -5, -5, -5], [3], id="flat"),
        pytest.param("min", [-5, -4.9999, -4.9998, -4.9997], [3], id="creeps-the-wrong-way"),
        pytest.param("min", [-1, -2, -3, -4], [], id="improving"),
        pytest.param("min", [1, -1, -1, -1], [4], id="from-positive"),
        pytest.param("min", [-1, -1.00005, -1.00009, -2], [3], id="less-than-the-threshold"),
        pytest.param("max", [-1, -1, -1, -1], [3], id="max-flat"),
        pytest.param("max", [-1, -1.00005, -1.0001, -1.0002], [3], id="max-creeps-the-wrong-way"),
        pytest.param("max", [-4, -3, -2, 1], [], id="max-improving"),
    ],
)
def test_plateau_of_a_negative_metric(mode: Any, losses: list[float], reduced_after: list[int]) -> None:
    """Where torch's own, in its default `threshold_mode="rel"`, takes worse for better."""
    scheduler = LearningRateScheduler("reduce_on_plateau", monitor="val_loss", mode=mode, patience=1)
    recorder = train_plateau([float(loss) for loss in losses], scheduler)
    assert [event.epoch + 1 for event in recorder.of(LearningRateChanged)] == reduced_after


def test_torchs_own_plateau_misjudges_negative_metrics() -> None:
    """When this fails, torch has mended it, and `ReduceOnPlateau` can go."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    torchs = ReduceLROnPlateau(optimizer, patience=1)
    for number in range(100):
        torchs.step(-5 + number * 1e-4)
    assert optimizer.param_groups[0]["lr"] == LR


def test_plateau_watches_what_the_run_watches() -> None:
    recorder = train(LearningRateScheduler("reduce_on_plateau", patience=0, threshold=10.0))
    assert len(recorder.of(LearningRateChanged)) == EPOCHS  # by train_loss, which no value of it satisfies


def test_plateau_takes_the_trainers_direction() -> None:
    scheduler = LearningRateScheduler("reduce_on_plateau", patience=0, factor=0.5)
    recorder = train_plateau([1.0, 2.0, 3.0], scheduler, monitor="val_loss", mode="max")
    assert recorder.of(LearningRateChanged) == []


def test_plateau_instance_keeps_its_own_direction() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    plateau = ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)
    scheduler = LearningRateScheduler(plateau, monitor="val_loss", mode="max")
    recorder = train_plateau([1.0, 2.0, 1.0], scheduler, model=model, optimizer=optimizer)
    assert [event.epoch for event in recorder.of(LearningRateChanged)] == [2]


def test_plateau_instance_for_the_other_direction_is_refused() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    plateau = ReduceLROnPlateau(optimizer, mode="max")
    with pytest.raises(ConfigError, match="mode='min', but the plateau has mode='max'"):
        LearningRateScheduler(plateau, monitor="val_loss", mode="min")
    scheduler = LearningRateScheduler(plateau, monitor="val_loss")
    with pytest.raises(ConfigError, match="has mode='max', but less of its metric 'val_loss' is better"):
        train_plateau([1.0, 2.0], scheduler, model=model, optimizer=optimizer)


def test_plateau_instance_says_the_direction_where_the_metric_does_not() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = LearningRateScheduler(ReduceLROnPlateau(optimizer, mode="max"), monitor="val_blub")
    with pytest.raises(MetricNotFoundError, match="val_blub"):
        train_plateau([1.0], scheduler, model=model, optimizer=optimizer)


@pytest.mark.parametrize("first", [True, False])
def test_plateau_is_not_turned_to_what_another_callback_watches(first: bool, tmp_path: Path) -> None:
    """The validation's loss improves all the time, which is all that a plateau of it looks at."""
    plateau = LearningRateScheduler("reduce_on_plateau", patience=0)
    others = [ModelCheckpoint("train_accuracy"), EarlyStopping("train_accuracy", patience=9)]
    trainer = plateau_trainer([4.0, 3.0, 2.0, 1.0], run_dir=str(tmp_path))
    recorder = Recorder()
    trainer.train(
        tiny_batches(1),
        tiny_batches(1),
        epochs=4,
        metrics={"train": ["accuracy"]},
        callbacks=[recorder, *([plateau, *others] if first else [*others, plateau])],
    )
    assert recorder.of(LearningRateChanged) == []


def test_plateau_without_the_validation_that_it_watches_fails_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"monitor='val_loss' needs a validation"):
        train(LearningRateScheduler("reduce_on_plateau", monitor="val_loss"))


def test_plateau_of_a_metric_without_a_direction_asks_for_it() -> None:
    with pytest.raises(ConfigError, match="check the spelling, or give mode="):
        train_plateau([1.0], LearningRateScheduler("reduce_on_plateau", monitor="val_blub"))


# One run after the other ----------------------------------------------------------------------------


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: each for key, each in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("name", [*BY_STEP, *BY_EPOCH, "reduce_on_plateau"])
def test_second_run_has_the_rates_of_the_first(name: str, warmup: int) -> None:
    arguments, _ = {**BY_STEP, **BY_EPOCH}.get(name, ({"patience": 0, "threshold": 10.0}, None))
    recorder = Recorder()
    trainer = tiny_trainer(
        lr=LR, callbacks=[LearningRateScheduler(name, warmup=warmup, **arguments), recorder]
    )
    runs = []
    for _ in range(3):
        trainer.train(tiny_batches(BATCHES), epochs=EPOCHS)
        runs.append(rates_of(recorder))
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) > 1


def test_second_run_begins_with_the_momentum_of_the_first() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    given = options_of(optimizer)
    trainer = tiny_trainer(model=model, optimizer=optimizer)
    trainer.train(tiny_batches(BATCHES), epochs=2, callbacks=[LearningRateScheduler("one_cycle")])
    assert options_of(optimizer) != given
    trainer.train(tiny_batches(1), epochs=1)
    assert options_of(optimizer) == given


def test_instance_begins_each_run_where_it_stood_before_the_first() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = LearningRateScheduler(CosineAnnealingLR(optimizer, T_max=STEPS), interval="step")
    recorder = Recorder()
    trainer = tiny_trainer(model=model, optimizer=optimizer, callbacks=[schedule, recorder])
    trainer.train(tiny_batches(BATCHES), epochs=EPOCHS)
    first = rates_of(recorder)
    trainer.train(tiny_batches(BATCHES), epochs=EPOCHS)
    assert rates_of(recorder) == first


def test_rate_that_was_set_between_two_runs_is_what_the_second_begins_with() -> None:
    recorder = Recorder()
    trainer = tiny_trainer(lr=LR, callbacks=[LearningRateScheduler("cosine"), recorder])
    trainer.train(tiny_batches(BATCHES), epochs=EPOCHS)
    first = rates_of(recorder)
    trainer.optimizer.param_groups[0]["lr"] = 2 * LR
    trainer.train(tiny_batches(BATCHES), epochs=EPOCHS)
    assert rates_of(recorder) == pytest.approx([2 * rate for rate in first])


def test_run_without_the_schedule_has_the_rate_that_was_given() -> None:
    trainer, recorder = tiny_trainer(lr=LR), Recorder()
    trainer.train(tiny_batches(BATCHES), epochs=1, callbacks=[LearningRateScheduler("linear")])
    trainer.train(tiny_batches(BATCHES), epochs=1, callbacks=[recorder])
    assert rates_of(recorder) == [LR] * BATCHES


@pytest.mark.parametrize("how", ["failed", "stopped", "cancelled"])
def test_run_after_one_that_broke_off_begins_with_the_given_rates(how: str) -> None:
    class Break(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 2:
                if how == "failed":
                    raise RuntimeError("broken")
                point.run.cancel() if how == "cancelled" else point.run.stop_nowait()

    trainer = tiny_trainer(lr=LR)
    with contextlib.suppress(RuntimeError):
        trainer.train(tiny_batches(9), epochs=1, callbacks=[LearningRateScheduler("cosine"), Break()])
    assert options_of(trainer.optimizer)[0]["lr"] < LR
    trainer.train(tiny_batches(1), epochs=1, callbacks=[recorder := Recorder()])
    assert rates_of(recorder) == [LR]


def test_after_a_run_checkpoint_and_optimizer_have_its_last_rates(tmp_path: Path) -> None:
    trainer = tiny_trainer(lr=LR, run_dir=str(tmp_path), run_name="run")
    trainer.train(
        tiny_batches(BATCHES), epochs=1, callbacks=[LearningRateScheduler("linear"), ModelCheckpoint()]
    )
    state: Any = CheckpointReader(tmp_path / "run").load().state
    assert state["optimizers"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0)
    assert options_of(trainer.optimizer)[0]["lr"] == pytest.approx(0.0)


def test_schedule_of_the_trainer_goes_on_in_the_next_run() -> None:
    model, recorder = tiny_model(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = ExponentialLR(optimizer, gamma=0.5)
    trainer = tiny_trainer(model=model, optimizer=optimizer, scheduler=schedule, callbacks=[recorder])
    for expected in (LR, LR / 2, LR / 4):
        trainer.train(tiny_batches(1), epochs=1)
        assert rates_of(recorder) == [expected]


# Arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cosin",), "there is no schedule 'cosin'; there are reduce_on_plateau, cosine, step"),
        (
            ("StepLR",),
            r"others by torch's class: LearningRateScheduler\(torch.optim.lr_scheduler.MultiStepLR",
        ),
        (
            ("cosine", {"warmup_steps": 5}),
            "LearningRateScheduler itself takes interval, monitor, mode, warmup and",
        ),
        ((lambda step: 0.1, {"warmup": 5}), "let the function itself rise"),
        ((lambda step: 0.1, {"gamma": 5}), "a function takes no arguments, got gamma"),
        (("cosine", {"eta_mni": 0.0}), "CosineAnnealingLR takes no 'eta_mni'; legal are T_max, eta_min"),
        (
            ("reduce_on_plateau", {"paitence": 3}),
            "ReduceOnPlateau takes no 'paitence'; legal are mode, factor",
        ),
        (("step",), "StepLR needs step_size=.*; legal are step_size, gamma"),
        (("exponential",), "ExponentialLR needs gamma="),
        ((MultiStepLR,), "MultiStepLR needs milestones="),
        (("cosine", {"interval": "batch"}), "interval must be 'epoch' or 'step', got 'batch'"),
        (("cosine", {"warmup": -1}), "warmup must be a whole number of at least 0"),
        (("cosine", {"warmup": 1.5}), "warmup must be a whole number of at least 0"),
        (("cosine", {"monitor": "val_loss"}), "is for reduce_on_plateau"),
        (("reduce_on_plateau", {"monitor": "loss"}), "monitor must begin with train_ or val_"),
        ((3,), "scheduler must be a name, a torch scheduler class, an instance, or a function .*; got 3"),
        ((torch.nn.Linear,), "scheduler must be a name, a torch scheduler class, an instance, or a function"),
    ],
)
def test_wrong_argument_is_refused_at_once(arguments: Any, text: str) -> None:
    scheduler, options = arguments if len(arguments) == 2 else (*arguments, {})
    with pytest.raises(ConfigError, match=text):
        LearningRateScheduler(scheduler, **options)


def test_class_that_takes_anything_is_given_anything() -> None:
    seen = {}

    class Loose(StepLR):
        def __init__(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
            seen.update(options)
            super().__init__(optimizer, step_size=1)

    train(LearningRateScheduler(Loose, anything=1))
    assert seen == {"anything": 1}


def test_instance_takes_no_arguments() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    with pytest.raises(ConfigError, match="an instance is complete"):
        LearningRateScheduler(StepLR(optimizer, 1), gamma=0.5)


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no optimizer 'judge'; there are optimizer"):
        train(LearningRateScheduler("cosine", optimizer="judge"))


# Resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "step"), [(0, 3), (0, 5), (4, 3), (4, 7)])
@pytest.mark.parametrize("name", [*BY_STEP, *BY_EPOCH, "reduce_on_plateau"])
def test_resumed_run_has_the_same_rates(tmp_path: Path, name: str, warmup: int, step: int) -> None:
    arguments, _ = (BY_STEP | BY_EPOCH | {"reduce_on_plateau": ({"patience": 0, "threshold": 9.0}, None)})[
        name
    ]
    check_resumed_rates(tmp_path, step, lambda: LearningRateScheduler(name, warmup=warmup, **arguments))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_resumed_run_has_the_rates_of_its_function(tmp_path: Path, interval: Any) -> None:
    check_resumed_rates(tmp_path, 5, lambda: LearningRateScheduler(lambda n: 1 / (n + 1), interval=interval))


def check_resumed_rates(tmp_path: Path, step: int, make: Callable[[], LearningRateScheduler]) -> None:

    def run(run_name: str, *more: Callback, resume: Any = None) -> list[float]:
        recorder = Recorder()
        config = TrainerConfig(run_dir=str(tmp_path), run_name=run_name)
        tiny_trainer(lr=LR, config=config).train(
            tiny_batches(BATCHES),
            epochs=EPOCHS,
            callbacks=[recorder, make(), ModelCheckpoint(save_best_only=True), *more],
            resume=resume,
        )
        return rates_of(recorder)

    whole = run("whole")
    first = run("parts", StopAfter(step))
    assert first == whole[:step]
    assert run("parts", resume="auto") == whole[step:]


# One cycle has an end ------------------------------------------------------------------------------


def one_cycle_run(directory: Path, *, resume: str | None = None, epochs: int, **arguments: Any) -> Recorder:
    callbacks = [LearningRateScheduler("one_cycle", **arguments), ModelCheckpoint()]
    recorder = Recorder()
    trainer = tiny_trainer(run_dir=str(directory), run_name="cycle", callbacks=[recorder, *callbacks])
    trainer.train(tiny_batches(BATCHES), epochs=epochs, resume=resume)
    return recorder


def test_finished_one_cycle_that_is_resumed_with_more_epochs_is_refused_before_a_step(tmp_path: Path) -> None:
    one_cycle_run(tmp_path, epochs=2)
    with pytest.raises(
        ConfigError, match=r"made for 6 steps and has 0 left, but the run has 6 to go.*total_s"
    ):
        one_cycle_run(tmp_path, resume="auto", epochs=4)
    assert one_cycle_run(tmp_path, resume="auto", epochs=2).of(StepEnd) == []  # what there was is fine


def test_one_cycle_made_for_the_whole_length_goes_on(tmp_path: Path) -> None:
    whole = rates_of(one_cycle_run(tmp_path / "whole", epochs=4))
    first = rates_of(one_cycle_run(tmp_path / "parts", epochs=2, total_steps=4 * BATCHES))
    rest = rates_of(one_cycle_run(tmp_path / "parts", epochs=4, total_steps=4 * BATCHES, resume="auto"))
    assert first + rest == whole


def test_one_cycle_of_the_users_own_that_is_too_short_is_refused_before_a_step() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = OneCycleLR(optimizer, max_lr=LR, total_steps=5)
    trainer = Trainer(
        model,
        optimizer,
        loss=torch.nn.functional.cross_entropy,
        scheduler=schedule,
        scheduler_interval="step",
    )
    with pytest.raises(ConfigError, match="made for 5 steps and has 5 left, but the run has 6 to go"):
        trainer.train(tiny_batches(BATCHES), epochs=2)
    trainer.train(tiny_batches(BATCHES), max_steps=5)
    assert schedule.last_epoch == 5
