"""Server: one port for the page and its websockets, in a thread with its own asyncio loop.

The event loops of runs never serve viewers: a host that blocks its loop does not block the page, and Stop works while
a handler hangs. The websockets library does the handshake, keepalive, limits and closing; `requests.py` answers
requests and says who may enter, and this module connects websockets to the hub.
"""

import asyncio
import contextlib
import contextvars
import errno
import functools
import logging
import os
import socket
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from offloop.dashboard.curves.picture import picture
from offloop.dashboard.hub import Hub
from offloop.dashboard.options import Options
from offloop.dashboard.protocol.limits import MAX_MESSAGE, SUBPROTOCOL
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.run_source import ProcessRun, ReplaySource, source_of
from offloop.dashboard.serving.answers import Files
from offloop.dashboard.serving.page import Page
from offloop.dashboard.serving.places import Places
from offloop.dashboard.serving.requests import Peer, Requests
from offloop.dashboard.serving.security import Gate, UserKey, new_token
from offloop.dashboard.viewers.connection import Link, Visitor, short
from offloop.engine import Event, Subscription, TrainStart
from offloop.engine.bus.threads import Latch, Thread

if TYPE_CHECKING:
    # A server of run directories loads no torch.
    from offloop.engine import ReplayedRun, Run

logger = logging.getLogger("offloop")
# Malformed requests from strangers must not fill the log: a user who wants the library's records lowers this level.
_library_logger = logging.getLogger("offloop.dashboard.websockets")
_library_logger.setLevel(logging.CRITICAL)

DEFAULT_PORT: Final = 8321
PORTS_TRIED: Final = 20
"""Ports tried after the default one if that is taken."""
GOODBYE: Final = 1.0
"""Seconds for viewers to receive the last messages of a run."""
HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for a connection to send its request and to receive the answer."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds for a websocket to receive its close frame and answer it; then it is aborted."""
MESSAGES_READ_AHEAD: Final = 4
"""Messages of a viewer that wait to be handled; beyond that its socket is not read."""


