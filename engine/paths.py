"""Paths that users give: `~` is the home directory, and a relative path is relative to the current directory.

A data set or a library may call `os.chdir` during a run, so a path that outlives the call is made absolute at once.
"""

import os
from pathlib import Path
from typing import Final

from offloop.engine.errors import ConfigError, nearest

__all__ = ["is_run", "meant_run"]

RUN_JSON: Final = "run.json"
"""The file in a run's directory that describes it."""
LOG: Final = "events.jsonl"
"""The file in a run's directory that has its events."""
RUNS: Final = "runs"
"""The directory of runs, unless another one is given."""


def is_run(directory: Path) -> bool:
    """Tell whether a directory is that of a run. Blocks."""
    return any((directory / name).exists() for name in (RUN_JSON, LOG))


def meant_run(path: str | os.PathLike[str], then: str = "") -> str:
    """Return what to append to the error for a path that is no run's. Blocks.

    Args:
        path: A run's name alone, or a path with a misspelled name.
        then: What the error's text has after the path, like `@best`.
    """
    given = Path(path)
    base = given.parent if given.name != str(given) else Path(RUNS)
    try:
        if given.is_dir():
            base, names = given, [each for each in os.listdir(given) if is_run(given / each)]
            name = names[0] if len(names) == 1 else None
            if len(names) > 1:
                return f"; it is a directory of {len(names)} runs: name one of them, like {base / min(names)}"
        else:
            names = [each for each in os.listdir(base) if is_run(base / each)]
            name = given.name if given.name in names else nearest(given.name, names)
    except OSError:
        return ""
    return "" if name is None else f"; did you mean {base / name}{then}?"


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that does not depend on the current directory. Links and `..` stay in it.

    Raises:
        ConfigError: It begins with the home directory of an unknown user, or is relative to a directory that was
            removed.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"the home directory in {os.fspath(path)!r} is not known: give a full path"
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"{os.fspath(path)!r} leads nowhere, since the working directory of this process was removed: "
            "give a full path, or os.chdir to a directory that exists"
        ) from error
