"""Events: what a run says about itself, as frozen records of plain values.

An event is a `msgspec.Struct` that crosses threads and wires: it holds numbers, strings and read-only
mappings of them, never a tensor, a model or an optimizer. Two base classes say how it travels:

    Event            a milestone: few, never dropped
    └── Sample       one of many (`StepEnd`): may be thinned for a subscriber that lags

Anybody may define more by subclassing either; that they are frozen and their tag come by themselves.
`encode` and `decode` turn any event into JSON or MessagePack and back, keep events of unknown types,
and carry NaN and infinities (JSON has no word for them: they travel as strings).

This module imports neither torch nor anything that does I/O.
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeVar

import msgspec

from offloop.engine.errors import EventError, MetricNotFoundError

SCHEMA: Final = 1
"""Version of the events' wire form. Fields are only ever added, with defaults."""

Format = Literal["json", "msgpack"]
V = TypeVar("V")

_WORD_START: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NOT_PLAIN: Final = (TypeError, OverflowError, UnicodeEncodeError, RecursionError)
"""What encoding raises for: another type, an int of more than 64 bits, half a surrogate pair, a cycle."""
_NON_FINITE: Final = {math.inf: "Infinity", -math.inf: "-Infinity"}


class _ReadOnlyDict(dict[str, V]):
    """A dict that cannot be changed: what rides on an event is seen by every thread."""

    __slots__ = ()

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is read-only; make a dict(...) of it to change it")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, V]]]:
        return type(self), (dict(self),)


class Metrics(_ReadOnlyDict[float]):
    """Names and values of metrics, read-only. A missing key raises and lists the keys there are."""

    __slots__ = ()

    def __missing__(self, key: str) -> NoReturn:
        raise MetricNotFoundError(key, self)


class Settings(_ReadOnlyDict[Any]):
    """Names and plain values (numbers, strings, booleans, None, lists and mappings of them), read-only."""

    __slots__ = ()


NO_METRICS: Final = Metrics()
NO_SETTINGS: Final = Settings()

_registry: dict[str, "type[Event]"] = {}


def handler_name(class_name: str) -> str:
    """Return the name of the handler for an event class: `EpochEnd` -> `on_epoch_end`, `GPUHot` -> `on_gpu_hot`."""
    return "on_" + _WORD_START.sub("_", class_name).lower()


def _tag(class_name: str) -> str:
    """Return the tag of the event class that is being defined: its name for offloop's, else `module.Class`."""
    # msgspec calls this from inside the class statement, so the caller's module is the class's own;
    # collections.namedtuple finds its module in the same way. (A metaclass could know it without looking,
    # but costs 0.3 us each time an event is built: only StructMeta itself is called the fast way.)
    module = sys._getframe(1).f_globals.get("__name__", "")
    return class_name if module.startswith("offloop.") else f"{module}.{class_name}"


class _Codec(msgspec.Struct):
    """The decoders of one event class, made when first needed."""

    json: "msgspec.json.Decoder[Event]"
    msgpack: "msgspec.msgpack.Decoder[Event]"


_codecs: dict[str, _Codec] = {}


class Event(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag_field="type", tag=_tag
):
    """A milestone: rare, never dropped, and the base class of every event.

    Events are not tracked by the garbage collector: plain values form no cycles, and a fast loop makes many.

    Who publishes leaves `run_id`, `seq` and `time` alone: they are filled in on the way. An event
    published from anywhere but the training thread gets the position of the training event before it.
    """

    run_id: str = ""
    """Identity of the run."""
    seq: int = -1
    """Place in the run's one total order, from 0 without gaps; -1 until the bus has taken it out."""
    time: float = 0.0
    """Unix time in seconds; it advances with the monotonic clock and never runs backwards."""
    epoch: int = -1
    """Index of the epoch it belongs to, from 0; -1 until filled in."""
    step: int = -1
    """Optimizer steps done since the start of the run."""
    batch: int = -1
    """Batches that the training loader has given since the start of the run."""

    handler_name: ClassVar[str] = "on_event"
    """Name of its handler on a callback: `EpochEnd` -> `on_epoch_end`."""

    def __init_subclass__(cls, **config: Any) -> None:
        super().__init_subclass__(**config)
        cls.handler_name = handler_name(cls.__name__)
        module = cls.__module__
        tag = cls.__name__ if module.startswith("offloop.") else f"{module}.{cls.__name__}"
        _registry[tag] = cls  # defined again, as a notebook cell does, it replaces the earlier class
        _codecs.pop(tag, None)


