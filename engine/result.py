"""RunResult: what a run has come to, in memory or read back from its directory."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from offloop.engine.best import Best
from offloop.engine.encoding import with_non_finite_as_text
from offloop.engine.events import EpochEnd, Metrics, TrainEnd, ValidationEnd
from offloop.engine.observers.event_log import FILE_NAME as EVENTS
from offloop.engine.observers.event_log import read_events
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.run_dir import read_run_json

Status = Literal["completed", "stopped", "cancelled", "failed", "running"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run has come to: returned by `train`, or read from the run's directory by `load`."""

    run_id: str
    """Identity of the run."""
    status: Status
    """`completed` (a limit was reached), `stopped` (on request), `cancelled` or `failed`; `running` only in what `load`
    reads of a run that has not ended, or was killed."""
    reason: str
    """Why, in words."""
    epochs: int
    """Epochs done."""
    steps: int
    """Optimizer steps done."""
    metrics: Metrics
    """The latest value of each metric. A missing key raises and lists the keys."""
    best: Best | None
    """The best moment by `Trainer(monitor=...)`, else by the first callback that names a metric, else by the loss.

    Its `monitor` says which. None if that metric was never made, or never finite. Each `ModelCheckpoint` has a `best`
    of its own.
    """
    history: tuple[EpochEnd, ...]
    """The end of each epoch, with its metrics."""
    seconds: float
    """Duration."""
    callback_costs: Mapping[str, CallbackCosts]
    """What each callback cost and missed, by name."""
    callback_errors: Mapping[str, tuple[str, ...]]
    """What each callback raised (the first hundred), by name; callbacks without errors are not listed."""
    dir: Path | None
    """The run's directory; None if nothing was written."""

    def to_columns(self) -> dict[str, list[float]]:
        """Return the history as columns by name, each with one value for every epoch.

        They are `epoch`, `step`, `samples`, `seconds`, and each metric in the order in which it first appeared; NaN
        stands where an epoch has no such metric. `pandas.DataFrame(result.to_columns())` makes a table of them.
        """
        names = dict.fromkeys(name for end in self.history for name in end.metrics)
        columns: dict[str, list[float]] = {
            name: [getattr(end, name) for end in self.history]
            for name in ("epoch", "step", "samples", "seconds")
        }
        for name in names:
            columns[name] = [end.metrics.get(name, math.nan) for end in self.history]
        return columns

    def to_run_json(self) -> dict[str, Any]:
        """Return what `run.json` says of it: numbers and texts, with NaN and infinities as texts."""
        return {
            "status": self.status,
            "reason": self.reason,
            "epochs": self.epochs,
            "steps": self.steps,
            "seconds": self.seconds,
            "metrics": with_non_finite_as_text(self.metrics),
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "callback_errors": self.callback_errors,
        }

    @staticmethod
    def load(run_dir: "str | os.PathLike[str]") -> "RunResult":
        """Read what a run has come to from its directory, in any process, at any time. Blocks on the file system.

        The history and the metrics come from the run's log, so that those of a run that goes on or was killed are
        there too; `best` and `callback_errors` are known once it has ended. `callback_costs` are not kept.

        Args:
            run_dir: The directory of the run, which holds `run.json` and `events.jsonl`.

        Raises:
            FileNotFoundError: This is no directory of a run.
        """
        directory = Path(run_dir).expanduser()
        described = read_run_json(directory)
        if not described:
            raise FileNotFoundError(
                f"{directory} is no directory of a run: it has neither run.json nor {EVENTS}; give run_dir/run_name"
            )
        history: list[EpochEnd] = []
        latest: dict[str, float] = {}
        end = step = None
        for event in read_events(directory) if (directory / EVENTS).is_file() else ():
            step = event.step
            end = event if isinstance(event, TrainEnd) else None
            if isinstance(event, EpochEnd | ValidationEnd):
                latest.update(event.metrics)
            if isinstance(event, EpochEnd):
                history.append(event)
        # run.json says how an earlier attempt ended until the next one has begun to write.
        status, reason = ("running", "") if end is None else (end.status, end.reason)
        ending = described if end is not None else {}
        best = ending.get("best")
        return RunResult(
            run_id=directory.absolute().name,
            status=status,  # type: ignore[arg-type]  # what a run has written
            reason=reason,
            epochs=sum(each.complete for each in history),
            steps=max(step or 0, 0),
            metrics=Metrics(latest if end is None else end.metrics),
            best=None if best is None else Best(**best),
            history=tuple(history),
            seconds=0.0 if end is None else end.seconds,
            callback_costs={},
            callback_errors={name: tuple(each) for name, each in ending.get("callback_errors", {}).items()},
            dir=directory,
        )
