"""The boundary: where the training thread applies commands, and waits while it is paused or held up."""

import time
from typing import Any

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
from offloop.engine.events import CommandApplied, Event, Metrics, StateChanged
from offloop.engine.training.progress import Progress, State
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.schedules import Schedules
from offloop.engine.training.setup import Host, Program
from offloop.engine.training.validation import Validator
from offloop.engine.training.window import Window


class Boundary:
    """Applies commands to a training loop. Training thread only."""

    def __init__(
        self,
        program: Program,
        host: Host,
        mailbox: Mailbox,
        *,
        progress: Progress,
        window: Window,
        reporter: Reporter,
        schedules: Schedules,
        validator: Validator,
    ) -> None:
        """Apply the commands of `mailbox` to a training.

        Args:
            program: The argument of the functions in `Call` commands.
            host: Asks deciders, saves checkpoints, and knows whether a subscriber holds training up.
            mailbox: Where commands come from.
            progress: Position and state of the training.
            window: The batches of the optimizer step in progress; empty at a step boundary.
            reporter: Publishes events.
            schedules: Set learning rates.
            validator: Runs validations.
        """
        self.paused_seconds = 0.0
        """Seconds of this attempt spent in pauses."""
        self.is_applying_decider_command = False
        """True while a decider's command is applied."""
        self._program = program
        self._host = host
        self._mailbox = mailbox
        self._progress = progress
        self._window = window
        self._reporter = reporter
        self._schedules = schedules
        self._validator = validator
        self._paused_by: Envelope[Any] | None = None
        # The pause in which the validation in progress was asked for; it does not hold that validation
        self._set_aside: Envelope[Any] | None = None
        # Commands being applied: a validation has boundaries inside
        self._depth = 0
        # Collected together with the command being applied, so no longer in the mailbox
        self._following: list[Envelope[Any]] = []

    def announce(self, event: Event) -> None:
        """Publish an event at a boundary, ask the deciders about it, and process commands."""
        self._reporter.publish(event)
        # Deciders are not asked about what a decider's command causes
        if not self.is_applying_decider_command:
            self._host.decide(event)
        if self._mailbox.attention:
            self.process_commands()

    def process_commands(self) -> None:
        """Apply pending commands, and wait while the run is paused or a `block` subscriber is full.

        A pause inside an accumulation window or a validation ends for a command that needs a step boundary. There the
        run is paused again.
        """
        progress, mailbox = self._progress, self._mailbox
        while True:
            if mailbox.is_forked:
                raise ForkedProcessError
            seen = mailbox.changes
            self._apply_pending()
            if progress.ending == "cancelled":
                break
            is_waited_for = mailbox.is_waited_for
            must_continue = is_waited_for or any(not each.future.cancelled() for each in self._following)
            is_held = self._paused_by not in (None, self._set_aside)
            if is_held and not must_continue:
                asked = time.perf_counter()
                mailbox.wait_for_change(seen)
                self.paused_seconds += time.perf_counter() - asked
            elif is_held and is_waited_for and self._at_step and not self._depth:
                # A command came while others were applied. It applies here, so the pause need not end for it
                continue
            elif self._host.is_blocked():
                mailbox.stand(
                    lambda: mailbox.cancelled or not self._host.is_blocked(),
                    "a subscriber with on_full='block'",
                )
            else:
                break

    @property
    def _at_step(self) -> bool:
        return self._window.count == 0 and not self._progress.is_validating

    def _apply_pending(self) -> None:
        """Apply the commands in the mailbox that apply here.

        Commands that arrive meanwhile wait for the next boundary, so training continues however fast they come.
        Inside a command, and once the run is stopping, only commands of deciders apply, and those that interrupt: the
        others wait until the command ends, or fail with `RunEndedError`.
        """
        progress, mailbox = self._progress, self._mailbox
        place = Place.STEP if self._at_step else Place.VALIDATION if progress.is_validating else Place.BATCH
        left = mailbox.collect(place, deciders_only=self._depth > 0 or progress.ending == "stopped")
        outer = self._following
        self._depth += 1
        try:
            if left:
                # A loss that turns out not to be finite fails the run, not a command
                self._reporter.flush()
            while left and not mailbox.cancelled:
                envelope, *left = left
                self._following = [*left, *outer]
                self._apply(envelope)
                if progress.ending == "stopped":
                    mailbox.put_back([each for each in left if not each.from_decider])
                    left = [each for each in left if each.from_decider]
        finally:
            # The run is ending: their futures fail with `RunEndedError`
            mailbox.put_back(left)
            self._following = outer
            self._depth -= 1
        if mailbox.cancelled and progress.ending != "cancelled":
            progress.ending, progress.reason = "cancelled", mailbox.cancel_reason
            self._change_state("stopping", mailbox.cancel_reason, "")

    def _apply(self, envelope: Envelope[Any]) -> None:
        """Apply a command, publish `CommandApplied`, and complete the future."""
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
        self._reporter.publish(
            CommandApplied(
                command=command.name,
                command_id=envelope.id,
                by=envelope.by,
                arguments=command.arguments(),
                error=None if error is None else describe(error),
                **self._reporter.position(),
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
            case SetLearningRate(lr=lr, group=group, optimizer=optimizer):
                self._schedules.set_lr(lr, group, optimizer)
            case Validate():
                return self._validate()
            case SaveCheckpoint() | TagCheckpoint():
                self._host.save_for(envelope)
            case Call(function=function):
                self._host.guard()
                return function(self._program)
            case _ as unknown:
                raise TypeError(f"no way to apply {unknown!r}")
        return None

    def _pause(self, envelope: Envelope[Any], reason: str) -> None:
        # A stop ends a pause, also one that comes after it
        if self._progress.is_interrupted:
            return
        self._paused_by = envelope
        self._change_state("paused", reason, envelope.by)

    def _resume(self, by: str) -> None:
        if self._paused_by is not None:
            self._paused_by = None
            self._change_state("running", "", by)

    def _stop(self, envelope: Envelope[Any], reason: str) -> None:
        progress = self._progress
        if progress.ending in (None, "limit"):
            progress.ending, progress.reason = "stopped", reason
            progress.stopped_by = envelope.by if envelope.from_decider else None
            self._paused_by = None
            self._change_state("stopping", reason, envelope.by)

    def _validate(self) -> Metrics:
        # In a pause, the pause does not hold this validation; a pause that comes meanwhile does.
        self._set_aside = self._paused_by
        try:
            metrics = self._validator.validate(self.announce, self.process_commands)
        finally:
            self._set_aside = None
        if metrics is None:
            raise ConfigError("the validation was stopped before its end")
        return Metrics(metrics)

    def _change_state(self, state: State, reason: str, by: str) -> None:
        self._progress.state = state
        self._reporter.publish(StateChanged(state=state, reason=reason, by=by, **self._reporter.position()))
