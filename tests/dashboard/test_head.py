"""The head of the live page and the bar above its charts, measured in a real browser at the sizes of real screens."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from offloop import ModelCheckpoint

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from live_page import OpenPage, Training, chart, figure, shot, word
from playwright.sync_api import Locator, Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def box_of(locator: Locator) -> dict[str, float]:
    """Return x, y, width and height of an element, in CSS pixels."""
    box = locator.bounding_box()
    assert box is not None
    return {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}


@pytest.fixture
def groups(training: Callable[..., Training]) -> Training:
    """A run with five groups of panels at step 40 of 100."""
    run = training(max_steps=100).begin()
    names = [f"group{group}/m{number}" for group in range(4) for number in range(4)]
    for step in range(1, 41):
        run.step(loss=1 / step, **dict.fromkeys(names, float(step)))
    return run


def open_at(open_page: OpenPage, run: Training, width: int, height: int, scheme: str = "dark") -> Page:
    page = open_page(
        run.dashboard.url,
        viewport={"width": width, "height": height},
        has_touch=width < 500,
        color_scheme=scheme,
    )
    expect(chart(page, "loss").locator(".curve-value").first).to_have_text("0.02500")
    return page


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize(
    ("width", "height", "most"), [(390, 844, 420), (768, 1024, 420), (1440, 900, 300), (1920, 1080, 300)]
)
def test_the_first_plot_begins_high_on_the_screen(
    groups: Training, open_page: OpenPage, width: int, height: int, most: int, scheme: str
) -> None:
    page = open_at(open_page, groups, width, height, scheme)
    assert box_of(chart(page, "loss"))["y"] <= most
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    shot(page, f"first-plot-{width}-{scheme}")


def test_the_first_plot_begins_high_beside_the_list_of_runs(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    """With everything above the charts that an ordinary run brings: groups, marks, and a count of what is found."""
    before = training(tmp_path, knobs={"run_name": "before"}, max_steps=1).begin()
    before.step(loss=1.0)
    before.wait_for_end()
    run = training(
        tmp_path, knobs={"run_name": "now", "val_every_n_steps": 10}, callbacks=[ModelCheckpoint()]
    )
    run.begin()
    names = [f"group{group}/m{number}" for group in range(4) for number in range(4)]
    for step in range(1, 41):
        run.step(loss=1 / step, **dict.fromkeys(names, float(step)))
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(page.locator(".runs-row")).to_have_count(2)
    expect(page.get_by_role("group", name="Marks").get_by_role("button")).to_have_text(
        ["Validations", "Checkpoints"]
    )
    expect(chart(page, "loss").locator("canvas")).to_be_visible()
    assert box_of(chart(page, "loss"))["y"] <= 300
    shot(page, "first-plot-beside-list")


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_the_state_stands_beside_the_name(groups: Training, open_page: OpenPage, width: int) -> None:
    page = open_at(open_page, groups, width, 844)
    name, state = box_of(page.locator(".run-name")), box_of(page.locator(".pill"))
    assert name["x"] + name["width"] <= state["x"] <= name["x"] + name["width"] + 20
    assert abs(name["y"] + name["height"] / 2 - state["y"] - state["height"] / 2) < 6


def test_loss_and_progress_come_first_and_are_largest(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 1440, 900)
    labels = page.locator(".figures > .figure:visible dt").all_inner_texts()
    assert labels[:2] == ["Loss", "Progress"]
    expect(figure(page, "Progress")).to_contain_text("40 %")
    sizes = page.locator(".figures .value:visible").evaluate_all(
        "values => values.map((value) => parseFloat(getComputedStyle(value).fontSize))"
    )
    assert min(sizes[:2]) > max(sizes[2:])
    bar = page.get_by_role("progressbar")
    assert box_of(bar)["height"] > 2
    assert bar.evaluate("bar => bar.value") == pytest.approx(0.4)


def test_all_of_the_time_has_a_name(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 1440, 900)
    named = ["data", "compute", "callbacks", "other"]
    expect(page.locator(".share-legend")).to_have_text([re.compile(f"^{name} .*%$") for name in named])
    widths = [box_of(each)["width"] for each in page.locator(".share").all()]
    assert sum(widths) == pytest.approx(box_of(page.locator(".shares-bar"))["width"], abs=2)


def test_the_latency_is_told_when_it_is_slow_only(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 1440, 900)
    expect(page.locator(".link")).to_have_attribute("title", re.compile(r"^connected, .* take <?\d+ ms$"))
    expect(page.locator(".latency")).to_be_empty()


def test_the_head_of_a_phone_is_a_line_that_unfolds(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 390, 844)
    assert box_of(page.locator(".head"))["height"] <= 60
    expect(page.locator(".brief")).to_have_text("0.02500 · 40 %")
    expect(figure(page, "Step")).to_be_hidden()
    page.get_by_role("button", name="Figures of the run").click()
    expect(figure(page, "Step")).to_contain_text("40")
    expect(page.locator(".brief")).to_be_hidden()
    shot(page, "phone-unfolded")


def test_the_bar_of_a_phone_is_behind_one_button(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 390, 844)
    epoch = page.get_by_role("button", name="Epoch", exact=True)
    expect(epoch).to_be_hidden()
    page.get_by_role("button", name="View").click()
    epoch.click()
    expect(epoch).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    shot(page, "phone-view")


@pytest.mark.parametrize("width", [390, 1440])
def test_a_group_is_jumped_to_even_if_it_is_folded(groups: Training, open_page: OpenPage, width: int) -> None:
    page = open_at(open_page, groups, width, 844)
    page.locator("summary", has_text="Groups").click()
    page.get_by_role("button", name="Fold all", exact=True).click()
    expect(chart(page, "loss")).to_be_hidden()
    page.get_by_role("button", name="group3 4").click()
    expect(page.locator(".chart", has=page.locator("[title='group3/m0']"))).to_be_visible()
    heading = page.get_by_role("button", name="group3", exact=True)
    expect(heading).to_be_in_viewport()
    # Not below the bar that stays on top
    bar = box_of(page.locator(".bar"))
    assert box_of(heading)["y"] >= bar["y"] + bar["height"]
    page.locator("summary", has_text="Groups").click()
    page.get_by_role("button", name="Unfold all").click()
    expect(page.locator(".chart", has=page.locator("[title='group0/m0']"))).to_be_visible()


def test_a_reason_is_told_once(groups: Training, open_page: OpenPage) -> None:
    page = open_at(open_page, groups, 1440, 900)
    groups.trainer.steps.put(ValueError("the data set is cursed"))
    groups.wait_for_end()
    expect(word(page)).to_have_text("failed")
    expect(page.locator(".notice-text")).to_contain_text("the data set is cursed")
    expect(page.locator(".head")).not_to_contain_text("cursed")


def test_tab_that_is_looked_at_is_in_view_where_there_is_no_room_for_all(
    groups: Training, open_page: OpenPage
) -> None:
    page = open_at(open_page, groups, 390, 844)
    tabs = page.get_by_role("tablist", name="Views")
    assert tabs.evaluate("element => { element.style.width = '150px'; return element.scrollWidth }") > 150
    page.keyboard.press("3")
    last = page.get_by_role("tab", name="Configuration")
    expect(last).to_have_attribute("aria-selected", "true")
    box, room = box_of(last), box_of(tabs)
    assert room["x"] - 1 <= box["x"] and box["x"] + box["width"] <= room["x"] + room["width"] + 1
    page.keyboard.press("1")
    expect(page.get_by_role("tab", name="Metrics")).to_have_attribute("aria-selected", "true")
    assert box_of(page.get_by_role("tab", name="Metrics"))["x"] >= room["x"] - 1
