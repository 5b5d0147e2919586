"""Events: frozen records of what happens in a run.

An event is a `msgspec.Struct` that is safe to share between threads and to send over a wire. It holds numbers,
strings and read-only mappings of them, never a tensor, a model or an optimizer. The base class decides how it is
delivered:

    Event            a milestone: rare, never dropped
    └── Sample       frequent, such as `StepEnd`: dropped for a subscriber that lags behind

Subclass either to define more. `encoding.py` converts any event to JSON or MessagePack and back.

`docs/events.md` is made from the docstrings here by `docs/make_reference.py`. A class says when it is published, and
from which thread in a line that begins with `Thread:`; a field says its meaning and unit.

This module imports neither torch nor anything that does I/O.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeVar

import msgspec

from offloop.engine.errors import MetricNotFoundError

SCHEMA: Final = 1
"""Version of the wire format. Later versions only add fields, with defaults."""

Format = Literal["json", "msgpack"]
V = TypeVar("V")

_WORD_START: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class _ReadOnlyDict(dict[str, V]):
    """A dict that cannot be changed, because every thread sees the same event."""

    __slots__ = ()

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is read-only; make a dict(...) of it to change it")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, V]]]:
        return type(self), (dict(self),)


class Metrics(_ReadOnlyDict[float]):
    """Read-only mapping of metric names to values. A missing key raises `MetricNotFoundError`, which lists the keys."""

    __slots__ = ()

    def __missing__(self, key: str) -> NoReturn:
        raise MetricNotFoundError(key, self)


class Settings(_ReadOnlyDict[Any]):
    """Read-only mapping of names to plain values: numbers, strings, booleans, None, lists and mappings of them."""

    __slots__ = ()


NO_METRICS: Final = Metrics()
NO_SETTINGS: Final = Settings()

_registry: dict[str, "type[Event]"] = {}
# Import the modules of event classes that are not defined yet. Appended by packages that load their names when used.
_elsewhere: "list[Callable[[], object]]" = []


def handler_name(class_name: str) -> str:
    """Return the name of the handler for an event class: `EpochEnd` -> `on_epoch_end`, `GPUHot` -> `on_gpu_hot`."""
    return "on_" + _WORD_START.sub("_", class_name).lower()


def _tag(class_name: str) -> str:
    """Return the tag of the class being defined: its name for offloop's own, otherwise `module.Class`."""
    # msgspec calls this from inside the class statement, so the calling frame's module is the class's module;
    # collections.namedtuple does the same. A metaclass would know the module, but costs 0.3 us for each event
    # that is built: Python calls only StructMeta itself through its fast path.
    module = sys._getframe(1).f_globals.get("__name__", "")
    return class_name if module.startswith("offloop.") else f"{module}.{class_name}"


class Event(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag_field="type", tag=_tag
):
    """Base class of all events. A direct subclass is a milestone: rare, and never dropped.

    Leave `run_id`, `seq` and `time` out when you publish an event: the run fills them in. An event published outside
    the training thread also gets the position (`epoch`, `step`, `batch`) of the last training event before it.

    Thread: any.
    """

    # The garbage collector does not track events (gc=False): plain values form no cycles, and a fast loop makes many.

    run_id: str = ""
    """Id of the run."""
    seq: int = -1
    """Position in the order of all events of the run, from 0 without gaps; -1 until the bus assigns it."""
    time: float = 0.0
    """Unix time in seconds. It is read once at the start and then advances with the monotonic clock, so it never runs
    backwards within an attempt."""
    epoch: int = -1
    """Index of the epoch, from 0; -1 until filled in."""
    step: int = -1
    """Optimizer steps completed since the start of the run."""
    batch: int = -1
    """Batches taken from the training loader since the start of the run."""

    handler_name: ClassVar[str] = "on_event"
    """Name of the callback method that handles it: `EpochEnd` -> `on_epoch_end`."""

    def __init_subclass__(cls, **config: Any) -> None:
        super().__init_subclass__(**config)
        cls.handler_name = handler_name(cls.__name__)
        module = cls.__module__
        tag = cls.__name__ if module.startswith("offloop.") else f"{module}.{cls.__name__}"
        # A class defined again, as when a notebook cell is rerun, replaces the earlier one.
        _registry[tag] = cls


_registry[Event.__name__] = Event


