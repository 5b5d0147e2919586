"""safetensors files, written and checked in bounded pieces with their checksums.

Why files are not written with `safetensors.torch.save_file` (0.8, torch 2.13, 2 shared cores, 2026-11-22): it
renames a temporary file of its own, so that we control neither `O_EXCL` nor the order of operations; a full disk
gives a message without an errno; and checksums need a second pass over the file (six saves of 236 MB: 4.3-4.7 s,
here 3.2-3.4 s). Training is slowed down alike: the p99 of a 1 ms step is 10 ms while either writes.
`safetensors.torch.save` would hold the interpreter for up to 3 s per GB and double the memory.
Tensors are read through the package (`restore.py`).

This module handles bytes, not tensors, and imports no torch.
"""

import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from offloop.engine.checkpoint.errors import (
    CheckpointCorruptError,
    CheckpointReadError,
    UnsafeCheckpointError,
)
from offloop.engine.checkpoint.filesystem import FileSystem, write_all
from offloop.engine.checkpoint.manifest import FileRecord, Manifest, StoredTensor, TensorView

CHUNK_BYTES = 1 << 20
"""Fits a core's L2 cache, where write() finds the bytes that crc32() has just read (8 MiB: 10 % slower)."""

HEADER_ALIGNMENT = 4096
"""A page, so that a memory map of the file has aligned tensors."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package."""

ELEMENT_CODES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    # No code in safetensors: stored as pairs of reals, one dimension more.
    "complex32": ("F16", 4),
    "complex128": ("F64", 16),
}
"""torch's name of an element type: its code in a safetensors file, its size in bytes."""

PAIRS = frozenset({"complex32", "complex128"})


MAX_REPEATED_BYTES = 1 << 28
"""How much larger than their bases all views of a checkpoint may be, like expanded masks."""


def repeated_bytes(view: TensorView, base_bytes: int) -> int:
    """Return by how many bytes a view is larger than its base because it repeats elements."""
    _, width = ELEMENT_CODES.get(view.dtype, ("", 1))
    return max(0, math.prod(view.shape) * width - base_bytes)


@dataclass(frozen=True)
class TensorFile:
    """The content of one safetensors file: tensors packed without gaps, and their bytes."""

    name: str
    tensors: Sequence[tuple[str, StoredTensor]]
    """By the path in the state, ordered by offset."""
    payload: memoryview


@dataclass(frozen=True)
class WrittenFile:
    """A durable file and the checksums of its tensors."""

    record: FileRecord
    tensors: dict[str, StoredTensor]


