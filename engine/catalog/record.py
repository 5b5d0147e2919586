"""RunRecord: one run, as its directory describes it.

Each fault of a directory is a record with a reason: files that are missing, broken, unreadable or of a later version
never raise. Whether a run goes on is known by the locks of its directory (`checkpoint/lock.py`). Where they tell
nothing, on a file system without locks or for a process of another host, a log that does not grow counts as the end.
"""

import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from offloop.engine.catalog.files import read_small_file
from offloop.engine.catalog.labels import RunLabels, read_labels
from offloop.engine.catalog.log_end import LogEnd, read_log_end
from offloop.engine.catalog.summary import SPARKLINE, RunMetric
from offloop.engine.checkpoint.lock import has_writer
from offloop.engine.errors import RunLabelsError
from offloop.engine.events import SCHEMA
from offloop.engine.monitor import Direction
from offloop.engine.observers.event_log import FILE_NAME
from offloop.engine.paths import RUN_JSON
from offloop.engine.visible_text import visible

SILENCE: Final = 300.0
"""Seconds without a new event after which a run counts as lost where no lock tells: longer than most validations."""
ENDED: Final = frozenset({"completed", "stopped", "cancelled", "failed"})
"""States of a run that has said how it ended."""

T = TypeVar("T")


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as its directory describes it. What is unknown has its default."""

    key: str
    """Path of the directory relative to that of the runs, with `/`; usually its name."""
    directory: str
    """Absolute path."""
    id: str
    """Its `run_id`."""
    state: str
    """`running`, `paused`, `validating` or `stopping`; `completed`, `stopped`, `cancelled` or `failed`; `lost`: it
    ended without saying so, or nothing tells how it goes on or ended."""
    why: str = ""
    """Why it is in this state, or what of the directory cannot be read, in words; empty if there is nothing to say."""
    attempt: int = 0
    """How often the run was resumed."""
    host: str = ""
    pid: int = 0
    command: tuple[str, ...] = ()
    """Command line."""
    commit: str | None = None
    """Git commit of the working directory."""
    created: float = 0.0
    """Unix time in seconds at which the first attempt began."""
    started: float = 0.0
    """Unix time in seconds at which the last attempt began."""
    heard: float = 0.0
    """Unix time in seconds of the newest event, or of the end."""
    seconds: float = 0.0
    """Duration of the last attempt so far, in seconds."""
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done, which is the index of the epoch in progress."""
    monitor: str = ""
    """Metric that defines the best checkpoint."""
    mode: Direction | None = None
    """Whether less or more of it is better."""
    metrics: Mapping[str, RunMetric] = {}
    """Metrics by name."""
    sparkline: tuple[float, ...] = ()
    """At most 32 values of the monitored metric, or of the loss, from the first to the last."""
    hyperparameters: Mapping[str, Any] = {}
    """What the run was made with, by flat name. Secrets are not masked."""
    epochs: int | None = None
    """Limit of the run: total epochs."""
    max_steps: int | None = None
    """Limit of the run: total optimizer steps."""
    max_time: float | None = None
    """Limit of the run: total seconds of training."""
    steps_per_epoch: int | None = None
    world_size: int = 1
    """Number of processes that train together."""
    device: str = ""
    parameters: int = 0
    """Number of trainable parameters."""
    labels: RunLabels = RunLabels()

    @property
    def name(self) -> str:
        """What the run is called: the name in its labels, or its id. Without invisible characters."""
        return self.labels.name or visible(self.id)

    @property
    def has_ended(self) -> bool:
        """True if the run has said how it ended."""
        return self.state in ENDED

    @property
    def progress(self) -> float | None:
        """Share of the run done, from 0 to 1, by the limit that ends it first; None without a limit."""
        shares = []
        if self.max_steps:
            shares.append(self.step / self.max_steps)
        if self.epochs:
            steps = self.epochs * (self.steps_per_epoch or 0)
            shares.append(self.step / steps if steps else self.epoch / self.epochs)
        if self.max_time:
            shares.append(self.seconds / self.max_time)
        return min(1.0, max(shares)) if shares else None


