"""A schedule goes on where it was, over the length that the script gives it now."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import Cut
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from offloop.callbacks import LearningRateScheduler, ModelCheckpoint
from offloop.engine import Callback, ConfigError, Resumed, StepEnd
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(4)
LR = 0.1


def run(
    directory: Path,
    steps: int,
    *callbacks: Callback,
    make: Any = None,
    resume: str | None = None,
    interval: str = "step",
) -> tuple[list[float], Resumed | None]:
    """Rates of the steps, and what a resumed run says."""
    model, recorder = tiny_model(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = None if make is None else make(optimizer, steps)
    trainer = tiny_trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_interval=interval,
        run_dir=directory,
        run_name="run",
    )
    trainer.train(
        BATCHES, max_steps=steps, resume=resume, callbacks=[*callbacks, ModelCheckpoint(), recorder]
    )
    said = recorder.of(Resumed)
    return [event.lr for event in recorder.of(StepEnd)], said[0] if said else None


def by_name(name: str) -> Any:
    return lambda: ([LearningRateScheduler(name)], None)


def given(make: Any) -> Any:
    return lambda: ([], make)


def warm(optimizer: Any, steps: int) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, steps - 3)]
    return SequentialLR(optimizer, parts, [3])


SCHEDULES = {
    "cosine": by_name("cosine"),
    "linear": by_name("linear"),
    "polynomial": by_name("polynomial"),
    "with a warm-up": lambda: ([LearningRateScheduler("cosine", warmup=3)], None),
    "CosineAnnealingLR": given(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)),
    "PolynomialLR": given(lambda optimizer, steps: PolynomialLR(optimizer, steps)),
    "SequentialLR": given(warm),
    "LambdaLR": given(lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1 - step / steps)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("done", [2, 7, 12])  # while it warms up, in its middle, at its end
def test_longer_run_follows_the_longer_schedule(name: str, done: int, tmp_path: Path) -> None:
    def parts() -> Any:
        return SCHEDULES[name]()

    callbacks, make = parts()
    whole, _ = run(tmp_path / "whole", 24, *callbacks, make=make)
    callbacks, make = parts()
    run(tmp_path / "cut", 12, *callbacks, Cut(done), make=make)
    callbacks, make = parts()
    rest, said = run(tmp_path / "cut", 24, *callbacks, make=make, resume="must")
    assert said is not None
    if name == "LambdaLR":  # its function is asked at the end of each step
        assert rest[1:] == pytest.approx(whole[done + 1 :])
    else:
        assert rest == pytest.approx(whole[done:])
        assert said.exactness == "approximate"
        (text,) = said.from_script
        assert "=2" in text and "continues over" in text


@pytest.mark.parametrize("name", ["cosine", "SequentialLR", "with a warm-up"])
def test_run_of_the_same_length_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    callbacks, make = SCHEDULES[name]()
    whole, _ = run(tmp_path / "whole", 12, *callbacks, make=make)
    callbacks, make = SCHEDULES[name]()
    first, _ = run(tmp_path / "cut", 12, *callbacks, Cut(5), make=make)
    callbacks, make = SCHEDULES[name]()
    rest, said = run(tmp_path / "cut", 12, *callbacks, make=make, resume="must")
    assert first + rest == whole
    assert said is not None
    assert (said.exactness, said.kept, said.from_script) == ("bitwise", (), ())


def test_longer_one_cycle_is_refused(tmp_path: Path) -> None:
    def make(optimizer: Any, steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, LR, total_steps=steps)

    run(tmp_path, 12, make=make)
    with pytest.raises(ConfigError, match="was made for 12 steps and has 0 left, but the run has 12 to go"):
        run(tmp_path, 24, make=make, resume="must")


def test_rate_that_a_person_has_set_stays_set_in_a_longer_schedule(tmp_path: Path) -> None:
    class Half(Cut):
        def stop(self, point: Any) -> None:
            point.run.set_lr_nowait(point.optimizer.param_groups[0]["lr"] / 2)
            super().stop(point)

    run(tmp_path, 12, LearningRateScheduler("cosine"), Half(6))
    rates, _ = run(tmp_path, 24, LearningRateScheduler("cosine"), resume="must")
    assert rates[0] == pytest.approx(LR / 2 * (1 + math.cos(math.pi * 6 / 24)) / 2)


class Ramp:
    """A schedule's function with a setting of its own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.length)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (
            lambda optimizer, _: StepLR(optimizer, 3, gamma=0.5),
            lambda optimizer, _: StepLR(optimizer, 9, gamma=0.1),
            (
                "gamma of StepLR is 0.5, the script has 0.1",
                "step_size of StepLR is 3, the script has 9",
            ),
        ),
        (
            lambda optimizer, _: LambdaLR(optimizer, Ramp(4)),
            lambda optimizer, _: LambdaLR(optimizer, Ramp(8)),
            ("lr_lambda 0: length of LambdaLR is 4, the script has 8",),
        ),
    ],
)
def test_other_settings_are_kept_and_said(first: Any, second: Any, kept: Any, tmp_path: Path) -> None:
    run(tmp_path, 6, make=first)
    _, said = run(tmp_path, 8, make=second, resume="must")
    assert said is not None
    assert said.kept == kept


