"""Names that `self.log` may use: none that a metric or a column of the run has already.

A logged value becomes `StepEnd.metrics[name]` and the epoch's mean `train_name` or `val_name`. Under a name that is
taken, one of the two values would vanish without a word, so such a name is an error at its first use.
"""

from collections.abc import Collection, Mapping
from typing import Final

from offloop.engine.events import StepEnd

COLUMNS: Final = frozenset({*StepEnd.__struct_fields__, "attempt", "type", "loss_scale"})
"""What the run itself writes for every step, as fields of events and columns of `metrics.csv`."""


def check_name(name: str, metrics: Collection[str]) -> None:
    """Raise where a value cannot be logged under `name`.

    Args:
        name: As given to `log`.
        metrics: The names of the run's `metrics=`, of training or of validations.

    Raises:
        TypeError: It is no text.
        ValueError: It is taken, or begins with what is put before every name.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"log takes a name and a value; the name must be a text, got {name!r}")
    if name.startswith(("train_", "val_", "train/", "val/")):
        bare = name.removeprefix("train").removeprefix("val")[1:]
        if bare == "loss":
            raise ValueError(f"log({name!r}): leave it out, the mean of the step's loss is logged by itself")
        raise ValueError(f"log({name!r}): train_ or val_ is put before what is logged, so log {bare!r}")
    if name == "loss":
        raise ValueError("log('loss') would mix with the step's own loss: log it under another name")
    if name in COLUMNS:
        raise ValueError(
            f"log({name!r}): the run writes a {name!r} of its own for every step; leave it out, or log the value "
            f"under another name, like {f'my_{name}'!r}"
        )
    if name in metrics:
        raise ValueError(
            f"log({name!r}): metrics= has {name!r} already; leave one of them out, or log the value under another "
            f"name, like {f'batch_{name}'!r}"
        )


def add_computed(made: dict[str, float], computed: Mapping[str, float]) -> None:
    """Add the values of `metrics=` to those that were logged.

    Raises:
        ValueError: A metric that gives several values has one of a name that was logged.
    """
    for key in computed:
        if key in made:
            raise ValueError(f"{key} was logged, and metrics= makes it too: log the value under another name")
    made.update(computed)
