"""Files of samples: how the contents of texts and pictures get into a run's directory, and out of it.

    any thread            memory            the event log's thread       directory of the run        readers
    ──────────            ──────            ──────────────────────       ────────────────────        ───────
    publish ──keep──────> contents ───────> write ─────────────────────> samples/<sha256>.png ─────> read_file
       └─ then the event ─────────────────────── then its line ────────> events.jsonl

Publishing only keeps the content in memory. The event log writes it before the event's line, so whoever reads of a
sample finds its file; both survive that the process is killed, and a power cut from the next checkpoint on. A file is
named after the checksum of its content: one that was half written, or has changed, is never taken for it.

A run without a directory keeps the contents in memory.
"""

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Final

from offloop.engine.errors import EventError, SampleFileError
from offloop.engine.events import Event
from offloop.engine.samples.content import READ_FLAGS, file_name, open_folder, read_file
from offloop.engine.samples.events import PictureSample, TableSample, TextSample, pictures_of, take_content
from offloop.engine.samples.picture import Picture

logger = logging.getLogger("offloop")

MEMORY_BYTES: Final = 64 * 1024 * 1024
"""Most bytes of contents in memory: those of a run without a directory, and those that wait for a disk."""

_NEW_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class SampleFiles:
    """Contents of the samples that a run of this process has published; `Run.samples`. Any thread.

    What the event log calls is not for others: `write` and `make_durable`.
    """

    def __init__(self, directory: Path | None, *, has_log: bool = True) -> None:
        """Keep nothing yet.

        Args:
            directory: Of the run; None to keep contents in memory.
            has_log: False where no event log takes the contents, as on ranks other than the first: none are kept.
        """
        self._directory = directory
        self._has_log = has_log
        self._lock = threading.Lock()  # guards the next three, never while a disk is used
        # By name of the file, oldest first.
        self._contents: dict[str, bytes] = {}
        self._bytes = 0
        self._dropped = 0
        # The event log's thread: names of files that a power cut could take, and whether writing fails.
        self._unsynced: set[str] = set()
        self._is_failing = False

    def keep(self, event: Event) -> None:
        """Take the contents out of an event that is being published, if it is a sample. Never waits for a disk.

        Raises:
            EventError: A picture has no content, as in a sample that was read from a log, or another one.
        """
        if not isinstance(event, TextSample | PictureSample | TableSample):
            return
        for picture in pictures_of(event):
            if not picture.data:
                raise EventError(
                    f"{event.key}: a picture of a published sample has no content any more: publish "
                    "event.picture.read(run.dir)"
                )
            picture.check_content()
        for sha256, (media_type, data) in take_content(event).items():
            self._add(file_name(sha256, media_type), data)

    def _add(self, name: str, data: bytes) -> None:
        if not self._has_log:
            return
        with self._lock:
            if name in self._contents:
                return
            self._contents[name] = data
            self._bytes += len(data)
            is_first = not self._dropped
            while self._bytes > MEMORY_BYTES and len(self._contents) > 1:
                oldest = next(iter(self._contents))
                self._bytes -= len(self._contents.pop(oldest))
                self._dropped += 1
            is_first = is_first and self._dropped > 0
        if is_first:
            why = "the run has no directory" if self._directory is None else "the disk does not take them"
            logger.warning(
                "the oldest pictures and long texts of the run's samples are dropped: %s, and they exceed %d MiB",
                why,
                MEMORY_BYTES // 2**20,
            )

    def read(self, sample: Picture | TextSample) -> bytes:
        """Return the encoded picture, or the whole text in UTF-8. Blocks, if it is in a file.

        Raises:
            SampleFileError: It is gone, or its file is not what was published.
        """
        if isinstance(sample, TextSample) and not sample.sha256:
            return sample.text.encode()
        if isinstance(sample, Picture) and sample.data:
            return sample.data
        with self._lock:
            data = self._contents.get(file_name(sample.sha256, sample.media_type))
        if data is not None:
            return data
        if self._directory is None:
            raise SampleFileError(
                f"it is kept no longer: the run has no directory, and {MEMORY_BYTES // 2**20} MiB of newer ones"
            )
        if isinstance(sample, Picture):
            return sample.read(self._directory)
        return read_file(self._directory, sample.sha256, sample.media_type, sample.size)

    # The event log's thread ----------------------------------------------------------------------

    def write(self) -> None:
        """Write the contents that wait. Blocks. What a disk does not take waits for the next call.

        Raises:
            OSError: The first failure since the last success.
        """
        if self._directory is None or not self._contents:
            return
        with self._lock:
            waiting = list(self._contents.items())
        try:
            with open_folder(self._directory, create=True) as folder:
                for name, data in waiting:
                    _write(folder, name, data)
                    self._unsynced.add(name)
                    with self._lock:
                        if self._contents.pop(name, None) is not None:
                            self._bytes -= len(data)
        except OSError as error:
            if self._is_failing:
                return
            self._is_failing = True
            error.add_note(
                "offloop: until it can be written again, pictures and long texts of samples wait in memory"
            )
            raise
        self._is_failing = False

    def make_durable(self) -> None:
        """Block until the written files survive a power cut.

        Raises:
            OSError: They cannot be made durable.
        """
        if self._directory is None or not self._unsynced:
            return
        with open_folder(self._directory, create=False) as folder:
            for name in tuple(self._unsynced):
                # One that somebody has removed needs nothing.
                with contextlib.suppress(FileNotFoundError):
                    file = os.open(name, READ_FLAGS, dir_fd=folder)
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)
            os.fsync(folder)
        self._unsynced.clear()


def _write(folder: int, name: str, data: bytes) -> None:
    """Create or replace a file, whole."""
    temporary = f".{name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=folder)
    file = os.open(temporary, _NEW_FLAGS, 0o666, dir_fd=folder)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
