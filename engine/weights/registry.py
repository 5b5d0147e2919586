"""The registry of models: numbered versions of weights, and names that are moved from one to the next.

    <registry>/sentiment/
      v000001/   MANIFEST.json  state.json  model.safetensors     a checkpoint of the model alone; never changed
      v000002/
      aliases/champion                                           one line: the number of a version
      LOCK

A version is written like a checkpoint: into a hidden directory, fsynced, renamed, the parent fsynced. Whoever
writes holds the model's lock, which the kernel drops when its holder dies; a leftover that is seen under the lock
is garbage. A number is a directory's name and a rename never replaces a directory, so that even where locks do
not work two versions never become one. Reading takes no lock.
"""

import errno
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointInfo,
    CheckpointReader,
    DiskFullError,
    RunLockedError,
)
from offloop.engine.checkpoint.filesystem import (
    FileSystem,
    make_directories,
    remove_tree,
    write_error,
    write_file,
)
from offloop.engine.checkpoint.format import read_small_file
from offloop.engine.checkpoint.lock import RunLock
from offloop.engine.checkpoint.manifest import Manifest
from offloop.engine.checkpoint.reference import split_reference
from offloop.engine.checkpoint.store import write_checkpoint
from offloop.engine.checkpoint.tree import TensorNode, decode, encode, tensor_node
from offloop.engine.errors import ConfigError, ModelNotFoundError
from offloop.engine.paths import absolute_path

if TYPE_CHECKING:
    from offloop.engine.checkpoint import Snapshot
    from offloop.engine.weights.loading import Source, Weights

