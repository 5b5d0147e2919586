"""Finding, checking and loading checkpoints of a run. Takes no lock and changes nothing.

    <run>/checkpoints/step-000001200-a1/   MANIFEST.json  state.json  model.safetensors ...
    <run>/refs/last  refs/best  refs/tags/<name>          one line each: a checkpoint's name

A checkpoint never changes once it has its name, so reading needs no lock. If it is deleted while it is read, it is
reported as missing.
"""

import errno
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
from offloop.engine.checkpoint.evaluations import Evaluation, EvaluationRecord, is_to_evaluate
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
from offloop.engine.checkpoint.parts import RANKS, part_file
from offloop.engine.checkpoint.tags import TAG_NAME
from offloop.engine.checkpoint.tree import decode, tensor_names

CHECKPOINTS = "checkpoints"
SET_ASIDE = ".bad-"
"""Prefix of checkpoints that a resumed run found damaged and renamed."""
REFS = "refs"
TAGS = "tags"

MAX_JSON_BYTES = 256 << 20
"""A manifest of 100,000 tensors has about 30 MB; a larger one is an attempt to fill the memory."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint: its place and the head of its manifest."""

    path: Path
    manifest: ManifestHead

    @property
    def name(self) -> str:
        """`step-000001200-a1`: steps done, and the run's attempt."""
        return self.manifest.name

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics computed at its step, and those of its evaluation."""
        return {key: float(value) for key, value in self.manifest.metrics.items()}

    @property
    def bytes(self) -> int:
        """Bytes on disk, without the manifest."""
        return sum(record.bytes for record in self.manifest.files.values())

    def evaluated(self, evaluation: Evaluation) -> "CheckpointInfo":
        """Return a copy with the metrics of an evaluation added."""
        metrics = {**evaluation.metrics, **self.manifest.metrics}
        return CheckpointInfo(self.path, msgspec.structs.replace(self.manifest, metrics=metrics))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded state, on the CPU, with every byte checked."""

    info: CheckpointInfo
    state: object
    """The state given to `SnapshotArena.take`; tensors that shared memory share it again."""
    extra: object
    """The `extra` of the request."""
    rejected: tuple[CheckpointError, ...] = ()
    """The errors of newer checkpoints that were skipped."""
    parts: Mapping[int, object] = field(default_factory=dict)
    """What other processes than the first have added, by their rank: those that were asked for."""


