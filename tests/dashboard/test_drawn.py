"""What the charts of the live page draw, read back from their canvases in a real browser."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from offloop import Above, Alerts, Event, ModelCheckpoint, ResourceMonitor, ResourceUsage

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from drawing import Drawing
from live_page import NEXT_FRAME, OpenPage, Training, chart, figure, shot, word
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def show(page: Page, view: str) -> None:
    """Have the page show a view, as its address names it: `smooth=0.98`."""
    page.evaluate("view => { location.hash = `#v=1&${view}`; }", view)


# Smoothing -----------------------------------------------------------------------------------------


@pytest.fixture
def sparse_beside_dense(training: Callable[..., Training], open_page: OpenPage) -> Page:
    """A loss at every step, and a validation loss at every 200th that is above it."""
    run = training(knobs={"val_every_n_steps": 200})
    run.trainer.val_losses = (0.15 + math.exp(-step / 200) for step in range(200, 10_000, 200))
    run.begin()
    for step in range(1, 2_001):
        run.step(loss=0.1 + math.exp(-step / 200) + 0.02 * (-1) ** step)
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    expect(page.locator(".figure-step")).to_contain_text(re.compile("2.?000"))
    return page


def test_smoothing_hardly_changes_a_curve_with_few_points(sparse_beside_dense: Page) -> None:
    page = sparse_beside_dense
    show(page, "smooth=0.98&panel=loss")
    expect(chart(page, "loss")).to_contain_text("raw")
    drawing = Drawing(chart(page, "loss"))
    drawn, raw = drawing.line("val"), drawing.line("val", raw=True)
    # Labels are at whole pixels.
    assert [x for x, _ in raw] == pytest.approx(range(200, 2_001, 200), abs=3)
    for (x, value), (_, own) in zip(drawn, raw, strict=True):
        assert own == pytest.approx(0.15 + math.exp(-round(x) / 200), abs=0.005)
        assert value == pytest.approx(own, rel=0.05)
    # The dense one is smooth: it no longer goes up and down by 0.04 with each step.
    smooth = [value for x, value in drawing.line("step") if x > 1_500]
    assert smooth == pytest.approx([0.1] * len(smooth), abs=0.005)
    shot(page, "smoothing")


def test_the_legend_has_the_value_that_is_drawn_and_the_raw_one(sparse_beside_dense: Page) -> None:
    page = sparse_beside_dense
    show(page, "smooth=0.98")
    curve = chart(page, "loss").get_by_role("button", name=re.compile("step"))
    expect(curve.locator(".curve-raw")).to_have_text("raw 0.1200")
    drawn = Drawing(chart(page, "loss")).line("step")[-1][1]
    assert float(curve.locator(".curve-value").inner_text()) == pytest.approx(drawn, abs=0.002)
    assert drawn == pytest.approx(0.1, abs=0.005)
    show(page, "smooth=0")
    expect(curve.locator(".curve-value")).to_have_text("0.1200")
    expect(curve.locator(".curve-raw")).to_be_hidden()


# What is not finite --------------------------------------------------------------------------------


def test_the_step_that_fails_on_nan_is_marked_and_head_and_title_say_so(
    started: tuple[Training, Page],
) -> None:
    run, page = started
    run.step(loss=math.nan)
    run.wait_for_end()
    expect(word(page)).to_have_text("failed")
    expect(figure(page, "Loss")).to_have_text(re.compile("NaN"))
    expect(figure(page, "Loss")).to_have_attribute("data-tone", "bad")
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("NaN")
    expect(page).to_have_title(re.compile("NaN.*failed"))
    assert Drawing(chart(page, "loss")).signs() == pytest.approx([11], abs=0.1)
    # The last finite value is where it was.
    x, value = Drawing(chart(page, "loss")).line("step")[-1]
    assert x == pytest.approx(10, abs=0.1) and value == pytest.approx(0.1, abs=0.01)
    shot(page, "failed-on-nan")


def test_a_first_step_that_fails_on_nan_is_marked(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("waiting for the first step")
    run.step(loss=math.nan)
    run.wait_for_end()
    expect(word(page)).to_have_text("failed")
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("NaN")
    expect(figure(page, "Loss")).to_have_text(re.compile("NaN"))


def test_a_run_that_completes_with_a_loss_of_nan_is_not_green(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training(max_steps=3, knobs={"on_nonfinite": "warn"}).begin()
    page = open_page(run.dashboard.url)
    for loss in (1.0, 0.5, math.nan):
        run.step(loss=loss)
    run.wait_for_end()
    expect(word(page)).to_have_text("completed")
    expect(page.locator(".pill")).to_have_attribute("data-tone", "warn")
    expect(page.locator(".state-detail")).to_have_text("the last loss is NaN")
    expect(page.locator("progress")).to_have_attribute("data-tone", "warn")
    expect(page).to_have_title(re.compile("^! NaN"))
    shot(page, "completed-with-nan")


def test_the_sign_stands_where_a_stretch_begins(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training(knobs={"on_nonfinite": "warn"}).begin()
    for step in range(1, 41):
        run.step(loss=math.nan if 11 <= step <= 30 else 1 / step)
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("40")
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("0.02500")
    assert Drawing(chart(page, "loss")).signs() == pytest.approx([11], abs=0.3)


# Alerts and other marks ----------------------------------------------------------------------------


def test_an_alert_is_a_line_in_the_panel_of_its_metric_only(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training(callbacks=[Alerts(None, Above("loss", 2))]).begin()
    for step in range(1, 101):
        run.step(loss=3.0 if step in (10, 90) else 1.0, other=step)
    page = open_page(run.dashboard.url)
    expect(page.get_by_role("tab", name="Events")).to_have_text(re.compile("4"))
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("1")
    expect(chart(page, "other").locator(".curve-value")).to_have_text("100")
    assert Drawing(chart(page, "loss")).alerts() == pytest.approx([10, 90], abs=0.5)
    assert Drawing(chart(page, "other")).alerts() == []
    shot(page, "alerts")


@pytest.fixture
def many_alerts(training: Callable[..., Training], open_page: OpenPage) -> Page:
    """A run with an alert at every second of 114 steps, and none after that."""
    run = training(callbacks=[Alerts(None, Above("loss", 2))]).begin()
    for step in range(1, 115):
        run.step(loss=1.0 + 2 * (step % 2 == 0))
    for _ in range(300):
        run.step(loss=0.5)
    page = open_page(run.dashboard.url)
    expect(page.get_by_role("tab", name="Events")).to_have_text(re.compile("59"))
    return page


def test_alerts_that_are_close_are_one_mark_with_a_count(many_alerts: Page) -> None:
    page = many_alerts
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("0.5000")
    drawing = Drawing(chart(page, "loss"))
    assert drawing.alerts() == pytest.approx([2], abs=1)
    assert "×57" in drawing.texts  # noqa: RUF001
    shot(page, "alerts-many")


def test_a_kind_of_marks_can_be_switched_off(many_alerts: Page) -> None:
    page = many_alerts
    legend = page.get_by_role("group", name="Marks")
    # The legend names kinds that there are, and no others.
    expect(legend.get_by_role("button")).to_have_text(["Alerts"])
    shot(page, "marks")
    legend.get_by_role("button", name="Alerts").click()
    expect(legend.get_by_role("button", name="Alerts")).to_have_attribute("aria-pressed", "false")
    page.wait_for_function("() => location.hash.includes('unmarked=alert')")
    page.evaluate(NEXT_FRAME)
    assert Drawing(chart(page, "loss")).alerts() == []
    page.reload()
    expect(chart(page, "loss").locator(".curve-value")).to_have_text("0.5000")
    assert Drawing(chart(page, "loss")).alerts() == []


def test_the_list_folds_alerts_by_one_rule(many_alerts: Page) -> None:
    page = many_alerts
    page.get_by_role("tab", name="Events").click()
    rows = page.locator(".row[data-kind=alert]")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("57 times, steps 2 to 114")
    shot(page, "events-folded")
    rows.locator("summary").click()
    expect(rows.locator("pre")).to_contain_text("step 114")
    lines = rows.locator("pre").inner_text().splitlines()
    assert len(lines) == 57 and "step 114" in lines[0] and "step 2" in lines[-1]


# Outliers ------------------------------------------------------------------------------------------


def test_a_panel_is_scaled_to_what_is_usual_with_outliers_counted_at_the_edge(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    for step in range(1, 201):
        run.step(loss=300.0 if step == 100 else 1 + 0.2 * math.sin(step), other=step)
    page = open_page(run.dashboard.url)
    loss = chart(page, "loss")
    expect(loss.locator(".curve-value")).to_have_text("0.8253")
    # All is in the scale unless somebody wants it otherwise.
    everything = Drawing(loss)
    assert max(value for _, value in everything.line("step")) == pytest.approx(300, abs=3)
    assert not any("above" in text for text in everything.texts)
    loss.get_by_role("button", name="Scale loss to its usual values").click()
    page.wait_for_function("() => location.hash.includes('usual=loss')")
    page.evaluate(NEXT_FRAME)
    usual = Drawing(loss)
    assert "1 above" in usual.texts
    assert usual.wedges("step") == pytest.approx([100], abs=1)
    values = {round(x): value for x, value in usual.line("step") if value < 2}
    for step in (1, 50, 150, 200):
        assert values[step] == pytest.approx(1 + 0.2 * math.sin(step), abs=0.02)
    shot(page, "usual")
    # The other panels are as they were, and so is this one, once more.
    assert not any("above" in text for text in Drawing(chart(page, "other")).texts)
    loss.get_by_role("button", name="Scale loss to its usual values").click()
    page.wait_for_function("() => !location.hash.includes('usual')")
    page.evaluate(NEXT_FRAME)
    assert max(value for _, value in Drawing(loss).line("step")) == pytest.approx(300, abs=3)


def test_what_is_constant_takes_a_line_until_it_varies(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    for step in range(1, 26):
        run.step(loss=1 / step, seven=7)
    page = open_page(run.dashboard.url)
    for name, value in (("lr", "0.1000"), ("seven", "7")):
        expect(chart(page, name)).to_contain_text(value)
        expect(chart(page, name).locator("canvas")).to_have_count(0)
        assert chart(page, name).bounding_box()["height"] < 40  # type: ignore[index]
    expect(chart(page, "loss").locator("canvas")).to_have_count(1)
    shot(page, "constants")
    # It can be looked at all the same.
    chart(page, "seven").get_by_role("button", name="Maximise seven").click()
    expect(chart(page, "seven").locator("canvas")).to_have_count(1)
    page.keyboard.press("Escape")
    run.step(loss=0.01, seven=8)
    expect(chart(page, "seven").locator("canvas")).to_have_count(1)
    expect(chart(page, "seven").locator(".curve-value")).to_have_text("8")
    expect(chart(page, "lr").locator("canvas")).to_have_count(0)


# Units ---------------------------------------------------------------------------------------------


def test_axes_and_values_have_their_units(started: tuple[Training, Page]) -> None:
    run, page = started
    for number in range(1, 4):
        usage = ResourceUsage(memory_bytes=340_300_000 * number, cpu_percent=25.0 * number, loop_lag=0.002)
        run.run.publish(usage)
    page.get_by_role("tab", name="System").click()
    memory = page.locator(".chart", has=page.locator("[title='Machine/memory']"))
    memory.scroll_into_view_if_needed()
    expect(memory.locator(".curve-value").first).to_have_text("1.021\N{NARROW NO-BREAK SPACE}GB")
    labels = [text for text in Drawing(memory).texts if text.endswith("B")]
    assert labels and all(re.fullmatch(r"0\s?B|[\d.]+\s[MG]B", label) for label in labels)
    lag = page.locator(".chart", has=page.locator("[title='Training/event loop late']"))
    lag.scroll_into_view_if_needed()
    expect(lag.locator(".curve-value").first).to_have_text("2.00\N{NARROW NO-BREAK SPACE}ms")
    shot(page, "units")


# Layout --------------------------------------------------------------------------------------------

_BOXES = """() => [...document.querySelectorAll(".chart")].filter((figure) => !figure.hidden).map((figure) => {
  const { left, right, top, bottom } = figure.getBoundingClientRect();
  return [left, right, top, bottom];
})"""


def boxes_of(page: Page) -> list[tuple[float, float, float, float]]:
    """Return left, right, top and bottom of the panels, once they are laid out."""
    expect(chart(page, "loss").locator("canvas")).to_be_visible()
    page.evaluate(NEXT_FRAME)
    boxes: list[tuple[float, float, float, float]] = page.evaluate(_BOXES)
    return boxes


def test_three_panels_reach_the_right_edge_of_a_wide_screen(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    for step in range(1, 11):
        run.step(loss=1 / step, other=step)
    page = open_page(run.dashboard.url, viewport={"width": 1920, "height": 900})
    expect(chart(page, "other")).to_be_visible()
    boxes = boxes_of(page)
    assert len(boxes) == 3 and len({top for _, _, top, _ in boxes}) == 1
    assert boxes[0][0] <= 24 and boxes[-1][1] >= 1920 - 24
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1920


@pytest.fixture
def many_groups(training: Callable[..., Training], open_page: OpenPage) -> Page:
    """40 panels: loss and learning rate, six groups of six, and one of two."""
    run = training().begin()
    values = {f"group{group}/m{number}": 1.0 for group in range(6) for number in range(6)}
    for _ in range(5):
        run.step(loss=1.0, **values, **{"last/a": 1.0, "last/b": 2.0})
    page = open_page(run.dashboard.url, viewport={"width": 1920, "height": 900})
    expect(page.locator(".chart")).to_have_count(40)
    return page


def test_groups_are_balanced_and_most_of_a_wide_page_is_panels(many_groups: Page) -> None:
    page = many_groups
    boxes = boxes_of(page)
    assert len(boxes) == 40
    # Six are three and three.
    of_a_group = boxes[2:8]
    assert [sum(top == other[2] for other in of_a_group) for _, _, top, _ in of_a_group] == [3] * 6
    area = sum((right - left) * (bottom - top) for left, right, top, bottom in boxes)
    whole = 1920 * (max(bottom for *_, bottom in boxes) - min(top for _, _, top, _ in boxes))
    assert area >= 0.7 * whole
    shot(page, "groups")


def test_small_groups_share_a_row(training: Callable[..., Training], open_page: OpenPage) -> None:
    run = training().begin()
    run.step(loss=1.0, **{"one/a": 1.0, "two/a": 1.0, "two/b": 1.0})
    page = open_page(run.dashboard.url, viewport={"width": 1920, "height": 900})
    expect(page.locator(".chart")).to_have_count(5)
    boxes = boxes_of(page)
    assert len(boxes) == 5 and len({top for _, _, top, _ in boxes}) == 1
    widths = [right - left for left, right, _, _ in boxes]
    assert max(widths) - min(widths) < 2
    shot(page, "small-groups")


def test_loss_and_metrics_stand_first_and_resources_apart_whatever_came_first(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    monitor = ResourceMonitor(every_seconds=0.05)
    run = training(callbacks=[monitor], knobs={"val_every_n_steps": 2}).begin()
    page = open_page(run.dashboard.url)
    system = page.get_by_role("tab", name="System")
    headings = page.locator(".charts-group:not([hidden]) .charts-fold")
    expect(system).to_be_visible()
    expect(headings).to_have_text([])
    run.step(loss=1.0, accuracy=0.5, **{"layer/a": 1.0})
    run.step(loss=0.5, accuracy=0.6, **{"layer/a": 1.0})
    expect(chart(page, "loss").locator(".curve-label")).to_have_text(["step", "val"])
    expect(headings).to_have_text(["Metrics", "layer"])
    titles = page.locator(".charts-group").first.locator(".chart-title")
    expect(titles).to_have_text(["loss", "accuracy", "lr"])


def test_columns_and_height_are_set_and_remembered(many_groups: Page) -> None:
    page = many_groups
    page.locator("summary", has_text="Layout").click()
    page.get_by_role("combobox", name="Columns").select_option("2")
    page.get_by_label("Height").select_option("high")
    page.wait_for_function(
        "() => location.hash.includes('columns=2') && location.hash.includes('height=300')"
    )
    for _ in range(2):
        boxes = boxes_of(page)
        assert sum(top == boxes[2][2] for _, _, top, _ in boxes) == 2
        assert chart(page, "loss").locator(".chart-plot").bounding_box()["height"] == 300  # type: ignore[index]
        page.goto(page.url.partition("#")[0])
        expect(page.locator(".chart")).to_have_count(40)


# The list of events --------------------------------------------------------------------------------


class Note(Event, frozen=True, kw_only=True):
    """An event of the user's own."""

    text: str