DEFAULT_REGISTRY: Final = "models"
"""Beside `runs`, in the working directory."""
LOCK_PATIENCE: Final = 60.0
"""Seconds to wait for another process that registers under the same name: the time to write some 10 GB."""
LOCK_POLL: Final = 0.02
"""Seconds between two looks at the lock; `flock` can wait by itself, but not for a limited time."""
LATEST: Final = "latest"
"""The alias that is always the newest version."""
KEPT_OF_RUN: Final = ("run_id", "config", "versions", "git", "command", "created", "init_from")
"""What a version keeps of its run's `run.json`."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION: Final = re.compile(r"v([0-9]{6,12})")
_ALIASES: Final = "aliases"
_TEMPORARY: Final = ".tmp-"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version of a model. Its files never change."""

    name: str
    """Of the model."""
    number: int
    """1, 2, ... in the order of registration."""
    identity: str
    """`sha256:` and the hash of names, types, shapes and values: the same weights have the same one."""
    info: CheckpointInfo
    """Its directory and the head of its manifest."""
    source: str
    """What it was registered from, in words."""
    notes: str
    """What was said about it then."""
    run: Mapping[str, Any]
    """What `run.json` says of the run that made it: `config`, `versions`, `git`, `command`, ...; empty if it is
    not from a run."""
    aliases: tuple[str, ...] = ()
    """Those that named it when this was read."""

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.info.path

    @property
    def run_id(self) -> str:
        """The run that made it; empty if it is not from a run."""
        return self.info.manifest.run_id

    @property
    def step(self) -> int:
        """Optimizer steps done when these weights were saved."""
        return self.info.step

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the checkpoint."""
        return self.info.metrics

    @property
    def created(self) -> float:
        """When it was registered, Unix time in seconds."""
        return self.info.manifest.created

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


class ModelRegistry:
    """The models registered in `directory`. All methods block, for file operations; any thread or process may call.

    Args:
        directory: Made by the first registration.
        filesystem: What changes the disk; tests give others.
    """

    def __init__(
        self, directory: str | Path = DEFAULT_REGISTRY, *, filesystem: FileSystem | None = None
    ) -> None:
        self.directory = absolute_path(directory)
        self._filesystem = filesystem or FileSystem()
        self._attempts = itertools.count()  # no temporary name is used twice

    # Reading

    def models(self) -> list[str]:
        """Return the names of all models."""
        return [name for name in self._names_in(self.directory) if self._numbers(name)]

    def versions(self, name: str) -> list[ModelVersion]:
        """Return the versions of a model, oldest first. Damaged ones are left out; see `damaged`.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        numbers = self._numbers(name)
        if not numbers:
            raise ModelNotFoundError(name, str(self.directory), self.models())
        aliases = self.aliases(name)
        versions: list[ModelVersion] = []
        for number in numbers:
            with suppress(CheckpointCorruptError):
                versions.append(self._read(name, number, aliases))
        return versions

    def damaged(self, name: str) -> list[CheckpointCorruptError]:
        """Return what is wrong with versions whose manifest is not even readable; `verify` looks at the rest."""
        errors: list[CheckpointCorruptError] = []
        for number in self._numbers(name):
            try:
                self._read(name, number)
            except CheckpointCorruptError as error:
                errors.append(error)
        return errors

    def aliases(self, name: str) -> dict[str, int]:
        """Return which version each alias names."""
        found = {
            alias: self._read_alias(name, alias) for alias in self._names_in(self.directory / name / _ALIASES)
        }
        return {alias: number for alias, number in found.items() if number is not None}

    def find(self, reference: str, *, hint: str = "") -> ModelVersion:
        """Return the version that is meant.

        Args:
            reference: `"name:3"`, `"name@alias"`; `"name"` and `"name@latest"` for the newest.
            hint: Added to the error if there is none.

        Raises:
            ModelNotFoundError: There is no such model, version or alias.
            CheckpointError: It is damaged.
        """
        name, which = split_reference(reference)
        numbers = self._numbers(name)
        if not numbers:
            raise ModelNotFoundError(name, str(self.directory), self.models(), hint)
        if which is None or which == LATEST:
            return self._read(name, numbers[-1])
        aliases = self.aliases(name)
        number = aliases.get(which) if isinstance(which, str) else which
        if number not in numbers:
            known = [*(f"{name}@{alias}" for alias in aliases), *(f"{name}:{number}" for number in numbers)]
            raise ModelNotFoundError(reference, str(self.directory), known)
        return self._read(name, number)

    def verify(self, version: ModelVersion) -> None:
        """Return if every byte of a version is what was registered.

        Raises:
            CheckpointCorruptError: It is not; the text says which file and tensor.
        """
        from offloop.engine.weights.loading import read_weights  # here, since it imports torch

        CheckpointReader(version.path.parent.parent).verify(version.info)
        identity = content_identity(read_weights(version).tensors)
        if identity != version.identity:
            raise CheckpointCorruptError(
                version.path,
                "model",
                "foreign",
                f"its content is {identity}, it was registered as {version.identity}",
            )

    # Writing

    def register(
        self,
        source: "Source",
        name: str,
        *,
        alias: str | None = None,
        notes: str = "",
        key: str | None = None,
    ) -> ModelVersion:
        """Make the weights of a checkpoint the next version of a model; return when that is durable.

        They are copied, so the run may be deleted. Weights that are a version of this model already become no
        second one: that version is returned, so that registering again after a crash is safe. Several processes
        may register at once; each waits for its turn.

        Args:
            source: A run's or checkpoint's path, a file or a state dict: what `load_model` takes.
            name: Of the model: letters, digits, `.`, `_` and `-`, at most 64. Need not exist.
            alias: Moved to this version.
            notes: Kept with a new version.
            key: Which weights of the source, as for `load_model`.

        Raises:
            ConfigError: `name` or `alias` is no proper name.
            WeightsError, CheckpointError, ModelNotFoundError: The source cannot be read, or the disk not written.
            RunLockedError: Another process has been registering under this name for a minute.
        """
        from offloop.engine.weights.loading import read_weights  # here, since it imports torch

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
        """Let an alias name a version, from now on; return that version when this is durable.

        Args:
            name: Of the model.
            alias: Letters, digits, `.`, `_` and `-`, not digits alone; not `latest`.
            version: Its number, or another alias.

        Raises:
            ConfigError: It is no proper alias.
            ModelNotFoundError: There is no such model or version.
        """
        _check_alias(alias)
        found = self.find(f"{name}:{version}" if isinstance(version, int) else f"{name}@{version}")
        with self._writing(name):
            self._set_alias(name, alias, found.number)
            return self._read(name, found.number)

    def unalias(self, name: str, alias: str) -> None:
        """Remove an alias; one that is not there is fine."""
        _check_name("name", name)
        _check_alias(alias)
        path = self.directory / name / _ALIASES / alias
        if path.exists():
            with self._writing(name), suppress(FileNotFoundError):
                self._filesystem.remove_file(path)
                self._filesystem.sync_directory(path.parent)

    def _add(self, name: str, weights: "Weights", identity: str, notes: str) -> int:
        """Write the next version; under the lock."""
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
        """Write a version, down to the disk; False if its number has been taken by a writer without locks."""
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
                if has_name:  # but it is not known to be durable: nobody may see it
                    filesystem.rename(final, temporary)
            with suppress(OSError):
                remove_tree(filesystem, temporary)
            raise
        return True

    def _set_alias(self, name: str, alias: str, number: int) -> None:
        if self._read_alias(name, alias) == number:
            return
        path = self.directory / name / _ALIASES / alias
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
        """Hold the model's lock, with what died before us swept away and what it left made durable."""
        directory = self.directory / name
        try:
            make_directories(self._filesystem, (directory / _ALIASES).absolute())
            lock = _wait_for_lock(directory)
            try:
                self._sweep(directory)
                # A predecessor that died between a name and its fsync left what we see and a power cut could
                # take: what builds on it must not outlive it.
                for path in (directory.parent, directory, directory / _ALIASES):
                    self._filesystem.sync_directory(path)
                yield
            finally:
                lock.release()
        except OSError as error:
            raise write_error(error, directory, needed=0, filesystem=self._filesystem) from error

    def _sweep(self, directory: Path) -> None:
        for folder in (directory, directory / _ALIASES):
            for name in self._filesystem.list_directory(folder):
                if name.startswith(_TEMPORARY):
                    path = folder / name
                    with suppress(OSError):  # what resists stays for next time
                        if path.is_dir():
                            remove_tree(self._filesystem, path)
                        else:
                            self._filesystem.remove_file(path)

    # What is there

    def _numbers(self, name: str) -> list[int]:
        """Return the numbers of a model's versions; none for a name that is not proper."""
        if not _NAME.fullmatch(name):
            return []
        found = [_VERSION.fullmatch(each) for each in self._filesystem.list_directory(self.directory / name)]
        return sorted(int(match[1]) for match in found if match)

    def _names_in(self, path: Path) -> list[str]:
        try:
            return [name for name in self._filesystem.list_directory(path) if _NAME.fullmatch(name)]
        except NotADirectoryError:
            return []

    def _read(self, name: str, number: int, known_aliases: Mapping[str, int] | None = None) -> ModelVersion:
        path = self.directory / name / f"v{number:06d}"
        info = CheckpointReader(path.parent.parent).find(path)
        try:
            extra = decode(info.manifest.extra, {})
        except (ValueError, TypeError, RecursionError):
            extra = None
        match extra:
            case {
                "model": str(model),
                "identity": str(identity),
                "source": str(source),
                "notes": str(notes),
                "run": dict(run),
            } if model == name and info.manifest.serial == number:
                known = self.aliases(name) if known_aliases is None else known_aliases
                aliases = tuple(alias for alias, named in known.items() if named == number)
                return ModelVersion(name, number, identity, info, source, notes, run, aliases)
        raise CheckpointCorruptError(
            path, "MANIFEST.json", "foreign", f"it is not the one of {name}:{number}"
        )

    def _read_alias(self, name: str, alias: str) -> int | None:
        try:
            text = read_small_file(self.directory / name / _ALIASES / alias, limit=100)
        except CheckpointError:
            return None
        return int(text) if re.fullmatch(rb"[0-9]{1,12}\n", text) else None


def content_identity(state: Mapping[str, Any]) -> str:
    """Return the hash of a state dict's content: names, types, shapes, values, whatever the order of names. Blocks.

    Raises:
        UnserializableStateError: It holds what a checkpoint cannot.
    """
    import torch  # here, since looking at what there is needs none

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
    if not isinstance(name, str) or not _NAME.fullmatch(name):
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
