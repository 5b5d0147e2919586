"""Tracking: the shared part of the loggers for tracking servers. Training never waits for such a server.

    the callback's thread                    the sending thread
    ─────────────────────                    ──────────────────
    events -> points, alerts, checkpoints    connect, until it works or the run is over
    put() ── a bounded queue ──────────────> send the queue once a second; after a failure again, later
    close(): waits at most `timeout` ──────> send the rest and how the run ended

A server may refuse connections, or accept them and not answer for hours. Only the sending thread blocks on it. A full
queue drops its oldest entries and counts them. If the thread has not sent the rest in time at the end, it is abandoned;
as a daemon it does not keep the process alive.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import msgspec

from offloop.callbacks.alerts import Alert
from offloop.callbacks.value_logger import Measured, ValueLogger
from offloop.engine import (
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointSaved,
    EpochEnd,
    RunHandle,
    StepEnd,
    TrainEnd,
    TrainStart,
    checks,
    first_use,
    replace_file,
)
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

LogModel = bool | Literal["all"]

MAX_WAITING: Final = 10_000
"""Entries queued for an unreachable server: three hours at the default interval, a few megabytes."""
MAX_AT_ONCE: Final = 200
"""Entries per call of `send`."""
SEND_INTERVAL: Final = 1.0
"""Seconds between two calls of `send`: a request a second costs next to nothing, and charts look live."""
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
"""Seconds before a failed call is repeated: doubled after each failure, from the first to the longest."""
NO_ANSWER_AFTER: Final = 30.0
"""Seconds without an answer after which that is reported; clients of tracking servers retry for minutes."""
TIMEOUT: Final = 20.0
"""Seconds to wait at the end for a slow server. Below a run's `drain_timeout`, so that losses are still reported."""