class Server:
    """Serves the page and the runs of this process. Any thread may call its methods.

    With `options.is_mounted` it opens no port: an application brings the viewers (`asgi.py`).
    """

    def __init__(self, options: Options, runs_dir: Path | None = None) -> None:
        """Start serving. Blocks for milliseconds, until the port is open.

        Args:
            options: Its settings.
            runs_dir: Directory whose runs are shown, whichever processes write them. None: the runs of this process,
                and to viewers that ask for the list also those beside the first one.

        Raises:
            OSError: The server cannot listen on the address.
        """
        self.options = options
        # Later only the server's thread uses it.
        self._runs_dir = runs_dir
        # The server's thread writes `port`, `hub`, `_loop`, `_stop`, `_listening` and `_error`. Other threads read
        # them only after `__init__`, which waits for the latch that the server's thread opens behind them.
        self.port = 0
        self.token = options.token or new_token()
        self.read_only_token = self.token if options.read_only else new_token()
        self.page = Page.load()
        self.files = Files(self.page, options.frame_ancestors)
        self.places = Places(options)
        self.hub: Hub
        self._gate = Gate(
            bound_to=options.host,
            token=self.token,
            read_only_token=self.read_only_token,
            key=UserKey(),
            read_only=options.read_only,
            # The printed address contains this name, so requests for it must be accepted.
            allow_hosts=(*options.allow_hosts, *([socket.gethostname()] if self._is_wildcard else [])),
        )
        self._loop: asyncio.AbstractEventLoop
        self._context = contextvars.Context()
        self._stop: asyncio.Event
        # Only the server's thread uses these, and a forked child, in which no other thread lives.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: dict[Run | ReplayedRun, tuple[asyncio.Task[None], LiveRun]] = {}
        self._requests: Requests
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
        return f"{self.address}?token={quote(self.token, safe='')}"

    @property
    def read_only_url(self) -> str:
        """Address of the page for viewers who may watch but not steer."""
        return f"{self.address}?token={quote(self.read_only_token, safe='')}"

    @property
    def address(self) -> str:
        """Address of the page without a token, which lets no one in."""
        host = self.options.host
        if self._is_wildcard:
            host = socket.gethostname()
        elif ":" in host:
            host = f"[{host}]"
        return f"{'https' if self.options.ssl else 'http'}://{host}:{self.port}/"

    def admit_frames(self) -> tuple[str, str]:
        """Let notebooks of this machine show the page in frames; see `Gate.admit_frames`. Any thread."""
        return self._gate.admit_frames()

    @property
    def _is_wildcard(self) -> bool:
        return self.options.host in ("0.0.0.0", "::", "")

    @property
    def is_serving(self) -> bool:
        """True until `close`."""
        return not self._thread.is_over

    def add_run(self, run: "Run | ReplayedRun", start: TrainStart, subscription: Subscription[Event]) -> None:
        """Show a run while it runs, or is replayed. Any thread; does not wait.

        After `close` it only closes the subscription.
        """
        source = source_of(run)
        if not self._post(lambda: self._follow(run, source, start, subscription)):
            subscription.close()

    def finish_run(self, run: "Run | ReplayedRun", *, with_picture: bool = False) -> str | None:
        """Wait until the hub has read all events of a run that has ended. Blocks its thread for at most a second.

        Args:
            run: The run.
            with_picture: Return a picture of its curves.

        Returns:
            The picture as SVG; None if it was not wanted, or did not come in time.
        """
        finished: Future[str | None] = Future()

        def finish(live: LiveRun | None) -> None:
            drawn = None
            if with_picture and live is not None:
                drawn = picture(live.history, live.series, f"{live.name}: {live.state}")
            finished.set_result(drawn)

        if self._post(lambda: self._when_followed(run, finish)):
            with contextlib.suppress(TimeoutError):
                return finished.result(GOODBYE)
        return None

    def serve(self, link: Link, visitor: Visitor, address: str, *, done: Callable[[], None]) -> None:
        """Serve a viewer that an application brings, until its link ends. Any thread; does not wait.

        Args:
            link: Its methods are called in the server's thread.
            visitor: So are those of the visitor.
            address: Of the viewer, for the log.
            done: Called when the viewer is no longer served, in any thread; at once after `close`.
        """

        def begin() -> None:
            self._spawn(self.hub.serve(link, visitor=visitor, address=address)).add_done_callback(
                lambda _: done()
            )

        if not self._post(begin):
            done()

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
        self._requests = Requests(self.options, self._gate, self.places, self.files, self.hub.id)
        server: WebsocketServer | None = None
        if not self.options.is_mounted:
            try:
                server = await self._listen()
            except Exception as error:
                # Not only OSError: a malformed host name is a UnicodeError.
                self._error = error
                return
        self._spawn(self.hub.beat())
        if self._runs_dir is not None:
            self._follow_directory(self._runs_dir, names_all=True)
        started.open()
        await self._stop.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self.hub.wait_until_empty()
        if server is not None:
            await self._stop_listening(server)
        for task in tuple(self._tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self._end_connections()

    async def _stop_listening(self, server: WebsocketServer) -> None:
        """Accept no more connections, wait a turn until the server knows the last one, and close all.

        Accepting happens in a task. On Python 3.11 that task fails if asyncio's server is closed, and leaks its socket.
        """
        _open_servers.discard(self)
        for listening in server.sockets:
            self._loop.remove_reader(listening)
        await asyncio.sleep(0)
        server.close(close_connections=True, reason=short(self._reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await server.wait_closed()

    async def _end_connections(self) -> None:
        """Abort remaining connections, also those still being accepted, which takes some turns of the event loop."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in tuple(self._requests.peers):
                connection.transport.abort()
            await asyncio.wait(others, timeout=0.05)

    async def _listen(self) -> WebsocketServer:
        options = self.options
        # Not also ::1, where port 0 would be a different port. Browsers try both addresses.
        host = "127.0.0.1" if options.host == "localhost" else options.host
        last = DEFAULT_PORT + PORTS_TRIED
        connection: Any = functools.partial(Peer, self._requests)
        for port in [options.port] if options.port is not None else range(DEFAULT_PORT, last + 1):
            try:
                server = await serve(
                    self._serve_websocket,
                    host,
                    port,
                    process_request=self._requests.process,
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

    def _follow_directory(self, runs_dir: Path, *, names_all: bool) -> None:
        followed = self.hub.follow_directory(
            runs_dir,
            history_bytes=self.options.history_bytes,
            milestone_bytes=self.options.milestone_bytes,
            names_all=names_all,
        )
        self._spawn(followed.run())

    def _follow(
        self,
        run: "Run | ReplayedRun",
        source: ProcessRun,
        start: TrainStart,
        subscription: Subscription[Event],
    ) -> None:
        live = LiveRun(
            source,
            start,
            history_bytes=self.options.history_bytes,
            milestone_bytes=self.options.milestone_bytes,
            taken=self.hub.runs,
        )
        # What is beside the files of a replay are no runs
        if run.dir is not None and not isinstance(source, ReplaySource):
            if self.hub.followed is None:
                self._follow_directory(run.dir.parent, names_all=False)
            else:
                self.hub.followed.add_directory(run.dir.parent)
        self._followers[run] = self._spawn(self.hub.follow(live, subscription)), live

    def _when_followed(self, run: "Run | ReplayedRun", tell: Callable[[LiveRun | None], None]) -> None:
        follower, live = self._followers.pop(run, (None, None))
        if follower is None:
            tell(None)
        else:
            follower.add_done_callback(lambda _: tell(live))

    def close_copies(self) -> None:
        """Close the copies of this server's sockets. Called in a forked child."""
        descriptors = list(self._listening)
        for connection in tuple(self._requests.peers):
            raw = connection.transport.get_extra_info("socket")
            descriptors.append(-1 if raw is None else raw.fileno())
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    async def _serve_websocket(self, connection: ServerConnection) -> None:
        """Serve one websocket of this server until it closes."""
        assert isinstance(connection, Peer)
        if connection.role is not None:
            self._requests.half_open.pop(connection, None)
        remote = connection.remote_address
        address = str(remote[0]) if remote else "?"
        try:
            await self.hub.serve(_WebsocketLink(connection), visitor=connection, address=address)
        except Exception:
            logger.exception("the live page failed: a viewer was disconnected")
            raise


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
