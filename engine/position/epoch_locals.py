"""Local variables of an overridden `train_epoch`, which a checkpoint inside the epoch cannot save.

A resumed epoch runs the method from its start: a counter starts over, an iterator is a new one, a hidden state is
that of the first batch. Variables that may carry something from batch to batch are therefore named as a doubt.
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Final

import torch

from offloop.engine.position.exactness import Doubt, approximate

_STATELESS: Final = (
    *(type(None), bool, str, bytes, type, torch.nn.Module, torch.device, torch.dtype),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)


def local_doubts(program: object) -> list[Doubt]:
    """Return the doubt about the variables of the running `train_epoch`, if there are any.

    Training thread, inside `train_epoch`. Looks at names and types only.

    Args:
        program: The trainer.
    """
    names: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        function = _own_epoch(program, frame.f_code)
        if function is not None:
            names += _carrying(program, function, frame)
        frame = frame.f_back  # type: ignore[assignment]  # None for the outermost frame
    if not names:
        return []
    return [
        approximate(
            f"train_epoch's local variable{'s' if len(names) > 1 else ''} {', '.join(names)} "
            f"{'start' if len(names) > 1 else 'starts'} over: keep state in an attribute, and return it from the "
            "trainer's state_dict"
        )
    ]


def _own_epoch(program: object, code: types.CodeType) -> types.FunctionType | None:
    """Return the user's `train_epoch` if it has this code, else None."""
    if code.co_name != "train_epoch":
        return None
    for cls in type(program).__mro__:
        function = vars(cls).get("train_epoch")
        if isinstance(function, types.FunctionType) and function.__code__ is code:
            return None if cls.__module__.startswith("offloop.engine") else function
    return None


def _carrying(program: object, function: types.FunctionType, frame: types.FrameType) -> Iterator[str]:
    """Yield the names of variables that may carry state from one batch to the next."""
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    known = {id(value) for value in vars(program).values()}
    places = _places(function, frame.f_lineno)
    for name, value in frame.f_locals.items():
        if name in arguments or name == "__class__" or id(value) in known or isinstance(value, _STATELESS):
            continue
        if isinstance(value, types.GeneratorType) and _is_of_the_run(value):
            continue
        if isinstance(value, Iterator):
            yield name
        elif places is None:
            yield name
        elif isinstance(value, int | float):
            if name in places.counters or (name in places.before and name in places.inside):
                yield name
        # A loader that is made for every epoch is handled elsewhere.
        elif name in places.before and not hasattr(value, "batch_sampler"):
            yield name


def _is_of_the_run(generator: "types.GeneratorType[Any, Any, Any]") -> bool:
    """Return whether this is an iterator of `self.batches(...)`, whose position is saved, or is exhausted."""
    frame = generator.gi_frame
    return frame is None or frame.f_globals.get("__name__") == "offloop.engine.training.loop"


class _Places(ast.NodeVisitor):
    """The variables of a function by where it assigns them."""

    def __init__(self, line: int) -> None:
        # Outside of all loops.
        self.before: set[str] = set()
        # In the body of a loop.
        self.inside: set[str] = set()
        # By the running loop together with the batches, as in enumerate(self.batches(...)).
        self.counters: set[str] = set()
        # The running line.
        self._line = line
        self._depth = 0

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            (self.inside if self._depth else self.before).add(node.id)

    def visit_For(self, node: ast.For) -> None:
        is_in_work = node.lineno <= self._line <= (node.end_lineno or node.lineno)
        if is_in_work and "batches(" in ast.unparse(node.iter):
            self.counters |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
        self._visit_body(node)

    def visit_While(self, node: ast.While) -> None:
        self._visit_body(node)

    def _visit_body(self, node: Any) -> None:
        self._depth += 1
        for each in node.body:
            self.visit(each)
        self._depth -= 1
        for each in node.orelse:
            self.visit(each)


def _places(function: types.FunctionType, line: int) -> _Places | None:
    """Return the assignments of a function that runs at a line of its file; None if there is no source."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return None
    places = _Places(line - first + 1)
    places.visit(tree)
    return places
