"""What the viewer sets for one panel of the live page, and what is saved of it, in a real browser."""

import csv
import itertools
import math
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from drawing import Drawing
from live_page import NEXT_FRAME, PATIENCE, OpenPage, Training, chart, options, shot
from playwright.sync_api import Download, Page, expect

from offloop import Callback, CheckpointSaved, ModelCheckpoint, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def decades(training: Callable[..., Training], open_page: OpenPage) -> Page:
    """A loss and another metric that fall by a tenth with each of nine steps, and a val_loss at the third."""
    run = training(knobs={"val_every_n_steps": 3}).begin()
    for step in range(1, 10):
        run.step(loss=10.0**-step, other=10.0**-step)
    page = open_page(run.dashboard.url)
    expect(chart(page, "other").locator(".curve-value")).not_to_be_empty()
    return page


def waits_for(page: Page, part: str) -> None:
    """Wait until the address has this, and the charts are drawn."""
    page.wait_for_function("part => decodeURIComponent(location.hash).includes(part)", arg=part)
    page.evaluate(NEXT_FRAME)


def heights(page: Page, name: str, label: str) -> list[float]:
    """Return how far the points of a curve are above each other, in pixels."""
    drawing = Drawing(chart(page, name))
    pixels = [(y - drawing._y[0]) / drawing._y[1] for _, y in drawing.line(label)]
    return [after - before for before, after in itertools.pairwise(pixels)]


