"""ChildProcess: a child process, and the thread of this process that starts, serves and reaps it.

    event loop, any thread                 thread of the child                        child process
    ──────────────────────                 ───────────────────                        ─────────────
    send(message) ──append, one byte──>    encodes, writes to the socket ───────────> handles
    on_message(message) <───────────────── reads the socket <────────────────────────
    sys.stdout, sys.stderr <────────────── reads the pipes  <──────────────────────── print, tracebacks
    on_exit(how) <──────────────────────── reaps it

The child is a fresh interpreter, never a fork: it has no threads, locks or CUDA contexts of this process, and does
not run `__main__` again. It ends with this process, even with `kill -9`: Linux kills it when the thread that started
it ends, which therefore lives as long as the child. Elsewhere the child looks whether its parent is still there.
"""

import codecs
import contextlib
import contextvars
import errno
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import spawn
from typing import IO, Final, TextIO

from offloop.engine.bus.threads import Thread
from offloop.engine.errors import CallbackProcessError, describe
from offloop.engine.processes.messages import Frames, Message, ToParent, frame, to_parent

logger = logging.getLogger("offloop")

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from offloop.engine.processes.child import main; main(int(sys.argv[1]), int(sys.argv[3]))"
)
"""Program of the child: `-c`, so that it has no `__main__` of the user's."""
READ: Final = 1 << 18
"""Bytes read at once."""
FACTS_INTERVAL: Final = 0.1
"""Seconds between two looks whether the facts of the run have changed, while the child handles a batch."""
LAST_OUTPUT: Final = 0.5
"""Seconds to read the rest of the output after the child's end: a process that it has left may write for ever."""
LOOK_INTERVAL: Final = 0.25
"""Seconds between two looks whether the child has ended, on systems that do not tell."""


