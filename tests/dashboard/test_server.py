"""dashboard/serving/server.py on real sockets: what it answers to whom, and what nobody can do to it."""

import asyncio
import errno
import functools
import gc
import gzip
import itertools
import logging
import re
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
import pytest
from memory_link import PageModel
from socket_viewer import (
    PATIENCE,
    SocketViewer,
    await_on_loop,
    exchange,
    handshake_head,
    on_loop,
    raw,
    request,
)
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from offloop.dashboard.options import Options
from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_server import Ack
from offloop.dashboard.protocol.from_viewer import Hi, Ping
from offloop.dashboard.protocol.limits import CLOSE_FULL, CLOSE_UNAUTHORISED, SUBPROTOCOL
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.serving import requests as requests_module
from offloop.dashboard.serving import server as server_module
from offloop.dashboard.serving.page import Page
from offloop.dashboard.serving.security import content_security_policy, forget_key
from offloop.dashboard.serving.server import Server
from offloop.dashboard.viewers import connection as connection_module

ON_EVERY_ANSWER: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@pytest.fixture(scope="module", autouse=True)
def a_state_directory_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One server for all tests that leave it as it is. It gives up on the silent within a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "HANDSHAKE_TIMEOUT", 0.5)
        patch.setattr(server_module, "CLOSE_TIMEOUT", 0.5)
        made = Server(Options(port=0))
        yield made
        made.close("the tests are over")


@pytest.fixture
def server(shared_server: Server, nothing_is_left_behind: None) -> Iterator[Server]:
    """The shared server. Its end of a connection closes a moment after the test's."""
    before = len(shared_server._requests.peers)
    yield shared_server
    await_on_loop(shared_server, lambda: len(shared_server._requests.peers) <= before)


@pytest.fixture
def make() -> Iterator[Any]:
    """Make servers that are closed after the test."""
    made: list[Server] = []

    def make(**options: Any) -> Server:
        made.append(Server(Options(**({"port": 0} | options))))
        return made[-1]

    yield make
    for each in made:
        each.close("the test is over")


def entry_of(server: Server, token: str | None = None) -> tuple[str, str]:
    """Exchange a token for a cookie and a key, as a browser does."""
    return exchange(server.port, quote(token or server.token, safe=""))


def cookie_of(server: Server, token: str | None = None) -> str:
    return entry_of(server, token)[0]


def ask_status(server: Server, cookie: str, *keys: str) -> dict[str, Any]:
    """Ask as a page does; an empty dict if that is refused."""
    status, headers, body = request(server, "/api/status", Cookie=cookie, Offloop_Keys=",".join(keys))
    assert headers["cache-control"] == "no-store" and status in (200, 401)
    return msgspec.json.decode(body, type=dict[str, Any]) if status == 200 else {}


def status_of(answer: bytes) -> int | None:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


def is_quiet(server: Server) -> bool:
    """True if the server has neither a connection nor a task that is not its own."""
    return not server._requests.peers and not server._requests.half_open and len(asyncio.all_tasks()) == 2


# Who is let in -----------------------------------------------------------------------------------

HOSTS: Final = {"own": True, "localhost": True, "evil.example.org": False}
ORIGINS: Final = {"none": None, "own": True, "other port": False, "evil": False}
RIGHTS: Final = ("nothing", "cookie", "reader's cookie", "bad cookie", "bearer", "bad bearer")
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "OPTIONS")


