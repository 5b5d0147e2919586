"""How a checkpoint is named outside of its run: in `init_from=`, in `load_model` and on the command line.

runs/first                 the last checkpoint of that run
runs/first@best            the best one; likewise @last, and @v1 for a tag
runs/first:1200            the one of step 1200
runs/first/checkpoints/step-000001200-a1
"""

from __future__ import annotations

from pathlib import Path

from offloop.engine.checkpoint.errors import CheckpointNotFoundError
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.reader import CHECKPOINTS, CheckpointInfo, CheckpointReader, list_runs


def split_reference(reference: str) -> tuple[str, str | int | None]:
    """Return what stands before ``@name`` or ``:number``, and the name or number; None if there is neither."""
    place = max(reference.rfind("@"), reference.rfind(":"))
    before, mark, after = reference[:place], reference[place : place + 1], reference[place + 1 :]
    if place <= 0 or not after or "/" in after or "\\" in after:
        return reference, None
    if mark == "@":
        return before, after
    return (before, int(after)) if after.isascii() and after.isdecimal() else (reference, None)


def find_checkpoint(reference: str | Path) -> CheckpointInfo:
    """Return the checkpoint that a run's or a checkpoint's path means. Blocks, for file reads.

    Args:
        reference: As above. What exists under the whole text is taken as it is, whatever marks are in it.

    Raises:
        CheckpointNotFoundError: If there is none of that description.
        CheckpointError: If it cannot be read.
    """
    path, which = Path(reference).expanduser(), None
    if not path.exists():
        before, which = split_reference(str(path))
        path = Path(before)
    if which is None and ((path / MANIFEST).is_file() or path.parent.name == CHECKPOINTS):
        return CheckpointReader(path.parent.parent).find(path)
    if not (path / CHECKPOINTS).is_dir():
        searched = path if path.is_dir() else path.parent
        runs = [reader.directory.name for reader in list_runs(searched)]
        raise CheckpointNotFoundError(str(reference), searched, runs)
    return CheckpointReader(path).find("last" if which is None else which)
