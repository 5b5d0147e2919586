"""The directory of a run: `run_dir/<run_id>/` with `run.json` and the files of callbacks."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.checkpoint.filesystem import FileSystem, make_directories, replace_file
from offloop.engine.config import TrainerConfig
from offloop.engine.errors import RunNameTakenError, encodable
from offloop.engine.observers.event_log import starts_in_log
from offloop.engine.paths import RUN_JSON, absolute_path

_ALPHABET: Final = "abcdefghjkmnpqrstuvwxyz23456789"  # no letters that look like others
_VERSIONS: Final = ("offloop", "torch", "anyio", "msgspec", "torchmetrics", "numpy")


def base_dir_of(config: TrainerConfig) -> Path:
    """Return the directory of runs, as of now: a relative one is below the current working directory."""
    return absolute_path(config.run_dir or "runs")


def new_run_id() -> str:
    """Return an id that sorts by time: `20261122-142501-k3vq`. Draws from the system, never from torch."""
    letters = "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(4))
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{letters}"


def create_run_dir(path: Path) -> None:
    """Make the directory of a new run. Blocks on the file system; not on the event loop.

    Raises:
        RunNameTakenError: It exists already.
    """
    filesystem = FileSystem()
    make_directories(filesystem, path.parent.absolute())
    try:
        filesystem.make_directory(path)
    except FileExistsError:
        raise RunNameTakenError(str(path)) from None
    filesystem.sync_directory(path.parent)  # or a power cut takes the run with all its durable checkpoints


def write_run_json(path: Path, description: dict[str, Any]) -> None:
    """Replace `run.json` whole: a reader sees the old or the new one, never half of it."""
    replace_file(path / RUN_JSON, format_run_json(description))


def format_run_json(description: dict[str, Any]) -> bytes:
    """Return the content of `run.json`."""
    return msgspec.json.format(msgspec.json.encode(description), indent=2)


def describe_environment() -> dict[str, Any]:
    """Return what is needed to know later where a run came from: versions, command, machine, git commit."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [encodable(argument) for argument in sys.argv],
        "host": platform.node(),
        "pid": os.getpid(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, or a slow one


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=5, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip()


def read_run_json(directory: Path) -> dict[str, Any]:
    """Return what `run.json` says; where there is none that can be read, what is known without it.

    That is when the run began and how many attempts it had, from its checkpoints and its log.
    """
    try:
        found = msgspec.json.decode((directory / RUN_JSON).read_bytes(), type=dict[str, Any])
        attempt = found["attempt"]
        if isinstance(attempt, int) and attempt >= 0:
            return found
    except (OSError, msgspec.MsgspecError, RecursionError, KeyError):
        pass
    reader = CheckpointReader(directory)
    starts = list(starts_in_log(directory))
    moments = [start.time for start in starts] + [info.manifest.created for info in reader.checkpoints()]
    attempts = [start.attempt for start in starts] + reader.attempts()
    described: dict[str, Any] = {}
    if moments:
        described["created"] = min(moments)
    if attempts:
        described["attempt"] = max(attempts)
    return described
