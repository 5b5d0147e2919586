"""The arithmetic of a run: losses, norms and weights equal a loop written by hand, bit for bit."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Event,
    Run,
    StepEnd,
    StepPoint,
    Trainer,
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

EPOCHS = 2
Batches = Iterable[tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """What a loop has done, step by step."""

    losses: list[float]
    norms: list[float | None]
    lrs: list[float]


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Batches,
    *,
    length: int,
    scheduler: LRScheduler | None = None,
    scheduler_interval: str = "epoch",
    precision: str = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str = "norm",
) -> Steps:
    """Train as people do without a library; the arguments are called like offloop's knobs."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    done = Steps([], [], [])
    model.train()
    for _ in range(EPOCHS):
        window_losses: list[float] = []
        for number, (inputs, targets) in enumerate(loader, 1):
            begun = (number - 1) // accumulate_grad_batches * accumulate_grad_batches
            window = min(accumulate_grad_batches, length - begun)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = cross_entropy(model(inputs), targets)
            scaler.scale(loss / window).backward()
            window_losses.append(loss.item())
            if number % accumulate_grad_batches and number != length:
                continue
            scaler.unscale_(optimizer)
            norm = None
            if gradient_clip_val is not None and gradient_clip_algorithm == "norm":
                norm = nn.utils.clip_grad_norm_(model.parameters(), gradient_clip_val).item()
            elif gradient_clip_val is not None:
                nn.utils.clip_grad_value_(model.parameters(), gradient_clip_val)
            done.lrs.append(optimizer.param_groups[0]["lr"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler is not None and scheduler_interval == "step":
                scheduler.step()
            done.losses.append(sum(window_losses) / len(window_losses))
            done.norms.append(norm)
            window_losses.clear()
        if scheduler is not None and scheduler_interval == "epoch":
            scheduler.step()
    return done


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def steps_of(recorder: Recorder) -> Steps:
    ends = recorder.of(StepEnd)
    return Steps(
        [e.loss for e in ends if e.loss is not None], [e.grad_norm for e in ends], [e.lr for e in ends]
    )


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def trained_by_hand(
    loader: Batches, *, length: int, dropout: float = 0.3, **knobs: Any
) -> tuple[nn.Module, Steps, Tensor]:
    """Return model, steps and the state of torch's generator after a loop by hand from seed 7."""
    model = tiny_model(dropout=dropout)
    torch.manual_seed(7)
    steps = by_hand(model, adam(model), loader, length=length, **knobs)
    return model, steps, torch.get_rng_state()


KNOBS: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.05},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 3},  # of 8 batches: the last window has 2
    {"precision": "bf16-mixed"},
    {"precision": "16-mixed"},
    {"precision": "16-mixed", "accumulate_grad_batches": 5, "gradient_clip_val": 0.05},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: " ".join(map(str, knobs.values())) or "plain")
def test_losses_norms_and_weights_equal_the_hand_written_loop(knobs: dict[str, Any]) -> None:
    expected, steps, random_state = trained_by_hand(tiny_batches(8), length=8, **knobs)

    recorder = Recorder()
    model = tiny_model(dropout=0.3)
    torch.manual_seed(7)
    trainer = tiny_trainer(model=model, optimizer=adam(model), callbacks=[recorder], **knobs)
    trainer.train(tiny_batches(8), epochs=EPOCHS)

    assert steps_of(recorder) == steps
    assert_same_weights(model, expected)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_a_shuffling_loader_gives_the_batches_that_it_gives_by_hand(workers: int) -> None:
    pairs = tiny_batches(8)
    data = TensorDataset(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))

    def loader() -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(data, batch_size=5, shuffle=True, num_workers=workers)

    expected, steps, random_state = trained_by_hand(loader(), length=7)

    recorder = Recorder()
    model = tiny_model(dropout=0.3)
    torch.manual_seed(7)
    tiny_trainer(model=model, optimizer=adam(model), callbacks=[recorder]).train(loader(), epochs=EPOCHS)

    assert steps_of(recorder).losses == steps.losses
    assert_same_weights(model, expected)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_steps_where_it_does_by_hand(interval: str) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        if interval == "step":
            return OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * 8)
        return StepLR(optimizer, step_size=1, gamma=0.3)

    expected = tiny_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    steps = by_hand(
        expected,
        optimizer,
        tiny_batches(8),
        length=8,
        scheduler=schedule(optimizer),
        scheduler_interval=interval,
    )

    recorder = Recorder()
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = tiny_trainer(
        model=model,
        optimizer=optimizer,
        scheduler=schedule(optimizer),
        scheduler_interval=interval,
        callbacks=[recorder],
    )
    trainer.train(tiny_batches(8), epochs=EPOCHS)

    assert len(set(steps.lrs)) > 1
    assert steps_of(recorder) == steps
    assert_same_weights(model, expected)


