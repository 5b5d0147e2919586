"""Names for `self.log`: they must differ from the run's metrics and columns.

A logged value becomes `StepEnd.metrics[name]` and the epoch's mean `train_name` or `val_name`. Under a name in use,
one of the two values would vanish silently, so the first use of such a name is an error.
"""

from collections.abc import Collection, Mapping
from typing import Final

from offloop.engine import checks
from offloop.engine.events import StepEnd

COLUMNS: Final = frozenset({*StepEnd.__struct_fields__, "attempt", "type", "loss_scale"})
"""Names of values that the run writes for every step: fields of events and columns of `metrics.csv`."""
LONGEST: Final = 200
"""Characters of a name."""


def check_name(name: str, metrics: Collection[str]) -> None:
    """Check the name of a logged value.

    Args:
        name: As given to `log`.
        metrics: The names of the run's `metrics=`, of training or of validations.

    Raises:
        TypeError: It is not a string.
        ValueError: It is in use, has a prefix that offloop adds itself, is too long, or has invisible characters.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"log takes a name and a value; the name must be a string, got {name!r}")
    checks.visible_text("the name of a logged value", name, at_most=LONGEST)
    if name.startswith(("train_", "val_", "train/", "val/")):
        bare = name.removeprefix("train").removeprefix("val")[1:]
        if bare == "loss":
            raise ValueError(
                f"log({name!r}): remove this call, the mean of the step's loss is logged automatically"
            )
        raise ValueError(f"log({name!r}): log adds train_ or val_ itself, so log {bare!r}")
    if name == "loss":
        raise ValueError("log('loss') would mix with the step's own loss: log it under another name")
    if name in COLUMNS:
        raise ValueError(
            f"log({name!r}): the run writes its {name!r} for every step; log the value under another name, like "
            f"{f'my_{name}'!r}"
        )
    if name in metrics:
        raise ValueError(
            f"log({name!r}): metrics= has {name!r} already; remove one of them, or log the value under another "
            f"name, like {f'batch_{name}'!r}"
        )


def add_computed(metrics: dict[str, float], computed: Mapping[str, float]) -> None:
    """Add the values of `metrics=` to logged values.

    Raises:
        ValueError: A metric with several values has one under a logged name.
    """
    for key in computed:
        if key in metrics:
            raise ValueError(
                f"{key} was logged, and metrics= computes it too: log the value under another name"
            )
    metrics.update(computed)
