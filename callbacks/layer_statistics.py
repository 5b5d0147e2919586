"""LayerStatistics: how weights, gradients and activations are distributed, layer by layer.

A histogram needs its range first, and asking a device for a number makes the host wait. So the range stays
on the device: every tensor is moved to 0..1 with its own extremes, and counted between 0 and 1, which the host
knows without asking.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch

from offloop.engine import Callback, Metrics, Sample, Settings, StepPoint, checks, in_step
from offloop.engine.argument_hints import explains_arguments

Kind = Literal["weights", "gradients", "activations"]

_ZEROING: Final = (torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Threshold)
"""Modules whose units can die: their output is exactly zero, and so is its gradient."""


class LayersMeasured(Sample, frozen=True, kw_only=True):
    """Published by `LayerStatistics` for every n-th step, before its `StepEnd`: one event for each kind of tensor.

    All mappings go by layer: for weights and gradients by the parameter's name (`blocks.0.attention.weight`), for
    activations by the module's name.

    Thread: training thread.
    """

    kind: str
    """`weights` (before the step), `gradients` (of the whole accumulation window, unscaled, before clipping) or
    `activations` (outputs of modules without children, for the first batch of the step)."""
    mean: Metrics = Metrics()
    """Mean of the elements."""
    std: Metrics = Metrics()
    """Standard deviation of the elements, without Bessel's correction."""
    minimum: Metrics = Metrics()
    """Smallest element."""
    maximum: Metrics = Metrics()
    """Largest element."""
    histogram: Settings = Settings()
    """Number of elements in each bin; the bins are equally wide, from `minimum` to `maximum`. If these are equal, all
    elements are in the first bin; if one of them is NaN or infinite, all bins are 0."""
    dead: Metrics = Metrics()
    """Fraction of units that are zero for the whole batch, 0 to 1, for activations of `ReLU`, `ReLU6` and `Threshold`.
    A unit is a channel (dimension 1) of outputs with four or more dimensions, otherwise an index of the last
    dimension."""


