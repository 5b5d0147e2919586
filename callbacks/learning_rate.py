"""LearningRateScheduler: torch's own schedules by name, with warm-up in front of any of them."""

import copy
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from offloop.engine import Callback, ConfigError, EpochEnd, Run, TrainStart, ValidationEnd, checks, decides
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.monitor import Mode, Monitor, is_better

Interval = Literal["epoch", "step"]


class _Named(NamedTuple):
    """A schedule by name."""

    make: Callable[..., LRScheduler]
    interval: Interval
    length: str | None
    """The argument for the number of steps (or epochs) of the run, if there is one."""


class ReduceOnPlateau(ReduceLROnPlateau):
    """torch's plateau, with a default `threshold_mode="rel"` that is correct for negative metrics, too.

    torch multiplies the best by `1 - threshold`, which accepts a slightly worse value if the best is negative: a metric
    that creeps the wrong way improves for ever (https://github.com/pytorch/pytorch/issues/47513).
    """

    def _is_better(self, a: float, best: float) -> bool:
        if self.threshold_mode == "rel" and -math.inf < best < 0:
            margin = self.threshold * -best
            return is_better(a, best, self.mode, margin)
        return bool(super()._is_better(a, best))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _check_function(function: Callable[..., Any], unit: str) -> None:
    """Raise `ConfigError` if a function cannot be called with a number of steps or epochs."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(0)
    except TypeError:
        raise ConfigError(
            f"the function given to LearningRateScheduler must take one argument, the number of {unit}s done, and "
            f"return the learning rate; its signature is {signature}"
        ) from None


class FunctionLR(LRScheduler):
    """A schedule whose function returns the learning rate, not a factor, for a number of steps or epochs.

    It is the rate of the parameter group with the largest one; the others are scaled alike. The function is not part of
    the state: a resumed run uses that of its script.
    """

    def __init__(self, optimizer: Optimizer, function: Callable[[int], float], unit: str) -> None:
        self.function, self.unit = function, unit
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        largest = max(rates)
        self.scales = [rate / largest if largest else 1.0 for rate in rates]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group. Raises ValueError if the function returns no valid rate."""
        lr = self.function(self.last_epoch)
        is_number = isinstance(lr, numbers.Real) and not isinstance(lr, bool)
        if not is_number or not 0 <= lr < math.inf:
            raise ValueError(
                f"the function given to LearningRateScheduler must return the learning rate, a finite number of at "
                f"least 0; for {self.unit} {self.last_epoch} it returned {lr!r}"
            )
        return [float(lr) * scale for scale in self.scales]

    def state_dict(self) -> dict[str, Any]:
        """Return the state without optimizer and function."""
        state: dict[str, Any] = super().state_dict()
        return {name: value for name, value in state.items() if name != "function"}


SCHEDULES: Final = {
    "reduce_on_plateau": _Named(ReduceOnPlateau, "epoch", None),
    "cosine": _Named(CosineAnnealingLR, "step", "T_max"),
    "step": _Named(StepLR, "epoch", None),
    "one_cycle": _Named(OneCycleLR, "step", "total_steps"),
    "linear": _Named(LinearLR, "step", "total_iters"),
    "exponential": _Named(ExponentialLR, "epoch", None),
    "polynomial": _Named(PolynomialLR, "step", "total_iters"),
}
"""By name: torch's class, the default interval, and the argument for the length of the run."""

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    # torch's own defaults are those of a warm-up.
    "linear": {"start_factor": 1.0, "end_factor": 0.0},
}
WARMUP_START: Final = 0.01
"""A warm-up starts at this fraction of the learning rate; at 0 the first step would do nothing."""


