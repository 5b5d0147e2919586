"""Server: one port for page and websocket, in a thread with an asyncio loop of its own.

The runs' event loops, whatever they are, never serve a viewer: a host that holds its loop for a while does
not hold the page up, and Stop works while a handler hangs. The websockets library does the handshake, keepalive,
limits and closing; what is here decides about requests, hands out the page and ties connections to the hub.
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
"""Seconds after which a connection that has not said what it wants, or not taken its answer, is closed."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds that a websocket has to take its last words and to answer them; then it is cut off."""
MAX_HALF_OPEN: Final = 64
"""Connections that have not said yet what they want. One more ends the oldest of them: who has something to say
says it within milliseconds, so it is those that say nothing that go."""
MESSAGES_READ_AHEAD: Final = 4
"""Messages of a viewer that wait to be handled; then its socket is not read any more."""
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
            token=self.token,
            read_only_token=self.read_only_token,
            key=user_key(),
            read_only=options.read_only,
            # The address that is printed must be one that is answered.
            allow_hosts=(*options.allow_hosts, *([socket.gethostname()] if self._is_wildcard else [])),
        )
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()
        self._stop: asyncio.Event
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: dict[Run, asyncio.Task[None]] = {}
        self._half_open: dict[_Connection, None] = {}  # have not been answered yet, oldest first
        self._connections: set[_Connection] = set()  # all that are not over
        self._listening: list[int] = []  # descriptors
        self._error: BaseException | None = None
        self._reason = ""  # why it was closed; written and read by the server's thread
        started = Latch()
        # A daemon: a viewer that does not go must never keep the interpreter from leaving.
        self._thread = Thread(self._run, started, name="offloop-dashboard", daemon=True)
        self._thread.start()
        try:
            started.wait()
        except BaseException:
            # Ctrl-C: the caller never gets this server, so it is closed here.
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
        """Address of the page, with the token that gives the most that this server gives."""
        return f"{self._base}?token={quote(self.token, safe='')}"

    @property
    def read_only_url(self) -> str:
        """Address of the page for those who may look but not touch."""
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
        """Show a run, while it goes on. Any thread; does not wait. After `close` nobody is left to see it."""
        optimizers = tuple(run.trainer.optimizers)
        if not self._post(lambda: self._follow(run, start, optimizers, subscription)):
            subscription.close()

    def finish_run(self, run: Run) -> None:
        """Wait until the hub has taken everything that a run has said; it is over. Blocks its thread, briefly."""
        done = threading.Event()
        if self._post(lambda: self._when_followed(run, done.set)):
            done.wait(GOODBYE)

    def close(self, reason: str) -> None:
        """Tell all viewers, close everything, end the thread. Blocks at most about three seconds; twice is fine."""

        def stop() -> None:
            self._reason = reason
            self._stop.set()  # first: whatever happens, the thread that closes does not wait for ever
            self.hub.say_goodbye(1001, reason)

        if not self._thread.is_over:
            self._post(stop)
            self._thread.join()

    def _post(self, function: Callable[[], None]) -> bool:
        try:
            # In a context of its own: in the caller's, anyio would take this event loop for trio where the run's is.
            self._loop.call_soon_threadsafe(function, context=self._context)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            return False
        return True

    # The server's own thread

    def _run(self, started: Latch) -> None:
        try:
            asyncio.run(self._main(started), debug=False)
        except BaseException as error:
            if started.is_open:
                raise
            self._error = error  # there is no event loop, for want of descriptors
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
        except Exception as error:  # a host that is no name is a UnicodeError, for one
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
        """Accept no further connections, and let the last one be known to the server.

        That happens in a task; one that finds asyncio's server closed fails (Python 3.11) and leaves its socket open.
        """
        for listening in server.sockets:
            self._loop.remove_reader(listening)
        await asyncio.sleep(0)

    async def _end_connections(self) -> None:
        """Cut off those that do not go, and those that are only coming: they take some turns of the event loop."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in tuple(self._connections):
                connection.transport.abort()
            await asyncio.wait(others, timeout=0.05)

    async def _listen(self) -> WebsocketServer:
        options = self.options
        # Not ::1 as well: any port (0) would be another one there. Browsers try both.
        host = "127.0.0.1" if options.host == "localhost" else options.host
        last = DEFAULT_PORT + PORTS_TRIED
        connection: Any = functools.partial(_Connection, self._half_open, self._connections)
        for port in [options.port] if options.port is not None else range(DEFAULT_PORT, last + 1):
            try:
                server = await serve(
                    self._serve,
                    host,
                    port,
                    process_request=self._process_request,
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
                what = "taken" if error.errno == errno.EADDRINUSE else "not for this user"
                raise OSError(
                    error.errno,
                    f"port {port} of {options.host} is {what}: give Dashboard another port, 0 for any, or none for "
                    f"the next free one from {DEFAULT_PORT} on",
                ) from error
            self.port = server.sockets[0].getsockname()[1]
            self._listening = [each.fileno() for each in server.sockets]
            _open_servers.add(self)
            return server
        raise OSError(errno.EADDRINUSE, f"ports {DEFAULT_PORT} to {last} are all taken; give port=0 for any")

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
        """Close what a forked child has got of this server's sockets. In the child."""
        descriptors = list(self._listening)
        for connection in tuple(self._connections):
            raw = connection.transport.get_extra_info("socket")
            descriptors.append(-1 if raw is None else raw.fileno())
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    # Requests

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a request for a file, or let a websocket handshake go on."""
        assert isinstance(connection, _Connection)
        response = self._respond(connection, request)
        if response is not None and request.method == "HEAD":
            response.body = b""  # the length stays: it is that of the answer to GET
        return response

    def _respond(self, connection: "_Connection", request: Request) -> Response | None:
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
            if request.method != "GET":
                return _answer(405, "A websocket begins with GET.", {"Allow": "GET"})
            return self._admit(connection, headers, hosts[0], role)
        return self._file(headers, address.path, address.query, role)

    def _admit(
        self, connection: "_Connection", headers: Headers, host: str, role: Role | None
    ) -> Response | None:
        """Refuse a websocket, or let it in and note its role."""
        has_bearer = bool(headers.get_all("Authorization"))
        if not self._gate.allows_origin(headers.get_all("Origin"), host, has_bearer=has_bearer):
            return _answer(403, "A websocket is opened by the page of this very server, or with a token.")
        if role is None:
            return _answer(401, "Open the page with the address that the run has printed.")
        if self._viewers >= self.options.max_viewers:
            return _answer(503, f"There are {self._viewers} viewers already.")
        connection.role = role
        return None

    @property
    def _viewers(self) -> int:
        """Websockets that were let in, whether they have said hi or not."""
        return sum(connection.role is not None for connection in self._connections)

    def _file(self, headers: Headers, path: str, query: str, role: Role | None) -> Response:
        if path == "/api/status":
            if role is None:
                return _answer(401, "Not authorised.")
            status = {
                "viewers": self._viewers,
                "full": self._viewers >= self.options.max_viewers,
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
        if _accepts_gzip(headers.get_all("Accept-Encoding")):
            return _answer(status, asset.gzipped, more | {"Content-Encoding": "gzip"})
        return _answer(status, asset.body, more)

    async def _serve(self, connection: ServerConnection) -> None:
        """Serve one websocket to its end."""
        assert isinstance(connection, _Connection) and connection.role is not None
        self._half_open.pop(connection, None)
        peer = connection.remote_address
        address = str(peer[0]) if peer else "?"
        try:
            await self.hub.serve(_WebsocketLink(connection), role=connection.role, address=address)
        except Exception:
            logger.exception("the live page has a defect: a viewer was cut off")
            raise


class _Connection(ServerConnection):
    """A connection that says when it begins and ends, from before its first byte."""

    def __init__(
        self,
        half_open: "dict[_Connection, None]",
        all_connections: "set[_Connection]",
        protocol: ServerProtocol,
        server: WebsocketServer,
        **options: Any,
    ) -> None:
        super().__init__(protocol, server, **options)
        self.role: Role | None = None  # set when it is let in as a websocket
        self._half_open = half_open
        self._all = all_connections
        # The library answers by itself where a head is too long or a handshake is wrong.
        self._reject = protocol.reject
        protocol.reject = self._reject_securely  # type: ignore[method-assign]  # no other way in

    def _reject_securely(self, status: StatusLike, text: str) -> Response:
        self.role = None  # let in, and then there was something wrong with the handshake
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
        """Close it; a viewer that does not read does not get its close frame either, and is cut off."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._connection.close(code, short(reason))
        self._connection.transport.abort()


def _answer(status: int, body: bytes | str, more: dict[str, str] | None = None) -> Response:
    """Make a response. Text is for people who look at the wire."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    chosen = {
        "Content-Type": "text/plain; charset=utf-8",
        "Cache-Control": "no-store",
        **SECURITY_HEADERS,
        **(more or {}),
        "Connection": "close",
    }
    if status != 304:  # its length would be that of what the browser has
        chosen["Content-Length"] = str(len(body))
    return Response(status, http.HTTPStatus(status).phrase, Headers(chosen), body)


def _accepts_gzip(headers: Sequence[str]) -> bool:
    for coding in ",".join(headers).split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


# A loader worker that outlives a killed parent would keep its port, and leave its viewers waiting.
_open_servers: "weakref.WeakSet[Server]" = weakref.WeakSet()


def _close_copies_in_child() -> None:
    for server in tuple(_open_servers):
        server.close_copies()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies_in_child)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the live page has a defect", exc_info=error)