class Sample(Event, frozen=True, kw_only=True):
    """Base class of frequent events. A subscriber that lags loses the oldest ones and gets their number.

    Thread: any.
    """

    units: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Units of fields, by name, for the live page: `{"delay": "seconds"}`. Names that end in `_bytes`, `_percent`,
    `_share` (0 to 1), `_seconds`, `_per_second`, `_bytes_per_second`, `_celsius` or `_watts` need none."""


class TrainStart(Event, frozen=True, kw_only=True):
    """First event of a run, published after set-up and before the first batch.

    Thread: training thread.
    """

    schema: int = SCHEMA
    """Version of the wire format of the events that follow."""
    attempt: int = 0
    """How many times the run was started before; above 0 in a resumed run."""
    resumed_from: str | None = None
    """Path of the checkpoint that this attempt continues; None for a new run."""
    resumed_at: float | None = None
    """Unix time in seconds at which that checkpoint was taken, by the clock of the attempt that took it."""
    resumed_attempt: int | None = None
    """The attempt that took that checkpoint. Events of that attempt after `resumed_at`, and all events of later
    attempts, are no longer part of the run. Do not compare times between attempts: the machine's clock may have been
    set back."""
    init_from: str | None = None
    """Source of the initial weights (`init_from=`); None if the model was taken as it was."""
    config: Settings = NO_SETTINGS
    """All knobs of the trainer, by name."""
    hyperparameters: Settings = NO_SETTINGS
    """What the run is made with, by flat name: `model`, `parameters`, `loss`, `optimizer`, `optimizer.lr` and its other
    options, `scheduler`, `batch_size`, the limits given to `train()`, `precision`, knobs that differ from their
    default, and those of `Trainer(hyperparameters=)`, as `group.name` if they are nested. What is unknown is left
    out."""
    device: str = "cpu"
    """Device of the model, as torch names it."""
    parameters: int = 0
    """Number of trainable parameters; lazy ones, which have no shape yet, do not count."""
    batches_per_epoch: int | None = None
    """Batches in an epoch, after limits; None if the loader has no length."""
    steps_per_epoch: int | None = None
    """Optimizer steps in an epoch; None if the loader has no length or optimization is manual."""
    epochs: int | None = None
    """Limit of the run: total epochs."""
    max_steps: int | None = None
    """Limit of the run: total optimizer steps."""
    max_time: float | None = None
    """Limit of the run: total seconds of training, pauses excluded."""
    world_size: int = 1
    """Number of processes ("ranks") that train together."""


class Resumed(Event, frozen=True, kw_only=True):
    """Published once in a resumed attempt, when all state is restored and before the next batch is read.

    A decider may refuse to continue: `run.stop_nowait(...)`.

    Thread: training thread.
    """

    checkpoint: str
    """Path of the checkpoint."""
    exactness: str
    """`bitwise`: the same bits as an uninterrupted run. `equivalent`: the same order and arithmetic, but other random
    numbers in loader workers. `approximate`: some state could not be restored."""
    reasons: str = ""
    """Why it is not bitwise, separated by semicolons."""
    kept: tuple[str, ...] = ()
    """Settings taken from the checkpoint although the script differs: `lr is 0.1, the script has 0.05`."""
    from_script: tuple[str, ...] = ()
    """Settings taken from the script although the checkpoint differs or lacks them: `metric f1_score is new`."""


class EpochStart(Event, frozen=True, kw_only=True):
    """Published when an epoch starts, before the loader's iterator is created.

    A run resumed in the middle of an epoch does not repeat it: `TrainStart` has the epoch, and `resumed_from`.

    Thread: training thread.
    """


class StepEnd(Sample, frozen=True, kw_only=True):
    """Published after each optimizer step.

    On CUDA it is published when its values have arrived from the device, always before the next milestone; `time` is
    the launch of the step.

    Thread: training thread.
    """

    loss: float | None = None
    """Mean loss over the batches of the step (its accumulation window); None if a manual step returned no loss."""
    lr: float
    """Learning rate of this step: the largest over the parameter groups of the first optimizer."""
    lrs: Metrics = NO_METRICS
    """Learning rate of each parameter group if the rates differ, otherwise empty. Keys are the group's `name` or
    index; with several optimizers, `optimizer` or `optimizer/group`."""
    grad_norm: float | None = None
    """Total L2 norm of the gradients before clipping; None unless gradients are clipped by norm."""
    samples: int = 0
    """Number of samples in the step."""
    data_time: float = 0.0
    """Seconds that the training thread waited for the step's batches."""
    step_time: float = 0.0
    """Seconds from receiving the first batch to the end of the step."""
    skipped: bool = False
    """True if the weights were not updated: the loss scaler found infinities, or `on_nonfinite="skip_step"`."""
    metrics: Metrics = NO_METRICS
    """Values logged by the step with `self.log(name, value)`, and `loss_scale` with `precision="16-mixed"`."""


