"""Requests: answers what browsers ask for, and decides who gets a websocket. The server's thread only.

A program with a token in its header is admitted by the handshake. A browser's handshake carries a cookie, which is half
of what it needs: until its first message has brought the page's key, its connection is no viewer and may be cut off.
"""

import asyncio
import contextlib
import http
import socket
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import StatusLike

from offloop.dashboard.options import Options
from offloop.dashboard.protocol import CLOSE_FULL, CLOSE_UNAUTHORISED, Hi, Role
from offloop.dashboard.serving.page import NOT_BUILT, Asset, Page
from offloop.dashboard.serving.security import SECURITY_HEADERS, Gate, content_security_policy
from offloop.dashboard.viewers.connection import RefusedError

SEND_BUFFER: Final = 128 * 1024
"""Bytes of a viewer's kernel buffer: the default is megabytes, which hold seconds of outdated charts."""
MAX_HALF_OPEN: Final = 64
"""Most connections that are not admitted yet. One more aborts the oldest of them: a real client sends its request
within milliseconds, so the oldest is idle."""
FOR_GOOD: Final = "public, max-age=31536000, immutable"
HOW_TO_ENTER: Final = "Open the page with the address that the run printed."
KEYS_HEADER: Final = "Offloop-Keys"
"""Header in which the page sends its keys when it asks for the status."""


class Requests:
    """Answers requests for files and the status, and admits websockets."""

    def __init__(self, options: Options, gate: Gate, page: Page | None, server_id: str) -> None:
        self.gate = gate
        self.half_open: dict[Peer, None] = {}
        """Connections that are not admitted, oldest first."""
        self.peers: set[Peer] = set()
        """All open connections."""
        self._options = options
        self._page = page
        self._server_id = server_id

    def process(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a request for a file, or let a websocket handshake continue."""
        assert isinstance(connection, Peer)
        response = self._respond(connection, request)
        if response is not None and request.method == "HEAD":
            # Content-Length stays that of the answer to GET.
            response.body = b""
        return response

    def _respond(self, peer: "Peer", request: Request) -> Response | None:
        headers = request.headers
        hosts = headers.get_all("Host")
        if not self.gate.allows_host(hosts):
            return _answer(421, "This server does not answer to this host name.")
        try:
            address = urlsplit(request.path)
        except ValueError:
            return _answer(400, "Malformed address.")
        if request.method not in ("GET", "HEAD"):
            return _answer(405, "Only GET and HEAD.", {"Allow": "GET, HEAD"})
        if address.path == "/ws":
            if request.method != "GET":
                return _answer(405, "A websocket begins with GET.", {"Allow": "GET"})
            return self._admit(peer, headers, hosts[0])
        if address.path == "/api/status":
            return self._status(peer, headers)
        if address.path == "/" and "token=" in address.query:
            return self._exchange(peer, address.query)
        return self._file(headers, address.path)

    def _admit(self, peer: "Peer", headers: Headers, host: str) -> Response | None:
        """Refuse a websocket, or admit it and record its role; that of a browser only once it has said hi."""
        bearers, cookies = headers.get_all("Authorization"), headers.get_all("Cookie")
        if not self.gate.allows_origin(headers.get_all("Origin"), host, has_bearer=bool(bearers)):
            return _answer(
                403, "Only the page of this server, or a program with a token, may open a websocket."
            )
        role = self.gate.role_of_bearer(bearers) if bearers else self.gate.role_of_cookie(cookies)
        if role is None:
            return _answer(401, HOW_TO_ENTER)
        if self.is_full(role):
            return _answer(503, self.why_full)
        if bearers:
            peer.role = role
        else:
            peer.cookies = cookies
        return None

    @property
    def _viewers(self) -> int:
        """Number of admitted websockets, including programs that have not said hi."""
        return sum(peer.role is not None for peer in self.peers)

    @property
    def why_full(self) -> str:
        """Reason of a refusal."""
        return f"There are already {self._viewers} viewers."

    def is_full(self, role: Role) -> bool:
        """True if there is no place for another viewer of this role: readers leave some to those who may steer."""
        places = self._options.max_viewers
        if role == "read_only" and not self._options.read_only:
            # An eighth is kept.
            places -= max(1, places // 8)
        return self._viewers >= places

    def _status(self, peer: "Peer", headers: Headers) -> Response:
        if bearers := headers.get_all("Authorization"):
            role = self.gate.role_of_bearer(bearers)
        else:
            keys = ",".join(headers.get_all(KEYS_HEADER)).split(",")
            role = self.gate.role_of_page(headers.get_all("Cookie"), keys, peer.port)
        if role is None:
            return _answer(401, HOW_TO_ENTER)
        status = {
            "viewers": self._viewers,
            "full": self.is_full(role),
            "role": role,
            "server": self._server_id,
        }
        return _answer(200, msgspec.json.encode(status), {"Content-Type": "application/json"})

    def _exchange(self, peer: "Peer", query: str) -> Response:
        """Redirect to an address without the token, right or wrong; a right one gives a cookie and a key.

        Without them the page asks for the printed address.
        """
        role = self.gate.role_in_query(query)
        if role is None:
            return _answer(303, b"", {"Location": "./"})
        more = {
            "Location": f"./#key={self.gate.page_key(role, peer.port)}",
            "Set-Cookie": self.gate.cookie(role, secure=self._options.ssl is not None),
        }
        return _answer(303, b"", more)

    def _file(self, headers: Headers, path: str) -> Response:
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


class Peer(ServerConnection):
    """A connection that registers itself before its first byte, and unregisters when it closes."""

    def __init__(
        self, requests: Requests, protocol: ServerProtocol, server: WebsocketServer, **options: Any
    ) -> None:
        super().__init__(protocol, server, **options)
        # Set once the connection is admitted: a program's by its handshake, a browser's by its first message.
        self.role: Role | None = None
        # Those of a browser's handshake.
        self.cookies: Sequence[str] = ()
        self._requests = requests
        # The library itself answers requests that are too long and wrong handshakes.
        self._reject = protocol.reject
        protocol.reject = self._reject_securely  # type: ignore[method-assign]  # no other way in

    @property
    def port(self) -> int:
        """The server's port."""
        return int(self.transport.get_extra_info("sockname")[1])

    def admit(self, hi: Hi) -> Role:
        """Return the viewer's role, once its first message has come.

        Raises:
            RefusedError: The cookie and the keys do not belong together, or there is no place left.
        """
        requests = self._requests
        if self.role is None:
            role = requests.gate.role_of_page(self.cookies, hi.keys, self.port)
            if role is None:
                raise RefusedError(CLOSE_UNAUTHORISED, HOW_TO_ENTER)
            if requests.is_full(role):
                raise RefusedError(CLOSE_FULL, requests.why_full)
            self.role = role
        requests.half_open.pop(self, None)
        return self.role

    def is_admitted(self) -> bool:
        """False once the user has logged out, if a cookie admitted this connection."""
        return not self.cookies or self._requests.gate.knows_cookie(self.cookies)

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
        requests = self._requests
        requests.peers.add(self)
        requests.half_open[self] = None
        if len(requests.half_open) > MAX_HALF_OPEN:
            oldest = next(iter(requests.half_open))
            del requests.half_open[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._requests.half_open.pop(self, None)
        self._requests.peers.discard(self)
        super().connection_lost(exc)


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
