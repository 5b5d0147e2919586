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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from offloop.engine.errors import EventError, LossError
from offloop.engine.events import NO_METRICS, Event, Metrics, Sample, Settings, StepEnd, check
from offloop.engine.training.readback import Readback

logger = logging.getLogger("offloop")


class Logged(NamedTuple):
    """A value that a step logged."""

    name: str
    value: "torch.Tensor | float"
    weight: float | None
    """The user's; None for that of the loss."""
    batch_weight: float = 0.0
    """What the loss of its batch counts, or of its window where it was logged for the whole step."""
    share: float = 1.0
    """Its part of that: a name that a batch logs n times counts 1/n each time."""

    def in_epoch(self) -> float:
        """Return what it counts in the mean of the epoch."""
        return self.batch_weight * self.share if self.weight is None else self.weight

    def in_step(self, *, is_weighted: bool) -> float:
        """Return what it counts in the step's mean, in which batches count alike unless the losses have weights."""
        return self.in_epoch() if is_weighted or self.weight is not None else self.share


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
    logged: list[Logged] = dataclasses.field(default_factory=list)
    """What its batches logged."""
    fresh: list[Logged] = dataclasses.field(default_factory=list)
    """What was logged since; how much it counts is known when its batch has a loss, or the step is over."""
    samples: int = 0
    """Samples in it so far."""
    weight: float = 0.0
    """What its batches count in means so far."""
    data_time: float = 0.0
    """Seconds that its batches were waited for."""
    started: float = 0.0
    """When its first batch had come, on the clock of `time.perf_counter`."""

    def begin(self, size: int, now: float) -> None:
        """Begin a window of `size` batches."""
        self.size = size
        self.started = now
        self.data_time = 0.0

    def settle(self, weight: float) -> None:
        """Take what was logged since the last call as logged by a batch, or a step, that counts `weight`."""
        self.logged += settled(self.fresh, weight)
        self.fresh.clear()

    def clear(self) -> None:
        """Forget what it holds, after its step or instead of it."""
        self.count = self.samples = 0
        self.weight = 0.0
        self.is_weighted = False
        self.losses.clear()
        self.weights.clear()
        self.logged.clear()
        self.fresh.clear()


def settled(fresh: Sequence[Logged], weight: float) -> list[Logged]:
    """Return values that were logged beside a loss of this weight, with what they count."""
    times = Counter(each.name for each in fresh if each.weight is None)
    return [each._replace(batch_weight=weight, share=1.0 / (times[each.name] or 1)) for each in fresh]


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
        window.settle(window.weight or 1.0)  # logged beside the batches: nothing to weigh it by
        named = [
            *(("loss", loss, weight) for loss, weight in zip(window.losses, window.weights, strict=True)),
            *((each.name, _as_tensor(each.value), each.in_epoch()) for each in window.logged),
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
        window.settle(window.weight)  # what hooks have logged for the whole step
        losses, weights, logged = list(window.losses), list(window.weights), list(window.logged)
        is_weighted, samples = window.is_weighted, window.samples
        counts = weights if is_weighted else [1.0] * len(losses)
        data_time, step_time = window.data_time, now - window.started
        on_device = [each.value for each in logged if isinstance(each.value, torch.Tensor)]
        extra = [value for value in (norm, scale) if value is not None]

        def deliver(numbers: list[float]) -> None:
            of_losses, rest = numbers[: len(losses)], iter(numbers[len(losses) :])
            for loss, weight in zip(of_losses, weights, strict=True):
                if math.isfinite(loss) or self.complain(loss, step):
                    self.train_means.add("loss", loss, weight)
            of_step: dict[str, list[tuple[float, float]]] = {}
            for each in logged:
                number = next(rest) if isinstance(each.value, torch.Tensor) else float(each.value)
                pairs = of_step.setdefault(each.name, [])
                pairs.append((number, each.in_step(is_weighted=is_weighted)))
                if math.isfinite(number) or self._on_nonfinite != "skip_step":  # as its loss
                    self.train_means.add(each.name, number, each.in_epoch())
            metrics = {name: _mean(pairs) for name, pairs in of_step.items()}
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
                    loss=_mean(list(zip(of_losses, counts, strict=True))) if of_losses else None,
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
