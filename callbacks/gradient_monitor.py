"""GradientMonitor: how large the gradients are, how many of them are unusable, and how far a step moves the weights.

Everything is computed on the device and read late, so that the monitor never makes the host wait for it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch

from offloop.engine import Callback, Metrics, Sample, StepPoint, checks, in_step
from offloop.engine.argument_hints import explains_arguments

CHUNK: Final = 1 << 22
"""Elements that are looked at in one go: small gradients are gathered, so that a hundred biases cost one kernel
launch and not a hundred; the copy that this needs stays below 16 MB (float32)."""


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
    """Publishes `GradientStatistics` for every n-th step; the steps between cost nothing.

    It changes no number of the run, and its own failure does not end it.
    """

    on_error = "isolate"

    @explains_arguments()
    def __init__(self, *, every_n_steps: int = 50, per_layer: bool = True, update_ratio: bool = True) -> None:
        """Choose the cadence and what is measured.

        Args:
            every_n_steps: Steps number n, 2 n, 3 n, ... are measured, at least 1.
            per_layer: Give norm and ratio of each parameter too.
            update_ratio: Compare the weights before and after the step. Keeps a copy of the trained parameters on
                the device for the length of a measured optimizer step.

        Raises:
            ConfigError: `every_n_steps` is out of its range.
        """
        checks.whole_number("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.update_ratio = update_ratio
        self.reset()

    def reset(self) -> None:
        self._parts: list[
            _Part
        ] = []  # of the step in progress: several only where it steps several optimizers

    def close(self) -> None:
        self._parts.clear()

    @in_step(every_n_steps="every_n_steps")
    def before_optimizer_step(self, point: StepPoint) -> None:
        self._parts = [
            part for part in self._parts if part.step == point.step
        ]  # a cancelled step leaves its own
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
        """Look at the gradients; if the ratio is wanted, keep what the weights were."""
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
            torch._foreach_add_(part.negated, part.parameters)  # after - before, in the copy's own memory
            moved += norms_of(part.negated)
        values: dict[str, Any] = {"update_ratio": _ratio(norm_of(moved), norm_of(before))}
        if self.per_layer:
            ratios = _ratio(torch.stack(moved), torch.stack(before)).unbind()
            values["update_ratios"] = dict(zip(names, ratios, strict=True))
        return values


class _Part(NamedTuple):
    """What was measured before one optimizer stepped; P = parameters with a gradient."""

    step: int
    names: list[str]
    norms: list[torch.Tensor]  # P of ()
    counts: torch.Tensor  # (3,): zeros, infinities, NaNs
    elements: int
    parameters: list[torch.Tensor]  # P, the live weights
    negated: list[torch.Tensor]  # P, minus the weights before the step; empty where no ratio is wanted


def norms_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the L2 norm of each tensor, () float32 or wider: the square of a half-precision one may not fit."""
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return list(torch._foreach_norm(list(tensors), 2, None if is_wide else torch.float32))


def norm_of(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of everything whose norms are given, ()."""
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total


def count_special(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Count elements that are zero, infinite, and NaN: (3,) float64 (float32 where a device has no other)."""
    counts = []
    for chunk in chunks(tensors):
        dtype = torch.float32 if chunk.device.type == "mps" else torch.float64
        zeros = chunk.numel() - torch.count_nonzero(chunk)
        infinities, nans = torch.count_nonzero(chunk.isinf()), torch.count_nonzero(chunk.isnan())
        counts.append(torch.stack([zeros, infinities, nans]).to(dtype))
    return torch.stack(counts).sum(0)


def chunks(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Yield the elements of tensors, flat: small ones of one dtype together, large ones alone and not copied."""
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
    """Divide; what did not move has a ratio of 0, also from zero."""
    return torch.where(moved == 0, torch.zeros_like(moved), moved / before)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that every function here takes: dense and real."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()  # waits for a CUDA device: their number is known only there
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
