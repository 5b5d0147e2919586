"""The boundary: where the training thread looks up, obeys commands, and waits while it is paused or held up."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offloop.engine.bus.command_mailbox import Envelope, Mailbox
from offloop.engine.bus.commands import (
    Call,
    Pause,
    Place,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)
from offloop.engine.bus.forked import ForkedProcessError
from offloop.engine.errors import ConfigError, RunEndedError, as_failure, describe
from offloop.engine.events import CommandApplied, LearningRateChanged, Metrics, StateChanged
from offloop.engine.training.learning_rate import largest_lr, scale_lr

if TYPE_CHECKING:
    from offloop.engine.training.loop import TrainingLoop


class Boundary:
    """Applies commands to a training loop. Training thread only."""

    def __init__(
        self,
        loop: "TrainingLoop",
        mailbox: Mailbox,
        *,
        is_blocked: Callable[[], bool],
        save: Callable[[Envelope[Any]], None],
    ) -> None:
        """Serve `loop` from `mailbox`.

        Args:
            loop: What commands change.
            mailbox: Where they come from.
            is_blocked: True while a subscriber with the right to slow training down is full.
            save: Takes a checkpoint for a command, or tags one, and completes its future when that is durable.
        """
        self.state = "running"  # or paused, stopping; read by anybody
        self.paused_seconds = 0.0
        self.stopped_by: str | None = None  # the callback whose decision has ended the run
        self.is_applying_decider_command = False
        self._loop = loop
        self._mailbox = mailbox
        self._is_blocked = is_blocked
        self._save = save
        self._paused_by: Envelope[Any] | None = None
        self._set_aside: Envelope[Any] | None = None  # the pause in which a validation was asked for
        self._depth = 0  # of commands being applied: one may validate, and that has boundaries of its own
        self._following: list[
            Envelope[Any]
        ] = []  # collected beside the command in work: in the mailbox no more

    def process_commands(self) -> None:
        """Obey what waits in the mailbox, and wait while paused or while a `block` subscriber is full.

        A pause inside an accumulation window or a validation lets a command that needs a step boundary get there.
        """
        loop, mailbox = self._loop, self._mailbox
        while True:
            if mailbox.is_forked:
                raise ForkedProcessError
            seen = mailbox.changes
            self._apply_pending()
            if loop.ending == "cancelled":
                break
            is_waited_for = mailbox.is_waited_for
            goes_on = is_waited_for or any(not each.future.cancelled() for each in self._following)
            is_held = self._paused_by not in (None, self._set_aside)
            if is_held and not goes_on:
                asked = time.perf_counter()
                mailbox.wait_for_change(seen)
                self.paused_seconds += time.perf_counter() - asked
            elif is_held and is_waited_for and self._at_step and not self._depth:
                continue  # it came while others were applied, and the pause need not end for it
            elif self._is_blocked():
                mailbox.stand(
                    lambda: mailbox.cancelled or not self._is_blocked(),
                    "a subscriber with on_full='block'",
                )
            else:
                break

    @property
    def _at_step(self) -> bool:
        return self._loop.window.count == 0 and not self._loop.validating

    def _apply_pending(self) -> None:
        """Apply the commands that are there and can be applied here.

        What arrives meanwhile waits for the next boundary, so that training goes on however fast commands come.
        Inside a command, and once the run is stopping, only deciders' commands are applied: the others wait for
        the command to end, or fail with `RunEndedError`.
        """
        loop, mailbox = self._loop, self._mailbox
        place = Place.STEP if self._at_step else Place.VALIDATION if loop.validating else Place.BATCH
        left = mailbox.collect(place, deciders_only=self._depth > 0 or loop.ending == "stopped")
        outer = self._following
        self._depth += 1
        try:
            if left:
                loop.reporter.readback.flush()  # a loss that turns out not to be finite fails the run, not a command
            while left and not mailbox.cancelled:
                envelope, *left = left
                self._following = [*left, *outer]
                self._apply(envelope)
                if loop.ending == "stopped":
                    mailbox.put_back([each for each in left if not each.from_decider])
                    left = [each for each in left if each.from_decider]
        finally:
            mailbox.put_back(left)  # the run is ending, and their givers are told
            self._following = outer
            self._depth -= 1
        if mailbox.cancelled and loop.ending != "cancelled":
            loop.ending, loop.reason = "cancelled", mailbox.cancel_reason
            self._change_state("stopping", mailbox.cancel_reason, "")

    def _apply(self, envelope: Envelope[Any]) -> None:
        """Apply a command, acknowledge it by an event, and complete its future."""
        command, future = envelope.command, envelope.future
        if not future.set_running_or_notify_cancel():
            return  # it was taken back
        result: Any = None
        error: BaseException | None = None
        outer = self.is_applying_decider_command
        self.is_applying_decider_command = outer or envelope.from_decider
        try:
            result = self._result_of(envelope)
        except BaseException as problem:
            if self._mailbox.is_forked:
                raise
            if not isinstance(as_failure(problem), Exception):  # sys.exit() in a call ends the run
                future.set_exception(RunEndedError(f"the run ended in {command.name}: {describe(problem)}"))
                raise
            error = as_failure(problem)
        finally:
            self.is_applying_decider_command = outer
        self._loop.reporter.publish(
            CommandApplied(
                command=command.name,
                command_id=envelope.id,
                by=envelope.by,
                arguments=command.arguments(),
                error=None if error is None else describe(error),
                **self._loop.position(),
            )
        )
        if error is not None:
            future.set_exception(error)
            if isinstance(command, Validate) and not isinstance(error, ConfigError):
                raise error  # the user's validation failed, as it would have at its usual time
        elif not command.rule.is_done_when_durable:
            future.set_result(result)

    def _result_of(self, envelope: Envelope[Any]) -> Any:
        """Do what a command asks for."""
        match envelope.command:
            case Pause(reason=reason):
                self._pause(envelope, reason)
            case Resume():
                self._resume(envelope.by)
            case Stop(reason=reason):
                self._stop(envelope, reason)
            case SetLearningRate() as command:
                self._set_learning_rate(command)
            case Validate():
                return self._validate()
            case SaveCheckpoint() | TagCheckpoint():
                self._save(envelope)
            case Call(function=function):
                self._loop.guard()
                return function(self._loop.program)
            case _ as unknown:
                raise TypeError(f"no way to apply {unknown!r}")
        return None

    def _pause(self, envelope: Envelope[Any], reason: str) -> None:
        if self._loop.ending in ("stopped", "cancelled"):
            return  # a stop ends a pause, also one that comes after it
        self._paused_by = envelope
        self._change_state("paused", reason, envelope.by)

    def _resume(self, by: str) -> None:
        if self._paused_by is not None:
            self._paused_by = None
            self._change_state("running", "", by)

    def _stop(self, envelope: Envelope[Any], reason: str) -> None:
        loop = self._loop
        if loop.ending in (None, "limit"):
            loop.ending, loop.reason = "stopped", reason
            self.stopped_by = envelope.by if envelope.from_decider else None
            self._paused_by = None
            self._change_state("stopping", reason, envelope.by)

    def _validate(self) -> Metrics:
        # In a pause, the pause does not hold this validation; a pause that comes meanwhile does.
        self._set_aside = self._paused_by
        try:
            metrics = self._loop.validate()
        finally:
            self._set_aside = None
        if metrics is None:
            raise ConfigError("the validation was stopped before its end")
        return Metrics(metrics)

    def _set_learning_rate(self, command: SetLearningRate) -> None:
        optimizers = self._loop.optimizers
        name = command.optimizer or next(iter(optimizers))
        previous = largest_lr(optimizers[name])
        schedulers = [schedule.scheduler for schedule in self._loop.schedules]
        scale_lr(optimizers[name], command.lr, group=command.group, schedulers=schedulers)
        self.publish_lr_change(previous, "command", name)

    # Saying so

    def publish_lr_change(self, previous: float, source: str, name: str) -> None:
        """Publish what a learning rate has become."""
        loop = self._loop
        loop.reporter.publish(
            LearningRateChanged(
                lr=largest_lr(loop.optimizers[name]),
                previous=previous,
                source=source,
                optimizer=name if len(loop.optimizers) > 1 else "",
                **loop.position(),
            )
        )

    def _change_state(self, state: str, reason: str, by: str) -> None:
        self.state = state
        self._loop.reporter.publish(StateChanged(state=state, reason=reason, by=by, **self._loop.position()))