def expect_package(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: It is not installed; the text has the command that installs it.
    """
    try:
        with first_use(module.partition(".")[0]):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name.partition(".")[0]):
            # The package is installed, and one of its own dependencies is missing.
            raise
        raise ModuleNotFoundError(
            f"{extra} is not installed: pip install 'offloop[{extra}]'", name=error.name
        ) from None


def plain_hyperparameters(start: TrainStart) -> dict[str, str | int | float | bool]:
    """Return what a run is made with as tracking servers take it: lists and None become text."""
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in start.hyperparameters.items()
    }


def values_to_plot(event: Measured, values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that no other point has: an epoch repeats those of its validation and its last step."""
    if isinstance(event, StepEnd):
        return {**values, "epoch": event.epoch}
    if isinstance(event, EpochEnd):
        repeated = ("lr", "grad_norm")
        return {k: v for k, v in values.items() if not k.startswith("val_") and k not in repeated}
    return dict(values)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """Values at one moment."""

    time: float
    epoch: int
    step: int
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to upload."""

    path: Path
    step: int
    is_best: bool


Entry = Point | Alert | Model


class Sender:
    """The sending thread and its bounded queue."""

    def __init__(
        self,
        name: str,
        *,
        connect: Callable[[], None],
        send: Callable[[Sequence[Entry]], None],
        finish: Callable[[], None],
        is_hopeless: Callable[[Exception], bool],
    ) -> None:
        """Start the thread. It calls all four functions.

        Args:
            name: Name of the thread.
            connect: Called first, and repeated until it does not raise.
            send: Sends some entries; repeated if it raises.
            finish: Called last.
            is_hopeless: Returns whether an exception would be raised again.
        """
        self.sent = 0
        self.lost = 0
        # Written by the thread, read by any: the first problem, and when the call in progress began. Both are replaced
        # whole.
        self._problem: str | None = None
        self._acting_since: float | None = None
        self._connect, self._send, self._finish = connect, send, finish
        self._is_hopeless = is_hopeless
        # Guarded by _changed: the queue, the counts, and what close() sets.
        self._changed = threading.Condition()
        self._waiting: collections.deque[Entry] = collections.deque()
        self._in_flight = 0
        self._is_closing = self._is_given_up = False
        self._thread = Thread(self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """The first problem, None without one. Any thread."""
        since = self._acting_since
        if self._problem is None and since is not None and time.monotonic() - since > NO_ANSWER_AFTER:
            return f"no answer for {NO_ANSWER_AFTER:g} s"
        return self._problem

    @property
    def is_given_up(self) -> bool:
        """Whether nothing more will be sent."""
        return self._is_given_up

    def put(self, entry: Entry) -> None:
        """Queue an entry. Any thread; never waits. A full queue drops its oldest entry."""
        with self._changed:
            if self._is_given_up:
                self.lost += 1
                return
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                self.lost += 1
            self._waiting.append(entry)
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """Send the rest. Blocks for at most `timeout` seconds. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            if not self._thread.is_over and not self._is_given_up:
                self._problem = self._problem or f"it had not answered {timeout:g} s after the end"
                self._give_up()

    def _work(self) -> None:
        try:
            self._send_all()
        except BaseException as error:
            # For example a client that calls sys.exit(). The queue is counted as lost.
            self._problem = self._problem or f"{type(error).__name__}: {error}"
            self._give_up()

    def _send_all(self) -> None:
        if self._again(self._connect):
            while batch := self._take():
                if self._again(functools.partial(self._send, batch)):
                    self._count(sent=len(batch))
                elif not self._is_given_up:
                    self._count(lost=len(batch))
            if not self._is_given_up:
                self._again(self._finish)
        else:
            self._give_up()

    def _take(self) -> list[Entry]:
        """Wait for entries of one kind. None at all mean that the run is over."""
        with self._changed:
            # Send at an interval, unless the queue holds more than one call takes.
            self._changed.wait_for(
                lambda: self._is_closing or len(self._waiting) >= MAX_AT_ONCE, SEND_INTERVAL
            )
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            batch: list[Entry] = []
            while self._waiting and not self._is_given_up and len(batch) < MAX_AT_ONCE:
                if batch and not (isinstance(batch[0], Point) and isinstance(self._waiting[0], Point)):
                    break
                batch.append(self._waiting.popleft())
            self._in_flight = len(batch)
            return batch

    def _count(self, *, sent: int = 0, lost: int = 0) -> None:
        with self._changed:
            # Once given up, all of them were counted as lost.
            if not self._is_given_up:
                self.sent += sent
                self.lost += lost
                self._in_flight = 0

    def _again(self, act: Callable[[], None]) -> bool:
        """Repeat a call until it works. Return False if it is hopeless, or fails after the run is over."""
        pause = FIRST_PAUSE
        while True:
            self._acting_since = time.monotonic()
            try:
                act()
                return True
            except Exception as error:
                lines = str(error).strip().splitlines()
                text = f"{type(error).__name__}: {lines[0] if lines else ''}"
                logger.debug("tracking server: %s", text, exc_info=error)
                self._problem = self._problem or text
                if self._is_hopeless(error):
                    return False
            finally:
                self._acting_since = None
            with self._changed:
                if self._is_closing:
                    self._give_up()
                    return False
                self._changed.wait_for(lambda: self._is_closing, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _give_up(self) -> None:
        with self._changed:
            self._is_given_up = True
            self.lost += len(self._waiting) + self._in_flight
            self._waiting.clear()
            self._in_flight = 0


class TrackingLogger(ValueLogger):
    """Base of the loggers for tracking servers. Training never waits for the server.

    A subclass defines `connect`, `send` and `finish`, which run in the sending thread.
    """

    server: str = "the server"
    """The server's name in messages."""

    def __init__(
        self,
        *,
        log_model: LogModel = False,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        timeout: float = TIMEOUT,
        runs_in: Literal["here", "process"] | None = None,
    ) -> None:
        """Choose what to log; see the subclasses."""
        checks.choice("log_model", log_model, (False, True, "all"))
        checks.number("timeout", timeout, above=0, finite=False, unit="seconds")
        self.log_model: LogModel = log_model
        self.timeout = timeout
        super().__init__(every_seconds=every_seconds, every_n_steps=every_n_steps, runs_in=runs_in)

    def reset(self) -> None:
        super().reset()
        self._sender: Sender | None = None
        self._is_reported = False
        self.tracking_id: str | None = None
        """The run's id at the server. Stored in the run's directory, so that a resumed attempt continues it."""
        # Written by the callback's thread before the sending thread starts or finishes, so never while that reads them.
        self.start = TrainStart()
        self.run_id = ""
        self.run_dir: Path | None = None
        self.parameters: dict[str, Any] = {}
        self.status, self.reason = "cancelled", ""

    @property
    def sent(self) -> int:
        """Points, alerts and checkpoints that the server received; 0 with `runs_in="process"`."""
        return 0 if self._sender is None else self._sender.sent

    @property
    def lost(self) -> int:
        """Points, alerts and checkpoints that it will never receive; 0 with `runs_in="process"`."""
        return 0 if self._sender is None else self._sender.lost

    # For subclasses: in the sending thread ---------------------------------------------------------

    def connect(self) -> None:
        """Open the run at the server, the one of `tracking_id` if it is set, and log `parameters`."""
        raise NotImplementedError

    def send(self, entries: Sequence[Entry]) -> None:
        """Send some points, one alert or one checkpoint."""
        raise NotImplementedError

    def finish(self) -> None:
        """Send how the run ended: `status` and `reason`."""
        raise NotImplementedError

    def is_hopeless(self, error: Exception) -> bool:
        """Return whether a repeated call would raise this again; the entries are then dropped."""
        # A missing file is that of a checkpoint which retention has removed.
        return not isinstance(error, OSError) or isinstance(error, FileNotFoundError)

    def remember(self, tracking_id: str) -> None:
        """Store the run's id at the server for later attempts."""
        self.tracking_id = tracking_id
        if self.run_dir is not None:
            content = msgspec.json.encode({"id": tracking_id}) + b"\n"
            replace_file(self._id_file(self.run_dir), content)

    # In the callback's thread ----------------------------------------------------------------------

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        self.start, self.run_id = event, run.id
        self.run_dir = run.dir
        self.parameters = plain_hyperparameters(event)
        if event.attempt and self.run_dir is not None and self._id_file(self.run_dir).exists():
            self.tracking_id = msgspec.json.decode(self._id_file(self.run_dir).read_bytes())["id"]
        self._sender = Sender(
            f"offloop-{type(self).__name__}-{run.id}",
            connect=self.connect,
            send=self.send,
            finish=self.finish,
            is_hopeless=self.is_hopeless,
        )

    def write(self, event: Measured, values: Mapping[str, float]) -> None:
        self._put(Point(event.time, event.epoch, event.step, values_to_plot(event, values)))

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        super().on_step_end(event, run)
        self._report_once()

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        super().on_epoch_end(event, run)
        self._report_once()

    def on_alert(self, event: Alert, run: RunHandle) -> None:
        self._put(event)

    def on_checkpoint_saved(self, event: CheckpointSaved, run: RunHandle) -> None:
        if self.log_model == "all":
            self._put(Model(Path(event.path), event.saved_step, event.reason == "best"))

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self.status, self.reason = event.status, event.reason
        self.write_latest_step()
        if self.log_model is True and run.dir is not None:
            # Without a saved checkpoint or a metric there is no best one.
            with contextlib.suppress(CheckpointNotFoundError):
                best = CheckpointReader(run.dir).find("best")
                self._put(Model(best.path, best.step, True))

    def close(self) -> None:
        if self._sender is None:
            return
        self._sender.close(self.timeout)
        lost, sent = self._sender.lost, self._sender.sent
        if lost:
            raise ConnectionError(
                f"{self.server} did not receive {lost} of {lost + sent} points, alerts and checkpoints "
                f"({self._sender.problem or 'they came faster than it took them'}); the run's own files have them all"
            )
        self._report_once()

    def _put(self, entry: Entry) -> None:
        if self._sender is not None:
            self._sender.put(entry)

    def _report_once(self) -> None:
        """Raise the first problem with the server, once: it becomes a `CallbackFailed` event and a log record."""
        if self._sender is not None and self._sender.problem is not None and not self._is_reported:
            self._is_reported = True
            if self._sender.is_given_up:
                what = "nothing more is logged there"
            elif self._sender.lost:
                what = "entries that it refuses are dropped"
            else:
                what = "entries are queued"
            raise ConnectionError(f"{self.server}: {self._sender.problem}; training continues, {what}")

    def _id_file(self, run_dir: Path) -> Path:
        return run_dir / f"{type(self).__name__}.json"
