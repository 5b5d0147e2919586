"""engine/processes/pickling.py: what goes to the process of a callback, and how it is told what cannot."""

import contextvars
import dataclasses
import enum
import functools
import json
import logging
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Generic, NamedTuple, NewType, ParamSpec, TypeVar

import msgspec
import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop.callbacks import ResourceUsage
from offloop.engine import Callback, ConfigError, EpochEnd, Event, RunHandle, Sample
from offloop.engine.callback import Handlers
from offloop.engine.encoding import encode
from offloop.engine.processes import pickling, unsendable

LONG: Final = 60.0  # seconds; a bound for what takes a moment
T = TypeVar("T")
P = ParamSpec("P")

CHILD: Final = """
import json, pickle, sys
sys.path[:] = json.loads(sys.argv[1])
from offloop.engine.callback import Handlers
from offloop.engine.encoding import decode
from offloop.engine.processes import pickling

packed, events = pickle.loads(sys.stdin.buffer.read())
handlers = Handlers(pickling.loads(packed), "callback")
for each in events:
    event = decode(each, "msgpack")
    print(repr(handlers.handler_for(type(event))(event, None)))
print("torch" in sys.modules)
"""


class Holds(Callback):
    """Holds a value, and uses it."""

    def __init__(self, value: Any, use: Callable[[Any], Any] = repr) -> None:
        self.settings = {"log": value}
        self.use = use

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> Any:
        return self.use(self.settings["log"])


@pytest.fixture(autouse=True)
def like_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the child not find this module, as if it were a script."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not Path(each or ".", "tests").is_dir()])


def dumps(callback: Callback) -> bytes:
    handlers = Handlers(callback, type(callback).__name__)
    return pickling.dumps(callback, handlers.name, handlers.observed_types())


def in_child(callback: Callback, *events: Event) -> list[str]:
    """Return what its handlers return there, as text, and whether torch is loaded there."""
    data = dumps(callback), [encode(each, "msgpack") for each in events or (EpochEnd(),)]
    child = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps(sys.path)],
        input=pickle.dumps(data),
        capture_output=True,
        timeout=LONG,
    )
    assert child.returncode == 0, child.stderr.decode()
    return child.stdout.decode().splitlines()


def refusal(value: Any) -> str:
    """Return the error of a callback, or of one that holds a value, without what is the same in all of them."""
    with pytest.raises(ConfigError) as raised:
        dumps(value if isinstance(value, Callback) else Holds(value))
    text = str(raised.value)
    assert "\n" not in text
    return text.removeprefix("Holds.settings['log']").partition(", which cannot be sent to the process")[0]


# What goes ---------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Options(enum.Flag):
    A = 1
    B = 2


class Pair(NamedTuple):
    first: int
    second: str = "b"


@dataclasses.dataclass(slots=True, frozen=True)
class Row:
    a: int
    b: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Peak:
    at: int
    height: float = 1.0
    names: list[str] = dataclasses.field(default_factory=list)


class Box(Generic[T]):
    def __init__(self, item: T) -> None:
        self.item = item


class Calls(Generic[P]):
    def __init__(self, function: Callable[P, int]) -> None:
        self.function = function


class Registers(type):
    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> "Registers":
        return super().__new__(cls, name, bases, namespace | {"by_metaclass": 1})


class Slots(metaclass=Registers):
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 5


