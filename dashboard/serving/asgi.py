"""The live page as an ASGI application, to be mounted in that of a service.

It runs on the event loop of its host, asyncio or trio. What viewers see still comes from the server's own thread, so
training waits for neither. Who may use the page is for the host to say: there is no token, no cookie and no key.
"""

import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from offloop.dashboard.options import Options
from offloop.dashboard.protocol.from_viewer import Hi
from offloop.dashboard.protocol.limits import CLOSE_FULL, MAX_MESSAGE, SUBPROTOCOL, Role
from offloop.dashboard.serving.answers import Answer, answer, status_answer
from offloop.dashboard.serving.mounted_link import Closing, MountedLink, Outgoing
from offloop.dashboard.serving.places import Places
from offloop.dashboard.serving.security import host_name
from offloop.dashboard.serving.server import Server
from offloop.dashboard.viewers.connection import RefusedError, short

logger = logging.getLogger("offloop")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Auth: TypeAlias = Callable[[Scope], Role | Awaitable[Role | None] | None]
"""Says who asks: the role of a request or websocket, or None to refuse it."""

AUTH_TIMEOUT: Final = 10.0
"""Seconds for `auth` to answer; then the request is refused."""
AUTH_THREADS: Final = 8
"""Most threads in which an `auth` that is a plain function runs at once."""
NOT_SIGNED_IN: Final = "Sign in to the application that shows this page."
CLOSE_TOO_LARGE: Final = 1009
CLOSE_FAILED: Final = 1011


class DashboardApp:
    """The page as an ASGI application. `Dashboard.asgi` makes it."""

    def __init__(self, open_server: Callable[[], Awaitable[Server]], auth: Auth, options: Options) -> None:
        """Make the application. Nothing runs before its first request.

        Args:
            open_server: Returns the server that is open, or opens it.
            auth: See `Dashboard.asgi`.
            options: Settings of the page.
        """
        self._open_server = open_server
        self._guard = _Guard(auth, read_only=options.read_only)
        self._allow_hosts = frozenset(options.allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await _send_answer(send, await self._answer(scope), "http.response", scope["method"])
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                # Where nothing is around it. There is nothing to do.
                while (await receive())["type"] != "lifespan.shutdown":
                    await send({"type": "lifespan.startup.complete"})
                await send({"type": "lifespan.shutdown.complete"})
            case other:
                raise NotImplementedError(f"the live page does not know what {other!r} is")

    async def _answer(self, scope: Scope) -> Answer:
        if scope["method"] not in ("GET", "HEAD"):
            return answer(405, "Only GET and HEAD.", {"Allow": "GET, HEAD"})
        path = _path_below(scope)
        if path == "":
            # Addresses within the page are relative. So is this one: a proxy may have taken a part of the path away.
            query = scope.get("query_string", b"").decode("latin-1")
            folder = scope["path"].rpartition("/")[2] or scope.get("root_path", "").rpartition("/")[2]
            return answer(307, b"", {"Location": f"./{folder}/{'?' if query else ''}{query}"})
        role = await self._guard.role_of(scope)
        if isinstance(role, Answer):
            return role
        server = await self._open_server()
        if path == "/api/status":
            return status_answer(server.places, role, server.hub.id)
        return server.files.answer(
            path, known=_headers(scope, b"if-none-match"), codings=_headers(scope, b"accept-encoding")
        )

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        # "websocket.connect"
        await receive()
        role = await self._admit(scope)
        if isinstance(role, Answer):
            if "websocket.http.response" in scope.get("extensions", {}):
                await _send_answer(send, role, "websocket.http.response")
            else:
                # Servers that cannot say more answer 403.
                await send({"type": "websocket.close"})
            return
        server = await self._open_server()
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        link = MountedLink()
        visitor = _Visitor(server.places, role)

        def done() -> None:
            server.places.leave(visitor)
            link.shut()

        client = scope.get("client")
        server.serve(link, visitor, str(client[0]) if client else "?", done=done)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_read, link, receive, tasks.cancel_scope)
                # Servers raise it when the viewer has left meanwhile.
                with contextlib.suppress(OSError):
                    await _write(link, send)
                tasks.cancel_scope.cancel()
        finally:
            # The host may cancel this task.
            link.shut()

    async def _admit(self, scope: Scope) -> Role | Answer:
        if _path_below(scope) != "/ws":
            return answer(404, "Not found.")
        if not self._allows_origin(scope):
            return answer(
                403,
                "Only the page of this server may open a websocket. Behind a proxy that changes the Host header, give "
                "Dashboard(allow_hosts=[...]) the name in the browser's address.",
            )
        if SUBPROTOCOL not in scope.get("subprotocols", ()):
            return answer(400, f"The websocket must offer the subprotocol {SUBPROTOCOL}.")
        return await self._guard.role_of(scope)

    def _allows_origin(self, scope: Scope) -> bool:
        """True if our own page opens the websocket, or a program that is no browser."""
        origins, hosts = _headers(scope, b"origin"), _headers(scope, b"host")
        if not origins:
            return True
        if len(origins) != 1 or len(hosts) != 1:
            return False
        try:
            parts = urlsplit(origins[0])
        except ValueError:
            return False
        if parts.scheme not in ("http", "https"):
            return False
        return parts.netloc.lower() == hosts[0].lower() or host_name(parts.netloc) in self._allow_hosts


