"""WeightAverage: an average of the weights in training, and validations with it."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from offloop.engine import (
    Callback,
    ConfigError,
    Run,
    StepPoint,
    TrainStart,
    checks,
    decides,
    in_step,
    load_model,
)
from offloop.engine.argument_hints import explains_arguments

Kind = Literal["ema", "swa"]

STATISTICS: Final = "running_"
"""Prefix of the names of buffers that are running statistics of activations, as in torch."""


class WeightAverage(Callback):
    """Averages the weights after optimizer steps: exponentially (EMA) or equally (SWA).

        WeightAverage(decay=0.999)                              EMA, after every step
        WeightAverage(decay=lambda n: min(0.9999, (1 + n) / (10 + n)))
                                                                EMA with a warm-up
        WeightAverage("swa", start_epoch=75)                    SWA, at the end of each epoch from the 76th on

    Training keeps its own weights. From its first update on validations use the average, so `val_...` metrics and
    decisions based on them are those of the average. Afterwards the weights are swapped back bit for bit, also if the
    validation was stopped or failed. Checkpoints contain both: a resumed run has the same average, bit for bit, and
    `load_model` loads the average, to which the metrics belong (`key="model"` loads the weights in training).

    Parameters are averaged, and buffers whose name starts with `running_`: the statistics of batch normalisation. Other
    buffers (masks, counters, the vectors of spectral normalisation) are not weights; validations use the model's own.

    It needs one copy of the model on its device, draws no random numbers and does not synchronise CUDA devices. With
    several processes, each averages its own weights, which are the same on all, and no rank waits for another.
    """

    # Each rank validates with its own average
    ranks = "all"

    @explains_arguments()
    def __init__(
        self,
        kind: Kind = "ema",
        *,
        decay: float | Callable[[int], float] | None = None,
        every_n_steps: int | None = None,
        start_step: int = 0,
        start_epoch: int = 0,
        use_buffers: bool = True,
        validate: bool | Literal["both"] = True,
        apply_at_end: bool = False,
    ) -> None:
        """Choose what to average, and when.

        Args:
            kind: `"ema"` moves the average towards the weights by `1 - decay`; `"swa"` is the mean of all averaged
                weights.
            decay: Decay of EMA, above 0 and below 1; None: 0.999. Or a function of the number of updates so far, from
                1, that returns it; 0 takes the weights as they are. Functions are not saved: a resumed run uses that
                of its script.
            every_n_steps: Optimizer steps between updates, at least 1. None: 1 for EMA, the steps of an epoch for SWA.
            start_step: Optimizer steps before the first update, at least 0.
            start_epoch: Epochs before the first update, at least 0.
            use_buffers: Also average the statistics of batch normalisation. False: validations use the model's own.
            validate: Use the average in validations; one average of a run can. `"both"` validates twice: `val_loss` and
                other `val_` metrics are those of the average, `val_live_loss` and others those of the weights in
                training.
            apply_at_end: When the run completes or stops, copy the average into the model, after the last checkpoint,
                which keeps the weights in training.

        Raises:
            ConfigError: A value is out of range.
        """
        checks.choice("kind", kind, ("ema", "swa"))
        if kind == "swa" and decay is not None:
            raise ConfigError("decay is for EMA: SWA takes the equal mean")
        decay = 0.999 if decay is None else decay
        if not callable(decay):
            checks.number("decay", decay, above=0, below=1, hint="; a function of the updates is legal, too")
        checks.choice("validate", validate, (True, False, "both"))
        checks.whole_number("every_n_steps", every_n_steps, optional=True)
        checks.whole_number("start_step", start_step, at_least=0)
        checks.whole_number("start_epoch", start_epoch, at_least=0)
        self.kind = kind
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.use_buffers = use_buffers
        self.validate = validate
        self.apply_at_end = apply_at_end
        self.reset()

    def reset(self) -> None:
        self._average: _Average | None = None
        self._every = 1
        self._is_swapped = False
        # The state of a resumed run, until TrainStart.
        self._loaded: Mapping[str, Any] | None = None

    @property
    def averaged_model(self) -> torch.nn.Module:
        """The averaged model, a copy of the one in training. During a run, in the training thread only.

        Raises:
            RuntimeError: No run has started yet.
        """
        if self._average is None:
            raise RuntimeError("there is no average before a run has started")
        module = self._average.module
        assert isinstance(module, torch.nn.Module)
        return module

    @property
    def updates(self) -> int:
        """Number of updates of the average."""
        return 0 if self._average is None else self._average.updates

    @property
    def validates_average(self) -> bool:
        return self.validate is not False

    @property
    def validates_live(self) -> bool:
        return self.validate == "both"

    @property
    def sets_final_weights(self) -> bool:
        return self.apply_at_end

    def averaged_weights(self) -> Mapping[str, torch.Tensor]:
        return self._average.averaged_by_name() if self._average is not None and self.updates else {}

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        if self.every_n_steps is not None:
            self._every = self.every_n_steps
        elif self.kind == "swa":
            if event.steps_per_epoch is None:
                raise ConfigError("the length of an epoch is unknown: give every_n_steps=")
            self._every = event.steps_per_epoch
        average = get_swa_multi_avg_fn() if self.kind == "swa" else _ema(self.decay)
        self._average = _Average(run.trainer.model, multi_avg_fn=average, use_buffers=self.use_buffers)
        self._average.requires_grad_(False)
        if self._loaded is not None:
            # By load_model, since an earlier attempt may have wrapped the model differently.
            load_model(self._loaded, into=self._average)
            self._loaded = None

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step % self._every == 0 and point.step > self.start_step and point.epoch >= self.start_epoch:
            assert self._average is not None
            self._average.update()

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        if self.validate and self.updates and not self._is_swapped:
            self._swap()

    @in_step
    def after_validation(self, point: StepPoint) -> None:
        if self._is_swapped:
            self._swap()

    @in_step
    def before_train_end(self, point: StepPoint) -> None:
        if self.apply_at_end and self.updates:
            assert self._average is not None
            for live, averaged in self._average.pairs():
                live.copy_(averaged)

    def close(self) -> None:
        # A hook before or after the last validation failed, and the one here did not run.
        if self._is_swapped:
            self._swap()

    def state_dict(self) -> Mapping[str, Any]:
        return {} if self._average is None else {"average": dict(self._average.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        average = state.get("average")
        for name, value in (average or {}).items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"average.{name} is a {type(value).__name__}, not a tensor")
        self._loaded = average

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the model and its average, one tensor at a time. Twice changes no bit."""
        assert self._average is not None
        for live, averaged in self._average.pairs():
            kept = live.clone()
            live.copy_(averaged)
            averaged.copy_(kept)
        self._is_swapped = not self._is_swapped


