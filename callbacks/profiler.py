"""Profiler: a trace of some steps for Perfetto, and a table in words of where the time of a step goes.

The phases of the table lie between the points of step hooks:

    after_step     before_batch    before_forward    before_backward    before_optimizer_step     after_step
        │ data, idle     │ host to device  │ forward         │ backward           │ optimizer         │

The clock is the host's. On CUDA a phase takes as long as the host needs to queue its work, or to wait for the device.
The trace shows what the device did meanwhile, and the table how much of the time it was idle.
"""

import contextlib
import gzip
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from offloop.engine import (
    BusClosedError,
    Callback,
    CallbackCosts,
    Event,
    Metrics,
    Run,
    StepEnd,
    StepPoint,
    checks,
    in_step,
    replace_file,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

PHASES: Final = {
    "data": "waiting for batches from the loader",
    "host_to_device": "moving the batch to the device",
    "forward": "forward pass and loss",
    "backward": "backward pass",
    "optimizer": "unscaling, clipping, optimizer step, schedule",
    "callbacks": "waiting for deciders of callbacks",
    "idle": "the rest between two batches: zero_grad, reports, commands, validation, pauses",
}
"""The rows of the table, in the order of a step."""

TRACE_NAME: Final = "trace.json.gz"
TABLE_NAME: Final = "profile.txt"
PLAIN_NAME: Final = ".trace.json"
CHUNK: Final = 1 << 20
"""Bytes compressed at once; zlib lets the interpreter go meanwhile."""
DEVICE_WORK: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of a trace's events in which a GPU is at work."""


class ProfileWritten(Event, frozen=True, kw_only=True):
    """Published by `Profiler` when its files are on disk, unless the run has ended before.

    Thread: the profiler's own thread.
    """

    trace: str
    """Path of the trace, for https://ui.perfetto.dev or chrome://tracing."""
    table: str
    """Path of the table as text."""
    steps: int
    """Number of steps measured."""
    seconds: Metrics = Metrics()
    """Mean seconds of a step in each phase: `data`, `host_to_device`, `forward`, `backward`, `optimizer`, `callbacks`
    and `idle`. They add up to the time from the end of the previous step to the end of this one."""
    device_idle_percent: float | None = None
    """Percentage of the time in which the CUDA device was idle, 0 to 100; None for other devices."""


class Profiler(Callback):
    """Profiles some steps of a run with `torch.profiler`: `trace.json.gz` and `profile.txt` in the run's directory.

    The profiled steps are slower, and training stops once after them while torch collects the records. A thread of the
    profiler then writes the files while training continues. Training stops once more while torch formats the trace,
    which holds the interpreter in proportion to its size; that cannot move to another process. Later steps have no
    overhead.

    It profiles once per run. A run that ends early leaves a profile of the steps so far; torch's profiler is always
    switched off. Only one can be active in a process. With several processes it profiles rank 0; the time for which
    that waits for others is in the backward pass.
    """

    on_error = "isolate"
    needs_run_dir = True
    # The run has one trace, and its files have one name
    ranks = "first"

    @explains_arguments()
    def __init__(
        self,
        *,
        wait: int = 5,
        warmup: int = 2,
        active: int = 5,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        """Choose the steps and what to record.

        Args:
            wait: Steps to skip first, at least 0: early steps choose kernels and fill caches.
            warmup: Steps with the profiler on whose records are discarded, at least 1: its start distorts them.
            active: Steps to measure, at least 1.
            record_shapes: Record the shapes of operators' inputs.
            profile_memory: Record memory allocations.
            with_stack: Record the Python stack of operators, which is slow.

        Raises:
            ConfigError: A number of steps is out of range.
        """
        checks.whole_number("wait", wait, at_least=0)
        checks.whole_number("warmup", warmup)
        checks.whole_number("active", active)
        self.wait = wait
        self.warmup = warmup
        self.active = active
        self._options = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self.reset()

    def reset(self) -> None:
        # Steps of this run; training thread only.
        self._steps = 0
        # Written once by the training thread, read by any.
        self._recording: _Recording | None = None
        # Written by the event loop, read by close() after the last event.
        self._writer: threading.Thread | None = None
        # Written by the writer before it ends, read after the join.
        self._error: Exception | None = None

    # In the training thread

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        recording = self._recording
        if recording is not None:
            recording.enter("host_to_device")
        elif self._steps >= self.wait:
            self._recording = recording = _Recording(point, self.warmup, self.active, self._options)
            recording.start()

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        if self._recording is not None:
            self._recording.enter("forward")

    @in_step
    def before_backward(self, point: StepPoint) -> None:
        if self._recording is not None:
            self._recording.enter("backward")

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        if self._recording is not None:
            self._recording.enter("between")

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        if self._recording is not None:
            self._recording.enter("optimizer", so_far="optimizer")

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self._steps += 1
        if self._recording is not None:
            self._recording.end_step(point.step)
            if self._recording.is_complete:
                point.leave()

    @in_step
    def after_training(self, point: StepPoint) -> None:
        if self._recording is not None:
            # Here, because torch's profiler must be stopped in the thread that started it.
            self._recording.stop()

    # On the event loop

    async def on_step_end(self, event: StepEnd, run: Run) -> None:
        """Record how long a measured step waited for data. After the last one, start writing the files."""
        recording = self._recording
        if recording is None or self._writer is not None or event.step not in recording.steps:
            return
        recording.data_times[event.step] = event.data_time
        if recording.is_complete and event.step == recording.steps[-1]:
            writer = Thread(self._write, recording, run, name="offloop-profiler", daemon=False)
            # If no thread can be started, `close` writes the files.
            with contextlib.suppress(RuntimeError):
                writer.start()
                self._writer = writer

    # In the writer, and in the callback's worker thread

    def close(self) -> None:
        """Wait for the files, or write them if the run ended early. Raises the exception of a failed write."""
        recording = self._recording
        if self._writer is not None:
            self._writer.join()
        elif recording is not None and recording.steps:
            self._write(recording, recording.run)
        if self._error is not None:
            raise self._error

    def _write(self, recording: "_Recording", run: Run) -> None:
        try:
            # `needs_run_dir` sees to it.
            assert run.dir is not None
            written = recording.write(run.dir)
            logger.info("profile of %d steps: %s and %s", written.steps, written.table, written.trace)
            # After the end of the run the files are there without an event.
            with contextlib.suppress(BusClosedError):
                run.publish(written)
        except Exception as error:
            self._error = error


class _Recording:
    """One use of torch's profiler. All methods but `write` run in the training thread."""

    def __init__(self, point: StepPoint, warmup: int, active: int, options: Mapping[str, Any]) -> None:
        self.run: Run = point.run
        # Numbers of the measured steps. The training thread appends one before its StepEnd is published, so the event
        # loop finds it there.
        self.steps: list[int] = []
        # By step. The event loop writes it, and then starts the thread that reads it.
        self.data_times: dict[int, float] = {}
        # Written once by the training thread.
        self.is_complete = False
        self._is_on = False
        self._is_cuda = point.trainer.device.type == "cuda"
        self._warmup, self._active = warmup, active
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._is_cuda else [])
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=active, repeat=1),
            **options,
        )
        self._done = 0
        self._range: Any = None
        self._phase = ""
        self._since = 0.0
        self._spans: dict[str, float] = {}
        self._decided = self._decided_at_end = 0.0

    def start(self) -> None:
        """Start the profiler, before a batch."""
        self._profile.start()
        self._is_on = True
        self.enter("host_to_device")

    def enter(self, phase: str, *, so_far: str | None = None) -> None:
        """Begin a phase and end the one in progress, which counts as `so_far` if that is given."""
        if not self._is_on:
            return
        self._leave(so_far)
        self._begin(phase)

    def end_step(self, step: int) -> None:
        """End a step. After the last one the profiler is off."""
        if not self._is_on:
            return
        self._leave()
        self._done += 1
        if self._done > self._warmup:
            self.steps.append(step)
        if self._done == self._warmup:
            # Discard the warm-up.
            self._spans.clear()
            self._decided = _decided(self.run.callback_costs)
        elif self._done == self._warmup + self._active:
            self.stop()
            self.is_complete = True
            return
        self._profile.step()
        self._begin("between")

    def stop(self) -> None:
        """Stop the profiler. Idempotent."""
        if not self._is_on:
            return
        self._is_on = False
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        self._decided_at_end = _decided(self.run.callback_costs)
        self._profile.stop()

    def write(self, folder: Path) -> ProfileWritten:
        """Write trace and table, after `stop`. Any thread; blocks."""
        trace, table = folder / TRACE_NAME, folder / TABLE_NAME
        plain = folder / PLAIN_NAME
        # A link of that name would be followed.
        plain.unlink(missing_ok=True)
        try:
            # torch would compress line by line, in Python, which takes ten times as long and slows training down.
            self._profile.export_chrome_trace(str(plain))
            compress(plain, trace)
        finally:
            plain.unlink(missing_ok=True)
        seconds = self._seconds()
        idle = device_idle_percent(read_trace(trace)) if self._is_cuda else None
        replace_file(table, describe(seconds, self.steps, idle).encode())
        return ProfileWritten(
            trace=str(trace),
            table=str(table),
            steps=len(self.steps),
            seconds=Metrics(seconds),
            device_idle_percent=idle,
        )

    def _seconds(self) -> dict[str, float]:
        """Return the mean seconds of a step in each phase."""
        known = [self.data_times[step] for step in self.steps if step in self.data_times]
        waited = sum(known) / len(known) if known else 0.0
        mean = {phase: total / len(self.steps) for phase, total in self._spans.items()}
        between = mean.pop("between", 0.0)
        decided = min((self._decided_at_end - self._decided) / len(self.steps), between)
        waited = min(waited, between - decided)
        mean |= {"data": waited, "callbacks": decided, "idle": between - decided - waited}
        return {phase: mean.get(phase, 0.0) for phase in PHASES}

    def _begin(self, phase: str) -> None:
        self._phase = phase
        self._range = record_function(f"offloop: {phase}")
        self._range.__enter__()
        self._since = time.perf_counter()

    def _leave(self, so_far: str | None = None) -> None:
        if self._range is not None:
            now = time.perf_counter()
            phase = so_far or self._phase
            self._spans[phase] = self._spans.get(phase, 0.0) + now - self._since
            self._range.__exit__(None, None, None)
            self._range = None


