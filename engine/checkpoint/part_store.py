"""Writing a rank's part of a checkpoint, of which rank 0 writes the rest; see `parts.py`."""

import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from offloop.engine.checkpoint.files import check_readable
from offloop.engine.checkpoint.filesystem import FileSystem, write_error, write_file
from offloop.engine.checkpoint.format import write_tensor_file
from offloop.engine.checkpoint.manifest import CheckpointRequest, FileRecord, StoredTensor
from offloop.engine.checkpoint.parts import RANKS, Part, PartsChannel, meeting_place, part_file
from offloop.engine.checkpoint.reader import CHECKPOINTS
from offloop.engine.checkpoint.store import Snapshotted
from offloop.engine.errors import describe


class PartStore:
    """The only writer of this rank's parts. `commit` belongs to the writer's thread, `discard` to any."""

    def __init__(
        self, directory: Path, channel: PartsChannel, *, filesystem: FileSystem | None = None
    ) -> None:
        """Write parts of the checkpoints of the run in `directory`, whose store is rank 0's.

        Args:
            directory: The run's. Rank 0 has opened it.
            channel: The way to rank 0.
            filesystem: Changes the disk; tests give others.
        """
        self.directory = directory
        self._checkpoints = directory / CHECKPOINTS
        self._channel = channel
        self._filesystem = filesystem or FileSystem()
        self._names = {
            ending: part_file(channel.rank, channel.world_size, ending) for ending in ("json", "safetensors")
        }

    @property
    def files(self) -> Mapping[str, str]:
        """The files by top-level key of a part, for the arena."""
        return {RANKS: self._names["safetensors"]}

    def commit(self, snapshot: Snapshotted, request: CheckpointRequest) -> None:
        """Write a part and report it. Blocks until it is durable; the checkpoint is not, until rank 0 says so.

        A part that cannot be written is reported, too: then the save fails on all ranks.

        Raises:
            CheckpointError: The store of the ranks cannot be reached.
        """
        if self._channel.is_decided(request.number):
            # Rank 0 has skipped this save, or failed.
            return
        directory = self._checkpoints / meeting_place(request)
        try:
            snapshot.wait_ready()
            part = self._write(snapshot, directory)
        except OSError as error:
            reported = write_error(error, directory, needed=0, filesystem=self._filesystem)
            part = Part(error=describe(reported))
        except Exception as error:
            part = Part(error=describe(error))
        self._channel.report(request.number, part)

    def _write(self, snapshot: Snapshotted, directory: Path) -> Part:
        memory = None if self._channel.is_shared else _Memory()
        filesystem = memory or self._filesystem
        state = msgspec.json.encode(snapshot.tree)
        check_readable(state, directory)
        with suppress(FileExistsError):
            filesystem.make_directory(directory)
        files = {self._names["json"]: FileRecord(len(state), zlib.crc32(state))}
        tensors: dict[str, StoredTensor] = {}
        for each in snapshot.parts():
            written = write_tensor_file(filesystem, directory, each)
            files[each.name] = written.record
            tensors |= written.tensors
        write_file(filesystem, directory / self._names["json"], state)
        filesystem.sync_directory(directory)
        contents = {} if memory is None else memory.contents
        return Part(files=files, tensors=tensors, views=dict(snapshot.views), contents=contents)

    def discard(self, request: CheckpointRequest) -> None:
        """Remove the files of a save that has failed, as far as the system allows."""
        if not self._channel.is_shared:
            return
        directory = self._checkpoints / meeting_place(request)
        for name in self._names.values():
            with suppress(OSError):
                self._filesystem.remove_file(directory / name)
        # Whichever rank comes last removes the directory.
        with suppress(OSError):
            self._filesystem.remove_directory(directory)


class _Memory(FileSystem):
    """Takes files into memory: rank 0 writes them."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self._open: dict[int, tuple[str, bytearray]] = {}

    def make_directory(self, path: Path) -> None:
        """Do nothing."""

    def open_new(self, path: Path) -> int:
        number = len(self.contents) + len(self._open)
        self._open[number] = (path.name, bytearray())
        return number

    def write(self, file: int, data: memoryview) -> int:
        self._open[file][1].extend(data)
        return len(data)

    def sync(self, file: int) -> None:
        """Do nothing."""

    def close(self, file: int) -> None:
        name, content = self._open.pop(file)
        self.contents[name] = bytes(content)

    def sync_directory(self, path: Path) -> None:
        """Do nothing."""
