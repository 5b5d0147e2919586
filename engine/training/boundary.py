"""The boundary: where the training thread looks up, obeys commands, and waits while it is paused or held up."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offloop.engine.bus.command_mailbox import Command, Mailbox
from offloop.engine.bus.forked import ForkedProcessError
from offloop.engine.errors import ConfigError, RunEndedError, as_failure, describe
from offloop.engine.events import CommandApplied, LearningRateChanged, Metrics, Settings, StateChanged
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
        save: Callable[[Command], None],
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
        self.obeying_decider = False  # True while a decider's command is applied
        self._loop = loop
        self._mailbox = mailbox
        self._is_blocked = is_blocked
        self._save = save
        self._paused_by: Command | None = None
        self._set_aside: Command | None = None  # the pause in which a validation was asked for
        self._depth = 0  # of commands being applied: one may validate, and that has boundaries of its own
        self._following: list[Command] = []  # collected beside the command in work: in the mailbox no more

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
        left = mailbox.collect(
            step_boundary=self._at_step,
            stop_only=loop.validating,
            deciders_only=self._depth > 0 or loop.ending == "stopped",
        )
        outer = self._following
        self._depth += 1
        try:
            if left:
                loop.reporter.readback.flush()  # a loss that turns out not to be finite fails the run, not a command
            while left and not mailbox.cancelled:
                command, *left = left
                self._following = [*left, *outer]
                self._apply(command)
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

    def _apply(self, command: Command) -> None:
        """Apply a command, acknowledge it, and give the result to whoever waits for it."""
        future = command.future
        if not future.set_running_or_notify_cancel():
            return  # whoever gave it has taken it back
        result: Any = None
        error: BaseException | None = None
        outer, self.obeying_decider = self.obeying_decider, self.obeying_decider or command.from_decider
        try:
            result = getattr(self, f"_{command.name}")(command)
        except BaseException as problem:
            if self._mailbox.is_forked:
                raise
            if not isinstance(as_failure(problem), Exception):  # sys.exit() in a call ends the run
                future.set_exception(RunEndedError(f"the run ended in {command.name}: {describe(problem)}"))
                raise
            error = as_failure(problem)
        finally:
            self.obeying_decider = outer
        self._loop.reporter.publish(
            CommandApplied(
                command=command.name,
                command_id=command.id,
                by=command.by,
                arguments=Settings({name: _plain(value) for name, value in command.arguments.items()}),
                error=None if error is None else describe(error),
                **self._loop.position(),
            )
        )
        if error is not None:
            future.set_exception(error)
            if command.name == "validate" and not isinstance(error, ConfigError):
                raise error  # the user's own validation failed, as it would have at its usual time
        elif command.name not in ("checkpoint", "tag"):  # these are completed when they are durable
            future.set_result(result)

    # One method for each command, named after it

    def _pause(self, command: Command) -> None:
        if self._loop.ending in ("stopped", "cancelled"):
            return  # a stop ends a pause, also one that comes after it
        self._paused_by = command
        self._change_state("paused", command.arguments["reason"], command.by)

    def _resume(self, command: Command) -> None:
        if self._paused_by is not None:
            self._paused_by = None
            self._change_state("running", "", command.by)

    def _stop(self, command: Command) -> None:
        loop = self._loop
        if loop.ending in (None, "limit"):
            loop.ending, loop.reason = "stopped", command.arguments["reason"]
            self.stopped_by = command.by if command.from_decider else None
            self._paused_by = None  # it ends a pause
            self._change_state("stopping", loop.reason, command.by)

    def _validate(self, command: Command) -> Metrics:
        # Whoever asks for it in a pause wants its answer: that pause does not hold it, a new one does.
        self._set_aside = self._paused_by
        try:
            made = self._loop.validate()
        finally:
            self._set_aside = None
        if made is None:
            raise ConfigError("the validation was stopped before its end")
        return Metrics(made)

    def _call(self, command: Command) -> Any:
        self._loop.guard()
        return command.arguments["function"](self._loop.program)

    def _checkpoint(self, command: Command) -> None:
        self._save(command)

    def _tag(self, command: Command) -> None:
        self._save(command)

    def _set_lr(self, command: Command) -> None:
        lr, group, name = (command.arguments[key] for key in ("lr", "group", "optimizer"))
        optimizers = self._loop.optimizers
        name = name or next(iter(optimizers))
        previous = largest_lr(optimizers[name])
        schedulers = [schedule.scheduler for schedule in self._loop.schedules]
        scale_lr(optimizers[name], lr, group=group, schedulers=schedulers)
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


def _plain(value: Any) -> Any:
    """Return what an argument looks like on an event."""
    return (
        value
        if isinstance(value, bool | int | float | str | None)
        else getattr(value, "__name__", str(value))
    )