def test_an_event_of_ones_own_has_its_name_and_its_lines(started: tuple[Training, Page]) -> None:
    run, page = started
    long = "\n".join(f"line {number}" for number in range(40))
    for text in ("def f(x):\n    return x + 1", long):
        run.run.publish(Note(text=text))
    page.get_by_role("tab", name="Events").click()
    rows = page.locator(".row", has=page.get_by_text("Note", exact=True))
    expect(rows).to_have_count(2)
    expect(rows.last.locator(".text")).to_have_text("def f(x):\n    return x + 1", use_inner_text=True)
    assert rows.last.locator(".text").evaluate("text => getComputedStyle(text).whiteSpace") == "pre-wrap"
    # A long one is cut, and whole when it is unfolded.
    expect(rows.first.locator(".text")).to_contain_text("line 7")
    expect(rows.first.locator(".text")).not_to_contain_text("line 8")
    shot(page, "notes")
    rows.first.get_by_text("more", exact=True).click()
    expect(rows.first.locator(".text")).to_contain_text("line 39")
    # They have a filter of their own.
    page.get_by_role("button", name="Note 2").click()
    expect(rows).to_have_count(0)


def test_commands_of_callbacks_name_them_and_are_listed_when_asked_for(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, callbacks=[ModelCheckpoint(every_n_steps=5)]).begin()
    for step in range(1, 21):
        run.step(loss=1 / step)
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("20")
    run.run.set_lr_nowait(0.05)
    run.step(loss=0.04)
    run.step(loss=0.04)
    expect(figure(page, "Learning rate")).to_contain_text("0.05")
    page.get_by_role("tab", name="Events").click()
    rows = page.locator(".row", has=page.locator(".by"))
    expect(rows.filter(has_text="Command set_lr")).to_contain_text("user")
    expect(rows.filter(has_text="Command checkpoint")).to_have_count(0)
    expect(page.get_by_text("4 not shown")).to_be_visible()
    page.get_by_role("button", name="Commands of callbacks 4").click()
    saved = rows.filter(has_text="Command checkpoint (reason interval)")
    expect(saved).to_have_count(4)
    for row in saved.all():
        expect(row.locator(".by")).to_have_text("ModelCheckpoint")
    shot(page, "commands-of-callbacks")
