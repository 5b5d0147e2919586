"""The manifest of a checkpoint: its content and checksums.

`MANIFEST.json` is a line of JSON and a line with its checksum. It is written last; a directory without a valid one is
not a checkpoint.
"""

import math
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    UnsafeCheckpointError,
)

MANIFEST = "MANIFEST.json"
STATE = "state.json"
SCHEMA = "offloop-checkpoint"
PARTS_VERSION = 2
"""The version of checkpoints with parts of several processes; the others are of version 1."""
FORMAT_VERSION = PARTS_VERSION
"""The newest version that this code writes."""
READER_VERSION = 2
"""The newest `min_reader` that this code can read."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
"""Legal names of files in a checkpoint: no folder, no hidden file, no `..`."""

CHECKPOINT_NAME = re.compile(r"step-[0-9]{9,20}-a(?P<attempt>[0-9]{1,9})(-[0-9]{1,9})?")
"""Legal names of checkpoints: steps done, attempt, and a number if the name was taken."""

MAX_DIMENSIONS = 64
"""torch's own limit."""
MAX_CONTAINERS = 2_000_000
"""Limit of objects and arrays in a JSON file. 100,000 tensors with AdamW's state have 1 million; 2 million take
0.4 GB."""
MAX_ITEMS = 10_000_000
"""Limit of commas in a JSON file: a sampler may save the order of some million samples. 10 million take 0.3 GB."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Sizes = Annotated[list[Count], msgspec.Meta(max_length=MAX_DIMENSIONS)]
Crc32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Reason = Literal["interval", "best", "final", "preempt", "manual", "exception"]
JsonNumber = float | Literal["NaN", "Infinity", "-Infinity"]


class FileRecord(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    bytes: Count
    crc32: Crc32
    header_bytes: Count = 0
    """Length of a tensor file's header; 0 for other files."""
    header_crc32: Crc32 = 0


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor with bytes of its own."""

    file: str
    name: str
    """The tensor's name inside its file."""
    dtype: str
    """torch's name, without `torch.`."""
    shape: Sizes
    offset: Count
    """First byte, counted from the end of the file's header."""
    bytes: Count
    crc32: Crc32 = 0


class TensorView(msgspec.Struct, frozen=True):
    """A tensor that shares the bytes of a stored one: a tied weight, a slice, a transpose."""

    base: str
    dtype: str
    shape: Sizes
    stride: Sizes
    """In elements."""
    offset: Count
    """Bytes from the start of the base to the first element."""


class CheckpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a save. The manifest keeps them."""

    step: Count
    """Optimizer steps done."""
    epoch: Count = 0
    batch: Count = 0
    attempt: Count = 1
    run_id: str = ""
    reason: Reason = "interval"
    complete: Literal["full", "weights"] = "full"
    parent: str | None = None
    """The checkpoint this attempt was resumed from."""
    metrics: dict[str, float] = {}
    extra: dict[str, object] = {}
    """Other plain values: environment, configuration hash, counters, timings."""
    tags: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    """Owners of the retention rules that count it; empty if it was saved for no owner."""
    number: Count = 0
    """Number of the save in its attempt, by which several processes know that they mean the same. Not kept."""


class ManifestHead(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a manifest that listings need."""

    schema: str = SCHEMA
    format_version: Count = 1
    min_reader: Count = 1
    engine_version: str = ""
    name: str
    serial: Count
    """Grows by one with every commit in a run: the order of checkpoints, independent of clocks."""
    run_id: str = ""
    attempt: Count = 1
    parent: str | None = None
    step: Count
    epoch: Count = 0
    batch: Count = 0
    reason: str = "interval"
    complete: str = "full"
    created: float
    """Unix seconds."""
    metrics: dict[str, JsonNumber] = {}
    extra: object = None
    owners: list[str] = []
    """Owners of the retention rules that count it."""
    world_size: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType = msgspec.UNSET
    """Number of the processes that wrote it; unset for one."""
    files: dict[str, FileRecord]

    @property
    def epoch_of_step(self) -> int:
        """Index of the epoch to which its last step belongs; `epoch` is the next one if that has ended."""
        return self.epoch - 1 if self.epoch and not self.batch else self.epoch

    @property
    def ranks(self) -> int:
        """Number of the processes ("ranks") that wrote it. Each but the first has a part of its own; see `parts.py`."""
        return 1 if self.world_size is msgspec.UNSET else self.world_size