def _ema(decay: float | Callable[[int], float]) -> Any:
    """Return torch's update of an exponential average, with a decay that can depend on the number of updates."""
    if not callable(decay):
        return get_ema_multi_avg_fn(float(decay))

    def update(mine: Any, theirs: Any, updates: Any) -> None:
        value = decay(int(updates))
        if not checks.is_number(value) or not 0 <= value < 1:
            raise ValueError(
                "the decay function of WeightAverage must return a number of at least 0 and below 1; after "
                f"{int(updates)} updates it returned {value!r}"
            )
        get_ema_multi_avg_fn(value)(mine, theirs, updates)

    return update


class _Average(AveragedModel):
    """torch's averaged model, with an update that does not synchronise the device.

    torch moves the number of updates to the device in each update; here it stays on the host. The arithmetic is that
    of torch, except that buffers other than running statistics are copied: the mean of a counter, of a mask with
    infinities or of two unit vectors is meaningless. torch also searches for all tensors in each update, which takes
    longer than averaging a small model; here their places are known.
    """

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.n_averaged = torch.tensor(0, dtype=torch.long, device="cpu")
        module = self.module
        assert isinstance(module, torch.nn.Module)
        self._pairs = list(zip(_places(module), _places(model), strict=True))
        groups: dict[object, list[tuple[_Place, _Place]]] = {}
        for averaged, live in self._pairs:
            tensor = averaged.tensor
            is_weight = live.is_parameter or (self.use_buffers and live.name.startswith(STATISTICS))
            is_averaged = is_weight and (tensor.is_floating_point() or tensor.is_complex())
            key = (tensor.device, tensor.dtype) if is_averaged else None
            groups.setdefault(key, []).append((averaged, live))
        self._copied = groups.pop(None, [])
        # One group per device and dtype
        self._averaged = list(groups.values())

    @property
    def updates(self) -> int:
        return int(self.n_averaged)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the tensors of the model that are averaged, each with its average."""
        for averaged, live in itertools.chain.from_iterable(self._averaged):
            yield live.tensor, averaged.tensor

    def averaged_by_name(self) -> dict[str, torch.Tensor]:
        """Return the averages, by all names that they have in the state dict of the model."""
        averaged = {id(each.tensor) for each, _ in itertools.chain.from_iterable(self._averaged)}
        module = self.module
        assert isinstance(module, torch.nn.Module)
        named = itertools.chain(
            module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        )
        return {name: tensor.detach() for name, tensor in named if id(tensor) in averaged}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average from the weights."""
        for averaged, live in self._copied if self.updates else self._pairs:
            averaged.tensor.copy_(live.tensor)
        if self.updates:
            assert self.multi_avg_fn is not None
            for group in self._averaged:
                mine, theirs = [each.tensor for each, _ in group], [each.tensor for _, each in group]
                self.multi_avg_fn(mine, theirs, self.n_averaged)
        self.n_averaged += 1


class _Place(NamedTuple):
    """The place of a tensor in a model. Some modules replace the tensor itself, such as their buffers."""

    tensors: Mapping[str, torch.Tensor | None]
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> torch.Tensor:
        found = self.tensors[self.name]
        assert found is not None
        return found


def _places(model: torch.nn.Module) -> Iterator[_Place]:
    """Yield the places of parameters and buffers; shared ones once."""
    seen: set[torch.Tensor] = set()
    for module in model.modules():
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in seen:
                    seen.add(tensor)
                    yield _Place(tensors, name, is_parameter)
