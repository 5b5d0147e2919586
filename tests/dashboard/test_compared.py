"""Several runs in the charts of the live page, read back from their canvases; and which runs an address shows."""

import base64
import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote
from xml.etree import ElementTree

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from drawing import Drawing
from live_page import NEXT_FRAME, PATIENCE, OpenPage, Training, chart, figure, options, shot, table_of, word
from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


Start = Callable[..., Training]


@pytest.fixture
def begin(training: Callable[..., Training]) -> Start:
    """Begin a run by name, with hyperparameters, that does some steps with given losses."""

    def begin(name: str, losses: list[float], *, ends: bool = False, **options: object) -> Training:
        knobs = {"run_name": name, "hyperparameters": options.pop("hyperparameters", {})}
        metrics = options.pop("metrics", {})
        run = training(
            knobs=knobs | options.pop("knobs", {}),  # type: ignore[operator]
            **({"max_steps": len(losses)} if ends else {}),
        ).begin()
        for loss in losses:
            run.step(loss=loss, **metrics)  # type: ignore[arg-type]
        if ends:
            run.wait_for_end()
        return run

    return begin


def base(run: Training) -> str:
    """Return the address of the page without its token: what a link has."""
    return run.dashboard.url.partition("?")[0]


def show(page: Page, **view: str | list[str]) -> None:
    """Have the page show a view, as its address names it."""
    fields = [
        f"{name}={quote(value)}"
        for name, values in view.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    page.evaluate("view => { location.hash = `#v=1&${view}`; }", "&".join(fields))


def legend(page: Page, panel: str, run: str) -> str:
    """Return what the legend of a panel says of a run."""
    item = chart(page, panel).locator(".curve", has=page.get_by_text(run, exact=True))
    return item.locator(".curve-value").inner_text()


@pytest.fixture
def two(begin: Start, open_page: OpenPage) -> tuple[Training, Page]:
    """A past run of 40 steps whose loss is 2/step, and a live one of 20 whose loss is 1/step."""
    begin("past", [2 / step for step in range(1, 41)], ends=True)
    run = begin("live", [1 / step for step in range(1, 21)], knobs={"val_every_n_steps": 10})
    page = open_page(run.dashboard.url)
    expect(page.get_by_role("heading", name="live")).to_be_attached()
    expect(figure(page, "Step")).to_contain_text("20")
    show(page, run="live", **{"with": "past"})
    expect(chart(page, "loss").locator(".chart-legend.runs")).to_contain_text("past")
    expect(chart(page, "loss").locator(".curve", has_text="past")).to_contain_text("step 0.05000")
    # The value may come before the points.
    deadline = time.monotonic() + PATIENCE / 1000
    while [points_of(page, name) for name in ("past", "live")] != [40, 20]:
        assert time.monotonic() < deadline, "the points did not come"
        page.evaluate(NEXT_FRAME)
    return run, page


def points_of(page: Page, name: str) -> int:
    """Return the number of points of a run's loss that are drawn."""
    with contextlib.suppress(AssertionError):
        return len(Drawing(chart(page, "loss")).line(name, dashed=False))
    return 0


def test_a_live_and_a_past_run_are_drawn_over_each_other(two: tuple[Training, Page]) -> None:
    run, page = two
    shot(page, "two-runs")
    drawing = Drawing(chart(page, "loss"))
    live, past = drawing.line("live", dashed=False), drawing.line("past", dashed=False)
    for line, count, scale in ((live, 20, 1), (past, 40, 2)):
        assert [x for x, _ in line] == pytest.approx(range(1, count + 1), abs=0.3)
        assert [y for _, y in line] == pytest.approx([scale / step for step in range(1, count + 1)], abs=0.02)
    # Validation is dashed, in the colour of its run.
    assert [x for x, _ in drawing.line("live", dashed=True)] == pytest.approx([10, 20], abs=0.3)
    # One colour in every panel.
    other = Drawing(chart(page, "lr")).raw["colours"] if chart(page, "lr").locator("canvas").count() else None
    if other is not None:
        assert other["live"] == drawing.raw["colours"]["live"]
    # The live one goes on.
    run.step(loss=1.5)
    expect(chart(page, "loss").locator(".curve", has_text="live")).to_contain_text("step 1.500")
    page.evaluate(NEXT_FRAME)
    assert Drawing(chart(page, "loss")).line("live", dashed=False)[-1] == pytest.approx((21, 1.5), abs=0.2)


def test_the_legend_and_the_table_have_the_values_of_each_run(two: tuple[Training, Page]) -> None:
    _, page = two
    cursor = chart(page, "loss").get_by_role("slider")
    past = chart(page, "loss").locator(".curve", has_text="past")
    # While curves come anew, as after a change of the size of their panel, keys stop at the last point there is.
    deadline = time.monotonic() + PATIENCE / 1000
    while "step 0.2000" not in past.inner_text():
        assert time.monotonic() < deadline, past.inner_text()
        cursor.focus()
        page.keyboard.press("Home")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        page.evaluate(NEXT_FRAME)
    expect(past).to_contain_text("step 0.2000")
    expect(chart(page, "loss").locator(".curve", has_text="live")).to_contain_text("step 0.1000 · val 0.2500")
    cursor.press("Enter")
    expect(cursor).to_have_attribute("aria-valuetext", re.compile("past, step 0.2000"))
    table = table_of(page, "loss")
    assert table["10"][:3] == ["0.1000", "0.2500", "0.2000"]
    assert table["40"][:3] == ["", "", "0.05000"]
    # A click hides a run in all panels, and another one brings it back.
    item = chart(page, "loss").locator(".curve", has_text="past")
    item.click()
    expect(item).to_have_attribute("aria-pressed", "false")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(chart(page, "loss"))
    with pytest.raises(AssertionError, match="past has 0 lines"):
        drawing.line("past", dashed=False)
    assert max(x for x, _ in drawing.line("live", dashed=False)) == pytest.approx(20, abs=0.3)
    item.click()
    expect(item).to_have_attribute("aria-pressed", "true")


def test_time_since_the_start_aligns_runs_by_their_own_starts(two: tuple[Training, Page]) -> None:
    _, page = two
    show(page, run="live", x="time", **{"with": "past"})
    expect(page.get_by_role("button", name="Time", exact=True)).to_have_attribute("aria-pressed", "true")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(chart(page, "loss"))
    # Both begin within the first seconds, though the past one began before.
    for line in (drawing.line("live", dashed=False), drawing.line("past", dashed=False)):
        assert 0 <= line[0][0] <= 30


def test_a_csv_of_several_runs_names_them(two: tuple[Training, Page]) -> None:
    _, page = two
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("run,step,epoch,time,loss")
    rows = [line.split(",") for line in lines[1:] if line.split(",")[4] != ""]
    assert len([row for row in rows if row[0] == "past"]) == 40
    assert ("past", "40", "0.05") in {(row[0], row[1], row[4][:4]) for row in rows}


def test_a_zoom_asks_for_finer_points_of_each_run(begin: Start, open_page: OpenPage) -> None:
    for name in ("one", "two"):
        run = begin(name, [1 + step % 7 for step in range(9_000)], ends=name == "one")
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text(re.compile("9.?000"))
    said: list[dict[str, object]] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda text: said.append(json.loads(text))))
    page.goto(f"{base(run)}#v=1&run=two&with=one&zoom=4000,4100")
    page.reload()
    expect(chart(page, "loss").locator(".chart-legend.runs")).to_contain_text("one")
    expect(chart(page, "loss").locator(".curve", has_text="two")).to_contain_text("step 5")
    steps = range(4_001, 4_099)

    def values_of(name: str) -> dict[int, float]:
        return {round(x): y for x, y in Drawing(chart(page, "loss")).line(name, dashed=False)}

    # The answers come after the first drawing.
    deadline = time.monotonic() + PATIENCE / 1000
    fine = [values_of("one"), values_of("two")]
    while not all(set(steps) <= values.keys() for values in fine):
        assert time.monotonic() < deadline, "the finer points did not come"
        page.evaluate(NEXT_FRAME)
        fine = [values_of("one"), values_of("two")]
    assert {each["run"] for each in said if each["type"] == "range"} == {"one", "two"}
    for values in fine:
        assert [values[step] for step in steps] == pytest.approx(
            [1 + (step - 1) % 7 for step in steps], abs=0.1
        )


