"""Helpers for tests of code that uses offloop: small real runs, and callbacks driven without training.

    recorder = Recorder()                                   which events does a run publish?
    tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[recorder])
    assert recorder.names()[:2] == ["TrainStart", "EpochStart"]

    driven = drive(MyCallback(), [StepEnd(loss=1.0, lr=0.1, step=1), EpochEnd(...)])
    assert driven.result.status == "stopped"                what does a callback do?

    tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[mine, FailingCallback(), SlowCallback(0.1)])

Everything here uses the real bus, the real threads and the real mailbox: nothing is mocked.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import anyio
import msgspec
import torch

from offloop.engine.callback import BOUNDARY_EVENTS, Callback, decides
from offloop.engine.events import (
    CommandApplied,
    EpochEnd,
    Event,
    Sample,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.result import RunResult
from offloop.engine.run import Run
from offloop.engine.session.training_thread import Training
from offloop.engine.trainer import BaseTrainer, Trainer
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.reports import train_start
from offloop.engine.training.setup import Batch

E = TypeVar("E", bound=Event)

_MEASURED_FIELDS = frozenset({"run_id", "seq", "time", "seconds", "data_time", "step_time"})
"""Fields that identify or time a run; all others are the same for the same seed and data."""

_FOREIGN_EVENTS = frozenset(
    {
        "CallbackFailed",
        "CheckpointFailed",
        "CheckpointSaved",
        "CheckpointUploaded",
        "DataBottleneck",
        "EventsDropped",
        "TrainEnd",
        "UnknownEvent",
        "UploadFailed",
    }
)
"""Events that other threads publish, or that depend on measured times: their order depends on the machine."""


class Recorder(Callback):
    """Records all events in order, without drops up to a million waiting samples."""

    buffer = 1_000_000

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.run: Run | None = None
        self.is_closed = False
        self._more = threading.Condition()

    def reset(self) -> None:
        self.events = []
        self.is_closed = False

    async def on_event(self, event: Event, run: Run) -> None:
        self.run = run
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    async def close(self) -> None:
        self.is_closed = True

    def names(self) -> list[str]:
        """Return the type names of all events."""
        return [type(event).__name__ for event in self.events]

    def of(self, event_class: type[E]) -> list[E]:
        """Return the events of one class and its subclasses."""
        return [event for event in self.events if isinstance(event, event_class)]

    def wait_for(self, event_class: type[Event], *, times: int = 1, timeout: float = 20.0) -> None:
        """Wait until a number of events of a class and its subclasses have been recorded. Blocks its thread.

        Called in a decider, a loader or a step, it makes training wait for them.

        Args:
            event_class: The class.
            times: Number of events since the start of the run.
            timeout: Seconds to wait.

        Raises:
            TimeoutError: There were fewer events in that time.
        """
        with self._more:
            if not self._more.wait_for(lambda: len(self.of(event_class)) >= times, timeout):
                count, name = len(self.of(event_class)), event_class.__name__
                raise TimeoutError(f"{count} of {times} {name} came within {timeout:g} s")


class WaitsFor(Callback):
    """A decider that holds the end of each epoch until a recorder has a number of events of a class.

    Use it to test events that observers publish: they may come only after a short run is over.
    """

    def __init__(
        self, recorder: Recorder, event_class: type[Event], *, times: int = 1, timeout: float = 20.0
    ) -> None:
        """Wait as `recorder.wait_for(...)` does."""
        self._wait = functools.partial(recorder.wait_for, event_class, times=times, timeout=timeout)

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        self._wait()


def reproducible(events: Iterable[Event]) -> list[tuple[str, dict[str, Any]]]:
    """Return the part of events that is the same for the same seed and data, for comparisons.

    These are the events that the training thread publishes, as names and fields, without ids and measured times.
    """
    return [
        (
            type(event).__name__,
            {
                name: value
                for name, value in msgspec.structs.asdict(event).items()
                if name not in _MEASURED_FIELDS
            },
        )
        for event in events
        if type(event).__name__ not in _FOREIGN_EVENTS
    ]


# A tiny deterministic model, its data and its trainer ----------------------------------------------


def tiny_model(
    *, seed: int = 0, features: int = 8, classes: int = 3, dropout: float = 0.0
) -> torch.nn.Module:
    """Return a two-layer classifier whose weights depend only on the seed. Draws from no global generator."""
    model = torch.nn.Sequential(
        # skip_init: the layers would draw their first weights from the global generator.
        torch.nn.utils.skip_init(torch.nn.Linear, features, 16),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.utils.skip_init(torch.nn.Linear, 16, classes),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return model


def tiny_batches(
    batches: int = 8, *, batch_size: int = 4, seed: int = 0, features: int = 8, classes: int = 3
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of a learnable task that depend only on the seed: inputs (B, features), targets (B,)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * batch_size, features, generator=generator)
    targets = inputs[:, :classes].argmax(dim=1)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def tiny_loader(
    batches: int = 8, *, batch_size: int = 4, seed: int = 0, shuffle: bool = False, workers: int = 0
) -> "torch.utils.data.DataLoader[Any]":
    """Return a DataLoader over `tiny_batches`; with `shuffle` it has its own generator."""
    pairs = tiny_batches(batches, batch_size=batch_size, seed=seed)
    data = torch.utils.data.TensorDataset(
        torch.cat([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])
    )
    generator = torch.Generator().manual_seed(seed) if shuffle else None
    return torch.utils.data.DataLoader(
        data, batch_size=batch_size, shuffle=shuffle, generator=generator, num_workers=workers
    )


def tiny_trainer(
    trainer_class: type[Trainer] = Trainer, *, lr: float = 0.05, seed_model: int = 0, **knobs: Any
) -> Trainer:
    """Return a trainer for `tiny_model` on the CPU, with cross-entropy and SGD. Takes the arguments of `Trainer`."""
    model = knobs.pop("model", None) or tiny_model(seed=seed_model)
    optimizer = knobs.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr)
    return trainer_class(
        model, optimizer, **{"device": "cpu", "loss": torch.nn.functional.cross_entropy, **knobs}
    )


# Driving a callback without training ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Driven:
    """Outcome of a scripted run."""

    result: RunResult
    """Result, as of any run; its status is `stopped` if the callback stopped it."""
    events: list[Event]
    """All events, including those that the callback caused."""

    @property
    def commands(self) -> list[CommandApplied]:
        """The commands of the callback, in the order in which they took effect."""
        return [event for event in self.events if isinstance(event, CommandApplied)]


def drive(*callbacks: Callback, events: Iterable[Event], **knobs: Any) -> Driven:
    """Run callbacks through scripted events instead of a training, on a real bus and real threads. Blocks.

    Adds `TrainStart` and `TrainEnd` if they are missing. An event is published when all callbacks have handled the
    previous one. Deciders run at their events, commands take effect immediately, and a stop ends the script. Hooks
    inside steps do not run: they need the tensors of a step.

    Args:
        callbacks: Callbacks, in the order in which they decide.
        events: The script. Set `epoch`, `step` and `batch` if they matter; they are 0 otherwise.
        knobs: Fields of `TrainerConfig`, such as `run_dir`.
    """
    recorder = Recorder()
    trainer = _scripted(events, knobs)
    result = trainer.train([None], trainer.val_loader, epochs=1, callbacks=[recorder, *callbacks])
    return Driven(result, recorder.events)


async def drive_async(*callbacks: Callback, events: Iterable[Event], **knobs: Any) -> Driven:
    """Run `drive` without blocking the event loop."""
    recorder = Recorder()
    trainer = _scripted(events, knobs)
    result = await trainer.train_async([None], trainer.val_loader, epochs=1, callbacks=[recorder, *callbacks])
    return Driven(result, recorder.events)


class _ScriptedTrainer(BaseTrainer):
    """Publishes the events of a script."""

    script: Sequence[Event] = ()

    @property
    def val_loader(self) -> list[None] | None:
        """A stand-in for a loader if the script has validations; it is never read."""
        has_validation = any(isinstance(event, ValidationStart | ValidationEnd) for event in self.script)
        return [None] if has_validation else None

    def validation_step(self, batch: Any) -> None:
        """Never called: a script holds the results of its validations."""


class _ScriptedLoop(TrainingLoop):
    """Publishes events where the loop would train, and waits after each until all callbacks have handled it."""

    program: _ScriptedTrainer
    host: Training

    def run(self, handle: object = None) -> None:
        progress, script = self.progress, self.program.script
        # No step runs its hooks, but those at the end of training do run.
        self.prepare_hooks(handle)
        if not any(isinstance(event, TrainStart) for event in script):
            start = train_start(
                self.program, self.setup, progress, self.resumed, self.reporter, self.strategy
            )
            self.boundary.announce(start)
        for event in script:
            if progress.ending is not None:
                break
            if isinstance(event, TrainEnd):
                continue
            progress.epoch = max(event.epoch, progress.epoch)
            progress.step = max(event.step, progress.step)
            progress.batch = max(event.batch, progress.batch)
            stamped = type(event)(**{**msgspec.structs.asdict(event), **self.reporter.position()})
            if isinstance(event, ValidationEnd | EpochEnd):
                progress.latest.update(event.metrics)
            if isinstance(stamped, EpochEnd):
                progress.history.append(stamped)
            if isinstance(event, BOUNDARY_EVENTS):
                self.boundary.announce(stamped)
            else:
                self.reporter.publish(stamped)
            self._let_callbacks_handle_it()
        if progress.history:
            progress.epoch = max(progress.epoch, progress.history[-1].epoch + 1)

    def _let_callbacks_handle_it(self) -> None:
        """Wait for the observers, so that the commands of callbacks take effect at the same event in every run."""
        host = self.host
        for observer in host.callbacks.observers:
            if observer.subscription is not None:
                host.deciders.wait_for(observer)
        if self.mailbox.attention:
            self.boundary.process_commands()


def _scripted(events: Iterable[Event], knobs: dict[str, Any]) -> _ScriptedTrainer:
    model = tiny_model()
    trainer = _ScriptedTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", **knobs)
    trainer._loop_class = _ScriptedLoop
    trainer.script = list(events)
    return trainer


# Faults ---------------------------------------------------------------------------------------------


class SlowCallback(Callback):
    """Awaits for some time at each sample, like a callback that sends requests to a server."""

    def __init__(self, seconds: float) -> None:
        """Await `seconds` at each sample."""
        self.seconds = seconds
        self.handled = 0

    def reset(self) -> None:
        self.handled = 0

    async def on_sample(self, event: Sample, run: Run) -> None:
        await anyio.sleep(self.seconds)
        self.handled += 1


class FailingCallback(Callback):
    """Raises an exception on events of a class, always or a limited number of times."""

    def __init__(
        self,
        on: type[Event] = Event,
        *,
        times: int | None = None,
        error: Callable[[], Exception] | None = None,
    ) -> None:
        """Fail on `on` and its subclasses.

        Args:
            on: The class of events.
            times: Number of failures; None for one at every event.
            error: Returns the exception to raise; by default a RuntimeError.
        """
        self.on = on
        self.times = times
        self.error = error or (lambda: RuntimeError("injected"))
        self.raised = 0
        self.is_closed = False

    def reset(self) -> None:
        self.raised = 0
        self.is_closed = False

    async def on_event(self, event: Event, run: Run) -> None:
        if isinstance(event, self.on) and (self.times is None or self.raised < self.times):
            self.raised += 1
            raise self.error()

    async def close(self) -> None:
        self.is_closed = True


class HangingCallback(Callback):
    """Hangs in its first event until `release()`, in its worker thread or awaiting on the event loop."""

    def __init__(self, *, in_thread: bool = False) -> None:
        """Hang on the event loop by awaiting, or in the worker thread."""
        self._released = threading.Event()
        self.is_closed = False
        self.on_train_start = self._hang_in_thread if in_thread else self._hang_awaiting

    def reset(self) -> None:
        self.is_closed = False

    async def _hang_awaiting(self, event: TrainStart, run: Run) -> None:
        await anyio.sleep_forever()

    def _hang_in_thread(self, event: TrainStart, run: Run) -> None:
        self._released.wait()

    def release(self) -> None:
        """Let the thread continue."""
        self._released.set()

    async def close(self) -> None:
        self.is_closed = True


class EndlessLoader:
    """Yields batches of the tiny task endlessly, and has no length: for runs that a test ends."""

    def __init__(self, *, batch_size: int = 4, seed: int = 0) -> None:
        self._batches = tiny_batches(64, batch_size=batch_size, seed=seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._batches