def _decided(costs: Mapping[str, CallbackCosts]) -> float:
    return sum(each.decided for each in costs.values())


def describe(seconds: Mapping[str, float], steps: list[int], device_idle_percent: float | None = None) -> str:
    """Return the table."""
    total = sum(seconds.values())
    lines = [
        f"Where a step's time goes: mean of {len(steps)} steps ({steps[0]} to {steps[-1]}), "
        f"{1e3 * total:.2f} ms each, on the host's clock",
        "",
    ]
    for phase, words in PHASES.items():
        share = 100 * seconds[phase] / total if total else 0.0
        lines.append(f"{1e3 * seconds[phase]:10.2f} ms {share:5.1f} %  {phase:<15} {words}")
    longest = max(PHASES, key=lambda phase: seconds[phase])
    lines += ["", f"Most of it is {longest}: {PHASES[longest]}."]
    if device_idle_percent is not None:
        lines.append(f"The device was idle for {device_idle_percent:.0f} % of the time.")
    return "\n".join(lines) + "\n"


class TraceEvent(msgspec.Struct):
    """An event of a trace. Times in microseconds."""

    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0


class _Trace(msgspec.Struct):
    traceEvents: list[TraceEvent]


def compress(source: Path, target: Path) -> None:
    """Compress a file into `target`, which is replaced. Blocks, almost without the interpreter."""
    # A link of that name would be followed.
    target.unlink(missing_ok=True)
    # Not level 9, Python's default: it takes several times as long and saves little.
    with open(source, "rb") as reader, gzip.open(target, "wb", compresslevel=6) as writer:
        shutil.copyfileobj(reader, writer, CHUNK)


def read_trace(path: Path) -> list[TraceEvent]:
    """Return the events of a trace file."""
    with gzip.open(path) as file:
        return msgspec.json.decode(file.read(), type=_Trace, strict=False).traceEvents


def device_idle_percent(events: Iterable[TraceEvent]) -> float:
    """Return the percentage of the measured steps in which no kernel and no copy ran on a GPU."""
    events = list(events)
    steps = [event for event in events if event.name.startswith("ProfilerStep") and event.dur > 0]
    if not steps:
        return 100.0
    start, end = min(step.ts for step in steps), max(step.ts + step.dur for step in steps)
    busy, reached = 0.0, start
    for event in sorted((each for each in events if each.cat in DEVICE_WORK), key=lambda each: each.ts):
        until = min(event.ts + event.dur, end)
        if until > reached:
            busy += until - max(event.ts, reached)
            reached = until
    return 100.0 * (1.0 - busy / (end - start))