def test_a_pinned_baseline_is_behind_the_others_grey_and_wide(two: tuple[Training, Page]) -> None:
    _, page = two
    show(page, run="live", baseline="past")
    expect(chart(page, "loss").locator(".curve", has_text="past (baseline)")).to_be_visible()
    page.evaluate(NEXT_FRAME)
    shot(page, "baseline")
    drawing = Drawing(chart(page, "loss"))
    name = "past (baseline)"
    assert [y for _, y in drawing.line(name, raw=True, dashed=False)] == pytest.approx(
        [2 / step for step in range(1, 41)], abs=0.03
    )
    assert drawing.width(name, raw=True, dashed=False) >= 3
    assert drawing.order(name, "live") == [name, "live"]
    red, green, blue = (int(each) for each in re.findall(r"\d+", drawing.raw["colours"][name])[:3])
    assert max(red, green, blue) - min(red, green, blue) <= 40


def test_a_panel_says_how_many_runs_lack_it(begin: Start, open_page: OpenPage) -> None:
    for name in "abcd":
        begin(name, [1.0, 0.5], ends=True, metrics={"other": 3.0} if name == "a" else {})
    run = begin("e", [1.0, 0.5], metrics={"other": 3.0})
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("2")
    # Only the last three that have ended are kept: a is gone.
    show(page, run="e", **{"with": ["a", "b", "c", "d"]})
    expect(chart(page, "loss").locator(".chart-legend")).to_contain_text("d")
    expect(chart(page, "other").locator(".chart-lacks")).to_have_text("not in 3 of 4 runs")
    expect(chart(page, "loss").locator(".chart-lacks")).to_be_hidden()
    shot(page, "lacking")
    # The other way round: a panel that only an overlaid run has.
    show(page, run="d", **{"with": ["e"]})
    expect(chart(page, "other").locator(".chart-lacks")).to_have_text("not in 1 of 2 runs")
    show(page, run="d")
    expect(chart(page, "other")).to_have_count(0)