class Functions:
    """What Python makes of functions."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def four(self) -> int:
        return 4

    @functools.cached_property
    def once(self) -> list[int]:
        return [len(super().__repr__()) and 5]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - the point
    def fibonacci(self, n: int, *, first: int = 1) -> int:
        return first if n < 2 else self.fibonacci(n - 1) + self.fibonacci(n - 2)

    @functools.singledispatchmethod
    def name(self, value: object) -> str:
        return "object"

    @name.register
    def _(self, value: int) -> str:
        return "int"

    @classmethod
    def own(cls) -> str:
        return cls.__name__


@functools.cache
def factorial(n: int) -> int:
    return n * factorial(n - 1) if n else 1


@functools.singledispatch
def depth(value: object) -> int:
    return 0


@depth.register
def _(value: list) -> int:  # type: ignore[type-arg]  # singledispatch takes no other
    return 1 + depth(value[0])


GOES: Final[dict[str, tuple[Any, Callable[[Any], Any], Any]]] = {
    "lambda": (lambda x: x + 1, lambda f: f(1), 2),
    "enum": (Colour.RED, lambda each: each is Colour("red"), True),
    "flag": (Options.A | Options.B, lambda each: Options.A in each, True),
    "named tuple": (Pair(1), lambda each: each._replace(first=3) == Pair(3), True),
    "dataclass": (Row(1), lambda each: (each == Row(1), dataclasses.asdict(each)), (True, {"a": 1, "b": []})),
    "decoded": (
        Peak,
        lambda each: repr(msgspec.convert({"at": 1}, each)),
        "Peak(at=1, height=1.0, names=[])",
    ),
    "parameters": (Calls(len), lambda each: each.function("ab"), 2),
    "generic": (Box[int](3), lambda each: Box[str]("a").item * each.item, "aaa"),
    "slots": (Slots(), lambda each: (each.a, each.by_metaclass), (5, 1)),
    "property": (Functions(), lambda each: each.four, 4),
    "cached_property": (Functions(), lambda each: (each.once is each.once, each.once), (True, [5])),
    "lru_cache": (Functions(), lambda each: (each.fibonacci(9), each.fibonacci(0, first=2)), (55, 2)),
    "singledispatchmethod": (Functions(), lambda each: (each.name(1), each.name("")), ("int", "object")),
    "bound method": (Functions().own, lambda each: each(), "Functions"),
    "cached function": (0, lambda _: (factorial(5), factorial.cache_info().misses), (120, 6)),
    "singledispatch": ([[1]], lambda each: depth(each), 2),
    "partial": (functools.partial(int, base=2), lambda each: each("11"), 3),
    "path": (Path("/a"), lambda each: each.name, "a"),
    "logger": (logging.getLogger("a.b"), lambda each: each.name, "a.b"),
    "array": (numpy.arange(3), lambda each: int(each.sum()), 3),
}


def test_what_a_script_defines_works_in_the_child() -> None:
    values = {name: value for name, (value, _, _) in GOES.items()}
    uses = {name: use for name, (_, use, _) in GOES.items()}
    callback = Holds(values, lambda held: {name: use(held[name]) for name, use in uses.items()})
    shown, has_torch = in_child(callback)
    assert shown == repr({name: expected for name, (_, _, expected) in GOES.items()})
    assert has_torch == "False"


def test_the_callback_is_taken_apart_once() -> None:
    calls = []

    class Counts(Holds):
        def __getstate__(self) -> dict[str, Any]:
            calls.append("callback")
            return vars(self)

    class Part:
        def __reduce__(self) -> tuple[Any, ...]:
            calls.append("part")
            return int, ()

    dumps(Counts(Part()))
    assert calls == ["callback", "part"]
    # Again, to name what is wrong.
    refusal(Counts([Part(), threading.Lock()]))
    assert calls[2:] == ["callback", "part"] * 2


def test_a_loader_goes_as_a_copy_and_what_iterates_over_one_does_not() -> None:
    data = TensorDataset(torch.arange(6.0))
    loader = DataLoader(data, batch_size=2)
    shown, _ = in_child(Holds(loader, lambda each: sum(float(batch.sum()) for (batch,) in each)))
    assert shown == "15.0"
    with_workers = DataLoader(data, num_workers=1, persistent_workers=True)
    iterator = iter(with_workers)
    assert refusal(iterator) == " holds an iterator of a DataLoader"
    assert refusal(with_workers).endswith("DataLoader, whose _iterator is an iterator of a DataLoader")
    assert refusal(iter(loader)) == " holds an iterator of a DataLoader"
    iterator._shutdown_workers()  # type: ignore[attr-defined]


# What does not go --------------------------------------------------------------------------------


class Owns:
    def __init__(self, inner: object) -> None:
        super().__init__()
        self.inner = inner

    def method(self) -> None: ...


class Lies:
    def __reduce__(self) -> str:
        return "not_there"


def closed_socket() -> socket.socket:
    closed = socket.socket()
    closed.close()
    return closed


def reads(file: object) -> Callable[[], object]:
    return lambda: file


variable = contextvars.ContextVar[int]("variable")


class UsesGlobal(Callback):
    """Its class refers to itself, by `super()`."""

    def __init__(self) -> None:
        super().__init__()

    def reset(self) -> None:
        super().reset()

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        variable.get()


REFUSED: Final[dict[str, tuple[Callable[[], Any], str]]] = {
    "lock in lists": (lambda: [[threading.Lock()]], "[0][0] holds a _thread.lock"),
    "closure": (
        lambda: reads(closed_socket()),
        "the variable 'file', used by Holds.settings['log'], is a socket.socket",
    ),
    "own object": (lambda: Owns({"a": threading.Lock()}), ".inner['a'] holds a _thread.lock"),
    "bound method": (lambda: Owns(threading.Lock()).method, ".__self__.inner holds a _thread.lock"),
    "partial": (lambda: functools.partial(print, threading.Lock()), ".args[0] holds a _thread.lock"),
    "object array": (
        lambda: numpy.array([1, threading.Lock()], object),
        "numpy.ndarray, whose [1] is a _thread.lock",
    ),
    "handler": (lambda: logging.StreamHandler(), "logging.StreamHandler, whose lock is a _thread.RLock"),
    "weak reference": (lambda: weakref.ref(Owns), " holds a weakref.ReferenceType"),
    "generator": (lambda: (each for each in "a"), " holds a generator"),
    "wrong reduce": (lambda: [Lies()], "[0] holds a tests.engine.processes.test_pickling.Lies"),
    "global": (
        UsesGlobal,
        "the global 'variable', used by UsesGlobal.on_epoch_end, is a _contextvars.ContextVar",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_named(name: str) -> None:
    make, text = REFUSED[name]
    value = make()
    assert text in refusal(value)


def test_each_part_is_taken_apart_once_to_find_what_cannot_go() -> None:
    calls = 0

    class Part:
        def __reduce__(self) -> tuple[Any, ...]:
            nonlocal calls
            calls += 1
            return int, ()

    parts: Any = [[Part()] for _ in range(100)]
    parts.append([[threading.Lock()]])
    for _ in range(50):
        parts = [parts]
    assert refusal(parts).endswith("...[0] holds a _thread.lock")
    assert calls == 200


def test_lists_in_lists_have_an_end() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ConfigError, match=r"^Holds.settings is nested too deeply to be .* 100,00. levels"):
        dumps(Holds(nested))


def test_the_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsendable, "LOOKED_AT", 50)
    with pytest.raises(
        ConfigError, match=r"^Holds.settings holds, beyond the first 50 parts of Holds, what"
    ) as raised:
        dumps(Holds([*([] for _ in range(100)), threading.Lock()]))
    assert "cannot pickle '_thread.lock' object" in str(raised.value)


# Size --------------------------------------------------------------------------------------------

BIG: Final = bytearray(3 * 2**20)


class UsesBig(Callback):
    def __init__(self) -> None:
        super().__init__()

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> int:
        return len(BIG)


@pytest.mark.parametrize(
    ("make", "size", "place"),
    [
        (lambda: Holds(bytes(3 * 2**20)), 3, "Holds.settings['log']"),
        (lambda: Holds(["a", "a" * 3 * 2**20]), 3, "Holds.settings['log'][1]"),
        (lambda: Holds([str(i) * 10 for i in range(60_000)]), 3, "Holds.settings['log']"),
        (lambda: Holds(Owns(numpy.zeros(3 * 2**17))), 3, "Holds.settings['log'].inner"),
        (lambda: Holds(torch.zeros(3 * 2**18)), 3, "Holds.settings['log']"),
        (UsesBig, 3, "the global 'BIG', used by UsesBig.on_epoch_end"),
    ],
)
def test_what_is_large_is_named(
    make: Callable[[], Callback],
    size: int,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pickling, "LARGE", 2**20)
    callback = make()
    name = type(callback).__name__
    dumps(callback)
    assert [each.message for each in caplog.records] == [
        f"{name} goes to its process with {size} MB, most of it in {place}"
    ]
    monkeypatch.setattr(pickling, "TOO_LARGE", 2**21)
    with pytest.raises(ConfigError) as raised:
        dumps(callback)
    assert f"it refers to more than 2 MB, most of it in {place}. Give the process a path" in str(raised.value)


# Classes of events -------------------------------------------------------------------------------

UserId = NewType("UserId", int)


class Limits(msgspec.Struct):
    low: float = 0.0


class Measured(Sample, Generic[T], frozen=True):
    limit: ClassVar[float] = 0.5
    value: T
    limits: dict[str, Limits] = msgspec.field(default_factory=dict)
    colours: list[Colour] = []  # noqa: RUF012 - a field of a struct
    user: UserId = UserId(3)
    number: Annotated[int, msgspec.Meta(ge=0)] = 1
    later: "Later | None" = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Measured[float]":
        return cls(value=float(torch.linalg.norm(tensor)))  # type: ignore[return-value, arg-type]

    @property
    def is_high(self) -> bool:
        return self.value > self.limit  # type: ignore[operator]


class Later(msgspec.Struct):
    at: int


class MeasuredTwice(Measured[float], frozen=True):
    again: float = 0.0


class Locked(Event, frozen=True):
    """Cannot go to another process."""

    def use(self) -> None:
        variable.get()


class Observes(Callback):
    def on_sample(self, event: Sample, run: RunHandle) -> Any:
        return type(event).__name__, event.is_high, event.later  # type: ignore[attr-defined]


def test_events_arrive_with_all_that_their_class_has_and_without_torch() -> None:
    events: list[Event] = [
        Measured(value=1, limits={"a": Limits(1.0)}, colours=[Colour.RED], later=Later(at=2)),
        MeasuredTwice(value=0.25),
        ResourceUsage(),
    ]

    class Shows(Observes):
        def on_resource_usage(self, event: Event, run: RunHandle) -> Any:
            return type(event).__name__

    assert in_child(Shows(), *events) == [
        "('Measured', True, Later(at=2))",
        "('MeasuredTwice', False, None)",
        "'ResourceUsage'",
        "False",
    ]


def test_a_class_of_events_that_cannot_go_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class SeesAll(Callback):
        def on_event(self, event: Event, run: RunHandle) -> str:
            return type(event).__name__

    assert in_child(SeesAll(), Locked()) == ["'UnknownEvent'", "False"]
    text = "the global 'variable', used by Locked.use, is a _contextvars.ContextVar, which cannot be sent to"
    assert [each.message.partition(" the process")[0] for each in caplog.records] == [
        f"SeesAll gets Locked as UnknownEvent: {text}"
    ]

    class SeesLocked(SeesAll):
        def on_locked(self, event: Event, run: RunHandle) -> None: ...

    with pytest.raises(ConfigError, match="SeesLocked.on_locked cannot get its events: " + text):
        dumps(SeesLocked())


SCRIPT: Final = """
from __future__ import annotations

