"""A TCP proxy that loses connections when a test says so: a network between a program and a server."""

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Final, Self

RESET: Final = struct.pack("ii", 1, 0)
"""Linger that makes closing a socket a reset."""


class CutProxy:
    """Passes bytes between its port and a server's. Threads of its own, so it works beside any event loop."""

    def __init__(self, port: int) -> None:
        """Lead to a port of this machine."""
        self._to = port
        self._is_open = True
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.accepted = 0
        self._start(self._accept)

    def url(self, url: str) -> str:
        """Return an address of the server, through this proxy."""
        return url.replace(f":{self._to}/", f":{self.port}/")

    def cut(self, *, keep_closed: bool = True) -> None:
        """Lose all connections; new ones are lost at once until `restore`."""
        with self._lock:
            self._is_open = not keep_closed
            for pair in self._pairs:
                for end in pair:
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        end.shutdown(socket.SHUT_RDWR)
        self._flows.set()

    def restore(self) -> None:
        """Let connections through again."""
        with self._lock:
            self._is_open = True

    def hold(self) -> None:
        """Keep connections and pass nothing on from the server, until `cut`."""
        self._flows.clear()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                if not self._is_open:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                # So that `hold` is felt after few bytes
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                self._pairs.append((near, far))
                self._start(self._pass_on, near, far, False)
                self._start(self._pass_on, far, near, True)

    def _pass_on(self, source: socket.socket, target: socket.socket, is_from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                if is_from_server:
                    self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for pair in self._pairs:
            for end in pair:
                end.close()
