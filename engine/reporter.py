"""The reporter: turns what the training thread did into events, in order, without waiting for the device.

A step's numbers may still be on the device when the step is over. Its `StepEnd` is then built when they have
arrived; what is published meanwhile queues behind it, and a milestone waits for all before it.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from offloop.engine.errors import EventError, LossError
from offloop.engine.events import NO_METRICS, Event, Metrics, Sample, Settings, StepEnd, check
from offloop.engine.readback import Readback

logger = logging.getLogger("offloop")

Logged = list[tuple[str, "torch.Tensor | float"]]


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
        """Return the means under prefixed names, and begin anew."""
        means = {
            f"{prefix}{name}": total / self.weights[name] if self.weights[name] else math.nan
            for name, total in self.sums.items()
        }
        self.sums.clear()
        self.weights.clear()
        return means


@dataclasses.dataclass(slots=True)
class Window:
    """An accumulation window: the batches of one optimizer step."""

    size: int = 0
    """Batches it will have; 0 before the first."""
    count: int = 0
    """Batches it has."""
    is_weighted: bool = False
    """True if its losses carry weights of the user's."""
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """One scalar on the device for each batch. Its graph is spent: detaching it would cost more than keeping it."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """What each loss counts in means: samples, or the user's weight."""
    logged: Logged = dataclasses.field(default_factory=list)
    """What the step logged."""
    samples: int = 0
    """Samples in it so far."""
    data_time: float = 0.0
    """Seconds that its batches were waited for."""
    started: float = 0.0
    """When its first batch had come, on the clock of `time.perf_counter`."""

    def begin(self, size: int, now: float) -> None:
        """Begin a window of `size` batches."""
        self.size = size
        self.started = now
        self.data_time = 0.0

    def clear(self) -> None:
        """Forget what it holds, after its step or instead of it."""
        self.count = self.samples = 0
        self.is_weighted = False
        self.losses.clear()
        self.weights.clear()
        if self.logged:
            self.logged.clear()


class Reporter:
    """Publishes the events of the training thread and keeps the means of the epoch. Training thread only."""

    def __init__(
        self,
        device: torch.device,
        emit: Callable[[Event], None],
        clock_offset: float,
        on_nonfinite: Literal["raise", "warn", "skip_step"],
        *,
        loss_scale: float,
    ) -> None:
        """Publish through `emit`; event times are `clock_offset` plus `time.perf_counter()`."""
        self.emit = emit
        self.clock_offset = clock_offset
        self.readback = Readback(device)
        self.train_means = Means()
        self.val_means = Means()
        self._on_nonfinite = on_nonfinite
        self._nonfinite = 0  # losses of this attempt
        self.loss_scale = loss_scale  # after the latest step; it falls where the scaler skipped one

    def publish(self, event: Event) -> None:
        """Publish an event; everything before it goes first, and a milestone waits for that."""
        if isinstance(event, Sample):
            self.readback.put(lambda: self.emit(event))
        else:
            self.readback.flush()
            self.emit(event)

    def publish_late(self, event_class: type[Event], fields: dict[str, Any]) -> None:
        """Publish an event whose tensors are read when they have arrived."""
        tensors: list[torch.Tensor] = []
        builders = {name: _late(value, tensors) for name, value in fields.items()}

        def build(numbers: Iterable[float]) -> Event:
            rest = iter(numbers)  # the builders take theirs in the order in which they gave their tensors
            return event_class(**{name: builder(rest) for name, builder in builders.items()})

        check(build(itertools.repeat(0.0)))  # where it is published, not late
        if tensors:
            self.readback.read(tensors, lambda numbers: self.emit(build(numbers)))
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
        times = Counter(name for name, _ in window.logged)
        named = [
            *(("loss", loss, weight) for loss, weight in zip(window.losses, window.weights, strict=True)),
            *((name, _as_tensor(value), window.samples / times[name]) for name, value in window.logged),
        ]

        def deliver(numbers: list[float]) -> None:
            for (name, _, weight), number in zip(named, numbers, strict=True):
                self.train_means.add(name, number, weight)

        if named:
            self.readback.read([value for _, value, _ in named], deliver)

    def step(
        self,
        window: Window,
        *,
        position: tuple[str, int, int, int],
        lr: float,
        rates: Metrics,
        norm: torch.Tensor | None,
        scale: torch.Tensor | None,
        skipped: bool,
    ) -> None:
        """Publish `StepEnd` for the window's step, now or when its values have arrived.

        Args:
            window: What the step was made of; not cleared here.
            position: run_id, epoch, step, batch.
            lr: Learning rate that the step used.
            rates: Those of its parameter groups, where they differ.
            norm: Gradient norm, () on the device.
            scale: Loss scale after the step, () on the device.
            skipped: True if the update was left out.
        """
        now = time.perf_counter()
        run_id, epoch, step, batch = position
        losses, weights, logged = list(window.losses), list(window.weights), list(window.logged)
        samples, data_time, step_time = window.samples, window.data_time, now - window.started
        on_device = [value for _, value in logged if isinstance(value, torch.Tensor)]
        extra = [value for value in (norm, scale) if value is not None]

        def deliver(numbers: list[float]) -> None:
            of_losses, rest = numbers[: len(losses)], iter(numbers[len(losses) :])
            values: dict[str, list[float]] = {}
            for name, value in logged:
                number = next(rest) if isinstance(value, torch.Tensor) else float(value)
                values.setdefault(name, []).append(number)
            for loss, weight in zip(of_losses, weights, strict=True):
                if math.isfinite(loss) or self.complain(loss, step):
                    self.train_means.add("loss", loss, weight)
            metrics = {name: sum(several) / len(several) for name, several in values.items()}
            for name, mean in metrics.items():
                self.train_means.add(name, mean, samples)
            grad_norm = next(rest) if norm is not None else None
            scaler_skipped = False
            if scale is not None:
                metrics["loss_scale"] = loss_scale = next(rest)
                scaler_skipped = loss_scale < self.loss_scale  # it found infinities and backed off
                self.loss_scale = loss_scale
            self.emit(
                StepEnd(
                    run_id=run_id,
                    time=self.clock_offset + now,
                    epoch=epoch,
                    step=step,
                    batch=batch,
                    loss=sum(of_losses) / len(of_losses) if of_losses else math.nan,
                    lr=lr,
                    lrs=rates,
                    grad_norm=grad_norm,
                    samples=samples,
                    data_time=data_time,
                    step_time=step_time,
                    skipped=skipped or scaler_skipped,
                    metrics=Metrics(metrics) if metrics else NO_METRICS,
                )
            )

        self.readback.read([*losses, *on_device, *extra], deliver)

    def complain(self, loss: float, step: int) -> bool:
        """Say that a loss is not finite, as `on_nonfinite` wants; True if it counts in the epoch's mean."""
        where = f"the loss of step {step} is {loss}"
        self._nonfinite += 1
        if self._on_nonfinite == "raise":
            raise LossError(f'{where}; on_nonfinite="warn" goes on, "skip_step" leaves such updates out')
        if (
            self._on_nonfinite == "warn" and self._nonfinite.bit_count() == 1
        ):  # 1, 2, 4, 8, ...: else a line each step
            logger.warning("%s%s", where, f" ({self._nonfinite} so far)" if self._nonfinite > 1 else "")
        return self._on_nonfinite != "skip_step"


def _late(value: Any, tensors: list[torch.Tensor]) -> Callable[[Iterator[float]], Any]:
    """Append the tensors in a field's value to `tensors`; return what makes the value of their numbers."""
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


def _as_tensor(value: "torch.Tensor | float") -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
