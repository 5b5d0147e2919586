"""References to checkpoints: in `init_from=`, in `load_model` and on the command line.

runs/first                 the last checkpoint of that run
runs/first@best            the best one; likewise @last, and @v1 for a tag
runs/first:1200            the one of step 1200
runs/first/checkpoints/step-000001200-a1
"""

from pathlib import Path

from offloop.engine.checkpoint.errors import CheckpointNotFoundError
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.reader import CHECKPOINTS, CheckpointInfo, CheckpointReader, list_runs
from offloop.engine.paths import meant_run


def split_reference(reference: str) -> tuple[str, str | int | None]:
    """Split a reference before `@name` or `:number`; return both parts, the second None if there is neither."""
    place = max(reference.rfind("@"), reference.rfind(":"))
    before, mark, after = reference[:place], reference[place : place + 1], reference[place + 1 :]
    if place <= 0 or not after or "/" in after or "\\" in after:
        return reference, None
    if mark == "@":
        return before, after
    return (before, int(after)) if after.isascii() and after.isdecimal() else (reference, None)


def find_checkpoint(reference: str | Path) -> CheckpointInfo:
    """Return the checkpoint that a reference names. Blocks on file reads.

    Args:
        reference: As above. An existing path is taken as it is, even with `@` or `:` in it.

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        CheckpointError: It cannot be read.
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
        then = str(reference)[len(str(path)) :] if which is not None else ""
        raise CheckpointNotFoundError(str(reference), searched, runs, advice=meant_run(path, then))
    return CheckpointReader(path).find("last" if which is None else which)
