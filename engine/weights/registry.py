"""Writing the registry of models; `registry_reader.py` shows its layout.

A version is written like a checkpoint: into a hidden directory, fsynced, renamed, the parent fsynced. A writer holds
the model's lock, which the kernel drops when its holder dies; leftovers that are seen under the lock are garbage.
A version's number is the name of its directory, and a rename never replaces a directory. So two versions never
become one, even where locks do not work.
"""

import errno
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from offloop.engine.checkpoint import CheckpointCorruptError, CheckpointReader, DiskFullError, RunLockedError
from offloop.engine.checkpoint.files import write_checkpoint
from offloop.engine.checkpoint.filesystem import (
    FileSystem,
    make_directories,
    remove_tree,
    write_error,
    write_file,
)
from offloop.engine.checkpoint.lock import RunLock
from offloop.engine.checkpoint.manifest import Manifest
from offloop.engine.checkpoint.tree import TensorNode, encode, tensor_node
from offloop.engine.errors import ConfigError
from offloop.engine.weights.registry_reader import (
    ALIASES,
    DEFAULT_REGISTRY,
    LATEST,
    NAME,
    ModelVersion,
    RegistryReader,
)

# What imports torch is imported where it is used: listing models needs none of it.
if TYPE_CHECKING:
    from offloop.engine.checkpoint import Snapshot
    from offloop.engine.weights.source import Source, Weights

LOCK_PATIENCE: Final = 60.0
"""Seconds to wait for another process that registers under the same name: the time to write some 10 GB."""
LOCK_POLL: Final = 0.02
"""Seconds between two tries to lock; `flock` cannot wait with a time limit."""
KEPT_OF_RUN: Final = (
    "run_id",
    "config",
    "hyperparameters",
    "versions",
    "git",
    "command",
    "created",
    "init_from",
)
"""What a version keeps of its run's `run.json`."""

_TEMPORARY: Final = ".tmp-"


