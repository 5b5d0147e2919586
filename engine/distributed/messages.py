"""What ranks tell each other in a run."""

import msgspec

from offloop.engine.bus.commands import (
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)
from offloop.engine.training.strategy import StepValues

Known = Pause | Resume | Stop | SetLearningRate | Validate | SaveCheckpoint | TagCheckpoint
"""The commands that can travel. `Call` cannot: its function exists on its own rank alone."""


class Given(msgspec.Struct, array_like=True):
    """A command on its way to all ranks."""

    command: Known | None
    """None for a `Call`."""
    function: str
    """Name of the function of a `Call`."""
    by: str
    from_decider: bool
    number: int
    """Of the envelope, on its own rank."""


class Message(msgspec.Struct, array_like=True):
    """What a rank tells the others in an exchange."""

    steps: list[StepValues]
    """Since the last exchange."""
    commands: list[Given]
    cancelled: str | None
    """Why this rank was cancelled; None if it was not."""
    asked: int
    """How often this rank has asked rank 0 to post commands. What was not posted is among `commands`."""
    failure: tuple[str, str] | None
    """The name of this rank's machine, and what it has failed with; None if it has not."""
    hooks: list[tuple[str, str]]
    """Step hooks that have failed since the last exchange, and with what; those that run on all ranks."""
    news: int
    """Rank 0: how many news it has posted."""
    seconds: float
    """Rank 0: how long the run has trained."""
    pace: int
    """Rank 0: steps until the next exchange."""
    cadences: list[int]
    """Rank 0: an exchange is due at each multiple of these numbers of steps, too."""
    is_held: bool
    """Rank 0: a subscriber with the right to slow training down is full."""
