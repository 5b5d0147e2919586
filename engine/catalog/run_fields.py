"""Fields of runs: what runs are filtered and sorted by, and shown in columns, on the command line and the live page.

Besides `RUN_FIELDS` there are a field for each metric and each hyperparameter of the runs at hand:

    val_loss, last.val_loss, best.val_loss       last and best value of a metric
    optimizer.lr, hparams.optimizer.lr           a hyperparameter; with `hparams.`, also if a metric has its name

`dashboard/web/src/runs/fields.ts` is the same in TypeScript; `tests/support/run_filters.json` is tried with both.
"""

import json
import math
import re
import time
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

from offloop.engine.catalog.record import ENDED, RunRecord
from offloop.engine.errors import ConfigError


class RunField(NamedTuple):
    """One of `RUN_FIELDS`: a field that every run has, by which runs are filtered and sorted."""

    name: str
    kind: Literal["text", "tag", "state", "flag", "number", "duration", "date"]
    about: str
    """What it is, for people."""


RUN_FIELDS: Final = (
    RunField("name", "text", "its name, or its id if nobody gave it one"),
    RunField("id", "text", "its `run_id`"),
    RunField("key", "text", "its directory, as seen from that of all runs"),
    RunField("state", "state", "`running`, `completed`, `failed`, `lost`, ...; `live` is any that goes on"),
    RunField("tag", "tag", "one of its tags"),
    RunField("note", "text", "its note"),
    RunField("host", "text", "the machine that trains it"),
    RunField("device", "text", "the device that it trains on"),
    RunField("why", "text", "why it is in its state"),
    RunField("archived", "flag", "`yes` or `no`"),
    RunField("step", "number", "optimizer steps done"),
    RunField("epoch", "number", "epochs done"),
    RunField("progress", "number", "share of the run done: `50%` or `0.5`"),
    RunField("attempt", "number", "how often it was resumed"),
    RunField("metric", "text", "name of the metric that defines its best checkpoint"),
    RunField("last", "number", "last value of that metric"),
    RunField("best", "number", "best value of that metric"),
    RunField("duration", "duration", "duration of its last attempt: `90s`, `5min`, `2h`, `1d`, `1h30min`"),
    RunField("age", "duration", "time since that attempt began"),
    RunField(
        "started", "date", "when its last attempt began: `2026-11-30`, `2026-11-30T14:30`, `2026-11`, `today`"
    ),
    RunField("heard", "date", "when it was heard last"),
)
"""What runs are filtered and sorted by, besides metrics and hyperparameters."""
KINDS: Final = {each.name: each.kind for each in RUN_FIELDS}
STATES: Final = (
    *("live", "starting", "waiting", "running", "validating", "paused", "stopping", "closing"),
    *("completed", "stopped", "cancelled", "failed", "lost"),
)
"""What the field `state` is compared with."""
BEST: Final = "best."
LAST: Final = "last."
HPARAMS: Final = "hparams."
_MEANT: Final = {
    **dict.fromkeys(("status", "is"), "state"),
    **dict.fromkeys(("tags", "label", "labels"), "tag"),
    **dict.fromkeys(("notes", "description"), "note"),
    **dict.fromkeys(("seconds", "runtime", "elapsed"), "duration"),
    **dict.fromkeys(("date", "created", "time"), "started"),
    **dict.fromkeys(("directory", "path", "dir", "folder"), "key"),
    **dict.fromkeys(("hostname", "machine", "node"), "host"),
    **dict.fromkeys(("reason", "error"), "why"),
    **dict.fromkeys(("finished", "success", "succeeded", "done"), "completed"),
    **dict.fromkeys(("crashed", "errored"), "failed"),
    **dict.fromkeys(("killed", "dead"), "lost"),
    **dict.fromkeys(("active", "alive", "unfinished"), "live"),
}
"""What other tools call fields and states."""


# Values --------------------------------------------------------------------------------------------


def values_of(record: RunRecord, name: str, *, now: float | None = None) -> list[Any]:
    """Return the values of a run in a field: none, one, or several; a metric may have a hyperparameter's name.

    Args:
        record: The run.
        name: One of `RUN_FIELDS`, or of a metric or a hyperparameter: `val_loss`, `best.val_loss`, `optimizer.lr`.
        now: Unix time in seconds for `age`; None for that of this moment.
    """
    if name.lower() in KINDS:
        return _of_run(record, name.lower(), now)
    for start, which in ((LAST, "last"), (BEST, "best")):
        if name.startswith(start) and (metric := record.metrics.get(name.removeprefix(start))) is not None:
            value = getattr(metric, which)
            return [] if value is None else [value]
    found: list[Any] = [record.metrics[name].last] if name in record.metrics else []
    for setting in dict.fromkeys((name, name.removeprefix(HPARAMS))):
        if (value := record.hyperparameters.get(setting)) is not None:
            found.append(value)
    return found


def _of_run(record: RunRecord, name: str, now: float | None) -> list[Any]:
    match name:
        case "tag":
            return list(record.labels.tags)
        case "note":
            value: Any = record.labels.note
        case "archived":
            value = "yes" if record.labels.archived else "no"
        case "metric":
            value = record.monitor
        case "last" | "best":
            metric = record.metrics.get(record.monitor)
            value = None if metric is None else getattr(metric, name)
        case "duration":
            value = record.seconds or None
        case "started":
            value = began(record) or None
        case "age":
            moment = time.time() if now is None else now
            value = max(0.0, moment - began(record)) if began(record) else None
        case "heard":
            value = record.heard or None
        case _:
            value = getattr(record, name)
    return [] if value is None or value == "" else [value]


