"""Replay: feeds the recorded events of a run to callbacks, without training.

A recorded run has one attempt, or several if it was resumed. Each is to the callbacks a run of its own: `reset`,
events, `close`; one that continues a checkpoint begins with the state that the callbacks had (`state_dict`), as in
training.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import anyio

from offloop.engine import checks
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import runs_event_loop
from offloop.engine.callback import Callback, Handlers, TrainerParts, close_unused, lookup
from offloop.engine.errors import ConfigError
from offloop.engine.events import Event, TrainEnd, TrainStart
from offloop.engine.observers.event_log import EventLog
from offloop.engine.observers.worker import Worker
from offloop.engine.paths import absolute_path
from offloop.engine.replays.attempt import Attempt
from offloop.engine.replays.control import ReplayControl
from offloop.engine.replays.recording import Recording, check_directory
from offloop.engine.replays.replay_result import ReplayResult
from offloop.engine.replays.replayed_run import Facts, NotedCommand, Services
from offloop.engine.replays.samples import ReplayedSamples
from offloop.engine.session.callback_lease import CallbackLease

logger = logging.getLogger("offloop")

DRAIN_TIMEOUT: Final = 30.0
"""Seconds by default for handlers that are busy at the end, and for `close()`: that of a trainer."""


class Replay(ReplayControl):
    """The replay of one recorded run, which others may pause, let advance, or stop while it goes on.

    ```python
    replay = Replay("runs/x", callbacks=[MyCallback()], speed=10, paused=True)
    ```

    `run` or `run_async` does it, once; all else may be called from any thread.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        callbacks: Sequence[Callback] = (),
        speed: float | None = None,
        paused: bool = False,
        directory: str | os.PathLike[str] | None = None,
        drain_timeout: float = DRAIN_TIMEOUT,
    ) -> None:
        """Look at a recorded run and at callbacks. Nothing is replayed before `run`. Blocks on the file system.

        Args:
            run_dir: The directory of the recorded run, which holds `events.jsonl`. Nothing is written into it.
            callbacks: What gets the events, in the order in which they decide.
            speed: Recorded seconds that pass in a second, above 0; 1 is as recorded. None: as fast as the callbacks
                handle the events.
            paused: Begin with a pause: nothing is handed over before `resume` or `advance`.
            directory: Where callbacks write (`run.dir`), new or without a run. None: a new temporary directory if one
                of them needs it (`needs_run_dir`), which stays.
            drain_timeout: Seconds for handlers that are busy at the end, and for each `close()`, at least 0.

        Raises:
            ConfigError: An argument cannot work, there is no such run, or a callback has step hooks only.
            TypeError: An object is no callback.
        """
        checks.flag("paused", paused)
        checks.number("drain_timeout", drain_timeout, at_least=0, unit="seconds")
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Sequence):
            raise TypeError(
                f"callbacks must be a list of callbacks, got {callbacks!r}: write [...] around it"
            )
        super().__init__(speed, is_paused=paused)
        self._recording = Recording(run_dir)
        self._callbacks = list(callbacks)
        self._hooks_left_out = _check_hooks(lookup(self._callbacks))
        self._directory = None if directory is None else absolute_path(directory)
        if self._directory is not None:
            check_directory(self._directory, self._recording)
        self._drain_timeout = drain_timeout
        self._has_begun = False
        # Written by the replay's thread.
        self._count = 0
        self._event: Event | None = None
        self._attempt: Attempt | None = None
        self._commands: list[NotedCommand] = []
        self._is_over = False

    # Any thread

    @property
    def id(self) -> str:
        """Id of the recorded run."""
        return self._recording.record.id

    @property
    def event(self) -> Event | None:
        """The last event that was handed over and handled; None before the first."""
        return self._event

    @property
    def events_done(self) -> int:
        """Events that were handed over and handled so far."""
        return self._count

    @property
    def progress(self) -> float:
        """Share of the events that were handed over so far, 0 to 1."""
        return min(1.0, self._count / self._recording.lines) if self._recording.lines else 0.0

    @property
    def commands(self) -> tuple[NotedCommand, ...]:
        """The commands that callbacks gave so far."""
        attempt = self._attempt
        return (*self._commands, *(() if attempt is None else attempt.noted))

    @property
    def is_over(self) -> bool:
        """True once all callbacks are closed."""
        return self._is_over

    # The replay itself

    def run(self) -> ReplayResult:
        """Replay to the end of the log. Blocks.

        Inside a running event loop, as in a notebook, it runs in a thread of its own.

        Raises:
            Exception: What a decider, or a callback with `on_error="raise"`, has raised.
            ConfigError: The log has no events.
            OSError: It cannot be read.
            RuntimeError: It was replayed before.
        """
        if not runs_event_loop():
            return anyio.run(self.run_async)
        outcome: list[ReplayResult] = []
        failure: list[BaseException] = []

        def host() -> None:
            try:
                outcome.append(anyio.run(self.run_async))
            except BaseException as error:
                failure.append(error)

        thread = Thread(host, name="offloop-replay-host", daemon=False)
        thread.start()
        while not thread.is_over:
            try:
                thread.join()
            except KeyboardInterrupt as interrupt:
                failure.append(interrupt)
                self.stop()
        if failure:
            raise failure.pop(0)
        return outcome[0]

    async def run_async(self) -> ReplayResult:
        """Replay to the end of the log, on this event loop; raises as `run` does.

        Cancellation: no further events come, the callbacks are closed, then it is re-raised.
        """
        if self._has_begun:
            raise RuntimeError("a replay runs once: make another one")
        self._has_begun = True
        worker = Worker("offloop-replay-begin")
        try:
            await worker.run(self._recording.scan)
            self._source: Iterator[tuple[int, Event]] = iter(self._recording)
            self._next: tuple[int, Event] | None = await worker.run(lambda: next(self._source, None))
            directory = await worker.run(self._make_directory)
            return await self._run_attempts(directory)
        finally:
            worker.close()
            self._is_over = True
            self._pace.end()

    async def _run_attempts(self, directory: Path | None) -> ReplayResult:
        callbacks = self._callbacks
        if directory is not None and not any(isinstance(each, EventLog) for each in callbacks):
            # As every run with a directory has one
            callbacks = [EventLog(), *callbacks]
        lease = CallbackLease(callbacks, self.id)
        lease.claim()
        published: list[Event] = []
        errors: dict[str, tuple[str, ...]] = {}
        states: list[Mapping[str, Any] | None] = []
        metrics: dict[str, float] = {}
        attempt: Attempt | None = None
        try:
            while self._next is not None and not self._pace.is_stopped:
                lease.begin(cast(TrainerParts, _NoTrainer()))
                _load(callbacks, states)
                attempt = self._begin(callbacks, directory)
                attempt.facts.metrics |= metrics
                await attempt.run(self._events_of(self._next[0]))
                states = attempt.states
                metrics = attempt.facts.metrics if self._is_continued() else {}
                self._commands += attempt.noted
                published += attempt.published
                for name, each in attempt.errors.items():
                    errors[name] = (*errors.get(name, ()), *each)
        finally:
            self._attempt = None
            lease.release()
        event = self._event
        return ReplayResult(
            run_id=self.id,
            events=self._count,
            step=0 if event is None else event.step,
            is_complete=self._next is None,
            end=event if isinstance(event, TrainEnd) else None,
            commands=tuple(self._commands),
            published=tuple(published),
            callback_errors=errors,
            callback_costs={} if attempt is None else attempt.costs,
            hooks_left_out=self._hooks_left_out,
            unknown=dict(self._recording.unknown),
            skipped=self._recording.skipped,
            why_skipped=self._recording.why_skipped,
            dir=directory,
        )

    def _begin(self, callbacks: list[Callback], directory: Path | None) -> Attempt:
        assert self._next is not None
        facts = Facts(
            self.id,
            directory,
            ReplayedSamples(directory, self._recording.directory),
            self._recording.record.monitor,
            has_validation=self._recording.has_validation,
        )
        attempt = Attempt(
            lookup(callbacks),
            facts,
            self._pace,
            functools.partial(Services, self, attempt=self._next[0]),
            delivered=self._delivered,
            is_continued=self._is_continued,
            drain_timeout=self._drain_timeout,
        )
        self._attempt = attempt
        return attempt

    def _make_directory(self) -> Path | None:
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            return self._directory
        if not any(each.needs_run_dir for each in self._callbacks):
            return None
        return Path(tempfile.mkdtemp(prefix=f"offloop-replay-{self.id}-"))

    # The replay's thread

    def _events_of(self, number: int) -> Iterator[Event]:
        """Yield the events of an attempt."""
        while self._next is not None and self._next[0] == number:
            yield self._next[1]
            self._next = next(self._source, None)

    def _is_continued(self) -> bool:
        """Return whether the next attempt begins with a checkpoint of this one."""
        start = None if self._next is None else self._next[1]
        return isinstance(start, TrainStart) and start.resumed_from is not None

    def _delivered(self, event: Event) -> None:
        self._event = event
        self._count += 1


