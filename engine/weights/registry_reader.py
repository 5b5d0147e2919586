"""Reading the registry of models: numbered versions of weights, and aliases that name one of them.

    <registry>/sentiment/
      v000001/   MANIFEST.json  state.json  model.safetensors     a checkpoint of the model alone; never changed
      v000002/
      aliases/champion                                           one line: the number of a version
      LOCK

Reading takes no lock and needs no torch. `registry.py` writes.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointInfo,
    CheckpointReader,
)
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.checkpoint.format import read_small_file
from offloop.engine.checkpoint.reference import split_reference
from offloop.engine.checkpoint.tree import decode
from offloop.engine.errors import ModelNotFoundError
from offloop.engine.paths import absolute_path

DEFAULT_REGISTRY: Final = "models"
"""In the working directory, next to `runs`."""
LATEST: Final = "latest"
"""The alias that always names the newest version."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Legal names of models and aliases."""
ALIASES: Final = "aliases"

_VERSION: Final = re.compile(r"v([0-9]{6,12})")


@dataclass(frozen=True)
class ModelVersion:
    """A registered version of a model. Its files never change."""

    name: str
    """Name of the model."""
    number: int
    """1, 2, ... in the order of registration."""
    identity: str
    """`sha256:` and the hash of names, types, shapes and values. Equal weights have equal identities."""
    info: CheckpointInfo
    """The checkpoint that holds it."""
    source: str
    """What it was registered from, in words."""
    notes: str
    """The notes given at registration."""
    run: Mapping[str, Any]
    """From the `run.json` of the run that made it: `config`, `versions`, `git`, `command`, ...; empty without a run."""
    aliases: tuple[str, ...] = ()
    """The aliases that named it when it was read."""

    @property
    def path(self) -> Path:
        """The directory of the version."""
        return self.info.path

    @property
    def run_id(self) -> str:
        """The run that made it; empty without a run."""
        return self.info.manifest.run_id

    @property
    def step(self) -> int:
        """Optimizer steps done when these weights were saved."""
        return self.info.step

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the checkpoint that it was registered from."""
        return self.info.metrics

    @property
    def created(self) -> float:
        """When it was registered, Unix time in seconds."""
        return self.info.manifest.created

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


class RegistryReader:
    """Finds the models registered in `directory`. All methods block on files; any thread or process may call them.

    Args:
        directory: The registry; need not exist.
        filesystem: Lists directories; tests give others.
    """

    def __init__(
        self, directory: str | Path = DEFAULT_REGISTRY, *, filesystem: FileSystem | None = None
    ) -> None:
        self.directory = absolute_path(directory)
        self._filesystem = filesystem or FileSystem()

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
        """Return the errors of versions with an unreadable manifest. `ModelRegistry.verify` checks contents."""
        errors: list[CheckpointCorruptError] = []
        for number in self._numbers(name):
            try:
                self._read(name, number)
            except CheckpointCorruptError as error:
                errors.append(error)
        return errors

    def aliases(self, name: str) -> dict[str, int]:
        """Return the version that every alias names."""
        found = {
            alias: self._read_alias(name, alias) for alias in self._names_in(self.directory / name / ALIASES)
        }
        return {alias: number for alias, number in found.items() if number is not None}

    def find(self, reference: str) -> ModelVersion:
        """Return the version that a reference names.

        Args:
            reference: `"name:3"`, `"name@alias"`; `"name"` and `"name@latest"` for the newest.

        Raises:
            ModelNotFoundError: There is no such model, version or alias.
            CheckpointError: It is damaged.
        """
        name, which = split_reference(reference)
        numbers = self._numbers(name)
        if not numbers:
            raise ModelNotFoundError(name, str(self.directory), self.models())
        if which is None or which == LATEST:
            return self._read(name, numbers[-1])
        aliases = self.aliases(name)
        number = aliases.get(which) if isinstance(which, str) else which
        if number not in numbers:
            known = [*(f"{name}@{alias}" for alias in aliases), *(f"{name}:{number}" for number in numbers)]
            raise ModelNotFoundError(reference, str(self.directory), known)
        return self._read(name, number)

    def _numbers(self, name: str) -> list[int]:
        """Return the numbers of a model's versions, ascending; none for an illegal name."""
        if not NAME.fullmatch(name):
            return []
        found = [_VERSION.fullmatch(each) for each in self._filesystem.list_directory(self.directory / name)]
        return sorted(int(match[1]) for match in found if match)

    def _names_in(self, path: Path) -> list[str]:
        try:
            return [name for name in self._filesystem.list_directory(path) if NAME.fullmatch(name)]
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
            path, "MANIFEST.json", "foreign", f"it is not the manifest of {name}:{number}"
        )

    def _read_alias(self, name: str, alias: str) -> int | None:
        try:
            text = read_small_file(self.directory / name / ALIASES / alias, limit=100)
        except CheckpointError:
            return None
        return int(text) if re.fullmatch(rb"[0-9]{1,12}\n", text) else None
