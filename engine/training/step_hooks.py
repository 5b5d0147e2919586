"""Step hooks: the table of what runs inside a step, and what such a hook sees."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from offloop.engine.callback import MAX_FAILURES_IN_ROW, STEP_POINTS, StepHook
from offloop.engine.errors import as_failure
from offloop.engine.events import Event

if TYPE_CHECKING:
    from offloop.engine.training.loop import TrainingLoop

logger = logging.getLogger("offloop")


class StepPoint:
    """What a step hook sees: the live objects of the step it runs in. Valid only during the call."""

    def __init__(self, loop: "TrainingLoop", trainer: Any, run: Any) -> None:
        self.trainer = trainer
        """The trainer."""
        self.run = run
        """The run, for commands and events."""
        self.name = ""
        """Which point this is."""
        self.batch: Any = None
        """The batch in work; on the device, except at `before_batch`. None where there is none."""
        self._loop = loop

    @property
    def model(self) -> torch.nn.Module:
        """The model in training."""
        return self._loop.program.model

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers by name; a single one is called `optimizer`."""
        return self._loop.optimizers

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer: at `before_optimizer_step` the one about to step, else the first."""
        return self._loop.stepping or self._loop.first_optimizer

    @property
    def epoch(self) -> int:
        """Index of the epoch, from 0."""
        return self._loop.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; at `after_step` the one just made is among them."""
        return self._loop.step

    @property
    def loss(self) -> torch.Tensor | None:
        """The latest batch's loss, () on the device, detached; None before the first of the step."""
        losses = self._loop.window.losses
        return losses[-1].detach() if losses else None

    def log(
        self, name: str, value: "torch.Tensor | float", weight: "torch.Tensor | float | None" = None
    ) -> None:
        """Log a value with the step, as `Trainer.log` does. A tensor stays on the device until read late."""
        self._loop.log(name, value, weight)

    def leave(self) -> None:
        """Call no hook of this callback any more, from the next step to the end of the run."""
        self._loop.hooks.leave()

    def publish(self, event_class: type[Event], **values: Any) -> None:
        """Publish an event whose numbers may still be on the device; they are read late, in order.

        Args:
            event_class: The class of the event.
            values: Its fields. A tensor of one element becomes a float, one of shape (n,) a tuple of floats; a
                mapping of names to tensors becomes `Metrics`, or `Settings` where one of them has several elements.
        """
        self._loop.reporter.publish_late(event_class, {**self._loop.position(), **values})


class StepHooks:
    """The step hooks of a run, in declared order. Training thread only."""

    def __init__(
        self,
        hooks: Sequence[StepHook],
        failed: Callable[[StepHook, BaseException, bool], None],
        guard: Callable[[], None],
    ) -> None:
        """Keep the hooks.

        Args:
            hooks: In declared order.
            failed: Is told what one raised and whether it is off now, and raises if the run is to end.
            guard: Called before each: a hook may change what a checkpoint is still being copied from.
        """
        self.point: StepPoint | None = None  # set by the session, before the thread starts
        self.active: dict[str, list[StepHook]] = {}  # by point, those that asked for the step in progress
        # By callback, what its hooks have taken; written by the training thread, read by anybody.
        self.seconds: dict[str, float] = {hook.callback: 0.0 for hook in hooks}
        self._failed = failed
        self._guard = guard
        self._failures_in_row: dict[str, int] = {}  # by callback, of those whose latest call failed
        self._due: list[StepHook] = []  # those in `active`, in declared order
        self._running: StepHook | None = None
        self._keep(hooks)

    def _keep(self, hooks: Sequence[StepHook]) -> None:
        self._hooks = hooks
        self._in_steps = [hook for hook in hooks if hook.point in STEP_POINTS]
        # Steps whose number it does not divide have no hook.
        self._pace = math.gcd(*(n for hook in self._in_steps for n in (hook.every_n_steps, hook.phase)))

    @property
    def any(self) -> bool:
        """True if there are hooks at points inside steps."""
        return bool(self._in_steps)

    def begin_step(self, number: int) -> bool:
        """Choose the hooks that asked for step `number`, counted from 1; True if there are any."""
        due: list[StepHook] = []
        if self._pace and number % self._pace == 0:
            due = [hook for hook in self._in_steps if number % hook.every_n_steps == hook.phase]
        if due != self._due:
            self._due, self.active = due, {}
            for hook in due:
                self.active.setdefault(hook.point, []).append(hook)
        return bool(self.active)

    def leave(self) -> None:
        """Forget the hooks of the callback whose hook is running, from the next step on."""
        assert self._running is not None
        leaving = self._running.callback
        self._keep([hook for hook in self._hooks if hook.callback != leaving])

    def once(self, point: str, function: Callable[[], None]) -> None:
        """Run a function of the engine's own at a point of the next step that begins, and not again."""

        def run(_: StepPoint) -> None:
            self.leave()
            function()

        name = f"offloop.{point}"  # no callback's: in `leave` it means this one
        self.seconds[name] = 0.0
        self._keep([*self._hooks, StepHook(name, point, run, 1, 0, "raise")])

    def run(self, point: str, batch: Any = None) -> None:
        """Run those of the step in progress at `point`."""
        for hook in self.active.get(point, ()):
            self._run(hook, batch)

    def run_all(self, point: str) -> None:
        """Run those of a point outside of steps; `after_validation` undoes, so the last one comes first.

        Each is run, whatever the ones before it raise: some put back what others have changed. The first
        exception is raised in the end.
        """
        first: BaseException | None = None
        for hook in reversed(self._hooks) if point == "after_validation" else self._hooks:
            if hook.point == point:
                try:
                    self._run(hook, None)
                except BaseException as error:
                    if first is not None:
                        logger.error("%s.%s failed too", hook.callback, point, exc_info=error)
                    first = first or error
        try:
            if first is not None:
                raise first
        finally:
            del first  # else this frame, which the exception holds, would hold the exception

    def _run(self, hook: StepHook, batch: Any) -> None:
        assert self.point is not None
        self.point.name, self.point.batch, self._running = hook.point, batch, hook
        started = time.perf_counter()
        self._guard()
        try:
            with torch.no_grad():
                hook.method(self.point)
        except BaseException as error:
            if not isinstance(as_failure(error), Exception):
                raise
            count = self._failures_in_row[hook.callback] = self._failures_in_row.get(hook.callback, 0) + 1
            self._failed(hook, as_failure(error), count == MAX_FAILURES_IN_ROW)
            if count >= MAX_FAILURES_IN_ROW:
                self.leave()
        else:
            if self._failures_in_row:
                self._failures_in_row.pop(hook.callback, None)
        finally:
            self.seconds[hook.callback] += time.perf_counter() - started
