"""RunArguments: what `train`, `train_async`, `start` and `Runs.start` are given."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from offloop.engine.callback import Callback
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.metrics.names import RunMetrics
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.weights.source import Source


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """What a run trains on, how long, and what it continues. `BaseTrainer.train` says what each one means."""

    train_loader: Iterable[Any]
    val_loader: ValLoader | None
    epochs: int | None
    max_steps: int | None
    max_time: float | None
    metrics: RunMetrics
    callbacks: Sequence[Callback]
    resume: Resume
    resume_lr: float | None
    init_from: Source | None
    init_strict: bool
