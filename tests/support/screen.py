"""A program on a pseudo-terminal, and what its screen shows."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pyte

PATIENCE: Final = 60.0


class Program:
    """A program that believes to be on a terminal."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        lines: int = 24,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._ours, self._theirs = pty.openpty()
        self._size(columns, lines)
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.before: list[Any] = termios.tcgetattr(self._theirs)
        self._changed = threading.Condition()
        # These would go before the size of the terminal.
        surroundings = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
            preexec_fn=self._take_terminal,
            env={**surroundings, "TERM": "xterm-256color", **(env or {})},
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _take_terminal(self) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSCTTY, 0)

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65_536):
                with self._changed:
                    self.written += data
                    self._stream.feed(data)
                    self._changed.notify_all()

    @property
    def text(self) -> str:
        """What the screen shows."""
        with self._changed:
            return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, *words: str, without: str = "\0") -> str:
        """Wait until the screen shows some words, and not another one; return what it shows."""

        return self.wait_until(
            lambda shown: all(word in shown for word in words) and without not in shown, f"{words}"
        )

    def wait_until(self, condition: Callable[[str], bool], what: str) -> str:
        """Wait until the screen shows something, and return what it shows."""
        with self._changed:
            came = self._changed.wait_for(lambda: condition("\n".join(self.screen.display)), PATIENCE)
        assert came, f"{what} did not come:\n{self.text}"
        return self.text

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the terminal."""
        with self._changed:
            self.screen.resize(lines, columns)
        self._size(columns, lines)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def end(self) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(PATIENCE)

    @property
    def is_as_it_was(self) -> bool:
        """True if the terminal echoes, has its first screen, and shows its cursor, as before the program."""
        shown = self.written.rfind(b"\x1b[?1049h") < max(0, self.written.rfind(b"\x1b[?1049l"))
        cursor = self.written.rfind(b"\x1b[?25l") < self.written.rfind(b"\x1b[?25h")
        return termios.tcgetattr(self._theirs) == self.before and shown and cursor

    def close(self) -> None:
        """End the program and the terminal."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._theirs)
        self._thread.join()
        os.close(self._ours)
