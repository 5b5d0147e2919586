"""Progress: every counter of a training in one object.

The training thread writes it. `Run`, `RunResult` and checkpoints read it, other threads too: each field is replaced
as a whole (CPython makes that atomic), so a reader sees the value before or after a step, never half of one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from offloop.engine.events import NO_METRICS, EpochEnd, Metrics

Ending = Literal["stopped", "cancelled", "limit"]
Phase = Literal["before_epoch", "in_epoch", "after_epoch"]
State = Literal["running", "paused", "stopping"]


@dataclasses.dataclass(slots=True)
class Progress:
    """Where a training stands. Counters count finished things and start at 0."""

    epoch: int = 0
    """Epochs done, which is the index of the epoch in progress."""
    step: int = 0
    """Optimizer steps done."""
    batch: int = 0
    """Training batches taken from the loader."""
    phase: Phase = "before_epoch"
    """Where in the epoch; `after_epoch` from its `EpochEnd` until the next one begins."""

    epoch_batches: int = 0
    """Batches of the epoch in progress."""
    epoch_samples: int = 0
    """Samples of its finished steps."""
    epoch_first_step: int = 1
    """Number of its first step, counted from 1."""
    epoch_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics computed since the previous `EpochEnd`."""
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    """The latest value of each metric."""
    history: list[EpochEnd] = dataclasses.field(default_factory=list)
    """The end of each finished epoch."""

    state: State = "running"
    """What commands have made of it."""
    is_validating: bool = False
    """True during a validation."""
    validated_step: int = -1
    """The step at which the last finished validation ran; -1 before the first."""
    val_batches: int = 0
    """Batches of the validation in progress, or of the last one."""

    last_lr: float = 0.0
    """Learning rate of the latest step, the largest of the first optimizer's groups."""
    last_rates: Metrics = dataclasses.field(default_factory=lambda: NO_METRICS)
    """Learning rates of that step by parameter group, where they differ."""
    steps_of: dict[str, int] = dataclasses.field(default_factory=dict)
    """For manual optimization: training steps that have stepped each optimizer, by its name."""

    ending: Ending | None = None
    """Why the training ends before its loader does; None while it does not."""
    reason: str = ""
    """The same in words, for the result."""
    stopped_by: str | None = None
    """The callback whose decision stopped the run."""

    attempt: int = 0
    """How often the run had been resumed."""
    init_from: str | None = None
    """Where the first weights came from, in words."""
    earlier_seconds: float = 0.0
    """Seconds trained by earlier attempts."""

    @property
    def is_interrupted(self) -> bool:
        """True if the training ends in the middle of what it does: it was stopped or cancelled."""
        return self.ending in ("stopped", "cancelled")

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, for a checkpoint."""
        return {
            "position": {
                "epoch": self.epoch,
                "step": self.step,
                "batch": self.batch,
                "epoch_batches": self.epoch_batches,
                "epoch_samples": self.epoch_samples,
                "epoch_first_step": self.epoch_first_step,
                "validated_step": self.validated_step,
                "last_lr": self.last_lr,
            },
            "steps_of": dict(self.steps_of),
            "phase": self.phase,
            "epoch_metrics": dict(self.epoch_metrics),
            "latest": dict(self.latest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned. A finished epoch is counted here."""
        saved = state["position"]
        self.epoch, self.step, self.batch = saved["epoch"], saved["step"], saved["batch"]
        self.epoch_batches, self.epoch_samples = saved["epoch_batches"], saved["epoch_samples"]
        self.epoch_first_step = saved["epoch_first_step"]
        self.validated_step, self.last_lr = saved["validated_step"], saved["last_lr"]
        self.steps_of |= state.get("steps_of", dict.fromkeys(self.steps_of, self.step))
        self.phase = state["phase"]
        if self.phase == "after_epoch":
            self.epoch += 1
            self.phase = "before_epoch"
        self.epoch_metrics = dict(state["epoch_metrics"])
        self.latest = dict(state["latest"])


@dataclasses.dataclass(frozen=True, slots=True)
class ResumePoint:
    """The checkpoint that a resumed training continues, until its loaders and random states are restored."""

    path: str
    """Its directory."""
    attempt: int
    """The attempt that took it."""
    taken: float
    """When, in seconds since the epoch."""
    loaders: Mapping[str, Any]
    """Where the loaders stood."""
    random: Mapping[str, Any]
    """The state of every random generator."""