class _Visitor:
    """A viewer that the application has let in."""

    def __init__(self, places: Places, role: Role) -> None:
        self._places = places
        self._role = role

    def admit(self, hi: Hi) -> Role:
        if self._places.is_full(self._role):
            raise RefusedError(CLOSE_FULL, self._places.why_full)
        self._places.take(self)
        return self._role

    def is_admitted(self) -> bool:
        return True


class _Guard:
    """Asks the application who somebody is, and refuses them if it does not say."""

    def __init__(self, auth: Auth, *, read_only: bool) -> None:
        self._auth = auth
        self._read_only = read_only
        is_async = inspect.iscoroutinefunction(auth) or inspect.iscoroutinefunction(
            getattr(auth, "__call__", None)  # noqa: B004  # whether it is async, not whether it is callable
        )
        # A plain function may block.
        self._threads = None if is_async else anyio.CapacityLimiter(AUTH_THREADS)
        self._has_failed = False

    async def role_of(self, scope: Scope) -> Role | Answer:
        """Return the role of a request, or the answer that refuses it."""
        try:
            with anyio.fail_after(AUTH_TIMEOUT):
                role = await self._ask(scope)
        except TimeoutError:
            return self._refuse(f"auth took longer than {AUTH_TIMEOUT:g} s", None)
        except Exception as error:
            return self._refuse("auth failed", error)
        if role is None:
            return answer(401, NOT_SIGNED_IN)
        if role not in ("control", "read_only"):
            return self._refuse(f'auth must return "control", "read_only" or None, got {role!r}', None)
        return "read_only" if self._read_only else role

    async def _ask(self, scope: Scope) -> Role | None:
        if self._threads is None:
            given = self._auth(scope)
        else:
            # Within a tuple, because trio refuses a function that returns a coroutine.
            (given,) = await anyio.to_thread.run_sync(
                lambda: (self._auth(scope),), abandon_on_cancel=True, limiter=self._threads
            )
        return await given if inspect.isawaitable(given) else given

    def _refuse(self, why: str, error: Exception | None) -> Answer:
        if not self._has_failed:
            self._has_failed = True
            logger.error(
                "the live page refuses a request: %s; later failures are not logged", why, exc_info=error
            )
        return answer(500, "The application could not say who may see this page; its log has the reason.")


async def _read(link: MountedLink, receive: Receive, scope: anyio.CancelScope) -> None:
    """Hand over what a viewer says, until it leaves."""
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        said: str | bytes = message["bytes"] if text is None else text
        if len(said) > MAX_MESSAGE:
            link.closing = Closing(CLOSE_TOO_LARGE, f"a message has at most {MAX_MESSAGE} bytes")
            link.shut()
            return
        await link.incoming.put(said)
    link.shut()
    scope.cancel()


async def _write(link: MountedLink, send: Send) -> None:
    """Send a viewer what it is due, and why its connection is closed."""
    while isinstance(message := await link.outgoing.take(), Outgoing):
        if message.is_text:
            await send({"type": "websocket.send", "text": message.data.decode()})
        else:
            await send({"type": "websocket.send", "bytes": message.data})
    code, reason = message or link.closing or Closing(CLOSE_FAILED, "the live page failed")
    await send({"type": "websocket.close", "code": code, "reason": short(reason)})


async def _send_answer(
    send: Send,
    given: Answer,
    kind: Literal["http.response", "websocket.http.response"],
    method: str = "GET",
) -> None:
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.headers.items()]
    await send({"type": f"{kind}.start", "status": given.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": b"" if method == "HEAD" else given.body})


def _path_below(scope: Scope) -> str:
    """Return the path below where the page is mounted: "" without a slash at the end, else "/..."."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    while root:
        if path == root or path.startswith(f"{root}/"):
            return path[len(root) :]
        # A proxy, or an older framework, has taken the beginning away, or all.
        root = "/".join(("", *root.split("/")[2:]))
    return path


def _headers(scope: Scope, name: bytes) -> list[str]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value.decode("latin-1") for each, value in headers if each.lower() == name]
