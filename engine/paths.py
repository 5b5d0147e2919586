"""Paths that users give: `~` is the home directory, and a relative path is relative to the current directory.

A data set or a library may call `os.chdir` during a run, so a path that outlives the call is made absolute at once.
"""

import os
from pathlib import Path
from typing import Final

from offloop.engine.errors import ConfigError

RUN_JSON: Final = "run.json"
"""The file in a run's directory that describes it."""


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
