"""Validation on one loader, or on several by name, with the name in the keys of their metrics: `val_fit_loss`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from offloop.engine.errors import ConfigError

ValLoader: TypeAlias = Iterable[Any] | Mapping[str, Iterable[Any]]
"""The type of `val_loader=`: an iterable of batches, or a mapping of names to several."""

PREFIX: Final = "val_"
"""Prefix of the metrics of a single loader, and of values that belong to no loader."""

LIVE: Final = "live"
"""Prefix of metrics of the weights in training, if validations also run with an average."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def by_prefix(val_loader: ValLoader | None) -> dict[str, Iterable[Any]]:
    """Return the loaders by the prefixes of their metrics, in the order given."""
    if val_loader is None:
        return {}
    if not isinstance(val_loader, Mapping):
        return {PREFIX: val_loader}
    return {f"{PREFIX}{name}_": each for name, each in val_loader.items()}


def live_prefix(prefix: str) -> str:
    """Return the prefix for a validation with the weights in training, if there is also one with an average."""
    return f"{PREFIX}{LIVE}_{prefix.removeprefix(PREFIX)}"


def name_of(prefix: str) -> str:
    """Return the name of the loader whose metrics have this prefix; empty for a single loader."""
    return prefix.removeprefix(PREFIX).removesuffix("_")


def bare_key(key: str, prefixes: Iterable[str]) -> str:
    """Return the key that a metric would have with a single loader: `val_loss` of `val_fit_loss`."""
    own = next((prefix for prefix in prefixes if key.startswith(prefix)), PREFIX)
    return PREFIX + key.removeprefix(own) if key.startswith(own) else key


def check_names(val_loader: ValLoader) -> None:
    """Raise `ConfigError` if the names of several loaders cannot be part of metric keys."""
    if not isinstance(val_loader, Mapping):
        return
    if not val_loader:
        raise ConfigError("val_loader is an empty mapping: give a loader, or several by name")
    for name in val_loader:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"val_loader has the name {name!r}, which becomes part of keys like val_{name}_loss: use letters, "
                "digits, '_', '.' and '-'"
            )
        for other in val_loader:
            if other != name and str(other).startswith(f"{name}_"):
                raise ConfigError(
                    f"val_loader has the names {name!r} and {other!r}: the keys of their metrics could not be told "
                    "apart; rename one of them"
                )
