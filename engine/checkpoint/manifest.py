"""The record that makes a directory a checkpoint: what is in it, and how to tell that it is whole.

``MANIFEST.json`` is one line of JSON and one line with the checksum of the first.  It is written
last; a directory without a valid one is not a checkpoint.
"""

from __future__ import annotations

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
FORMAT_VERSION = 1
READER_VERSION = 1
"""The newest `min_reader` that this code can read."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
"""Of files in a checkpoint: no folder, no hidden file, no ``..``."""

CHECKPOINT_NAME = re.compile(r"step-[0-9]{9,20}-a(?P<attempt>[0-9]{1,9})(-[0-9]{1,9})?")
"""Of a checkpoint's directory: steps done, attempt, and a number if that was taken."""

MAX_DIMENSIONS = 64
"""torch's own limit."""
MAX_CONTAINERS = 2_000_000
"""Objects and arrays in one JSON file. 100,000 tensors with AdamW's state have 1 million; 2 million take 0.4 GB."""
MAX_ITEMS = 10_000_000
"""Commas in one JSON file: a sampler may keep the order of some million samples. They take 0.3 GB."""

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
    """Of a tensor file: what stands before the first tensor; 0 for other files."""
    header_crc32: Crc32 = 0


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor with bytes of its own."""

    file: str
    name: str
    """The tensor's name inside its file."""
    dtype: str
    """As torch calls it, without ``torch.``."""
    shape: Sizes
    offset: Count
    """Of the first byte, counted from the end of the file's header."""
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
    """Of the first element from the start of the base, in bytes."""


class CheckpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a save is about: said by who asks for it, kept in the manifest."""

    step: Count
    """Optimizer steps that are done."""
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
    """Anything else that is plain: environment, configuration hash, counters, timings."""
    tags: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    """Whose retention counts it; empty where it was taken for nobody in particular."""


class ManifestHead(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a manifest that listings need."""

    schema: str = SCHEMA
    format_version: Count = FORMAT_VERSION
    min_reader: Count = 1
    engine_version: str = ""
    name: str
    serial: Count
    """Grows by one with every commit in a run: the order of checkpoints, whatever clocks say."""
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
    """Whose retention counts it."""
    files: dict[str, FileRecord]


class Manifest(ManifestHead, frozen=True, kw_only=True):
    """All of it."""

    tensors: dict[str, StoredTensor] = {}
    views: dict[str, TensorView] = {}

    def tensors_under(self, paths: Collection[str]) -> dict[str, StoredTensor]:
        """Return the stored tensors that the tensors at these paths of the state are made of."""
        bases = {self.views[path].base if path in self.views else path for path in paths}
        return {path: stored for path, stored in self.tensors.items() if path in bases}


HeadT = TypeVar("HeadT", bound=ManifestHead)


def excess_of(content: bytes) -> str:
    """Return what a JSON text has too much of to be decoded in bounded memory and time; empty if it is fine.

    Counting is a thousand times as fast as decoding. It counts what stands inside of strings too, which is rare.
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
    """Return the number, or the word that stands for it where JSON has none."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of ``MANIFEST.json``."""
    line = msgspec.json.encode(manifest)
    return line + b"\ncrc32:%08x\n" % zlib.crc32(line)


def decode_manifest(content: bytes, directory: Path) -> Manifest:
    """Return the whole manifest, checked.

    Raises:
        CheckpointCorruptError: If it is not what was written, or names files elsewhere.
        CheckpointIncompatibleError: If a newer offloop is needed to read it.
    """
    return _decode(content, directory, Manifest)


def decode_head(content: bytes, directory: Path) -> ManifestHead:
    """Return what listings need, checked in the same way but much faster to read."""
    return _decode(content, directory, ManifestHead)


def _decode(content: bytes, directory: Path, kind: type[HeadT]) -> HeadT:
    def damaged(detail: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(directory, MANIFEST, "manifest", detail)

    line, newline, tail = content.partition(b"\n")
    if not newline or tail != b"crc32:%08x\n" % zlib.crc32(line):
        raise damaged("its own checksum does not match")
    if excess := excess_of(line):
        raise UnsafeCheckpointError(directory, MANIFEST, "manifest", excess)
    # RecursionError: msgspec's answer to brackets nested without end.
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
