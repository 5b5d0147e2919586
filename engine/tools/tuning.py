"""Finders: the learning rate at which the loss falls fastest, and the largest batch size that fits into memory.

Both run some of the trainer's own steps, without events and callbacks, and then restore everything bit for bit:
parameters, buffers, gradients, optimizer states, learning rates, random states.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import psutil
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from offloop.engine import checks
from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.commands import Stop
from offloop.engine.bus.threads import Thread
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.data.batches import length_of
from offloop.engine.errors import ConfigError
from offloop.engine.events import Event, StepEnd
from offloop.engine.lazy_imports import first_use
from offloop.engine.position.loader_position import capture_before_epoch, rewind_epoch
from offloop.engine.session.thread_state import check_caller
from offloop.engine.tools.evaluation import silent_loop
from offloop.engine.tools.ranks import expect_one_process
from offloop.engine.training.activation_checkpointing import checkpointed
from offloop.engine.training.arguments import check_loader
from offloop.engine.training.default_steps import check_optimization
from offloop.engine.training.freezing import select_parameters
from offloop.engine.training.learning_rate import Schedule, largest_lr, scale_lr
from offloop.engine.training.placement import prepare_model
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.program_setup import make_setup
from offloop.engine.training.setup import Host, Limits, SilentHost

SMOOTHING: Final = 0.98
"""Decay of the loss's exponential moving average, as in fastai and Lightning."""
EXPLODED: Final = 4.0
"""The search ends when the smoothed loss is this many times its best, as in fastai and Lightning."""
_FIRST_LOSSES: Final = 10
"""Ignored losses at the start, because a running mean of few values is noisy."""
_SHARE_OF_FREE_MEMORY: Final = 0.9
"""Share of a device's free memory to use; fragmentation and longer batches need the rest."""
_LARGEST_BATCH: Final = 2**16
"""Upper limit of the search if neither the data nor the caller sets one."""
_SAMPLING_INTERVAL: Final = 0.002
"""Seconds between two samples of the process's memory."""
_PROBABLE: Final = 1.25
"""On a CPU, a size is not tried if the line through the last two predicts this many times the limit: without memory
the system kills the process."""


# The learning rate --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSearch:
    """The result of a search for the learning rate."""

    lrs: tuple[float, ...]
    """The rates of the steps; with several groups, those of the largest."""
    losses: tuple[float, ...]
    """The losses of the steps."""
    smoothed: tuple[float, ...]
    """The running mean of the losses, corrected for its start at 0."""
    suggestion: float | None
    """The rate at which the smoothed loss fell fastest; None if it never fell."""

    def plot(self, path: str | Path) -> Path:
        """Plot the losses over the rates into a file, in the format of its suffix. Needs `offloop[plot]`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            # Not pyplot, which keeps every figure and may open windows.
            with first_use("matplotlib"):
                from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise ModuleNotFoundError(
                "plot() needs matplotlib: pip install 'offloop[plot]'", name="matplotlib"
            ) from None
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.plot(self.lrs, self.losses, color="#93b4f4", linewidth=1, label="loss")
        axes.plot(self.lrs, self.smoothed, color="#2563eb", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="#ea580c", label=f"suggestion {self.suggestion:.2g}")
        axes.legend()
        figure.savefig(path)
        return Path(path)


class _Ramp:
    """A schedule that multiplies the rate by the same factor after every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, first: float, factor: float) -> None:
        self.optimizer = optimizer
        self._next, self._factor = first, factor
        self.step()

    def step(self) -> None:
        # A warm-up's first rate of 0 cannot be scaled.
        if largest_lr(self.optimizer) == 0.0:
            for group in self.optimizer.param_groups:
                group["lr"] = self._next
        scale_lr(self.optimizer, self._next, group=None)
        self._next *= self._factor


