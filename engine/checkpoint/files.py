"""The files of a checkpoint: written into a directory that is not visible as a checkpoint yet, down to the disk."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import msgspec

from offloop.engine.checkpoint.errors import CheckpointError, CheckpointWriteError, UnserializableStateError
from offloop.engine.checkpoint.filesystem import FileSystem, write_file
from offloop.engine.checkpoint.format import TensorFile, check_length, write_tensor_file
from offloop.engine.checkpoint.manifest import (
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    StoredTensor,
    TensorView,
    encode_manifest,
    excess_of,
)
from offloop.engine.checkpoint.parts import Part
from offloop.engine.checkpoint.reader import MAX_JSON_BYTES


def write_checkpoint(
    filesystem: FileSystem,
    directory: Path,
    manifest: Manifest,
    parts: Sequence[TensorFile],
    state: bytes,
    views: Mapping[str, TensorView],
    gather: Callable[[], Sequence[Part]] | None = None,
) -> Manifest:
    """Put everything into a new directory, down to the disk; return the manifest with all checksums. Blocks.

    Args:
        filesystem: Changes the disk.
        directory: Must not exist, unless others write into it, too.
        manifest: Without files and tensors.
        parts, state, views: Of the snapshot.
        gather: Waits for what other processes write into the directory, and returns it.
    """
    with nullcontext() if gather is None else suppress(FileExistsError):
        filesystem.make_directory(directory)
    files = {STATE: FileRecord(len(state), zlib.crc32(state))}
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        written = write_tensor_file(filesystem, directory, part)
        files[part.name] = written.record
        tensors |= written.tensors
    write_file(filesystem, directory / STATE, state)
    views = dict(views)
    for other in () if gather is None else gather():
        for name, content in other.contents.items():
            write_file(filesystem, directory / name, content)
        for name, record in other.files.items():
            check_written(directory, name, record)
        files |= other.files
        tensors |= other.tensors
        views |= other.views
    manifest = msgspec.structs.replace(manifest, files=files, tensors=tensors, views=views)
    write_file(filesystem, directory / MANIFEST, encode_manifest(manifest))
    filesystem.sync_directory(directory)
    return manifest


def check_written(directory: Path, name: str, record: FileRecord) -> None:
    """Check that a file that another process has written is here, in its length.

    Raises:
        CheckpointWriteError: It is not.
    """
    try:
        check_length(directory, name, record)
    except CheckpointError as error:
        text = f"another rank has written it, but rank 0 does not see it: {error}"
        raise CheckpointWriteError(directory / name, None, text) from error


def check_readable(state: bytes, directory: Path) -> None:
    """Refuse to write what no reader would take."""
    excess = excess_of(state)
    if len(state) > MAX_JSON_BYTES:
        excess = f"{len(state):,} bytes, at most {MAX_JSON_BYTES:,} can be read"
    if excess:
        raise CheckpointWriteError(directory / STATE, None, f"{excess}: keep large lists as tensors")


def refuse_tensors(path: str, value: object) -> None:
    """Refuse what plain values of a manifest must not hold."""
    if hasattr(value, "data_ptr"):
        raise UnserializableStateError(path, value, "extra holds no tensors")
