"""RunSource: what a `LiveRun` asks of its run besides the events, and the source for a run of this process.

`followed_run.py` has the other one: a run directory, whichever process writes it.
"""

import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args

import msgspec

from offloop.dashboard.masking import masked, masked_command
from offloop.dashboard.protocol.from_server import RunInfo
from offloop.dashboard.protocol.limits import CommandName
from offloop.engine import (
    Command,
    ConfigError,
    Event,
    Pause,
    ReplayedRun,
    Resume,
    SampleFiles,
    Stop,
    TrainStart,
)
from offloop.engine.monitor import Direction

_OF_REPLAYS: Final = ("pause", "resume", "stop")
_REPLAY: Final = "this is a replay, which trains nothing"

if TYPE_CHECKING:
    # A server of run directories loads no torch.
    from offloop.engine import Run


class RunSource(Protocol):
    """A run behind a `LiveRun`. The dashboard's thread reads it; nothing here blocks."""

    @property
    def id(self) -> str:
        """The `run_id`."""

    @property
    def is_here(self) -> bool:
        """True for a run of this process."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def state(self) -> str:
        """State of a run without `TrainEnd`, one of the protocol's `State`."""

    @property
    def why(self) -> str:
        """What there is to say about the run beside its state, for people; usually empty."""

    @property
    def is_saving(self) -> bool:
        """True while a checkpoint is being written."""

    @property
    def validation_batch(self) -> int:
        """Batches given to the validation in progress, or to the last one; 0 if that is not known."""

    @property
    def interrupted(self) -> bool:
        """True if a signal has asked the run to stop, as far as that is known."""

    @property
    def callback_seconds(self) -> tuple[float, float]:
        """Seconds so far in deciders, and in step hooks."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Commands that the run rejects, and why."""

    @property
    def samples(self) -> SampleFiles:
        """Contents of the run's samples. They outlive the run."""

    def describe(self, key: str, start: TrainStart) -> RunInfo:
        """Return the fixed facts about the run, whose newest attempt began with `start`."""

    def direction_of(self, metric: str) -> Direction | None:
        """Return whether lower or higher values of a metric are better; None if unknown."""

    def now(self) -> float:
        """Return the time by the clock of the run's events, Unix time in seconds."""

    def moment(self, newest: float) -> float:
        """Return when the newest events arrived, by that clock; `newest` is the time of the last one."""

    def stack(self) -> str:
        """Return the stack of the training thread; empty if unknown."""

    def traceback(self) -> str | None:
        """Return the traceback of a failed run; None if unknown."""

    def give_nowait(self, command: Command[Any], *, by: str) -> Future[Any]:
        """Give a command.

        Raises:
            OffloopError: The run rejects it.
        """

    def publish(self, event: Event) -> None:
        """Publish an event.

        Raises:
            OffloopError: The run cannot publish it.
        """


class ProcessRun:
    """A run of this process."""

    def __init__(self, run: "Run", groups: Mapping[str, int] = MappingProxyType({})) -> None:
        """Wrap a run.

        Args:
            run: The run.
            groups: How many parameter groups each of its optimizers has, by its name. The run may be over by now and
                its trainer gone.
        """
        self.run = run
        self._groups = groups

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def is_here(self) -> bool:
        return True

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def state(self) -> str:
        return self.run.state

    @property
    def why(self) -> str:
        return ""

    @property
    def is_saving(self) -> bool:
        return self.run.is_saving

    @property
    def validation_batch(self) -> int:
        return self.run.validation_batch

    @property
    def interrupted(self) -> bool:
        return self.run.interrupted

    @property
    def callback_seconds(self) -> tuple[float, float]:
        costs = self.run.callback_costs.values()
        return sum(cost.decided for cost in costs), sum(cost.in_step for cost in costs)

    @property
    def refused(self) -> Mapping[str, str]:
        return self.run.refused

    @property
    def samples(self) -> SampleFiles:
        return self.run.samples

    def describe(self, key: str, start: TrainStart) -> RunInfo:
        run = self.run
        return RunInfo(
            key=key,
            name=run.id,
            host=platform.node(),
            pid=os.getpid(),
            command=[Path(sys.argv[0]).name, *masked_command(sys.argv[1:])],
            commit=None if run.dir is None else _commit_of(run.dir),
            directory=None if run.dir is None else str(run.dir),
            optimizers=list(self._groups) if len(self._groups) > 1 else [],
            live=True,
            default_monitor=run.default_monitor,
            given_hyperparameters=masked(run.hyperparameters),
            groups=dict(self._groups),
            monitor=run.monitor,
            callbacks=list(run.callback_costs),
            refused=named_commands(self.refused),
            **facts_of(start),
        )

    def direction_of(self, metric: str) -> Direction | None:
        return self.run.direction_of(metric)

    def now(self) -> float:
        return time.time()

    def moment(self, newest: float) -> float:
        return time.time()

    def stack(self) -> str:
        return self.run.stack()

    def traceback(self) -> str | None:
        failure = self.run.failure
        return None if failure is None else "".join(traceback.format_exception(failure))

    def give_nowait(self, command: Command[Any], *, by: str) -> Future[Any]:
        return self.run.give_nowait(command, by=by)

    def publish(self, event: Event) -> None:
        self.run.publish(event)