import sys
from typing import ClassVar, Self

import offloop
from offloop.engine import UnknownEvent
from offloop.engine.testing import tiny_loader, tiny_trainer


class Note(offloop.Event, frozen=True):
    kind: ClassVar[str] = "note"
    words: list[str]


class Odd(offloop.Event, frozen=True):
    other: Self | None = None


class Publishes(offloop.Callback):
    @offloop.decides
    def on_epoch_end(self, event, run):
        run.publish(Odd())
        run.publish(Note(words=["a"]))


class Sees(offloop.Callback):
    runs_in = "process"

    def on_event(self, event: offloop.Event, run: offloop.RunHandle) -> None:
        if isinstance(event, UnknownEvent):
            print("unknown", event.type, event.epoch, flush=True)

    def on_note(self, event: Note, run: offloop.RunHandle) -> None:
        print(event.words, event.kind, isinstance(event, Note), "torch" in sys.modules, flush=True)


offloop.ResourceMonitor
result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Publishes(), Sees()])
print(result.callback_errors)
"""


def test_a_script_with_annotations_as_text(tmp_path: Path) -> None:
    """Takes a few seconds: a run in an interpreter of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=LONG)
    assert done.stdout.splitlines() == ["unknown __main__.Odd 0", "['a'] note True False", "{}"]
    assert "Sees gets __main__.Odd as UnknownEvent: it cannot be decoded: Type 'typing.Self'" in done.stderr
