"""The reporter: makes events of what the training thread did, in order, without waiting for the device.

A step's numbers may still be on the device when the step is over. Its `StepEnd` is built once they have arrived.
Samples that are published meanwhile queue behind it; a milestone waits for everything before it.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from offloop.engine.encoding import check
from offloop.engine.errors import EventError, LossError
from offloop.engine.events import NO_METRICS, Event, Metrics, Sample, Settings, StepEnd
from offloop.engine.samples.events import PictureSample, TableSample
from offloop.engine.training.progress import Progress
from offloop.engine.training.readback import Readback
from offloop.engine.training.setup import Host
from offloop.engine.training.strategy import StepLoss, StepValue, StepValues, Strategy
from offloop.engine.training.window import Window

logger = logging.getLogger("offloop")


class Means:
    """Weighted means of named values, on the host."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add a value with its weight."""
        self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return sums and weights so far."""
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take back what `state_dict` returned."""
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])

    def take(self, prefix: str) -> dict[str, float]:
        """Return the means under prefixed names, and reset them."""
        means = {
            f"{prefix}{name}": total / self.weights[name] if self.weights[name] else math.nan
            for name, total in self.sums.items()
        }
        self.sums.clear()
        self.weights.clear()
        return means


class Reporter:
    """Publishes the events of the training thread and keeps the means of the epoch. Training thread only."""

    def __init__(
        self,
        host: Host,
        progress: Progress,
        device: torch.device,
        on_nonfinite: Literal["raise", "warn", "skip_step"],
        *,
        loss_scale: float,
        strategy: Strategy,
    ) -> None:
        """Publish through `host`, with the position that `progress` has. `strategy` adds other processes' numbers."""
        self.emit = host.emit
        self.run_id = host.run_id
        self.clock_offset = host.clock_offset
        self.readback = Readback(device)
        self.train_means = Means()
        self.val_means = Means()
        self.loss_scale = loss_scale
        """After the latest step; it falls where the scaler skipped one."""
        self._progress = progress
        self._strategy = strategy
        self._on_nonfinite = on_nonfinite
        # Losses of this attempt
        self._nonfinite = 0

    def now(self) -> float:
        """Return the time of an event that happens now, in seconds since the epoch."""
        return self.clock_offset + time.perf_counter()

    def position(self) -> dict[str, Any]:
        """Return the base fields of an event that happens here and now."""
        progress = self._progress
        return {
            "run_id": self.run_id,
            "time": self.now(),
            "epoch": progress.epoch,
            "step": progress.step,
            "batch": progress.batch,
        }

    def publish(self, event: Event) -> None:
        """Publish an event after everything before it. A milestone waits for that (host sync), a sample queues."""
        if isinstance(event, Sample):
            self.readback.put(lambda: self._strategy.put(lambda: self.emit(event)))
        else:
            self.flush()
            self.emit(event)

    def publish_in_turn(self, event: Event) -> None:
        """Publish an event that other processes may not have, after everything before it.

        A milestone waits for its turn, which is at once in a process that trains alone. With others it queues: they
        would have to join a wait.
        """
        if self._strategy.world_size == 1:
            self.publish(event)
        else:
            self.readback.put(lambda: self._strategy.put(lambda: self.emit(event)))

    def flush(self) -> None:
        """Publish all that waits for its numbers (host sync)."""
        self.readback.flush()
        self._strategy.flush()

    def publish_late(self, event_class: type[Event], fields: dict[str, Any]) -> None:
        """Publish an event once the values of its tensors have arrived. Never waits for the device.

        Except for a sample that people look at, whose pictures are encoded here.
        """
        if issubclass(event_class, PictureSample | TableSample):
            sample = event_class(**fields)
            check(sample)
            self.publish(sample)
            return
        tensors: list[torch.Tensor] = []
        builders = {name: _late(value, tensors) for name, value in fields.items()}

        def build(numbers: Iterable[float]) -> Event:
            # The builders take their numbers in the order in which they gave their tensors
            rest = iter(numbers)
            return event_class(**{name: builder(rest) for name, builder in builders.items()})

        # Errors are raised here, in the call that publishes it, not when the numbers arrive
        check(build(itertools.repeat(0.0)))
        if tensors:
            self.readback.read(tensors, lambda numbers: self._strategy.put(lambda: self.emit(build(numbers))))
        else:
            self.publish(build(()))

    def add_to_validation(self, name: str, value: "torch.Tensor | float", weight: float) -> None:
        """Add a value to the means of the validation, now or when it has arrived."""
        if isinstance(value, torch.Tensor):
            self.readback.read([value], lambda numbers: self.val_means.add(name, numbers[0], weight))
        else:
            self.val_means.add(name, value, weight)

    def add_to_epoch(self, window: Window) -> None:
        """Add batches that led to no step to the means of the epoch, now or when they have arrived."""
        # Values logged outside of batches have no loss to be weighed by
        window.settle(window.weight or 1.0)
        losses, weights, logged, samples = (
            list(window.losses),
            list(window.weights),
            list(window.logged),
            window.samples,
        )

        def deliver(numbers: list[float]) -> None:
            of_losses, of_logged = numbers[: len(losses)], numbers[len(losses) :]
            values = StepValues(
                [StepLoss(value, weight, 0.0) for value, weight in zip(of_losses, weights, strict=True)],
                [
                    StepValue(each.name, value, each.in_epoch(), 0.0)
                    for each, value in zip(logged, of_logged, strict=True)
                ],
                samples,
            )
            self._strategy.gather_step(values, add)

        def add(values: StepValues) -> None:
            self._progress.epoch_samples += values.samples
            for loss in values.losses:
                self.train_means.add("loss", loss.value, loss.weight)
            for each in values.logged:
                self.train_means.add(each.name, each.value, each.weight)

        self.readback.read([*losses, *(_as_tensor(each.value) for each in logged)], deliver)

    def step(
        self,
        window: Window,
        *,
        norm: torch.Tensor | None,
        scale: torch.Tensor | None,
        skipped: bool,
    ) -> None:
        """Publish `StepEnd` for the window's step, now or when its values have arrived.

        Args:
            window: What the step was made of; not cleared here.
            norm: Gradient norm, () on the device.
            scale: Loss scale after the step, () on the device.
            skipped: True if the update was left out.
        """
        now = time.perf_counter()
        run_id, progress = self.run_id, self._progress
        epoch, step, batch = progress.epoch, progress.step, progress.batch
        lr, rates = progress.last_lr, progress.last_rates
        # Values that hooks logged for the whole step
        window.settle(window.weight)
        losses, weights, logged = list(window.losses), list(window.weights), list(window.logged)
        is_weighted, samples = window.is_weighted, window.samples
        counts = weights if is_weighted else list(window.factors)
        data_time, step_time = window.data_time, now - window.started
        on_device = [each.value for each in logged if isinstance(each.value, torch.Tensor)]
        extra = [value for value in (norm, scale) if value is not None]

        def deliver(numbers: list[float]) -> None:
            of_losses, rest = numbers[: len(losses)], iter(numbers[len(losses) :])
            values = StepValues(
                [StepLoss(*each) for each in zip(of_losses, weights, counts, strict=True)],
                [
                    StepValue(
                        each.name,
                        next(rest) if isinstance(each.value, torch.Tensor) else float(each.value),
                        each.in_epoch(),
                        each.in_step(is_weighted=is_weighted),
                    )
                    for each in logged
                ],
                samples,
            )
            # The same in all processes
            grad_norm = next(rest) if norm is not None else None
            loss_scale = next(rest) if scale is not None else None
            self._strategy.gather_step(values, lambda gathered: publish(gathered, grad_norm, loss_scale))

        def publish(values: StepValues, grad_norm: float | None, loss_scale: float | None) -> None:
            self._progress.epoch_samples += values.samples
            for each in values.losses:
                if math.isfinite(each.value) or self.complain(each.value, step):
                    self.train_means.add("loss", each.value, each.weight)
            of_step: dict[str, list[tuple[float, float]]] = {}
            for logged in values.logged:
                of_step.setdefault(logged.name, []).append((logged.value, logged.step_weight))
                # The rule for losses applies to logged values too
                if math.isfinite(logged.value) or self._on_nonfinite != "skip_step":
                    self.train_means.add(logged.name, logged.value, logged.weight)
            metrics = {name: _mean(pairs) for name, pairs in of_step.items()}
            scaler_skipped = False
            if loss_scale is not None:
                metrics["loss_scale"] = loss_scale
                # The scaler found infinities and backed off
                scaler_skipped = loss_scale < self.loss_scale
                self.loss_scale = loss_scale
            pairs = [(each.value, each.step_weight) for each in values.losses]
            self.emit(
                StepEnd(
                    run_id=run_id,
                    time=self.clock_offset + now,
                    epoch=epoch,
                    step=step,
                    batch=batch,
                    loss=_mean(pairs) if pairs else None,
                    lr=lr,
                    lrs=rates,
                    grad_norm=grad_norm,
                    samples=values.samples,
                    data_time=data_time,
                    step_time=step_time,
                    skipped=skipped or scaler_skipped,
                    metrics=Metrics(metrics) if metrics else NO_METRICS,
                )
            )

        self.readback.read([*losses, *on_device, *extra], deliver)

    def complain(self, loss: float, step: int) -> bool:
        """Report a loss that is not finite, as `on_nonfinite` says; True if it counts in the epoch's mean.

        Raises:
            LossError: With `on_nonfinite="raise"`.
        """
        where = f"the loss of step {step} is {loss}"
        self._nonfinite += 1
        if self._on_nonfinite == "raise":
            advice = 'on_nonfinite="warn" continues, "skip_step" skips such updates'
            raise LossError(f"{where}; {advice}", loss=loss, step=step)
        # The 1st, 2nd, 4th, 8th, ...: a line for every step would flood the log
        if self._on_nonfinite == "warn" and self._nonfinite.bit_count() == 1:
            logger.warning("%s%s", where, f" ({self._nonfinite} so far)" if self._nonfinite > 1 else "")
        return self._on_nonfinite != "skip_step"


def _late(value: Any, tensors: list[torch.Tensor]) -> Callable[[Iterator[float]], Any]:
    """Append the tensors in a field's value to `tensors`; return the function that makes the value from numbers."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        count = value.numel()
        if value.dim() == 0 or count == 1:
            return next
        if value.dim() > 1:
            raise EventError(
                f"an event takes tensors of one dimension, got one of shape {tuple(value.shape)}"
            )
        return lambda numbers: tuple(itertools.islice(numbers, count))
    if isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()):
        items = {name: _late(item, tensors) for name, item in value.items()}
        is_flat = all(builder is next for builder in items.values())
        kind = Metrics if is_flat else Settings
        return lambda numbers: kind({name: builder(numbers) for name, builder in items.items()})
    return lambda numbers: value


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the mean of values with weights; of one value exactly that."""
    if len(pairs) == 1:
        return pairs[0][0]
    total = sum(weight for _, weight in pairs)
    if not total:
        return sum(value for value, _ in pairs) / len(pairs)
    return sum(value * weight for value, weight in pairs) / total


def _as_tensor(value: "torch.Tensor | float") -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