class ModelRegistry(RegistryReader):
    """The models registered in `directory`. All methods block on files; any thread or process may call them.

    Args:
        directory: Created by the first registration.
        filesystem: Changes the disk; tests give others.
    """

    def __init__(
        self, directory: str | Path = DEFAULT_REGISTRY, *, filesystem: FileSystem | None = None
    ) -> None:
        super().__init__(directory, filesystem=filesystem)
        # Keeps the names of temporary files apart. Any thread; `next` of a count is atomic.
        self._attempts = itertools.count()

    def verify(self, version: ModelVersion) -> None:
        """Check every byte of a version.

        Raises:
            CheckpointCorruptError: It is not what was registered; the text says which file and tensor.
        """
        from offloop.engine.weights.source import read_weights

        CheckpointReader(version.path.parent.parent).verify(version.info)
        identity = content_identity(read_weights(version).tensors)
        if identity != version.identity:
            raise CheckpointCorruptError(
                version.path,
                "model",
                "foreign",
                f"its content is {identity}, it was registered as {version.identity}",
            )

    def register(
        self,
        source: "Source",
        name: str,
        *,
        alias: str | None = None,
        notes: str = "",
        key: str | None = None,
    ) -> ModelVersion:
        """Register weights as the next version of a model; return when that is durable.

        The weights are copied, so the run may be deleted. Registering the same weights again returns the version that
        holds them, which makes a retry after a crash safe. Processes that register at once wait for each other.

        Args:
            source: A run's or checkpoint's path, a file or a state dict: what `load_model` takes.
            name: The model's name: letters, digits, `.`, `_` and `-`, at most 64. Need not exist.
            alias: Moved to this version.
            notes: Stored with a new version.
            key: Which weights of the source, as for `load_model`.

        Raises:
            ConfigError: `name` or `alias` is not legal.
            WeightsError, CheckpointError, ModelNotFoundError: The source cannot be read, or the disk not written.
            RunLockedError: Another process has been registering under this name for a minute.
        """
        from offloop.engine.weights.source import read_weights

        _check_name("name", name)
        if alias is not None:
            _check_alias(alias)
        weights = read_weights(source, key=key, registry=self.directory)
        identity = content_identity(weights.tensors)
        with self._writing(name):
            there = self.versions(name) if self._numbers(name) else []
            number = next((version.number for version in there if version.identity == identity), None)
            if number is None:
                number = self._add(name, weights, identity, notes)
            if alias is not None:
                self._set_alias(name, alias, number)
            return self._read(name, number)

    def alias(self, name: str, alias: str, version: int | str) -> ModelVersion:
        """Move an alias to a version; return that version when this is durable.

        Args:
            name: The model's name.
            alias: Letters, digits, `.`, `_` and `-`, not digits alone; not `latest`.
            version: Its number, or another alias.

        Raises:
            ConfigError: The alias is not legal.
            ModelNotFoundError: There is no such model or version.
        """
        _check_alias(alias)
        found = self.find(f"{name}:{version}" if isinstance(version, int) else f"{name}@{version}")
        with self._writing(name):
            self._set_alias(name, alias, found.number)
            return self._read(name, found.number)

    def unalias(self, name: str, alias: str) -> None:
        """Remove an alias if it exists."""
        _check_name("name", name)
        _check_alias(alias)
        path = self.directory / name / ALIASES / alias
        if path.exists():
            with self._writing(name), suppress(FileNotFoundError):
                self._filesystem.remove_file(path)
                self._filesystem.sync_directory(path.parent)

    def _add(self, name: str, weights: "Weights", identity: str, notes: str) -> int:
        """Write the next version. The caller holds the lock."""
        from offloop.engine.checkpoint.snapshot import SnapshotArena

        head = None if weights.info is None else weights.info.manifest
        step = 0 if head is None else head.step
        attempt = 0 if head is None else head.attempt
        extra = {
            "model": name,
            "identity": identity,
            "source": weights.origin,
            "notes": notes,
            "run": {key: weights.description[key] for key in KEPT_OF_RUN if key in weights.description},
        }
        arena = SnapshotArena(slots=1)
        try:
            with arena.take({"model": weights.tensors}) as snapshot:
                snapshot.wait_ready()
                for number in itertools.count(1 + max(self._numbers(name), default=0)):
                    manifest = Manifest(
                        name=f"step-{step:09d}-a{attempt}",
                        serial=number,
                        run_id="" if head is None else head.run_id,
                        attempt=attempt,
                        step=step,
                        epoch=0 if head is None else head.epoch,
                        batch=0 if head is None else head.batch,
                        reason="manual",
                        complete="weights",
                        created=time.time(),
                        metrics={} if head is None else head.metrics,
                        extra=encode(extra, lambda path, value: None),
                        files={},
                    )
                    if self._commit(self.directory / name, manifest, snapshot):
                        return number
        finally:
            arena.close()
        raise AssertionError("numbers do not end")

    def _commit(self, directory: Path, manifest: Manifest, snapshot: "Snapshot") -> bool:
        """Write a version durably. Return False if a writer without a lock has taken its number."""
        filesystem = self._filesystem
        temporary = directory / f"{_TEMPORARY}{manifest.serial}-{os.getpid()}-{next(self._attempts)}"
        final = directory / f"v{manifest.serial:06d}"
        state, parts = msgspec.json.encode(snapshot.tree), snapshot.parts()
        needed = len(state) + sum(len(part.payload) for part in parts)
        if (free := filesystem.free_bytes(directory)) < needed:
            raise DiskFullError(directory, None, needed=needed, free=free)
        has_name = False
        try:
            write_checkpoint(filesystem, temporary, manifest, parts, state, snapshot.views)
            try:
                filesystem.rename(temporary, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                remove_tree(filesystem, temporary)
                return False
            has_name = True
            filesystem.sync_directory(directory)
        except BaseException:
            with suppress(OSError):
                # It may not be durable, so it must not be seen.
                if has_name:
                    filesystem.rename(final, temporary)
            with suppress(OSError):
                remove_tree(filesystem, temporary)
            raise
        return True

    def _set_alias(self, name: str, alias: str, number: int) -> None:
        if self._read_alias(name, alias) == number:
            return
        path = self.directory / name / ALIASES / alias
        temporary = path.with_name(f"{_TEMPORARY}{alias}-{os.getpid()}-{next(self._attempts)}")
        try:
            write_file(self._filesystem, temporary, f"{number}\n".encode())
            self._filesystem.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                self._filesystem.remove_file(temporary)
            raise
        self._filesystem.sync_directory(path.parent)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Hold the model's lock. First remove leftovers of dead writers and make their finished work durable."""
        directory = self.directory / name
        try:
            make_directories(self._filesystem, (directory / ALIASES).absolute())
            lock = _wait_for_lock(directory)
            try:
                self._sweep(directory)
                # A writer that died between a rename and its fsync left entries that a power cut could still
                # remove. What builds on them must not outlive them.
                for path in (directory.parent, directory, directory / ALIASES):
                    self._filesystem.sync_directory(path)
                yield
            finally:
                lock.release()
        except OSError as error:
            raise write_error(error, directory, needed=0, filesystem=self._filesystem) from error

    def _sweep(self, directory: Path) -> None:
        for folder in (directory, directory / ALIASES):
            for name in self._filesystem.list_directory(folder):
                if name.startswith(_TEMPORARY):
                    path = folder / name
                    # What cannot be removed stays for the next time.
                    with suppress(OSError):
                        if path.is_dir():
                            remove_tree(self._filesystem, path)
                        else:
                            self._filesystem.remove_file(path)


def content_identity(state: Mapping[str, Any]) -> str:
    """Return the hash of a state dict's names, types, shapes and values; the order of names does not count. Blocks.

    Raises:
        UnserializableStateError: A checkpoint cannot hold it.
    """
    import torch

    from offloop.engine.checkpoint.restore import tensor_bytes

    tensors: dict[str, torch.Tensor] = {}

    def take(path: str, value: object) -> TensorNode | None:
        if not isinstance(value, torch.Tensor):
            return None
        tensors[path] = value
        return tensor_node(path)

    tree = encode({name: state[name] for name in sorted(state)}, take)
    digest = hashlib.sha256(msgspec.json.encode(tree))
    for path, value in tensors.items():
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"\n{path} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def _wait_for_lock(directory: Path) -> RunLock:
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return RunLock(directory)
        except RunLockedError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(LOCK_POLL)


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{what} must be letters, digits, '.', '_' and '-', at most 64 of them, beginning with a letter or a "
            f"digit; got {name!r}"
        )


def _check_alias(alias: str) -> None:
    _check_name("alias", alias)
    if alias == LATEST or alias.isdecimal():
        raise ConfigError(
            f"alias must not be {LATEST!r} or a number, which name versions already; got {alias!r}"
        )
