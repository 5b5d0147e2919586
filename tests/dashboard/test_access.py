"""Who may enter, in a real browser: what it holds for one port, and what it sends to others."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from socket_viewer import PATIENCE as SECONDS
from socket_viewer import SocketViewer, await_on_loop, request

from offloop.dashboard import Dashboard
from offloop.dashboard.protocol.limits import CLOSE_UNAUTHORISED
from offloop.dashboard.serving.security import forget_key
from offloop.dashboard.serving.server import Server

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

PATIENCE: Final = 30_000
"""Milliseconds for something to appear."""
CONNECTED: Final = "no run yet"
"""What the page says once the server has let it in: there is no run here."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that has never been here."""
    expect.set_options(timeout=PATIENCE)
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Dashboard(port=0, quiet=True) as dashboard:
        yield dashboard


def server_of(dashboard: Dashboard) -> Server:
    assert dashboard._server is not None
    return dashboard._server


def base_of(dashboard: Dashboard) -> str:
    """Return the address as one bookmarks it."""
    return dashboard.url.partition("?")[0]


def is_held_by(dashboard: Dashboard, role: str) -> bool:
    """True if there is one viewer, with a role."""
    return [each.viewer.role for each in server_of(dashboard).hub.connections] == [role]


def expect_word(page: Page, word: str) -> None:
    expect(page.locator(".pill .word")).to_have_text(word)


def enter(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    return page


class Stranger(http.server.ThreadingHTTPServer):
    """A server of somebody else, on another port of this machine, that notes the cookies it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.cookies: list[str] = []


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Stranger)
        self.server.cookies += self.headers.get_all("Cookie") or []
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>stranger</title>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(SECONDS)


ATTEMPTS: Final = """async (base) => {
    const said = {storage: localStorage.length};
    said.socket = await new Promise((resolve) => {
        const socket = new WebSocket(base.replace("http", "ws") + "ws", "offloop.v1");
        socket.onopen = () => socket.send('{"type":"hi","protocol":1}');
        socket.onmessage = ({data}) => resolve(data);
        socket.onclose = ({code}) => resolve(code);
    });
    said.status = await fetch(base + "api/status", {credentials: "include"}).then((answer) => answer.status, String);
    return said;
}"""


def test_a_cookie_taken_by_a_server_on_another_port_opens_nothing(
    context: BrowserContext, dashboard: Dashboard, stranger: Stranger
) -> None:
    page = enter(context, dashboard.url)
    expect_word(page, CONNECTED)
    visit = enter(context, f"http://127.0.0.1:{stranger.server_address[1]}/")
    (cookie,) = {cookie for cookie in stranger.cookies if "offloop" in cookie}
    # Its page, in the same browser
    said = visit.evaluate(ATTEMPTS, base_of(dashboard))
    assert said["storage"] == 0 and said["socket"] == 1006 and "TypeError" in said["status"]
    # Its own program, which may claim to be our page
    server = server_of(dashboard)
    assert request(server, "/api/status", Cookie=cookie)[0] == 401
    with SocketViewer(dashboard.url, cookie=cookie) as viewer:
        assert viewer.wait_closed()[0] == CLOSE_UNAUTHORISED
        assert viewer.page.hello is None
    expect_word(page, CONNECTED)


def test_the_printed_address_is_enough_once_for_all_tabs_and_reloads(
    context: BrowserContext, dashboard: Dashboard
) -> None:
    page = enter(context, dashboard.url)
    expect_word(page, CONNECTED)
    assert page.url == base_of(dashboard)  # neither token nor key
    page.reload()
    expect_word(page, CONNECTED)
    bookmark = enter(context, base_of(dashboard))
    expect_word(bookmark, CONNECTED)
    view = enter(context, f"{base_of(dashboard)}#v=1&x=epoch")
    expect_word(view, CONNECTED)
    assert view.url == f"{base_of(dashboard)}#v=1&x=epoch"
    assert len(server_of(dashboard).hub.connections) == 3


def test_a_browser_without_the_key_is_let_in_by_the_printed_address_in_another_tab(
    context: BrowserContext, dashboard: Dashboard
) -> None:
    """It has the cookie, as from another port, and so gets as far as the greeting."""
    port_of_another = enter(context, dashboard.url)
    expect_word(port_of_another, CONNECTED)
    port_of_another.evaluate("() => localStorage.clear()")
    port_of_another.close()
    page = enter(context, base_of(dashboard))
    expect_word(page, "not authorised")
    expect(page.get_by_text("Open the address with the token that the run printed.").first).to_be_visible()
    expect_word(enter(context, dashboard.url), CONNECTED)
    page.evaluate("() => { window.dispatchEvent(new Event('online')); }")
    expect_word(page, CONNECTED)


def test_each_role_enters_and_a_reader_stays_one(browser: Browser, dashboard: Dashboard) -> None:
    for address, role in ((dashboard.url, "control"), (dashboard.read_only_url, "read_only")):
        context = browser.new_context()
        expect_word(enter(context, address), CONNECTED)
        await_on_loop(server_of(dashboard), functools.partial(is_held_by, dashboard, role))
        context.close()


def test_logging_out_ends_the_pages_and_the_printed_address_lets_them_in_again(
    context: BrowserContext, dashboard: Dashboard
) -> None:
    page = enter(context, dashboard.url)
    expect_word(page, CONNECTED)
    with SocketViewer(dashboard.url) as program:
        program.wait(lambda model: model.hello)
        assert forget_key()
        expect_word(page, "not authorised")
        page.reload()
        expect_word(page, "not authorised")
        page.goto(dashboard.url)
        expect_word(page, CONNECTED)
        assert program.closed is None


def test_a_browser_that_stores_nothing_is_let_in_by_the_printed_address(
    browser: Browser, dashboard: Dashboard
) -> None:
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})"
    )
    expect_word(enter(context, dashboard.url), CONNECTED)
    context.close()
