"""Find, check and load checkpoints of a run; takes no lock and changes nothing.

    <run>/checkpoints/step-000001200-a1/   MANIFEST.json  state.json  model.safetensors ...
    <run>/refs/last  refs/best  refs/tags/<name>          one line each: a checkpoint's name

Checkpoints never change once they have their name, so reading needs no lock.  One may be deleted
while it is read; that is then reported as missing.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from offloop.engine.checkpoint import format as checkpoint_format
from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointNotFoundError,
    CheckpointReadError,
    UnsafeCheckpointError,
)
from offloop.engine.checkpoint.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    STATE,
    Manifest,
    ManifestHead,
    decode_head,
    decode_manifest,
    excess_of,
)
from offloop.engine.checkpoint.tags import TAG_NAME
from offloop.engine.checkpoint.tree import decode, tensor_names

CHECKPOINTS = "checkpoints"
SET_ASIDE = ".bad-"
"""Before the name of a checkpoint that was found damaged by a run that went on from another."""
REFS = "refs"
TAGS = "tags"

MAX_JSON_BYTES = 256 << 20
"""A manifest of 100,000 tensors has about 30 MB; more is an attempt to fill the memory."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint: its place and the head of its manifest."""

    path: Path
    manifest: ManifestHead

    @property
    def name(self) -> str:
        """``step-000001200-a1``: steps done, and which attempt of the run did them."""
        return self.manifest.name

    @property
    def step(self) -> int:
        """Optimizer steps that were done."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """Known when it was saved."""
        return {key: float(value) for key, value in self.manifest.metrics.items()}

    @property
    def bytes(self) -> int:
        """On disk, without the manifest."""
        return sum(record.bytes for record in self.manifest.files.values())


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A state that is back in memory, on the CPU, every byte of it checked."""

    info: CheckpointInfo
    state: object
    """What `SnapshotArena.take` was given; tensors that shared memory share it again."""
    extra: object
    """What the request's `extra` was."""
    rejected: tuple[CheckpointError, ...] = ()
    """Newer checkpoints that were passed over, and why."""