def began(record: RunRecord) -> float:
    """Return the Unix time at which a run's last attempt began; 0 if unknown."""
    return record.started or record.created


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def text_of(value: object) -> str:
    """Return a value that is no number as it is compared: a text, or JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def is_live(state: str) -> bool:
    """True if a run in a state goes on, as far as is known."""
    return state not in ENDED and state != "lost"


# Names ---------------------------------------------------------------------------------------------


class RunNames:
    """Names of the metrics and hyperparameters that some of the runs have."""

    def __init__(self, records: Iterable[RunRecord]) -> None:
        self._records = list(records)

    @property
    def is_empty(self) -> bool:
        return not self._records

    # Mostly a name is known, and one of the first runs has it.

    def has(self, name: str) -> bool:
        if name.lower() in KINDS or self._is_metric(name) or self.is_hyperparameter(name):
            return True
        return name.startswith((LAST, BEST)) and self._is_metric(name[len(LAST) :])

    def _is_metric(self, name: str) -> bool:
        return any(name in each.metrics for each in self._records)

    def is_hyperparameter(self, name: str) -> bool:
        names = (name, name.removeprefix(HPARAMS))
        return any(each in record.hyperparameters for record in self._records for each in names)

    def problem(self, name: str) -> str:
        """Return that no run has a field, and which was meant; empty if one has it, or if there are no runs."""
        if self.is_empty or self.has(name):
            return ""
        metrics = {metric for each in self._records for metric in each.metrics}
        settings = {setting for each in self._records for setting in each.hyperparameters}
        meant = None
        for start, names in ((LAST, metrics), (BEST, metrics), (HPARAMS, settings)):
            if name.startswith(start) and (near := nearest(name.removeprefix(start), names)):
                meant = start + near
        meant = meant or nearest(name, {*KINDS, *metrics, *settings})
        return f"no run has '{name}'" + (f"; did you mean '{meant}'?" if meant else "")


def check_fields(records: Iterable[RunRecord], names: Iterable[str]) -> None:
    """Raise an error for a field that no run has, such as a misspelled metric.

    Raises:
        ConfigError: No run has one of the fields; the text has the nearest one. Not if there are no runs at all.
    """
    known = RunNames(records)
    for name in names:
        if problem := known.problem(name):
            raise ConfigError(problem)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of several names that was probably meant: another tool's word for it, or nearly its spelling."""
    known = sorted(names)
    lower = name.lower()
    if _MEANT.get(lower) in known:
        return _MEANT[lower]
    # `lr` for `optimizer.lr`, `metrics.val_loss` for `val_loss`, and both at once
    for part in dict.fromkeys((lower, lower.partition(".")[2] or lower)):
        for each in known:
            if part == each.lower() or each.lower().endswith("." + part):
                return each
    if len(lower) > 2 and (longer := [each for each in known if each.lower().startswith(lower)]):
        return longer[0]
    best, found = max(1, len(lower) // 3) + 1, None
    for each in known:
        if abs(len(each) - len(lower)) < best and (distance := _distance(lower, each.lower())) < best:
            best, found = distance, each
    return found


def _distance(one: str, other: str) -> int:
    """Return how many letters to add, remove, replace or swap with their neighbours make one text the other."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, another in enumerate(other, 1):
            cost = min(line[-1] + 1, last[column] + 1, last[column - 1] + (letter != another))
            if row > 1 and column > 1 and (letter, one[row - 2]) == (other[column - 2], another):
                cost = min(cost, before[column - 2] + 1)
            line.append(cost)
        before, last = last, line
    return last[-1]


# Order ---------------------------------------------------------------------------------------------


def sort_runs(records: Iterable[RunRecord], by: str, *, now: float | None = None) -> list[RunRecord]:
    """Return runs in the order of a field: numbers, then texts; those without a value, or with NaN, are last.

    `seed-9` comes before `seed-10`. Of equal runs the newer one comes first.

    Args:
        records: The runs.
        by: A field, as for `values_of`; with `-` in front, the largest and newest come first.
        now: Unix time in seconds for `age`; None for that of this moment.
    """
    name = by.removeprefix("-")
    runs = sorted(records, key=lambda each: (-began(each), _units(each.key)))
    keyed = [(_sorting_key(each, name, now), each) for each in runs]
    known = [pair for pair in keyed if pair[0] is not None]
    known.sort(key=lambda pair: pair[0], reverse=by.startswith("-"))
    return [*(each for _, each in known), *(each for key, each in keyed if key is None)]


def _sorting_key(record: RunRecord, name: str, now: float | None) -> Any:
    """Return what a run is sorted by; None if it has no value."""
    values = values_of(record, name, now=now)
    if name.lower() == "tag":
        values = [", ".join(values)] if values else []
    for value in values:
        if not is_number(value):
            return 1, _natural(text_of(value))
        if not (isinstance(value, float) and math.isnan(value)):
            return 0, value
    return None


def _natural(text: str) -> list[Any]:
    """Return a text in parts whose order is that of its numbers: 9 before 10."""
    parts: list[Any] = re.split("([0-9]+)", text.lower())
    for place in range(1, len(parts), 2):
        digits = parts[place].lstrip("0")
        parts[place] = (len(digits), digits)
    return [part if isinstance(part, tuple) else _units(part) for part in parts]


def _units(text: str) -> bytes:
    """Return a text as a browser compares it."""
    return text.encode("utf-16-be", "surrogatepass")