def read_run(directory: Path | str) -> RunRecord:
    """Return what a run's directory says. Any thread; blocks on the file system. Never raises for a bad directory.

    Args:
        directory: The run's: it has `run.json`, or at least `events.jsonl`.
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    return make_record(os.path.basename(path), path)


def make_record(key: str, path: str, *, silent: float | None = None, state: str = "lost") -> RunRecord:
    """Return the record of a directory.

    Args:
        key: Of the record.
        path: The directory.
        silent: Seconds since its log was seen growing; None to take them from the file's time.
        state: That of a run whose directory cannot be read.
    """
    faults: list[str] = []
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return RunRecord(
            key=key, directory=path, id=os.path.basename(path), state=state, why=unreadable(error)
        )
    described = _described(path, faults)
    labels = RunLabels()
    try:
        labels = read_labels(path)
    except RunLabelsError as error:
        faults.append(_short(str(error), path))
    log = None
    if _word(described, "status") not in ENDED:
        try:
            monitor = _get(described, "monitor", str, "val_loss")
            log = read_log_end(path, monitor, _direction(described.get("mode")))
        except FileNotFoundError:
            if not described:
                faults.append(f"{FILE_NAME} is missing")
        except OSError as error:
            faults.append(f"{FILE_NAME} {unreadable(error)}")
    facts = _facts(described, log)
    now_state, why = _state_of(path, described, log, silent)
    return RunRecord(
        key=key,
        directory=path,
        id=_get(described, "run_id", str, os.path.basename(path)),
        state=now_state,
        why="; ".join([each for each in (why, *faults) if each]),
        labels=labels,
        **facts,
    )


def _described(path: str, faults: list[str]) -> dict[str, Any]:
    """Return `run.json`; empty if it cannot be read, and then `faults` gets the reason."""
    try:
        content = read_small_file(os.path.join(path, RUN_JSON))
        described = msgspec.json.decode(content, type=dict[str, Any])
    except FileNotFoundError:
        faults.append(f"{RUN_JSON} is missing")
    except OSError as error:
        faults.append(f"{RUN_JSON} {unreadable(error)}")
    except (msgspec.MsgspecError, RecursionError):
        faults.append(f"{RUN_JSON} is {'no JSON object' if content else 'empty'}")
    else:
        schema = _get(described, "schema", int, SCHEMA)
        if schema > SCHEMA:
            faults.append(
                f"{RUN_JSON} was written by a later version of offloop (schema {schema}, known is {SCHEMA})"
            )
        return described
    return {}


def _facts(described: Mapping[str, Any], log: LogEnd | None) -> dict[str, Any]:
    """Return the fields of a record that files tell; later sources first."""
    start = None if log is None else log.start
    config = _get(described, "config", dict, {})
    created = _get(described, "created", float, 0.0)
    attempt = _get(described, "attempt", int, 0)
    started = _get(described, "started", float, created)
    if start is not None:
        created = created or start.time
        if start.attempt >= attempt:
            attempt, started = start.attempt, start.time
    heard = _get(described, "ended", float, started)
    facts: dict[str, Any] = {
        "attempt": attempt,
        "created": created,
        "started": started,
        "host": _get(described, "host", str, ""),
        "pid": _get(described, "pid", int, 0),
        "command": tuple(str(each) for each in _get(described, "command", list, [])),
        "commit": _get(_get(described, "git", dict, {}), "commit", str, None),
        "monitor": _get(described, "monitor", str, ""),
        "mode": _direction(described.get("mode")),
    }
    if not facts["monitor"]:
        facts["monitor"] = _get(config, "monitor", str, "")
    if log is None:
        facts |= {
            "heard": heard,
            "seconds": _get(described, "seconds", float, 0.0),
            "step": _get(described, "steps", int, 0),
            "epoch": _get(described, "epochs", int, 0),
            "metrics": _metrics_of(described),
            "sparkline": tuple(_numbers(described.get("sparkline"))[:SPARKLINE]),
        }
    else:
        heard = max(heard, log.heard)
        facts |= {
            "heard": heard,
            "seconds": log.end.seconds if log.end is not None else max(0.0, heard - started),
            "step": log.step,
            "epoch": log.epoch,
            "metrics": log.summary.metrics,
            "sparkline": log.sparkline,
        }
    facts["device"] = _get(described, "device", str, "" if start is None else start.device)
    for name, default in (("parameters", 0), ("world_size", 1), ("steps_per_epoch", None)):
        facts[name] = _get(described, name, int, default if start is None else getattr(start, name))
    limits = _get(described, "limits", dict, {})
    for name in ("epochs", "max_steps"):
        facts[name] = _get(limits, name, int, None if start is None else getattr(start, name))
    facts["max_time"] = _get(limits, "max_time", float, None if start is None else start.max_time)
    given = described.get("hyperparameters")
    if given is None and start is not None:
        given = dict(start.hyperparameters)
    facts["hyperparameters"] = given if isinstance(given, dict) else {}
    return facts


def _state_of(
    path: str, described: Mapping[str, Any], log: LogEnd | None, silent: float | None
) -> tuple[str, str]:
    """Return the state of a run, and why it has it in words."""
    status = _word(described, "status")
    reason = _get(described, "reason", str, "")
    if status in ENDED:
        return status, "" if status == "completed" else reason
    # A resumed attempt writes run.json before its first event: until then, the log ends with the attempt before
    if log is not None and log.end is not None and log.end.time >= _get(described, "started", float, 0.0):
        end = log.end
        if end.status in ENDED:
            return end.status, "" if end.status == "completed" else end.reason
    try:
        is_written = has_writer(Path(path))
    except OSError as error:
        return "lost", unreadable(error)
    state = "running" if log is None else log.state
    if is_written:
        return state, ""
    if not described and log is None:
        # Why nothing can be read is said elsewhere
        return "lost", ""
    host = _get(described, "host", str, "")
    heard = last_change(path)
    if is_written is False and host == platform.node():
        return "lost", f"ended without saying so, last heard {clock_time(heard)}"
    silent = time.time() - heard if silent is None else silent
    if silent < SILENCE:
        return state, ""
    if not host:
        return "lost", f"ended without saying so, last heard {clock_time(heard)}"
    cause = f"it runs on {host}" if host != platform.node() else "the file system has no locks"
    return "lost", f"silent, last heard {clock_time(heard)}; {cause}, so only its log tells that it goes on"


def last_change(path: str) -> float:
    """Return the Unix time in seconds at which a run's files changed last; 0 if it has none."""
    times = [0.0]
    for name in (FILE_NAME, RUN_JSON):
        try:
            times.append(os.lstat(os.path.join(path, name)).st_mtime)
        except OSError:
            continue
    return max(times)


