"""What must hold on a CUDA device: no synchronisation in steady state, order of late events, same arithmetic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offloop.engine import Callback, EpochEnd, StepEnd, StepPoint, Trainer, ValidationEnd, in_step
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.data.batches import DeviceTransfer
from offloop.engine.testing import (
    Recorder,
    reproducible,
    tiny_batches,
    tiny_loader,
    tiny_model,
    tiny_trainer,
)

pytestmark = pytest.mark.gpu

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
FIRST_STRICT_STEP, LAST_STRICT_STEP = 5, 25  # the first steps allocate; the last is followed by a milestone


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def pinned_batches(number: int) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in tiny_batches(number)]


class Strict(Callback):
    """Makes every synchronisation of the training thread an error between two steps."""

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        if point.step == FIRST_STRICT_STEP:
            torch.cuda.set_sync_debug_mode("error")

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == LAST_STRICT_STEP:
            torch.cuda.set_sync_debug_mode("default")


class LogsAll(Trainer):
    def training_step(self, batch: Any) -> Any:
        output: Any = super().training_step(batch)
        self.log("on_device", output["loss"])
        self.log("on_host", torch.tensor(float(self.step)))
        self.log("number", self.step)
        return output


@pytest.fixture
def sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("sync_debug_mode")
@pytest.mark.parametrize(
    "knobs", [{}, {"freeze": "0"}, {"activation_checkpointing": "0"}, {"tf32": True}], ids=str
)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_steady_state_does_not_synchronise(precision: str, accumulate: int, knobs: dict[str, Any]) -> None:
    recorder = Recorder()
    model = tiny_model().cuda()
    trainer = tiny_trainer(
        LogsAll,
        model=model,
        optimizer=fused(model),
        device="cuda",
        precision=precision,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulate,
        callbacks=[recorder, Strict()],
        **knobs,
    )
    trainer.train(pinned_batches(30 * accumulate), epochs=1, metrics=["accuracy"])
    ends = recorder.of(StepEnd)
    assert [end.step for end in ends] == list(range(1, 31))
    assert [end.metrics["number"] for end in ends] == list(range(30))
    assert [end.metrics["on_host"] for end in ends] == list(range(30))
    assert [end.metrics["on_device"] for end in ends] == [end.loss for end in ends]


def test_the_test_above_can_fail() -> None:
    class Reads(Trainer):
        def training_step(self, batch: Any) -> Any:
            output: Any = super().training_step(batch)
            output["loss"].item()
            return output

    model = tiny_model().cuda()
    trainer = tiny_trainer(Reads, model=model, optimizer=fused(model), device="cuda", callbacks=[Strict()])
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            trainer.train(pinned_batches(30), epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_late_events_come_in_order_and_before_the_next_milestone(precision: str) -> None:
    recorder = Recorder()
    model = tiny_model().cuda()
    trainer = tiny_trainer(
        LogsAll,
        model=model,
        optimizer=fused(model),
        device="cuda",
        precision=precision,
        val_every_n_steps=3,
        callbacks=[recorder],
    )
    trainer.train(pinned_batches(8), pinned_batches(2), epochs=2)
    validation = ["ValidationStart", "ValidationEnd"]
    three = ["StepEnd"] * 3
    assert recorder.names() == [
        "TrainStart",
        *("EpochStart", *three, *validation, *three, *validation, "StepEnd", "StepEnd", "EpochEnd"),
        *(
            "EpochStart",
            "StepEnd",
            *validation,
            *three,
            *validation,
            *three,
            *validation,
            "StepEnd",
            "EpochEnd",
        ),
        "TrainEnd",
    ]
    assert [end.step for end in recorder.of(StepEnd)] == list(range(1, 17))
    times = [event.time for event in recorder.of(StepEnd)]
    assert times == sorted(times)
    losses = [end.loss for end in recorder.of(StepEnd) if end.loss is not None]
    assert recorder.of(EpochEnd)[0].metrics["train_loss"] == pytest.approx(sum(losses[:8]) / 8)


def test_steps_are_launched_before_the_values_of_earlier_ones_have_arrived() -> None:
    class Busy(Trainer):
        def training_step(self, batch: Any) -> Any:
            torch.cuda._sleep(20_000_000)  # cycles of the device
            return super().training_step(batch)

    class Launches(Callback):
        under_way = 0

        @in_step
        def after_step(self, point: StepPoint) -> None:
            self.under_way = max(self.under_way, len(point._reporter.readback._under_way))

    recorder, launches = Recorder(), Launches()
    model = tiny_model().cuda()
    trainer = tiny_trainer(
        Busy, model=model, optimizer=fused(model), device="cuda", callbacks=[recorder, launches]
    )
    trainer.train(pinned_batches(10), epochs=1)
    assert launches.under_way > 1
    assert [end.step for end in recorder.of(StepEnd)] == list(range(1, 11))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_deterministic_run_equals_the_hand_written_loop_bit_for_bit(precision: str) -> None:
    batches = tiny_batches(8)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    recorder = Recorder()
    model = tiny_model(dropout=0.3).cuda()
    trainer = tiny_trainer(
        model=model,
        optimizer=fused(model),
        device="cuda",
        precision=precision,
        gradient_clip_val=0.05,
        accumulate_grad_batches=3,
        deterministic=True,
        callbacks=[recorder],
    )
    torch.manual_seed(7)
    trainer.train(batches, epochs=2)

    expected = tiny_model(dropout=0.3).cuda()
    optimizer = fused(expected)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
    losses: list[float] = []
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            for window in (batches[:3], batches[3:6], batches[6:]):
                in_window = []
                for inputs, targets in window:
                    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                        loss = cross_entropy(expected(inputs.cuda()), targets.cuda())
                    scaler.scale(loss / len(window)).backward()
                    in_window.append(loss.item())
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses.append(sum(in_window) / len(in_window))
    finally:
        torch.use_deterministic_algorithms(False)

    assert [end.loss for end in recorder.of(StepEnd)] == losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_a_story_on_the_device_is_the_same_twice() -> None:
    def story() -> Any:
        recorder = Recorder()
        model = tiny_model(dropout=0.5).cuda()
        trainer = tiny_trainer(
            LogsAll,
            model=model,
            optimizer=fused(model),
            device="cuda",
            seed=3,
            deterministic=True,
            callbacks=[recorder],
        )
        trainer.train(tiny_batches(8), tiny_batches(2), epochs=2, metrics=["accuracy"])
        return reproducible(recorder.events)

    assert story() == story()


def test_model_and_optimizer_state_follow_the_device() -> None:
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters())
    tiny_trainer(model=model, optimizer=optimizer).train(tiny_batches(2), epochs=1)
    recorder = Recorder()
    trainer = tiny_trainer(model=model, optimizer=optimizer, device="cuda", callbacks=[recorder])
    result = trainer.train(tiny_batches(2), tiny_batches(2), epochs=1)
    assert result.status == "completed"
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cuda"}
    assert recorder.of(ValidationEnd)[0].metrics["val_loss"] == result.metrics["val_loss"]


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch sees .* CUDA devices here"):
        tiny_trainer(device="cuda:99")


def test_a_checkpoint_has_the_weights_of_its_step_whatever_changes_them_right_after_it(
    tmp_path: Path,
) -> None:
    class SavesAndSpoils(Callback):
        """Takes a checkpoint after each step, and changes the weights while it is being copied."""

        @in_step
        def after_step(self, point: StepPoint) -> None:
            point.run.checkpoint_nowait()
            point.run.call_nowait(self.spoil)

        def spoil(self, trainer: Any) -> None:
            with torch.no_grad():
                trainer.model.weight.add_(1.0)

    class Zeros(Trainer):
        def training_step(self, batch: Any) -> Any:
            return (self.model(batch[0]) * 0.0).sum()

    model = nn.Linear(8192, 8192, bias=False).cuda()  # 256 MB: the copy takes some milliseconds
    with torch.no_grad():
        model.weight.zero_()
    trainer = Zeros(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        device="cuda",
        run_dir=tmp_path,
        run_name="run",
        callbacks=[SavesAndSpoils()],
    )
    trainer.train([(torch.zeros(1, 8192), torch.zeros(1))] * 4, epochs=1)
    reader = CheckpointReader(tmp_path / "run")
    found = {info.step: reader.load_part(info, "model") for info in reader.checkpoints()}
    assert {step: model["weight"].unique().tolist() for step, model in found.items()} == {  # type: ignore[index]
        step: [step - 1.0] for step in found
    }
    assert len(found) >= 2


# The feed, prediction, searches ---------------------------------------------------------------------


@pytest.mark.usefixtures("sync_debug_mode")
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_copied_beside_the_computation_and_arrive_whole(channels_last: bool) -> None:
    feed = DeviceTransfer(torch.device("cuda"), channels_last=channels_last)
    batches = [{"x": [torch.full((64, 3, 32, 32), float(number)).pin_memory()]} for number in range(40)]
    feed(batches[0])  # makes the stream
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches:
        moved = feed(batch)["x"][0]
        torch.cuda._sleep(
            2_000_000
        )  # the device is behind the host, and memory of batches let go of is used again
        assert moved.is_contiguous(memory_format=torch.channels_last) is channels_last
        sums.append(moved.double().mean())
        del moved
    assert feed.has_work()
    torch.cuda.set_sync_debug_mode("default")
    assert [each.item() for each in sums] == [float(number) for number in range(40)]
    torch.cuda.synchronize()
    assert not feed.has_work()


def test_a_copy_does_not_wait_for_the_computation() -> None:
    feed = DeviceTransfer(torch.device("cuda"))
    batch = torch.ones(1024, 1024).pin_memory()
    feed(batch)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    feed(batch)
    assert feed._stream is not None
    feed._stream.synchronize()
    assert feed.has_work(), "the copy is there, and the device still computes"
    torch.cuda.synchronize()


def test_predictions_come_to_the_host() -> None:
    trainer = tiny_trainer(model=tiny_model().cuda(), device="cuda")
    outputs = trainer.predict(pinned_batches(3))
    assert {output.device.type for output in outputs} == {"cpu"}
    with torch.no_grad():
        expected = [trainer.model(inputs.cuda()).cpu() for inputs, _ in pinned_batches(3)]
    assert all(map(torch.equal, outputs, expected))


def test_searches_leave_no_trace_on_the_device() -> None:
    model = tiny_model(dropout=0.3).cuda()
    trainer = tiny_trainer(model=model, optimizer=fused(model), device="cuda")
    loader = tiny_loader(16, shuffle=True)
    trainer.train(loader, epochs=1)

    def everything() -> list[Tensor]:
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        return [
            *(each.detach().clone() for each in [*model.parameters(), *model.buffers(), *states]),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(),
        ]

    torch.cuda.synchronize()
    before, taken = everything(), torch.cuda.memory_allocated()
    trainer.find_learning_rate(loader, steps=20)
    search = trainer.find_batch_size(loader, max_batch_size=16)
    assert search.suggestion == 16
    assert all(trial.peak_memory for trial in search.trials)
    assert torch.cuda.memory_allocated() == taken
    assert all(map(torch.equal, before, everything()))


def test_a_batch_size_that_runs_out_of_memory_is_survived() -> None:
    class Wide(nn.Module):
        """Keeps 64 MiB for each sample."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            wide = (inputs[:, :1].expand(-1, 2**24) * self.scale).exp()
            return wide.mean(dim=1, keepdim=True).expand(-1, 3) * self.scale

    model = Wide().cuda()
    trainer = tiny_trainer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6), device="cuda")
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(0).total_memory)
    try:
        search = trainer.find_batch_size(tiny_loader(64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 2 <= search.suggestion < 64
    assert not search.trials[-1].fits or any(not trial.fits for trial in search.trials)
    assert torch.cuda.memory_allocated() == taken