class CheckpointReader:
    """Reads the checkpoints of the run in `directory`. All methods block on file reads."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).expanduser()
        self._checkpoints = self.directory / CHECKPOINTS
        self._refs = self.directory / REFS
        # Checkpoints are immutable: heads stay valid while inode and time of the manifest are the same.
        self._known: dict[str, tuple[tuple[int, int], CheckpointInfo]] = {}
        self._evaluations = EvaluationRecord(self.directory)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Return all committed checkpoints, oldest first, by attempt and order of commits.

        Reads manifests only; `verify` checks the rest. Damaged ones are left out. The metrics of a checkpoint that was
        evaluated beside training include those of its evaluation.
        """
        found = [entry for entry in self._scan() if isinstance(entry, CheckpointInfo)]
        if evaluations := self._evaluations.read():
            found = [
                info.evaluated(evaluations[info.name]) if info.name in evaluations else info for info in found
            ]
        # By attempt first: a run that was continued elsewhere may be fetched next to later steps of an old attempt.
        return sorted(found, key=lambda info: (info.manifest.attempt, info.manifest.serial))

    def to_evaluate(self, every: int) -> list[CheckpointInfo]:
        """Return those of every so many that have not been evaluated yet, in the order of `checkpoints`."""
        evaluated = self._evaluations.read()
        return [
            info
            for info in self.checkpoints()
            if is_to_evaluate(info.manifest.serial, every) and info.name not in evaluated
        ]

    def damaged(self) -> list[CheckpointCorruptError | CheckpointReadError]:
        """Return the errors of checkpoints with an unreadable manifest and of dangling links."""
        return [entry for entry in self._scan() if not isinstance(entry, CheckpointInfo)]

    def attempts(self) -> list[int]:
        """Return the attempts of all checkpoints, damaged ones included. Reads names only."""
        names = [
            name for name in self._names_in(self._checkpoints) if not (self._checkpoints / name).is_file()
        ]
        found = [CHECKPOINT_NAME.fullmatch(name.removeprefix(SET_ASIDE)) for name in names]
        return [int(match["attempt"]) for match in found if match]

    def set_aside(self) -> list[str]:
        """Return the directory names of checkpoints that were found damaged and renamed."""
        return [name for name in self._names_in(self._checkpoints) if name.startswith(SET_ASIDE)]

    def tags(self) -> dict[str, str]:
        """Return the checkpoints that tags name."""
        names = {name: self._read_ref(Path(TAGS) / name) for name in self._names(TAGS)}
        return {tag: name for tag, name in names.items() if name is not None}

    def find(self, which: str | int | Path = "last") -> CheckpointInfo:
        """Return a checkpoint.

        Args:
            which: `"last"`, `"best"`, a tag, a step, a checkpoint's name, or a path to one.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
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
        """Check a checkpoint: files and lengths, with `full` every byte. Needs no torch.

        Raises:
            CheckpointCorruptError: It is damaged; the text names the file and, if known, the tensor.
        """
        info = which if isinstance(which, CheckpointInfo) else self.find(which)
        for name, record in info.manifest.files.items():
            checkpoint_format.check_length(info.path, name, record)
        foreign = set(self._names_in(info.path)) - set(info.manifest.files) - {MANIFEST}
        # Desktops and NFS leave hidden files, which do no harm.
        if strange := sorted(name for name in foreign if not name.startswith(".")):
            raise CheckpointCorruptError(info.path, strange[0], "foreign", "not in the manifest")
        if level == "full":
            manifest = self._read_manifest(info)
            for name in (STATE, *_part_files(manifest, "json")):
                self._read_tree(info.path, manifest, name)
            for name in _tensor_files(manifest):
                checkpoint_format.check_header(info.path, name, manifest)
                skip = manifest.files[name].header_bytes
                checkpoint_format.check_tensors(info.path, name, manifest.tensors, skip)

    def load(
        self,
        which: str | int | Path = "last",
        *,
        on_corrupt: Literal["fallback", "raise"] = "raise",
        ranks: Collection[int] | None = None,
    ) -> LoadedCheckpoint:
        """Load a checkpoint and check every byte.

        Args:
            which: As for `find`.
            on_corrupt: With `fallback` and `"last"`, damaged ones are skipped for the next older and listed in
                `rejected`.
            ranks: Those whose parts are read and checked; None for all.

        Raises:
            CheckpointCorruptError: It is damaged, or with `fallback` all are.
            CheckpointReadError: The system refused to read it.
            CheckpointIncompatibleError: It needs a newer offloop. There is no fallback, which would silently resume
                an older state.
            CheckpointNotFoundError: There is no such checkpoint.
        """
        if on_corrupt == "raise" or which != "last":
            return self._load(self.find(which), (), ranks)
        rejected: list[CheckpointError] = list(self.damaged())
        for error in rejected:
            self._reject(error)
        for info in reversed(self.checkpoints()):
            try:
                return self._load(info, tuple(rejected), ranks)
            except (CheckpointCorruptError, CheckpointReadError) as error:
                rejected.append(error)
                self._reject(error)
        if rejected:
            raise rejected[-1]
        raise CheckpointNotFoundError(which, self._checkpoints)

    def load_part(self, which: str | int | Path | CheckpointInfo, part: str) -> object:
        """Load one top-level entry of a state, like `model`, and check every byte of it.

        Raises:
            CheckpointCorruptError: It is damaged.
            CheckpointReadError: The system refused to read it.
            CheckpointNotFoundError: There is no such checkpoint, or no such entry in it.
        """
        # Imported here, because it imports torch.
        from offloop.engine.checkpoint.restore import read_tensors

        info = which if isinstance(which, CheckpointInfo) else self.find(which)
        manifest = self._read_manifest(info)
        tree = self._read_tree(info.path, manifest, STATE)
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
        """Handle a damaged checkpoint. A reader changes nothing; a store renames it."""

    def _load(
        self, info: CheckpointInfo, rejected: tuple[CheckpointError, ...], ranks: Collection[int] | None
    ) -> LoadedCheckpoint:
        # Imported here, because it imports torch.
        from offloop.engine.checkpoint.restore import read_tensors

        manifest = self._read_manifest(info)
        others = range(1, manifest.ranks)
        wanted = [rank for rank in others if ranks is None or rank in ranks]
        skipped = _files_of(manifest, set(others) - set(wanted))
        for name, record in manifest.files.items():
            if name not in skipped:
                checkpoint_format.check_length(info.path, name, record)
        for name in _tensor_files(manifest) - skipped:
            checkpoint_format.check_header(info.path, name, manifest)
        tree = self._read_tree(info.path, manifest, STATE)
        trees = {rank: self._read_part(info.path, manifest, rank) for rank in wanted}
        kept = {path for path, stored in manifest.tensors.items() if stored.file not in skipped}
        kept |= {path for path, view in manifest.views.items() if view.base in kept}
        tensors = read_tensors(info.path, manifest, only=kept if skipped else None)
        with _decoding(info.path, STATE):
            state = decode(tree, tensors)
        parts: dict[int, object] = {}
        for rank, part in trees.items():
            with _decoding(info.path, part_file(rank, manifest.ranks, "json")):
                parts[rank] = decode(part, tensors)
        with _decoding(info.path, MANIFEST):
            extra = decode(manifest.extra, {})
        return LoadedCheckpoint(info, state, extra, rejected, parts)

    def _read_part(self, path: Path, manifest: Manifest, rank: int) -> object:
        """Return the tree of a rank's part."""
        name = part_file(rank, manifest.ranks, "json")
        tree = self._read_tree(path, manifest, name)
        parts = tree.get(RANKS) if isinstance(tree, dict) else None
        if not isinstance(parts, dict) or [*parts] != [str(rank)]:
            raise UnsafeCheckpointError(path, name, "foreign", f"it is not the part of rank {rank}")
        return parts[str(rank)]

    def _read_tree(self, path: Path, manifest: Manifest, name: str) -> object:
        """Return the JSON of a file, after comparing it with its checksum."""
        content = checkpoint_format.read_small_file(path / name, limit=MAX_JSON_BYTES)
        record = manifest.files.get(name)
        if record is None or len(content) != record.bytes or zlib.crc32(content) != record.crc32:
            raise CheckpointCorruptError(path, name, "checksum", "its bytes were changed")
        if excess := excess_of(content):
            raise UnsafeCheckpointError(path, name, "foreign", excess)
        with _decoding(path, name):
            tree: object = msgspec.json.decode(content)
        return tree

    def _read_manifest(self, info: CheckpointInfo) -> Manifest:
        content = checkpoint_format.read_small_file(info.path / MANIFEST, limit=MAX_JSON_BYTES)
        manifest = decode_manifest(content, info.path)
        missing = (_tensor_files(manifest) | _part_files(manifest, "json")) - set(manifest.files)
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
                # Otherwise it was deleted meanwhile.
                if path.is_dir():
                    yield CheckpointCorruptError(path, MANIFEST, "missing", "no such file")
                elif path.is_symlink():
                    yield link_to_nothing(path)
            except NotADirectoryError:
                # A file with the name of a checkpoint.
                continue
            except CheckpointCorruptError as error:
                yield error
            except CheckpointIncompatibleError:
                raise
            except OSError as error:
                raise checkpoint_format.read_error(error, path) from error

    def _remember(self, info: CheckpointInfo) -> None:
        """Cache the head of a manifest that was just written; it can have many megabytes."""
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
            # A damaged ref counts as none.
            return None
        name = content.decode("ascii", "replace").strip()
        return name if CHECKPOINT_NAME.fullmatch(name) else None

    def _names(self, folder: str) -> Sequence[str]:
        return [name for name in self._names_in(self._refs / folder) if TAG_NAME.fullmatch(name)]

    @staticmethod
    def _names_in(path: Path) -> Sequence[str]:
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError as error:
            # This must not look like a run without checkpoints.
            if path.is_symlink():
                raise link_to_nothing(path) from error
            return []
        except NotADirectoryError:
            return []
        except OSError as error:
            raise checkpoint_format.read_error(error, path) from error