def encode_header(tensors: Iterable[StoredTensor]) -> bytes:
    """Return the header of a safetensors file: a length, JSON, and blanks up to a full page."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        shape = [*tensor.shape, 2] if tensor.dtype in PAIRS else tensor.shape
        entries[tensor.name] = {
            "dtype": ELEMENT_CODES[tensor.dtype][0],
            "shape": shape,
            "data_offsets": [tensor.offset, tensor.offset + tensor.bytes],
        }
    text = msgspec.json.encode(entries)
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_tensor_file(filesystem: FileSystem, directory: Path, content: TensorFile) -> WrittenFile:
    """Write one safetensors file and return when it is durable. Blocks.

    Every byte is read once: the file's checksum is combined from those of its parts.
    """
    header = encode_header(tensor for _, tensor in content.tensors)
    header_crc = crc = zlib.crc32(header)
    tensors: dict[str, StoredTensor] = {}
    file = filesystem.open_new(directory / content.name)
    try:
        write_all(filesystem, file, memoryview(header))
        written = 0
        for path, tensor in content.tensors:
            tensor_crc = 0
            end = tensor.offset + tensor.bytes
            for start in range(tensor.offset, end, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, end)
                tensor_crc = zlib.crc32(content.payload[start:stop], tensor_crc)
                if stop - written >= CHUNK_BYTES:
                    write_all(filesystem, file, content.payload[written:stop])
                    written = stop
            tensors[path] = msgspec.structs.replace(tensor, crc32=tensor_crc)
            crc = combine_crc32(crc, tensor_crc, tensor.bytes)
        write_all(filesystem, file, content.payload[written:])
        filesystem.sync(file)
    finally:
        filesystem.close(file)
    size = len(header) + len(content.payload)
    return WrittenFile(FileRecord(size, crc, len(header), header_crc), tensors)


_POLYNOMIAL = 0xEDB88320
_shift_by_length: dict[int, int] = {}


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the checksum of two concatenated byte strings from their checksums.

    zlib has this function but Python does not expose it. Appending n bytes multiplies the first checksum by x^(8n)
    modulo the polynomial. The factor is cached per n, because tensors come in few sizes; a limit keeps a hostile
    manifest from filling the memory.
    """
    shift = _shift_by_length.get(second_bytes)
    if shift is None:
        # x^0, x^8
        shift, square, bits = 1 << 31, 1 << 23, second_bytes
        while bits:
            if bits & 1:
                shift = _multiply(shift, square)
            square = _multiply(square, square)
            bits >>= 1
        if len(_shift_by_length) < 10_000:
            _shift_by_length[second_bytes] = shift
    return _multiply(shift, first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def open_plain_file(path: Path) -> tuple[int, int]:
    """Open a regular file for reading, never through a link; return descriptor and length. Blocks.

    Raises:
        CheckpointCorruptError: It is missing.
        UnsafeCheckpointError: It is a link, a pipe, a device or a folder.
        CheckpointReadError: The system refuses.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would block forever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(path.parent, path.name, "missing", "there is no such file") from error
    except OSError as error:
        if path.is_symlink():
            raise UnsafeCheckpointError(path.parent, path.name, "foreign", "a link") from error
        raise read_error(error, path) from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise UnsafeCheckpointError(path.parent, path.name, "foreign", "not a regular file")
    return file, status.st_size


def read_small_file(path: Path, *, limit: int) -> bytes:
    """Return the content of a file that must not be larger than `limit` bytes. Blocks."""
    file, size = open_plain_file(path)
    try:
        if size > limit:
            raise UnsafeCheckpointError(
                path.parent, path.name, "header", f"{size:,} bytes, expected at most {limit:,}"
            )
        return _read_exactly(file, size, path)
    finally:
        os.close(file)


def _read_exactly(file: int, size: int, path: Path) -> bytes:
    parts: list[bytes] = []
    try:
        while size and (part := os.read(file, min(size, CHUNK_BYTES))):
            parts.append(part)
            size -= len(part)
    except OSError as error:
        raise read_error(error, path) from error
    if size:
        raise CheckpointCorruptError(path.parent, path.name, "truncated", f"ends {size:,} bytes too early")
    return b"".join(parts)


def read_error(error: OSError, path: Path) -> CheckpointReadError:
    """Return our exception for the system's."""
    return CheckpointReadError(path, error.errno, error.strerror or str(error))


def check_length(directory: Path, name: str, record: FileRecord) -> None:
    """Compare a file's length with the manifest's. Blocks briefly."""
    file, size = open_plain_file(directory / name)
    os.close(file)
    if size != record.bytes:
        raise CheckpointCorruptError(
            directory, name, "truncated", f"{size:,} bytes, the manifest says {record.bytes:,}"
        )


def check_header(directory: Path, name: str, manifest: Manifest) -> None:
    """Check a file's header, and where the manifest places its tensors. Blocks.

    Afterwards a safetensors reader may open the file: its header is the one that was written, and its tensors fill
    the rest without gaps or overlaps.
    """
    record = manifest.files[name]
    listed = sorted(
        (t for t in manifest.tensors.values() if t.file == name), key=lambda t: (t.offset, t.bytes)
    )
    position = 0
    for tensor in listed:
        count = 1
        for size in tensor.shape:
            count *= size
        code = ELEMENT_CODES.get(tensor.dtype)
        if code is None or tensor.offset != position or tensor.bytes != count * code[1]:
            raise UnsafeCheckpointError(
                directory, f"{name}:{tensor.name}", "manifest", "type, shape and place disagree"
            )
        position += tensor.bytes
    if not 8 <= record.header_bytes <= MAX_HEADER_BYTES or (record.header_bytes + position != record.bytes):
        raise UnsafeCheckpointError(directory, name, "header", "the sizes do not add up")
    file, _ = open_plain_file(directory / name)
    try:
        header = _read_exactly(file, record.header_bytes, directory / name)
    finally:
        os.close(file)
    if zlib.crc32(header) != record.header_crc32:
        raise CheckpointCorruptError(directory, name, "checksum", "its header was changed")
    if int.from_bytes(header[:8], "little") + 8 != record.header_bytes:
        raise UnsafeCheckpointError(directory, name, "header", "its length is not the manifest's")


def iterate_file(path: Path, start: int, size: int) -> Iterator[bytes]:
    """Yield part of a file in bounded pieces. Blocks."""
    file, _ = open_plain_file(path)
    try:
        os.lseek(file, start, os.SEEK_SET)
        while size > 0:
            piece = _read_exactly(file, min(size, CHUNK_BYTES), path)
            size -= len(piece)
            yield piece
    finally:
        os.close(file)


def check_tensors(directory: Path, name: str, tensors: Mapping[str, StoredTensor], skip: int) -> None:
    """Compare every tensor of a file with its checksum, without torch. Blocks: reads all bytes.

    Raises:
        CheckpointCorruptError: A tensor differs; the text names the first, as `file:tensor`.
    """
    for tensor in tensors.values():
        if tensor.file != name:
            continue
        crc = 0
        for piece in iterate_file(directory / name, skip + tensor.offset, tensor.bytes):
            crc = zlib.crc32(piece, crc)
        if crc != tensor.crc32:
            raise checksum_error(directory, tensor)


def checksum_error(directory: Path, tensor: StoredTensor) -> CheckpointCorruptError:
    """Return the error for a tensor whose bytes have changed."""
    return CheckpointCorruptError(
        directory, f"{tensor.file}:{tensor.name}", "checksum", "its bytes were changed"
    )
