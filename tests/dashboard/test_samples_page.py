"""The tab Samples in a real browser: texts, pictures and tables, what can be wrong with them, and runs side by side."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
pytest.importorskip("axe_playwright_python", reason="tests in a browser need offloop[browser]")
from axe_playwright_python.sync_playwright import Axe
from live_page import OpenPage, Training, figure, pixels, shot
from playwright.sync_api import Locator, Page, expect
from run_files import served, with_samples

from offloop.engine import PictureSample, TableSample, TextSample

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EVIL = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def block(page: Page, key: str) -> Locator:
    return page.get_by_role("region", name=key, exact=True)


def slider(page: Page, key: str) -> Locator:
    return page.get_by_role("slider", name=f"Step of {key}")


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    with Training(tmp_path) as training:
        yield training.begin()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where `offloop serve` has its page."""
    with served(tmp_path) as address:
        yield address


def show(page: Page, view: str) -> None:
    """Have the page show a view, as its address names it."""
    page.evaluate("view => { location.hash = `v=1&${view}`; }", view)


def look(page: Page) -> None:
    """Choose the tab."""
    page.get_by_role("tab", name="Samples").click()


def test_a_run_without_samples_has_no_tab_for_them_and_one_that_publishes_gets_it(
    training: Training, open_page: OpenPage
) -> None:
    page = open_page(training.dashboard.url)
    training.step(loss=1.0)
    expect(figure(page, "Step")).to_contain_text("1")
    expect(page.get_by_role("tab", name="Samples")).to_be_hidden()
    training.run.publish(TextSample("code", "def f():\n    pass"))
    expect(page.get_by_role("tab", name="Samples")).to_be_visible()
    page.keyboard.press("7")
    expect(block(page, "code").locator("pre")).to_have_text("def f():\n    pass")


