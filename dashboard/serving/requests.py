"""Requests: answers what browsers ask for, and decides who gets a websocket. The server's thread only.

A program with a token in its header is admitted by the handshake. A browser's handshake carries a cookie, which is half
of what it needs: until its first message has brought the page's key, its connection is no viewer and may be cut off.
"""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import StatusLike

from offloop.dashboard.options import Options
from offloop.dashboard.protocol.from_viewer import Hi
from offloop.dashboard.protocol.limits import CLOSE_FULL, CLOSE_UNAUTHORISED, Role
from offloop.dashboard.serving.answers import Answer, Files, answer, status_answer
from offloop.dashboard.serving.places import Places
from offloop.dashboard.serving.security import SECURITY_HEADERS, Gate
from offloop.dashboard.viewers.connection import RefusedError

SEND_BUFFER: Final = 128 * 1024
"""Bytes of a viewer's kernel buffer: the default is megabytes, which hold seconds of outdated charts."""
MAX_HALF_OPEN: Final = 64
"""Most connections that are not admitted yet. One more aborts the oldest of them: a real client sends its request
within milliseconds, so the oldest is idle."""
HOW_TO_ENTER: Final = "Open the page with the address that the run printed."
KEYS_HEADER: Final = "Offloop-Keys"
"""Header in which the page sends its keys when it asks for the status."""


class Requests:
    """Answers requests for files and the status, and admits websockets."""

    def __init__(self, options: Options, gate: Gate, places: Places, files: Files, server_id: str) -> None:
        self.gate = gate
        self.places = places
        self.half_open: dict[Peer, None] = {}
        """Connections that are not admitted, oldest first."""
        self.peers: set[Peer] = set()
        """All open connections."""
        self._is_secure = options.ssl is not None
        self._files = files
        self._server_id = server_id

    def process(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a request for a file, or let a websocket handshake continue."""
        assert isinstance(connection, Peer)
        given = self._answer(connection, request)
        if given is None:
            return None
        response = _response(given)
        if request.method == "HEAD":
            # Content-Length stays that of the answer to GET.
            response.body = b""
        return response

    def _answer(self, peer: "Peer", request: Request) -> Answer | None:
        headers = request.headers
        hosts = headers.get_all("Host")
        if not self.gate.allows_host(hosts):
            return answer(421, "This server does not answer to this host name.")
        try:
            address = urlsplit(request.path)
        except ValueError:
            return answer(400, "Malformed address.")
        if request.method not in ("GET", "HEAD"):
            return answer(405, "Only GET and HEAD.", {"Allow": "GET, HEAD"})
        if address.path == "/ws":
            if request.method != "GET":
                return answer(405, "A websocket begins with GET.", {"Allow": "GET"})
            return self._admit(peer, headers, hosts[0])
        if address.path == "/api/status":
            return self._status(peer, headers)
        if address.path == "/" and "token=" in address.query:
            return self._exchange(peer, address.query)
        return self._files.answer(
            address.path,
            known=headers.get_all("If-None-Match"),
            codings=headers.get_all("Accept-Encoding"),
            is_framed=self.gate.may_be_framed(address.query),
        )

    def _admit(self, peer: "Peer", headers: Headers, host: str) -> Answer | None:
        """Refuse a websocket, or admit it and record its role; that of a browser only once it has said hi."""
        bearers, cookies = headers.get_all("Authorization"), headers.get_all("Cookie")
        if not self.gate.allows_origin(headers.get_all("Origin"), host, has_bearer=bool(bearers)):
            return answer(
                403, "Only the page of this server, or a program with a token, may open a websocket."
            )
        role = self.gate.role_of_bearer(bearers) if bearers else self.gate.role_of_cookie(cookies)
        if role is None and (bearers or not self.gate.admits_frames):
            return answer(401, HOW_TO_ENTER)
        if role is not None and self.places.is_full(role):
            return answer(503, self.places.why_full)
        if role is None:
            # Perhaps a frame, whose first message will bring its key.
            peer.cookies = ()
        elif bearers:
            peer.enter(role)
        else:
            peer.cookies = cookies
        return None

    def _status(self, peer: "Peer", headers: Headers) -> Answer:
        if bearers := headers.get_all("Authorization"):
            role = self.gate.role_of_bearer(bearers)
        else:
            keys = ",".join(headers.get_all(KEYS_HEADER)).split(",")
            role = self.gate.role_of_page(headers.get_all("Cookie"), keys, peer.port)
        if role is None:
            return answer(401, HOW_TO_ENTER)
        return status_answer(self.places, role, self._server_id)

    def _exchange(self, peer: "Peer", query: str) -> Answer:
        """Redirect to an address without the token, right or wrong; a right one gives a cookie and a key.

        Without them the page asks for the printed address.
        """
        role = self.gate.role_in_query(query)
        if role is None:
            return answer(303, b"", {"Location": "./"})
        more = {
            "Location": f"./#key={self.gate.page_key(role, peer.port)}",
            "Set-Cookie": self.gate.cookie(role, secure=self._is_secure),
        }
        return answer(303, b"", more)


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
        requests, role = self._requests, self.role
        if role is None:
            role = requests.gate.role_of_page(self.cookies, hi.keys, self.port)
            if role is None:
                raise RefusedError(CLOSE_UNAUTHORISED, HOW_TO_ENTER)
            if requests.places.is_full(role):
                raise RefusedError(CLOSE_FULL, requests.places.why_full)
            self.enter(role)
        requests.half_open.pop(self, None)
        return role

    def enter(self, role: Role) -> None:
        """Give the connection a place, and from now on a role."""
        self.role = role
        # It may be lost already.
        if self in self._requests.peers:
            self._requests.places.take(self)

    def is_admitted(self) -> bool:
        """False once the user has logged out, if a cookie admitted this connection."""
        return not self.cookies or self._requests.gate.knows_cookie(self.cookies)

    def _reject_securely(self, status: StatusLike, text: str) -> Response:
        # It may have been admitted before its handshake turned out to be wrong.
        self.role = None
        self._requests.places.leave(self)
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
        self._requests.places.leave(self)
        super().connection_lost(exc)


def _response(given: Answer) -> Response:
    headers = given.headers | {"Connection": "close"}
    return Response(given.status, given.phrase, Headers(headers), given.body)