class CheckpointReader:
    """Read the checkpoints of the run in `directory`. All methods block, for file reads."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).expanduser()
        self._checkpoints = self.directory / CHECKPOINTS
        self._refs = self.directory / REFS
        # Directories are immutable, so what was read once holds while inode and time are the same.
        self._known: dict[str, tuple[tuple[int, int], CheckpointInfo]] = {}

    def checkpoints(self) -> list[CheckpointInfo]:
        """Return all committed checkpoints, oldest first, by attempt and the order of their commits.

        Only manifests are read; see `verify` for the rest. Damaged ones are left out.
        """
        found = [entry for entry in self._scan() if isinstance(entry, CheckpointInfo)]
        # The attempt first: a run that went on elsewhere may have come back beside later ones of its past.
        return sorted(found, key=lambda info: (info.manifest.attempt, info.manifest.serial))

    def damaged(self) -> list[CheckpointCorruptError | CheckpointReadError]:
        """Return what is wrong with those whose manifest is not even readable, or that are links to nothing."""
        return [entry for entry in self._scan() if not isinstance(entry, CheckpointInfo)]

    def attempts(self) -> list[int]:
        """Return the attempts that have saved something, damaged ones included; read off the names alone."""
        names = [
            name for name in self._names_in(self._checkpoints) if not (self._checkpoints / name).is_file()
        ]
        found = [CHECKPOINT_NAME.fullmatch(name.removeprefix(SET_ASIDE)) for name in names]
        return [int(match["attempt"]) for match in found if match]

    def set_aside(self) -> list[str]:
        """Return the names of the directories of those that were found damaged before, and moved out of the way."""
        return [name for name in self._names_in(self._checkpoints) if name.startswith(SET_ASIDE)]

    def tags(self) -> dict[str, str]:
        """Return which checkpoint each tag names."""
        names = {name: self._read_ref(Path(TAGS) / name) for name in self._names(TAGS)}
        return {tag: name for tag, name in names.items() if name is not None}

    def find(self, which: str | int | Path = "last") -> CheckpointInfo:
        """Return the checkpoint that is meant.

        Args:
            which: ``"last"``, ``"best"``, a tag, a step, a checkpoint's name, or a path to one.

        Raises:
            CheckpointNotFoundError: If there is none of that description.
        """
        known = self.checkpoints()
        chosen: list[CheckpointInfo] = []
        if isinstance(which, int):
            chosen = [info for info in known if info.step == which]
        elif isinstance(which, Path) or os.sep in which:
            return self._at(Path(which))
        elif which == "last":
            chosen = known
        else:
            name = self._read_ref(Path("best" if which == "best" else f"{TAGS}/{which}"))
            chosen = [info for info in known if info.name in (which, name)]
        if not chosen:
            there = [*self.tags(), *(info.name for info in known)]
            raise CheckpointNotFoundError(str(which), self._checkpoints, there)
        return chosen[-1]

    def verify(
        self, which: str | int | Path | CheckpointInfo, *, level: Literal["quick", "full"] = "full"
    ) -> None:
        """Return if the checkpoint is whole: files and lengths, with ``full`` every byte.

        Needs no torch.

        Raises:
            CheckpointCorruptError: With the file and, where it can be told, the tensor.
        """
        info = which if isinstance(which, CheckpointInfo) else self.find(which)
        for name, record in info.manifest.files.items():
            checkpoint_format.check_length(info.path, name, record)
        foreign = set(self._names_in(info.path)) - set(info.manifest.files) - {MANIFEST}
        # Hidden ones are left there by desktops and by NFS, and harm nobody.
        if strange := sorted(name for name in foreign if not name.startswith(".")):
            raise CheckpointCorruptError(info.path, strange[0], "foreign", "not in the manifest")
        if level == "full":
            manifest = self._read_manifest(info)
            self._read_state(info.path, manifest)
            for name in _tensor_files(manifest):
                checkpoint_format.check_header(info.path, name, manifest)
                skip = manifest.files[name].header_bytes
                checkpoint_format.check_tensors(info.path, name, manifest.tensors, skip)

    def load(
        self,
        which: str | int | Path = "last",
        *,
        on_corrupt: Literal["fallback", "raise"] = "raise",
    ) -> LoadedCheckpoint:
        """Read a checkpoint back, checking every byte.

        With ``fallback`` and ``"last"``, a damaged one is passed over for the next older, and is
        told of in `rejected`.

        Raises:
            CheckpointCorruptError: If it, or each of them, is damaged.
            CheckpointReadError: If the system would not read it.
            CheckpointIncompatibleError: If it needs a newer offloop; there is no falling back
                from that, since an older state would be resumed unawares.
            CheckpointNotFoundError: If there is none.
        """
        if on_corrupt == "raise" or which != "last":
            return self._load(self.find(which), ())
        rejected: list[CheckpointError] = list(self.damaged())
        for error in rejected:
            self._reject(error)
        for info in reversed(self.checkpoints()):
            try:
                return self._load(info, tuple(rejected))
            except (CheckpointCorruptError, CheckpointReadError) as error:
                rejected.append(error)
                self._reject(error)
        if rejected:
            raise rejected[-1]
        raise CheckpointNotFoundError(which, self._checkpoints)

    def load_part(self, which: str | int | Path | CheckpointInfo, part: str) -> object:
        """Read one top-level entry of a state, such as ``model``, checking every byte of it and no others.

        Raises:
            CheckpointCorruptError: If it is damaged.
            CheckpointReadError: If the system would not read it.
            CheckpointNotFoundError: If there is no such checkpoint, or no such part in it.
        """
        from offloop.engine.checkpoint.restore import read_tensors  # here, since it imports torch

        info = which if isinstance(which, CheckpointInfo) else self.find(which)
        manifest = self._read_manifest(info)
        tree = self._read_state(info.path, manifest)
        if not isinstance(tree, dict) or part not in tree:
            raise CheckpointNotFoundError(part, info.path, sorted(tree) if isinstance(tree, dict) else ())
        with _decoding(info.path, STATE):
            wanted = tensor_names(tree[part])
            files = {stored.file for stored in manifest.tensors_under(wanted).values()}
        for name in sorted(files):
            checkpoint_format.check_length(info.path, name, manifest.files[name])
            checkpoint_format.check_header(info.path, name, manifest)
        tensors = read_tensors(info.path, manifest, only=wanted)
        with _decoding(info.path, STATE):
            return decode(tree[part], tensors)

    def _reject(self, error: CheckpointError) -> None:
        """Is told of a damaged checkpoint; a reader has no right to move it away."""

    def _load(self, info: CheckpointInfo, rejected: tuple[CheckpointError, ...]) -> LoadedCheckpoint:
        from offloop.engine.checkpoint.restore import read_tensors  # here, since it imports torch

        manifest = self._read_manifest(info)
        for name, record in manifest.files.items():
            checkpoint_format.check_length(info.path, name, record)
        for name in _tensor_files(manifest):
            checkpoint_format.check_header(info.path, name, manifest)
        tree = self._read_state(info.path, manifest)
        tensors = read_tensors(info.path, manifest)
        with _decoding(info.path, STATE):
            state = decode(tree, tensors)
        with _decoding(info.path, MANIFEST):
            extra = decode(manifest.extra, {})
        return LoadedCheckpoint(info, state, extra, rejected)

    def _read_state(self, path: Path, manifest: Manifest) -> object:
        content = checkpoint_format.read_small_file(path / STATE, limit=MAX_JSON_BYTES)
        record = manifest.files.get(STATE)
        if record is None or len(content) != record.bytes or zlib.crc32(content) != record.crc32:
            raise CheckpointCorruptError(path, STATE, "checksum", "its bytes were changed")
        if excess := excess_of(content):
            raise UnsafeCheckpointError(path, STATE, "foreign", excess)
        with _decoding(path, STATE):
            tree: object = msgspec.json.decode(content)
        return tree

    def _read_manifest(self, info: CheckpointInfo) -> Manifest:
        content = checkpoint_format.read_small_file(info.path / MANIFEST, limit=MAX_JSON_BYTES)
        manifest = decode_manifest(content, info.path)
        missing = _tensor_files(manifest) - set(manifest.files)
        if manifest.name != info.name or missing:
            raise CheckpointCorruptError(info.path, MANIFEST, "foreign", "it is of another one")
        return manifest

    def _scan(self) -> Iterator[CheckpointInfo | CheckpointCorruptError | CheckpointReadError]:
        for name in self._names_in(self._checkpoints):
            if not CHECKPOINT_NAME.fullmatch(name):
                continue
            path = self._checkpoints / name
            try:
                status = os.stat(path / MANIFEST, follow_symlinks=False)
                mark = (status.st_ino, status.st_mtime_ns)
                if name not in self._known or self._known[name][0] != mark:
                    info = self._at(path)
                    if info.name != name:
                        yield CheckpointCorruptError(
                            path, MANIFEST, "foreign", f"it is the one of {info.name!r}"
                        )
                        continue
                    self._known[name] = (mark, info)
                yield self._known[name][1]
            except FileNotFoundError:
                if path.is_dir():  # else: deleted while we were looking
                    yield CheckpointCorruptError(path, MANIFEST, "missing", "no such file")
                elif path.is_symlink():
                    yield link_to_nothing(path)
            except NotADirectoryError:
                continue  # a file that only has the name of a checkpoint
            except CheckpointCorruptError as error:
                yield error
            except CheckpointIncompatibleError:
                raise
            except OSError as error:
                raise checkpoint_format.read_error(error, path) from error

    def _remember(self, info: CheckpointInfo) -> None:
        """Spare the reading of a manifest that was just written: it can have many megabytes."""
        with suppress(OSError):
            status = os.stat(info.path / MANIFEST, follow_symlinks=False)
            self._known[info.name] = ((status.st_ino, status.st_mtime_ns), info)

    def _at(self, path: Path) -> CheckpointInfo:
        if not path.is_dir():
            there = [name for name in self._names_in(path.parent) if CHECKPOINT_NAME.fullmatch(name)]
            raise CheckpointNotFoundError(str(path), path.parent, there)
        if path.is_symlink() and path.parent == self._checkpoints:
            raise UnsafeCheckpointError(path, path.name, "foreign", "a link")
        content = checkpoint_format.read_small_file(path / MANIFEST, limit=MAX_JSON_BYTES)
        return CheckpointInfo(path, decode_head(content, path))

    def _read_ref(self, ref: Path) -> str | None:
        if ref.parent.name == TAGS and not TAG_NAME.fullmatch(ref.name):
            return None
        try:
            content = checkpoint_format.read_small_file(self._refs / ref, limit=4096)
        except CheckpointError:
            return None  # a ref is a convenience; a damaged one is as good as none
        name = content.decode("ascii", "replace").strip()
        return name if CHECKPOINT_NAME.fullmatch(name) else None

    def _names(self, folder: str) -> Sequence[str]:
        return [name for name in self._names_in(self._refs / folder) if TAG_NAME.fullmatch(name)]

    @staticmethod
    def _names_in(path: Path) -> Sequence[str]:
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError as error:
            if path.is_symlink():  # nobody may take this for a run that has no checkpoints yet
                raise link_to_nothing(path) from error
            return []
        except NotADirectoryError:
            return []
        except OSError as error:
            raise checkpoint_format.read_error(error, path) from error


def link_to_nothing(path: Path) -> CheckpointReadError:
    """Return the error for a link whose target is not there, which is not to be taken for absence."""
    return CheckpointReadError(path, errno.ENOENT, f"it is a link to {os.readlink(path)}, which is not there")


@contextmanager
def _decoding(path: Path, file: str) -> Iterator[None]:
    """Turn what goes wrong with content that has the right checksum into an error that names the file."""
    try:
        yield
    # RecursionError: brackets nested without end. OverflowError: a number that fits nowhere.
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UnsafeCheckpointError(path, file, "foreign", str(error)) from error


def _tensor_files(manifest: Manifest) -> set[str]:
    return {stored.file for stored in manifest.tensors.values()} | {
        name for name, record in manifest.files.items() if record.header_bytes
    }


def list_runs(directory: Path | str) -> list[CheckpointReader]:
    """Return a reader for each run under `directory` that has checkpoints, by name. Blocks."""
    runs = Path(directory).expanduser()
    return [
        CheckpointReader(runs / name)
        for name in CheckpointReader._names_in(runs)
        if (runs / name / CHECKPOINTS).is_dir()
    ]
