"""FollowedRun: a run directory as the source of a `LiveRun`, whichever process writes it, or wrote it.

It takes no commands. Its state is that of the last events, unless its record says that it has ended or is lost.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, get_args

import msgspec

from offloop.dashboard.curves.layer_history import figures_of, says_layers, without_layers
from offloop.dashboard.masking import masked, masked_command
from offloop.dashboard.protocol.from_server import RunInfo
from offloop.dashboard.protocol.limits import CommandName
from offloop.dashboard.runs.live_run import FINAL_STATES, LiveRun, Numbers
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.runs.page_file import page_of
from offloop.dashboard.runs.run_source import facts_of
from offloop.engine import (
    Command,
    ConfigError,
    Event,
    RunRecord,
    Sample,
    SampleFiles,
    StateChanged,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    ValidationEnd,
    ValidationStart,
    read_run,
)
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.sample_numbers import numbers_in, numbers_in_fields
from offloop.engine.visible_text import visible

UNKNOWN_MILESTONES: Final = 100
"""Events of an unknown type that count as milestones; a type with more of them is one of samples."""
SAMPLES: Final = frozenset({"GradientStatistics", "LayersMeasured", "ResourceUsage"})
"""Samples whose classes load torch, and so are unknown here."""


class FollowedRun:
    """A run that is read from its directory.

    The thread that reads calls `update` and `observe`, the event loop the rest, never at the same time.
    """

    def __init__(self, record: RunRecord) -> None:
        """Follow a run, whose directory said this last."""
        self.record = record
        self.directory = Path(record.directory)
        self.page: str | None = None
        # What the record does not tell: how far the log is read, that the disk hangs.
        self.note = ""
        # Why its files cannot be read any more, and since when; empty while they can.
        self.fault = ""
        self._state = "running"
        # Time of the newest event, and the time of the file that it came with.
        self._heard = 0.0
        self._written = 0.0
        self._step = 0
        self._has_ended = False
        self._unknown: Counter[str] = Counter()

    # The thread that reads

    def update(self) -> bool:
        """Read what the directory says about the run; return whether its description has changed. Blocks.

        Raises:
            OSError: The directory is gone, or may not be read.
        """
        # `read_run` would make up a record. With the dot, it fails also where nothing in the directory may be read.
        os.stat(f"{self.directory}/.")
        before = self.record, self.page
        self.record = msgspec.structs.replace(read_run(self.directory), key=self.record.key)
        self.page = None if self.is_over else page_of(self.directory)
        after = self.record, self.page
        return _described(*before) != _described(*after)

    def observe(self, event: Event, written: float) -> None:
        """Note an event of the log, whose file was written last at `written`."""
        self._heard, self._written = event.time, written
        self._step = max(event.step, 0)
        match event:
            case TrainStart():
                self._state, self._has_ended = "running", False
            case TrainEnd():
                self._has_ended = True
            case ValidationStart():
                self._state = "validating" if self._state == "running" else self._state
            case ValidationEnd():
                self._state = "running" if self._state == "validating" else self._state
            case StateChanged():
                self._state = event.state

    def known(self, event: Event) -> Event | Numbers:
        """Return an event, or the numbers of a sample whose class is not defined here."""
        if not isinstance(event, UnknownEvent):
            return event
        self._unknown[event.type] += 1
        if event.type not in SAMPLES and self._unknown[event.type] <= UNKNOWN_MILESTONES:
            return event
        if not says_layers(event.type):
            return Numbers(event, dict(numbers_in(event)))
        try:
            fields = msgspec.json.decode(event.raw, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            return Numbers(event, {})
        numbers = without_layers(event.type, numbers_in_fields(event.type, fields))
        return Numbers(event, dict(numbers), figures_of(event.type, fields))

    # RunSource

    @property
    def id(self) -> str:
        return visible(self.record.id)

    @property
    def is_here(self) -> bool:
        return False

    @property
    def is_over(self) -> bool:
        """True if the run has ended, as far as it is known."""
        return self.state in FINAL_STATES or self.state == "lost"

    @property
    def step(self) -> int:
        return self._step

    @property
    def state(self) -> str:
        if self.record.has_ended or self.record.state == "lost":
            return self.record.state
        return "lost" if self.fault else self._state

    @property
    def why(self) -> str:
        if self.fault:
            return self.fault
        why = "" if self._has_ended else self.record.why
        return "; ".join(each for each in (self.note, why) if each)

    @property
    def is_saving(self) -> bool:
        return False

    @property
    def callback_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    @property
    def refused(self) -> Mapping[str, str]:
        if self.is_over or self._has_ended:
            why = "the run is over"
        elif self.page is not None:
            why = f"this page follows the run's files; its own page is at {self.page}"
        else:
            why = "this page follows the run's files, and the process that trains serves no page"
        return dict.fromkeys(get_args(CommandName), why)

    @property
    def validation_batch(self) -> int:
        return 0

    @property
    def interrupted(self) -> bool:
        return False

    @property
    def samples(self) -> SampleFiles:
        return SampleFiles(self.directory)

    def describe(self, key: str, start: TrainStart) -> RunInfo:
        record = self.record
        facts = facts_of(start)
        facts["hyperparameters"] = facts["hyperparameters"] or masked(record.hyperparameters)
        return RunInfo(
            key=key,
            name=visible(record.id),
            host=record.host,
            pid=record.pid,
            command=masked_command(record.command),
            commit=record.commit,
            directory=record.directory,
            monitor=record.monitor,
            refused=dict(self.refused),
            page=self.page,
            **facts,
        )

    def direction_of(self, metric: str) -> Direction | None:
        known = self.record.metrics.get(metric)
        if metric == self.record.monitor and self.record.mode is not None:
            return self.record.mode
        return metric_direction(metric) if known is None or known.mode is None else known.mode

    def now(self) -> float:
        if self.is_over or not self._heard:
            return self._heard or self.record.heard
        # The clock of the host that writes may differ from ours; that of its files tells how long ago it wrote.
        return self._heard + max(0.0, time.time() - self._written)

    def moment(self, newest: float) -> float:
        return newest

    def stack(self) -> str:
        return ""

    def traceback(self) -> str | None:
        return None

    def give_nowait(self, command: Command[Any], *, by: str) -> NoReturn:
        raise ConfigError(self.refused.get(command.name, "this page only follows the run's files"))

    def publish(self, event: Event) -> NoReturn:
        raise ConfigError("this page only follows the run's files")


def first_event(source: FollowedRun) -> TrainStart:
    """Return what stands for the `TrainStart` of a log that lacks it."""
    record = source.record
    return TrainStart(
        run_id=record.id,
        time=record.started or record.created,
        step=0,
        epoch=0,
        attempt=record.attempt,
        device=record.device,
        parameters=record.parameters,
        epochs=record.epochs,
        max_steps=record.max_steps,
        max_time=record.max_time,
        steps_per_epoch=record.steps_per_epoch,
        world_size=record.world_size,
    )


def take_in(
    source: FollowedRun, live: LiveRun, events: Iterable[Event], written: float, count: int
) -> list[KeptMilestone]:
    """Have a live run take in events of its log, and return the milestones among them.

    Args:
        source: The source of `live`.
        live: What takes them in.
        events: In the order of the log.
        written: When the log was written last.
        count: Events of the log before these. Milestones are numbered by their place in the log, because each attempt
            starts again at 0.
    """
    taken: list[Event | Numbers] = []
    for place, event in enumerate(events, count):
        if not math.isfinite(event.time):
            # No axis could show it.
            continue
        source.observe(event, written)
        known = source.known(event)
        taken.append(known if isinstance(known, Sample | Numbers) else _numbered(known, place))
    return live.take_in(taken)


def _numbered(event: Event, seq: int) -> Event:
    if isinstance(event, UnknownEvent):
        try:
            fields = msgspec.json.decode(event.raw, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            fields = {name: getattr(event, name) for name in ("type", *Event.__struct_fields__)}
        return msgspec.structs.replace(event, seq=seq, raw=msgspec.json.encode(fields | {"seq": seq}))
    return msgspec.structs.replace(event, seq=seq)


def _described(record: RunRecord, page: str | None) -> tuple[object, ...]:
    return (record.id, record.host, record.pid, record.attempt, record.monitor, record.hyperparameters, page)


def time_of(path: Path) -> float:
    """Return when a file was written last, Unix time in seconds; 0 if that cannot be known. Blocks."""
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0