def test_settings_of_a_plateau_are_kept_and_said(tmp_path: Path) -> None:
    run(tmp_path, 6, make=lambda optimizer, _: ReduceLROnPlateau(optimizer, patience=3), interval="epoch")
    _, said = run(
        tmp_path,
        8,
        make=lambda optimizer, _: ReduceLROnPlateau(optimizer, patience=1),
        interval="epoch",
        resume="must",
    )
    assert said is not None
    assert said.kept == ("patience of ReduceLROnPlateau is 3, the script has 1",)


def test_schedules_that_come_and_go_are_said(tmp_path: Path) -> None:
    run(tmp_path, 4)
    _, said = run(tmp_path, 8, LearningRateScheduler("step", step_size=9), resume="must")
    assert said is not None
    assert (said.exactness, "schedule StepLR is new" in said.reasons) == ("approximate", True)
    _, said = run(tmp_path, 12, resume="must")
    assert said is not None
    assert "is missing" in said.reasons


# Another learning rate -----------------------------------------------------------------------------


def lr_run(directory: Path, steps: int, lr: float | None, *callbacks: Callback, resume: Any = "must") -> Any:
    recorder = Recorder()
    trainer = tiny_trainer(lr=LR, run_dir=directory, run_name="run")
    trainer.train(
        BATCHES,
        max_steps=steps,
        resume=resume,
        resume_lr=lr,
        callbacks=[*callbacks, ModelCheckpoint(), recorder],
    )
    said = recorder.of(Resumed)
    return [event.lr for event in recorder.of(StepEnd)], said[0] if said else None


def test_resumed_run_goes_on_with_another_rate_which_is_set_once(tmp_path: Path) -> None:
    cosine = LearningRateScheduler("cosine", T_max=10)
    lr_run(tmp_path, 3, None, cosine, resume=None)
    rates, said = lr_run(tmp_path, 6, 0.01, LearningRateScheduler("cosine", T_max=10))
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] < rates[0]  # the schedule goes on from there
    assert (said.exactness, said.from_script) == ("approximate", ("the learning rate, 0.01",))
    again, said = lr_run(tmp_path, 8, 0.01, LearningRateScheduler("cosine", T_max=10))
    assert rates[-1] > again[0] > again[1]
    assert (said.exactness, said.from_script) == ("bitwise", ())


def test_rate_to_go_on_with_is_not_used_where_nothing_is_resumed(tmp_path: Path) -> None:
    rates, _ = lr_run(tmp_path, 2, 0.01, resume="auto")
    assert rates == [LR, LR]


@pytest.mark.parametrize(
    ("lr", "resume", "text"),
    [
        (0.0, "auto", "resume_lr must be a finite number above 0, got 0.0"),
        (True, "auto", "must be a finite number"),
        (0.1, None, 'give resume="auto" too'),
    ],
)
def test_rate_to_go_on_with_is_checked(lr: Any, resume: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        lr_run(tmp_path, 2, lr, resume=resume)
