"""engine/events.py: the wire format of every event, what an event may hold, and the names of handlers."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.engine import events
from offloop.engine.encoding import check, decode, encode, encode_lines
from offloop.engine.errors import EventError, MetricNotFoundError
from offloop.engine.events import (
    SCHEMA,
    CallbackFailed,
    CheckpointSaved,
    EpochEnd,
    Event,
    EventsDropped,
    Format,
    Metrics,
    Sample,
    Settings,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    handler_name,
    known_events,
)
from offloop.engine.samples.picture import Picture

FIXTURES = Path(__file__).parent / "fixtures"
OWN_EVENTS = [each for each in known_events() if each.__module__.startswith("offloop.engine.")]

formats = pytest.mark.parametrize("format", get_args(Format))

# Text that a careless decoder would take for something else is in it on purpose.
texts = st.text() | st.sampled_from(["null", "true", "1", "NaN", "Infinity", ""])
counts = st.integers(-1, 2**63 - 1)
floats = st.floats()
finite_values = st.none() | st.booleans() | counts | st.floats(allow_nan=False, allow_infinity=False) | texts
settings_values = st.recursive(
    finite_values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return values of a field's type."""
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        int: counts,
        float: floats,
        str: texts,
        bool: st.booleans(),
        bytes: st.binary(),
        type(None): st.none(),
        Metrics: st.dictionaries(texts, floats, max_size=4).map(Metrics),
        Settings: st.dictionaries(texts, settings_values, max_size=4).map(Settings),
    }
    if hint in by_type:
        return by_type[hint]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (list, tuple):
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(get_origin(hint))
    if get_origin(hint) is dict:
        return st.dictionaries(*map(values_of, get_args(hint)), max_size=3)
    return st.one_of([values_of(each) for each in get_args(hint)])


pictures = st.builds(
    Picture,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    media_type=st.sampled_from(["image/png", "image/jpeg", "image/webp"]),
    size=st.integers(1, 1000),
    width=st.integers(1, 8_192),
    height=st.integers(1, 2_048),
    data=st.binary(),
)
cells = finite_values | pictures
# What a sample may hold is checked when it is made.
checked_values: dict[str, st.SearchStrategy[Any]] = {
    "key": st.text(min_size=1, max_size=200),
    "caption": st.text(max_size=200),
    "sha256": st.sampled_from(["", "0f" * 32]),
    "picture": pictures,
    "columns": st.just(("a", "b")),
    "rows": st.lists(st.tuples(cells, cells), max_size=3).map(tuple),
}


def events_of(event_class: type[Event]) -> st.SearchStrategy[Event]:
    """Return events of a class; fields with a default are sometimes left out."""
    hints = get_type_hints(event_class)
    required = {field.name for field in msgspec.structs.fields(event_class) if field.required}
    checked = checked_values if "caption" in hints else {}
    values = {
        name: checked[name] if name in checked else values_of(hints[name])
        for name in event_class.__struct_fields__
    }
    return st.fixed_dictionaries(
        {name: value for name, value in values.items() if name in required},
        optional={name: value for name, value in values.items() if name not in required},
    ).map(lambda arguments: event_class(**arguments))


def plain(event: Event) -> str:
    """Return an event as text that is the same for equal events, NaN included."""
    return f"{type(event).__name__} {msgspec.structs.asdict(event)!r}"


# Every event, there and back -----------------------------------------------------------------------


@pytest.mark.parametrize("event_class", OWN_EVENTS)
@settings(max_examples=30)
@given(data=st.data())
def test_event_comes_back_as_itself(event_class: type[Event], data: st.DataObject) -> None:
    event = data.draw(events_of(event_class))
    check(event)
    for format in get_args(Format):
        decoded = decode(encode(event, format), format)
        assert type(decoded) is event_class
        assert plain(decoded) == plain(event)