class ValidationStart(Event, frozen=True, kw_only=True):
    """Published when a validation starts, at a step boundary.

    Thread: training thread.
    """

    batches: int | None = None
    """Number of batches, after limits; None if the loader has no length."""


class ValidationEnd(Event, frozen=True, kw_only=True):
    """Published when a validation is complete. A validation that is stopped has none.

    Thread: training thread.
    """

    metrics: Metrics = NO_METRICS
    """`val_loss` and the other metrics of this validation."""
    samples: int = 0
    """Number of samples validated."""
    seconds: float = 0.0
    """Duration in seconds."""


class EpochEnd(Event, frozen=True, kw_only=True):
    """Published when an epoch is complete, after its validation.

    Thread: training thread.
    """

    metrics: Metrics = NO_METRICS
    """Metrics computed since the previous `EpochEnd`: `train_loss`, `lr`, `val_loss`, ..."""
    samples: int = 0
    """Number of training samples in the epoch."""
    seconds: float = 0.0
    """Duration in seconds, including validations and pauses."""
    complete: bool = True
    """False if `max_steps` or `max_time` ended the epoch before its loader did."""
    final: bool = False
    """True if the run has reached a limit: no training follows."""


class DataBottleneck(Event, frozen=True, kw_only=True):
    """Published after the first epoch if the run spent much of it waiting for data. At most one in a run.

    It depends on measured times, so leave it out when you compare runs.

    Thread: training thread.
    """

    share: float
    """Fraction of the epoch's time spent waiting for batches, 0 to 1."""
    wait: float
    """Mean wait for a batch in seconds, without the first batch."""
    advice: tuple[str, ...] = ()
    """Suggested changes to the loader, most promising first."""


class TrainEnd(Event, frozen=True, kw_only=True):
    """Last event of a run, published when all accepted checkpoints are durable.

    Thread: event loop.
    """

    status: str
    """`completed`, `stopped`, `cancelled` or `failed`."""
    reason: str = ""
    """Why the run ended, as text."""
    error: str | None = None
    """The exception of a failed run, as `Type: text`."""
    failed_step: int | None = None
    """Number of the step whose loss was not finite, if that ended the run; it has no `StepEnd`."""
    failed_loss: float | None = None
    """The loss of that step."""
    metrics: Metrics = NO_METRICS
    """Latest value of each metric."""
    seconds: float = 0.0
    """Duration of this attempt in seconds."""


class LearningRateChanged(Event, frozen=True, kw_only=True):
    """Published when a command, a plateau schedule or a schedule that steps once an epoch changes a learning rate.

    A schedule that steps with the optimizer shows in `StepEnd.lr` instead.

    Thread: training thread.
    """

    lr: float
    """New learning rate: the largest over the optimizer's parameter groups."""
    previous: float
    """Learning rate before the change."""
    source: str
    """`command` or `schedule`."""
    optimizer: str = ""
    """Name of the optimizer if the trainer has several, otherwise empty."""


class StateChanged(Event, frozen=True, kw_only=True):
    """Published when the run is paused, resumed or stopped.

    Thread: training thread.
    """

    state: str
    """`running`, `paused` or `stopping`."""
    reason: str = ""
    """Reason given with the command."""
    by: str = ""
    """Source of the command: a callback's name, `user`, `viewer <address>`, or `signal`."""


class CommandApplied(Event, frozen=True, kw_only=True):
    """Published when a command has been applied; its position is where it took effect.

    Thread: training thread.
    """

    command: str
    """`pause`, `resume`, `stop`, `set_lr`, `checkpoint`, `tag`, `validate` or `call`."""
    command_id: int
    """Number of the command within the run, from 0 in the order of giving."""
    by: str = ""
    """Source of the command: a callback's name, `user`, `viewer <address>`, `signal`, or `train` for `resume_lr=`."""
    arguments: Settings = NO_SETTINGS
    """Arguments of the command, by name."""
    error: str | None = None
    """Why the command failed, as `Type: text`."""