def link_to_nothing(path: Path) -> CheckpointReadError:
    """Return the error for a dangling link, which must not be mistaken for absence."""
    return CheckpointReadError(
        path, errno.ENOENT, f"it is a link to {os.readlink(path)}, which does not exist"
    )


@contextmanager
def _decoding(path: Path, file: str) -> Iterator[None]:
    """Turn errors of decoding into one that names the file. The content has the right checksum."""
    try:
        yield
    # RecursionError: brackets nested too deeply. OverflowError: a number too large.
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UnsafeCheckpointError(path, file, "foreign", str(error)) from error


def _tensor_files(manifest: Manifest) -> set[str]:
    return {stored.file for stored in manifest.tensors.values()} | {
        name for name, record in manifest.files.items() if record.header_bytes
    }


def _part_files(manifest: Manifest, ending: str) -> set[str]:
    """Return the names of the files of all ranks but the first."""
    if manifest.ranks > len(manifest.files) + 1:
        # Or a lying manifest would have a thousand million of them.
        return {part_file(manifest.ranks - 1, manifest.ranks, ending)}
    return {part_file(rank, manifest.ranks, ending) for rank in range(1, manifest.ranks)}


def _files_of(manifest: Manifest, ranks: Collection[int]) -> set[str]:
    return {part_file(rank, manifest.ranks, ending) for rank in ranks for ending in ("json", "safetensors")}


def list_runs(directory: Path | str) -> list[CheckpointReader]:
    """Return readers of the runs under `directory` that have checkpoints, sorted by name. Blocks."""
    runs = Path(directory).expanduser()
    return [
        CheckpointReader(runs / name)
        for name in CheckpointReader._names_in(runs)
        if (runs / name / CHECKPOINTS).is_dir()
    ]
