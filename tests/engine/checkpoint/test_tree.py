"""Nested state survives JSON bit for bit, and what cannot is refused by its path."""

import math
import struct
from collections import Counter, OrderedDict, defaultdict
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
from checkpoint_support import VolatileFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offloop.engine.checkpoint import (
    CheckpointRequest,
    CheckpointStore,
    SnapshotArena,
    UnserializableStateError,
)
from offloop.engine.checkpoint.tree import decode, encode

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every type, of zero to three dimensions, with arbitrary bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not size:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


keys = st.one_of(
    st.text(max_size=5).filter(lambda text: _is_unicode(text)),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.tuples(st.integers(), st.text("ab$.", max_size=2)),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.text(max_size=8).filter(lambda text: _is_unicode(text)),
)
states = st.recursive(
    st.one_of(scalars, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.sampled_from(["a", "b", "$", "a.b"]), inner, max_size=4),
    ),
    max_leaves=12,
)


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a), list(b)) and all(map(same, a.values(), b.values()))
    return a == b


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(state=states)
def test_any_state_comes_back_from_the_disk(tmp_path_factory: pytest.TempPathFactory, state: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip"
    arena = SnapshotArena(slots=1)
    store = CheckpointStore(path, filesystem=VolatileFileSystem())
    with store, arena.take(state) as snapshot:
        store.commit(snapshot, CheckpointRequest(step=1, extra={"half": [0.5, math.inf]}))
        loaded = store.load()
    assert same(loaded.state, state)
    assert loaded.extra == {"half": [0.5, math.inf]}


def no_tensor(path: str, value: object) -> None:
    return None


def round_trip(value: object) -> object:
    return decode(msgspec.json.decode(msgspec.json.encode(encode(value, no_tensor))), {})


def test_counters_of_multistep_schedules_survive() -> None:
    value = Counter({30: 1, 80: 2})
    assert same(round_trip(value), value)


def test_generator_states_survive() -> None:
    import random

    value = random.Random(0).getstate()
    assert same(round_trip(value), value)


def test_numpy_floats_become_floats() -> None:
    numpy = pytest.importorskip("numpy")
    assert same(round_trip({"lr": numpy.float64(0.1)}), {"lr": 0.1})


class Colour(IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": object()}]}, ".a.1.b"),
        ({"a": {1, 2}}, ".a"),
        ({"a": b"bytes"}, ".a"),
        ({"a": Colour.RED}, ".a"),
        ({"a": Point(1)}, ".a"),
        ({"a": defaultdict(int)}, ".a"),
        ({"a": "\ud800"}, ".a"),
        ({"a": torch.Size([1])}, ".a"),
        ({"a": torch.float32}, ".a"),
        ({frozenset(): 1}, ".<key>"),
        ({"a": len}, ".a"),
    ],
)
def test_what_cannot_be_saved_is_named(value: object, path: str) -> None:
    with pytest.raises(UnserializableStateError) as caught:
        encode(value, no_tensor)
    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_cycle_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(UnserializableStateError, match="nested deeper"):
        encode(value, no_tensor)


def test_the_copy_does_not_follow_later_changes() -> None:
    value = {"a": [1], "b": {1: [2]}}
    node = encode(value, no_tensor)
    value["a"].append(5)  # type: ignore[attr-defined]  # a list
    value["b"][1].append(5)  # type: ignore[index]  # a dict
    assert decode(node, {}) == {"a": [1], "b": {1: [2]}}


def test_sharing_of_a_run_directory_is_not_needed(tmp_path: Path) -> None:
    """Bare values are states too."""
    with CheckpointStore(tmp_path) as store, SnapshotArena().take(7) as snapshot:
        store.commit(snapshot, CheckpointRequest(step=0))
        assert store.load().state == 7