class CheckpointSaved(Event, frozen=True, kw_only=True):
    """Published when a checkpoint is durable: it survives a power cut from here on.

    The run's logs on disk then hold all events before it.

    Thread: a thread of its own, after the writer.
    """

    path: str
    """Directory of the checkpoint."""
    saved_step: int
    """Step whose state it holds; `step`, where training is by now, may be later."""
    reason: str = ""
    """Why it was taken: `interval`, `best`, `final`, `preempt` (a signal), or the reason given with the command."""
    bytes: int = 0
    """Size on disk in bytes."""
    seconds: float = 0.0
    """Seconds from the copy in memory to durable."""
    to_evaluate: bool = False
    """Whether it is kept until an `Evaluated` tells how it was evaluated beside training."""


class CheckpointFailed(Event, frozen=True, kw_only=True):
    """Published when a checkpoint was not written. Training continues.

    Thread: writer's thread, or the training thread if the copy in memory failed.
    """

    saved_step: int
    """Step whose state it would have held."""
    error: str
    """The exception, as `Type: text`."""
    reason: str = ""
    """Why it was to be taken, as in `CheckpointSaved`."""


class Evaluated(Event, frozen=True, kw_only=True):
    """Published by an evaluator when a checkpoint was evaluated beside training, or could not be.

    Its metrics belong to the step of the checkpoint, `of_step`; `step`, where training is by now, may be later.

    Thread: that of the evaluator.
    """

    path: str
    """Directory of the checkpoint."""
    of_step: int
    """Step whose state it holds."""
    of_epoch: int = -1
    """Index of the epoch in which it was taken, from 0; -1 if unknown."""
    metrics: Metrics = NO_METRICS
    """The figures. Their names begin with `eval_`."""
    seconds: float = 0.0
    """Duration of the evaluation in seconds."""
    error: str | None = None
    """Why it could not be evaluated, as `Type: text`."""


class CheckpointUploaded(Event, frozen=True, kw_only=True):
    """Published when a checkpoint is complete in the remote directory.

    Thread: upload thread.
    """

    url: str
    """URL of the checkpoint's directory."""
    uploaded_step: int
    """Step whose state it holds; `step`, where training is by now, may be later."""
    bytes: int = 0
    """Size in bytes."""
    seconds: float = 0.0
    """Duration of the upload in seconds."""


class UploadFailed(Event, frozen=True, kw_only=True):
    """Published when an upload to the remote directory has failed several times. It is tried again later.

    Training continues, and local files are not affected.

    Thread: upload thread; the event loop if files are still missing when the time for uploads at the end is up.
    """

    url: str
    """URL of the run's remote directory."""
    error: str
    """The exception, as `Type: text`."""


class CallbackFailed(Event, frozen=True, kw_only=True):
    """Published when a callback raised and training continues. At most one a second for each callback.

    Thread: the thread in which the callback ran.
    """

    callback: str
    """Name of the callback."""
    event: str
    """Type of the event that it was handling, or the method that raised."""
    error: str
    """The exception, as `Type: text`."""
    traceback: str = ""
    """Traceback, as Python prints it."""
    failures: int = 1
    """Failures of this callback in this run so far."""
    disabled: bool = False
    """True if it failed ten times in a row: it receives no more events, and its step hooks are no longer called."""


class EventsDropped(Event, frozen=True, kw_only=True):
    """Published when a subscriber lagged and lost samples. At most one a second for each subscriber.

    Thread: event loop.
    """

    subscriber: str
    """Name of the subscriber; `bus` if the whole event loop had stalled."""
    count: int
    """Samples dropped since the previous report."""
    total: int
    """Samples dropped since the start of the run."""
    first_step: int = -1
    """`step` of the oldest sample in this report."""
    last_step: int = -1
    """`step` of the newest sample in this report."""


class UnknownEvent(Event, frozen=True, kw_only=True, tag_field="", tag=""):
    """Result of decoding an event whose class is not defined in this process. It encodes to the same bytes.

    Thread: never published; `decode` and `read_events` return it.
    """

    type: str
    """Tag of the event."""
    raw: bytes
    """The encoded event."""
    format: Format = "json"
    """Encoding of `raw`: `json` or `msgpack`."""


# UnknownEvent is no type on the wire.
del _registry["UnknownEvent"]


def event_class(tag: str) -> type[Event] | None:
    """Return the event class with a tag, None if none is defined here."""
    return _registry.get(tag)


def define_later(load: Callable[[], object]) -> None:
    """Have a function that imports event classes called when a handler has the name of no class defined so far."""
    _elsewhere.append(load)


def define_now() -> None:
    """Define the event classes of `define_later`. Blocks while it imports."""
    while _elsewhere:
        _elsewhere.pop()()


def known_events() -> Iterator[type[Event]]:
    """Iterate over all event classes defined so far, offloop's and users'."""
    return iter(tuple(_registry.values()))
