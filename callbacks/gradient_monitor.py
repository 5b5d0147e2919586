"""GradientMonitor: the size of gradients, the share of unusable ones, and how far a step moves the weights.

All statistics are computed on the device and read late, so the host never waits for them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch

from offloop.engine import Callback, Metrics, Sample, StepPoint, checks, in_step
from offloop.engine.argument_hints import explains_arguments

CHUNK: Final = 1 << 22
"""Elements per kernel launch. Small gradients are concatenated, so that a hundred biases cost one launch; the copy
stays below 16 MB (float32)."""


class GradientStatistics(Sample, frozen=True, kw_only=True):
    """Published by `GradientMonitor` for every n-th step, before its `StepEnd`.

    Gradients are those of the whole accumulation window, unscaled and before clipping.

    Thread: training thread.
    """

    norm: float
    """Total L2 norm of the gradients; NaN or infinite if one of their elements is."""
    zero_share: float
    """Fraction of the gradients' elements that are exactly zero, 0 to 1."""
    infinite_share: float
    """Fraction of the gradients' elements that are infinite, 0 to 1."""
    nan_share: float
    """Fraction of the gradients' elements that are NaN, 0 to 1."""
    update_ratio: float | None = None
    """Norm of the step's change to the weights, divided by the norm of the weights before it. About 0.001 is usual,
    0.1 hints at too high a learning rate. Infinite if the weights were all zero, None if it is not measured."""
    norms: Metrics = Metrics()
    """L2 norm of the gradient of each parameter, by the parameter's name."""
    update_ratios: Metrics = Metrics()
    """`update_ratio` of each parameter alone, by the parameter's name."""


class GradientMonitor(Callback):
    """Publishes `GradientStatistics` for every n-th step; other steps have no overhead.

    It does not change the results of the run, and a failure of it does not end the run. With several processes, it
    measures on rank 0: gradients and weights are the same on all.
    """

    on_error = "isolate"
    # Gradients are averaged over the ranks before the point where they are measured
    ranks = "first"

    @explains_arguments()
    def __init__(self, *, every_n_steps: int = 50, per_layer: bool = True, update_ratio: bool = True) -> None:
        """Choose the interval and the statistics.

        Args:
            every_n_steps: Measure steps number n, 2 n, 3 n, ...; at least 1.
            per_layer: Also publish norm and ratio of each parameter.
            update_ratio: Compare the weights before and after the step. Keeps a copy of the trained parameters on the
                device during a measured optimizer step.

        Raises:
            ConfigError: `every_n_steps` is out of range.
        """
        checks.whole_number("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.update_ratio = update_ratio
        self.reset()

    def reset(self) -> None:
        # Of the step in progress: several if it steps several optimizers.
        self._parts: list[_Part] = []

    def close(self) -> None:
        self._parts.clear()

    @in_step(every_n_steps="every_n_steps")
    def before_optimizer_step(self, point: StepPoint) -> None:
        # A cancelled step leaves its parts behind.
        self._parts = [part for part in self._parts if part.step == point.step]
        known = {name for part in self._parts for name in part.names}
        found = [
            (name, parameter)
            for name, parameter in point.model.named_parameters()
            if parameter.grad is not None and name not in known
        ]
        if found:
            self._parts.append(self._measure(point.step, found))

    @in_step(every_n_steps="every_n_steps")
    def after_step(self, point: StepPoint) -> None:
        parts, self._parts = self._parts, []
        if not parts:
            return
        names = [name for part in parts for name in part.names]
        norms = [norm for part in parts for norm in part.norms]
        counts = torch.stack([part.counts for part in parts]).sum(0) / sum(part.elements for part in parts)
        zero_share, infinite_share, nan_share = counts.unbind()
        values: dict[str, Any] = {
            "norm": norm_of(norms),
            "zero_share": zero_share,
            "infinite_share": infinite_share,
            "nan_share": nan_share,
        }
        if self.per_layer:
            values["norms"] = dict(zip(names, norms, strict=True))
        if self.update_ratio:
            values |= self._updates(parts, names)
        point.publish(GradientStatistics, **values)

    def _measure(self, step: int, found: Sequence[tuple[str, torch.nn.Parameter]]) -> "_Part":
        """Measure the gradients; for the ratio, keep a copy of the weights."""
        gradients = [_plain(parameter.grad) for _, parameter in found if parameter.grad is not None]
        parameters = [_plain(parameter) for _, parameter in found]
        return _Part(
            step,
            [name for name, _ in found],
            norms_of(gradients),
            count_special(gradients),
            sum(gradient.numel() for gradient in gradients),
            parameters,
            list(torch._foreach_neg(parameters)) if self.update_ratio else [],
        )

    def _updates(self, parts: Sequence["_Part"], names: Sequence[str]) -> dict[str, Any]:
        moved: list[torch.Tensor] = []
        before: list[torch.Tensor] = []
        for part in parts:
            before += norms_of(part.negated)
            # after - before, in the memory of the copy
            torch._foreach_add_(part.negated, part.parameters)
            moved += norms_of(part.negated)
        values: dict[str, Any] = {"update_ratio": _ratio(norm_of(moved), norm_of(before))}
        if self.per_layer:
            ratios = _ratio(torch.stack(moved), torch.stack(before)).unbind()
            values["update_ratios"] = dict(zip(names, ratios, strict=True))
        return values


class _Part(NamedTuple):
    """Measurements before the step of one optimizer; P = parameters with a gradient."""

    step: int
    names: list[str]
    norms: list[torch.Tensor]  # P of ()
    counts: torch.Tensor  # (3,): zeros, infinities, NaNs
    elements: int
    parameters: list[torch.Tensor]  # P, the live weights
    negated: list[torch.Tensor]  # P, minus the weights before the step; empty without a ratio


def norms_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the L2 norm of each tensor, () float32 or wider: squares of half-precision numbers can overflow."""
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return list(torch._foreach_norm(list(tensors), 2, None if is_wide else torch.float32))


def norm_of(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all tensors together from their norms, ()."""
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total


def count_special(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Count elements that are zero, infinite and NaN: (3,) float64 (float32 on devices without it)."""
    counts = []
    for chunk in chunks(tensors):
        dtype = torch.float32 if chunk.device.type == "mps" else torch.float64
        zeros = chunk.numel() - torch.count_nonzero(chunk)
        infinities, nans = torch.count_nonzero(chunk.isinf()), torch.count_nonzero(chunk.isnan())
        counts.append(torch.stack([zeros, infinities, nans]).to(dtype))
    return torch.stack(counts).sum(0)


def chunks(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Yield the elements of tensors, flat: small tensors of one dtype together, large ones alone and uncopied."""
    gathered: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= CHUNK:
            yield tensor.reshape(-1)
            continue
        group = gathered.setdefault(tensor.dtype, [])
        if sum(each.numel() for each in group) + tensor.numel() > CHUNK:
            yield torch.cat(group)
            group.clear()
        group.append(tensor.reshape(-1))
    for group in gathered.values():
        yield torch.cat(group)


def _ratio(moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Divide; without movement the ratio is 0, also if the weights were zero."""
    return torch.where(moved == 0, torch.zeros_like(moved), moved / before)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense real tensor."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        # Synchronises a CUDA device: only the device knows the number of values.
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
