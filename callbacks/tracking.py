"""Tracking: what every logger for a tracking server shares; such a server is never waited for by training.

    the callback's thread                    the sending thread
    ─────────────────────                    ──────────────────
    events -> points, alerts, checkpoints    connect, until it works or the run is over
    put() ── a bounded queue ──────────────> what has gathered, once a second; again, later, if that failed
    close(): waits `timeout` at most ──────> the rest, and how the run ended

A server may refuse connections, or take them and say nothing for hours. The sending thread is the only one that
notices: a queue that is full loses its oldest entries, which are counted, and at the end the thread is
given up if it cannot be done with the rest in time. It is a daemon, so it keeps no process from leaving.
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
from offloop.callbacks.value_logger import ValueLogger
from offloop.engine import (
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointSaved,
    EpochEnd,
    Run,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    checks,
    first_use,
    replace_file,
)
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

LogModel = bool | Literal["all"]

MAX_WAITING: Final = 10_000
"""Entries that wait for an unreachable server: three hours at the default cadence, a few megabytes."""
MAX_AT_ONCE: Final = 200
"""Entries handed over in one go."""
SEND_INTERVAL: Final = 1.0
"""Seconds between two goes: a request a second costs next to nothing, and a chart looks live."""
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
"""Seconds before a failed go is tried again; doubled each time up to the longest."""
PATIENCE: Final = 30.0
"""Seconds without an answer after which somebody is told; clients of tracking servers try for minutes."""
TIMEOUT: Final = 20.0
"""Seconds to wait at the end for what was not sent yet: for a server that is slow, not dead; less than a run's
`drain_timeout`, after which nobody would hear what was lost."""


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
            raise  # it is there, and something of its own is missing
        raise ModuleNotFoundError(
            f"{extra} is not installed: pip install 'offloop[{extra}]'", name=error.name
        ) from None


def hyperparameters_of(start: TrainStart, run: Run) -> dict[str, Any]:
    """Return what a run was made with, as plain values by name: the model, the optimizers, every knob, the user's own.

    The user's own come last and win. Those in a mapping are called `group.name`, and a list is a text.
    """
    trainer = run.trainer
    found: dict[str, Any] = {"model": type(trainer.model).__name__, "parameters": start.parameters}
    for name, optimizer in trainer.optimizers.items():
        found[name] = type(optimizer).__name__
        found.update({f"{name}.{key}": value for key, value in optimizer.defaults.items()})
    found.update({name: value for name, value in start.config.items() if name != "hyperparameters"})
    for limit in ("device", "epochs", "max_steps", "max_time", "steps_per_epoch"):
        found[limit] = getattr(start, limit)
    found = {name: value for name, value in found.items() if _is_plain(value)}
    return {**found, **_flat(start.config.get("hyperparameters") or {})}


def _flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if _is_plain(value) else str(value)
    return flat


def values_to_plot(
    event: StepEnd | ValidationEnd | EpochEnd, values: Mapping[str, float]
) -> dict[str, float]:
    """Return the values that no other point has: an epoch repeats those of its validation and of its last step."""
    if isinstance(event, StepEnd):
        return {**values, "epoch": event.epoch}
    if isinstance(event, EpochEnd):
        repeated = ("lr", "grad_norm")
        return {k: v for k, v in values.items() if not k.startswith("val_") and k not in repeated}
    return dict(values)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """Values of one moment."""

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
    """A thread that sends, and the bounded queue before it."""

    def __init__(
        self,
        name: str,
        *,
        connect: Callable[[], None],
        send: Callable[[Sequence[Entry]], None],
        finish: Callable[[], None],
        is_hopeless: Callable[[Exception], bool],
    ) -> None:
        """Start the thread; all functions are called in it.

        Args:
            name: Of the thread.
            connect: Comes first, and again until it does not raise.
            send: Sends some entries, again if it raises.
            finish: Comes last.
            is_hopeless: Says of what was raised whether it would be raised again.
        """
        self.sent = 0
        self.lost = 0
        self._problem: str | None = None  # the first one; written by the thread
        self._acting_since: float | None = None  # likewise: when what it does was begun
        self._connect, self._send, self._finish = connect, send, finish
        self._is_hopeless = is_hopeless
        # Guarded by _changed: the queue, and what close() says
        self._changed = threading.Condition()
        self._waiting: collections.deque[Entry] = collections.deque()
        self._in_flight = 0
        self._is_closing = self._is_given_up = False
        self._thread = Thread(self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What went wrong first, if anything did. Any thread."""
        since = self._acting_since
        if self._problem is None and since is not None and time.monotonic() - since > PATIENCE:
            return f"no answer for {PATIENCE:g} s"
        return self._problem

    @property
    def is_given_up(self) -> bool:
        """True if nothing more will be sent."""
        return self._is_given_up

    def put(self, entry: Entry) -> None:
        """Hand an entry over. Any thread; never waits. The oldest one is lost if the queue is full."""
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
        """Have the rest sent, and wait for that for at most `timeout` seconds. Blocks. Twice is fine."""
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
        except (
            BaseException
        ) as error:  # a client that calls sys.exit(), for one: what waits is not lost unsaid
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
        """Wait for entries of one kind; none means that it is over."""
        with self._changed:
            # At a pace, unless so much has gathered that one go is not enough
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
            if not self._is_given_up:  # else all of them were counted as lost
                self.sent += sent
                self.lost += lost
                self._in_flight = 0

    def _again(self, act: Callable[[], None]) -> bool:
        """Do something, again and again until it works, is hopeless, or the run is over and it failed once more."""
        pause = FIRST_PAUSE
        while True:
            self._acting_since = time.monotonic()
            try:
                act()
                return True
            except Exception as error:
                lines = str(error).strip().splitlines()
                text = f"{type(error).__name__}: {lines[0] if lines else ''}"
                logger.debug("a tracking server: %s", text, exc_info=error)
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
    """Base of the loggers for a tracking server: what is logged, and that nobody ever waits for it.

    A subclass defines `connect`, `send` and `finish`, which run in the sending thread.
    """

    server: str = "the server"
    """Its name in messages."""

    def __init__(
        self,
        *,
        log_model: LogModel = False,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """Choose what is logged; see the subclasses."""
        checks.choice("log_model", log_model, (False, True, "all"))
        checks.number("timeout", timeout, above=0, finite=False, unit="seconds")
        self.log_model: LogModel = log_model
        self.timeout = timeout
        super().__init__(every_seconds=every_seconds, every_n_steps=every_n_steps)

    def reset(self) -> None:
        super().reset()
        self._sender: Sender | None = None
        self._is_told = False
        self.tracking_id: str | None = None
        """The run's id at the server; kept in the run's directory, so that a resumed attempt continues it."""
        # Written by the callback's thread before the sending thread reads them
        self.start = TrainStart()
        self.run_id = ""
        self.run_dir: Path | None = None
        self.parameters: dict[str, Any] = {}
        self.status, self.reason = "cancelled", ""

    @property
    def sent(self) -> int:
        """Points, alerts and checkpoints that the server has got."""
        return 0 if self._sender is None else self._sender.sent

    @property
    def lost(self) -> int:
        """Points, alerts and checkpoints that it will never get."""
        return 0 if self._sender is None else self._sender.lost

    # For subclasses: in the sending thread ---------------------------------------------------------

    def connect(self) -> None:
        """Open the run at the server, that of `tracking_id` if it has one, and log `parameters`."""
        raise NotImplementedError

    def send(self, entries: Sequence[Entry]) -> None:
        """Send some points, or one alert or one checkpoint."""
        raise NotImplementedError

    def finish(self) -> None:
        """Say how the run has ended: `status` and `reason`."""
        raise NotImplementedError

    def is_hopeless(self, error: Exception) -> bool:
        """True if what raised this would raise it again: it is then left out."""
        return not isinstance(error, OSError) or isinstance(
            error, FileNotFoundError
        )  # which retention removed

    def remember(self, tracking_id: str) -> None:
        """Keep the run's id at the server for later attempts."""
        self.tracking_id = tracking_id
        if self.run_dir is not None:
            content = msgspec.json.encode({"id": tracking_id}) + b"\n"
            replace_file(self._id_file(self.run_dir), content)

    # In the callback's thread ----------------------------------------------------------------------

    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self.start, self.run_id = event, run.id
        self.run_dir = run.dir
        self.parameters = hyperparameters_of(event, run)
        if event.attempt and self.run_dir is not None and self._id_file(self.run_dir).exists():
            self.tracking_id = msgspec.json.decode(self._id_file(self.run_dir).read_bytes())["id"]
        self._sender = Sender(
            f"offloop-{type(self).__name__}-{run.id}",
            connect=self.connect,
            send=self.send,
            finish=self.finish,
            is_hopeless=self.is_hopeless,
        )

    def write(self, event: StepEnd | ValidationEnd | EpochEnd, values: Mapping[str, float]) -> None:
        self._put(Point(event.time, event.epoch, event.step, values_to_plot(event, values)))

    def on_step_end(self, event: StepEnd, run: Run) -> None:
        super().on_step_end(event, run)
        self._tell_once()

    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        super().on_epoch_end(event, run)
        self._tell_once()

    def on_alert(self, event: Alert, run: Run) -> None:
        self._put(event)

    def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        if self.log_model == "all":
            self._put(Model(Path(event.path), event.saved_step, event.reason == "best"))

    def on_train_end(self, event: TrainEnd, run: Run) -> None:
        self.status, self.reason = event.status, event.reason
        self.write_latest_step()
        if self.log_model is True and run.dir is not None:
            with contextlib.suppress(CheckpointNotFoundError):  # nothing was saved, or nothing was judged
                best = CheckpointReader(run.dir).find("best")
                self._put(Model(best.path, best.step, True))

    def close(self) -> None:
        if self._sender is None:
            return
        self._sender.close(self.timeout)
        lost, sent = self._sender.lost, self._sender.sent
        if lost:
            raise ConnectionError(
                f"{self.server} did not get {lost} of {lost + sent} points, alerts and checkpoints "
                f"({self._sender.problem or 'they came faster than it took them'}); the run's own files have them all"
            )
        self._tell_once()

    def _put(self, entry: Entry) -> None:
        if self._sender is not None:
            self._sender.put(entry)

    def _tell_once(self) -> None:
        """Raise what is the matter with the server, the first time: it becomes a `CallbackFailed` and a log record."""
        if self._sender is not None and self._sender.problem is not None and not self._is_told:
            self._is_told = True
            if self._sender.is_given_up:
                what = "nothing more is logged there"
            elif self._sender.lost:
                what = "what it refuses is left out"
            else:
                what = "what is not sent yet waits"
            raise ConnectionError(f"{self.server}: {self._sender.problem}; training goes on, {what}")

    def _id_file(self, run_dir: Path) -> Path:
        return run_dir / f"{type(self).__name__}.json"