def test_a_group_is_its_mean_with_a_band_and_its_runs_on_demand(begin: Start, open_page: OpenPage) -> None:
    for number, (lr, scale) in enumerate([(0.1, 1), (0.1, 3), (0.5, 6)]):
        begin(f"r{number}", [scale / step for step in range(1, 11)], ends=True, hyperparameters={"lr": lr})
    run = begin("r3", [8 / step for step in range(1, 11)], hyperparameters={"lr": 0.5})
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("10")
    others = ["r0", "r1", "r2"]
    show(page, run="r3", group="lr", hide=["val_loss", "train_loss"], **{"with": others})
    loss = chart(page, "loss")
    expect(loss.locator(".curve", has_text="lr 0.1 (2)")).to_contain_text("0.2000 (0.1000 to 0.3000)")
    expect(loss.locator(".curve", has_text="lr 0.5 (2)")).to_contain_text("0.7000 (0.6000 to 0.8000)")
    page.evaluate(NEXT_FRAME)
    shot(page, "groups")
    drawing = Drawing(loss)
    for label, low, mean, high in (("lr 0.1 (2)", 1, 2, 3), ("lr 0.5 (2)", 6, 7, 8)):
        upper, lower = drawing.band(label)
        for line, scale in ((drawing.line(label), mean), (upper, high), (lower, low)):
            assert [x for x, _ in line] == pytest.approx(range(1, 11), abs=0.1)
            assert [y for _, y in line] == pytest.approx([scale / step for step in range(1, 11)], abs=0.08)
    loss.locator(".curve", has_text="runs of groups").click()
    page.wait_for_function("() => location.hash.includes('members=1')")
    page.evaluate(NEXT_FRAME)
    shot(page, "groups-members")
    faint = [each for each in Drawing(loss).raw["strokes"] if 0 < each["alpha"] < 1]
    assert len(faint) == 4


