"""The page in the output of a cell, in a real browser, on a site of another name."""

import os
import signal

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from live_page import OpenPage
from notebook import SETUP, Lab, Notebook, html_of
from playwright.sync_api import Browser, expect


@pytest.mark.slow  # a kernel that imports torch, and a browser
def test_a_cell_shows_the_run_live_without_head_and_controls(
    notebook: Notebook, lab: Lab, open_page: OpenPage
) -> None:
    notebook.run(SETUP)
    (shown,) = notebook.run("dashboard")
    lab.html = html_of(shown)
    page = open_page(lab.address)
    frame = page.frame_locator("iframe")
    expect(frame.get_by_role("heading", name="No run yet")).to_be_visible()
    running = notebook.begin("trainer.train(batches, batches, epochs=1_000_000, callbacks=[dashboard])")
    expect(frame.get_by_role("figure", name="loss")).to_be_visible()
    expect(frame.get_by_role("tab", name="Metrics")).to_be_visible()
    for gone in ("Pause", "Stop…"):
        expect(frame.get_by_role("button", name=gone)).to_have_count(0)
    expect(frame.locator(".head")).to_be_hidden()
    # The whole page, from the line below the frame, with the controls
    with page.context.expect_page() as opened:
        page.get_by_role("link").click()
    whole = opened.value
    whole.locator(".controls").get_by_role("button", name="Stop").click()
    whole.get_by_role("dialog").get_by_role("button", name="Stop").click()
    running.join()
    assert "image/svg+xml" in notebook.save().cells[1]["outputs"][0]["data"]


@pytest.mark.slow  # a kernel that imports torch, and a browser
def test_a_kernel_that_dies_leaves_its_curves_and_says_so(
    notebook: Notebook, lab: Lab, open_page: OpenPage
) -> None:
    notebook.run(SETUP)
    (shown,) = notebook.run("dashboard")
    (pid,) = notebook.run("import os; os.getpid()")
    lab.html = html_of(shown)
    frame = open_page(lab.address).frame_locator("iframe")
    running = notebook.begin(
        "trainer.train(batches, batches, epochs=1_000_000, callbacks=[dashboard])", dies=True
    )
    canvas = frame.get_by_role("figure", name="loss").locator("canvas")
    expect(canvas).to_be_visible()
    os.kill(int(pid["data"]["text/plain"]), signal.SIGKILL)
    expect(frame.locator(".head")).to_be_visible()
    expect(frame.locator(".head")).to_contain_text("server gone")
    expect(canvas).to_be_visible()
    running.join()


@pytest.mark.slow  # a kernel that imports torch, and a browser
def test_another_site_cannot_frame_the_page_by_itself(notebook: Notebook, lab: Lab, browser: Browser) -> None:
    notebook.run(SETUP)
    (shown,) = notebook.run("dashboard")
    own = html_of(shown).split('src="')[1].split("?")[0]
    lab.html = f'<iframe src="{own}?embed={"0" * 32}"></iframe><iframe src="{own}?embed"></iframe>'
    page = browser.new_page()
    with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
        page.goto(lab.address)
    for frame in page.frames[1:]:
        assert "Metrics" not in frame.content()
    page.close()