_registry[Event.__name__] = Event


class Sample(Event, frozen=True, kw_only=True):
    """One of many: a subscriber that lags may get fewer of them, and is told how many it missed."""


class TrainStart(Event, frozen=True, kw_only=True):
    """The run begins. From the training thread, after set-up and before the first batch."""

    schema: int = SCHEMA
    """Version of the events that follow."""
    attempt: int = 0
    """How many times the run had been started before; a resumed run counts on."""
    resumed_from: str | None = None
    """The checkpoint that this attempt continues, as a path."""
    resumed_at: float | None = None
    """When that checkpoint was taken, by the clock of the attempt that took it: Unix time in seconds."""
    resumed_attempt: int | None = None
    """The attempt that took that checkpoint. What it wrote after `resumed_at` does not count, and nothing of later
    attempts does; their clocks say nothing, as the machine's may have been set back."""
    init_from: str | None = None
    """What the weights were initialized from; None if the model was taken as it was."""
    config: Settings = NO_SETTINGS
    """Every knob of the run."""
    device: str = "cpu"
    """Where the model is."""
    parameters: int = 0
    """Number of trainable parameters; lazy ones, which have no shape yet, are left out."""
    batches_per_epoch: int | None = None
    """Batches in an epoch after limits; None where the loader has no length."""
    steps_per_epoch: int | None = None
    """Optimizer steps in an epoch; None where the loader has no length or the steps are manual."""
    epochs: int | None = None
    """Limit: epochs in total."""
    max_steps: int | None = None
    """Limit: optimizer steps in total."""
    max_time: float | None = None
    """Limit: seconds of training in total."""


class Resumed(Event, frozen=True, kw_only=True):
    """Everything is put back and training goes on. From the training thread, once in a resumed attempt.

    Before the first batch that is read on. Deciders may refuse to go on: `run.stop_nowait(...)`.
    """

    checkpoint: str
    """Path of the checkpoint that is continued."""
    exactness: str
    """`bitwise`: the same bits as without the interruption; `equivalent`: the same order and arithmetic, but
    other draws inside loader workers; `approximate`: something could not be put back."""
    reasons: str = ""
    """Why it is not bitwise, in words; several are separated by semicolons."""
    kept: tuple[str, ...] = ()
    """What the run keeps from its checkpoint where the script differs: `lr is 0.1, the script has 0.05`."""
    from_script: tuple[str, ...] = ()
    """What the run takes from the script where the checkpoint differs or has nothing: `metric f1_score is new`."""


class EpochStart(Event, frozen=True, kw_only=True):
    """An epoch begins. From the training thread, before the loader is asked for an iterator.

    One that goes on in the middle after a resume has none: `TrainStart` has its number, and `resumed_from`.
    """