class ReplaySource(ProcessRun):
    """A run that is replayed in this process. Pause, resume and stop are those of the replay."""

    def __init__(self, run: "ReplayedRun") -> None:
        """Wrap a run, as a callback of the replay has it."""
        super().__init__(run)  # type: ignore[arg-type]  # it has all that is asked of a run here
        self._replayed = run

    @property
    def state(self) -> str:
        run, replay = self._replayed, self._replayed.replay
        if run.is_over:
            return run.state if run.has_end else "stopped" if replay.is_stopped else "lost"
        return "paused" if replay.is_paused else run.state

    @property
    def why(self) -> str:
        replay = self._replayed.replay
        if self._replayed.is_over and not (self._replayed.has_end or replay.is_stopped):
            return "a replay: the log of this attempt ends here, without its end"
        return "a replay" if replay.speed is None else f"a replay at {replay.speed:g}x"

    @property
    def refused(self) -> Mapping[str, str]:
        return {name: _REPLAY for name in get_args(CommandName) if name not in _OF_REPLAYS}

    def now(self) -> float:
        return self._replayed.event.time

    def moment(self, newest: float) -> float:
        return newest

    def traceback(self) -> str | None:
        return None

    def give_nowait(self, command: Command[Any], *, by: str) -> Future[Any]:
        replay = self._replayed.replay
        match command:
            case Pause():
                return replay.pause_nowait()
            case Resume():
                return replay.resume_nowait()
            case Stop():
                replay.stop()
                stopped: Future[None] = Future()
                stopped.set_result(None)
                return stopped
            case _:
                raise ConfigError(_REPLAY)


def source_of(run: "Run | ReplayedRun") -> ProcessRun:
    """Return the source for a run of this process, as a callback has it."""
    if isinstance(run, ReplayedRun):
        return ReplaySource(run)
    return ProcessRun(run, {name: len(each.param_groups) for name, each in run.trainer.optimizers.items()})


def facts_of(start: TrainStart) -> dict[str, Any]:
    """Return the fields of `RunInfo` that the first event of an attempt tells."""
    return {
        "attempt": start.attempt,
        "started": start.time,
        "device": start.device,
        "world_size": start.world_size,
        "parameters": start.parameters,
        "epochs": start.epochs,
        "max_steps": start.max_steps,
        "max_time": start.max_time,
        "steps_per_epoch": start.steps_per_epoch,
        "batches_per_epoch": start.batches_per_epoch,
        "config": masked(start.config),
        "hyperparameters": masked(start.hyperparameters),
    }


def named_commands(refused: Mapping[str, str]) -> dict[str, str]:
    """Return the refused commands that the page has."""
    return {name: why for name, why in refused.items() if name in get_args(CommandName)}


def _commit_of(directory: Path) -> str | None:
    try:
        return commit_in(msgspec.json.decode((directory / "run.json").read_bytes()).get("git"))
    except (OSError, msgspec.DecodeError, AttributeError):
        return None


def commit_in(git: object) -> str | None:
    """Return the commit that a `run.json` names, in words; None if there is none."""
    commit = git.get("commit") if isinstance(git, dict) else None
    if not isinstance(git, dict) or not isinstance(commit, str):
        return None
    return f"{commit}{' with changes' if git.get('dirty') else ''}"
