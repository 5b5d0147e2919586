"""The meaning of `resume=`: the run and the checkpoint to continue from."""

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
from offloop.engine.paths import RUN_JSON, absolute_path, is_run
from offloop.engine.run_dir import read_run_json

Resume = str | int | Path | None


WORDS = ("auto", "must", "never", "last", "best")
"""What `resume=` may be besides a tag, a step or a path."""


class Over(NamedTuple):
    """How a callback ended a run before its limits."""

    stopped_by: str
    """The callback."""
    reason: str
    """Its reason."""


class ResumePlan(NamedTuple):
    """The run that a new attempt continues."""

    directory: Path
    """The run's directory; its name is the run's id."""
    which: str | int | Path | None
    """The checkpoint, as for `CheckpointReader.find`; None to restart the run under its name."""
    attempt: int
    """Number of the new attempt."""
    over: Over | None = None
    """Set if a callback has ended the run: then the new attempt does not train."""


def plan_resume(resume: Resume, base_dir: Path, run_name: str | None) -> ResumePlan | None:
    """Return what to continue, None for a new run. Blocks briefly: reads names only.

    Args:
        resume: `"auto"` (continue if possible), `"must"` (or raise), `"last"`, `"best"`, a tag, a step, a path to a
            checkpoint or a run; None or `"never"` for a new run. With `"auto"` and `"must"`, a run that a callback
            has stopped is over; the other values continue it nevertheless.
        base_dir: The directory of runs.
        run_name: The run's id, if it has a name.

    Raises:
        ConfigError: `resume` is none of these.
        CheckpointNotFoundError: There is no such checkpoint.
        CheckpointError: All candidates are damaged.
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
            raise CheckpointNotFoundError(str(which), directory, advice=_advice(resume, base_dir))
        reader = CheckpointReader(directory)
        if not _has_checkpoints(reader):
            if resume != "auto":
                raise CheckpointNotFoundError(str(which), directory, advice=_advice(resume, base_dir))
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
    raise CheckpointNotFoundError(str(which), base_dir, advice=_advice(resume, base_dir))


def _find(reader: CheckpointReader, which: str | int) -> None:
    """Raise `CheckpointNotFoundError` if a run has no such checkpoint."""
    try:
        reader.find(which)
    except CheckpointNotFoundError as error:
        advice = _advice(which, reader.directory.parent)
        raise CheckpointNotFoundError(error.wanted, error.searched, error.known, advice) from None


def _advice(resume: str | int, base_dir: Path) -> str:
    """Return advice for a `resume=` that names nothing."""
    if is_run(base_dir / str(resume)):
        return f"; a run is named by its path: resume={str(base_dir / str(resume))!r}"
    if resume == "must":
        return '; resume="must" needs an unfinished run with a checkpoint; resume="auto" starts a new run without one'
    near = nearest(str(resume), WORDS)
    return "" if near in (None, resume) else f"; did you mean {near!r}?"


def _has_checkpoints(reader: CheckpointReader) -> bool:
    """Return whether a run has a checkpoint to continue from.

    Raises:
        CheckpointError: All its checkpoints are damaged: a run never silently starts over.
    """
    if reader.checkpoints():
        return True
    lost = [*(error.path.name for error in reader.damaged()), *reader.set_aside()]
    if lost:
        raise CheckpointError(
            f"all checkpoints of {reader.directory} are damaged ({', '.join(lost)}): to start over, give another "
            "run_name, or move that directory away"
        )
    return False


def _from_path(path: Path) -> ResumePlan:
    if _is_run(path):
        return ResumePlan(path, "last", _attempts(path))
    if not path.exists():
        # runs/first@best, runs/first:1200
        path = find_checkpoint(path).path
    # run / checkpoints / step-...
    directory = path.parent.parent
    if not path.is_dir() or not directory.is_dir():
        raise CheckpointNotFoundError(str(path), directory)
    return ResumePlan(directory, path, _attempts(directory))


def _is_run(path: Path) -> bool:
    """Return whether a directory is a run's, even without its `run.json`."""
    return (path / RUN_JSON).is_file() or (path / CHECKPOINTS).is_dir()


def _newest_first(base_dir: Path) -> list[Path]:
    if not base_dir.is_dir():
        return []

    def changed(run: Path) -> float:
        described = run / RUN_JSON
        return (described if described.is_file() else run / CHECKPOINTS).stat().st_mtime

    return sorted(filter(_is_run, base_dir.iterdir()), key=changed, reverse=True)


def _over(directory: Path) -> Over | None:
    """Return how a callback ended the run, None if none did."""
    described = read_run_json(directory)
    stopped_by, reason = described.get("stopped_by"), described.get("reason")
    if not isinstance(stopped_by, str):
        return None
    return Over(stopped_by, reason if isinstance(reason, str) else f"stopped by {stopped_by}")


def _status(directory: Path) -> object:
    return read_run_json(directory).get("status")


def _attempts(directory: Path) -> int:
    """Return the number of attempts; `run.json` may be older than the checkpoints."""
    described: int = read_run_json(directory).get("attempt", -1)
    return max([described, *CheckpointReader(directory).attempts()]) + 1