class StepEnd(Sample, frozen=True, kw_only=True):
    """An optimizer step is done. From the training thread, one for each step.

    On CUDA it is published when its values have arrived from the device, always before the next
    milestone; `time` is when the step was launched.
    """

    loss: float | None = None
    """Mean loss over the batches of the step (of its accumulation window); None where a manual step returned none."""
    lr: float
    """Learning rate that the step used: the largest group of the first optimizer."""
    lrs: Metrics = NO_METRICS
    """Learning rate of each parameter group, where their rates differ; else empty. The name is the group's
    `name`, or its index; where there are several optimizers, `optimizer` or `optimizer/group`."""
    grad_norm: float | None = None
    """Total gradient norm before clipping; None where nothing is clipped by norm."""
    samples: int = 0
    """Samples in the step."""
    data_time: float = 0.0
    """Seconds that the training thread waited for batches."""
    step_time: float = 0.0
    """Seconds from having the first batch to here."""
    skipped: bool = False
    """True where the update was left out: a loss scaler found infinities, or `on_nonfinite="skip_step"`."""
    metrics: Metrics = NO_METRICS
    """What the step logged with `self.log(name, value)`."""


class ValidationStart(Event, frozen=True, kw_only=True):
    """A validation begins. From the training thread, at a step boundary."""

    batches: int | None = None
    """Batches in it after limits; None where the loader has no length."""


class ValidationEnd(Event, frozen=True, kw_only=True):
    """A validation is complete. From the training thread; a stopped one has no end."""

    metrics: Metrics = NO_METRICS
    """`val_loss` and the other values made by it."""
    samples: int = 0
    """Samples validated."""
    seconds: float = 0.0
    """Its duration."""


class EpochEnd(Event, frozen=True, kw_only=True):
    """An epoch is complete, its validation included. From the training thread."""

    metrics: Metrics = NO_METRICS
    """All that was made since the last `EpochEnd`: `train_loss`, `lr`, `val_loss`, ..."""
    samples: int = 0
    """Training samples in the epoch."""
    seconds: float = 0.0
    """Duration of the epoch, validations and pauses included."""
    complete: bool = True
    """False where `max_steps` or `max_time` ended the epoch before its loader did."""
    final: bool = False
    """True where a limit of the run is reached: nothing is trained after it."""


class DataBottleneck(Event, frozen=True, kw_only=True):
    """The run waits for its data. After its first epoch, from the training thread; at most once in a run.

    Whether it comes depends on the machine, so it is left out where runs are compared.
    """

    share: float
    """Share of the epoch's time that was spent waiting for batches, 0 to 1."""
    wait: float
    """Mean seconds that a batch was waited for, the first left out."""
    advice: tuple[str, ...] = ()
    """What to change about the loader, most promising first."""


class TrainEnd(Event, frozen=True, kw_only=True):
    """The last event of a run, always. From the event loop, after accepted checkpoints are durable."""

    status: str
    """`completed`, `stopped`, `cancelled` or `failed`."""
    reason: str = ""
    """Why, in words."""
    error: str | None = None
    """The exception of a failed run, as `Type: text`."""
    metrics: Metrics = NO_METRICS
    """The latest value of each metric of the run."""
    seconds: float = 0.0
    """Duration of this attempt."""


class LearningRateChanged(Event, frozen=True, kw_only=True):
    """A person, a plateau or a schedule that steps once an epoch changed a learning rate.

    From the training thread. A schedule that steps with the optimizer shows in `StepEnd.lr` instead.
    """

    lr: float
    """The new value: the largest group of the optimizer."""
    previous: float
    """The value before."""
    source: str
    """`command` or `schedule`."""
    optimizer: str = ""
    """Name of the optimizer where the trainer has several."""


class StateChanged(Event, frozen=True, kw_only=True):
    """The run entered another state. From the training thread."""

    state: str
    """`running`, `paused` or `stopping`."""
    reason: str = ""
    """Why, in words."""
    by: str = ""
    """Who caused it: a callback, `user`, a viewer, a signal."""


class CommandApplied(Event, frozen=True, kw_only=True):
    """A command took effect at this position. From the training thread."""

    command: str
    """`pause`, `resume`, `stop`, `set_lr`, `checkpoint`, `validate` or `call`."""
    command_id: int
    """Number of the command within the run, from 0 in the order they were given."""
    by: str = ""
    """Who gave it."""
    arguments: Settings = NO_SETTINGS
    """What it was given with."""
    error: str | None = None
    """Why it could not be done, as `Type: text`."""