class LearningRateScheduler(Callback):
    """Attaches a torch schedule to the run's optimizer. It steps in the training thread, inside the loop.

    The schedule is a name, a class, an instance, or a function that returns the rate:

        LearningRateScheduler("cosine", warmup=500)
        LearningRateScheduler("reduce_on_plateau", monitor="val_loss", factor=0.1, patience=5)
        LearningRateScheduler(torch.optim.lr_scheduler.MultiStepLR, milestones=[30, 80])
        LearningRateScheduler(lambda step: 1e-3 * min(1.0, (step + 1) / 500))

    Named schedules that need the length of the run (`cosine`, `one_cycle`, `linear`, `polynomial`) read it from the
    run's limits. A plateau steps at the end of epochs by torch's rule: it reduces the rate after more than `patience`
    epochs without improvement. `"reduce_on_plateau"` is correct for negative metrics, unlike torch's class. After
    `run.set_lr` a schedule continues from the new rate. Changes by a schedule of epochs or a plateau are published as
    `LearningRateChanged`; those by a schedule of steps are in `StepEnd.lr`. With several processes, each has its
    schedule; they agree, because steps and metrics are the same.
    """

    # The optimizer of each rank needs a schedule of its own
    ranks = "all"

    @explains_arguments()
    def __init__(
        self,
        scheduler: str | type[LRScheduler] | LRScheduler | Callable[[int], float] = "cosine",
        *,
        interval: Interval | None = None,
        monitor: str | None = None,
        mode: Mode = "auto",
        warmup: int = 0,
        optimizer: str | None = None,
        **arguments: Any,
    ) -> None:
        """Choose a schedule.

        Args:
            scheduler: A name, a torch class, an instance made for the run's optimizer, or a function of the number of
                steps (with `interval="epoch"`: epochs) done, from 0, that returns the learning rate. With several
                parameter groups it returns the largest rate, and the others are scaled alike.
            interval: Step after each `"epoch"` or each optimizer `"step"`. None: a name has its own default, a class
                or an instance steps each epoch, a function each step.
            monitor: Key of the metric of a plateau. None: that of `Trainer(monitor=...)`, else `val_loss`, or
                `train_loss` without a validation. Other callbacks have no influence.
            mode: For a plateau: whether less (`"min"`) or more (`"max"`) is better. `"auto"` takes it from the metric
                or its name. An instance has its own, which must agree.
            warmup: Optimizer steps, at least 0, over which the rate rises linearly before the schedule starts.
            optimizer: Name of the optimizer, if the trainer has several. None: the first.
            arguments: Arguments of the torch class.

        Raises:
            ConfigError: A name or an argument is unknown (the text lists the legal ones), or a value is out of range.
        """
        if isinstance(scheduler, str) and scheduler not in SCHEDULES:
            raise ConfigError(
                f"there is no schedule {scheduler!r}; there are {', '.join(SCHEDULES)}; others by torch's class: "
                "LearningRateScheduler(torch.optim.lr_scheduler.MultiStepLR, milestones=[30, 80])"
            )
        if interval is not None:
            checks.choice("interval", interval, ("epoch", "step"))
        checks.whole_number("warmup", warmup, at_least=0)
        if isinstance(scheduler, LRScheduler) and (arguments or warmup):
            raise ConfigError("an instance is complete: give arguments and warm-up when you create it")
        named = SCHEDULES[scheduler] if isinstance(scheduler, str) else None
        self.scheduler = scheduler
        self.interval: Interval = interval or (named.interval if named else "epoch")
        self.warmup = warmup
        self.optimizer = optimizer
        self.arguments = {**DEFAULTS.get(scheduler if isinstance(scheduler, str) else "", {}), **arguments}
        if named is not None:
            make = named.make
        elif isinstance(scheduler, type) and issubclass(scheduler, LRScheduler):
            make = scheduler
        elif isinstance(scheduler, LRScheduler):
            make = type(scheduler)
        elif callable(scheduler) and not isinstance(scheduler, type):
            if warmup:
                raise ConfigError(
                    "warmup is for torch's schedules: let the function itself rise from a low rate"
                )
            if arguments:
                raise ConfigError(f"a function takes no arguments, got {', '.join(arguments)}")
            make, self.interval = FunctionLR, interval or "step"
            _check_function(scheduler, self.interval)
            self.arguments |= {"function": scheduler, "unit": self.interval}
        else:
            raise ConfigError(
                "scheduler must be a name, a torch scheduler class, an instance, or a function that returns the "
                f"learning rate of a step; got {scheduler!r}"
            )
        self._make: Callable[..., LRScheduler] = make
        self._length_argument = named.length if named else None
        self._is_plateau = isinstance(make, type) and issubclass(make, ReduceLROnPlateau)
        if monitor is not None and not self._is_plateau:
            raise ConfigError(f"monitor={monitor!r} is for reduce_on_plateau: other schedules have no metric")
        if isinstance(scheduler, ReduceLROnPlateau) and mode not in ("auto", scheduler.mode):
            raise ConfigError(f"mode={mode!r}, but the plateau has mode={scheduler.mode!r}")
        if self._is_plateau:
            # Checks both.
            Monitor("val_loss" if monitor is None else monitor, mode)
        self._key = monitor
        self.needs_metrics = () if monitor is None else (monitor,)
        self.mode: Mode = mode
        # Of a plateau
        self._watched: Monitor | None = None
        # The state of an instance before its first run
        self._given: dict[str, Any] | None = None
        if not isinstance(scheduler, LRScheduler):
            filled_in = {"optimizer", "max_lr" if make is OneCycleLR else "", self._length_argument}
            _check_arguments(make, self.arguments, filled_in)

    def reset(self) -> None:
        self._watched = None
        if isinstance(self.scheduler, LRScheduler):
            # An instance starts each run with the state before its first one; the run restores the rates.
            if self._given is None:
                self._given = copy.deepcopy(self.scheduler.state_dict())
            else:
                self.scheduler.load_state_dict(copy.deepcopy(self._given))

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        trainer = run.trainer
        optimizer = self._chosen(trainer.optimizers)
        if self._is_plateau:
            self._watched = self._monitor_for(run)
            self._watched.begin(run)
        if isinstance(self.scheduler, LRScheduler):
            schedule = self.scheduler
        else:
            schedule = self._make(optimizer, **self._arguments_for(event, optimizer, run))
        if self.warmup:
            rise = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=self.warmup)
            trainer.attach_scheduler(rise, interval="step")
        watched = self._watched
        trainer.attach_scheduler(
            schedule,
            interval=self.interval,
            monitor=None if watched is None else watched.key,
            mode="auto" if watched is None else watched.direction,
            after_steps=self.warmup,
        )

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self._expect_metric(event)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._expect_metric(event)

    def _expect_metric(self, event: ValidationEnd | EpochEnd) -> None:
        """Raise where the event lacks the metric that a plateau watches, also during the warm-up."""
        if self._watched is not None:
            self._watched.value_at(event)

    def _monitor_for(self, run: Run) -> Monitor:
        """Return the monitor of a plateau in this run."""
        key, mode = self._key or run.default_monitor, self.mode
        if isinstance(self.scheduler, ReduceLROnPlateau) and mode == "auto":
            # Its own mode, if the metric does not tell.
            mode = run.direction_of(key) or self.scheduler.mode
        return Monitor(key, mode)

    def _chosen(self, optimizers: dict[str, Optimizer]) -> Optimizer:
        if self.optimizer is None:
            return next(iter(optimizers.values()))
        if self.optimizer not in optimizers:
            raise ConfigError(f"there is no optimizer {self.optimizer!r}; there are {', '.join(optimizers)}")
        return optimizers[self.optimizer]

    def _arguments_for(self, event: TrainStart, optimizer: Optimizer, run: Run) -> dict[str, Any]:
        arguments = dict(self.arguments)
        if self._length_argument is not None and self._length_argument not in arguments:
            arguments[self._length_argument] = self._length(event)
        if self._make is OneCycleLR:
            arguments.setdefault("max_lr", [float(group["lr"]) for group in optimizer.param_groups])
        if self._watched is not None:
            arguments["mode"] = self._watched.direction
        return arguments

    def _length(self, event: TrainStart) -> int:
        """Return how often the schedule will step."""
        if self.interval == "epoch":
            if event.epochs is not None:
                return event.epochs
        else:
            totals = [event.max_steps]
            if event.epochs is not None and event.steps_per_epoch is not None:
                totals.append(event.epochs * event.steps_per_epoch)
            known = [total for total in totals if total is not None]
            if known:
                return max(1, min(known) - self.warmup)
        raise ConfigError(
            f"{self.scheduler!r} needs the length of the run, but its limits do not give a number of "
            f"{self.interval}s: give {self._length_argument}="
        )


def _check_arguments(
    make: Callable[..., LRScheduler], arguments: dict[str, Any], filled_in: set[str | None]
) -> None:
    parameters = inspect.signature(make).parameters
    legal = [name for name in parameters if name != "optimizer"]
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    for name in arguments:
        if name not in legal and not takes_any:
            raise ConfigError(
                f"{make.__name__} takes no {name!r}; legal are {', '.join(legal)}; LearningRateScheduler itself takes "
                "interval, monitor, mode, warmup and optimizer"
            )
    for name, each in parameters.items():
        needed = each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        if needed and name not in filled_in and name not in arguments:
            raise ConfigError(f"{make.__name__} needs {name}=...; legal are {', '.join(legal)}")
