"""Manual optimization: a `training_step` that calls `backward` and `optimizer_step` itself."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from offloop.engine.training.learning_rate import largest_lr, rates_by_group
from offloop.engine.training.parameters import OwnedParameters
from offloop.engine.training.precision import MixedPrecision, clip, free_gradients, gradients_are_finite
from offloop.engine.training.progress import Progress
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.setup import Setup
from offloop.engine.training.step_hooks import StepHooks
from offloop.engine.training.strategy import Strategy


class ManualStep(NamedTuple):
    """What the optimizers did in one `training_step`."""

    norm: torch.Tensor | None
    """The latest gradient norm, () on the device."""
    skipped: bool
    """True if an update was left out because a gradient was not finite."""


class ManualOptimization:
    """Serves the calls of manual steps, and remembers them until the step is counted. Training thread only."""

    def __init__(
        self,
        setup: Setup,
        progress: Progress,
        mixed: MixedPrecision,
        hooks: StepHooks,
        reporter: Reporter,
        parameters: OwnedParameters,
        strategy: Strategy,
    ) -> None:
        self.stepped: set[str] = set()
        """Names of the optimizers that this training_step has stepped."""
        self._config = setup.config
        self._optimizers = setup.optimizers
        self._looks_at_losses = setup.looks_at_losses and strategy.world_size == 1
        self._progress = progress
        self._mixed = mixed
        self._hooks = hooks
        self._reporter = reporter
        self._parameters = parameters
        self._strategy = strategy
        self._is_in_closure = False
        self._norm: torch.Tensor | None = None
        self._skipped = False

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients, scaled as the precision needs.

        Raises:
            LossError: The loss is not finite, on the CPU with `on_nonfinite="raise"`.
        """
        # A line search may try weights that give no finite loss
        if self._looks_at_losses and not self._is_in_closure:
            refuse_nonfinite(loss, self._reporter, self._progress.step + 1)
        if self._hooks.active:
            self._hooks.run("before_backward")
        # Under autocast, the float32 parts of the model would get half-precision gradients
        with self._mixed.outside_autocast():
            self._mixed.backward(loss)
        if self._hooks.active:
            self._hooks.run("after_backward")

    def step(self, name: str, closure: Callable[[], Any] | None) -> Any:
        """Unscale, clip, step and zero one optimizer; returns what its `step` returns."""
        optimizer, limit = self._optimizers[name], self._config.gradient_clip_val
        if name in self.stepped:
            self._mixed.update_between(self._parameters())
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if closure is None:
            self._strategy.average_gradients(parameters, self._strategy.share.factor)
        self._mixed.unscale(optimizer)
        if self._hooks.active:
            self._hooks.optimizer = optimizer
            self._hooks.run("before_optimizer_step")
            self._hooks.optimizer = None
        if closure is not None:
            # The gradients are computed in there
            closure = self._clipping(closure, parameters, limit)
        elif limit is not None:
            self._norm = clip(parameters, limit, self._config.gradient_clip_algorithm)
        first = next(iter(self._optimizers.values()))
        self._progress.last_lr, self._progress.last_rates = (
            largest_lr(first),
            rates_by_group(self._optimizers),
        )
        result = None
        # The gradients are the same in all processes
        if self._config.on_nonfinite != "skip_step" or gradients_are_finite(parameters):
            with self._mixed.outside_autocast():
                result = self._mixed.step(optimizer, closure)
        else:
            self._skipped = True
        # The training_step may go forward once more, all of it under one autocast
        self._mixed.clear_casts()
        free_gradients(optimizer)
        self.stepped.add(name)
        return result

    def _clipping(
        self, closure: Callable[[], Any], parameters: list[torch.nn.Parameter], limit: float | None
    ) -> Callable[[], Any]:
        """Return a closure that also checks the first loss and clips the gradients."""
        has_begun = False

        def evaluate() -> Any:
            nonlocal has_begun
            self._mixed.clear_casts()
            self._is_in_closure = True
            try:
                with self._mixed.autocast():
                    loss = closure()
            finally:
                self._is_in_closure = False
            self._strategy.average_gradients(parameters, self._strategy.share.factor)
            if isinstance(loss, torch.Tensor):
                # A line search must take the same steps in all processes
                loss = self._strategy.mean(loss)
            if self._looks_at_losses and not has_begun:
                refuse_nonfinite(loss, self._reporter, self._progress.step + 1)
            has_begun = True
            if limit is not None:
                self._norm = clip(parameters, limit, self._config.gradient_clip_algorithm)
            return loss

        return evaluate

    def end_batch(self) -> ManualStep | None:
        """Return what the `training_step` did, None if it stepped no optimizer. `stepped` stays until `clear`."""
        if not self.stepped:
            return None
        for name in self.stepped:
            self._progress.steps_of[name] += 1
        done = ManualStep(self._norm, self._skipped)
        self._norm, self._skipped = None, False
        return done

    def clear(self) -> None:
        """Forget which optimizers have stepped, once the step is counted."""
        self.stepped.clear()


def refuse_nonfinite(loss: object, reporter: Reporter, step: int) -> None:
    """Raise `LossError` for a loss that is not finite, before it changes the weights. For losses on the CPU.

    Args:
        loss: Of a batch; anything but a scalar tensor passes, and is checked elsewhere.
        reporter: Decides as `on_nonfinite` says.
        step: Number of the step that it belongs to.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and not math.isfinite(value := loss.item()):
        reporter.complain(value, step)
