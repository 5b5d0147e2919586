"""LiveRun: what viewers can know about one run. Reads its events; keeps curves, status and milestones.

One thread at a time uses a `LiveRun` and its parts. What they need of the run besides its events is its `RunSource`.
"""

import itertools
import re
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from offloop.dashboard.curves.frames import Frames
from offloop.dashboard.curves.history import HISTORY_BYTES, Curve, History
from offloop.dashboard.curves.layer_history import (
    LayerFigures,
    LayerHistory,
    figures_of,
    says_layers,
    without_layers,
)
from offloop.dashboard.curves.panels import Place, place_of_metric
from offloop.dashboard.curves.steps import MANY_STEPS, keys_of, values_of, with_steps_together
from offloop.dashboard.curves.units import unit_of
from offloop.dashboard.protocol.encoding import number
from offloop.dashboard.protocol.from_server import Latest, RunSummary, SeriesInfo, Status
from offloop.dashboard.runs.milestones import MILESTONE_BYTES, KeptMilestone, Milestones
from offloop.dashboard.runs.run_samples import RunSamples
from offloop.dashboard.runs.run_source import RunSource
from offloop.dashboard.runs.sample_batch import SampleBatch, in_order
from offloop.engine import (
    EpochEnd,
    EpochStart,
    Evaluated,
    Event,
    Sample,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    encode,
)
from offloop.engine.sample_numbers import numbers_of

MAX_CURVES: Final = 2_000
"""Most curves of one run; further metrics are not drawn."""
WINDOW: Final = 5.0
"""Seconds over which speed and time shares are averaged."""
STALL: Final = 10.0
"""Seconds without a step after which a run counts as stalled ..."""
STALL_STEPS: Final = 20
"""... if they are also this many times the duration of the last step."""
FINAL_STATES: Final = frozenset({"completed", "stopped", "cancelled", "failed"})


class Moment(msgspec.Struct, frozen=True):
    """Cumulative sums at one time, for differences over the window."""

    time: float
    step: int
    samples: int
    data: float
    compute: float
    callbacks: float


class Numbers(NamedTuple):
    """A sample whose class is not defined in this process."""

    event: Event
    """Where it stands in the run."""
    numbers: Mapping[str, float]
    """By the name of their curve."""
    layers: Sequence[LayerFigures] = ()
    """What it says about layers."""


class KeptFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a run beside its curves and what its milestones tell."""

    start: msgspec.Raw
    """Encoded `TrainStart` of the last attempt."""
    last_step: list[msgspec.Raw]
    """Encoded last `StepEnd`, if there is one."""
    series: list[SeriesInfo]
    moments: list[Moment]
    samples: int
    seen: float
    data: float
    compute: float
    milestones_dropped: int
    dropped: int
    drawn_up_to: int
    repeated_from: int | None


class LiveRun:
    """One run, as viewers see it.

    Its methods are many: one for each kind of event, and one for each part of what viewers get.
    """

    def __init__(
        self,
        source: RunSource,
        start: TrainStart,
        *,
        history_bytes: int = HISTORY_BYTES,
        milestone_bytes: int = MILESTONE_BYTES,
        taken: Container[str] = (),
        key: str | None = None,
        series: Sequence[SeriesInfo] = (),
        is_coarse: bool = False,
    ) -> None:
        """Begin with a run's first event.

        Args:
            source: The run.
            start: Its first event.
            history_bytes: Limit of the memory for curves.
            milestone_bytes: Limit of the memory for milestones.
            taken: Keys of other runs.
            key: Key of the run; None for its id, with the attempt, made unique among `taken`.
            series: Curves to begin with, so that they keep their numbers when this takes the place of another.
            is_coarse: True if only some of the run's steps will come: then missing ones are no gaps.
        """
        # None after `finish`, unless the run went silent.
        self.source: RunSource | None = source
        self.name = source.id
        self.key = _free_key(source.id, start.attempt, taken) if key is None else key
        self.started = start.time
        self.history = History(history_bytes)
        self.frames = Frames(self.key, self.history)
        self.layers = LayerHistory()
        # Curves that got points before the newest row.
        self._revised: set[int] = set()
        # The index is the curve's number in the history.
        self.series: list[SeriesInfo] = list(series)
        # What came since the hub has taken it, while a viewer wants samples too; else None.
        self.stream: list[KeptMilestone | SampleBatch] | None = None
        self._milestone_bytes = milestone_bytes
        self.milestones = Milestones(self.key, most_bytes=milestone_bytes)
        self.samples = RunSamples(self.key, source.samples)
        self.end: TrainEnd | None = None
        self._is_silent = False
        # Of a failed run.
        self._traceback: str | None = None
        self._start = start
        self._is_coarse = is_coarse
        self._ids: dict[str, int] = {each.key: self.history.add_curve() for each in series}
        self._epoch = 0
        # Value of `batch` when the epoch began.
        self._epoch_batch = 0
        self._last_step: StepEnd | None = None
        # Of the last step, or of the one that failed.
        self._loss: float | None = None
        self._state_by = self._state_reason = ""
        self._samples = 0
        # As `_samples`, with those of steps whose events are not here, which count as many as the next one.
        self._seen = 0.0
        self._data = self._compute = 0.0
        self._dropped = 0
        # Steps of a resumed run that were drawn already, because its log was not cut back: up to this one ...
        self._drawn_up_to = -1
        # ... and the first of them.
        self._repeated_from: int | None = None
        self._moments: deque[Moment] = deque([Moment(start.time, max(start.step, 0), 0, 0.0, 0.0, 0.0)])
        # Fixed facts
        self.info = source.describe(self.key, start)

    @property
    def is_over(self) -> bool:
        """True when no more events can arrive."""
        return self.end is not None or self._is_silent

    def finish(self) -> None:
        """Record that no more events can arrive. Without `TrainEnd` the page's own subscription has failed."""
        if self.end is None:
            self._is_silent = True
        else:
            self.source = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        if self.source is not None:
            return self.source.step
        assert self.end is not None
        return self.end.step

    @property
    def summary(self) -> RunSummary:
        """The run as an entry of the list of runs."""
        return RunSummary(key=self.key, name=self.name, state=self.state, started=self.started)

    @property
    def state(self) -> str:
        """State of the run, one of the protocol's `State`."""
        if self.end is not None:
            return self.end.status
        assert self.source is not None
        state = self.source.state
        if state in FINAL_STATES:
            if self._is_silent or not self.source.is_here:
                return state
            # The last events are on their way.
            return "closing"
        return "waiting" if state == "running" and self._last_step is None else state

    # Events

    def take_in(self, events: Sequence[Event | Numbers]) -> list[KeptMilestone]:
        """Record events in their order and return the milestones among them."""
        milestones: list[Event] = []
        for event, steps in with_steps_together(events):
            if steps:
                self._steps(steps)
                continue
            if isinstance(event, Sample):
                prefix = event.handler_name.removeprefix("on_")
                kind = getattr(event, "kind", "")
                if isinstance(kind, str) and kind:
                    prefix = f"{prefix}/{kind}"
                numbers = numbers_of(event, prefix)
                tag = str(event.__struct_config__.tag)
                if says_layers(tag):
                    fields = {name: getattr(event, name) for name in event.__struct_fields__}
                    self._layers(event, figures_of(tag, fields))
                    numbers = without_layers(tag, numbers)
                self._sample(event, numbers, event.units)
                continue
            if isinstance(event, Numbers):
                self._layers(event.event, event.layers)
                self._sample(event.event, event.numbers.items())
                continue
            milestones.append(event)
            self.samples.add(event)
            if isinstance(event, TrainStart) and event.attempt != self._start.attempt:
                self._begin_attempt(event)
            elif isinstance(event, EpochStart):
                self._epoch, self._epoch_batch = event.epoch, event.batch
            elif isinstance(event, ValidationEnd | EpochEnd):
                self._metrics(event)
            elif isinstance(event, Evaluated):
                self._evaluated(event)
            elif isinstance(event, StateChanged):
                self._state_by, self._state_reason = event.by, event.reason
            elif isinstance(event, TrainEnd):
                self._end(event)
        self.history.check_size()
        if events:
            newest = events[-1]
            self._note_moment(newest.event.time if isinstance(newest, Numbers) else newest.time)
        kept = self.milestones.add(milestones)
        if self.stream is not None:
            self.stream += in_order(self.key, map(_as_sample, events), kept)
        return kept

    def forget_milestones(self) -> None:
        """Keep none of the milestones so far."""
        self.milestones = Milestones(self.key, most_bytes=self._milestone_bytes)

    def facts(self) -> KeptFacts:
        """Return what `restore` needs beside the history and the milestones."""
        last = self._last_step
        return KeptFacts(
            start=msgspec.Raw(encode(self._start)),
            last_step=[] if last is None else [msgspec.Raw(encode(last))],
            series=self.series,
            moments=list(self._moments),
            samples=self._samples,
            seen=self._seen,
            data=self._data,
            compute=self._compute,
            milestones_dropped=self.milestones.dropped,
            dropped=self._dropped,
            drawn_up_to=self._drawn_up_to,
            repeated_from=self._repeated_from,
        )

    def restore(self, facts: KeptFacts, history: History, layers: LayerHistory) -> None:
        """Take curves and layers from elsewhere, once the milestones and the last step were taken in."""
        self.history, self.layers, self.series = history, layers, facts.series
        self.frames = Frames(self.key, history)
        self._ids = {each.key: each.id for each in facts.series}
        self._revised.clear()
        self._moments = deque(facts.moments)
        self._samples, self._data, self._compute = facts.samples, facts.data, facts.compute
        self._seen = facts.seen
        self.milestones.dropped += facts.milestones_dropped
        self._dropped, self._drawn_up_to = facts.dropped, facts.drawn_up_to
        self._repeated_from = facts.repeated_from

    def _begin_attempt(self, start: TrainStart) -> None:
        """Continue with the next attempt in the same log."""
        assert self.source is not None
        self._start, self.end, self._traceback = start, None, None
        self._state_by = self._state_reason = ""
        if self._last_step is not None and start.step < self._last_step.step:
            self._drawn_up_to = max(self._drawn_up_to, self._last_step.step)
            self._repeated_from = min(start.step, self._repeated_from or start.step)
        self._moments = deque(
            [Moment(start.time, max(start.step, 0), self._samples, self._data, self._compute, 0.0)]
        )
        self.info = self.source.describe(self.key, start)

    def describe_again(self) -> None:
        """Take the fixed facts from the source again, where they may have changed."""
        assert self.source is not None
        self.info = self.source.describe(self.key, self._start)

    def _end(self, event: TrainEnd) -> None:
        self.end = event
        if event.status == "failed" and self.source is not None:
            self._traceback = self.source.traceback()
        if (
            event.failed_step is not None
            and event.failed_loss is not None
            and event.failed_step > self._drawn_up_to
        ):
            # The step has no `StepEnd`.
            self._loss = event.failed_loss
            row = self.history.axis.append(event.failed_step, event.time, self._epoch_of(event))
            self._point("loss", row, event.failed_loss, event.failed_step)

    def _steps(self, events: Sequence[StepEnd]) -> None:
        """Record steps that have the same figures."""
        seen: dict[int, float] = {}
        for event in events:
            last = self._last_step
            if event.step > self._drawn_up_to:
                self._seen += event.samples * max(1, event.step - (0 if last is None else last.step))
                seen[event.step] = self._seen
            if last is not None and event.step > last.step + 1 and not self._is_coarse:
                missed = event.step - last.step - 1
                self._dropped += missed
                self.history.add_gap(last.step, event.step, missed)
            self._last_step, self._loss = event, event.loss
            self._samples += event.samples
            self._data += event.data_time
            self._compute += event.step_time
        if self._drawn_up_to >= 0:
            events = [event for event in events if event.step > self._drawn_up_to]
        if len(events) < MANY_STEPS:
            for event in events:
                row = self.history.axis.append(
                    event.step, event.time, self._epoch_of(event), seen[event.step]
                )
                for key, value in zip(keys_of(event), values_of(event), strict=True):
                    self._point(key, row, value, event.step)
            return
        steps = np.array([event.step for event in events], float)
        times = np.array([event.time for event in events])
        epochs = np.array([self._epoch_of(event) for event in events])
        samples = np.array([seen[event.step] for event in events])
        first = self.history.axis.extend(steps, times, epochs, samples)
        rows = np.arange(first, first + len(events), dtype=np.uint32)
        values = np.array([values_of(event) for event in events], float)
        for key, column in zip(keys_of(events[0]), np.ascontiguousarray(values.T), strict=True):
            curve = self._curve(key)
            if curve is not None:
                curve.extend(rows, column, steps)

    def _metrics(self, event: ValidationEnd | EpochEnd) -> None:
        if event.step <= self._drawn_up_to:
            return
        row = self.history.axis.append(event.step, event.time, self._epoch_of(event))
        for key, value in event.metrics.items():
            known = self._ids.get(key)
            if known is not None and key == "lr":
                # Every step has it.
                continue
            if known is not None and isinstance(event, EpochEnd) and key.startswith("val_"):
                # `ValidationEnd` had it.
                continue
            self._point(key, row, value, event.step)

    def _evaluated(self, event: Evaluated) -> None:
        """Record figures at the step of their checkpoint, where viewers may have seen the curves already."""
        axis = self.history.axis
        row = axis.row_of("step", event.of_step)
        if not axis.rows or event.of_step < axis.first_step:
            # Of an earlier attempt, which this page does not show.
            return
        if row == axis.rows:
            row = axis.append(event.of_step, event.time, self._epoch_of(event))
        for key, value in event.metrics.items():
            known = self._ids.get(key)
            # A checkpoint may be evaluated again, or share its row where the history was trimmed.
            if known is None or self.history.curves[known].last_row < row:
                self._point(key, row, value, event.of_step)
                self._revised.add(self._ids.get(key, -1))

    def take_revised(self) -> set[int]:
        """Return the curves that got points before the newest row since the last call."""
        revised, self._revised = self._revised, set()
        return revised

    def _sample(
        self,
        event: Event,
        numbers: Iterable[tuple[str, float]],
        units: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Record every number of a sample other than `StepEnd`: from monitors, or defined by users."""
        if event.step <= self._drawn_up_to:
            return
        row: int | None = None
        for key, value in numbers:
            if row is None:
                row = self.history.axis.append(max(event.step, 0), event.time, self._epoch_of(event))
            self._point(key, row, value, max(event.step, 0), units)

    def _layers(self, event: Event, figures: Sequence[LayerFigures]) -> None:
        if event.step > self._drawn_up_to:
            self.layers.add(max(event.step, 0), figures)

    def _point(
        self, key: str, row: int, value: float, step: int, units: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        curve = self._curve(key, units)
        if curve is not None:
            curve.append(row, float(value), step)

    def _curve(self, key: str, units: Mapping[str, str] = MappingProxyType({})) -> Curve | None:
        """Return the curve of a metric, added if it is new; None if it has none, or if there are too many."""
        number = self._ids.get(key)
        if number is None:
            place = place_of_metric(key)
            if place is None or len(self._ids) >= MAX_CURVES:
                return None
            number = self._ids[key] = self.history.add_curve()
            assert self.source is not None
            self.series.append(describe_series(number, key, place, self.source, units))
        return self.history.curves[number]

    def _epoch_of(self, event: Event) -> float:
        """Return the number of epochs done, with a fraction."""
        per_epoch = self._start.batches_per_epoch
        epoch = float(max(event.epoch, 0))
        if per_epoch and event.epoch == self._epoch:
            epoch += min(1.0, max(0, event.batch - self._epoch_batch) / per_epoch)
        return epoch

    # Status

    def _note_moment(self, newest: float) -> None:
        assert self.source is not None
        now, moments = self.source.moment(newest), self._moments
        step = 0 if self._last_step is None else self._last_step.step
        if now - moments[-1].time < 0.2 and len(moments) > 1:
            return
        decided, in_step = self.source.callback_seconds
        # Step hooks run within the time of their step.
        compute = self._compute - in_step
        moments.append(Moment(now, step, self._samples, self._data, compute, decided + in_step))
        while len(moments) > 2 and now - moments[1].time >= WINDOW:
            moments.popleft()

    def status(self, *, viewers: int, is_control: bool) -> Status:
        """Return the current status, for a role."""
        state, last, source = self.state, self._last_step, self.source
        ended = self.end is not None
        now = self.started if source is None else source.now()
        since = self._moments[0]
        upto = self._moments[-1]
        seconds = max(upto.time - since.time, 1e-9)
        steps_per_second = (upto.step - since.step) / seconds if upto.time > since.time else 0.0
        elapsed = self.end.seconds if self.end is not None else max(0.0, now - self._start.time)
        progress, time_left = self._progress(elapsed)
        stalled = None if ended else self._stalled(state, now)
        quiet = ended or stalled is not None or state in ("paused", "lost", *FINAL_STATES)
        return Status(
            run=self.key,
            state=state,  # type: ignore[arg-type]  # a str that is a `State`
            by=self._state_by if is_control and state in ("paused", "stopping", "stopped") else "",
            reason=self._reason,
            error=self.end.error if self.end is not None else None,
            traceback=self._traceback if is_control else None,
            epoch=self._epoch,
            step=last.step if last is not None else max(self._start.step, 0),
            progress=progress,
            seconds=elapsed,
            time_left=None if ended else time_left,
            steps_per_second=0.0 if quiet else steps_per_second,
            samples_per_second=0.0 if quiet else (upto.samples - since.samples) / seconds,
            lr=None if last is None else last.lr,
            loss=None if self._loss is None else number(self._loss),
            data_share=min(1.0, (upto.data - since.data) / seconds),
            compute_share=min(1.0, max(0.0, upto.compute - since.compute) / seconds),
            callback_share=min(1.0, (upto.callbacks - since.callbacks) / seconds),
            validating=state == "validating",
            validation_batch=0 if source is None else source.validation_batch,
            interrupted=source is not None and source.interrupted,
            saving=source is not None and source.is_saving,
            stalled=stalled,
            waiting_for=place_of(source.stack()) if source and stalled is not None and is_control else "",
            dropped=self._dropped,
            trimmed=self.history.trimmed,
            layers=self.layers.count,
            viewers=viewers,
        )

    @property
    def why(self) -> str:
        """What there is to say about the run beside its state, for people; usually empty."""
        said = [] if self.source is None or not self.source.why else [self.source.why]
        if self._repeated_from is not None:
            said.append(
                f"steps {self._repeated_from + 1:,} to {self._drawn_up_to:,} were trained again; the curves show the "
                "first time"
            )
        return "; ".join(said)

    @property
    def _reason(self) -> str:
        reason = self.end.reason if self.end is not None else self._state_reason
        return "; ".join(each for each in (reason, self.why) if each)

    def _progress(self, elapsed: float) -> tuple[float | None, float | None]:
        """Return the share done and the seconds left, by the limit that ends the run first."""
        start, last = self._start, self._last_step
        step = last.step if last is not None else max(start.step, 0)
        # By limit: the share done now, and when this attempt began.
        shares: list[tuple[float, float]] = []
        if start.max_steps:
            shares.append((step / start.max_steps, max(start.step, 0) / start.max_steps))
        if start.epochs:
            reached = self.history.axis.last("epoch")
            begun = max(start.epoch, 0) / start.epochs
            shares.append((reached / start.epochs if reached == reached else begun, begun))
        if start.max_time:
            shares.append((elapsed / start.max_time, 0.0))
        if not shares:
            return None, None
        done, begun = max(shares)
        done = 1.0 if self.end is not None and self.end.status == "completed" else min(done, 1.0)
        if done <= begun or last is None:
            return done, None
        return done, elapsed * (1.0 - done) / (done - begun)

    def _stalled(self, state: str, now: float) -> float | None:
        if state not in ("running", "waiting", "stopping"):
            return None
        # Validations and pauses are no stalls, and the last milestone may be the end of one.
        last = self.milestones.last
        heard = self._start.time if last is None else last.time
        if self._last_step is not None:
            heard = max(heard, self._last_step.time)
        quiet = now - heard
        usual = self._last_step.step_time + self._last_step.data_time if self._last_step is not None else 0.0
        return quiet if quiet > max(STALL, STALL_STEPS * usual) else None

    def latest(self) -> Latest:
        """Return the last, least and greatest value of every curve."""
        values: dict[str, tuple[Any, float | None, int, float | None, int]] = {}
        for curve_id, curve in enumerate(self.history.curves):
            least, greatest = curve.least or (None, 0), curve.greatest or (None, 0)
            values[str(curve_id)] = (number(curve.last), *least, *greatest)
        return Latest(run=self.key, values=values)


# Parts of events and settings --------------------------------------------------------------------


def _as_sample(event: Event | Numbers) -> tuple[Event, bool]:
    """Return an event, and whether it is a sample."""
    return (event.event, True) if isinstance(event, Numbers) else (event, isinstance(event, Sample))


def _free_key(run_id: str, attempt: int, taken: Container[str]) -> str:
    """Return the key of a run of this process. Runs without a directory may share a name."""
    key = run_id if attempt == 0 else f"{run_id}#{attempt}"
    again = itertools.chain([key], (f"{key}~{number}" for number in itertools.count(2)))
    return next(each for each in again if each not in taken)


def describe_series(
    curve: int, key: str, place: Place, source: RunSource, units: Mapping[str, str]
) -> SeriesInfo:
    """Return how a metric is drawn."""
    return SeriesInfo(
        id=curve,
        key=key,
        tab=place.tab,
        panel=place.panel,
        group=place.group,
        label=place.label,
        better=source.direction_of(key),
        unit=unit_of(key, units),
    )


def place_of(stack: str) -> str:
    """Return the innermost line of a printed stack outside torch and offloop, as `file:line, in name`."""
    places = re.findall(r'File "(.*)", line (\d+), in (.*)', stack)
    for file, line, name in reversed(places):
        if not re.search(r"[\\/](torch|offloop|engine|threading\.py)\b", file):
            return f"{Path(file).name}:{line}, in {name}"
    if not places:
        return ""
    file, line, name = places[-1]
    return f"{Path(file).name}:{line}, in {name}"
