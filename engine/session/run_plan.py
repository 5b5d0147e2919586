"""RunPlan: everything that is decided about a run before it starts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offloop.engine.callback import Handlers
from offloop.engine.checkpoint import RemoteRun
from offloop.engine.recovery.resume_plan import ResumePlan
from offloop.engine.session.monitors import Monitors
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Setup
from offloop.engine.weights.loading import InitialWeights

if TYPE_CHECKING:
    from offloop.engine.distributed.rank_run import RankRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What `prepare` makes of checked arguments, and a `Session` runs."""

    program: TrainingProgram
    """The trainer."""
    setup: Setup
    """Of the training loop."""
    run_id: str
    """Name of the run."""
    directory: Path | None
    """The run's; None for a run without one."""
    handlers: Sequence[Handlers]
    """Of the callbacks, in declared order."""
    longest_drain: float
    """Seconds that the slowest callback may take at the end, those of rank 0 included."""
    monitors: Monitors
    """The metrics that decide."""
    remote: RemoteRun | None
    """Where the directory is uploaded to."""
    resume: ResumePlan | None
    """The run to continue; None for a new one."""
    resume_lr: float | None
    """The learning rate to set in a resumed run."""
    initial_weights: InitialWeights | None
    """Weights to begin from."""
    ranks: "RankRun | None"
    """The run as one rank of several sees it; None for a process that trains alone."""