def test_the_matrix_of_who_may_open_a_websocket(server: Server) -> None:
    """Host x Origin x right x method, each by a real handshake."""
    cookies = {
        "cookie": cookie_of(server),
        "reader's cookie": cookie_of(server, server.read_only_token),
        "bad cookie": cookie_of(server)[:-1] + "!",
    }
    seen: dict[int, int] = {}
    for host, origin, right, method in itertools.product(HOSTS, ORIGINS, RIGHTS, METHODS):
        port = server.port
        name = {"own": f"127.0.0.1:{port}", "localhost": f"localhost:{port}"}.get(host, host)
        origins = {
            "own": f"http://{name}",
            "other port": "http://127.0.0.1:1",
            "evil": "http://evil.example.org",
        }
        bearer = {"bearer": f"Bearer {server.token}", "bad bearer": "Bearer wrong"}.get(right)
        head = handshake_head(
            server,
            method=method,
            Host=name,
            Origin=origins.get(origin),
            Cookie=cookies.get(right),
            Authorization=bearer,
        )
        is_own = ORIGINS[origin] is True or (ORIGINS[origin] is None and bearer is not None)
        if not HOSTS[host]:
            expected = 421
        elif method != "GET":
            expected = 405
        elif not is_own:
            expected = 403
        elif right in ("nothing", "bad cookie", "bad bearer"):
            expected = 401
        else:
            expected = 101
        # Who is let in says something that is no message, and is closed at once.
        answer = raw(server, head + b"\x81\x80\0\0\0\0")
        assert status_of(answer) == expected, (host, origin, right, method, answer[:200])
        if expected != 101:
            assert_secure(answer)
            if method == "HEAD":
                assert answer.endswith(b"\r\n\r\n")
        seen[expected] = seen.get(expected, 0) + 1
    assert set(seen) == {101, 401, 403, 405, 421}
    await_on_loop(server, lambda: is_quiet(server))


def assert_secure(answer: bytes) -> None:
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
    for name, value in ON_EVERY_ANSWER.items():
        assert head.count(f"\r\n{name}: {value}") == 1, head


def test_a_token_is_exchanged_for_a_cookie(server: Server) -> None:
    status, headers, body = request(server, f"/?token={server.token}")
    assert status == 303 and body == b""
    assert re.fullmatch(r"\./#key=[0-9a-f]{32}", headers["location"])
    flags = {part.strip() for part in headers["set-cookie"].split(";")}
    assert {"HttpOnly", "SameSite=Strict"} <= flags and "Secure" not in flags
    assert headers["cache-control"] == "no-store"
    assert server.token not in str(headers)
    assert ask_status(server, *entry_of(server)) == {
        "viewers": 0,
        "full": False,
        "role": "control",
        "server": server.hub.id,
    }


def test_a_cookie_without_the_key_of_the_page_opens_nothing(server: Server, make: Any) -> None:
    """Nor do keys of other ports, of other roles beyond theirs, or keys alone."""
    cookie, key = entry_of(server)
    reader_cookie, reader_key = entry_of(server, server.read_only_token)
    _, key_of_another_port = entry_of(make())
    for wrong in (
        [],
        [key_of_another_port],
        ["", "x", "\xe9", key[:-1], key.upper(), cookie],
        [server.token],
    ):
        assert ask_status(server, cookie, *(each for each in wrong if each.isascii())) == {}
        with SocketViewer(server.url, cookie=cookie, keys=wrong) as viewer:
            code, reason = viewer.wait_closed()
            assert code == CLOSE_UNAUTHORISED and "the address that the run printed" in reason
            assert viewer.page.hello is None
    assert ask_status(server, "", key) == {}
    with pytest.raises(InvalidStatus):
        SocketViewer(server.url, cookie="x=y", keys=[key])
    roles = {
        (cookie, key): "control",
        (cookie, reader_key): "read_only",
        (reader_cookie, key): "read_only",
        (reader_cookie, reader_key): "read_only",
    }
    for (shown, held), role in roles.items():
        assert ask_status(server, shown, key_of_another_port, held)["role"] == role
        with SocketViewer(server.url, cookie=shown, keys=[key_of_another_port, held]) as viewer:
            viewer.wait(lambda page: page.hello)
            assert viewer.page.hello is not None and viewer.page.hello.role == role


def test_websockets_without_the_key_take_no_place(make: Any) -> None:
    """They count as half open: who comes while they wait is let in, and too many of them end the oldest."""
    server = make(max_viewers=1)
    head = handshake_head(
        server, Cookie=cookie_of(server), Origin=f"http://127.0.0.1:{server.port}", Authorization=None
    )
    with ExitStack() as stack:
        waiting = []
        for _ in range(requests_module.MAX_HALF_OPEN + 1):
            waiting.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            )
            waiting[-1].sendall(head)
            assert waiting[-1].recv(4096).startswith(b"HTTP/1.1 101 ")
        assert waiting[0].recv(4096) == b""
        with SocketViewer(server.url) as viewer:
            viewer.wait(lambda page: page.hello)
            cookie, key = entry_of(server)
            with pytest.raises(InvalidStatus) as caught:
                SocketViewer(server.url, cookie=cookie, keys=[key])
            assert caught.value.response.status_code == 503


