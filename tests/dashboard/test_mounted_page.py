"""The page in an application of others, in a real browser."""

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from example_service import Service, serving
from live_page import OpenPage
from playwright.sync_api import expect

from offloop.dashboard.serving.asgi import NOT_SIGNED_IN


def test_a_browser_that_has_signed_in_sees_runs_and_steers_them(open_page: OpenPage) -> None:
    with serving("uvicorn") as address, Service(address) as service:
        page = open_page(f"{address}/train")
        expect(page.get_by_text(NOT_SIGNED_IN)).to_be_visible()
        assert page.request.post(f"{address}/login", data={"secret": "of the owner"}).ok
        page.goto(f"{address}/train?theme")
        assert page.url.startswith(f"{address}/train/?theme")
        expect(page.get_by_text("No run yet").first).to_be_visible()
        run = service.start()
        expect(page.get_by_role("heading", name=run)).to_be_visible()
        page.get_by_role("button", name="Pause", exact=True).click()
        expect(page.get_by_role("button", name="Resume")).to_be_visible()
        assert service.http.get("/runs").json()[run].startswith("paused, step ")
        service.cancel(run)
        expect(page.get_by_text("cancelled").first).to_be_visible()
