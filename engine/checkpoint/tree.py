"""Nested state as JSON and back, without loss.

JSON has no tuples, no integer keys, no NaN and no tensors. These become an object with the single key `$`:

    (1, 2)               {"$": ["tuple", [1, 2]]}
    {0: "a"}             {"$": ["dict", [[0, "a"]]]}        also for a dict with a "$" key
    Counter(a=1)         {"$": ["Counter", [["a", 1]]]}     MultiStepLR keeps its milestones so
    float("nan")         {"$": ["float", "NaN"]}
    2**100               {"$": ["int", "0x10000000000000000000000000"]}
    a tensor             {"$": ["tensor", "model.0.weight"]}

No node means "call this", so reading a stranger's file runs no code.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from offloop.engine.checkpoint.errors import UnserializableStateError

MAX_DEPTH = 64
"""Levels of nested containers. State dicts have about six; a reference cycle has no end."""

_INT_LIMIT = 2**63
"""JSON readers handle 64 bits at most; numpy's generators have 128."""
_BIG_INT_BITS = 4096
"""Larger integers are refused: arithmetic and printing would be slow enough for an attack."""

_MAPPINGS: dict[str, Callable[[dict[object, object]], object]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

TensorNode = dict[str, list[str]]
TensorNodes = Callable[[str, object], TensorNode | None]
"""Returns the node for a tensor (`tensor_node`), None for another value. Arguments: path, value."""


def tensor_node(name: str) -> TensorNode:
    """Return the node for the tensor that is saved under `name`."""
    return {"$": ["tensor", name]}


def encode(value: object, node_of: TensorNodes, path: str = "", depth: int = 0) -> object:
    """Return a copy of `value` that consists of JSON types only.

    The result shares nothing with `value`, which may change afterwards. Nodes of tensors are not copied.

    Raises:
        UnserializableStateError: A value cannot be saved; the text has its path.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _checked_text(value, path)
    if kind is int:
        return _encode_int(value, path)  # type: ignore[arg-type]  # kind is int
    # numpy.float64 is a float, too.
    if isinstance(value, float):
        return _encode_float(float(value))
    node = node_of(path, value)
    if node is not None:
        return node
    if depth >= MAX_DEPTH:
        raise UnserializableStateError(path, value, f"nested deeper than {MAX_DEPTH} levels")
    if kind is list or kind is tuple:
        assert isinstance(value, (list, tuple))
        items: list[object] = []
        for index, item in enumerate(value):
            items.append(encode(item, node_of, f"{path}.{index}", depth + 1))
        return items if kind is list else {"$": ["tuple", items]}
    if kind in (dict, OrderedDict, Counter):
        return _encode_mapping(value, node_of, path, depth)  # type: ignore[arg-type]  # a dict
    raise UnserializableStateError(path, value)


def _encode_mapping(value: dict[object, object], node_of: TensorNodes, path: str, depth: int) -> object:
    kind = type(value).__name__
    if kind == "dict" and "$" not in value and all(type(key) is str for key in value):
        return {
            _checked_text(key, path): encode(item, node_of, f"{path}.{key}", depth + 1)
            for key, item in value.items()
        }
    pairs = [
        [_encode_key(key, path), encode(item, node_of, f"{path}.{key}", depth + 1)]
        for key, item in value.items()
    ]
    return {"$": [kind, pairs]}


def _encode_key(key: object, path: str) -> object:
    # The common case: an optimizer has one such key per parameter.
    if type(key) is int and 0 <= key < _INT_LIMIT:
        return key
    if isinstance(key, (list, dict)):
        raise UnserializableStateError(path, key)
    return encode(key, _no_tensor, f"{path}.<key>", MAX_DEPTH - 2)


def _no_tensor(path: str, value: object) -> None:
    return None


def _checked_text(value: object, path: str) -> str:
    assert isinstance(value, str)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UnserializableStateError(path, value, "not valid Unicode") from error
    return value


def _encode_int(value: int, path: str) -> object:
    if value.bit_length() > _BIG_INT_BITS:
        raise UnserializableStateError(path, value, f"an integer of more than {_BIG_INT_BITS} bits")
    return value if -_INT_LIMIT <= value < _INT_LIMIT else {"$": ["int", hex(value)]}


def _encode_float(value: float) -> object:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return {"$": ["float", "NaN"]}
    return {"$": ["float", "Infinity" if value > 0 else "-Infinity"]}


def decode(node: object, tensors: Mapping[str, object], depth: int = 0) -> object:
    """Return the state that was given to `encode`.

    Plain lists and dicts of `node` become part of the result, because a copy would double the memory.

    Args:
        node: The result of `encode`.
        tensors: The tensors by their names.
        depth: Levels above this node.

    Raises:
        ValueError: A node that `encode` does not make, or a missing tensor.
        TypeError: A dict key that is not hashable.
    """
    if not isinstance(node, (list, dict)):
        return node
    if depth > 2 * MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    depth += 1
    if isinstance(node, list):
        for index, item in enumerate(node):
            if isinstance(item, (list, dict)):
                node[index] = decode(item, tensors, depth)
        return node
    if "$" not in node:
        for key, item in node.items():
            if isinstance(item, (list, dict)):
                node[key] = decode(item, tensors, depth)
        return node
    match node["$"]:
        case ["tensor", str(name)] if len(node) == 1 and name in tensors:
            return tensors[name]
        case ["tuple", list(items)] if len(node) == 1:
            return tuple(decode(item, tensors, depth) for item in items)
        case ["int", str(digits)] if len(node) == 1 and len(digits) <= _BIG_INT_BITS // 4 + 3:
            return int(digits, 16)
        case ["float", str(word)] if len(node) == 1 and word in _NON_FINITE:
            return _NON_FINITE[word]
        case [str(kind), list(pairs)] if len(node) == 1 and kind in _MAPPINGS:
            return _MAPPINGS[kind](dict(_decode_pair(pair, tensors, depth) for pair in pairs))
    raise ValueError(f"a node that offloop does not write: {_excerpt(node)}")


def _decode_pair(pair: object, tensors: Mapping[str, object], depth: int) -> tuple[object, object]:
    match pair:
        case [key, value]:
            decoded = decode(key, {}, depth)
            if isinstance(decoded, (list, dict)):
                raise ValueError("a dict key that is no plain value")
            return decoded, decode(value, tensors, depth)
    raise ValueError("a dict entry that is no pair")


def _excerpt(node: Mapping[str, object]) -> str:
    """Return the beginning of a node; the whole text could be long."""
    mark = node["$"]
    inside = mark if isinstance(mark, str) else mark[:1] if isinstance(mark, list) else type(mark).__name__
    return f"{{'$': {str(inside)[:80]}, ...}}"


def tensor_names(node: object) -> set[str]:
    """Return the names of all tensors in a part of a tree."""
    if isinstance(node, dict):
        match node:
            case {"$": ["tensor", str(name)]}:
                return {name}
        children = list(node.values())
    elif isinstance(node, list):
        children = node
    else:
        return set()
    names: set[str] = set()
    for child in children:
        names |= tensor_names(child)
    return names
