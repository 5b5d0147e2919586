"""Server: one port for page and websocket, in a thread with an asyncio loop of its own.

The runs' event loops, whatever they are, never serve a viewer: a host that holds its loop for a while does
not hold the page up, and Stop works while a handler hangs. The websockets library does the handshake, keepalive,
limits and closing; what is here decides about requests, hands out the page and ties connections to the hub.
"""

import asyncio
import contextlib
import errno
import http
import logging
import socket
import ssl as tls
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from offloop.dashboard.history import HISTORY_BYTES
from offloop.dashboard.hub import FRAME_INTERVAL, Hub
from offloop.dashboard.live_run import LiveRun
from offloop.dashboard.page import NOT_BUILT, Asset, Page
from offloop.dashboard.protocol import MAX_MESSAGE, SUBPROTOCOL, Role
from offloop.dashboard.security import (
    SECURITY_HEADERS,
    Gate,
    content_security_policy,
    new_token,
    user_key,
)
from offloop.engine import Event, Run, Subscription, TrainStart

logger = logging.getLogger("offloop")
# What strangers send must not fill anybody's log: the library's own records are for those who look for them.
_library_logger = logging.getLogger("offloop.dashboard.websockets")
_library_logger.setLevel(logging.CRITICAL)

DEFAULT_PORT: Final = 8321
PORTS_TRIED: Final = 20
"""Ports tried after the default one, where others are taken."""
GOODBYE: Final = 1.0
"""Seconds that viewers have to take the last words of a run."""
SEND_BUFFER: Final = 128 * 1024
"""Bytes that the kernel keeps for a viewer: by default megabytes, which are seconds of old charts."""
HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds after which a connection that has not said what it wants is closed."""
FOR_GOOD: Final = "public, max-age=31536000, immutable"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What one server is made with; see `Dashboard` for what each means."""

    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = None
    read_only: bool = False
    frames_per_second: float = 1 / FRAME_INTERVAL
    history_bytes: int = HISTORY_BYTES
    max_viewers: int = 64
    allow_hosts: tuple[str, ...] = ()
    frame_ancestors: tuple[str, ...] = ()
    compression: bool = False
    ssl: tls.SSLContext | None = None


