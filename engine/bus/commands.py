"""Commands: what a run can be told while it trains, and the one table of their rules.

A command is a frozen struct of plain values. An `Envelope` (in `command_mailbox.py`) carries it to the training
thread, which applies it at a boundary (`training/boundary.py`). `RULES` says where each command applies and what the
run must have for it. A command with an argument that is never legal cannot be made; `check` rejects one that this run
cannot apply.
"""

import dataclasses
import enum
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Generic, TypeVar

import msgspec

from offloop.engine import checks
from offloop.engine.checkpoint.tags import check_tag
from offloop.engine.errors import ConfigError, encodable
from offloop.engine.events import CheckpointSaved, Metrics, Settings

Result = TypeVar("Result", covariant=True)


class Command(msgspec.Struct, Generic[Result], frozen=True, tag_field="command"):
    """Base of all commands. `Command[Result]` is a command whose future has that result."""

    @property
    def name(self) -> str:
        """The name on events, in log records, on the live page and in the methods of `Run`: `set_lr`."""
        return str(self.__struct_config__.tag)

    @property
    def rule(self) -> "Rule":
        """The command's row of the table."""
        return RULES[type(self)]

    def arguments(self) -> Settings:
        """Return the fields as plain values, for events. A function is shown by its name."""
        return Settings({name: _plain(value) for name, value in msgspec.structs.asdict(self).items()})


def _plain(value: Any) -> Any:
    if callable(value):
        value = getattr(value, "__name__", str(value))
    return encodable(value) if isinstance(value, str) else value


class _WithReason(Command[Result], Generic[Result], frozen=True):
    reason: str = ""
    """Why, in words."""

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise TypeError(f"reason must be a string, got {self.reason!r}")
        # It stands on events and in files.
        msgspec.structs.force_setattr(self, "reason", encodable(self.reason))


class Pause(_WithReason[None], frozen=True, tag="pause"):
    """Pause at the next batch, also of a validation. Everything stays on the device."""


class Resume(Command[None], frozen=True, tag="resume"):
    """End a pause."""


class Stop(_WithReason[None], frozen=True, tag="stop"):
    """Stop at the next step boundary, with `status="stopped"`. It also ends a pause and a validation."""

    reason: str = "asked to stop"
    """Why, for the result."""


class SetLearningRate(Command[None], frozen=True, tag="set_lr"):
    """Set a learning rate. A schedule continues from the new rate.

    Raises:
        ConfigError: `lr` is no finite number above 0.
    """

    lr: float
    """For the largest group, the others are scaled alike; or for `group` alone. Finite, above 0."""
    group: int | None = None
    """Index of one parameter group."""
    optimizer: str | None = None
    """Its name, where the trainer has several."""

    def __post_init__(self) -> None:
        checks.number("lr", self.lr, above=0)
        msgspec.structs.force_setattr(self, "lr", float(self.lr))


class Validate(Command[Metrics], frozen=True, tag="validate"):
    """Validate. The result is the metrics."""


class SaveCheckpoint(_WithReason[CheckpointSaved], frozen=True, tag="checkpoint"):
    """Save a checkpoint."""

    reason: str = "command"
    """Why, for the checkpoint's manifest: `interval`, `best`, ..."""


class TagCheckpoint(Command[CheckpointSaved], frozen=True, tag="tag"):
    """Give a saved checkpoint, or the state of a step boundary, a name.

    Raises:
        ConfigError: `tag` is no name for a tag, or `checkpoint` none of a checkpoint.
    """

    tag: str
    """Letters, digits, `.`, `_` and `-`, at most 64; not `last`, `best`, `auto`, `must` or `never`."""
    move: bool = False
    """True: take the tag off the checkpoint that has it."""
    checkpoint: str | int | None = None
    """`"last"`, `"best"`, another tag, a step, or the name of a saved checkpoint; None for the state of the step
    boundary, of which a checkpoint is saved if there is none."""

    def __post_init__(self) -> None:
        try:
            check_tag(self.tag)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if isinstance(self.checkpoint, str) and (not self.checkpoint or "/" in self.checkpoint):
            raise ConfigError(
                "checkpoint must be the name of a checkpoint of this run, such as step-000001200-a1, a tag or a step, "
                f"got {self.checkpoint!r}"
            )


class Call(Command[Result], Generic[Result], frozen=True, tag="call"):
    """Call a function in the training thread. The result is what it returns."""

    function: Callable[[Any], Result]
    """Takes the trainer."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"call takes a function of the trainer, got {self.function!r}")


# The table ---------------------------------------------------------------------------------------


class Place(enum.Flag):
    """Where the training thread collects commands."""

    BATCH = enum.auto()
    """Between two batches of one optimizer step."""
    VALIDATION = enum.auto()
    """Between two batches of a validation."""
    STEP = enum.auto()
    """At a step boundary: between two optimizer steps, outside of a validation."""
    ANYWHERE = BATCH | VALIDATION | STEP


class Need(enum.Enum):
    """What some runs lack. The value says so, and how to fix it."""

    VAL_LOADER = "there is no val_loader to validate on: give one to train()"
    DIRECTORY = "the run has no directory to save into: give Trainer(run_dir=...)"


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a command applies."""

    place: Place
    needs: Need | None = None
    interrupts: bool = False
    """True: it also applies while another command is being applied, and once the run is stopping.

    Other commands then apply only if a decider gave them.
    """
    is_last: bool = False
    """True: it applies after all other commands of the same boundary."""
    is_done_when_durable: bool = False
    """True: the checkpoint's writer completes the future. Else the training thread does, after it applied."""


RULES: Final[Mapping[type[Command[Any]], Rule]] = {
    Pause: Rule(Place.ANYWHERE, interrupts=True),
    Resume: Rule(Place.ANYWHERE, interrupts=True),
    Stop: Rule(Place.VALIDATION | Place.STEP, interrupts=True, is_last=True),
    SetLearningRate: Rule(Place.STEP),
    Validate: Rule(Place.STEP, needs=Need.VAL_LOADER),
    SaveCheckpoint: Rule(Place.STEP, needs=Need.DIRECTORY, is_done_when_durable=True),
    TagCheckpoint: Rule(Place.STEP, needs=Need.DIRECTORY, is_done_when_durable=True),
    Call: Rule(Place.STEP),
}


def refused_for(lacking: Collection[Need]) -> dict[str, str]:
    """Return the commands that a run cannot apply at all, by name, and why."""
    return {
        str(command.__struct_config__.tag): rule.needs.value
        for command, rule in RULES.items()
        if rule.needs in lacking and rule.needs is not None
    }


def check(command: Command[Any], *, refused: Mapping[str, str], groups: Mapping[str, int]) -> None:
    """Reject a command that a run cannot apply.

    Args:
        command: The command.
        refused: Commands that it cannot apply at all, by name, and why.
        groups: How many parameter groups each of its optimizers has; empty if that is not known.

    Raises:
        ConfigError: The run refuses the command, or has no such optimizer or parameter group.
    """
    if (why := refused.get(command.name)) is not None:
        raise ConfigError(why)
    if isinstance(command, SetLearningRate) and groups:
        optimizer, group = command.optimizer, command.group
        if optimizer is None and len(groups) > 1:
            raise ConfigError(f"which optimizer? Give optimizer=, one of {', '.join(groups)}")
        if optimizer is not None and optimizer not in groups:
            raise ConfigError(f"there is no optimizer {optimizer!r}; there are {', '.join(groups)}")
        count = groups[optimizer or next(iter(groups))]
        if group is not None and not 0 <= group < count:
            raise ConfigError(f"group must be from 0 to {count - 1}, got {group}")
