"""Step hooks: the table of what runs inside a step, and what such a hook sees."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from offloop.engine.bus.command_mailbox import actor
from offloop.engine.callback import MAX_FAILURES_IN_ROW, STEP_POINTS, StepHook
from offloop.engine.errors import as_failure
from offloop.engine.events import Event
from offloop.engine.training.progress import Progress
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.setup import Host, Setup
from offloop.engine.training.window import Window

logger = logging.getLogger("offloop")


class StepPoint:
    """What a step hook sees: the live objects of the step it runs in. Valid only during the call."""

    def __init__(
        self,
        trainer: Any,
        run: Any,
        setup: Setup,
        progress: Progress,
        window: Window,
        reporter: Reporter,
        hooks: "StepHooks",
        log: Callable[[str, Any, Any], None],
    ) -> None:
        self.trainer = trainer
        """The trainer."""
        self.run = run
        """The run, for commands and events."""
        self.name = ""
        """Which point this is."""
        self.batch: Any = None
        """The batch in work; on the device, except at `before_batch`. None where there is none."""
        self._setup = setup
        self._progress = progress
        self._window = window
        self._reporter = reporter
        self._hooks = hooks
        self._log = log

    @property
    def model(self) -> torch.nn.Module:
        """The model in training."""
        model: torch.nn.Module = self.trainer.model
        return model

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers by name; a single one is called `optimizer`."""
        return self._setup.optimizers

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer: at `before_optimizer_step` the one about to step, else the first."""
        return self._hooks.optimizer or self._setup.first_optimizer

    @property
    def epoch(self) -> int:
        """Index of the epoch, from 0."""
        return self._progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; at `after_step` the one just made is among them."""
        return self._progress.step

    @property
    def loss(self) -> torch.Tensor | None:
        """The latest batch's loss, () on the device, detached; None before the first of the step."""
        losses = self._window.losses
        return losses[-1].detach() if losses else None

    def log(
        self, name: str, value: "torch.Tensor | float", weight: "torch.Tensor | float | None" = None
    ) -> None:
        """Log a value with the step, as `Trainer.log` does. A tensor stays on the device until it is read late."""
        self._log(name, value, weight)

    def leave(self) -> None:
        """Stop calling the hooks of this callback, from the next step to the end of the run."""
        self._hooks.leave()

    def publish(self, event_class: type[Event], **values: Any) -> None:
        """Publish an event whose numbers may still be on the device; they are read late, in order.

        Args:
            event_class: The class of the event.
            values: Its fields. A tensor of one element becomes a float, one of shape (n,) a tuple of floats; a
                mapping of names to tensors becomes `Metrics`, or `Settings` where one of them has several elements.
                Those of a `PictureSample` and a `TableSample` are pictures, encoded before this returns.
        """
        self._reporter.publish_late(event_class, {**self._reporter.position(), **values})


class StepHooks:
    """The step hooks of a run, in declared order. Training thread only."""

    def __init__(self, hooks: Sequence[StepHook], host: Host) -> None:
        """Keep the hooks.

        Args:
            hooks: In declared order.
            host: Handles what one raises. Its `guard` is called before each hook, which may change what a checkpoint
                is still being copied from.
        """
        self.point: StepPoint | None = None
        """What hooks see; made when the run begins."""
        self.active: dict[str, list[StepHook]] = {}
        """By point, those that asked for the step in progress."""
        self.optimizer: torch.optim.Optimizer | None = None
        """In a manual step: the one about to step."""
        # By callback, seconds spent in its hooks. Written by the training thread; any thread reads it, since a float
        # is replaced as a whole.
        self.seconds: dict[str, float] = {hook.callback: 0.0 for hook in hooks}
        self._host = host
        # By callback, how often its hooks have failed in a row
        self._failures_in_row: dict[str, int] = {}
        # Those in `active`, in declared order
        self._due: list[StepHook] = []
        self._running: StepHook | None = None
        self._keep(hooks)

    def _keep(self, hooks: Sequence[StepHook]) -> None:
        self._hooks = hooks
        self._in_steps = [hook for hook in hooks if hook.point in STEP_POINTS]
        # Steps whose number is not a multiple of this have no hook
        self._pace = math.gcd(*(n for hook in self._in_steps for n in (hook.every_n_steps, hook.phase)))

    @property
    def any(self) -> bool:
        """True if there are hooks at points inside steps."""
        return bool(self._in_steps)

    def begin_step(self, number: int) -> bool:
        """Choose the hooks for step `number`, counted from 1; True if there are any."""
        due: list[StepHook] = []
        if self._pace and number % self._pace == 0:
            due = [hook for hook in self._in_steps if number % hook.every_n_steps == hook.phase]
        if due != self._due:
            self._due, self.active = due, {}
            for hook in due:
                self.active.setdefault(hook.point, []).append(hook)
        return bool(self.active)

    def leave(self) -> None:
        """Remove the hooks of the callback whose hook is running, from the next step on."""
        assert self._running is not None
        leaving = self._running.callback
        self._keep([hook for hook in self._hooks if hook.callback != leaving])

    def close(self) -> None:
        """Release the hooks and what they see: both refer to the loop, and a circle would keep model and data alive."""
        self.point = None
        self.active, self._due = {}, []
        self._keep(())

    def once(self, point: str, function: Callable[[], None]) -> None:
        """Run a function of the engine once, at a point of the next step that begins."""

        def run(_: StepPoint) -> None:
            self.leave()
            function()

        # No callback has this name, so `leave` removes this hook alone
        name = f"offloop.{point}"
        self.seconds[name] = 0.0
        self._keep([*self._hooks, StepHook(name, point, run, 1, 0, "raise")])

    def run(self, point: str, batch: Any = None) -> None:
        """Run the hooks of the step in progress at `point`."""
        for hook in self.active.get(point, ()):
            self._run(hook, batch)

    def run_all(self, point: str) -> None:
        """Run the hooks of a point outside of steps; `after_validation` undoes, so it runs them in reverse.

        All of them run, even if one raises, because some restore what others have changed. The first exception is
        raised at the end.
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
            # The exception holds this frame; without this, the frame would hold the exception
            del first

    def _run(self, hook: StepHook, batch: Any) -> None:
        assert self.point is not None
        self.point.name, self.point.batch, self._running = hook.point, batch, hook
        started = time.perf_counter()
        self._host.guard()
        # Whose commands are given now
        who = actor.set(hook.callback)
        try:
            with torch.no_grad():
                hook.method(self.point)
        except BaseException as error:
            if not isinstance(as_failure(error), Exception):
                raise
            count = self._failures_in_row[hook.callback] = self._failures_in_row.get(hook.callback, 0) + 1
            self._host.hook_failed(hook, as_failure(error), count == MAX_FAILURES_IN_ROW)
            if count >= MAX_FAILURES_IN_ROW:
                self.leave()
        else:
            if self._failures_in_row:
                self._failures_in_row.pop(hook.callback, None)
        finally:
            actor.reset(who)
            self.seconds[hook.callback] += time.perf_counter() - started