class ChildProcess:
    """A child process. `start` and `send` never wait; what the child says arrives in its thread."""

    def __init__(
        self,
        name: str,
        *,
        on_message: Callable[[ToParent], None],
        on_exit: Callable[[CallbackProcessError | None], None],
        on_over: Callable[[], None],
        on_look: Callable[[], None],
    ) -> None:
        """Prepare a child; nothing is started.

        Args:
            name: Of the callback.
            on_message: Called for each message of the child, in its thread.
            on_exit: Called once, in its thread, after the last message: with None if the process has ended by itself
                with exit code 0, else with what happened.
            on_over: Called after that, once `is_over` is True.
            on_look: Called every 0.1 s while `is_busy` and the child takes what it is sent, in its thread.
        """
        self.name = name
        self.is_busy = False  # written by any thread, read by the child's thread
        self.pid: int | None = None  # written by the child's thread
        self._on_message, self._on_exit, self._on_over, self._on_look = on_message, on_exit, on_over, on_look
        # Appended by any thread, emptied by the child's thread: both are atomic in CPython.
        self._outgoing: deque[Message | Callable[[], Message]] = deque()
        # Bytes that the socket has not taken yet; the child's thread only.
        self._unsent = memoryview(b"")
        self._kill = False  # written by any thread, read by the child's thread
        # Wakes the thread by a byte. Written by `start`; any thread writes to it.
        self._wake_writer: socket.socket | None = None
        self._thread = Thread(
            contextvars.copy_context().run, self._body, name=f"offloop-process-{name}", daemon=True
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._is_over = False

    # Any thread

    def start(self) -> None:
        """Start the thread, which starts the child.

        Raises:
            RuntimeError: The system gives no thread.
            OSError: It gives no file descriptors.
        """
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        try:
            self._thread.start()
        except RuntimeError:
            self._close_wakers()
            raise

    @property
    def has_started(self) -> bool:
        """True once `start` has returned."""
        return self._thread.ident is not None

    @property
    def is_over(self) -> bool:
        """True once the child has ended and `on_exit` was called."""
        return self._is_over

    @property
    def was_killed(self) -> bool:
        """True once `kill` was called."""
        return self._kill

    def send(self, message: Message | Callable[[], Message]) -> None:
        """Send a message, or one that the child's thread makes. Never blocks; nothing happens after the end."""
        self._outgoing.append(message)
        self._wake()

    def kill(self) -> None:
        """End the child at once. Never blocks; twice is fine."""
        self._kill = True
        self._wake()

    def join(self, timeout: float) -> None:
        """Wait until the child is reaped, at most so many seconds. Blocks."""
        if self.has_started:
            self._thread.join(timeout)

    def _wake(self) -> None:
        writer = self._wake_writer
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.send(b"\0")

    def _close_wakers(self) -> None:
        self._wake_reader.close()
        writer, self._wake_writer = self._wake_writer, None
        if writer is not None:
            writer.close()

    # The child's thread --------------------------------------------------------------------------

    def _body(self) -> None:
        """Body of the child's thread."""
        failure: CallbackProcessError | None = None
        try:
            try:
                ours, theirs = socket.socketpair()
                with ours:
                    with theirs:
                        process = self._spawn(theirs)
                    with process:
                        try:
                            failure = self._serve_process(process, ours)
                        except BaseException:
                            # It is not served any more, so it would never end.
                            process.kill()
                            raise
            except (OSError, ValueError) as error:
                if self.pid is not None:
                    raise
                failure = CallbackProcessError(
                    f"the process of {self.name} could not be started: {describe(error)}"
                )
        except Exception as error:
            logger.exception("the process of %s was lost", self.name)
            failure = CallbackProcessError(f"the process of {self.name} was lost: {describe(error)}")
        finally:
            self._close_wakers()
            self._outgoing.clear()
            # The report first: who sees that the child is over takes it for granted.
            self._on_exit(failure)
            self._is_over = True
            self._on_over()

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        executable = os.fsdecode(spawn.get_executable() or sys.executable or "")
        if not executable:
            raise OSError(
                errno.ENOENT, "sys.executable does not name a Python: multiprocessing.set_executable() does"
            )
        # A `Path` in sys.path is common, and ignored by imports.
        paths = [each for each in sys.path if isinstance(each, str)]
        arguments = [str(theirs.fileno()), json.dumps(paths), str(os.getpid())]
        process = subprocess.Popen(
            [executable, "-P", "-c", _START, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(theirs.fileno(),),
            # Ctrl-C on the terminal is for the parent alone.
            process_group=0,
        )
        self.pid = process.pid
        return process

    def _serve_process(
        self, process: subprocess.Popen[bytes], ours: socket.socket
    ) -> CallbackProcessError | None:
        """Carry messages and output until the child has ended; return what was wrong with its end."""
        self._process = process
        ours.setblocking(False)
        assert process.stdout is not None and process.stderr is not None
        outputs = {
            process.stdout: _Output("stdout"),
            process.stderr: _Output("stderr"),
        }
        frames = Frames()
        with selectors.DefaultSelector() as selector, _EndOf(process) as end:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            selector.register(ours, selectors.EVENT_READ)
            for pipe in outputs:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ)
            if end.descriptor is not None:
                selector.register(end.descriptor, selectors.EVENT_READ)
            is_open, look_at = True, 0.0
            while not end.has_come():
                if self._kill:
                    process.kill()
                if is_open:
                    self._write(ours, selector)
                for key, _ in selector.select(self._timeout(end)):
                    if key.fileobj is self._wake_reader:
                        self._wake_reader.recv(READ)
                    elif key.fileobj is ours:
                        is_open = self._read(ours, frames) and is_open
                        if not is_open:
                            selector.unregister(ours)
                    elif (output := outputs.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                        output.copy(key.fileobj)
                        if output.is_over:
                            selector.unregister(key.fileobj)
                # A child that takes nothing, because it is stopped or computes in C, is told once it does again.
                if self.is_busy and not self._unsent and time.monotonic() >= look_at:
                    look_at = time.monotonic() + FACTS_INTERVAL
                    self._on_look()
            if is_open:
                # What it has sent before its end.
                self._read(ours, frames)
        self._copy_rest(outputs)
        return self._ending(process)

    def _timeout(self, end: "_EndOf") -> float | None:
        if self._kill or end.descriptor is None:
            return LOOK_INTERVAL
        return FACTS_INTERVAL if self.is_busy else None

    def _write(self, ours: socket.socket, selector: selectors.BaseSelector) -> None:
        """Write what the socket takes; the selector then tells when it takes more."""
        try:
            while self._unsent or self._outgoing:
                if not self._unsent:
                    message = self._outgoing.popleft()
                    self._unsent = memoryview(frame(message() if callable(message) else message))
                self._unsent = self._unsent[ours.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            # The child has ended, or is about to.
            self._unsent = memoryview(b"")
            self._outgoing.clear()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        selector.modify(ours, wanted)

    def _read(self, ours: socket.socket, frames: Frames) -> bool:
        """Read and pass on what there is; False at the end."""
        while True:
            try:
                data = ours.recv(READ)
            except BlockingIOError:
                return True
            except OSError:
                return False
            for body in frames.feed(data):
                self._on_message(to_parent(body))
            if not data:
                return False

    def _copy_rest(self, outputs: "dict[IO[bytes], _Output]") -> None:
        """Copy what the child has written before its end, which is in the pipes by now."""
        deadline = time.monotonic() + LAST_OUTPUT
        for pipe, output in outputs.items():
            while output.copy(pipe) and time.monotonic() < deadline:
                pass
            output.finish()

    def _ending(self, process: subprocess.Popen[bytes]) -> CallbackProcessError | None:
        code = process.wait()
        if code == 0:
            return None
        how = f"exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"{signal.Signals(-code).name} (exit code {code})"
        hint = ""
        if code == -signal.SIGKILL and not self._kill:
            hint = "; that is how Linux ends a process for want of memory"
        return CallbackProcessError(
            f"the process of {self.name} ended with {how}{hint}: the callback gets no more events, and is not "
            "restarted",
            exit_code=code,
        )


class _EndOf:
    """Tells when a process has ended: by a file descriptor on Linux, else by looking."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.descriptor: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self.descriptor = os.pidfd_open(process.pid)

    def has_come(self) -> bool:
        """Return whether the process has ended; it is then reaped."""
        return self._process.poll() is not None

    def __enter__(self) -> "_EndOf":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class _Output:
    """One of the child's output streams, on its way to that of this process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.is_over = False

    def copy(self, pipe: IO[bytes]) -> bool:
        """Copy a part of what there is; False if there is nothing."""
        try:
            data = os.read(pipe.fileno(), READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.is_over = not data
        self._show(self._decoder.decode(data))
        return bool(data)

    def finish(self) -> None:
        """Write what an unfinished character leaves."""
        self._show(self._decoder.decode(b"", final=True))

    def _show(self, text: str) -> None:
        # Looked up each time, as `print` does: a notebook or a test may have replaced it, by something that fails.
        stream: TextIO | None = getattr(sys, self._name)
        if text and stream is not None:
            with contextlib.suppress(Exception):
                try:
                    stream.write(text)
                except UnicodeEncodeError as error:
                    stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
                stream.flush()
