"""Downloads a run from its remote directory, so that it continues as if it had always been local."""

import logging
import os
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointStore,
    RemoteError,
    RemoteRun,
)
from offloop.engine.checkpoint.remote import age, attempts_so_far
from offloop.engine.config import TrainerConfig
from offloop.engine.errors import ConfigError
from offloop.engine.paths import RUN_JSON
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.run_dir import read_run_json, write_run_json
from offloop.engine.samples.content import FILE_NAME, FOLDER
from offloop.engine.training.arguments import remote_run

logger = logging.getLogger("offloop")

_NEWEST: Final = ("auto", "must", "last")


def remote_to_fetch(config: TrainerConfig, resume: Resume) -> RemoteRun | None:
    """Return the remote directory of the run that `resume` names; None if it can only be local.

    Raises:
        ConfigError: The run is ambiguous, or the store cannot be used.
    """
    if config.remote is None or resume is None or resume == "never":
        return None
    if isinstance(resume, str) and "://" in resume:
        raise ConfigError(
            f"resume={resume!r}: give Trainer(remote_dir=..., run_name=...) and resume='auto', a tag or a step"
        )
    if not isinstance(resume, str | int) or (isinstance(resume, str) and set(resume) & set("/\\")):
        # A local path.
        return None
    if config.run_name is None:
        raise ConfigError(
            f"resume={resume!r} with remote_dir needs run_name: the store may hold other people's runs, "
            "and runs that are in progress elsewhere"
        )
    return remote_run(config.remote, config.run_name)


def fetch_run(remote: RemoteRun, directory: Path, which: str | int) -> None:
    """Download what is needed to continue a run, if the remote directory is ahead of the local one.

    The order is: logs, the checkpoint to continue, the best one. A checkpoint is checked byte by byte and gets its
    name when it is whole. If the newest is damaged, the one before is used. Blocks on the network.

    Args:
        remote: The run's remote directory.
        directory: The run's local directory; created if there is something to download.
        which: `"auto"`, `"must"`, `"last"`, `"best"`, a tag or a step.

    Raises:
        RemoteError: The store failed; local files are unchanged.
        CheckpointNotFoundError: The remote run is ahead and has no such checkpoint.
        CheckpointCorruptError: The checkpoint is damaged, and there is none to fall back on.
        RunLockedError: The run is in progress on this machine.
    """
    names = remote.checkpoint_names()
    described = remote.read(RUN_JSON)
    if not names and described is None:
        return
    here = [info.name for info in CheckpointReader(directory).checkpoints()]
    newest_here = age(here[-1]) if here else (-1, -1, -1)
    ahead = [name for name in names if age(name) > newest_here]
    if here and not any(remote.head(name) is not None for name in ahead):
        # The local run is as new.
        return
    # The store's lock keeps this from a run that is in progress.
    with CheckpointStore(directory) as store:
        _fetch_files(remote, store, described, names)
        if which in _NEWEST:
            _fetch_newest(remote, store, ahead, must_be=not here)
        else:
            name = _meant(remote, which, names)
            if name is None:
                raise CheckpointNotFoundError(str(which), remote.url, names)
            if name not in here:
                _fetch(remote, store, name)
            if which == "best":
                store.set_best(name)


def _fetch_newest(remote: RemoteRun, store: CheckpointStore, ahead: list[str], *, must_be: bool) -> None:
    """Fetch the newest whole checkpoint, and the best one, which the run needs to compare with."""
    damaged: CheckpointError | None = None
    for name in ahead:
        if remote.head(name) is None:
            logger.info("%s: the upload of %s was not finished", remote.url, name)
            continue
        try:
            _fetch(remote, store, name)
            break
        except CheckpointCorruptError as error:
            logger.warning("a checkpoint was skipped: %s", error)
            damaged = error
    else:
        if damaged is not None and must_be:
            raise damaged
    best = remote.ref("best")
    if best is not None:
        try:
            if best not in [info.name for info in store.checkpoints()]:
                _fetch(remote, store, best)
            store.set_best(best)
        except CheckpointError as error:
            logger.warning("the best checkpoint was not fetched: %s", error)


def _fetch(remote: RemoteRun, store: CheckpointStore, name: str) -> None:
    logger.info("fetching %s from %s", name, remote.url)
    with store.receiving(name) as directory:
        remote.download_checkpoint(name, directory)


def _meant(remote: RemoteRun, which: str | int, names: list[str]) -> str | None:
    """Return the name of the complete checkpoint that `which` names."""
    if isinstance(which, int):
        found = [name for name in names if age(name)[1] == which]
    elif which in names:
        found = [which]
    else:
        ref = remote.ref("best" if which == "best" else f"tags/{which}")
        found = [] if ref is None else [ref]
    return next((name for name in found if remote.head(name) is not None), None)


def _fetch_files(
    remote: RemoteRun, store: CheckpointStore, described: bytes | None, names: list[str]
) -> None:
    """Fetch the run's other files if the remote attempt is later; run.json last."""
    attempts, directory = attempts_so_far(described, names), store.directory
    if attempts_so_far(_local_run_json(directory), []) >= attempts:
        return
    for name, size in remote.entries().items():
        if size is not None and not name.startswith(".") and name != RUN_JSON:
            _replace(remote, name, directory / name)
    _fetch_samples(remote, directory)
    for tag, name in remote.tags().items():
        store.set_tag(tag, name)
    try:
        description = msgspec.json.decode(described or b"{}")
    # A partial file, from a store that writes files in pieces.
    except msgspec.DecodeError:
        description = {}
    if not isinstance(description, dict):
        raise RemoteError(f"{remote.url}/{RUN_JSON}", "is no description of a run")
    write_run_json(directory, {**description, "run_id": directory.name, "attempt": attempts - 1})


def _fetch_samples(remote: RemoteRun, directory: Path) -> None:
    """Fetch the pictures and long texts that are not here. Their content is checked whenever it is read."""
    folder = directory / FOLDER
    missing = [
        name for name in remote.entries(FOLDER) if FILE_NAME.match(name) and not (folder / name).exists()
    ]
    if missing and not folder.is_symlink():
        folder.mkdir(exist_ok=True)
        for name in missing:
            _replace(remote, f"{FOLDER}/{name}", folder / name)


def _local_run_json(directory: Path) -> bytes | None:
    described = read_run_json(directory)
    return msgspec.json.encode(described) if described else None


def _replace(remote: RemoteRun, name: str, target: Path) -> None:
    """Replace a local file by a download, atomically."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    remote.get(name, temporary)
    os.replace(temporary, target)