def refuse_constant(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@settings(max_examples=50)
@given(event=st.sampled_from(OWN_EVENTS).flatmap(events_of))
def test_json_of_an_event_is_strict_json(event: Event) -> None:
    assert json.loads(encode(event), parse_constant=refuse_constant)["type"] == type(event).__name__


@formats
def test_non_finite_numbers_come_back_as_numbers(format: Format) -> None:
    event = EpochEnd(metrics=Metrics(a=math.nan, b=math.inf, c=-math.inf, d=1.0), seconds=math.inf)
    decoded = decode(encode(event, format), format)
    assert isinstance(decoded, EpochEnd)
    assert repr(decoded.metrics) == "{'a': nan, 'b': inf, 'c': -inf, 'd': 1.0}"
    assert decoded.seconds == math.inf


def test_json_writes_non_finite_numbers_as_words() -> None:
    event = StepEnd(loss=math.nan, lr=math.inf, grad_norm=-math.inf)
    assert encode(event) == b'{"type":"StepEnd","loss":"NaN","lr":"Infinity","grad_norm":"-Infinity"}'


@formats
def test_defaults_are_left_out_and_come_back(format: Format) -> None:
    event = TrainStart()
    assert b"device" not in encode(event, format)
    assert plain(decode(encode(event, format), format)) == plain(event)


@formats
def test_mappings_come_back_read_only(format: Format) -> None:
    epoch = decode(encode(EpochEnd(metrics=Metrics(a=1)), format), format)
    start = decode(encode(TrainStart(config=Settings(seed=1)), format), format)
    assert isinstance(epoch, EpochEnd) and type(epoch.metrics) is Metrics
    assert isinstance(start, TrainStart) and type(start.config) is Settings


def test_schema_version_stands_in_train_start_even_at_its_default() -> None:
    assert TrainStart().schema == SCHEMA
    assert isinstance(decode(b'{"type":"TrainStart"}'), TrainStart)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"type":1}',
        b'{"type":"StepEnd"}',
        b'{"type":"StepEnd","loss":1,"lr":null}',
        b'{"type":"EpochEnd","metrics":[1]}',
        b'{"type":"EpochEnd","metrics":{"a":null}}',
        b'{"type":"TrainStart","config":[["a",1]]}',
        b'{"type":"EpochEnd"',
    ],
)
def test_bytes_that_are_no_event_raise_decode_error(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


# The first schema version, as it was written -------------------------------------------------------


def read_fixture(format: Format) -> list[bytes]:
    if format == "json":
        return (FIXTURES / "events_schema_1.jsonl").read_bytes().splitlines()
    records = (FIXTURES / "events_schema_1.msgpack").read_bytes()
    return msgspec.msgpack.decode(records, type=list[bytes])


@formats
def test_first_schema_version_can_be_read(format: Format) -> None:
    """The files hold one event of each class with every field of schema 1; later fields get their defaults."""
    records = read_fixture(format)
    read = [decode(record, format) for record in records]
    assert [type(event).__name__ for event in read] == [
        *(
            "Event",
            "Sample",
            "TrainStart",
            "Resumed",
            "EpochStart",
            "StepEnd",
            "ValidationStart",
            "ValidationEnd",
        ),
        *("EpochEnd", "TrainEnd", "LearningRateChanged", "StateChanged", "CommandApplied", "CheckpointSaved"),
        *("CheckpointFailed", "CallbackFailed", "EventsDropped"),
    ]
    for record, event in zip(records, read, strict=True):
        written = msgspec.json.decode(record) if format == "json" else msgspec.msgpack.decode(record)
        del written["type"]
        for name, value in written.items():
            expected = Metrics({k: float(v) for k, v in value.items()}) if name == "metrics" else value
            assert repr(getattr(event, name)) == repr(expected)  # repr, because NaN is not equal to itself


def test_first_schema_version_is_the_same_in_both_formats() -> None:
    assert [plain(decode(record)) for record in read_fixture("json")] == [
        plain(decode(record, "msgpack")) for record in read_fixture("msgpack")
    ]


# Unknown events ------------------------------------------------------------------------------------


UNKNOWN = {
    "json": b'{"type": "elsewhere.Odd",  "seq":7,"run_id":"r","time":1.5,"step":3,"x":{"a":"NaN"},"n":null}',
    "msgpack": msgspec.msgpack.encode({"x": math.nan, "type": "elsewhere.Odd", "step": 3, "seq": 7}),
}


@formats
def test_unknown_event_is_kept_and_encoded_unchanged(format: Format) -> None:
    event = decode(UNKNOWN[format], format)
    assert isinstance(event, UnknownEvent)
    assert (event.type, event.seq, event.step, event.epoch) == ("elsewhere.Odd", 7, 3, -1)
    assert encode(event, format) == UNKNOWN[format]
    check(event)


def test_unknown_event_is_transcoded() -> None:
    from_json = encode(decode(UNKNOWN["json"]), "msgpack")
    assert msgspec.msgpack.decode(from_json) == msgspec.json.decode(UNKNOWN["json"])
    from_msgpack = encode(decode(UNKNOWN["msgpack"], "msgpack"))
    assert from_msgpack == b'{"x":"NaN","type":"elsewhere.Odd","step":3,"seq":7}'


@pytest.mark.parametrize("other", get_args(Format))
def test_event_unknown_on_the_way_is_itself_again_where_it_is_known(other: Format) -> None:
    """A process that does not know the class passes it on in another format."""
    event = StepEnd(loss=math.nan, lr=0.1, step=3, metrics=Metrics(a=math.inf))
    raw = encode(event)
    passed_on = encode(UnknownEvent(type="StepEnd", raw=raw), other)
    assert plain(decode(passed_on, other)) == plain(event)


def test_unknown_event_that_json_cannot_hold_raises_event_error() -> None:
    raw = msgspec.msgpack.encode({"type": "elsewhere.Odd", "x": msgspec.msgpack.Ext(5, b"abc")})
    with pytest.raises(EventError):
        encode(decode(raw, "msgpack"), "json")


def test_lines_of_events_are_those_of_each() -> None:
    events = [StepEnd(loss=1.0, lr=0.1, step=1), EpochEnd(metrics=Metrics(a=1.0)), TrainStart(epochs=1)]
    odd = [
        StepEnd(loss=math.nan, lr=0.1),
        UnknownEvent(type="elsewhere.Odd", raw=UNKNOWN["json"], format="json"),
    ]
    for each in (events, [*events, odd[0]], [*events, odd[1]], []):
        assert encode_lines(each) == b"".join(encode(event) + b"\n" for event in each)


# Users' events -------------------------------------------------------------------------------------


def test_users_events_are_frozen_and_tagged_by_module_and_class() -> None:
    class Remark(Event, frozen=True):
        text: str
        scores: tuple[float, ...] = ()

    class Beat(Sample, frozen=True):
        value: float | None = None

    remark = Remark("here", scores=(1.0, math.nan))
    assert encode(remark).startswith(f'{{"type":"{__name__}.Remark"'.encode())
    with pytest.raises(AttributeError):
        remark.text = "there"  # type: ignore[misc]  # that is the point
    assert issubclass(Beat, Sample) and Beat.handler_name == "on_beat"
    for each in (remark, Beat(value=-math.inf), Beat()):
        assert plain(decode(encode(each))) == plain(each)
        assert plain(decode(encode(each, "msgpack"), "msgpack")) == plain(each)


class Everything(Event, frozen=True):
    """A user's event with a field of every plain type."""

    number: int
    real: float
    text: str
    flag: bool
    maybe: int | None
    mixed: str | float | None
    numbers: list[float]
    pair: tuple[int, ...]
    table: dict[str, float]
    kind: Literal["a", "b"]
    data: bytes
    metrics: Metrics
    settings: Settings


@formats
@settings(max_examples=50)
@given(data=st.data())
def test_fields_of_users_events_come_back(format: Format, data: st.DataObject) -> None:
    event = data.draw(
        events_of(Everything).filter(lambda event: not isinstance(getattr(event, "mixed", 0), float))
    )  # JSON cannot tell the text "NaN" from the number where a field may be either
    decoded = decode(encode(event, format), format)
    assert type(decoded) is Everything
    assert plain(decoded) == plain(event)


def test_event_defined_again_replaces_the_earlier_class() -> None:
    def define(with_field: bool) -> type[Event]:
        if with_field:

            class Redefined(Event, frozen=True):
                value: int = 0

            return Redefined

        class Redefined(Event, frozen=True):  # type: ignore[no-redef]  # as a notebook does
            pass

        return Redefined

    earlier, later = define(False), define(True)
    decode(encode(earlier()))  # makes a decoder, which must not outlive the next definition
    earlier, later = define(False), define(True)
    decoded = decode(encode(later(value=3)))  # type: ignore[call-arg]  # mypy sees Event
    assert type(decoded) is later
    assert decoded == later(value=3)  # type: ignore[call-arg]  # likewise
    assert type(decode(encode(earlier()))) is later
    assert earlier not in known_events() and later in known_events()


def test_users_event_may_extend_one_of_offloops() -> None:
    class DetailedStep(StepEnd, frozen=True):
        detail: float = 0.0

    event = DetailedStep(loss=1.0, lr=0.1, detail=2.0)
    assert encode(event).startswith(f'{{"type":"{__name__}.DetailedStep"'.encode())
    assert decode(encode(event)) == event
    assert isinstance(event, Sample)


def test_base_classes_travel_too() -> None:
    assert decode(encode(Event(step=1))) == Event(step=1)
    assert type(decode(encode(Sample(step=1)))) is Sample


# What an event may hold ----------------------------------------------------------------------------


class Carrier(Event, frozen=True):
    cargo: object = None


@pytest.mark.parametrize(
    ("cargo", "text"),
    [
        (torch.tensor(1.0), "Carrier.cargo holds a Tensor; "),
        (numpy.float32(1.0), "Carrier.cargo holds a float32; "),
        (numpy.float64(1.0), "Carrier.cargo holds a float64; "),
        (numpy.zeros(2), "Carrier.cargo holds a ndarray; "),
        (torch.nn.Linear(1, 1), "Carrier.cargo holds a Linear; "),
        ({"a": {"b": torch.tensor(1.0)}}, "Carrier.cargo['a']['b'] holds a Tensor; "),
        ([1, torch.tensor(1.0)], "Carrier.cargo[1] holds a Tensor; "),
        ({torch.tensor(1.0): 1}, "Carrier.cargo holds a dict; "),
        (2**70, "Carrier.cargo cannot be encoded: can't serialize ints"),
        ({"path": "\ud800"}, "Carrier.cargo['path'] cannot be encoded: 'utf-8' codec"),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_place(cargo: object, text: str) -> None:
    event = Carrier(cargo=cargo)
    with pytest.raises(EventError) as refused:
        check(event)
    assert str(refused.value).startswith(text)
    with pytest.raises(EventError):
        encode(event, "msgpack")


def test_tensor_in_metrics_is_refused_with_its_key_and_the_fix() -> None:
    metrics: Any = {"train_loss": torch.tensor(1.0)}
    event = EpochEnd(metrics=Metrics(metrics))
    with pytest.raises(
        EventError, match=r"EpochEnd\.metrics\['train_loss'\] holds a Tensor.*value\.item\(\)"
    ):
        encode(event)


def test_mapping_that_holds_itself_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    with pytest.raises(EventError, match=r"Carrier\.cargo"):
        check(Carrier(cargo=circle))


@pytest.mark.parametrize("mapping", [Metrics(a=1.0), Settings(a=1.0)])
@pytest.mark.parametrize(
    "change",
    [
        lambda mapping: mapping.__setitem__("a", 2.0),
        lambda mapping: mapping.__delitem__("a"),
        lambda mapping: mapping.__ior__({"b": 1.0}),
        lambda mapping: mapping.clear(),
        lambda mapping: mapping.pop("a"),
        lambda mapping: mapping.pop("b", None),
        lambda mapping: mapping.popitem(),
        lambda mapping: mapping.setdefault("b", 1.0),
        lambda mapping: mapping.update(b=1.0),
    ],
)
def test_mappings_on_events_cannot_be_changed(mapping: dict[str, float], change: Any) -> None:
    with pytest.raises(TypeError, match="read-only"):
        change(mapping)
    assert mapping == {"a": 1.0}


def test_every_method_that_changes_a_dict_is_refused() -> None:
    """A method that a later Python adds to dict shows up here."""
    harmless = {
        *(
            "copy",
            "fromkeys",
            "get",
            "items",
            "keys",
            "values",
            "__class_getitem__",
            "__contains__",
            "__doc__",
        ),
        *(
            "__eq__",
            "__ge__",
            "__getattribute__",
            "__getitem__",
            "__gt__",
            "__hash__",
            "__init__",
            "__iter__",
        ),
        *(
            "__le__",
            "__len__",
            "__lt__",
            "__ne__",
            "__new__",
            "__or__",
            "__repr__",
            "__reversed__",
            "__ror__",
        ),
        "__sizeof__",
    }
    changing = {name for name in vars(dict) if name not in harmless}
    refused = {name for name in dir(Metrics) if getattr(Metrics, name) is events._ReadOnlyDict._refuse}
    assert changing <= refused


def test_mappings_survive_copying_and_pickling() -> None:
    metrics = Metrics(a=1.0)
    for twin in (copy.copy(metrics), copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert type(twin) is Metrics and twin == metrics


def test_missing_metric_lists_those_there_are() -> None:
    with pytest.raises(MetricNotFoundError) as missing:
        Metrics(train_loss=1.0, lr=0.1)["val_loss"]
    assert str(missing.value) == "no metric 'val_loss' here; there are: train_loss, lr"
    assert (missing.value.name, missing.value.known) == ("val_loss", ("train_loss", "lr"))
    assert isinstance(missing.value, KeyError)
    assert Metrics().get("val_loss") is None
    with pytest.raises(KeyError) as plain_error:
        Settings()["seed"]
    assert not isinstance(plain_error.value, MetricNotFoundError)


# Names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("EpochEnd", "on_epoch_end"),
        ("CheckpointSaved", "on_checkpoint_saved"),
        ("Beat", "on_beat"),
        ("GPUMemory", "on_gpu_memory"),
        ("SomeGPU", "on_some_gpu"),
        ("Top5Scores", "on_top5_scores"),
        ("My_Event", "on_my_event"),
        ("A", "on_a"),
    ],
)
def test_handler_is_named_after_its_event(class_name: str, name: str) -> None:
    assert handler_name(class_name) == name


def test_vocabulary_is_complete() -> None:
    """The names of design and documentation; one that disappears breaks users' files."""
    assert {each.__name__ for each in OWN_EVENTS} >= {
        *("TrainStart", "EpochStart", "StepEnd", "ValidationStart", "ValidationEnd", "EpochEnd", "TrainEnd"),
        *("CheckpointSaved", "CheckpointFailed", "LearningRateChanged", "StateChanged", "CommandApplied"),
        *("CallbackFailed", "EventsDropped", "Event", "Sample"),
    }
    assert [each for each in OWN_EVENTS if issubclass(each, Sample)] == [Sample, StepEnd]
    assert TrainEnd.handler_name == "on_train_end" and CheckpointSaved.handler_name == "on_checkpoint_saved"
    assert CallbackFailed.handler_name == "on_callback_failed"
    assert EventsDropped.handler_name == "on_events_dropped"
