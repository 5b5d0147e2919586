"""Profiler: a trace of a few steps for Perfetto, and a table that says in words where a step's time goes.

The boundaries of the table are the points at which step hooks run. The clock is the host's: on CUDA, a phase lasts as
long as the host takes to queue its work, and the trace shows what the device did meanwhile.

    after_step      before_batch     before_forward                after_backward     after_step
        │ data, other    │ host to device  │ forward │ backward            │ optimizer      │
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from offloop.engine import (
    BusClosedError,
    Callback,
    ConfigError,
    EpochEnd,
    Event,
    Metrics,
    Run,
    StepEnd,
    StepPoint,
    decides,
    in_step,
)

logger = logging.getLogger("offloop")

PHASES: Final = {
    "data": "waiting for the next batch from the loader",
    "host_to_device": "copying the batch to the device",
    "forward": "forward pass and loss",
    "backward": "backward pass",
    "optimizer": "clipping, optimizer step, learning-rate schedule",
    "callbacks": "waiting for deciders of callbacks",
    "idle": "between steps: zero_grad, reports, commands, validation, pauses",
}
"""The rows of the table, in the order of a step."""

TRACE_NAME: Final = "trace.json.gz"
TABLE_NAME: Final = "profile.txt"


class ProfileWritten(Event, frozen=True, kw_only=True):
    """A profile is on disk. From a thread of the profiler's."""

    trace: str
    """Path of the trace, for https://ui.perfetto.dev or chrome://tracing."""
    table: str
    """Path of the table."""
    steps: int
    """Steps that were measured."""
    step_seconds: float
    """Mean duration of a step, from its end to the end of the one before."""
    seconds: Metrics = Metrics()
    """Mean seconds of a step in each phase: `data`, `host_to_device`, `forward`, `backward`, `optimizer`, `callbacks`,
    `idle`. They add up to `step_seconds`."""


class Profiler(Callback):
    """Profiles some steps of a run with `torch.profiler`: a trace and a table in the run's directory.

    The run is slower while it warms up and measures, and stands still for as long as torch takes to collect what it
    recorded (about 0.1 s for each 10,000 operators), once. The files are written by a thread of the profiler's; torch
    may hold the interpreter meanwhile. Before and after, a step costs a few microseconds more.

    It profiles once, in the training thread, and ends there too, however the run ends: a run that ends early
    leaves what was recorded so far. One profiler can be on in a process.
    """

    on_error = "isolate"
    needs_run_dir = True

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
        """Choose the steps and what is recorded.

        Args:
            wait: Steps that go by first: the first ones compile kernels and fill caches, >= 0.
            warmup: Steps with the profiler on whose record is thrown away, because its own start distorts them, >= 0.
            active: Steps that are measured, at least 1.
            record_shapes: Record the shapes of each operator's inputs.
            profile_memory: Record each allocation.
            with_stack: Record the Python stack of each operator: slow.

        Raises:
            ConfigError: A number of steps is out of its range.
        """
        for name, value, least in (("wait", wait, 0), ("warmup", warmup, 0), ("active", active, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
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
        self._steps = 0  # seen so far in this attempt; training thread
        self._recording: _Recording | None = None  # written by the training thread
        self._end_of_thread = threading.local()
        self._writer: threading.Thread | None = None

    # The training thread

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        if self._steps == self.wait and self._recording is None:
            self._recording = _Recording(point, self.warmup, self.active, self._options)
            # Nobody calls a callback in the training thread when a run is stopped, and only this thread can
            # switch its profiler off: what is local to a thread is let go of in that thread, as its last act.
            self._end_of_thread.guard = _Guard(self._recording.stop)
        self._enter("host_to_device")

    @in_step
    def before_forward(self, point: StepPoint) -> None:
        self._enter("forward")
        recording = self._recording
        if recording is not None and recording.is_on:
            recording.watch_forward(point.model)

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        self._enter("idle")  # to the next batch of the window, or to the optimizer

    @in_step
    def before_optimizer_step(self, point: StepPoint) -> None:
        self._enter("optimizer")

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self._steps += 1
        recording = self._recording
        if recording is not None and recording.is_on:
            recording.end_step(point.step)
            if not recording.is_on:
                self._start_writing(point.run)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        """Nothing to decide: see `_enter`. A run may have its last step here."""
