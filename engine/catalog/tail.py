"""EventTail: follows the log of a run that another process writes."""

import os
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.catalog.files import open_regular, read_range
from offloop.engine.encoding import decode
from offloop.engine.events import Event
from offloop.engine.observers.event_log import FILE_NAME, AttemptCounter

CHUNK: Final = 1024 * 1024
"""Bytes read at once, while lines are shorter."""
MOST_BYTES: Final = 16 * 1024 * 1024
"""Bytes of lines after which one call of `read` returns."""
LONGEST_LINE: Final = 64 * 1024 * 1024
"""Bytes of the longest line that is decoded."""
TOO_LONG: Final = "it is longer than 64 MiB"
REMEMBERED: Final = 4096
"""Bytes before the position by which a log is recognized."""


class LogPlace(msgspec.Struct, frozen=True):
    """Where an `EventTail` stands in a log. It can be encoded, so that another one continues there."""

    position: int
    """Bytes of the log that were read."""
    skipped: int
    """Lines among them that hold no event."""
    attempt: int
    """Attempt of the last event."""
    seq: int
    """`seq` of the last event; -1 before there is one."""
    start: int
    """Where `content` begins."""
    content: bytes
    """Some of the last bytes that were read, by which the log is recognized."""


class EventTail:
    """Reads the events of a run as its log grows. One thread at a time; everything blocks on the file system.

    The log is opened for each call, so an idle tail holds no file.
    """

    def __init__(self, directory: Path | str, *, place: LogPlace | None = None) -> None:
        """Follow the `events.jsonl` of a directory.

        Args:
            directory: The run's. The file may appear later.
            place: Where to continue; default None, at the first line. If the log is another one by now, the first
                `read` begins with its first line, and says so by `restarted`.
        """
        self.path = Path(directory) / FILE_NAME
        self.skipped = 0
        """Lines so far that hold no event, or are longer than 64 MiB."""
        self.why_skipped = ""
        """Why the first of them since this tail began was skipped; empty without one."""
        self.restarted = False
        """True if the last `read` found another log, or one that was cut back as a resumed run does it: its events
        begin with the first of the log, and what was read before no longer counts."""
        self.position = 0
        """Bytes of the log that were read."""
        self.size = 0
        """Bytes of the log at the last `read`."""
        self._attempts = AttemptCounter()
        self._is_in_long_line = False
        # None until the log was opened for the first time
        self._inode: tuple[int, int] | None = None
        # Where the last bytes were that were read, and what they were
        self._remembered: tuple[int, bytes] = (0, b"")
        if place is not None:
            self.position, self.skipped = place.position, place.skipped
            self._attempts = AttemptCounter(place.attempt, place.seq)
            self._remembered = (place.start, place.content)

    @property
    def place(self) -> LogPlace | None:
        """Where a later tail can continue; None in the middle of a line that is too long."""
        if self._is_in_long_line:
            return None
        attempts = self._attempts
        return LogPlace(self.position, self.skipped, attempts.attempt, attempts.seq, *self._remembered)

    def read(self, limit: int = 10_000) -> list[tuple[int, Event]]:
        """Return the events that were appended since the last call, each with the number of its attempt.

        A last line without its newline waits for the next call. Events of unknown types are returned as
        `UnknownEvent`; other lines are skipped and counted. A call reads about 16 MiB at most, so fewer events than
        `limit` do not mean that there are no more: compare `position` and `size`.

        Args:
            limit: Most events to return, at least 1.

        Returns:
            In order; empty if nothing was appended, or the log is not there yet.

        Raises:
            OSError: The directory is gone, or the log cannot be read. A later call continues.
        """
        self.restarted = False
        try:
            file, state = open_regular(self.path)
        except FileNotFoundError:
            # Raises where the directory is gone, too
            os.stat(self.path.parent)
            if self.position:
                self._restart()
            self.size = 0
            return []
        try:
            self.size = state.st_size
            inode = (state.st_dev, state.st_ino)
            if self.position and (inode != (self._inode or inode) or not self._is_same(file)):
                self._restart()
            self._inode = inode
            return self._read(file, limit)
        finally:
            os.close(file)

    def _read(self, file: int, limit: int) -> list[tuple[int, Event]]:
        events: list[tuple[int, Event]] = []
        stop = self.position + MOST_BYTES
        while len(events) < limit and self.position < stop:
            chunk = self._whole_lines(file)
            if not chunk:
                break
            start = 0
            while start < len(chunk) and len(events) < limit:
                end = chunk.index(b"\n", start)
                self._take(chunk[start:end], events)
                start = end + 1
            self._advance(chunk[:start])
        return events

    def _whole_lines(self, file: int) -> bytes:
        """Return some lines from the position on, each with its newline; empty if none is whole. Skips long ones."""
        chunk = bytearray()
        while more := read_range(file, self.position + len(chunk), CHUNK):
            newline = more.find(b"\n") if self._is_in_long_line else more.rfind(b"\n")
            if self._is_in_long_line:
                self._advance(more[: newline + 1] if newline >= 0 else more)
                if newline >= 0:
                    self._is_in_long_line = False
                    self._skip(TOO_LONG)
                continue
            chunk += more
            if newline >= 0:
                return bytes(chunk[: len(chunk) - len(more) + newline + 1])
            if len(chunk) > LONGEST_LINE:
                self._is_in_long_line = True
                self._advance(bytes(chunk))
                chunk.clear()
        return b""

    def _take(self, line: bytes, events: list[tuple[int, Event]]) -> None:
        if len(line) > LONGEST_LINE:
            self._skip(TOO_LONG)
            return
        try:
            event = decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            self._skip(str(error))
            return
        events.append((self._attempts.take(event), event))

    def _skip(self, why: str) -> None:
        self.skipped += 1
        self.why_skipped = self.why_skipped or why

    def _advance(self, read: bytes) -> None:
        """Go past bytes that were read, and remember the last of them."""
        self.position += len(read)
        # Those of the last line's begin, where it is long: its end may be the same in another log
        begin = max(read.rfind(b"\n", 0, max(len(read) - 1, 0)) + 1, 0)
        begin = min(begin, max(len(read) - REMEMBERED, 0))
        self._remembered = (self.position - len(read) + begin, read[begin : begin + REMEMBERED])

    def _is_same(self, file: int) -> bool:
        """Return whether the log still begins with what was read of it."""
        start, content = self._remembered
        return self.size >= self.position and read_range(file, start, len(content)) == content

    def _restart(self) -> None:
        self.position = self.skipped = 0
        self._attempts = AttemptCounter()
        self._is_in_long_line = False
        self.restarted = True