def test_runs_are_grouped_by_tag(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    """One run has both tags, and counts in both groups; one has none, and is a line of its own."""
    runs = {"r0": (1, ["wide"]), "r1": (3, ["wide", "paper"]), "r2": (7, ["paper"]), "r3": (9, [])}
    for name, (scale, tags) in runs.items():
        most = 10 if name != "r3" else 100
        run = training(tmp_path, knobs={"run_name": name, "tags": tags}, max_steps=most).begin()
        for step in range(1, 11):
            run.step(loss=scale / step)
        if most == 10:
            run.wait_for_end()
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(figure(page, "Step")).to_contain_text("10")
    show(page, run="r3", hide=["val_loss", "train_loss"], **{"with": ["r0", "r1", "r2"]})
    page.get_by_label("Group by").select_option("By tag")
    loss = chart(page, "loss")
    expect(loss.locator(".curve", has_text="wide (2)")).to_contain_text("0.2000 (0.1000 to 0.3000)")
    expect(loss.locator(".curve", has_text="paper (2)")).to_contain_text("0.5000 (0.3000 to 0.7000)")
    expect(loss.locator(".curve", has_text="r3")).to_contain_text("0.9000")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(loss)
    for label, low, mean, high in (("wide (2)", 1, 2, 3), ("paper (2)", 3, 5, 7)):
        upper, lower = drawing.band(label)
        for line, scale in ((drawing.line(label), mean), (upper, high), (lower, low)):
            assert [y for _, y in line] == pytest.approx([scale / step for step in range(1, 11)], abs=0.1)
    shot(page, "groups-by-tag")


SVG: Final = "{http://www.w3.org/2000/svg}"

COLOURS: Final = """async (base64) => {
  const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${base64}`)).blob());
  const canvas = new OffscreenCanvas(image.width, image.height);
  const ink = canvas.getContext("2d");
  ink.drawImage(image, 0, 0);
  const { data } = ink.getImageData(0, 0, image.width, image.height);
  const counts = {};
  for (let at = 0; at < data.length; at += 4) {
    const key = `#${[...data.slice(at, at + 3)].map((part) => part.toString(16).padStart(2, "0")).join("")}`;
    counts[key] = (counts[key] ?? 0) + 1;
  }
  return [image.width, image.height, counts];
}"""


def test_pictures_of_several_runs_name_them_and_have_their_lines(
    two: tuple[Training, Page], browser: Browser
) -> None:
    _, page = two
    colours = Drawing(chart(page, "loss")).raw["colours"]
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="SVG").click()
    assert download.value.suggested_filename == "2_runs-loss.svg"
    picture = ElementTree.fromstring(Path(download.value.path()).read_bytes())
    texts = [each.text or "" for each in picture.iter(f"{SVG}text")]
    assert {"loss", "live, past", "Step", "live", "past"} <= set(texts)
    assert any("step 0.05000" in text for text in texts)
    # The first label of the y axis stands half above the plot, and not in the legend
    legend = max(
        float(each.attrib["y"]) for each in picture.iter(f"{SVG}text") if each.text in ("live", "past")
    )
    clips = [each.attrib["d"] for each in picture.iterfind(f"{SVG}defs/{SVG}clipPath/{SVG}path")]
    assert min(float(clip.partition("h")[0].split()[1]) for clip in clips) >= legend + 12
    paths = [(each.get("stroke"), each.attrib["d"].count("L")) for each in picture.iter(f"{SVG}path")]
    # A line of 20 and one of 40 points
    for name, points in (("live", 20), ("past", 40)):
        assert max(count for stroke, count in paths if as_rgb(stroke) == colours[name]) == points - 1

    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="PNG").click()
    content = base64.b64encode(Path(download.value.path()).read_bytes()).decode()
    # Another page: that of the run lets nothing be fetched
    width, height, counts = browser.new_page().evaluate(COLOURS, content)
    assert (width, height) == (1920, 1080)
    for name in ("live", "past"):
        assert counts.get(as_hex(colours[name]), 0) > 500, f"the line of {name} is missing"


