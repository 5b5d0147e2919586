"""The log of one rank: `ranks/<rank>/log.txt` in the run's directory, with the traceback of what it failed with."""

import logging
import traceback
from pathlib import Path

logger = logging.getLogger("offloop")

FILE_NAME = "log.txt"


class RankLog:
    """The log file of one rank. Opened by the training thread, closed by any; any thread may log."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Log into the run's directory from now on. A directory that cannot be written is no reason to end a run.

        Args:
            directory: Of the run; it is there.
            rank: Of this process.
        """
        self._handler: logging.Handler | None = None
        self._last_resort: logging.Handler | None = None
        path = directory / "ranks" / str(rank) / FILE_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            logger.warning("rank %d has no log file: %s", rank, error)
            return
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if not logger.hasHandlers():
            # Nobody has configured logging: with a handler of ours, Python would print no warnings any more
            self._last_resort = logging.lastResort
        for each in (self._handler, self._last_resort):
            if each is not None:
                logger.addHandler(each)

    def failed(self, error: BaseException) -> None:
        """Log what this rank fails with."""
        if self._handler is not None:
            text = "".join(traceback.format_exception(error)).rstrip()
            record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None)
            self._handler.handle(record)

    def close(self) -> None:
        """Close the file. Calling it twice is fine."""
        if self._last_resort is not None:
            logger.removeHandler(self._last_resort)
        handler, self._handler = self._handler, None
        if handler is not None:
            logger.removeHandler(handler)
            handler.close()