class LayerStatistics(Callback):
    """Publishes `LayersMeasured` for every n-th step, one for each kind; the steps between cost nothing.

    Activations are seen through forward hooks that are there for the first batch of such a step only. A compiled
    model (`Trainer(compile=True)`) has no activations here: hooks that come and go would have it compiled again.
    It changes no number of the run, and its own failure does not end it.
    """

    on_error = "isolate"

    @explains_arguments()
    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        weights: bool = True,
        gradients: bool = True,
        activations: bool = True,
        bins: int = 32,
    ) -> None:
        """Choose the cadence and what is measured.

        Args:
            every_n_steps: Steps number n, 2 n, 3 n, ... are measured, at least 1.
            weights: Measure parameters.
            gradients: Measure their gradients.
            activations: Measure the outputs of modules.
            bins: Bins of a histogram; 0 for none.

        Raises:
            ConfigError: A value is out of its range.
        """
        checks.whole_number("every_n_steps", every_n_steps)
        checks.whole_number("bins", bins, at_least=0)
        self.every_n_steps = every_n_steps
        self.weights = weights
        self.gradients = gradients
        self.activations = activations
        self.bins = bins
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.reset()

    def reset(self) -> None:
        self._remove_hooks()
        self._found: dict[Kind, dict[str, _Layer]] = {}  # of the step in progress
        self._step = -1

    def close(self) -> None:
        self._remove_hooks()  # a forward that raised has left them
        self._found.clear()

    @in_step(every_n_steps="every_n_steps")
    def before_forward(self, point: StepPoint) -> None:
        self._remove_hooks()
        if point.step != self._step:  # the first batch of the window
            self._step = point.step
            self._found = {}
            if self.activations and not _is_compiled(point):
                self._add_hooks(point.model)

    @in_step(every_n_steps="every_n_steps")
    def before_backward(self, point: StepPoint) -> None:
        self._remove_hooks()  # activation checkpointing goes forward once more in the backward pass

    @in_step(every_n_steps="every_n_steps")
    def before_optimizer_step(self, point: StepPoint) -> None:
        self._remove_hooks()
        for name, parameter in point.model.named_parameters():
            if self.weights:
                self._measure("weights", name, parameter)
            if self.gradients and parameter.grad is not None:
                self._measure("gradients", name, parameter.grad)

    @in_step(every_n_steps="every_n_steps")
    def after_step(self, point: StepPoint) -> None:
        self._remove_hooks()
        found, self._found = self._found, {}
        for kind, layers in found.items():
            point.publish(LayersMeasured, kind=kind, **_columns(layers))

    def _measure(self, kind: Kind, name: str, tensor: torch.Tensor, can_die: bool = False) -> None:
        """Look at a tensor, unless this step has one of that name already: a second call, another optimizer."""
        layers = self._found.setdefault(kind, {})
        if name not in layers and tensor.numel() > 0:
            layers[name] = _look_at(tensor.detach(), self.bins, can_die)

    def _add_hooks(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                self._hooks.append(module.register_forward_hook(self._seer(name)))

    def _seer(self, name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def see(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                # Here and now: a module that works in place may overwrite the output before the step is over.
                with torch.no_grad():
                    self._measure("activations", name, output, isinstance(module, _ZEROING))

        return see

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


_Layer = dict[str, torch.Tensor]
"""Statistics of one tensor by field of the event: (), and the histogram (bins,). On its device."""


def _look_at(tensor: torch.Tensor, bins: int, can_die: bool) -> _Layer:
    """Return the statistics of a tensor, without waiting for its device."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()  # waits for a CUDA device: their number is known only there
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    numbers = tensor if tensor.dtype == torch.float64 else tensor.float()
    mean = numbers.mean()
    # std_mean would do both in one go, and take ten times as long on a CPU
    std = torch.linalg.vector_norm(numbers - mean) / numbers.numel() ** 0.5
    minimum, maximum = torch.aminmax(numbers)
    layer = {"mean": mean, "std": std, "minimum": minimum, "maximum": maximum}
    if bins:
        layer["histogram"] = _histogram(numbers, minimum, maximum, bins)
    if can_die:
        layer["dead"] = _dead_share(numbers)
    return layer


def _histogram(
    numbers: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, bins: int
) -> torch.Tensor:
    """Count elements in equally wide bins between two numbers on the device; (bins,)."""
    width = maximum - minimum
    width = torch.where(width > 0, width, width * 0 + 1)  # 0 becomes 1; NaN and infinity stay or become NaN
    width = torch.where(width.isinf(), width * 0, width)  # infinity becomes NaN: then nothing is counted
    places = numbers.sub(minimum).div_(width).reshape(-1)  # exactly 0 and 1 at the ends
    if places.device.type == "cpu":  # where reading a number is free, and histc takes five times as long
        if not width.isfinite():
            return places.new_zeros(bins)
        dtype = torch.uint8 if bins < 256 else torch.int32
        numbered = places.mul_(bins).clamp_(max=bins - 1).to(dtype)
        return torch.bincount(numbered, minlength=bins).to(places.dtype)
    if places.is_cuda and torch.are_deterministic_algorithms_enabled():
        # histc is refused then; sorting costs more and needs no atomic additions
        edges = torch.arange(1, bins, device=places.device, dtype=places.dtype) / bins
        below = torch.searchsorted(places.sort().values, edges)
        ends = torch.stack([below.new_zeros(()), torch.count_nonzero(places <= 1)])
        return torch.cat([ends[:1], below, ends[1:]]).diff().to(places.dtype)
    return torch.histc(places, bins, 0.0, 1.0)  # counts no NaN


def _dead_share(outputs: torch.Tensor) -> torch.Tensor:
    """Return the share of units whose outputs are all zero, ()."""
    unit = 1 if outputs.dim() >= 4 else -1
    units = outputs.movedim(unit, -1).reshape(-1, outputs.shape[unit])  # (everything else, units)
    return (units == 0).all(dim=0).float().mean()


def _columns(layers: Mapping[str, _Layer]) -> dict[str, dict[str, torch.Tensor]]:
    """Turn statistics by layer into layers by statistic."""
    columns: dict[str, dict[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        for field, value in layer.items():
            columns.setdefault(field, {})[name] = value
    return columns


def _is_compiled(point: StepPoint) -> bool:
    return bool(point.trainer.config.compile)