class Meddler(Callback):
    """Uses every right that a callback can have, without changing anything."""

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        point.log("seen", point.batch[0].mean())

    @in_step(every_n_steps=3)
    def before_optimizer_step(self, point: StepPoint) -> None:
        gradients = [p.grad for p in point.model.parameters() if p.grad is not None]
        point.log("norm", torch.nn.utils.get_total_norm(gradients))

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        pass

    @decides
    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        await anyio.lowlevel.checkpoint()


class ThreadObserver(Callback):
    def on_event(self, event: Event, run: Run) -> None:
        pass


def callbacks(number: int) -> list[Callback]:
    makers = (Recorder, Meddler, ThreadObserver, lambda: SlowCallback(0.001), FailingCallback)
    return [makers[index % len(makers)]() for index in range(number)]


@pytest.mark.anyio
@pytest.mark.parametrize("metrics", [(), ("accuracy", "f1_score")], ids=["no metrics", "metrics"])
@pytest.mark.parametrize("number", [0, 1, 20])
async def test_callbacks_and_metrics_change_nothing(number: int, metrics: Sequence[str]) -> None:
    knobs: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}
    expected, steps, random_state = trained_by_hand(tiny_batches(8), length=8, **knobs)

    model = tiny_model(dropout=0.3)
    torch.manual_seed(7)
    trainer = tiny_trainer(model=model, optimizer=adam(model), callbacks=callbacks(number), **knobs)
    with anyio.fail_after(60):
        result = await trainer.train_async(tiny_batches(8), epochs=EPOCHS, metrics=metrics)

    assert_same_weights(model, expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert result.steps == len(steps.losses)


def test_without_a_length_accumulation_equals_the_hand_written_loop_within_rounding() -> None:
    knobs: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}
    expected, steps, _ = trained_by_hand(tiny_batches(8), length=8, dropout=0.0, **knobs)

    class NoLength:
        def __iter__(self) -> Any:
            return iter(tiny_batches(8))

    recorder = Recorder()
    model = tiny_model()
    trainer = tiny_trainer(model=model, optimizer=adam(model), callbacks=[recorder], **knobs)
    trainer.train(NoLength(), epochs=EPOCHS)

    done = steps_of(recorder)
    torch.testing.assert_close(done.losses, steps.losses)
    torch.testing.assert_close(done.norms, steps.norms)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def test_validations_in_between_draw_and_change_what_they_do_by_hand() -> None:
    """`iter(train_loader)` per epoch, then `iter(val_loader)` for each validation; nothing else draws."""
    pairs = tiny_batches(8)
    data = TensorDataset(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))

    def loader() -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(data, batch_size=5, shuffle=True)

    expected = tiny_model(dropout=0.3)
    optimizer = adam(expected)
    torch.manual_seed(7)
    train_loader, val_loader = loader(), loader()
    losses, val_losses = [], []
    for _ in range(EPOCHS):
        expected.train()
        for inputs, targets in train_loader:
            loss = cross_entropy(expected(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        expected.eval()
        total = 0.0
        with torch.no_grad():
            for inputs, targets in val_loader:
                total += cross_entropy(expected(inputs), targets).item() * len(inputs)
        val_losses.append(total / len(data))
    random_state = torch.get_rng_state()

    recorder = Recorder()
    model = tiny_model(dropout=0.3)
    torch.manual_seed(7)
    trainer = tiny_trainer(model=model, optimizer=adam(model), callbacks=[recorder])
    trainer.train(loader(), loader(), epochs=EPOCHS)

    assert steps_of(recorder).losses == losses
    assert [end.metrics["val_loss"] for end in recorder.of(EpochEnd)] == val_losses
    assert_same_weights(model, expected)
    assert torch.equal(torch.get_rng_state(), random_state)


# Parameters that join during a run -------------------------------------------------------------------


class JoinsAt(Callback):
    """Thaws the first layer, and gives it to the optimizer, when an epoch begins."""

    def __init__(self, epoch: int, *, in_place: bool = False) -> None:
        self.epoch, self.in_place = epoch, in_place

    @decides
    def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        if event.epoch == self.epoch:
            join(run.trainer.model, run.trainer.optimizer, in_place=self.in_place)


def join(model: nn.Module, optimizer: torch.optim.Optimizer, *, in_place: bool = False) -> None:
    joining = list(first_layer(model).requires_grad_().parameters())
    if in_place:
        optimizer.param_groups[0]["params"] += joining
    else:
        optimizer.add_param_group({"params": joining, "lr": 0.1})


def first_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.Linear))


def half_frozen() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_model()
    first_layer(model).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.SGD(trained, lr=0.5)