def test_texts_pictures_and_tables_come_back_as_they_were_published(
    training: Training, open_page: OpenPage
) -> None:
    colours, grey = noise(5, 7, 3), noise(6, 4, seed=1)
    long = "".join(f"line {number} ä\n" for number in range(60_000))
    page = open_page(training.dashboard.url, viewport={"width": 1280, "height": 900})
    training.step(loss=1.0)
    run = training.run
    run.publish(TextSample("a/long", long, "a long one"))
    run.publish(TextSample("a/text", EVIL))
    run.publish(PictureSample("b/picture", colours, EVIL))
    rows: list[list[Any]] = [[grey, 3, "x"], [255 - grey, 1, EVIL], [None, 2, "b"]]
    run.publish(TableSample("c/table", ["image", "said", EVIL], rows))
    look(page)
    expect(block(page, "a/long").locator("pre")).to_contain_text("line 0 ä")
    expect(block(page, "a/long")).to_contain_text("a long one")
    text = block(page, "a/long").locator("pre").evaluate("text => text.textContent")
    assert text == long[:200_000]
    with page.expect_download() as download:
        block(page, "a/long").get_by_role("button", name="Download").click()
    assert Path(download.value.path()).read_text(encoding="utf-8") == long
    assert block(page, "a/text").locator("pre").evaluate("text => text.textContent") == EVIL
    assert pixels(block(page, "b/picture").get_by_role("img")) == colours.tolist()
    expect(block(page, "b/picture")).to_contain_text("7 \u00d7 5, PNG")
    table = block(page, "c/table")
    assert pixels(table.get_by_role("img").nth(1)) == (255 - grey)[..., None].repeat(3, 2).tolist()
    said = table.locator("tbody tr td:nth-child(2)")
    expect(said).to_have_text(["3", "1", "2"])
    table.get_by_role("button", name="said").click()
    expect(said).to_have_text(["1", "2", "3"])
    # The picture went along with its row.
    assert pixels(table.get_by_role("img").nth(0)) == (255 - grey)[..., None].repeat(3, 2).tolist()
    table.get_by_role("button", name="said").click()
    expect(said).to_have_text(["3", "2", "1"])
    expect(page.locator("h2 img, script:not([src]), pre img")).to_have_count(0)
    assert page.title() != "evil"
    shot(page, "samples")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 400, "height": 800})
    shot(page, "samples-narrow-dark")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_picture_is_enlarged_and_closed_by_keys(training: Training, open_page: OpenPage) -> None:
    page = open_page(training.dashboard.url)
    training.step(loss=1.0)
    training.run.publish(PictureSample("digits", noise(28, 28)))
    look(page)
    block(page, "digits").get_by_role("button", name="digits").focus()
    page.keyboard.press("Enter")
    large = page.get_by_role("dialog").get_by_role("img")
    assert pixels(large) == noise(28, 28)[..., None].repeat(3, 2).tolist()
    width = large.evaluate("image => image.width")
    assert width % 28 == 0 and width > 224
    shot(page, "sample-enlarged")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_nothing_serious_hinders_anybody(tmp_path: Path, address: str, open_page: OpenPage) -> None:
    table = TableSample("c", ["image", "said"], [[noise(4, 4), 3]] * 3, step=2)
    samples = [PictureSample("a", noise(4, 4), step=1), PictureSample("a", noise(4, 4, 3), step=2), table]
    with_samples(tmp_path, "run", *samples, TextSample("d", "text " * 500, "a caption", step=2))
    # axe brings a script along; every other test has the policy
    page = open_page(address, bypass_csp=True)
    look(page)
    expect(block(page, "d").locator("pre")).to_contain_text("text")
    expect(block(page, "c").get_by_role("img")).to_have_count(3)
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        for width in (320, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            found = Axe().run(page)
            impacts = [each["impact"] for each in found.response["violations"]]
            assert not {"serious", "critical"} & set(impacts), found.generate_report()
    block(page, "a").get_by_role("button", name="a, step 2").click()
    found = Axe().run(page)
    assert not {"serious", "critical"} & {each["impact"] for each in found.response["violations"]}


def test_the_slider_follows_the_newest_step_until_it_is_moved(
    training: Training, open_page: OpenPage
) -> None:
    page = open_page(training.dashboard.url)

    def publish(step: int) -> None:
        training.step(loss=1.0)
        expect(figure(page, "Step")).to_contain_text(str(step))
        training.run.publish(TextSample("code", f"text {step}"))

    publish(1)
    look(page)
    shown = block(page, "code").locator("pre")
    expect(shown).to_have_text("text 1")
    publish(2)
    expect(shown).to_have_text("text 2")
    slider(page, "code").focus()
    page.keyboard.press("ArrowLeft")
    expect(shown).to_have_text("text 1")
    expect(block(page, "code").locator("output")).to_contain_text("step 1, epoch 1")
    publish(3)
    expect(slider(page, "code")).to_have_attribute("max", "2")
    expect(shown).to_have_text("text 1")
    expect(slider(page, "code")).to_be_focused()
    page.keyboard.press("End")
    expect(shown).to_have_text("text 3")
    publish(4)
    expect(shown).to_have_text("text 4")


def test_an_event_of_a_sample_is_a_line_that_leads_to_it(training: Training, open_page: OpenPage) -> None:
    page = open_page(training.dashboard.url)
    for step in (1, 2):
        training.step(loss=1.0)
        expect(figure(page, "Step")).to_contain_text(str(step))
        training.run.publish(TextSample("code", f"text {step}", "a caption"))
    page.keyboard.press("2")
    rows = page.locator(".log .row", has_text="Text code: a caption")
    expect(rows).to_have_count(2)
    rows.last.get_by_role("button", name="step 1").click()
    expect(block(page, "code").locator("pre")).to_have_text("text 1")


def test_several_samples_of_one_step_are_shown_together(training: Training, open_page: OpenPage) -> None:
    page = open_page(training.dashboard.url)
    training.step(loss=1.0)
    expect(figure(page, "Step")).to_contain_text("1")
    for number in range(30):
        training.run.publish(TextSample("code", f"text {number}"))
    look(page)
    expect(block(page, "code").locator("pre")).to_have_count(24)
    expect(block(page, "code")).to_contain_text("6 more of this step")


# Run directories -------------------------------------------------------------------------------------


def test_runs_are_side_by_side_at_the_same_step_or_the_one_before(
    tmp_path: Path, address: str, open_page: OpenPage
) -> None:
    with_samples(
        tmp_path, "first", *(TextSample("code", f"first {step}", step=step) for step in (1, 2, 3, 4))
    )
    with_samples(tmp_path, "second", *(TextSample("code", f"second {step}", step=step) for step in (2, 4)))
    page = open_page(address)
    show(page, "run=first&with=second&tab=samples")
    shown = block(page, "code").locator("pre")
    expect(shown).to_have_text(["first 4", "second 4"])
    slider(page, "code").focus()
    page.keyboard.press("ArrowLeft")
    expect(shown).to_have_text(["first 3", "second 2"])
    heads = block(page, "code").get_by_role("heading", level=3)
    expect(heads).to_have_text(["first", "second step 2"])
    assert (
        heads.locator(".dot").evaluate_all(
            "dots => new Set(dots.map(dot => getComputedStyle(dot).backgroundColor)).size"
        )
        == 2
    )
    page.keyboard.press("Home")
    expect(shown).to_have_text(["first 1"])
    page.keyboard.press("End")
    shot(page, "samples-of-two-runs")


@pytest.mark.parametrize(
    ("how", "said"),
    [("changed", "has changed on disk"), ("removed", "is missing"), ("link", "cannot be read")],
)
def test_a_picture_that_is_not_what_was_published_is_not_shown(
    tmp_path: Path, address: str, open_page: OpenPage, how: str, said: str
) -> None:
    picture = PictureSample("digits", noise(3, 3), step=2)
    path = with_samples(tmp_path, "run", picture, TextSample("code", "fine", step=2))
    file = path / "samples" / f"{picture.picture.sha256}.png"
    if how == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    else:
        file.unlink()
    if how == "link":
        file.symlink_to("/etc/passwd")
    page = open_page(address)
    look(page)
    expect(block(page, "digits")).to_contain_text(said)
    expect(block(page, "digits").get_by_role("img")).to_have_count(0)
    expect(block(page, "code").locator("pre")).to_have_text("fine")


def test_a_thousand_samples_of_a_key_ask_for_what_is_seen(
    tmp_path: Path, address: str, open_page: OpenPage
) -> None:
    samples = [PictureSample("digits", noise(8, 8, seed=step), step=step) for step in range(1, 1_001)]
    with_samples(tmp_path, "run", *samples, steps=1_001)
    page = open_page(address)
    asked: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda data: asked.append(str(data))))
    page.reload()
    look(page)
    picture = block(page, "digits").get_by_role("img")
    assert pixels(picture) == noise(8, 8, seed=1_000)[..., None].repeat(3, 2).tolist()
    assert len([each for each in asked if '"type":"sample"' in each]) == 1
    slider(page, "digits").focus()
    page.keyboard.press("Home")
    expect(block(page, "digits").get_by_role("img", name="digits, step 1", exact=True)).to_be_visible()
    assert pixels(picture) == noise(8, 8, seed=1)[..., None].repeat(3, 2).tolist()
    assert len([each for each in asked if '"type":"sample"' in each]) == 2


def test_the_demo_shows_the_code_that_it_writes(tmp_path: Path, address: str, open_page: OpenPage) -> None:
    demo = [sys.executable, "-m", "offloop", "demo", "--steps", "100", "--device", "cpu", "--no-dashboard"]
    subprocess.run([*demo, "--run-dir", str(tmp_path)], check=True, capture_output=True)
    page = open_page(address)
    look(page)
    expect(block(page, "code").locator("pre")).to_contain_text("def ")
    shot(page, "samples-of-the-demo")
