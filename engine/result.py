"""The outcome of a run, in memory or read from its directory."""

import dataclasses
import math
import os
import textwrap
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from offloop.engine.best import Best
from offloop.engine.checkpoint.evaluations import EvaluationRecord, of_this_run
from offloop.engine.encoding import with_non_finite_as_text
from offloop.engine.events import EpochEnd, Metrics, TrainEnd, TrainStart, ValidationEnd
from offloop.engine.monitor import EVALUATED
from offloop.engine.observers.event_log import FILE_NAME as EVENTS
from offloop.engine.observers.event_log import read_events
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.paths import meant_run
from offloop.engine.recovery.evaluations import latest_of, with_evaluations
from offloop.engine.run_dir import read_run_json

Status = Literal["completed", "stopped", "cancelled", "failed", "running"]


_SHOWN_METRICS = 6
"""Metrics in the representation of a result; a notebook cell has no room for more."""


class _Told(msgspec.Struct):
    """The parts of a result that only rank 0 of a run knows."""

    best: Best | None
    callback_costs: dict[str, CallbackCosts]
    callback_errors: dict[str, tuple[str, ...]]
    seconds: float
    evaluated: tuple[dict[str, float], ...]
    """Figures of checkpoints that rank 0 had evaluated: in the rows of the history, and the latest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunResult:
    """The outcome of a run: returned by `train`, or read from the run's directory by `load`."""

    run_id: str
    """Identity of the run."""
    status: Status
    """`completed` (a limit was reached), `stopped` (on request), `cancelled` or `failed`.

    A run that `load` reads before its end, or after it was killed, is `running`."""
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

    Its `monitor` is the name of that metric. None if the metric was never computed, or never finite. `ModelCheckpoint`
    has a separate `best`.
    """
    history: tuple[EpochEnd, ...]
    """The end of each epoch, with its metrics."""
    seconds: float
    """Duration."""
    callback_costs: Mapping[str, CallbackCosts]
    """What callbacks cost and missed, by the name of the callback."""
    callback_errors: Mapping[str, tuple[str, ...]]
    """The first hundred errors of each callback, by its name; callbacks without errors are not listed."""
    dir: Path | None
    """The run's directory; None if nothing was written."""

    def __repr__(self) -> str:
        reason = textwrap.shorten(self.reason, 80, placeholder="...")
        failed = f"; errors in {', '.join(self.callback_errors)}" if self.callback_errors else ""
        lines = [
            f"<RunResult {self.run_id}: {self.status} ({reason}), {self.epochs} epochs, {self.steps} steps, "
            f"{self.seconds:.1f} s{failed}"
        ]
        if self.metrics:
            shown = [f"{name}={value:.4g}" for name, value in islice(self.metrics.items(), _SHOWN_METRICS)]
            more = len(self.metrics) - len(shown)
            lines.append(f"  {', '.join(shown)}{f' and {more} more' if more else ''}")
        if self.best is not None:
            best = self.best
            lines.append(f"  best {best.monitor}={best.score:.4g} in epoch {best.epoch}, at step {best.step}")
        return "\n".join(lines) + ">"

    def to_columns(self) -> dict[str, list[float]]:
        """Return the history as columns by name, each with one value for every epoch.

        The columns are `epoch`, `step`, `samples`, `seconds`, and the metrics in the order in which they first
        appeared; NaN marks an epoch without that metric. `pandas.DataFrame(result.to_columns())` makes a table.
        """
        names = dict.fromkeys(name for end in self.history for name in end.metrics)
        columns: dict[str, list[float]] = {
            name: [getattr(end, name) for end in self.history]
            for name in ("epoch", "step", "samples", "seconds")
        }
        for name in names:
            columns[name] = [end.metrics.get(name, math.nan) for end in self.history]
        return columns

    def encode(self) -> bytes:
        """Return what the other ranks of a run cannot know themselves, as MessagePack."""
        rows = (*(end.metrics for end in self.history), self.metrics)
        evaluated = tuple(
            {key: value for key, value in row.items() if key.startswith(EVALUATED)} for row in rows
        )
        return msgspec.msgpack.encode(
            _Told(self.best, dict(self.callback_costs), dict(self.callback_errors), self.seconds, evaluated)
        )

    def as_told(self, told: bytes) -> "RunResult":
        """Return this result with what `encode` of rank 0's result holds."""
        of_first = msgspec.msgpack.decode(told, type=_Told)
        *rows, latest = of_first.evaluated
        return dataclasses.replace(
            self,
            metrics=Metrics({**self.metrics, **latest}),
            history=tuple(
                msgspec.structs.replace(end, metrics=Metrics({**end.metrics, **row})) if row else end
                for end, row in zip(self.history, rows, strict=False)
            ),
            best=of_first.best,
            callback_costs=of_first.callback_costs,
            callback_errors=of_first.callback_errors,
            seconds=of_first.seconds,
        )

    def to_run_json(self) -> dict[str, Any]:
        """Return the content of `run.json`: numbers and strings, with NaN and infinities as strings."""
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
        """Read the outcome of a run from its directory, in any process, at any time. Blocks on the file system.

        History and metrics come from the run's log, so they are known while the run is in progress and after it was
        killed; `best` and `callback_errors` are known once it has ended. `callback_costs` are not saved.

        Args:
            run_dir: The directory of the run, which holds `run.json` and `events.jsonl`.

        Raises:
            FileNotFoundError: This is not the directory of a run.
        """
        directory = Path(run_dir).expanduser()
        described = read_run_json(directory)
        if not described:
            raise FileNotFoundError(
                f"{directory} is not the directory of a run: it has no run.json and no {EVENTS}; give run_dir/run_name"
                f"{meant_run(directory)}"
            )
        history: list[EpochEnd] = []
        latest: dict[str, float] = {}
        start = end = step = None
        for event in read_events(directory) if (directory / EVENTS).is_file() else ():
            step = event.step
            end = event if isinstance(event, TrainEnd) else None
            start = event if isinstance(event, TrainStart) else start
            if isinstance(event, EpochEnd | ValidationEnd):
                latest.update(event.metrics)
            if isinstance(event, EpochEnd):
                history.append(event)
        if start is not None:
            record = EvaluationRecord(directory).read().values()
            found = of_this_run(record, attempt=start.attempt, resumed_step=start.step)
            history = list(with_evaluations(history, found))
            latest |= latest_of(found)
        # Until an attempt has ended, run.json describes the end of the previous attempt
        status, reason = ("running", "") if end is None else (end.status, end.reason)
        ending = described if end is not None else {}
        best = ending.get("best")
        return RunResult(
            run_id=directory.absolute().name,
            status=status,  # type: ignore[arg-type]  # written by a run
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
