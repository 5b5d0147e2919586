"""RunLabels: what people say about a run: its name, tags, a note, and whether it is archived.

They are in `labels.json` of the run's directory, and rename nothing on disk. Each edit names the version that it is
based on, so of two people who edit at the same time the second is told.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from offloop.engine import checks
from offloop.engine.catalog.files import read_small_file
from offloop.engine.checkpoint.filesystem import open_own, replace_file
from offloop.engine.errors import ConfigError, RunLabelsChangedError, RunLabelsError
from offloop.engine.paths import meant_run
from offloop.engine.visible_text import visible

LABELS_JSON: Final = "labels.json"
MAX_NAME: Final = 200
WAIT: Final = 5.0
"""Seconds to wait for another edit, which takes milliseconds."""


class RunLabels(msgspec.Struct, frozen=True, kw_only=True):
    """What people say about a run."""

    name: str = ""
    """Name to show instead of the run's id; empty for the id."""
    tags: tuple[str, ...] = ()
    note: str = ""
    archived: bool = False
    """Archived runs are hidden in lists."""
    version: int = 0
    """Number of edits so far."""


def read_labels(directory: Path | str) -> RunLabels:
    """Return the labels of a run; those of a run that has none are empty. Any thread; blocks on the file system.

    Invisible characters in them, which only another program can have written, are U+FFFD.

    Raises:
        RunLabelsError: `labels.json` cannot be read.
    """
    found, _ = _read(Path(directory))
    return msgspec.structs.replace(
        found,
        name=visible(found.name),
        tags=tuple(visible(each) for each in found.tags),
        note=visible(found.note, keep="\t\r\n"),
    )


def edit_labels(
    directory: Path | str,
    *,
    version: int,
    name: str | None = None,
    tags: Sequence[str] | None = None,
    note: str | None = None,
    archived: bool | None = None,
) -> RunLabels:
    """Change the labels of a run, and return the new ones. None leaves a label as it is.

    The file is replaced as a whole, and durable when this returns. Any thread; blocks on the file system, and up to
    five seconds on another edit.

    Args:
        directory: The run's.
        version: `RunLabels.version` on which the change is based; 0 for a run without labels.
        name: At most 200 characters, in one line; empty for the run's id.
        tags: All tags of the run, at most 50 of 1 to 100 characters, each in one line. Repeated ones count once.
        note: At most 16,384 characters. Like names and tags, it has no invisible ones.
        archived: Whether lists hide the run.

    Raises:
        ConfigError: A value is out of these bounds.
        RunLabelsChangedError: The labels have another version by now.
        RunLabelsError: `labels.json` cannot be read.
        OSError: It cannot be written.
    """
    directory = Path(directory)
    changes = _checked(name, tags, note, archived)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no run directory {directory}{meant_run(directory)}")
    with _exclusive(directory / LABELS_JSON):
        current, fields = _read(directory)
        if current.version != version:
            raise RunLabelsChangedError(str(directory), current.version, version)
        # Fields of a later version stay
        fields |= changes | {"version": version + 1}
        replace_file(directory / LABELS_JSON, msgspec.json.format(msgspec.json.encode(fields), indent=2))
    return msgspec.convert(fields, RunLabels)


def _read(directory: Path) -> tuple[RunLabels, dict[str, Any]]:
    """Return the labels, and all fields of the file."""
    try:
        content = read_small_file(directory / LABELS_JSON)
    except FileNotFoundError:
        return RunLabels(), {}
    except OSError as error:
        raise RunLabelsError(
            f"{directory / LABELS_JSON} cannot be read: {error.strerror or error}"
        ) from error
    # An edit that failed may have created the file
    if not content:
        return RunLabels(), {}
    try:
        fields = msgspec.json.decode(content, type=dict[str, Any])
        return msgspec.convert(fields, RunLabels), fields
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RunLabelsError(
            f"{directory / LABELS_JSON} holds no labels ({error}): correct or delete it"
        ) from error


def _checked(
    name: str | None, tags: Sequence[str] | None, note: str | None, archived: bool | None
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = checks.visible_text("name", name, at_most=MAX_NAME).strip()
    if tags is not None:
        changes["tags"] = checks.tags(tags)
    if note is not None:
        changes["note"] = checks.note(note)
    if archived is not None:
        if not isinstance(archived, bool):
            raise ConfigError(f"archived must be True or False, got {archived!r}")
        changes["archived"] = archived
    return changes


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time edit a file that is replaced as a whole. Blocks."""
    deadline = time.monotonic() + WAIT
    while True:
        file = open_own(path, os.O_RDWR)
        try:
            if _lock(file):
                # The file that was locked may have been replaced by the edit before
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.lstat(path)):
                        yield
                        return
            elif time.monotonic() > deadline:
                raise RunLabelsError(f"{path} has been locked by another process for {WAIT:g} s")
            else:
                time.sleep(0.01)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks
        return True
    return True
