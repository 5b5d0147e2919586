"""Trainer.state_dict: what goes into a file of one's own, and continues from there."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from offloop.engine import Callback, ConfigError, StepEnd, StepPoint, Trainer, TrainerBusyError, in_step
from offloop.engine.testing import EndlessLoader, Recorder, tiny_batches, tiny_model, tiny_trainer

BATCHES = tiny_batches(6)
LONG = 60


def make(**knobs: Any) -> Trainer:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    return tiny_trainer(model=model, optimizer=optimizer, scheduler=scheduler, **knobs)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_a_trainer_goes_on_from_a_file_of_ones_own_bit_for_bit(tmp_path: Path) -> None:
    first = make()
    first.train(BATCHES, epochs=2)
    torch.save({"mine": 3, "trainer": first.state_dict()}, tmp_path / "state.pt")
    first.train(BATCHES, epochs=1)

    second = make()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state["trainer"])
    assert second.optimizer.param_groups[0]["lr"] == 0.02 * 0.5**2
    result = second.train(BATCHES, epochs=1)
    assert result.epochs == 1  # a new run
    assert all(map(torch.equal, weights(first), weights(second)))


class Big(Trainer):
    """Its gradients overflow float16 at the usual scale."""

    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch)["loss"] * 4.0  # type: ignore[index]


def steps_of(trainer: Trainer, batches: Any) -> list[StepEnd]:
    recorder = Recorder()
    trainer.train(batches, epochs=1, callbacks=[recorder])
    return recorder.of(StepEnd)


def test_the_loss_scale_is_shown_saved_and_goes_on() -> None:
    first = tiny_trainer(Big, precision="16-mixed")
    steps = steps_of(first, BATCHES)
    assert steps[0].skipped
    scale = steps[-1].metrics["loss_scale"]
    assert scale <= 16384.0  # from 65536: it has backed off
    state = first.state_dict()
    assert state["scaler"]["scale"] == scale

    second = tiny_trainer(Big, precision="16-mixed")
    second.load_state_dict(state)
    for trainer in (first, second):  # a trainer's own goes on, too
        (step,) = steps_of(trainer, BATCHES[:1])
        assert step.metrics["loss_scale"] in (scale, scale / 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: {}, "state must be what Trainer.state_dict"),
        (lambda state: state["model"], "state must be what Trainer.state_dict"),
        (
            lambda state: {**state, "optimizers": {"a": {}}},
            "the state is of optimizers a; there are optimizer",
        ),
        (
            lambda state: {key: value for key, value in state.items() if key != "scheduler"},
            "Trainer has a scheduler, the state has none",
        ),
    ],
)
def test_another_state_is_refused(change: Any, text: str) -> None:
    trainer = make()
    before = weights(trainer)
    with pytest.raises(ConfigError, match=text):
        trainer.load_state_dict(change(make().state_dict()))
    assert all(map(torch.equal, before, weights(trainer)))
    trainer.load_state_dict(make().state_dict())


@pytest.mark.anyio
async def test_during_a_run_it_is_the_training_threads() -> None:
    class Takes(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            assert set(point.trainer.state_dict()) == {"model", "optimizers", "scheduler"}

    trainer = make()
    with anyio.fail_after(LONG):
        async with trainer.start(EndlessLoader(), max_time=3600, callbacks=[Takes()]) as run:
            with pytest.raises(
                TrainerBusyError, match=r"await run\.call\(lambda trainer: trainer\.state_dict"
            ):
                trainer.state_dict()
            with pytest.raises(TrainerBusyError, match="this trainer has run"):
                trainer.load_state_dict({})
            state = await run.call(lambda trainer: trainer.state_dict())
            assert state is not None and set(state["model"]) == set(trainer.model.state_dict())
            await run.stop()
    assert run.result.status == "stopped"