def as_hex(colour: str) -> str:
    """Return `rgb(0, 114, 178)` as `#0072b2`."""
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


def as_rgb(colour: str | None) -> str:
    """Return `#0072b2` as `rgb(0, 114, 178)`."""
    if colour is None or not re.fullmatch("#[0-9a-f]{6}", colour):
        return colour or ""
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:], 16)})"


def test_what_is_constant_in_a_group_has_its_value(begin: Start, open_page: OpenPage) -> None:
    for number in range(2):
        begin(f"r{number}", [1.0] * 30, ends=True, hyperparameters={"lr": 0.1})
    run = begin("r2", [1 / step for step in range(1, 31)], hyperparameters={"lr": 0.5})
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("30")
    show(page, run="r2", group="lr", **{"with": ["r0", "r1"]})
    constant = chart(page, "lr")
    expect(constant.locator("canvas")).to_have_count(0)
    expect(constant.locator(".curve", has_text="lr 0.1 (2)").locator(".curve-value")).to_have_text("0.1000")
    shot(page, "group-constant")


# Which run an address shows --------------------------------------------------------------------------


def test_after_a_reload_the_run_that_was_picked_is_shown_and_steered(two: tuple[Training, Page]) -> None:
    _, page = two
    page.goto(page.url.partition("#")[0] + "#v=1&run=past")
    expect(word(page)).to_have_text("completed")
    page.reload()
    expect(word(page)).to_have_text("completed")
    expect(page.get_by_role("heading", name="past")).to_be_attached()
    assert "run=past" in page.url
    page.go_back()
    expect(word(page)).to_have_text("live")
    assert "run=live" in page.url
    page.go_forward()
    expect(word(page)).to_have_text("completed")


def test_a_page_without_a_run_in_its_address_names_the_one_it_shows(
    begin: Start, open_page: OpenPage
) -> None:
    run = begin("first", [1.0])
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    page.wait_for_function("() => location.hash === '#v=1&run=first'")


def test_a_link_to_a_run_that_is_gone_says_so_and_shows_no_other(begin: Start, open_page: OpenPage) -> None:
    run = begin("live", [1.0])
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    page.goto(f"{base(run)}#v=1&run=yesterday")
    page.reload()
    expect(page.get_by_role("heading", name="yesterday is not here")).to_be_visible()
    expect(word(page)).to_have_text("run not here")
    expect(page.locator(".chart")).to_have_count(0)
    expect(page.get_by_role("group", name="Control of the run")).to_be_hidden()
    shot(page, "gone")
    page.get_by_role("button", name="Show the newest run").click()
    expect(word(page)).to_have_text("live")
    assert "run=live" in page.url
    page.go_back()
    expect(page.get_by_role("heading", name="yesterday is not here")).to_be_visible()


def test_a_link_to_a_run_that_begins_later_shows_it_then(begin: Start, open_page: OpenPage) -> None:
    first = begin("first", [1.0])
    page = open_page(first.dashboard.url)
    expect(word(page)).to_have_text("live")
    page.goto(f"{base(first)}#v=1&run=second")
    page.reload()
    expect(page.get_by_role("heading", name="second is not here")).to_be_visible()
    begin("second", [0.5])
    expect(word(page)).to_have_text("live")
    expect(page.get_by_role("heading", name="second", exact=True)).to_be_attached()
    expect(figure(page, "Loss")).to_contain_text("0.5")


def test_back_goes_through_tabs_and_maximised_panels(two: tuple[Training, Page]) -> None:
    _, page = two
    chart(page, "loss").get_by_role("button", name="Maximise loss").click()
    expect(chart(page, "lr")).to_be_hidden()
    page.get_by_role("tab", name="Events").click()
    expect(page.get_by_role("tabpanel", name="Events")).to_be_visible()
    page.go_back()
    expect(chart(page, "loss")).to_be_visible()
    expect(chart(page, "lr")).to_be_hidden()
    page.go_back()
    expect(chart(page, "lr")).to_be_visible()
