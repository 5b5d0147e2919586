"""LayerStatistics: the distribution of weights, gradients and activations, by layer.

A histogram needs its range first, and reading a number from a device makes the host wait. So the range stays on the
device: a tensor is scaled to 0..1 by its own extremes, and then counted between 0 and 1, which the host knows.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch

from offloop.engine import Callback, Metrics, Sample, Settings, StepPoint, checks, in_step
from offloop.engine.argument_hints import explains_arguments

Kind = Literal["weights", "gradients", "activations"]

_ZEROING: Final = (torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Threshold)
"""Modules whose units can die: their output and its gradient are exactly zero."""


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
    norm: Metrics = Metrics()
    """L2 norm of the elements."""
    dead: Metrics = Metrics()
    """Fraction of units that are zero for the whole batch, 0 to 1, for activations of `ReLU`, `ReLU6` and `Threshold`.
    A unit is a channel (dimension 1) of outputs with four or more dimensions, otherwise an index of the last
    dimension."""


class LayerStatistics(Callback):
    """Publishes `LayersMeasured` for every n-th step, one event per kind of tensor; other steps have no overhead.

    Activations are measured by forward hooks that exist during the first batch of such a step only. Activations of a
    compiled model (`Trainer(compile=True)`) are not measured, because adding and removing hooks would recompile it.
    It does not change the results of the run, and a failure of it does not end the run. With several processes, it
    measures on rank 0: weights and gradients are the same on all, activations are those of its share of the batch.
    """

    on_error = "isolate"
    # One rank is enough, and nobody hears what others publish
    ranks = "first"

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
        """Choose the interval and the statistics.

        Args:
            every_n_steps: Measure steps number n, 2 n, 3 n, ...; at least 1.
            weights: Measure parameters.
            gradients: Measure gradients of parameters.
            activations: Measure outputs of modules.
            bins: Bins of each histogram, at least 0; 0 for no histograms.

        Raises:
            ConfigError: A value is out of range.
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
        # Of the step in progress
        self._found: dict[Kind, dict[str, _Layer]] = {}
        self._step = -1

    def close(self) -> None:
        # A forward pass that raised has left its hooks.
        self._remove_hooks()
        self._found.clear()

    @in_step(every_n_steps="every_n_steps")
    def before_forward(self, point: StepPoint) -> None:
        self._remove_hooks()
        is_first_batch = point.step != self._step
        if is_first_batch:
            self._step = point.step
            self._found = {}
            if self.activations and not point.trainer.config.compile:
                self._add_hooks(point.model)

    @in_step(every_n_steps="every_n_steps")
    def before_backward(self, point: StepPoint) -> None:
        # Activation checkpointing runs modules once more in the backward pass.
        self._remove_hooks()

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
        """Measure a tensor, unless this step has one of that name: a second call, or another optimizer."""
        layers = self._found.setdefault(kind, {})
        if name not in layers and tensor.numel() > 0:
            layers[name] = _statistics(tensor.detach(), self.bins, can_die)

    def _add_hooks(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                hook = functools.partial(self._measure_output, name)
                self._hooks.append(module.register_forward_hook(hook))

    def _measure_output(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            # At once: a later module may overwrite the output in place.
            with torch.no_grad():
                self._measure("activations", name, output, isinstance(module, _ZEROING))

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


_Layer = dict[str, torch.Tensor]
"""Statistics of one tensor by field of the event: (), and the histogram (bins,). On its device."""


def _statistics(tensor: torch.Tensor, bins: int, can_die: bool) -> _Layer:
    """Return the statistics of a tensor, without waiting for its device."""
    if tensor.is_sparse:
        # Synchronises a CUDA device: only the device knows the number of values.
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    numbers = tensor if tensor.dtype == torch.float64 else tensor.float()
    mean = numbers.mean()
    # std_mean would compute both at once, but takes ten times as long on a CPU.
    std = torch.linalg.vector_norm(numbers - mean) / numbers.numel() ** 0.5
    minimum, maximum = torch.aminmax(numbers)
    # Of both at once: reading all elements again would cost as much as the deviation.
    norm = torch.hypot(mean, std) * numbers.numel() ** 0.5
    layer = {"mean": mean, "std": std, "minimum": minimum, "maximum": maximum, "norm": norm}
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
    # 0 becomes 1; NaN stays, and infinity becomes NaN, which is not counted.
    width = torch.where(width > 0, width, width * 0 + 1)
    width = torch.where(width.isinf(), width * 0, width)
    # Exactly 0 and 1 at the ends
    places = numbers.sub(minimum).div_(width).reshape(-1)
    # On a CPU reading a number is free, and histc takes five times as long.
    if places.device.type == "cpu":
        if not width.isfinite():
            return places.new_zeros(bins)
        dtype = torch.uint8 if bins < 256 else torch.int32
        numbered = places.mul_(bins).clamp_(max=bins - 1).to(dtype)
        return torch.bincount(numbered, minlength=bins).to(places.dtype)
    if places.is_cuda and torch.are_deterministic_algorithms_enabled():
        # histc is not deterministic; sorting costs more and needs no atomic additions.
        edges = torch.arange(1, bins, device=places.device, dtype=places.dtype) / bins
        below = torch.searchsorted(places.sort().values, edges)
        ends = torch.stack([below.new_zeros(()), torch.count_nonzero(places <= 1)])
        return torch.cat([ends[:1], below, ends[1:]]).diff().to(places.dtype)
    # It does not count NaN.
    return torch.histc(places, bins, 0.0, 1.0)


def _dead_share(outputs: torch.Tensor) -> torch.Tensor:
    """Return the share of units whose outputs are all zero, ()."""
    unit = 1 if outputs.dim() >= 4 else -1
    units = outputs.movedim(unit, -1).reshape(-1, outputs.shape[unit])  # (everything else, units)
    return (units == 0).all(dim=0).float().mean()


def _columns(layers: Mapping[str, _Layer]) -> dict[str, dict[str, torch.Tensor]]:
    """Regroup statistics by layer into layers by statistic."""
    columns: dict[str, dict[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        for field, value in layer.items():
            columns.setdefault(field, {})[name] = value
    return columns