def clock_time(moment: float) -> str:
    """Format a Unix time: `14:32:05` today, with the date on other days."""
    try:
        then = time.localtime(moment)
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
    is_today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M:%S", then)


def _metrics_of(described: Mapping[str, Any]) -> dict[str, RunMetric]:
    """Return the metrics in the `run.json` of a run that has ended."""
    found: dict[str, RunMetric] = {}
    summary = _get(described, "summary", dict, {})
    latest = _get(described, "metrics", dict, {})
    for name in {**latest, **summary}:
        more = _get(summary, name, dict, {})
        last = _number(latest.get(name, more.get("last")))
        if last is None:
            continue
        best = _number(more.get("best"))
        found[name] = RunMetric(
            last=last,
            best=best,
            best_step=_get(more, "best_step", int, None),
            mode=_direction(more.get("mode")),
        )
    best_of_run = _get(described, "best", dict, {})
    monitor = _get(best_of_run, "monitor", str, "")
    score = _number(best_of_run.get("score"))
    if monitor in found and found[monitor].best is None and score is not None:
        step = _get(best_of_run, "step", int, None)
        found[monitor] = msgspec.structs.replace(found[monitor], best=score, best_step=step)
    return found


def _direction(value: object) -> Direction | None:
    return value if value == "min" or value == "max" else None


def _get(fields: Mapping[str, Any], name: str, kind: type[T], default: Any) -> Any:
    """Return a field if it has the type, else the default. An int is a float."""
    value = fields.get(name)
    if kind is float:
        number = _number(value)
        return default if number is None or not math.isfinite(number) else number
    if kind is int and isinstance(value, bool):
        return default
    return value if isinstance(value, kind) else default


def _word(fields: Mapping[str, Any], name: str) -> str:
    word: str = _get(fields, name, str, "")
    return word


def _number(value: object) -> float | None:
    """Return a number of a file, in which NaN and infinities are strings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _numbers(values: object) -> list[float]:
    found = [_number(each) for each in values] if isinstance(values, list) else []
    return [each for each in found if each is not None]


def unreadable(error: OSError) -> str:
    """Return in words that a file or a directory cannot be read, and why."""
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def _short(text: str, path: str) -> str:
    return text.replace(path + os.sep, "")
