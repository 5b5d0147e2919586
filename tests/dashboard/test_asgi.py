"""dashboard/serving/asgi.py: the page in applications of others, under real servers, and driven message by message."""

import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
from example_service import Service, serving
from memory_link import PageModel
from socket_viewer import PATIENCE
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from offloop.dashboard import Dashboard, callback
from offloop.dashboard.lease import SharedServer
from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_viewer import CommandRequest, Ping
from offloop.dashboard.protocol.limits import CLOSE_FULL, CLOSE_PROTOCOL, MAX_MESSAGE, SUBPROTOCOL
from offloop.dashboard.serving import asgi
from offloop.dashboard.serving.asgi import DashboardApp
from offloop.engine.bus.waker import Waker
from offloop.engine.testing import tiny_loader, tiny_trainer

if TYPE_CHECKING:
    pass

GUEST: Final = {"Authorization": "Bearer of a guest"}


@pytest.fixture(scope="module", params=["uvicorn", "hypercorn"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """On asyncio under uvicorn, and on trio under hypercorn. A process each, which imports torch."""
    with serving(request.param) as address:
        yield address


@pytest.fixture
def service(address: str) -> Iterator[Service]:
    with Service(address) as service:
        yield service


# The service of the example, over real HTTP ----------------------------------------------------------


def test_runs_are_started_watched_steered_and_cancelled_while_others_go_on(service: Service) -> None:
    first = service.start()
    with service.watch() as viewer:
        viewer.wait(lambda page: page.run is not None and page.status is not None)
        assert viewer.page.run is not None and viewer.page.run.key == first
        viewer.wait(lambda page: any(page.points.values()))
        # By HTTP, and seen on the page
        assert service.http.post(f"/runs/{first}/pause").status_code == 200
        viewer.wait(lambda page: page.status is not None and page.status.state == "paused")
        # From the page, and seen by HTTP
        viewer.say(CommandRequest(id="1", run=first, name="resume"))
        viewer.wait(lambda page: page.status is not None and page.status.state == "running")
        assert service.http.get("/runs").json()[first].startswith("running, step ")
        # Another one beside it
        second = service.start()
        viewer.wait(lambda page: second in page.runs)
        service.cancel(first)
        viewer.wait(lambda page: page.status is not None and page.status.state == "cancelled")
        assert service.http.get("/runs").json()[second].startswith("running, step ")
    service.cancel(second)
    # The page is still there, with the runs that have ended
    with service.watch() as viewer:
        viewer.wait(lambda page: page.hello)
        assert viewer.page.hello is not None
        assert {first, second} <= {each.key for each in viewer.page.hello.runs}


def test_who_is_not_known_gets_nothing_and_a_guest_only_watches(service: Service) -> None:
    stranger = {"Authorization": "Bearer of nobody"}
    for path in ("/train/", "/train/api/status", "/train/ws"):
        answer = service.http.get(path, headers=stranger)
        assert (answer.status_code, answer.text) == (401, f"{asgi.NOT_SIGNED_IN}\n")
    for token in ("of nobody", ""):
        with pytest.raises(InvalidStatus) as refused:
            service.watch(token or "x")
        assert refused.value.response.status_code == 401
    run = service.start()
    assert service.http.post(f"/runs/{run}/pause", headers=GUEST).status_code == 403
    assert service.http.get("/train/api/status", headers=GUEST).json()["role"] == "read_only"
    with service.watch("of a guest") as guest:
        guest.wait(lambda page: page.hello is not None)
        assert guest.page.hello is not None and guest.page.hello.role == "read_only"
        guest.say(CommandRequest(id="7", run=run, name="pause"))
        guest.wait(lambda page: page.acks.get("7") == ["rejected"])
    service.cancel(run)


def test_other_pages_may_not_open_a_websocket_with_the_cookie_of_a_visitor(service: Service) -> None:
    def status_of(origin: str) -> int:
        address = f"{service.address.replace('http', 'ws', 1)}/train/ws"
        cookie = {"Cookie": 'secret="of the owner"'}
        try:
            with connect(
                address,
                origin=Origin(origin),
                additional_headers=cookie,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                proxy=None,
            ):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    assert status_of("https://elsewhere.example") == 403
    assert status_of("null") == 403
    assert status_of(service.address) == 101


# Below prefixes and proxies --------------------------------------------------------------------------


class StrippingProxy:
    """Passes requests below /ml on without the prefix, and everything after the first head as it is."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}/ml"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self._pass_on, args=(self._listening.accept()[0],), daemon=True
                ).start()

    def _pass_on(self, visitor: socket.socket) -> None:
        with visitor, socket.create_connection(("127.0.0.1", self._to)) as host, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (more := visitor.recv(65_536)):
                head += more
            method, _, rest = head.partition(b" ")
            # One request a connection, so that only one head needs to be changed.
            if b"upgrade: websocket" not in head.lower():
                rest = rest.replace(b"\r\n", b"\r\nConnection: close\r\n", 1).replace(b"keep-alive", b"close")
            host.sendall(method + b" " + rest.removeprefix(b"/ml"))
            back = threading.Thread(target=self._copy, args=(host, visitor), daemon=True)
            back.start()
            self._copy(visitor, host)
            back.join()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while more := source.recv(65_536):
                sink.sendall(more)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(PATIENCE)


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
@pytest.mark.parametrize("root_path", ["", "/ml"])
def test_behind_a_proxy_that_strips_its_prefix(server: str, root_path: str) -> None:
    with serving(server, root_path) as address:
        proxy = StrippingProxy(int(address.rpartition(":")[2]))
        try:
            with Service(proxy.address) as service:
                see(service)
        finally:
            proxy.close()


def see(service: Service) -> None:
    home = service.http.get("/train/")
    assert home.status_code == 200
    names = [part.split('"')[0] for part in home.text.split('src="')[1:]]
    assert names and all(not name.startswith("/") for name in names)
    for name in names:
        assert service.http.get(f"/train/{name}").status_code == 200
    run = service.start()
    with service.watch() as viewer:
        viewer.wait(lambda page: page.run and page.run.key == run and any(page.points.values()))
    service.cancel(run)


# Message by message, on asyncio and on trio ----------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedServer]:
    """A server of the test's own, closed at its end."""
    made = SharedServer()
    monkeypatch.setattr(callback, "_shared", made)
    yield made
    if made._server is not None:
        made._server.close("the test is over")


def scope_of(path: str = "/", *, kind: str = "http", method: str = "GET", **more: Any) -> dict[str, Any]:
    headers = {"host": "host.example", **more.pop("headers", {})}
    return {
        "type": kind,
        "method": method,
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "subprotocols": [SUBPROTOCOL],
        "client": ("127.0.0.1", 4711),
        "extensions": {"websocket.http.response": {}},
        **more,
    }


async def ask(app: DashboardApp, path: str = "/", **more: Any) -> tuple[int, dict[str, str], bytes]:
    """Make a request, and return status, headers and body."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope_of(path, **more), receive, send)
    start, body = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, body["body"]


class Socket:
    """The end of a websocket that an application sees."""

    def __init__(self, app: DashboardApp, **more: Any) -> None:
        self.sent: list[Any] = []
        self._app, self._scope = app, scope_of("/ws", kind="websocket", **more)
        self._incoming: list[Any] = [{"type": "websocket.connect"}]
        self._here, self._there = Waker(), Waker()
        self.is_lost = False

    def say(self, text: str) -> None:
        self._put({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self._put({"type": "websocket.disconnect", "code": 1005})

    def _put(self, message: Any) -> None:
        self._incoming.append(message)
        self._here.wake()

    async def _receive(self) -> Any:
        while not self._incoming:
            await self._here.wait()
        return self._incoming.pop(0)

    async def _send(self, message: Any) -> None:
        if self.is_lost:
            raise OSError("the client has disconnected")
        self.sent.append(message)
        self._there.wake()

    async def run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            self._there.wake()

    async def wait(self, condition: Callable[[list[Any]], Any]) -> Any:
        """Wait until what was sent is as wanted."""
        with anyio.fail_after(PATIENCE):
            while not (found := condition(self.sent)):
                await self._there.wait()
            return found

    async def refusal(self) -> int:
        """Run it, and return the status of the refusal."""
        await self.run()
        assert self.sent[0]["type"] == "websocket.http.response.start", self.sent
        return int(self.sent[0]["status"])


async def enter(app: DashboardApp, tasks: anyio.abc.TaskGroup, **more: Any) -> Socket:
    """Open a websocket and say hi."""
    viewer = Socket(app, **more)
    tasks.start_soon(viewer.run)
    viewer.say(encode_message(PageModel().hi()).decode())
    await viewer.wait(lambda sent: sent and sent[0]["type"] == "websocket.accept")
    return viewer


@contextlib.asynccontextmanager
async def opened(app: DashboardApp, **more: Any) -> AsyncIterator[Socket]:
    """Open a websocket and say hi; leave it at the end."""
    async with anyio.create_task_group() as tasks:
        viewer = await enter(app, tasks, **more)
        yield viewer
        viewer.leave()


def says(role: Any) -> Any:
    return lambda scope: role


@pytest.mark.anyio
async def test_the_files_of_the_page(shared: SharedServer) -> None:
    app = Dashboard(frame_ancestors=["https://notebooks.example"]).asgi(auth=says("control"))
    status, headers, body = await ask(app)
    assert status == 200 and b"<html" in body and int(headers["content-length"]) == len(body)
    assert "frame-ancestors https://notebooks.example" in headers["content-security-policy"]
    assert (await ask(app, method="HEAD"))[2] == b""
    assert (await ask(app, headers={"if-none-match": headers["etag"]}))[0] == 304
    assert (await ask(app, headers={"accept-encoding": "gzip"}))[1]["content-encoding"] == "gzip"
    assert (await ask(app, "/nothing"))[0] == 404
    status, headers, _ = await ask(app, method="POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "root_path", "status", "location"),
    [
        ("/train/", "/train", 200, None),
        ("/train", "/train", 307, "./train/?a=b"),
        ("/api/train", "/api/train", 307, "./train/?a=b"),
        ("/ml/train/", "/ml/train", 200, None),
        ("", "", 307, "."),
        ("", "/train", 307, "./train/?a=b"),
        ("/", "/train", 200, None),
        ("/training/", "/train", 404, None),
    ],
)
async def test_where_it_is_mounted(
    shared: SharedServer, path: str, root_path: str, status: int, location: str | None
) -> None:
    app = Dashboard().asgi(auth=says("read_only"))
    got = await ask(app, path, root_path=root_path, query_string=b"a=b")
    assert got[0] == status
    assert got[1].get("location", "").startswith(location or "")


@pytest.mark.anyio
async def test_auth_may_be_asynchronous_or_an_object(shared: SharedServer) -> None:
    async def asks_a_database(scope: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        return "read_only"

    class Users:
        async def __call__(self, scope: Any) -> Any:
            return await asks_a_database(scope)

    for auth in (asks_a_database, Users(), lambda scope: asks_a_database(scope)):
        status, _, body = await ask(Dashboard().asgi(auth=auth), "/api/status")
        assert status == 200 and b'"role":"read_only"' in body


@pytest.mark.anyio
async def test_a_dashboard_that_is_read_only_gives_no_control(shared: SharedServer) -> None:
    app = Dashboard(read_only=True).asgi(auth=says("control"))
    assert b'"role":"read_only"' in (await ask(app, "/api/status"))[2]


class Raises(Exception):
    pass


async def hangs(scope: Any) -> Any:
    await anyio.sleep_forever()


def raises(scope: Any) -> Any:
    raise Raises("of the application")


FAILURES: Final = [
    pytest.param(raises, "auth failed", id="raises"),
    pytest.param(says(True), 'must return "control", "read_only" or None, got True', id="wrong"),
    pytest.param(hangs, "auth took longer than", id="hangs"),
    pytest.param("blocks", "auth took longer than", id="blocks"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("auth", "why"), FAILURES)
async def test_auth_that_fails_refuses_and_is_logged_once(
    auth: Any,
    why: str,
    shared: SharedServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    over = threading.Event()
    if auth == "blocks":
        auth = lambda scope: over.wait(PATIENCE)  # noqa: E731
    if "longer" in why:
        monkeypatch.setattr(asgi, "AUTH_TIMEOUT", 0.05)
    app = Dashboard().asgi(auth=auth)
    try:
        with caplog.at_level(logging.ERROR, logger="offloop"):
            for path in ("/", "/api/status"):
                status, _, body = await ask(app, path)
                assert status == 500 and b"its log has the reason" in body
            assert await Socket(app).refusal() == 500
    finally:
        over.set()
    assert len(caplog.records) == 1 and why in caplog.text
    assert ("Raises: of the application" in caplog.text) == (why == "auth failed")


@pytest.mark.anyio
async def test_websockets_that_are_refused(shared: SharedServer) -> None:
    app = Dashboard(allow_hosts=["outside.example"]).asgi(auth=says("control"))
    for origin in ("https://elsewhere.example", "null", "http://[", "file://host.example"):
        assert await Socket(app, headers={"origin": origin}).refusal() == 403
    assert await Socket(app, subprotocols=[]).refusal() == 400
    assert await Socket(Dashboard(allow_hosts=["outside.example"]).asgi(auth=says(None))).refusal() == 401
    # Servers that cannot say more
    without = Socket(app, headers={"origin": "null"}, extensions={})
    await without.run()
    assert [message["type"] for message in without.sent] == ["websocket.close"]
    for origin in ("http://host.example", "https://HOST.example", "https://outside.example"):
        async with opened(app, headers={"origin": origin}) as accepted:
            assert accepted.sent[0]["subprotocol"] == SUBPROTOCOL


@pytest.mark.anyio
async def test_messages_that_are_too_large_or_none_of_ours_end_the_websocket(shared: SharedServer) -> None:
    app = Dashboard().asgi(auth=says("control"))
    for said, code in (("x" * (MAX_MESSAGE + 1), 1009), ("no message", CLOSE_PROTOCOL)):
        async with opened(app) as viewer:
            viewer.say(said)
            last = await viewer.wait(
                lambda sent: [each for each in sent if each["type"] == "websocket.close"]
            )
            assert last[0]["code"] == code and last[0]["reason"]


@pytest.mark.anyio
async def test_places_are_kept_and_given_back(shared: SharedServer) -> None:
    app = Dashboard(max_viewers=1).asgi(auth=says("control"))
    async with opened(app) as first:
        await first.wait(lambda sent: len(sent) > 1)
        async with opened(app) as second:
            closed = await second.wait(
                lambda sent: [each for each in sent if each["type"] == "websocket.close"]
            )
            assert closed[0]["code"] == CLOSE_FULL and "already 1 viewers" in closed[0]["reason"]
        assert b'"full":true' in (await ask(app, "/api/status"))[2]
    with anyio.fail_after(PATIENCE):
        while b'"full":true' in (await ask(app, "/api/status"))[2]:
            await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_the_application_may_cancel_a_websocket(shared: SharedServer) -> None:
    app = Dashboard().asgi(auth=says("control"))
    async with anyio.create_task_group() as tasks:
        viewer = await enter(app, tasks)
        await viewer.wait(lambda sent: len(sent) > 1)
        tasks.cancel_scope.cancel()
    with anyio.fail_after(PATIENCE):
        while b'"viewers":0' not in (await ask(app, "/api/status"))[2]:
            await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_a_viewer_that_is_lost_while_it_is_sent_something_is_no_failure(shared: SharedServer) -> None:
    app = Dashboard().asgi(auth=says("control"))
    async with anyio.create_task_group() as tasks:
        viewer = await enter(app, tasks)
        await viewer.wait(lambda sent: len(sent) > 1)
        viewer.is_lost = True
        viewer.say(encode_message(Ping(sent=1.0)).decode())


def train_with(dashboard: Dashboard) -> None:
    tiny_trainer().train(tiny_loader(2), epochs=1, callbacks=[dashboard])


@pytest.mark.anyio
async def test_runs_without_settings_show_themselves_there_and_open_no_port(
    shared: SharedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    mounted = Dashboard()
    app = mounted.asgi(auth=says("control"))
    run = Dashboard()
    await anyio.to_thread.run_sync(train_with, run)
    async with opened(app) as viewer:
        await viewer.wait(lambda sent: '"state":"completed"' in str(sent))
    assert shared._server is not None and shared._server.port == 0
    assert "Live page" not in "".join(capfd.readouterr())
    for each in (mounted, run):
        with pytest.raises(RuntimeError, match="its address is the one where the application mounts"):
            _ = each.url
    with pytest.raises(ValueError, match="the one mounted in this application has other settings"):
        await anyio.to_thread.run_sync(train_with, Dashboard(port=0))


@pytest.mark.anyio
async def test_lifespan_of_an_application_that_is_the_page_alone(shared: SharedServer) -> None:
    messages, sent = ["lifespan.startup", "lifespan.shutdown"], []

    async def receive() -> Any:
        return {"type": messages.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await Dashboard().asgi(auth=says(None))({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_bad_arguments(shared: SharedServer) -> None:
    for wrong in ({}, {"auth": None}, {"auth": "control"}):
        with pytest.raises(TypeError, match="asgi\\(\\) needs auth: a function"):
            Dashboard().asgi(**wrong)
    for given in ({"port": 0}, {"host": "0.0.0.0"}, {"token": "x" * 16}, {"compression": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is the application's"):
            Dashboard(**given).asgi(auth=says(None))
    with pytest.raises(ValueError, match="open and keep_open are for a page of its own"):
        Dashboard(keep_open=True).asgi(auth=says(None))
    Dashboard(max_viewers=3).asgi(auth=says(None))
    with pytest.raises(ValueError, match="mounted with other settings"):
        Dashboard(max_viewers=4).asgi(auth=says(None))


def test_a_page_that_is_open_at_a_port_is_not_mounted(shared: SharedServer) -> None:
    with (
        Dashboard(port=0, quiet=True),
        pytest.raises(ValueError, match="call asgi\\(\\) before the first run begins"),
    ):
        Dashboard().asgi(auth=says(None))
