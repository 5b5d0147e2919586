"""Figures of steps: which curves a `StepEnd` has points for, and which steps can be recorded at once."""

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from offloop.engine import StepEnd

MANY_STEPS: Final = 16
"""Steps from which on a column for each curve costs less than a point for each step and curve."""

E = TypeVar("E")

_Shape = tuple[bool, bool, tuple[str, ...], tuple[str, ...]]


def keys_of(event: StepEnd) -> list[str]:
    """Return the names of a step's figures."""
    keys = [] if event.loss is None else ["loss"]
    keys.append("lr")
    keys += [f"lr/{name}" for name in event.lrs]
    if event.grad_norm is not None:
        keys.append("grad_norm")
    return [*keys, *event.metrics]


def values_of(event: StepEnd) -> list[float]:
    """Return a step's figures, in the order of their names."""
    values = [] if event.loss is None else [event.loss]
    values.append(event.lr)
    values += event.lrs.values()
    if event.grad_norm is not None:
        values.append(event.grad_norm)
    return [*values, *event.metrics.values()]


def with_steps_together(events: Sequence[E]) -> Iterator[tuple[E | StepEnd, Sequence[StepEnd]]]:
    """Yield events in their order, consecutive steps with the same figures as one: the first and all of them."""
    steps: list[StepEnd] = []
    shape: _Shape | None = None
    for event in events:
        if not isinstance(event, StepEnd):
            if steps:
                yield steps[0], steps
                steps = []
            yield event, ()
            continue
        its_shape = (event.loss is None, event.grad_norm is None, tuple(event.lrs), tuple(event.metrics))
        if steps and its_shape != shape:
            yield steps[0], steps
            steps = []
        steps.append(event)
        shape = its_shape
    if steps:
        yield steps[0], steps