class _Losses(SilentHost):
    """The host of a search: records rates and losses, and ends the search when the loss explodes."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._mailbox = mailbox
        self._mean = 0.0
        self._is_over = False

    def emit(self, event: Event, /) -> None:
        """Record the rate and the loss of a step."""
        if self._is_over or not isinstance(event, StepEnd):
            return
        if event.loss is None:
            raise ConfigError("find_learning_rate needs the loss: let training_step return it")
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * event.loss
        smoothed = self._mean / (1 - SMOOTHING ** (len(self.losses) + 1))
        best = min(self.smoothed[_FIRST_LOSSES:], default=math.inf)
        # The best loss may be negative or 0.
        exploded = smoothed > best + (EXPLODED - 1) * max(abs(best), 1e-12)
        if exploded or not math.isfinite(event.loss):
            self._is_over = True
            self._mailbox.give(Stop("the loss exploded"), by="search")
            return
        self.lrs.append(event.lr)
        self.losses.append(event.loss)
        self.smoothed.append(smoothed)

    def emit_step(self, event: Event, /) -> None:
        """Record the rate and the loss of a step."""
        self.emit(event)


def find_learning_rate(
    trainer: TrainingProgram,
    train_loader: Iterable[Any],
    *,
    min_lr: float,
    max_lr: float,
    steps: int,
    optimizer: str | None,
) -> LearningRateSearch:
    """Raise the rate exponentially and find where the loss falls fastest, see `BaseTrainer.find_learning_rate`.

    This is the range test of Smith 2017 (https://arxiv.org/abs/1506.01186, section 3.3). The smoothing, the end at
    four times the best loss and the steepest descent as the suggestion are those of fastai and Lightning. Rates are
    evenly spaced on a logarithmic axis, so the slope is over log(rate).
    """
    expect_one_process(trainer.config, "find_learning_rate")
    check_loader(train_loader, "train_loader")
    checks.number("min_lr", min_lr, above=0)
    checks.number("max_lr", max_lr, above=0)
    if min_lr >= max_lr:
        raise ConfigError(f"min_lr must be below max_lr, got {min_lr!r} and {max_lr!r}")
    checks.whole_number("steps", steps, at_least=_FIRST_LOSSES)
    if optimizer is None and len(trainer.optimizers) > 1:
        raise ConfigError(f"which optimizer? Give optimizer=, one of {', '.join(trainer.optimizers)}")
    name = optimizer or next(iter(trainer.optimizers))
    if name not in trainer.optimizers:
        raise ConfigError(f"there is no optimizer {name!r}; there are {', '.join(trainer.optimizers)}")

    mailbox = Mailbox()
    losses = _Losses(mailbox)
    with _restoring_all(trainer, train_loader):
        factor = (max_lr / min_lr) ** (1 / (steps - 1))
        # Only its `step` is called.
        ramp = cast(LRScheduler, _Ramp(trainer.optimizers[name], min_lr, factor))
        _train(
            trainer,
            train_loader,
            steps=steps,
            schedules=(Schedule(ramp, "step"),),
            host=losses,
            mailbox=mailbox,
        )
    return LearningRateSearch(
        lrs=tuple(losses.lrs),
        losses=tuple(losses.losses),
        smoothed=tuple(losses.smoothed),
        suggestion=suggest(losses.lrs, losses.smoothed),
    )


def suggest(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Return the rate at which the loss falls fastest over log(rate), None if it never falls."""
    inner = range(_FIRST_LOSSES, len(smoothed) - 1)
    if not inner:
        return None
    steepest = min(inner, key=lambda index: smoothed[index + 1] - smoothed[index - 1])
    return lrs[steepest] if smoothed[steepest + 1] < smoothed[steepest - 1] else None


# The batch size -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizeTrial:
    """A trial of one batch size."""

    batch_size: int
    """Samples in a batch."""
    fits: bool
    """True if it trained within the memory."""
    peak_memory: int | None
    """Peak in bytes: torch's memory on CUDA, the whole process's on the CPU; None if it was not tried, because
    smaller sizes predicted that it cannot fit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizeSearch:
    """The result of a search for the batch size."""

    suggestion: int
    """The largest size that fits."""
    trials: tuple[BatchSizeTrial, ...]
    """The trials, in order."""


def find_batch_size(
    trainer: TrainingProgram,
    train_loader: "Iterable[Any] | Callable[[int], Iterable[Any]]",
    *,
    mode: Literal["binsearch", "power"],
    start: int,
    max_batch_size: int | None,
    steps: int,
    memory_limit: int | None,
) -> BatchSizeSearch:
    """Double the size until it does not fit, then bisect, see `BaseTrainer.find_batch_size`."""
    expect_one_process(trainer.config, "find_batch_size")
    checks.choice("mode", mode, ("binsearch", "power"))
    checks.whole_number("start", start)
    checks.whole_number("steps", steps, at_least=2)
    checks.whole_number("max_batch_size", max_batch_size, optional=True)
    checks.whole_number("memory_limit", memory_limit, optional=True)
    if memory_limit is None and trainer.device.type != "cuda":
        raise ConfigError(
            f"memory_limit is needed on {trainer.device.type}: there, memory ends without an error that could be "
            "caught. Give the bytes that this process may take, for example 8 * 2**30"
        )
    samples = _Samples(train_loader)
    largest = min(max_batch_size or _LARGEST_BATCH, samples.count or _LARGEST_BATCH)

    trials: list[BatchSizeTrial] = []
    with _restoring_all(trainer, () if samples.is_made else cast("Iterable[Any]", train_loader)):
        memory = _Memory(trainer.device, memory_limit)

        def fits(size: int) -> bool:
            if not memory.is_probable(size, trials):
                trials.append(BatchSizeTrial(batch_size=size, fits=False, peak_memory=None))
            else:
                trials.append(_try(trainer, samples, size, steps, memory))
            return trials[-1].fits

        size = min(start, largest)
        if not fits(size) and (size == 1 or not fits(size := 1)):
            raise ConfigError(
                f"not even one sample fits into {memory.limit / 2**20:.0f} MiB: try precision, "
                "activation_checkpointing, or a smaller model"
            )
        good, bad = size, next((each.batch_size for each in trials if not each.fits), None)
        while good < largest and (bad is None or 2 * good < bad):
            size = min(2 * good, largest)
            good, bad = (size, bad) if fits(size) else (good, size)
            # The length of a stream is known only at its end.
            largest = min(largest, samples.count or largest)
            good = min(good, largest)
        while mode == "binsearch" and bad is not None and bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(middle) else (good, middle)
    return BatchSizeSearch(suggestion=good, trials=tuple(trials))


class _Samples:
    """A source of batches of any size."""

    def __init__(self, train_loader: Any) -> None:
        self._loader = train_loader
        self.is_made = callable(train_loader) and not hasattr(train_loader, "__iter__")
        self.count: int | None = None
        if self.is_made:
            return
        if not isinstance(train_loader, DataLoader) or train_loader.batch_size is None:
            raise ConfigError(
                "train_loader must be a DataLoader that makes up batches of a batch_size, or a function that "
                f"returns a loader for a batch size; got {type(train_loader).__name__}"
            )
        if not isinstance(train_loader.dataset, IterableDataset):
            self.count = length_of(train_loader.dataset)

    def batches(self, size: int, number: int) -> list[Any]:
        """Return `number` batches of `size` samples; they repeat if there are fewer."""
        if self.is_made:
            made = list(itertools.islice(iter(self._loader(size)), number))
            if not made:
                raise ConfigError(f"train_loader({size}) gave no batch")
            return list(itertools.islice(itertools.cycle(made), number))
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset):
            samples = list(itertools.islice(iter(dataset), size))
            if len(samples) < size:
                self.count = len(samples)
        elif hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(list(range(size)))
        else:
            samples = [dataset[index] for index in range(size)]
        return [self._loader.collate_fn(samples)] * number


def _try(
    trainer: TrainingProgram, samples: _Samples, size: int, steps: int, memory: "_Memory"
) -> BatchSizeTrial:
    """Train some steps with batches of one size."""
    accumulate = trainer.config.accumulate_grad_batches if trainer.automatic_optimization else 1
    with memory.measured() as peak:
        is_out = _runs_out_of_memory(trainer, samples, size, steps, accumulate)
    # Nothing refers to the trial's tensors here, not even an exception's traceback.
    for parameter in trainer.model.parameters():
        parameter.grad = None
    _free(trainer.device, after_failure=is_out)
    return BatchSizeTrial(batch_size=size, fits=not is_out and peak[0] <= memory.limit, peak_memory=peak[0])


def _runs_out_of_memory(
    trainer: TrainingProgram, samples: _Samples, size: int, steps: int, accumulate: int
) -> bool:
    try:
        _train(trainer, samples.batches(size, steps * accumulate), steps=steps)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


class _Memory:
    """The memory limit, and measurements."""

    def __init__(self, device: torch.device, limit: int | None) -> None:
        self._device = device
        self._process = psutil.Process()
        if limit is None:
            free, _ = torch.cuda.mem_get_info(device)
            limit = int(_SHARE_OF_FREE_MEMORY * (free + torch.cuda.memory_reserved(device)))
        self.limit = limit

    def is_probable(self, size: int, trials: Sequence[BatchSizeTrial]) -> bool:
        """Return False if earlier sizes predict that this one cannot fit and trying it would be dangerous."""
        known = [(each.batch_size, each.peak_memory) for each in trials if each.fits and each.peak_memory]
        if self._device.type == "cuda" or len(known) < 2:
            return True
        (smaller, less), (larger, more) = sorted(known)[-2:]
        return more + (more - less) / (larger - smaller) * (size - larger) <= _PROBABLE * self.limit

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[int]]:
        """Measure the peak of the block; the list holds it afterwards."""
        peak = [0]
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield peak
            torch.cuda.synchronize(self._device)
            peak[0] = torch.cuda.max_memory_reserved(self._device)
            return
        is_over = threading.Event()

        def look() -> None:
            while True:
                peak[0] = max(peak[0], self._process.memory_info().rss)
                if is_over.wait(_SAMPLING_INTERVAL):
                    return

        thread = Thread(look, name="offloop-memory", daemon=False)
        thread.start()
        try:
            yield peak
        finally:
            is_over.set()
            thread.join()


# Training some steps, and restoring everything --------------------------------------------------------------


def _train(
    trainer: TrainingProgram,
    loader: Iterable[Any],
    *,
    steps: int,
    schedules: Sequence[Schedule] = (),
    host: Host | None = None,
    mailbox: Mailbox | None = None,
) -> None:
    """Train some steps without events and callbacks."""
    # A search provokes an exploding loss, which must not spoil the weights for the next trial.
    config = trainer.config.replace(on_nonfinite="skip_step")
    setup = make_setup(
        trainer, Limits(max_steps=steps), config=config, train_loader=loader, schedules=schedules
    )
    with silent_loop(trainer, setup, host, mailbox=mailbox) as loop:
        if not trainer.model.training:
            trainer.model.train()
        try:
            loop.frozen.freeze(select_parameters(trainer.model, config.freeze))
            with torch.enable_grad(), checkpointed(trainer.model, config.activation_checkpointing):
                loop.run()
        finally:
            loop.frozen.thaw_all()


@contextlib.contextmanager
def _restoring_all(trainer: TrainingProgram, loader: Iterable[Any]) -> Iterator[None]:
    """Occupy the trainer, and restore everything that training changes."""
    check_caller(trainer.config.precision, trainer.device)
    with trainer._occupancy.use("searching"):
        check_optimization(trainer)
        before = capture_before_epoch(loader)
        prepare_model(trainer)
        kept = _Kept(trainer)
        try:
            yield
        finally:
            kept.restore()
            rewind_epoch(loader, before)
            _free(trainer.device)


class _Saved:
    """A tensor and a copy of its value, on the host to leave the device's memory free."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._value = tensor.detach().to("cpu", copy=True)

    def restore(self) -> torch.Tensor:
        with torch.no_grad():
            self.tensor.copy_(self._value)
        return self.tensor


def _save(value: Any) -> Any:
    return _Saved(value) if isinstance(value, torch.Tensor) else value


def _restored(value: Any) -> Any:
    return value.restore() if isinstance(value, _Saved) else value


class _Kept:
    """A copy of the state of model and optimizers."""

    def __init__(self, trainer: TrainingProgram) -> None:
        parts = [trainer.model, *([trainer.loss] if isinstance(trainer.loss, torch.nn.Module) else [])]
        modules = [module for part in parts for module in part.modules()]
        self._modes = [(module, module.training) for module in modules]
        self._parameters = [
            (each, _Saved(each), _save(each.grad)) for part in parts for each in part.parameters()
        ]
        self._buffers = [
            (module._buffers, name, _save(buffer))
            for module in modules
            for name, buffer in module._buffers.items()
        ]
        self._optimizers = [_KeptOptimizer(each) for each in trainer.optimizers.values()]

    def restore(self) -> None:
        """Restore the state."""
        for parameter, value, gradient in self._parameters:
            value.restore()
            parameter.grad = _restored(gradient)
        for buffers, name, buffer in self._buffers:
            buffers[name] = _restored(buffer)
        for optimizer in self._optimizers:
            optimizer.restore()
        for module, is_training in self._modes:
            module.training = is_training


class _KeptOptimizer:
    """A copy of an optimizer's state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # torch's own mark, for a warning of schedules.
        self._has_stepped = getattr(optimizer, "_opt_called", None)
        self._groups = [
            {key: _save(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._states = {
            parameter: {name: _save(value) for name, value in values.items()}
            for parameter, values in optimizer.state.items()
        }

    def restore(self) -> None:
        optimizer = self._optimizer
        if self._has_stepped is not None:
            optimizer._opt_called = self._has_stepped  # type: ignore[attr-defined]
        for group, kept in zip(optimizer.param_groups, self._groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **{key: _restored(value) for key, value in kept.items()}})
        optimizer.state.clear()
        for parameter, values in self._states.items():
            optimizer.state[parameter] = {name: _restored(value) for name, value in values.items()}


def _free(device: torch.device, *, after_failure: bool = False) -> None:
    """Return unused memory to the system."""
    if after_failure or device.type == "cuda":
        # A traceback leaves reference cycles.
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        # glibc keeps freed blocks of some megabytes; they would count as taken.
        trim(0)