class CheckpointSaved(Event, frozen=True, kw_only=True):
    """A checkpoint is durable: it survives a power cut from here on. From the writer's thread."""

    path: str
    """Its directory."""
    saved_step: int
    """The step whose state it holds; `step` may be later."""
    reason: str = ""
    """Why it was taken: `interval`, `best`, `final`, `command`, ..."""
    bytes: int = 0
    """Size on disk."""
    seconds: float = 0.0
    """From snapshot to durable."""


class CheckpointFailed(Event, frozen=True, kw_only=True):
    """A checkpoint could not be written; training goes on. From the writer's thread."""

    saved_step: int
    """The step whose state it would have held."""
    error: str
    """The exception, as `Type: text`."""
    reason: str = ""
    """Why it was to be taken."""


class CheckpointUploaded(Event, frozen=True, kw_only=True):
    """A checkpoint is complete in the remote directory. From the upload thread."""

    url: str
    """Its directory there."""
    uploaded_step: int
    """The step whose state it holds; `step` may be later."""
    bytes: int = 0
    """Its size."""
    seconds: float = 0.0
    """How long the upload took."""


class UploadFailed(Event, frozen=True, kw_only=True):
    """Something could not be copied to the remote directory, after several tries; it is tried again later.

    Training goes on and local files are untouched. From the upload thread; at the end of the run, if not
    everything is there when the time for it is up, from the event loop.
    """

    url: str
    """The run's remote directory."""
    error: str
    """The exception, as `Type: text`."""


class CallbackFailed(Event, frozen=True, kw_only=True):
    """A callback raised and was isolated. From where it ran, at most once a second for each callback."""

    callback: str
    """Name of the callback."""
    event: str
    """Type of the event it was handling, or the method that raised."""
    error: str
    """The exception, as `Type: text`."""
    traceback: str = ""
    """Its traceback, as Python prints it."""
    failures: int = 1
    """How many times it has failed in this run."""
    disabled: bool = False
    """True where it failed ten times in a row and gets no more events, or its step hooks are called no more."""


class EventsDropped(Event, frozen=True, kw_only=True):
    """A subscriber lagged and missed samples. From the event loop, at most once a second for each."""

    subscriber: str
    """Its name; `bus` where the event loop as a whole had stalled."""
    count: int
    """Samples dropped since the last report."""
    total: int
    """Samples dropped since the start of the run."""
    first_step: int = -1
    """`step` of the oldest sample in this report."""
    last_step: int = -1
    """`step` of the newest sample in this report."""


class UnknownEvent(Event, frozen=True, kw_only=True, tag_field="", tag=""):
    """An event of a type that this process does not know, kept as it came and encoded as it came."""

    type: str
    """The tag it carries."""
    raw: bytes
    """The whole encoded event."""
    format: Format = "json"
    """How `raw` is encoded."""


del _registry["UnknownEvent"]  # it is what an unknown type becomes, not a type on the wire


def known_events() -> Iterator[type[Event]]:
    """Iterate over every event class defined so far, offloop's own and users'."""
    return iter(tuple(_registry.values()))


# Encoding and decoding ---------------------------------------------------------------------------

_json_encode = msgspec.json.Encoder().encode
_msgpack_encode = msgspec.msgpack.Encoder().encode


class _Head(msgspec.Struct):
    """The fields that are read before the class is known, and the base fields of an unknown event."""

    type: str
    run_id: str = ""
    seq: int = -1
    time: float = 0.0
    epoch: int = -1
    step: int = -1
    batch: int = -1


_json_head = msgspec.json.Decoder(_Head, strict=False)
_msgpack_head = msgspec.msgpack.Decoder(_Head, strict=False)


