"""Bringing a run back from its remote directory, so that it goes on here as if it had always been here."""

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
from offloop.engine.recovery.resume_plan import Resume
from offloop.engine.run_dir import RUN_JSON, read_run_json, write_run_json
from offloop.engine.training.arguments import remote_run

logger = logging.getLogger("offloop")

_NEWEST: Final = ("auto", "must", "last")


def remote_to_fetch(config: TrainerConfig, resume: Resume) -> RemoteRun | None:
    """Return the remote directory of the run that `resume` means; None if it can only be here.

    Raises:
        ConfigError: It cannot be told which run is meant, or the store cannot be used.
    """
    if config.remote is None or resume is None or resume == "never":
        return None
    if isinstance(resume, str) and "://" in resume:
        raise ConfigError(
            f"resume={resume!r}: give Trainer(remote_dir=..., run_name=...) and resume='auto', a tag or a step"
        )
    if not isinstance(resume, str | int) or (isinstance(resume, str) and set(resume) & set("/\\")):
        return None  # a local path
    if config.run_name is None:
        raise ConfigError(
            f"resume={resume!r} with remote_dir needs run_name: the store may hold runs of other people, "
            "and runs that are going on elsewhere"
        )
    return remote_run(config.remote, config.run_name)


def fetch_run(remote: RemoteRun, directory: Path, which: str | int) -> None:
    """Bring what is needed to continue a run to its local directory, where the remote one is further on.

    The logs come first, then the best checkpoint, then the one to continue; each is checked byte by byte and
    has its name only when it is whole. Of the newest, one that is damaged gives way to the one before.
    Blocks, for the network.

    Args:
        remote: The run's remote directory.
        directory: The run's, local; made if there is something to bring.
        which: `"auto"`, `"must"`, `"last"`, `"best"`, a tag or a step.

    Raises:
        RemoteError: The store did not answer, or not as it should; what is here is as it was.
        CheckpointNotFoundError: The remote run is further on and has no such checkpoint.
        CheckpointCorruptError: What was asked for is damaged, and nothing is here or there to fall back on.
        RunLockedError: The run is going on here.
    """
    names = remote.checkpoint_names()
    described = remote.read(RUN_JSON)
    if not names and described is None:
        return
    here = [info.name for info in CheckpointReader(directory).checkpoints()]
    newest_here = age(here[-1]) if here else (-1, -1, -1)
    ahead = [name for name in names if age(name) > newest_here]
    if here and not any(remote.head(name) is not None for name in ahead):
        return  # what is here is as new
    with CheckpointStore(directory) as store:  # the lock: a run that is going on here is left alone
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
    """Fetch the newest whole checkpoint, and the best one so that it can be told from here."""
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
            logger.warning("the best checkpoint stays where it is: %s", error)


def _fetch(remote: RemoteRun, store: CheckpointStore, name: str) -> None:
    logger.info("fetching %s from %s", name, remote.url)
    with store.receiving(name) as directory:
        remote.download_checkpoint(name, directory)


def _meant(remote: RemoteRun, which: str | int, names: list[str]) -> str | None:
    """Return the name of a complete checkpoint that is asked for."""
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
    """Fetch what a run writes beside its checkpoints, if the remote attempt is a later one; run.json last."""
    attempts, directory = attempts_so_far(described, names), store.directory
    if attempts_so_far(_local_run_json(directory), []) >= attempts:
        return
    for name, size in remote.entries().items():
        if size is not None and not name.startswith(".") and name != RUN_JSON:
            _replace(remote, name, directory / name)
    for tag, name in remote.tags().items():
        store.set_tag(tag, name)
    try:
        description = msgspec.json.decode(described or b"{}")
    except msgspec.DecodeError:  # half of one, from a store that puts files in bit by bit
        description = {}
    if not isinstance(description, dict):
        raise RemoteError(f"{remote.url}/{RUN_JSON}", "is no description of a run")
    write_run_json(directory, {**description, "run_id": directory.name, "attempt": attempts - 1})


def _local_run_json(directory: Path) -> bytes | None:
    described = read_run_json(directory)
    return msgspec.json.encode(described) if described else None


def _replace(remote: RemoteRun, name: str, target: Path) -> None:
    """Download a file into the place of a local one, whole or not at all."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    remote.get(name, temporary)
    os.replace(temporary, target)
