"""The log of one rank: `ranks/<rank>/log.txt` in the run's directory, with the traceback of what it failed with.

The terminal has one voice: what all ranks would say there, rank 0 says.
"""

import logging
import traceback
from pathlib import Path
from typing import Final

logger = logging.getLogger("offloop")

FILE_NAME = "log.txt"
SAYS_ITSELF: Final = {"says_itself": True}
"""`extra` of what rank 0 does not know, so that any rank says it."""


class OneVoice(logging.Filter):
    """Of a rank other than 0: its log goes to its file alone, but for errors and what no other rank can say."""

    def __init__(self) -> None:
        """Be silent from now on."""
        super().__init__()
        # Written by the training thread, read by any thread that logs: one reference
        self.file: logging.Handler | None = None
        logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this rank says something. Any thread."""
        if record.levelno >= logging.ERROR or hasattr(record, "says_itself"):
            return True
        file = self.file
        if file is not None:
            file.handle(record)
        return False

    def close(self) -> None:
        """Let this process speak again. Calling it twice is fine."""
        logger.removeFilter(self)


class RankLog:
    """The log file of one rank. Opened by the training thread, closed by any; any thread may log."""

    def __init__(self, directory: Path, rank: int, voice: OneVoice | None = None) -> None:
        """Log into the run's directory from now on. A directory that cannot be written is no reason to end a run.

        Args:
            directory: Of the run; it is there.
            rank: Of this process.
            voice: Of a rank other than 0.
        """
        self._voice = voice
        self._handler: logging.Handler | None = None
        self._last_resort: logging.Handler | None = None
        path = directory / "ranks" / str(rank) / FILE_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            logger.warning("rank %d has no log file: %s", rank, error, extra=SAYS_ITSELF)
            return
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if not logger.hasHandlers():
            # Nobody has configured logging: with a handler of ours, Python would print no warnings any more
            self._last_resort = logging.lastResort
        for each in (self._handler, self._last_resort):
            if each is not None:
                logger.addHandler(each)
        if voice is not None:
            voice.file = self._handler

    def failed(self, error: BaseException) -> None:
        """Log what this rank fails with."""
        if self._handler is not None:
            text = "".join(traceback.format_exception(error)).rstrip()
            record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None)
            self._handler.handle(record)

    def close(self) -> None:
        """Close the file. Calling it twice is fine."""
        if self._voice is not None:
            self._voice.file = None
        if self._last_resort is not None:
            logger.removeHandler(self._last_resort)
        handler, self._handler = self._handler, None
        if handler is not None:
            logger.removeHandler(handler)
            handler.close()