def test_who_is_admitted_by_a_key_when_the_last_place_is_taken_is_told(make: Any) -> None:
    server = make(max_viewers=1)
    cookie, key = entry_of(server)
    head = handshake_head(server, Cookie=cookie, Origin=f"http://127.0.0.1:{server.port}", Authorization=None)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as late:
        late.sendall(head)
        assert late.recv(4096).startswith(b"HTTP/1.1 101 ")
        with SocketViewer(server.url) as viewer:
            viewer.wait(lambda page: page.hello)
            late.sendall(frame(1, encode_message(Hi(protocol=1, keys=[key]))))
            assert struct.unpack(">BBH", late.recv(4096)[:4])[2] == CLOSE_FULL


def test_logging_out_ends_what_browsers_hold_and_not_what_programs_have(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server = make()
    cookie, key = entry_of(server)
    with SocketViewer(server.url, cookie=cookie, keys=[key]) as page, SocketViewer(server.url) as program:
        page.wait(lambda page: page.hello)
        program.wait(lambda page: page.hello)
        assert forget_key()
        assert page.wait_closed()[0] == CLOSE_UNAUTHORISED
        assert ask_status(server, cookie, key) == {}
        program.say(Ping(sent=1.0))
        program.wait(lambda _: program.pongs)
    again = entry_of(server)
    assert again[0].partition("=")[0] != cookie.partition("=")[0] and again[1] != key
    assert ask_status(server, *again)["role"] == "control"
    assert ask_status(server, cookie, key) == {}
    assert forget_key() and not forget_key()


def test_a_token_works_as_long_as_the_process_lives(server: Server) -> None:
    """A link preview that opens the address first does no harm."""
    assert request(server, f"/?token={server.token}")[0] == 303
    assert "set-cookie" in request(server, f"/?token={server.token}")[1]


def test_a_wrong_token_gives_no_cookie_and_leaves_the_address(server: Server) -> None:
    for query in ("token=wrong", "token=", f"token={server.token}&token=x", "&".join(["token=1"] * 99)):
        status, headers, _ = request(server, f"/?{query}")
        assert status == 303 and headers["location"] == "./" and "set-cookie" not in headers
    assert request(server, "/api/status")[0] == 401
    assert request(server, "/api/status", Cookie="offloop=1; a")[0] == 401


def test_a_token_with_any_characters_stands_in_the_address(make: Any) -> None:
    server = make(token="a+b&c=d#e%f?g/h;ij")
    path = server.url.removeprefix(f"http://127.0.0.1:{server.port}")
    assert "set-cookie" in request(server, path)[1]
    with SocketViewer(server.url) as viewer:
        viewer.wait(lambda page: page.hello)


@pytest.mark.parametrize("options", [{}, {"read_only": True}])
def test_who_comes_with_which_address_has_which_role(make: Any, options: dict[str, Any]) -> None:
    server = make(**options)
    expected = "read_only" if options else "control"
    for address, role in ((server.url, expected), (server.read_only_url, "read_only")):
        token = address.partition("=")[2]
        cookie, key = entry_of(server, token)
        for how in ({"token": token}, {"cookie": cookie, "keys": [key]}):
            with SocketViewer(address, **how) as viewer:
                viewer.wait(lambda page: page.hello)
                assert viewer.page.hello is not None and viewer.page.hello.role == role


def test_a_read_only_server_takes_no_control_from_an_older_cookie(make: Any) -> None:
    cookie = cookie_of(make())
    server = make(read_only=True)
    with SocketViewer(server.url, cookie=cookie, keys=[entry_of(server)[1]]) as viewer:
        viewer.wait(lambda page: page.hello)
        assert viewer.page.hello is not None and viewer.page.hello.role == "read_only"


# Files -------------------------------------------------------------------------------------------


def test_the_page_and_its_files(server: Server) -> None:
    page = Page.load()
    assert page is not None, "build it: make page"
    for path, asset in page.assets.items():
        status, headers, body = request(server, path)
        assert status == 200 and body == asset.body
        assert headers["content-type"] == asset.content_type
        assert headers["content-security-policy"] == content_security_policy()
        assert headers["vary"] == "Accept-Encoding"
        kept = "no-cache" if path == "/" else "public, max-age=31536000, immutable"
        assert headers["cache-control"] == kept
        for name, value in ON_EVERY_ANSWER.items():
            assert headers[name] == value
        assert "server" not in headers

        status, zipped, body = request(server, path, Accept_Encoding="br, gzip;q=0.5")
        assert zipped["content-encoding"] == "gzip" and gzip.decompress(body) == asset.body
        assert "content-encoding" not in request(server, path, Accept_Encoding="gzip;q=0")[1]

        status, headers, body = request(server, path, If_None_Match=headers["etag"])
        assert status == 304 and body == b"" and "content-length" not in headers
        assert request(server, path, If_None_Match='"other"')[0] == 200


def test_head_has_the_length_and_no_body(server: Server) -> None:
    host = f"Host: 127.0.0.1:{server.port}\r\n".encode()
    for path in (b"/", b"/nothing", b"/api/status", b"/?token=wrong"):
        get, head = (
            raw(server, method + b" " + path + b" HTTP/1.1\r\n" + host + b"\r\n")
            for method in (b"GET", b"HEAD")
        )
        assert head.endswith(b"\r\n\r\n")
        assert head == get.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert raw(server, b"HEAD / HTTP/1.1\r\nHost: evil.example.org\r\n\r\n").endswith(b"\r\n\r\n")


def test_nothing_else_is_there(server: Server) -> None:
    for path in (
        "/x",
        "/static/",
        "/static/../security.py",
        "/%2e%2e/etc/passwd",
        "//evil.example.org/x",
        "/api",
    ):
        status, headers, _ = request(server, path)
        assert status == 404 and headers["cache-control"] == "no-store"
    assert request(server, "/", method="DELETE")[:2][1]["allow"] == "GET, HEAD"
    assert status_of(raw(server, b"GET //[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")) == 400


def test_without_a_built_page_the_answer_says_how_to_get_one(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Page, "load", classmethod(lambda cls: None))
    server = make()
    for path in ("/", "/anything"):
        status, headers, body = request(server, path)
        assert status == 503 and b"make page" in body
        assert headers["content-security-policy"] == content_security_policy()
        assert headers["cache-control"] == "no-store"
    with SocketViewer(server.url) as viewer:  # other clients do not need it
        viewer.wait(lambda page: page.hello)


def test_origins_that_may_frame_the_page(make: Any) -> None:
    server = make(frame_ancestors=("https://hub.example.org",), allow_hosts=("train.example.org",))
    _, headers, _ = request(server, "/", Host="train.example.org")
    assert "frame-ancestors https://hub.example.org;" in headers["content-security-policy"]


# Addresses ---------------------------------------------------------------------------------------


def test_without_a_port_the_next_free_one_is_taken(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = taken.getsockname()[1]
        monkeypatch.setattr(server_module, "DEFAULT_PORT", port)
        server = make(port=None)
        assert port < server.port <= port + server_module.PORTS_TRIED
        monkeypatch.setattr(server_module, "PORTS_TRIED", 0)
        with pytest.raises(OSError, match="are all taken"):
            make(port=None)


def test_a_port_that_is_taken_is_said(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken: give Dashboard") as caught:
            make(port=port)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "x" * 300])
def test_an_address_that_cannot_be_listened_on_is_said(make: Any, host: str) -> None:
    with pytest.raises((OSError, ValueError)):
        make(host=host)


def test_localhost_is_one_port(make: Any) -> None:
    server = make(host="localhost")
    assert server.url.startswith(f"http://localhost:{server.port}/")
    assert request(server, "/api/status", Host=f"localhost:{server.port}")[0] == 401


def test_the_address_of_an_open_server_is_one_that_it_answers(make: Any) -> None:
    server = make(host="0.0.0.0")
    name = server.url.removeprefix("http://").partition("/")[0]
    assert name == f"{socket.gethostname()}:{server.port}"
    assert request(server, "/api/status", Host=name)[0] == 401
    assert request(server, "/api/status", Host="evil.example.org")[0] == 421


def test_two_host_headers(server: Server) -> None:
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    answer = raw(server, f"GET / HTTP/1.1\r\n{host}{host}\r\n".encode())
    assert status_of(answer) == 421
    assert_secure(answer)


def test_too_many_viewers(make: Any) -> None:
    server = make(max_viewers=2)
    entry = entry_of(server)
    with SocketViewer(server.url) as first, SocketViewer(server.url) as second:
        first.wait(lambda page: page.hello)
        second.wait(lambda page: page.hello)
        with pytest.raises(InvalidStatus) as caught:
            SocketViewer(server.url)
        assert caught.value.response.status_code == 503
        assert ask_status(server, *entry)["full"] is True
    await_on_loop(server, lambda: is_quiet(server))
    with SocketViewer(server.url) as third:  # there is room again
        third.wait(lambda page: page.hello)


def test_readers_fill_all_their_places_and_the_owner_gets_in(make: Any) -> None:
    """An eighth of the 64 places of a usual server is kept."""
    server = make()
    reader, owner = entry_of(server, server.read_only_token), entry_of(server)
    with ExitStack() as stack:
        for _ in range(56):
            stack.enter_context(SocketViewer(server.read_only_url)).wait(lambda page: page.hello)
        with pytest.raises(InvalidStatus) as caught:
            SocketViewer(server.read_only_url)
        assert caught.value.response.status_code == 503
        assert ask_status(server, *reader)["full"] and not ask_status(server, *owner)["full"]
        for _ in range(8):
            viewer = stack.enter_context(SocketViewer(server.url))
            viewer.wait(lambda page: page.hello and page.hello.role == "control")
        assert ask_status(server, *owner)["full"]
        with pytest.raises(InvalidStatus):
            SocketViewer(server.url)


def test_no_place_is_kept_where_nobody_may_steer(make: Any) -> None:
    server = make(max_viewers=1, read_only=True)
    with SocketViewer(server.url) as viewer:
        viewer.wait(lambda page: page.hello and page.hello.role == "read_only")


def test_who_has_not_said_hi_counts_as_a_viewer(make: Any) -> None:
    server = make(max_viewers=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as silent:
        silent.sendall(handshake_head(server))
        assert silent.recv(4096).startswith(b"HTTP/1.1 101 ")
        with pytest.raises(InvalidStatus):
            SocketViewer(server.url)


# Junk --------------------------------------------------------------------------------------------


def frame(opcode: int, payload: bytes, *, masked: bool = True, first: int = 0x80) -> bytes:
    """Return a websocket frame."""
    size = len(payload)
    bit = 0x80 if masked else 0
    length = bytes([bit | size]) if size < 126 else bytes([bit | 127]) + struct.pack(">Q", size)
    return bytes([first | opcode]) + length + (b"\0\0\0\0" if masked else b"") + payload


def close_code_of(answer: bytes) -> int | None:
    """Return the code in the close frame with which an answer ends."""
    data = answer.partition(b"\r\n\r\n")[2]
    while len(data) >= 2:
        opcode, size = data[0] & 15, data[1]
        header = 2
        if size == 126:
            size, header = struct.unpack_from(">H", data, 2)[0], 4
        elif size == 127:
            size, header = struct.unpack_from(">Q", data, 2)[0], 10
        if opcode == 8:
            return int(struct.unpack_from(">H", data, header)[0])
        data = data[header + size :]
    return None


HEAD: Final = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
JUNK: Final = {
    # name: (bytes, whether we then close our half, status of the answer; None: closed without one)
    "nothing": (b"", False, None),
    "nothing, closed": (b"", True, None),
    "half a head": (HEAD, False, None),
    "half a head, closed": (HEAD, True, None),
    "half a line": (b"GE", False, None),
    "binary": (bytes(range(256)) * 8, False, None),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, False, None),
    "line feeds only": (b"GET / HTTP/1.1\nHost: 127.0.0.1\n\n", False, None),
    "no version": (b"GET /\r\n\r\n", False, None),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", False, None),
    "non-ASCII path": ("GET /ä HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(), False, None),
    "header without colon": (b"GET / HTTP/1.1\r\nHost\r\n\r\n", False, None),
    "folded header": (HEAD + b"X: 1\r\n  2\r\n\r\n", False, None),
    "null in header": (HEAD + b"X: \0\r\n\r\n", False, None),
    "body": (HEAD.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\nhello", False, None),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", False, None),
    "chunked": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False, None),
    "smuggled": (HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n", False, None),
    "100 kB line": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", False, 414),
    "100 kB header": (HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n", False, 431),
    "1,000 headers": (HEAD + b"X: 1\r\n" * 1000 + b"\r\n", False, 431),
    "1,000 fields": (b"GET /?" + b"token=1&" * 900 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", False, 303),
    "malformed origin": (HEAD.replace(b" / ", b" /ws ") + b"Origin: http://[\r\n\r\n", False, 403),
    "malformed cookie": (HEAD + b"Cookie: \xff;=;;==;\r\n\r\n", False, 200),
    "pipelined": (HEAD + b"\r\n" + HEAD + b"\r\n", False, 200),
    "half-closed": (HEAD + b"\r\n", True, 200),
    "HTTP/1.0": (HEAD.replace(b"1.1", b"1.0") + b"\r\n", False, 200),
    "trailing bytes": (HEAD + b"\r\n" + b"x" * 10_000, False, 200),
}


MAYBE: Final = ("pipelined", "trailing bytes", "half-closed")
"""What the library closes without an answer if more than the head is there when it looks."""


@pytest.fixture(scope="module")
def bystander(shared_server: Server) -> Iterator[SocketViewer]:
    """A viewer that must not notice what others do."""
    with SocketViewer(shared_server.url) as viewer:
        viewer.wait(lambda page: page.hello)
        yield viewer


def assert_unharmed(server: Server, bystander: SocketViewer, caplog: pytest.LogCaptureFixture) -> None:
    """Fail unless only the bystander is left, hears its answers, and nothing was logged."""
    await_on_loop(server, lambda: len(server._requests.peers) == 1 and not server._requests.half_open)
    before = bystander.pongs
    bystander.say(Ping(sent=1.0))
    bystander.wait(lambda page: bystander.pongs > before)
    loud = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert not loud, [record.getMessage() for record in loud]


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_answered_or_closed(
    server: Server, bystander: SocketViewer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.DEBUG)
    data, half_close, expected = JUNK[name]
    answer = raw(server, data, half_close=half_close)
    if name in MAYBE:
        assert status_of(answer) in (expected, None)
    else:
        assert status_of(answer) == expected, answer[:300]
    if answer:
        assert_secure(answer)
        assert answer.count(b"HTTP/1.1 ") == 1
    assert_unharmed(server, bystander, caplog)


HI: Final = frame(1, encode_message(Hi(protocol=1)))
FRAMES: Final = {
    # name: (what follows a good handshake, close code)
    "oversize": (HI + frame(1, b"x" * 65_537), 1009),
    "oversize in fragments": (HI + frame(1, b"x" * 40_000, first=0) + frame(0, b"x" * 40_000), 1009),
    "announced petabyte": (HI + b"\x81\xff" + struct.pack(">Q", 2**50) + b"\0\0\0\0x", 1009),
    "unmasked": (HI + frame(1, b"{}", masked=False), 1002),
    "not UTF-8": (HI + frame(1, b"\xff\xfe"), 1007),
    "reserved bit": (HI + frame(1, b"{}", first=0xC0), 1002),
    "unknown opcode": (HI + frame(3, b"{}"), 1002),
    "long ping": (HI + frame(9, b"x" * 126), 1002),
    "fragment of nothing": (HI + frame(0, b"{}"), 1002),
    "bad close": (HI + frame(8, b"\x03"), 1002),
    "no JSON": (HI + frame(1, b"hello"), 4002),
    "deep JSON": (HI + frame(1, b"[" * 60_000), 4002),
    "binary": (HI + frame(2, b"\0\1\2"), 4002),
    "unknown message": (HI + frame(1, b'{"type":"fly"}'), 4002),
    "no hi": (frame(1, b'{"type":"drawn"}'), 4002),
    "two his": (HI + HI, 4002),
    "silence": (b"", 4002),
}


@pytest.mark.parametrize("name", FRAMES)
def test_junk_frames_close_their_own_websocket(
    server: Server,
    bystander: SocketViewer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(connection_module, "HI_TIMEOUT", 0.2)
    data, code = FRAMES[name]
    answer = raw(server, handshake_head(server), data)
    assert status_of(answer) == 101 and close_code_of(answer) == code
    assert_unharmed(server, bystander, caplog)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({"Sec_WebSocket_Protocol": None}, 400, id="no-subprotocol"),
        pytest.param({"Sec_WebSocket_Protocol": "chat"}, 400, id="other-subprotocol"),
        pytest.param({"Sec_WebSocket_Key": None}, 400, id="no-key"),
        pytest.param({"Sec_WebSocket_Key": "short"}, 400, id="bad-key"),
        pytest.param({"Sec_WebSocket_Version": "8"}, 400, id="old-version"),
        pytest.param({"Upgrade": None}, 426, id="no-upgrade"),
    ],
)
def test_a_wrong_handshake_is_refused_and_forgotten(
    server: Server,
    bystander: SocketViewer,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str | None],
    status: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = raw(server, handshake_head(server, "GET", **changes))
    assert status_of(answer) == status
    assert_secure(answer)
    assert on_loop(server, lambda: [each.role for each in server._requests.peers if each.role]) == ["control"]
    assert_unharmed(server, bystander, caplog)


def test_a_slow_loris_is_cut_off(
    server: Server, bystander: SocketViewer, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that comes byte by byte has as long as any other."""
    caplog.set_level(logging.DEBUG)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as loris:
        loris.settimeout(0.02)
        for place in itertools.count():
            try:
                loris.sendall(HEAD[place % 16 : place % 16 + 1] if place > 16 else HEAD[place : place + 1])
                if not loris.recv(1):
                    break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
            raise AssertionError("it was answered")
    assert_unharmed(server, bystander, caplog)


def test_silent_connections_are_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes while 64 say nothing ends the oldest of them, and is answered."""
    server = make()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
            for _ in range(requests_module.MAX_HALF_OPEN + 10)
        ]
        await_on_loop(server, lambda: len(server._requests.peers) == requests_module.MAX_HALF_OPEN)
        for gone in silent[:10]:
            with pytest.raises(ConnectionResetError):
                if gone.recv(1) == b"":
                    raise ConnectionResetError
        assert request(server, "/")[0] == 200
        with SocketViewer(server.url) as viewer:
            viewer.wait(lambda page: page.hello)
            assert on_loop(server, lambda: len(server._requests.half_open)) < requests_module.MAX_HALF_OPEN
            for _ in range(requests_module.MAX_HALF_OPEN):  # a viewer is not one of them
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
            viewer.say(Ping(sent=1.0))
            viewer.wait(lambda page: viewer.pongs)
    await_on_loop(server, lambda: is_quiet(server))


def test_closing_ends_every_kind_of_connection(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Silent ones, viewers that read, viewers that do not, requests under way; nothing is left of any."""
    server = make()
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
            for _ in range(3)
        ]
        connections[1].sendall(handshake_head(server))
        connections[2].sendall(handshake_head(server) + HI)
        viewer = stack.enter_context(SocketViewer(server.url))
        viewer.wait(lambda page: page.hello)
        server.close("enough")
        assert viewer.wait_closed() == (1001, "enough")
        assert viewer.page.bye == "enough"
        assert not server.is_serving and not server._requests.peers
        server.close("twice")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Viewers that do not read ------------------------------------------------------------------------


class Stalled:
    """A viewer that says hi and then never reads again, with as small a buffer as the system allows."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(handshake_head(server) + HI)

    def is_cut_off(self) -> bool:
        """Read what is left; True if the end was reached."""
        try:
            while self.socket.recv(65_536):
                pass
        except ConnectionResetError:
            pass
        return True


def buffered(server: Server) -> list[int]:
    """Return the bytes that the server holds for each viewer."""
    held = []
    for connection in server.hub.connections:
        link: Any = connection.link
        waiting = [*connection.viewer._texts, *connection.viewer._slots.values()]
        texts = sum(
            each.size if isinstance(each, KeptMilestone) else len(each)
            for each in waiting
            if isinstance(each, bytes | KeptMilestone)
        )
        held.append(texts + link._connection.transport.get_write_buffer_size())
    return held


def test_viewers_that_do_not_read_are_cut_off_and_cost_little(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others get everything meanwhile."""
    monkeypatch.setattr(connection_module, "SEND_TIMEOUT", 1.0)
    monkeypatch.setattr(server_module, "CLOSE_TIMEOUT", 0.3)
    server = make()
    with ExitStack() as stack:
        stalled = [Stalled(server) for _ in range(5)]
        for each in stalled:
            stack.callback(each.socket.close)
        viewer = stack.enter_context(SocketViewer(server.url))
        viewer.wait(lambda page: page.hello)
        await_on_loop(server, lambda: len(server.hub.connections) == 6)

        def tell(number: int) -> None:
            """Put a message of a thousand bytes down for everybody, which must not be left out."""
            message = Ack(id=str(number), name="pause", state="accepted", why="x" * 930)
            for connection in server.hub.connections:
                connection.put(message)

        def has_heard(number: int, page: PageModel) -> bool:
            return str(number) in page.acks

        most = 0
        for number in range(2_000):
            on_loop(server, functools.partial(tell, number))
            viewer.wait(functools.partial(has_heard, number))
            most = max(most, *on_loop(server, lambda: buffered(server)))
        assert len(viewer.page.acks) == 2_000 and viewer.closed is None
        assert 200_000 < most < 500_000
        await_on_loop(server, lambda: len(server._requests.peers) == 1)
        assert all(each.is_cut_off() for each in stalled)


def test_a_request_whose_answer_is_not_read_is_cut_off(server: Server) -> None:
    page = Page.load()
    assert page is not None
    path = max(page.assets, key=lambda each: len(page.assets[each].body))
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        await_on_loop(server, lambda: bool(server._requests.half_open))
        await_on_loop(server, lambda: not server._requests.half_open)


# TLS ---------------------------------------------------------------------------------------------


def test_https(make: Any, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server = make(ssl=context)
    assert server.url.startswith(f"https://127.0.0.1:{server.port}/")
    trusting = ssl.create_default_context(cafile=certificate[0])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(
            f"GET /?token={server.token} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
        )
        answer = b""
        while part := secure.recv(4096):
            answer += part
    assert status_of(answer) == 303 and b"; Secure" in answer

    async def watch() -> tuple[int | None, str | None]:
        # In one thread: SocketViewer reads and writes in two, which OpenSSL may answer with an end of the connection.
        page = PageModel()
        async with connect(
            f"{server.url.partition('?')[0].replace('https', 'wss')}ws",
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers={"Authorization": f"Bearer {server.token}"},
            ssl=trusting,
            proxy=None,
        ) as websocket:
            await websocket.send(encode_message(page.hi()).decode())
            while page.hello is None:
                data = await websocket.recv()
                page.take(data.encode() if isinstance(data, str) else data, isinstance(data, str))
            await asyncio.to_thread(server.close, "enough")
            await websocket.wait_closed()
            return websocket.close_code, websocket.close_reason

    assert asyncio.run(asyncio.wait_for(watch(), PATIENCE)) == (1001, "enough")


def test_plain_http_and_junk_on_a_tls_port(
    make: Any, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server = make(ssl=context)
    for data in (HEAD + b"\r\n", b"\0" * 100, b"\x16\x03\x01"):
        assert status_of(raw(server, data, half_close=True)) is None
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_connections_that_come_while_the_server_closes_are_not_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(Options(port=0))
    clients: list[socket.socket] = []

    async def come() -> None:  # and are accepted in the turn of the event loop in which the server closes
        clients.extend(socket.create_connection(("127.0.0.1", server.port)) for _ in range(5))
        await asyncio.sleep(0)

    monkeypatch.setattr(server.hub, "wait_until_empty", come)
    server.close("over")
    gc.collect()  # what was left open says so
    for client in clients:
        client.close()


def test_server_without_descriptors_for_its_event_loop_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(main: Any, **_: Any) -> None:
        main.close()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "run", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        Server(Options())
