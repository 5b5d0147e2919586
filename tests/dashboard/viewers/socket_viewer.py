"""Talks to a real server over real sockets: plain HTTP, raw bytes, and a viewer that behaves as a page does."""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

from memory_link import PageModel
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_viewer import FromViewer
from offloop.dashboard.protocol.limits import SUBPROTOCOL
from offloop.dashboard.serving.server import Server

T = TypeVar("T")
PATIENCE: Final = 20.0
"""Seconds after which a test gives up waiting for something that must come."""


def on_loop(server: Server, look: Callable[[], T]) -> T:
    """Call a function on the server's event loop and return its result."""
    future: Future[T] = Future()
    server._post(lambda: future.set_result(look()))
    return future.result(PATIENCE)


def await_on_loop(server: Server, condition: Callable[[], bool]) -> None:
    """Wait until something is so, looked at on the server's event loop, turn by turn."""
    deadline = time.monotonic() + PATIENCE
    while not on_loop(server, condition):
        assert time.monotonic() < deadline, "it did not come"


def request(
    server: Server, path: str = "/", *, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request and return status, headers by their name in lower case, and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def exchange(port: int, token: str) -> tuple[str, str]:
    """Exchange a token for a cookie and a page's key, as a browser does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", f"/?token={token}")
        answer = connection.getresponse()
        cookie = str(answer.getheader("Set-Cookie")).partition(";")[0]
        return cookie, str(answer.getheader("Location")).removeprefix("./#key=")
    finally:
        connection.close()


def raw(server: Server, *parts: bytes, half_close: bool = False) -> bytes:
    """Send bytes and return everything that comes until the server closes the connection.

    Of several parts each but the first is sent when the answer to the one before has begun.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        received = b""
        try:
            for number, part in enumerate(parts):
                if number:
                    received += connection.recv(65_536)
                connection.sendall(part)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65_536):
                received += more
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was cut off, with something of ours unread
        return received


HANDSHAKE: Final = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": SUBPROTOCOL,
}


def handshake_head(server: Server, method: str = "GET", **headers: str | None) -> bytes:
    """Return the head of a websocket handshake; a header that is None is left out."""
    host = f"127.0.0.1:{server.port}"
    chosen: dict[str, str | None] = {"Host": host, **HANDSHAKE, "Authorization": f"Bearer {server.token}"}
    chosen |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in chosen.items() if value is not None]
    return f"{method} /ws HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")


class SocketViewer:
    """A viewer over a real websocket, with a thread that reads, draws and gives credit."""

    def __init__(
        self,
        address: str,
        *,
        shows: bool = True,
        draws: bool = True,
        token: str | None = None,
        cookie: str | None = None,
        keys: Sequence[str] = (),
        page: PageModel | None = None,
        **options: Any,
    ) -> None:
        """Open `address`, a page's address; with a token in it, unless `token` or `cookie` is given."""
        parts = urlsplit(address)
        base = f"{parts.scheme}://{parts.netloc}"
        headers = {"Cookie": cookie, "Origin": base} if cookie else {}
        if cookie is None:
            headers["Authorization"] = f"Bearer {token or parse_qs(parts.query)['token'][0]}"
        self.page = page or PageModel()
        self.page.keys = list(keys)
        self.closed: tuple[int, str] | None = None
        self.error: BaseException | None = None
        self.shows, self.draws = shows, draws
        self.pongs = 0
        self._changed = threading.Condition()
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(
            connect(
                f"{base.replace('http', 'ws', 1)}{parts.path}ws",
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                additional_headers=headers,
                compression=None,
                proxy=None,
                **options,
            )
        )
        self.say(self.page.hi())
        self._thread = threading.Thread(target=self._read, name="viewer")
        self._thread.start()

    def say(self, message: FromViewer) -> None:
        """Send a message."""
        self._socket.send(encode_message(message).decode())

    def _read(self) -> None:
        try:
            while True:
                data = self._socket.recv()
                with self._changed:
                    page, known = self.page, (self.page.run, len(self.page.series))
                    page.take(data.encode() if isinstance(data, str) else data, isinstance(data, str))
                    if isinstance(data, str) and data.startswith('{"type":"pong"'):
                        self.pongs += 1
                    with suppress(ConnectionClosed):  # what came before its end is still to be read
                        if self.draws and page.owes_drawn:
                            self.say(page.drawn())
                        if self.shows and (page.run, len(page.series)) != known and page.series:
                            self.say(page.show(sorted(page.series)))
                    self._changed.notify_all()
        except ConnectionClosed:
            code = self._socket.close_code
            self.closed = (1006 if code is None else code, self._socket.close_reason or "")
        except BaseException as error:
            self.error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def wait(self, condition: Callable[[PageModel], object]) -> None:
        """Wait until the page has something."""
        with self._changed:
            came = self._changed.wait_for(lambda: condition(self.page) or self.closed or self.error, PATIENCE)
            if self.error is not None:
                raise self.error
            assert came and condition(self.page), f"it did not come; closed: {self.closed}"

    def wait_closed(self) -> tuple[int, str]:
        """Wait until the server has closed the connection; return its code and reason."""
        self._thread.join(PATIENCE)
        if self.error is not None:
            raise self.error
        assert self.closed is not None, "it was not closed"
        return self.closed

    def close(self) -> None:
        """Leave."""
        self._stack.close()
        self._thread.join(PATIENCE)

    def __enter__(self) -> "SocketViewer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
