"""engine/session/thread_state.py: what torch keeps for each thread, around a call that trains in another one."""

import logging
from typing import Any

import anyio
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offloop.engine import ConfigError, Trainer
from offloop.engine.testing import tiny_loader, tiny_trainer


class Watched(torch.nn.Linear):
    """Notes the dtype that it computes in."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        self.dtypes.add(outputs.dtype)
        return outputs


BATCHES = [(torch.randn(8, 4), torch.arange(8) % 3)] * 2


def watched_trainer(**knobs: Any) -> tuple[Trainer, Watched]:
    model = Watched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, loss=torch.nn.functional.cross_entropy, device="cpu", **knobs), model


def test_training_under_autocast_is_refused_with_the_knob_to_use() -> None:
    trainer, _ = watched_trainer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ConfigError, match=r"give Trainer\(precision='bf16-mixed'\)"):
            trainer.train(BATCHES, epochs=1)
        with pytest.raises(ConfigError, match=r"give Trainer\(precision='bf16-mixed'\)"):
            trainer.find_learning_rate(BATCHES)
    assert trainer.train(BATCHES, epochs=1).status == "completed"


def test_autocast_that_says_what_precision_says_or_is_of_another_device_changes_nothing() -> None:
    trainer, model = watched_trainer(precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trainer.train(BATCHES, epochs=1)
    assert model.dtypes == {torch.bfloat16}
    trainer, model = watched_trainer()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        trainer.train(BATCHES, epochs=1)
    assert model.dtypes == {torch.float32}


@pytest.mark.anyio
async def test_autocast_holds_in_evaluations_and_predictions_beside_the_event_loop() -> None:
    trainer, model = watched_trainer()
    with anyio.fail_after(60), torch.autocast("cpu", dtype=torch.bfloat16):
        await trainer.evaluate_async(BATCHES)
        assert model.dtypes == {torch.bfloat16}
        async with trainer.predict_async(BATCHES) as stream:
            assert [outputs.dtype async for outputs in stream] == [torch.bfloat16] * 2


def test_saved_tensor_hooks_hold_in_the_training_thread() -> None:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiny_trainer().train(tiny_loader(1), epochs=1)
    assert packed
    packed.clear()
    tiny_trainer().train(tiny_loader(1), epochs=1)
    assert not packed


def test_a_backward_pass_in_one_thread_is_one_in_the_training_thread() -> None:
    seen: list[bool] = []

    class Looks(Trainer):
        def training_step(self, batch: Any) -> Any:
            seen.append(torch._C._is_multithreading_enabled())
            return self.model(batch[0]).sum()

    model = Watched()
    trainer = Looks(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    with torch.autograd.set_multithreading_enabled(False):
        trainer.train(BATCHES[:1], epochs=1)
    trainer.train(BATCHES[:1], epochs=1)
    assert seen == [False, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_the_caller_has(mode: Any) -> None:
    trainer, _ = watched_trainer()
    with mode():
        assert trainer.train(BATCHES, epochs=1).status == "completed"


def test_a_mode_that_would_see_nothing_is_refused() -> None:
    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    trainer, _ = watched_trainer()
    mode: Any = Counts
    with (
        mode(),
        pytest.raises(ConfigError, match=r"started inside Counts, a mode .* enter it in training_step"),
    ):
        trainer.train(BATCHES, epochs=1)


def test_a_profiler_that_would_record_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with torch.autograd.profiler.profile(use_kineto=False) as _:
        tiny_trainer().train(tiny_loader(1), epochs=1)
    records = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert ["add Profiler() to callbacks" in each.getMessage() for each in records] == [True]