@pytest.mark.parametrize("limit", [1000.0, 0.05])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_that_join_the_optimizer_are_clipped_with_the_rest(
    limit: float, in_place: bool, accumulate: int
) -> None:
    expected, optimizer = half_frozen()
    batches = tiny_batches(4)
    norms = []
    for epoch in range(2):
        if epoch == 1:
            join(expected, optimizer, in_place=in_place)
        for number, (inputs, targets) in enumerate(batches, 1):
            (cross_entropy(expected(inputs), targets) / accumulate).backward()
            if number % accumulate == 0:
                trained = [each for each in expected.parameters() if each.requires_grad]
                norms.append(nn.utils.clip_grad_norm_(trained, limit).item())
                optimizer.step()
                optimizer.zero_grad()

    recorder = Recorder()
    model, optimizer = half_frozen()
    trainer = tiny_trainer(
        model=model,
        optimizer=optimizer,
        gradient_clip_val=limit,
        accumulate_grad_batches=accumulate,
        callbacks=[JoinsAt(1, in_place=in_place), recorder],
    )
    trainer.train(batches, epochs=2)
    assert_same_weights(model, expected)
    assert steps_of(recorder).norms == norms


def test_parameters_that_join_the_optimizer_are_rescaled_with_the_rest() -> None:
    """A window of three batches that holds two, in a loader without a length."""
    expected, optimizer = half_frozen()
    join(expected, optimizer)
    for inputs, targets in tiny_batches(2):
        (cross_entropy(expected(inputs), targets) / 2).backward()
    optimizer.step()

    model, optimizer = half_frozen()
    trainer = tiny_trainer(
        model=model, optimizer=optimizer, accumulate_grad_batches=3, callbacks=[JoinsAt(0)]
    )
    trainer.train(iter(tiny_batches(2)), epochs=1)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def test_parameters_that_join_the_optimizer_are_checked_with_the_rest() -> None:
    class Spoils(Trainer):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = cross_entropy(self.model(batch[0]), batch[1])
            weight = next(first_layer(self.model).parameters())
            return loss + (weight * 0.0).sqrt().sum() if weight.requires_grad else loss  # 0 * infinity

    recorder = Recorder()
    model, optimizer = half_frozen()
    trainer = tiny_trainer(
        Spoils, model=model, optimizer=optimizer, on_nonfinite="skip_step", callbacks=[JoinsAt(1), recorder]
    )
    trainer.train(tiny_batches(2), epochs=2)
    assert [end.skipped for end in recorder.of(StepEnd)] == [False, False, True, True]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# Weights of batches --------------------------------------------------------------------------------


class Weighted(Trainer):
    """Says how many samples each loss is a mean over."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        inputs, targets = batch
        return {"loss": cross_entropy(self.model(inputs), targets), "weight": len(inputs)}


def uneven_batches() -> list[tuple[Tensor, Tensor]]:
    inputs, targets = zip(*tiny_batches(5), strict=True)
    sizes = [7, 1, 4, 5, 3]
    return list(zip(torch.cat(inputs).split(sizes), torch.cat(targets).split(sizes), strict=True))


@pytest.mark.parametrize("has_length", [True, False])
def test_with_weights_a_window_of_uneven_batches_equals_one_big_batch(has_length: bool) -> None:
    batches = uneven_batches()
    windows = [batches[:3], batches[3:]]
    expected = tiny_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    norms = []
    for window in windows:
        inputs, targets = (torch.cat(parts) for parts in zip(*window, strict=True))
        cross_entropy(expected(inputs), targets).backward()
        norms.append(nn.utils.clip_grad_norm_(expected.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()

    recorder = Recorder()
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = tiny_trainer(
        Weighted,
        model=model,
        optimizer=optimizer,
        accumulate_grad_batches=3,
        gradient_clip_val=1.0,
        callbacks=[recorder],
    )
    trainer.train(batches if has_length else iter(batches), epochs=1)

    torch.testing.assert_close(steps_of(recorder).norms, norms)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def test_epoch_means_weigh_each_batch_by_its_size_or_its_weight() -> None:
    class Tokens(Trainer):
        def training_step(self, batch: tuple[Tensor, float, float]) -> dict[str, Any]:
            _, value, weight = batch
            loss = sum(p.sum() for p in self.model.parameters()) * 0.0 + value
            return {"loss": loss} if math.isnan(weight) else {"loss": loss, "weight": weight}

    def mean(batches: list[tuple[Tensor, float, float]]) -> tuple[float, float]:
        result = tiny_trainer(Tokens).train(batches, batches, epochs=1)
        return result.metrics["train_loss"], result.metrics["val_loss"]

    by_size = [(torch.zeros(6, 8), 1.0, math.nan), (torch.zeros(2, 8), 5.0, math.nan)]
    by_weight = [(torch.zeros(6, 8), 1.0, 10.0), (torch.zeros(2, 8), 5.0, 30.0)]
    assert mean(by_size) == (2.0, 2.0)
    assert mean(by_weight) == (4.0, 4.0)