class Server:
    """Serves the page and the runs of this process. Any thread may call its methods."""

    def __init__(self, options: Options) -> None:
        """Start serving. Blocks until the port is open: milliseconds.

        Raises:
            OSError: The address cannot be listened on.
        """
        self.options = options
        self.port = 0  # written by the server's thread before `__init__` returns, like `hub` and `_loop`
        self.token = options.token or new_token()
        self.read_only_token = self.token if options.read_only else new_token()
        self.page = Page.load()
        self.hub: Hub
        self._gate = Gate(
            bound_to=options.host,
            token=new_token() if options.read_only else self.token,
            read_only_token=self.read_only_token,
            key=user_key(),
            allow_hosts=options.allow_hosts,
        )
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: dict[Run, asyncio.Task[None]] = {}
        self._roles: dict[ServerConnection, Role] = {}  # of those let in that have not begun yet
        self._error: OSError | None = None
        started = threading.Event()
        # A daemon: a viewer that does not go must never keep the interpreter from leaving.
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="offloop-dashboard", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    # From any thread

    @property
    def url(self) -> str:
        """Address of the page, with the token that gives the most that this server gives."""
        return f"{self._base}?token={self.token}"

    @property
    def read_only_url(self) -> str:
        """Address of the page for those who may look but not touch."""
        return f"{self._base}?token={self.read_only_token}"

    @property
    def _base(self) -> str:
        host = self.options.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        elif ":" in host:
            host = f"[{host}]"
        return f"{'https' if self.options.ssl else 'http'}://{host}:{self.port}/"

    @property
    def is_serving(self) -> bool:
        """True until `close`."""
        return self._thread.is_alive()

    def add_run(self, run: Run, start: TrainStart, subscription: Subscription[Event]) -> None:
        """Show a run. Any thread; does not wait."""
        self._post(lambda: self._follow(run, start, subscription))

    def finish_run(self, run: Run) -> None:
        """Wait until the hub has taken everything that a run has said; it is over. Blocks its thread, briefly."""
        done = threading.Event()
        self._post(lambda: self._when_followed(run, done.set))
        done.wait(GOODBYE)

    def close(self, reason: str) -> None:
        """Tell all viewers, close everything, end the thread. Blocks at most about three seconds; twice is fine."""

        def stop() -> None:
            self.hub.say_goodbye(1001, reason)
            self._stop.set()

        if self._thread.is_alive():
            self._post(stop)
            self._thread.join()

    def _post(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function)

    # The server's own thread

    def _run(self, started: threading.Event) -> None:
        try:
            asyncio.run(self._main(started), debug=False)
        finally:
            started.set()

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.hub = Hub(
            post=self._post,
            page=None if self.page is None else self.page.page_hash,
            frame_interval=1 / self.options.frames_per_second,
        )
        try:
            server = await self._listen()
        except OSError as error:
            self._error = error
            return
        self._spawn(self.hub.beat())
        started.set()
        await self._stop.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self.hub.wait_for_nobody()
        server.close(close_connections=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await server.wait_closed()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> WebsocketServer:
        options = self.options
        ports: Sequence[int] = [options.port] if options.port is not None else ()
        for port in ports or range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED + 1):
            try:
                server = await serve(
                    self._serve,
                    options.host,
                    port,
                    process_request=self._process_request,
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    compression="deflate" if options.compression else None,
                    server_header=None,
                    open_timeout=HANDSHAKE_TIMEOUT,
                    close_timeout=2.0,
                    max_size=MAX_MESSAGE,
                    max_queue=16,
                    write_limit=32 * 1024,
                    ssl=options.ssl,
                    logger=_library_logger,
                )
            except OSError as error:
                if ports or error.errno != errno.EADDRINUSE:
                    raise
                continue
            self.port = server.sockets[0].getsockname()[1]
            return server
        last = DEFAULT_PORT + PORTS_TRIED
        raise OSError(errno.EADDRINUSE, f"ports {DEFAULT_PORT} to {last} are all taken; give port=0 for any")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task

    def _follow(self, run: Run, start: TrainStart, subscription: Subscription[Event]) -> None:
        live = LiveRun(run, start, history_bytes=self.options.history_bytes)
        self._followers[run] = self._spawn(self.hub.follow(live, subscription))

    def _when_followed(self, run: Run, tell: Callable[[], None]) -> None:
        follower = self._followers.pop(run, None)
        if follower is None:
            tell()
        else:
            follower.add_done_callback(lambda _: tell())

    # Requests

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a request for a file, or let a websocket handshake go on."""
        headers = request.headers
        hosts = headers.get_all("Host")
        if not self._gate.allows_host(hosts):
            return _answer(421, "This server does not answer under this name.")
        try:
            address = urlsplit(request.path)
        except ValueError:
            return _answer(400, "Malformed address.")
        role = self._gate.role_of(headers.get_all("Cookie"), headers.get_all("Authorization"))
        if request.method not in ("GET", "HEAD"):
            return _answer(405, "Only GET and HEAD.", {"Allow": "GET, HEAD"})
        if address.path == "/ws":
            return self._admit(connection, headers, hosts[0], role)
        response = self._file(headers, address.path, address.query, role)
        if request.method == "HEAD":
            response.body = b""
        return response

    def _admit(
        self, connection: ServerConnection, headers: Headers, host: str, role: Role | None
    ) -> Response | None:
        """Refuse a websocket, or let it in and note its role."""
        has_bearer = bool(headers.get_all("Authorization"))
        if not self._gate.allows_origin(headers.get_all("Origin"), host, has_bearer=has_bearer):
            return _answer(403, "A websocket is opened by the page of this very server, or with a token.")
        if role is None:
            return _answer(401, "Open the page with the address that the run has printed.")
        if self.hub.viewers >= self.options.max_viewers:
            return _answer(503, f"There are {self.hub.viewers} viewers already.")
        self._roles[connection] = role
        return None

    def _file(self, headers: Headers, path: str, query: str, role: Role | None) -> Response:
        if path == "/api/status":
            if role is None:
                return _answer(401, "Not authorised.")
            status = {
                "viewers": self.hub.viewers,
                "full": self.hub.viewers >= self.options.max_viewers,
                "role": role,
                "server": self.hub.id,
            }
            return _answer(200, msgspec.json.encode(status), {"Content-Type": "application/json"})
        if path == "/" and "token=" in query:
            # Right or wrong, the token leaves the address bar; without a cookie the page says what is missing.
            more = {"Location": "./"}
            if (given := self._gate.role_in_query(query)) is not None:
                more["Set-Cookie"] = self._gate.cookie(given, secure=self.options.ssl is not None)
            return _answer(303, b"", more)
        if self.page is None:
            return self._asset(headers, NOT_BUILT, 503, "no-store")
        asset = self.page.assets.get(path)
        if asset is None:
            return _answer(404, "There is nothing here.")
        return self._asset(headers, asset, 200, "no-cache" if path == "/" else FOR_GOOD)

    def _asset(self, headers: Headers, asset: Asset, status: int, keep: str) -> Response:
        more = {
            "Content-Type": asset.content_type,
            "Cache-Control": keep,
            "Content-Security-Policy": content_security_policy(self.options.frame_ancestors),
            "ETag": asset.etag,
            "Vary": "Accept-Encoding",
        }
        if status == 200 and asset.etag in ",".join(headers.get_all("If-None-Match")):
            return _answer(304, b"", more)
        if "gzip" in ",".join(headers.get_all("Accept-Encoding")):
            return _answer(status, asset.gzipped, more | {"Content-Encoding": "gzip"})
        return _answer(status, asset.body, more)

    async def _serve(self, connection: ServerConnection) -> None:
        """Serve one websocket to its end."""
        role = self._roles.pop(connection)
        with contextlib.suppress(OSError):
            raw = connection.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        peer = connection.remote_address
        try:
            await self.hub.serve(_WebsocketLink(connection), role=role, address=str(peer[0]) if peer else "?")
        except Exception:
            logger.exception("the live page has a defect: a viewer was cut off")
            raise


class _WebsocketLink:
    """A websocket, as the hub sees it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    async def receive(self) -> str | bytes | None:
        try:
            return await self._connection.recv()
        except ConnectionClosed:
            return None

    async def send(self, data: bytes, *, text: bool) -> bool:
        try:
            await self._connection.send(data, text=text)
        except ConnectionClosed:
            return False
        return True

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(code, reason)


def _answer(status: int, body: bytes | str, more: dict[str, str] | None = None) -> Response:
    """Make a response. Text is for people who look at the wire."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    chosen = {
        "Content-Type": "text/plain; charset=utf-8",
        "Cache-Control": "no-store",
        **SECURITY_HEADERS,
        **(more or {}),
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    return Response(status, http.HTTPStatus(status).phrase, Headers(chosen), body)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the live page has a defect", exc_info=error)
