"""Which run a `resume=` means, and from which of its checkpoints it goes on."""

from pathlib import Path
from typing import NamedTuple

from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    find_checkpoint,
)
from offloop.engine.checkpoint.reader import CHECKPOINTS, link_to_nothing
from offloop.engine.errors import ConfigError, nearest
from offloop.engine.paths import absolute_path
from offloop.engine.run_dir import RUN_JSON, read_run_json

Resume = str | int | Path | None


WORDS = ("auto", "must", "never", "last", "best")
"""What `resume=` may be besides a tag, a step or a path."""


class Over(NamedTuple):
    """How a run came to its end before its limits."""

    stopped_by: str
    """The callback that decided it."""
    reason: str
    """Why, in its words."""


class ResumePlan(NamedTuple):
    """The run that a new attempt continues."""

    directory: Path
    """Of the run; its name is the run's id."""
    which: str | int | Path | None
    """The checkpoint, as `CheckpointReader.find` takes it; None to begin the run afresh under its name."""
    attempt: int
    """Number of the new attempt."""
    over: Over | None = None
    """Not None: a callback has ended the run, and the new attempt is not to train any further."""


def plan_resume(resume: Resume, base_dir: Path, run_name: str | None) -> ResumePlan | None:
    """Return what to continue, None for a new run. Blocks on the file system, shortly: only names are read.

    Args:
        resume: `"auto"` (continue if there is something), `"must"` (or raise), `"last"`, `"best"`, a tag, a step, a
            path to a checkpoint or a run; None or `"never"` for a new run. With `"auto"` and `"must"` a run that a
            callback has stopped is over; the others go on from what they name all the same.
        base_dir: Where runs are.
        run_name: The run's id, if it has a name.

    Raises:
        ConfigError: `resume` is none of these.
        CheckpointNotFoundError: There is nothing that it could mean.
        CheckpointError: All that it could mean is damaged.
    """
    if resume is None or resume == "never":
        return None
    if isinstance(resume, bool) or not isinstance(resume, str | int | Path) or resume == "":
        raise ConfigError(
            f"resume must be 'auto', 'must', 'never', 'last', 'best', a tag, a step or a path; got {resume!r}"
        )
    if isinstance(resume, Path) or (isinstance(resume, str) and ("/" in resume or "\\" in resume)):
        return _from_path(absolute_path(resume))
    which: str | int = "last" if resume in ("auto", "must") else resume
    if run_name is not None:
        directory = base_dir / run_name
        if not directory.is_dir():
            if directory.is_symlink():
                raise link_to_nothing(directory)
            if resume == "auto":
                return None
            raise CheckpointNotFoundError(str(which), directory, advice=_advice(resume))
        reader = CheckpointReader(directory)
        if not _has_checkpoints(reader):
            if resume != "auto":
                raise CheckpointNotFoundError(str(which), directory, advice=_advice(resume))
            return ResumePlan(directory, None, _attempts(directory))
        _find(reader, which)
        over = _over(directory) if resume in ("auto", "must") else None
        return ResumePlan(directory, which, _attempts(directory), over)
    unfinished_only = resume in ("auto", "must")
    for directory in _newest_first(base_dir):
        if unfinished_only and (_status(directory) == "completed" or _over(directory)):
            continue
        reader = CheckpointReader(directory)
        if _has_checkpoints(reader):
            _find(reader, which)
            return ResumePlan(directory, which, _attempts(directory))
    if resume == "auto":
        return None
    raise CheckpointNotFoundError(str(which), base_dir, advice=_advice(resume))


def _find(reader: CheckpointReader, which: str | int) -> None:
    """Raise `CheckpointNotFoundError` where a run has no such checkpoint."""
    try:
        reader.find(which)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(error.wanted, error.searched, error.known, _advice(which)) from None


def _advice(resume: str | int) -> str:
    """Return what to write in place of a `resume=` that leads to nothing."""
    if resume == "must":
        return '; resume="must" needs an unfinished run with a checkpoint; resume="auto" begins a new run without one'
    near = nearest(str(resume), WORDS)
    return "" if near in (None, resume) else f"; did you mean {near!r}?"


def _has_checkpoints(reader: CheckpointReader) -> bool:
    """Tell whether there is something to go on from.

    Raises:
        CheckpointError: There was, and all of it is damaged: nobody wants to begin afresh unawares.
    """
    if reader.checkpoints():
        return True
    lost = [*(error.path.name for error in reader.damaged()), *reader.set_aside()]
    if lost:
        raise CheckpointError(
            f"all checkpoints of {reader.directory} are damaged ({', '.join(lost)}): to begin afresh, give another "
            "run_name, or move that directory away"
        )
    return False


def _from_path(path: Path) -> ResumePlan:
    if _is_run(path):
        return ResumePlan(path, "last", _attempts(path))
    if not path.exists():
        path = find_checkpoint(path).path  # runs/first@best, runs/first:1200
    directory = path.parent.parent  # run / checkpoints / step-...
    if not path.is_dir() or not directory.is_dir():
        raise CheckpointNotFoundError(str(path), directory)
    return ResumePlan(directory, path, _attempts(directory))


def _is_run(path: Path) -> bool:
    """Tell whether a directory is a run's: its `run.json` may have been lost."""
    return (path / RUN_JSON).is_file() or (path / CHECKPOINTS).is_dir()


def _newest_first(base_dir: Path) -> list[Path]:
    if not base_dir.is_dir():
        return []

    def changed(run: Path) -> float:
        described = run / RUN_JSON
        return (described if described.is_file() else run / CHECKPOINTS).stat().st_mtime

    return sorted(filter(_is_run, base_dir.iterdir()), key=changed, reverse=True)


def _over(directory: Path) -> Over | None:
    """Return how a callback has ended the run, None if none has."""
    described = read_run_json(directory)
    stopped_by, reason = described.get("stopped_by"), described.get("reason")
    if not isinstance(stopped_by, str):
        return None
    return Over(stopped_by, reason if isinstance(reason, str) else f"stopped by {stopped_by}")


def _status(directory: Path) -> object:
    return read_run_json(directory).get("status")


def _attempts(directory: Path) -> int:
    """Return how many attempts there were; `run.json` may be older than the checkpoints."""
    described: int = read_run_json(directory).get("attempt", -1)
    return max([described, *CheckpointReader(directory).attempts()]) + 1
