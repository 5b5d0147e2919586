"""Precision and gradients: autocast, loss scaling, clipping and rescaling."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

from offloop.engine.config import Precision

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class MixedPrecision:
    """Autocast and loss scaling of one run, for its `precision`. Training thread only."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.device_type = device.type
        # Only fp16 needs scaling: bf16 has the exponent range of fp32.
        self.scaler = torch.amp.GradScaler(device.type) if precision == "16-mixed" else None
        self.initial_scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        # fp32 has no autocast to enter: one nullcontext serves every step
        self._nothing = contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a forward pass."""
        if self.dtype is None:
            return self._nothing
        return torch.autocast(self.device_type, dtype=self.dtype)

    def outside_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for backward passes and optimizer steps inside the autocast of a manual step."""
        if self.dtype is None:
            return self._nothing
        return torch.autocast(self.device_type, enabled=False)

    def clear_casts(self) -> None:
        """Clear autocast's cached casts, because weights have changed inside a forward pass."""
        if self.dtype is not None:
            torch.clear_autocast_cache()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients, scaled where the precision needs it."""
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of `optimizer` by the loss scale, once per step."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        """Step the optimizer and return what that returns; the scaler leaves out updates where it found infinities.

        Synchronises with the device for an optimizer that is not fused, under "16-mixed" only.
        """
        if self.scaler is not None:
            # With a closure it raises: it cannot check gradients that the optimizer computes in its step
            return self.scaler.step(optimizer, **({} if closure is None else {"closure": closure}))
        return optimizer.step() if closure is None else optimizer.step(closure)

    def update(self) -> torch.Tensor | None:
        """Adapt the loss scale after a step and return it, on the device; None where nothing is scaled."""
        if self.scaler is None:
            return None
        self.scaler.update()
        # get_scale() would synchronise with the device; the tensor is read late instead
        return None if self.scaler._scale is None else self.scaler._scale.clone()

    def update_between(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Let an optimizer step once more in one batch: the scaler checks each optimizer once between two updates.

        Existing gradients are rescaled to the new scale.
        """
        if self.scaler is not None and self.scaler._scale is not None:
            before = self.scaler._scale.clone()
            self.scaler.update()
            rescale(parameters, self.scaler._scale / before)


def free_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Free the gradients of `optimizer`, as its `zero_grad()` does.

    torch's `zero_grad` also reports to the profiler and disables Dynamo, which takes as long as a small layer
    (`benchmarks/step_overhead.py`). An overridden `zero_grad` is called.
    """
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def clip(parameters: Iterable[torch.nn.Parameter], limit: float, algorithm: str) -> torch.Tensor | None:
    """Clip gradients in place and return their total norm before it, on the device (None by value)."""
    try:
        if algorithm == "norm":
            return torch.nn.utils.clip_grad_norm_(parameters, limit)
        torch.nn.utils.clip_grad_value_(parameters, limit)
        return None
    except (NotImplementedError, RuntimeError):
        # torch does not clip sparse gradients
        gradients = _coalesced(parameters)
        if gradients is None:
            raise
    if algorithm == "norm":
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
        return norm
    for each in gradients:
        each.clamp_(-limit, limit)
    return None


def _coalesced(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor] | None:
    """Coalesce sparse gradients, and return the values of all gradients; None if none is sparse."""
    gradients, found = [], False
    for each in parameters:
        if each.grad is not None and each.grad.is_sparse:
            each.grad, found = each.grad.coalesce(), True
            # Not a copy: clipping changes it in place
            gradients.append(each.grad._values())
        elif each.grad is not None:
            gradients.append(each.grad)
    return gradients if found else None


def rescale(parameters: Iterable[torch.nn.Parameter], factor: float | torch.Tensor) -> None:
    """Multiply gradients in place, for an accumulation window whose divisor is known only at its end."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def gradients_are_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Return True if no gradient is NaN or infinite (host sync)."""
    # torch has no norm of sparse gradients
    gradients = [
        each.grad.coalesce().values() if each.grad.is_sparse else each.grad
        for each in parameters
        if each.grad is not None
    ]
    return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
