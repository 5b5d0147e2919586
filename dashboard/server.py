"""Server: one port for the page and its websockets, in a thread with its own asyncio loop.

The event loops of runs never serve viewers: a host that blocks its loop does not block the page, and Stop works while
a handler hangs. The websockets library does the handshake, keepalive, limits and closing; this module answers
requests, serves the page and connects websockets to the hub.
"""

import asyncio
import contextlib
import contextvars
import errno
import functools
import http
import logging
import os
import socket
import ssl as tls
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import StatusLike, Subprotocol

from offloop.dashboard.connection import short
from offloop.dashboard.history import HISTORY_BYTES
from offloop.dashboard.hub import FRAME_INTERVAL, Hub
from offloop.dashboard.live_run import LiveRun
from offloop.dashboard.milestones import MILESTONE_BYTES
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
from offloop.engine.bus.threads import Latch, Thread

logger = logging.getLogger("offloop")
# Malformed requests from strangers must not fill the log: a user who wants the library's records lowers this level.
_library_logger = logging.getLogger("offloop.dashboard.websockets")
_library_logger.setLevel(logging.CRITICAL)

DEFAULT_PORT: Final = 8321
PORTS_TRIED: Final = 20
"""Ports tried after the default one if that is taken."""
GOODBYE: Final = 1.0
"""Seconds for viewers to receive the last messages of a run."""
SEND_BUFFER: Final = 128 * 1024
"""Bytes of a viewer's kernel buffer: the default is megabytes, which hold seconds of outdated charts."""
HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for a connection to send its request and to receive the answer."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds for a websocket to receive its close frame and answer it; then it is aborted."""
MAX_HALF_OPEN: Final = 64
"""Most connections that have sent no request yet. One more aborts the oldest of them: a real client sends its request
within milliseconds, so the oldest is idle."""
MESSAGES_READ_AHEAD: Final = 4
"""Messages of a viewer that wait to be handled; beyond that its socket is not read."""
FOR_GOOD: Final = "public, max-age=31536000, immutable"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a server; see `Dashboard` for their meaning."""

    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = None
    read_only: bool = False
    frames_per_second: float = 1 / FRAME_INTERVAL
    history_bytes: int = HISTORY_BYTES
    milestone_bytes: int = MILESTONE_BYTES
    max_viewers: int = 64
    allow_hosts: tuple[str, ...] = ()
    frame_ancestors: tuple[str, ...] = ()
    compression: bool = False
    ssl: tls.SSLContext | None = None


class Server:
    """Serves the page and the runs of this process. Any thread may call its methods."""

    def __init__(self, options: Options) -> None:
        """Start serving. Blocks for milliseconds, until the port is open.

        Raises:
            OSError: The server cannot listen on the address.
        """
        self.options = options
        # The server's thread writes `port`, `hub`, `_loop`, `_stop`, `_listening` and `_error`. Other threads read
        # them only after `__init__`, which waits for the latch that the server's thread opens behind them.
        self.port = 0
        self.token = options.token or new_token()
        self.read_only_token = self.token if options.read_only else new_token()
        self.page = Page.load()
        self.hub: Hub
        self._gate = Gate(
            bound_to=options.host,
            token=self.token,
            read_only_token=self.read_only_token,
            key=user_key(),
            read_only=options.read_only,
            # The printed address contains this name, so requests for it must be accepted.
            allow_hosts=(*options.allow_hosts, *([socket.gethostname()] if self._is_wildcard else [])),
        )
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()
        self._stop: asyncio.Event
        # Only the server's thread uses these, and a forked child, in which no other thread lives.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: dict[Run, asyncio.Task[None]] = {}
        # Connections without an answer yet, oldest first.
        self._half_open: dict[_Connection, None] = {}
        # All open connections.
        self._connections: set[_Connection] = set()
        # File descriptors of the listening sockets.
        self._listening: list[int] = []
        self._error: BaseException | None = None
        # The reason given to `close`.
        self._reason = ""
        started = Latch()
        # A daemon, so that a viewer that does not disconnect cannot keep the interpreter alive.
        self._thread = Thread(self._run, started, name="offloop-dashboard", daemon=True)
        self._thread.start()
        try:
            started.wait()
        except BaseException:
            # Ctrl-C: the caller never receives this server, so close it here.
            started.wait()
            if self._error is None:
                self.close("interrupted")
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    # From any thread

    @property
    def url(self) -> str:
        """Address of the page, with the token of the highest role that this server grants."""
        return f"{self._base}?token={quote(self.token, safe='')}"

    @property
    def read_only_url(self) -> str:
        """Address of the page for viewers who may watch but not steer."""
        return f"{self._base}?token={quote(self.read_only_token, safe='')}"

    @property
    def _base(self) -> str:
        host = self.options.host
        if self._is_wildcard:
            host = socket.gethostname()
        elif ":" in host:
            host = f"[{host}]"
        return f"{'https' if self.options.ssl else 'http'}://{host}:{self.port}/"

    @property
    def _is_wildcard(self) -> bool:
        return self.options.host in ("0.0.0.0", "::", "")

    @property
    def is_serving(self) -> bool:
        """True until `close`."""
        return not self._thread.is_over

    def add_run(self, run: Run, start: TrainStart, subscription: Subscription[Event]) -> None:
        """Show a run while it runs. Any thread; does not wait. After `close` it only closes the subscription."""
        optimizers = tuple(run.trainer.optimizers)
        if not self._post(lambda: self._follow(run, start, optimizers, subscription)):
            subscription.close()

    def finish_run(self, run: Run) -> None:
        """Wait until the hub has read all events of a run that has ended. Blocks its thread for at most a second."""
        done = threading.Event()
        if self._post(lambda: self._when_followed(run, done.set)):
            done.wait(GOODBYE)

    def close(self, reason: str) -> None:
        """Notify all viewers, close everything, end the thread. Blocks at most about three seconds; twice is fine."""

        def stop() -> None:
            self._reason = reason
            # First, so that the closing thread does not wait forever if the goodbye fails.
            self._stop.set()
            self.hub.say_goodbye(1001, reason)

        if not self._thread.is_over:
            self._post(stop)
            self._thread.join()

    def _post(self, function: Callable[[], None]) -> bool:
        try:
            # Not in the caller's context: there anyio may believe that this event loop is trio's.
            self._loop.call_soon_threadsafe(function, context=self._context)
        except RuntimeError:
            # The loop is closed.
            return False
        return True

    # The server's own thread

    def _run(self, started: Latch) -> None:
        try:
            asyncio.run(self._main(started), debug=False)
        except BaseException as error:
            if started.is_open:
                raise
            # Without free file descriptors there is no event loop.
            self._error = error
        finally:
            started.open()

    async def _main(self, started: Latch) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.hub = Hub(
            post=self._post,
            page=None if self.page is None else self.page.page_hash,
            frame_interval=1 / self.options.frames_per_second,
        )
        try:
            server = await self._listen()
        except Exception as error:
            # Not only OSError: a malformed host name is a UnicodeError.
            self._error = error
            return
        self._spawn(self.hub.beat())
        started.open()
        await self._stop.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self.hub.wait_until_empty()
        _open_servers.discard(self)
        await self._stop_accepting(server)
        server.close(close_connections=True, reason=short(self._reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await server.wait_closed()
        for task in tuple(self._tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self._end_connections()

    async def _stop_accepting(self, server: WebsocketServer) -> None:
        """Accept no more connections, and wait a turn until the server knows the last one.

        Accepting happens in a task. On Python 3.11 that task fails if asyncio's server is closed, and leaks its socket.
        """
        for listening in server.sockets:
            self._loop.remove_reader(listening)
        await asyncio.sleep(0)

    async def _end_connections(self) -> None:
        """Abort remaining connections, also those still being accepted, which takes some turns of the event loop."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in tuple(self._connections):
                connection.transport.abort()
            await asyncio.wait(others, timeout=0.05)

    async def _listen(self) -> WebsocketServer:
        options = self.options
        # Not also ::1, where port 0 would be a different port. Browsers try both addresses.
        host = "127.0.0.1" if options.host == "localhost" else options.host
        last = DEFAULT_PORT + PORTS_TRIED
        requests = _Requests(options, self._gate, self.page, self._connections, self.hub.id)
        connection: Any = functools.partial(_Connection, self._half_open, self._connections)
        for port in [options.port] if options.port is not None else range(DEFAULT_PORT, last + 1):
            try:
                server = await serve(
                    self._serve,
                    host,
                    port,
                    process_request=requests.process,
                    create_connection=connection,
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    compression="deflate" if options.compression else None,
                    server_header=None,
                    open_timeout=HANDSHAKE_TIMEOUT,
                    close_timeout=CLOSE_TIMEOUT,
                    max_size=MAX_MESSAGE,
                    max_queue=MESSAGES_READ_AHEAD,
                    write_limit=32 * 1024,
                    ssl=options.ssl,
                    logger=_library_logger,
                )
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise OSError(
                        error.errno, f"the live page cannot listen on {options.host}: {error.strerror}"
                    ) from error
                if options.port is None:
                    continue
                what = "taken" if error.errno == errno.EADDRINUSE else "not permitted for this user"
                raise OSError(
                    error.errno,
                    f"port {port} of {options.host} is {what}: give Dashboard another port, 0 for any free one, or "
                    f"None for the next free one from {DEFAULT_PORT} on",
                ) from error
            self.port = server.sockets[0].getsockname()[1]
            self._listening = [each.fileno() for each in server.sockets]
            _open_servers.add(self)
            return server
        raise OSError(
            errno.EADDRINUSE, f"ports {DEFAULT_PORT} to {last} are all taken; give port=0 for any free one"
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task

    def _follow(
        self, run: Run, start: TrainStart, optimizers: Sequence[str], subscription: Subscription[Event]
    ) -> None:
        live = LiveRun(
            run,
            start,
            optimizers=optimizers,
            history_bytes=self.options.history_bytes,
            milestone_bytes=self.options.milestone_bytes,
            taken=self.hub.runs,
        )
        self._followers[run] = self._spawn(self.hub.follow(live, subscription))

    def _when_followed(self, run: Run, tell: Callable[[], None]) -> None:
        follower = self._followers.pop(run, None)
        if follower is None:
            tell()
        else:
            follower.add_done_callback(lambda _: tell())

    def close_copies(self) -> None:
        """Close the copies of this server's sockets. Called in a forked child."""
        descriptors = list(self._listening)
        for connection in tuple(self._connections):
            raw = connection.transport.get_extra_info("socket")
            descriptors.append(-1 if raw is None else raw.fileno())
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    async def _serve(self, connection: ServerConnection) -> None:
        """Serve one websocket until it closes."""
        assert isinstance(connection, _Connection) and connection.role is not None
        self._half_open.pop(connection, None)
        peer = connection.remote_address
        address = str(peer[0]) if peer else "?"
        try:
            await self.hub.serve(_WebsocketLink(connection), role=connection.role, address=address)
        except Exception:
            logger.exception("the live page failed: a viewer was disconnected")
            raise


class _Requests:
    """Answers requests for files and the status, and admits websockets. The server's thread only."""

    def __init__(
        self, options: Options, gate: Gate, page: Page | None, connections: "set[_Connection]", server_id: str
    ) -> None:
        self._options = options
        self._gate = gate
        self._page = page
        self._connections = connections
        self._server_id = server_id

    def process(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a request for a file, or let a websocket handshake continue."""
        assert isinstance(connection, _Connection)
        response = self._respond(connection, request)
        if response is not None and request.method == "HEAD":
            # Content-Length stays that of the answer to GET.
            response.body = b""
        return response

    def _respond(self, connection: "_Connection", request: Request) -> Response | None:
        headers = request.headers
        hosts = headers.get_all("Host")
        if not self._gate.allows_host(hosts):
            return _answer(421, "This server does not answer to this host name.")
        try:
            address = urlsplit(request.path)
        except ValueError:
            return _answer(400, "Malformed address.")
        role = self._gate.role_of(headers.get_all("Cookie"), headers.get_all("Authorization"))
        if request.method not in ("GET", "HEAD"):
            return _answer(405, "Only GET and HEAD.", {"Allow": "GET, HEAD"})
        if address.path == "/ws":
            if request.method != "GET":
                return _answer(405, "A websocket begins with GET.", {"Allow": "GET"})
            return self._admit(connection, headers, hosts[0], role)
        return self._file(headers, address.path, address.query, role)

    def _admit(
        self, connection: "_Connection", headers: Headers, host: str, role: Role | None
    ) -> Response | None:
        """Refuse a websocket, or admit it and record its role."""
        has_bearer = bool(headers.get_all("Authorization"))
        if not self._gate.allows_origin(headers.get_all("Origin"), host, has_bearer=has_bearer):
            return _answer(
                403, "Only the page of this server, or a program with a token, may open a websocket."
            )
        if role is None:
            return _answer(401, "Open the page with the address that the run printed.")
        if self._is_full(role):
            return _answer(503, f"There are already {self._viewers} viewers.")
        connection.role = role
        return None

    @property
    def _viewers(self) -> int:
        """Number of admitted websockets, including those that have not said hi."""
        return sum(connection.role is not None for connection in self._connections)

    def _is_full(self, role: Role) -> bool:
        """True if there is no place for another viewer of this role: readers leave some to those who may steer."""
        places = self._options.max_viewers
        if role == "read_only" and not self._options.read_only:
            places -= kept_places(places)
        return self._viewers >= places

    def _file(self, headers: Headers, path: str, query: str, role: Role | None) -> Response:
        if path == "/api/status":
            if role is None:
                return _answer(401, "Not authorised.")
            status = {
                "viewers": self._viewers,
                "full": self._is_full(role),
                "role": role,
                "server": self._server_id,
            }
            return _answer(200, msgspec.json.encode(status), {"Content-Type": "application/json"})
        if path == "/" and "token=" in query:
            # Redirect to an address without the token, right or wrong. Without a cookie the page asks for one.
            more = {"Location": "./"}
            if (given := self._gate.role_in_query(query)) is not None:
                more["Set-Cookie"] = self._gate.cookie(given, secure=self._options.ssl is not None)
            return _answer(303, b"", more)
        if self._page is None:
            return self._asset(headers, NOT_BUILT, 503, "no-store")
        asset = self._page.assets.get(path)
        if asset is None:
            return _answer(404, "Not found.")
        return self._asset(headers, asset, 200, "no-cache" if path == "/" else FOR_GOOD)

    def _asset(self, headers: Headers, asset: Asset, status: int, keep: str) -> Response:
        more = {
            "Content-Type": asset.content_type,
            "Cache-Control": keep,
            "Content-Security-Policy": content_security_policy(self._options.frame_ancestors),
            "ETag": asset.etag,
            "Vary": "Accept-Encoding",
        }
        if status == 200 and asset.etag in ",".join(headers.get_all("If-None-Match")):
            return _answer(304, b"", more)
        if _accepts_gzip(headers.get_all("Accept-Encoding")):
            return _answer(status, asset.gzipped, more | {"Content-Encoding": "gzip"})
        return _answer(status, asset.body, more)


class _Connection(ServerConnection):
    """A connection that registers itself before its first byte, and unregisters when it closes."""

    def __init__(
        self,
        half_open: "dict[_Connection, None]",
        all_connections: "set[_Connection]",
        protocol: ServerProtocol,
        server: WebsocketServer,
        **options: Any,
    ) -> None:
        super().__init__(protocol, server, **options)
        # Set once the connection is admitted as a websocket.
        self.role: Role | None = None
        self._half_open = half_open
        self._all = all_connections
        # The library itself answers requests that are too long and wrong handshakes.
        self._reject = protocol.reject
        protocol.reject = self._reject_securely  # type: ignore[method-assign]  # no other way in

    def _reject_securely(self, status: StatusLike, text: str) -> Response:
        # It may have been admitted before its handshake turned out to be wrong.
        self.role = None
        response = self._reject(status, text)
        for name, value in SECURITY_HEADERS.items():
            response.headers[name] = value
        response.headers["Cache-Control"] = "no-store"
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        with contextlib.suppress(OSError):
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._all.add(self)
        self._half_open[self] = None
        if len(self._half_open) > MAX_HALF_OPEN:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._half_open.pop(self, None)
        self._all.discard(self)
        super().connection_lost(exc)


class _WebsocketLink:
    """A websocket as a `Link` for the hub."""

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
        """Close the websocket; abort it if the viewer does not read the close frame."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._connection.close(code, short(reason))
        self._connection.transport.abort()


def kept_places(max_viewers: int) -> int:
    """Return how many of a server's places are kept for the control role: an eighth, at least one."""
    return max(1, max_viewers // 8)


def _answer(status: int, body: bytes | str, more: dict[str, str] | None = None) -> Response:
    """Make a response; a string becomes a line of plain text."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    chosen = {
        "Content-Type": "text/plain; charset=utf-8",
        "Cache-Control": "no-store",
        **SECURITY_HEADERS,
        **(more or {}),
        "Connection": "close",
    }
    # In a 304 the length would be that of the browser's copy.
    if status != 304:
        chosen["Content-Length"] = str(len(body))
    return Response(status, http.HTTPStatus(status).phrase, Headers(chosen), body)


def _accepts_gzip(headers: Sequence[str]) -> bool:
    for coding in ",".join(headers).split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


# Servers whose sockets a forked child must close. A loader worker that outlives its killed parent would keep the port
# taken and the viewers waiting. The server's thread adds and removes; the child reads, with no other thread alive.
_open_servers: "weakref.WeakSet[Server]" = weakref.WeakSet()


def _close_copies_in_child() -> None:
    for server in tuple(_open_servers):
        server.close_copies()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies_in_child)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the live page failed", exc_info=error)