def replay(
    run_dir: str | os.PathLike[str],
    *,
    callbacks: Sequence[Callback] = (),
    speed: float | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> ReplayResult:
    """Feed the recorded events of a run to callbacks, without training, and return what they did. Blocks.

    ```python
    result = replay("runs/20261130-090000-ab12", callbacks=[EarlyStopping(patience=3)])
    print(result.stop)  # EarlyStopping: stop(reason='val_loss did not ...') at ValidationEnd, step 480
    ```

    Callbacks run as in training: `reset`, their handlers in threads and on an event loop, deciders at their places,
    and `close`. Each has handled an event before the next one comes, so the outcome does not depend on the machine.
    `run` is a `ReplayedRun`, which notes commands: what comes next is recorded. Step hooks do not run. `Replay` is for
    replays that are paused or stopped while they go on.

    Args:
        run_dir: The directory of the recorded run, which holds `events.jsonl`. Nothing is written into it.
        callbacks: What gets the events, in the order in which they decide.
        speed: Recorded seconds that pass in a second, above 0; 1 is as recorded. None: as fast as the callbacks handle
            the events.
        directory: Where callbacks write (`run.dir`), new or without a run. None: a new temporary directory if one of
            them needs it, which stays.

    Raises:
        ConfigError: An argument cannot work, there is no such run, or it has no events.
        Exception: What a decider, or a callback with `on_error="raise"`, has raised.
        OSError: The log cannot be read.
    """
    return Replay(run_dir, callbacks=callbacks, speed=speed, directory=directory).run()


async def replay_async(
    run_dir: str | os.PathLike[str],
    *,
    callbacks: Sequence[Callback] = (),
    speed: float | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> ReplayResult:
    """Replay without blocking this event loop, and return what callbacks did; see `replay`.

    Cancellation: no further events come, the callbacks are closed, then it is re-raised.
    """
    return await Replay(run_dir, callbacks=callbacks, speed=speed, directory=directory).run_async()


class _NoTrainer:
    """What `Callback.prepare` gets in a replay."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"there is no trainer.{name} in a replay, which has no model: a callback that takes it in prepare() can "
            "only be tested with a short training, as of offloop.engine.testing.tiny_trainer()"
        )


def _check_hooks(handlers: list[Handlers]) -> tuple[str, ...]:
    """Return the step hooks that will not run.

    Raises:
        ConfigError: A callback has nothing else.
    """
    left_out: list[str] = []
    for each in handlers:
        names = [f"{each.name}.{hook.point}" for hook in each.hooks]
        if names and not each.observers and not each.deciders:
            raise ConfigError(
                f"{each.name} has only step hooks ({', '.join(hook.point for hook in each.hooks)}), which need a "
                "model, and a replay has none. Test it with a short training, as of "
                "offloop.engine.testing.tiny_trainer()"
            )
        if not each.callback.sets_final_weights:
            # Built-in callbacks have this one only for when they do
            names = [name for name in names if not name.endswith(".before_train_end")]
        left_out += names
    if left_out:
        logger.warning("step hooks do not run in a replay, which has no model: %s", ", ".join(left_out))
    return tuple(left_out)


def _load(callbacks: Sequence[Callback], states: Sequence[Mapping[str, Any] | None]) -> None:
    """Have callbacks continue with the states of an earlier attempt."""
    try:
        for callback, state in zip(callbacks, states, strict=False):
            if state is not None:
                callback.load_state_dict(state)
    except BaseException:
        close_unused(callbacks)
        raise