def plot(page: Page, name: str) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the part with the curves."""
    box = chart(page, name).locator(".plot-over").bounding_box()
    assert box is not None
    return box["x"], box["y"], box["width"], box["height"]


# The y axis ----------------------------------------------------------------------------------------


def test_one_panel_is_logarithmic_and_the_others_are_not(decades: Page) -> None:
    page = decades
    before = Drawing(chart(page, "other")).texts
    options(page, "loss").get_by_role("combobox", name="Y axis").select_option("logarithmic")
    waits_for(page, "y=log,,,loss")
    shot(page, "options")
    # Equal factors are equal distances.
    assert heights(page, "loss", "step") == pytest.approx([heights(page, "loss", "step")[0]] * 8, rel=0.02)
    assert Drawing(chart(page, "other")).texts == before
    page.reload()
    expect(chart(page, "loss").locator(".curve-value").first).not_to_be_empty()
    page.evaluate(NEXT_FRAME)
    assert heights(page, "loss", "step") == pytest.approx([heights(page, "loss", "step")[0]] * 8, rel=0.02)


def test_all_are_logarithmic_but_one(decades: Page) -> None:
    page = decades
    before = Drawing(chart(page, "other")).texts
    page.get_by_role("button", name="log y").click()
    options(page, "other").get_by_role("combobox", name="Y axis").select_option("linear")
    waits_for(page, "y=linear,,,other")
    assert Drawing(chart(page, "other")).texts == before
    assert heights(page, "loss", "step") == pytest.approx([heights(page, "loss", "step")[0]] * 8, rel=0.02)


@pytest.fixture
def rising(training: Callable[..., Training], open_page: OpenPage) -> Page:
    """A loss that is its step, 1 to 100."""
    run = training().begin()
    for step in range(1, 101):
        run.step(loss=float(step), **{"loss/head": 2.0 * step, "loss/tail": 3.0 * step})
    page = open_page(run.dashboard.url)
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("100")
    # What is constant takes a line, and the others its room.
    expect(chart(page, "lr").locator("canvas")).to_have_count(0)
    return page


def test_a_range_is_typed_and_what_is_outside_is_counted(rising: Page) -> None:
    page = rising
    opened = options(page, "loss")
    opened.get_by_label("Least value").fill("20")
    opened.get_by_label("Greatest value").fill("60.5")
    page.keyboard.press("Enter")
    waits_for(page, "y=,20,60.5,loss")
    drawing = Drawing(chart(page, "loss"))
    assert {"40 above", "19 below"} <= set(drawing.texts)
    canvas = chart(page, "loss").locator("canvas").bounding_box()
    assert canvas is not None
    assert drawing.y(plot(page, "loss")[1] - canvas["y"]) == pytest.approx(60.5, abs=1)
    page.keyboard.press("Escape")
    expect(opened).to_be_hidden()


def test_what_is_no_range_is_said_and_what_is_legal(rising: Page) -> None:
    page = rising
    opened = options(page, "loss")
    least, greatest = opened.get_by_label("Least value"), opened.get_by_label("Greatest value")
    least.fill("10")
    greatest.fill("1")
    page.keyboard.press("Enter")
    problem = opened.get_by_role("alert")
    expect(problem).to_have_text("10 to 1 is no range: the first number must be less than the second.")
    expect(least).to_have_attribute("aria-invalid", "true")
    shot(page, "no-range")
    greatest.fill("60")
    page.keyboard.press("Enter")
    expect(problem).to_be_hidden()
    waits_for(page, "y=,10,60,loss")
    least.fill("-1")
    page.keyboard.press("Enter")
    waits_for(page, "y=,-1,60,loss")
    opened.get_by_role("combobox").select_option("logarithmic")
    expect(problem).to_have_text("-1 has no place on a logarithmic axis: give a number above 0, or none.")


def test_a_search_that_is_no_expression_says_so(rising: Page) -> None:
    page = rising
    page.get_by_label("Search metrics").fill("/(/")
    expect(page.locator(".charts .empty")).to_have_text(
        re.compile(r"^/\(/ cannot be searched for: .* Words without")
    )
    expect(chart(page, "loss")).to_be_hidden()


def test_a_drag_up_or_down_sets_the_range_and_a_double_click_undoes_it(rising: Page) -> None:
    page = rising
    left, top, width, height = plot(page, "loss")
    low, high = Drawing(chart(page, "loss")), top
    canvas = chart(page, "loss").locator("canvas").bounding_box()
    assert canvas is not None
    wanted = [low.y(high + height * share - canvas["y"]) for share in (0.75, 0.25)]
    page.mouse.move(left + width / 2, top + height * 0.25)
    page.mouse.down()
    page.mouse.move(left + width / 2 + 10, top + height * 0.75, steps=5)
    page.mouse.up()
    waits_for(page, ",loss")
    found = re.search(r"y=,([\d.]+),([\d.]+),loss", page.evaluate("() => decodeURIComponent(location.hash)"))
    assert found is not None and "zoom" not in page.url
    assert [float(each) for each in found.groups()] == pytest.approx(wanted, abs=2)
    page.mouse.dblclick(left + width / 2, top + height / 2)
    page.wait_for_function("() => !location.hash.includes('y=')")


# The x axis ----------------------------------------------------------------------------------------


def zoom_of(page: Page) -> list[float]:
    return [
        float(end)
        for end in page.evaluate("() => /zoom=([^&]*)/.exec(decodeURIComponent(location.hash))[1].split(',')")
    ]


def test_shift_and_a_drag_pan_up_to_the_ends_of_the_run(rising: Page) -> None:
    page = rising
    page.evaluate("() => { location.hash = '#v=1&zoom=40,80'; }")
    waits_for(page, "zoom=40")
    page.evaluate(NEXT_FRAME)
    left, top, width, height = plot(page, "loss")
    for share, ends in ((0.25, [30, 70]), (2, [1, 41]), (-5, [60, 100])):
        before = page.url
        page.keyboard.down("Shift")
        page.mouse.move(left + width / 2, top + height / 2)
        page.mouse.down()
        page.mouse.move(left + width / 2 + width * share, top + height / 2, steps=4)
        page.mouse.up()
        page.keyboard.up("Shift")
        page.wait_for_function("before => location.href !== before", arg=before)
        assert zoom_of(page) == pytest.approx(ends, abs=0.5)


def test_ctrl_and_the_wheel_zoom_about_the_mouse(rising: Page) -> None:
    page = rising
    left, top, width, height = plot(page, "loss")
    page.mouse.move(left + width / 4, top + height / 2)
    # Without Ctrl the page scrolls.
    page.mouse.wheel(0, -100)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    waits_for(page, "zoom=")
    low, high = zoom_of(page)
    at = 1 + 99 / 4
    assert (high - low) / 99 == pytest.approx(math.exp(-0.25), rel=0.01)
    assert (at - low) / (high - low) == pytest.approx(0.25, abs=0.01)
    page.mouse.wheel(0, 100)
    page.mouse.wheel(0, 100)
    page.wait_for_function("() => !location.hash.includes('zoom=')")
    page.keyboard.up("Control")


# Which panels, and where ---------------------------------------------------------------------------


def test_a_pinned_panel_stands_first_and_stays_there(rising: Page) -> None:
    page = rising
    tail = page.locator(".chart", has=page.locator("[title='loss/tail']"))
    expect(page.locator(".chart").first).to_contain_text("loss")
    tail.get_by_role("button", name="Options of loss/tail").click()
    page.get_by_label("Pinned to the top").check()
    waits_for(page, "pin=loss/tail")
    page.keyboard.press("Escape")
    for _ in range(2):
        expect(page.locator(".chart-title").first).to_have_attribute("title", "loss/tail")
        expect(page.locator(".charts-heading").first).to_have_text("Pinned")
        expect(page.locator(".charts-heading")).to_have_text(["Pinned", "Metrics", "loss"])
        page.reload()
    shot(page, "pinned")
    tail.get_by_role("button", name="Options of loss/tail").click()
    page.get_by_label("Pinned to the top").uncheck()
    page.keyboard.press("Escape")
    expect(page.locator(".charts-heading:visible")).to_have_text(["Metrics", "loss"])


def test_metrics_that_an_expression_finds_share_a_panel(rising: Page) -> None:
    page = rising
    search = page.get_by_label("Search metrics")
    search.fill("/loss/.*/")
    expect(chart(page, "loss")).to_be_hidden()
    expect(page.locator(".charts-count")).to_have_text("2 of 4")
    page.get_by_role("button", name="One panel").click()
    waits_for(page, "join=/loss/.*/")
    expect(search).to_have_value("")
    joined = chart(page, "/loss/.*/")
    expect(joined.locator(".curve")).to_have_count(2)
    expect(joined.locator(".curve-value").first).to_have_text("200")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(joined)
    for label, factor in (("loss/head", 2), ("loss/tail", 3)):
        x, value = drawing.line(label)[-1]
        assert x == pytest.approx(100, abs=1) and value == pytest.approx(100 * factor, abs=3)
    shot(page, "joined")
    page.reload()
    expect(joined.locator(".curve")).to_have_count(2)
    options(page, "/loss/.*/").get_by_role("button", name="Take apart").click()
    expect(joined).to_have_count(0)
    expect(page.locator(".chart-title[title='loss/tail']")).to_be_visible()


def test_an_expression_with_endless_ways_holds_up_nothing(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    long = "a" * 60 + "b"
    for step in range(1, 4):
        run.step(loss=float(step), **{long: float(step)})
    page = open_page(run.dashboard.url)
    expect(chart(page, long).locator(".curve-value")).to_have_text("3")
    search = page.get_by_label("Search metrics")
    search.fill("/^(a+)+$/")
    expect(page.get_by_text("No metric has these words in its name.")).to_be_visible()
    search.fill("/^(a+)+b$/")
    expect(page.locator(".charts-count")).to_have_text("1 of 3")
    # A link that has one, to search with and to regroup by
    page.evaluate(
        "location.hash = '#v=1&search=' + encodeURIComponent('/^(a|a)+$/') + '&join=' + encodeURIComponent('/(a+)+$/')"
    )
    page.reload()
    expect(search).to_have_value("/^(a|a)+$/")
    expect(page.get_by_text("No metric has these words in its name.")).to_be_visible()
    search.fill("/(?=a)/")
    expect(page.locator(".charts .empty")).to_contain_text(
        "/(?=a)/ cannot be searched for: '(?=' is not known"
    )
    page.get_by_role("tab", name="Events").click()
    page.get_by_label("Filter events").fill("/(?=a)/")
    expect(page.locator(".events .empty")).to_contain_text("/(?=a)/ cannot be searched for")


def test_curves_of_a_panel_are_chosen(decades: Page) -> None:
    page = decades
    opened = options(page, "loss")
    opened.get_by_role("checkbox", name="val", exact=True).uncheck()
    waits_for(page, "hide=val_loss")
    opened.get_by_role("button", name="None").click()
    page.evaluate(NEXT_FRAME)
    assert "all curves are hidden" in Drawing(chart(page, "loss")).texts
    opened.get_by_role("button", name="All curves").click()
    page.wait_for_function("() => !location.hash.includes('hide')")


def test_the_button_that_opened_the_options_closes_them(decades: Page) -> None:
    page = decades
    opened = options(page, "loss")
    chart(page, "loss").get_by_role("button", name="Options of loss").click()
    expect(opened).to_be_hidden()
    options(page, "loss")


# Titles, marks, files ------------------------------------------------------------------------------


def test_a_maximised_panel_has_titles_at_its_axes(rising: Page) -> None:
    page = rising
    assert "Step" not in Drawing(chart(page, "loss")).texts
    chart(page, "loss").get_by_role("button", name="Maximise loss").click()
    waits_for(page, "panel=loss")
    page.evaluate(NEXT_FRAME)
    assert {"Step", "loss"} <= set(Drawing(chart(page, "loss")).texts)


class Saves(Callback):
    """Tells when a checkpoint is saved."""

    def __init__(self) -> None:
        self.saved = threading.Semaphore(0)

    async def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        self.saved.release()


def test_a_mark_says_what_it_is_under_the_mouse(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    saves = Saves()
    run = training(
        tmp_path, knobs={"val_every_n_steps": 10}, callbacks=[ModelCheckpoint(every_n_steps=15), saves]
    ).begin()
    for step in range(1, 41):
        run.step(loss=1 / step)
        if step in (15, 30):
            # One that begins while another is written may be left out.
            assert saves.saved.acquire(timeout=PATIENCE / 1000)
    page = open_page(run.dashboard.url)
    expect(chart(page, "loss").locator(".curve-value").first).to_have_text("0.02500")
    legend = page.get_by_role("group", name="Marks")
    expect(legend.get_by_role("button", name="Validations")).to_be_visible()
    expect(legend.get_by_role("button", name="Checkpoints")).to_be_visible()
    # What is constant takes a line, and the others its room.
    expect(chart(page, "lr").locator("canvas")).to_have_count(0)
    page.evaluate(NEXT_FRAME)
    left, top, width, height = plot(page, "loss")
    tip = chart(page, "loss").locator(".chart-tip")
    page.mouse.move(left + width * (30 - 1) / 39, top + height / 2)
    expect(tip).to_contain_text("val_loss 0.25")
    expect(tip).to_contain_text("Checkpoint of step 30")
    shot(page, "marks-tip")
    page.mouse.move(left + width * (35 - 1) / 39, top + height / 2)
    expect(tip).to_be_hidden()


def saved(download: Download) -> bytes:
    return Path(download.path()).read_bytes()


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">2I", png[16:24])
    return width, height


def test_pictures_have_title_run_axes_and_values(rising: Page) -> None:
    page = rising
    run = page.locator(".run-name").inner_text()
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == f"{run}-loss.png"
    assert size_of(saved(download.value)) == (1920, 1080)
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="SVG").click()
    picture = ElementTree.fromstring(saved(download.value))
    texts = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss", run, "Step", "100", "step"} <= set(texts)
    lines = [
        each.attrib["d"] for each in picture.iter("{http://www.w3.org/2000/svg}path") if each.get("clip-path")
    ]
    assert max(line.count("L") for line in lines) == 99


def test_a_picture_is_copied(rising: Page) -> None:
    page = rising
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    options(page, "loss").get_by_role("button", name="Copy picture").click()
    expect(page.locator(".flash")).to_have_text("Copied the picture of loss.")
    size = page.evaluate(
        """async () => {
          const [item] = await navigator.clipboard.read();
          const { width, height } = await createImageBitmap(await item.getType("image/png"));
          return [width, height];
        }"""
    )
    assert size == [1920, 1080]


def test_everything_shown_is_saved_as_one_file(rising: Page) -> None:
    page = rising
    options(page, "loss").get_by_role("button", name="CSV")
    page.keyboard.press("Escape")
    page.get_by_label("Search metrics").fill("loss")
    expect(chart(page, "lr")).to_be_hidden()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save everything shown as CSV").click()
    lines = list(csv.DictReader(saved(download.value).decode().splitlines()))
    assert set(lines[0]) == {"step", "epoch", "time", "note", "loss", "loss/head", "loss/tail"}
    for step in (1, 50, 100):
        (line,) = [line for line in lines if float(line["step"]) == step]
        assert [float(line[name]) for name in ("loss", "loss/head", "loss/tail")] == [
            step,
            2 * step,
            3 * step,
        ]