class Manifest(ManifestHead, frozen=True, kw_only=True):
    """A whole manifest."""

    tensors: dict[str, StoredTensor] = {}
    views: dict[str, TensorView] = {}

    def tensors_under(self, paths: Collection[str]) -> dict[str, StoredTensor]:
        """Return the stored tensors behind the tensors at these paths of the state."""
        bases = {self.views[path].base if path in self.views else path for path in paths}
        return {path: stored for path, stored in self.tensors.items() if path in bases}


HeadT = TypeVar("HeadT", bound=ManifestHead)


def excess_of(content: bytes) -> str:
    """Return why a JSON text cannot be decoded in bounded memory and time; empty if it can.

    Counting is a thousand times as fast as decoding. Characters in strings count too, but are rare.
    """
    containers = content.count(b"{") + content.count(b"[")
    if containers > MAX_CONTAINERS:
        return f"{containers:,} objects and arrays, at most {MAX_CONTAINERS:,} can be read"
    if (items := content.count(b",")) > MAX_ITEMS:
        return f"{items:,} items, at most {MAX_ITEMS:,} can be read"
    return ""


class _Envelope(msgspec.Struct, frozen=True):
    schema: str
    min_reader: Count


def json_number(value: float) -> JsonNumber:
    """Return a number, or the word for a number that JSON lacks."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of `MANIFEST.json`."""
    line = msgspec.json.encode(manifest)
    return line + b"\ncrc32:%08x\n" % zlib.crc32(line)


def decode_manifest(content: bytes, directory: Path) -> Manifest:
    """Decode and check a whole manifest.

    Raises:
        CheckpointCorruptError: It is not what was written, or names files elsewhere.
        CheckpointIncompatibleError: It needs a newer offloop.
    """
    return _decode(content, directory, Manifest)


def decode_head(content: bytes, directory: Path) -> ManifestHead:
    """Decode and check the part that listings need, which is much faster."""
    return _decode(content, directory, ManifestHead)


def _decode(content: bytes, directory: Path, kind: type[HeadT]) -> HeadT:
    def damaged(detail: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(directory, MANIFEST, "manifest", detail)

    line, newline, tail = content.partition(b"\n")
    if not newline or tail != b"crc32:%08x\n" % zlib.crc32(line):
        raise damaged("its own checksum does not match")
    if excess := excess_of(line):
        raise UnsafeCheckpointError(directory, MANIFEST, "manifest", excess)
    # msgspec raises RecursionError for brackets nested too deeply.
    try:
        envelope = msgspec.json.decode(line, type=_Envelope)
        if envelope.schema != SCHEMA:
            raise damaged(f"schema is {envelope.schema!r}, not {SCHEMA!r}")
        if envelope.min_reader > READER_VERSION:
            raise CheckpointIncompatibleError(
                directory,
                f"needs format reader {envelope.min_reader}, this offloop has {READER_VERSION}",
                "Update offloop",
            )
        head = msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise damaged(f"not a manifest: {error}") from error
    _check_names(head, directory)
    return head


def _check_names(head: ManifestHead, directory: Path) -> None:
    if not CHECKPOINT_NAME.fullmatch(head.name):
        raise UnsafeCheckpointError(directory, MANIFEST, "manifest", f"is named {head.name!r}")
    names = set(head.files)
    if isinstance(head, Manifest):
        names |= {tensor.file for tensor in head.tensors.values()}
    for name in names:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise UnsafeCheckpointError(
                directory, MANIFEST, "manifest", f"file name {name!r} is not a plain name"
            )