def encode(event: Event, format: Format = "json") -> bytes:
    """Encode an event. Any thread; does not block.

    Raises:
        EventError: A field holds something that is no plain value; the text names field and type.
    """
    try:
        if isinstance(event, UnknownEvent):
            return event.raw if event.format == format else _transcode(event)
        if format == "msgpack":
            return _msgpack_encode(event)
        data = _json_encode(event)
        # msgspec writes null for NaN and infinities. Looking for "null" in the bytes is far cheaper than
        # looking at every value; fields at their default, None among them, are not in the bytes at all.
        if b"null" in data:
            data = _json_encode(with_non_finite_as_text(msgspec.to_builtins(event)))
        return data
    except _NOT_PLAIN as error:
        raise _not_plain(event, error) from error


def decode(data: bytes, format: Format = "json") -> Event:
    """Decode an event: its type first, then the registered class; an unknown one becomes `UnknownEvent`.

    Raises:
        msgspec.DecodeError: The bytes are no event.
    """
    head = (_json_head if format == "json" else _msgpack_head).decode(data)
    codec = _codec(head.type)
    if codec is None:
        position = {name: getattr(head, name) for name in Event.__struct_fields__}
        return UnknownEvent(type=head.type, raw=data, format=format, **position)
    return codec.json.decode(data) if format == "json" else codec.msgpack.decode(data)


def check(event: Event) -> None:
    """Raise `EventError` unless every field holds plain values; about a microsecond."""
    try:
        _msgpack_encode(event)
    except _NOT_PLAIN as error:
        raise _not_plain(event, error) from error


def _codec(tag: str) -> _Codec | None:
    codec = _codecs.get(tag)
    if codec is None and tag in _registry:
        cls = _registry[tag]
        # strict=False reads "NaN" and "Infinity" where a number is due
        codec = _codecs[tag] = _Codec(
            json=msgspec.json.Decoder(cls, strict=False, dec_hook=_decode_mapping),
            msgpack=msgspec.msgpack.Decoder(cls, strict=False, dec_hook=_decode_mapping),
        )
    return codec


def _decode_mapping(wanted: type, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping, got {type(value).__name__}")
    if wanted is Metrics:
        return Metrics({name: float(number) for name, number in value.items()})
    if wanted is Settings:
        return Settings(value)
    raise NotImplementedError(f"cannot decode {wanted}")


def with_non_finite_as_text(value: Any) -> Any:
    """Return plain values with NaN and infinities as the texts that they are in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE.get(value, "NaN")
    if isinstance(value, Mapping):
        return {key: with_non_finite_as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_non_finite_as_text(item) for item in value]
    return value


def _transcode(event: UnknownEvent) -> bytes:
    if event.format == "json":
        return _msgpack_encode(msgspec.json.decode(event.raw))
    return _json_encode(with_non_finite_as_text(msgspec.msgpack.decode(event.raw)))


def _not_plain(event: Event, problem: Exception) -> EventError:
    """Return the error that names the field, and the place in it, that cannot be encoded."""
    for name in event.__struct_fields__:
        where, value = _first_not_plain(name, getattr(event, name)) or ("", None)
        if where:
            if not isinstance(problem, TypeError):
                return EventError(f"{type(event).__name__}.{where} cannot ride on an event: {problem}")
            hint = " (for a tensor: value.item())" if type(value).__name__ == "Tensor" else ""
            return EventError(
                f"{type(event).__name__}.{where} holds a {type(value).__name__}; only plain numbers, strings "
                f"and mappings of them ride on events{hint}"
            )
    return EventError(f"{type(event).__name__} holds something that is no plain value: {problem}")


def _first_not_plain(where: str, value: Any) -> tuple[str, Any] | None:
    try:
        _msgpack_encode(value)
    except RecursionError:
        return where, value  # it holds itself
    except _NOT_PLAIN:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, item in items:
            if found := _first_not_plain(f"{where}[{key!r}]", item):
                return found
        return where, value
    return None
