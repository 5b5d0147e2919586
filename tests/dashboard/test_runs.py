"""The list of runs beside the charts, and the table that compares them, in a real browser.

Runs of this process are real ones. What a server with thousands of runs would send comes from rows that the test puts
into the hub's list.
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from socket_viewer import on_loop

from offloop.dashboard.protocol.from_server import Figure, RunRow

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
pytest.importorskip("axe_playwright_python", reason="tests in a browser need offloop[browser]")
from axe_playwright_python.sync_playwright import Axe
from live_page import OpenPage, Training, give, shot, word
from playwright.sync_api import Locator, Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def row(key: str, loss: float = 0.5, **fields: Any) -> RunRow:
    """Return the row of a run that is over."""
    known: dict[str, Any] = {
        "id": key,
        "name": key,
        "state": "completed",
        "started": time.time() - 3_600,
        "heard": time.time() - 1_800,
        "seconds": 1_800.0,
        "monitor": "val_loss",
        "figures": {"val_loss": Figure(loss + 0.1, loss)},
        "sparkline": [1.0, loss],
    }
    return RunRow(key=key, **known | fields)


def put(run: Training, *rows: RunRow) -> None:
    """Have the server list further runs."""
    on_loop(run.server, lambda: [run.server.hub.list.put(each) for each in rows])


def listed(page: Page) -> Locator:
    return page.locator(".runs-row")


def names(page: Page) -> list[str]:
    """Return the names in the list, in its order."""
    rows: list[list[str]] = page.locator(".runs-row").evaluate_all(
        "rows => rows.map(row => [row.getAttribute('aria-rowindex'), row.querySelector('.runs-name').textContent])"
    )
    return [name for _, name in sorted(rows, key=lambda each: int(each[0]))]


def of(page: Page, name: str) -> Locator:
    """Return the row of a run."""
    return page.locator(".runs-row", has=page.get_by_role("link", name=name, exact=True))


def tick(page: Page, name: str) -> Locator:
    return of(page, name).get_by_role("checkbox")


def expect_names(page: Page, expected: list[str]) -> None:
    page.wait_for_function(
        """expected => {
          const rows = [...document.querySelectorAll('.runs-row')];
          rows.sort((a, b) => a.ariaRowIndex - b.ariaRowIndex);
          return JSON.stringify(rows.map(row => row.querySelector('.runs-name').textContent)) === expected;
        }""",
        arg=json.dumps(expected, separators=(",", ":"), ensure_ascii=False),
    )


@pytest.fixture
def several(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> Iterator[tuple[Training, Page]]:
    """A live run, and the page of a server that has three further runs."""
    run = training(tmp_path, knobs={"run_name": "live"}).begin()
    run.step(loss=0.5)
    put(
        run,
        row("a", 0.3, started=300.0, hyperparameters={"optimizer.lr": 0.1, "model": "net"}, tags=["paper"]),
        row("b", 0.2, started=200.0, hyperparameters={"optimizer.lr": 0.01, "model": "net"}),
        row("c", 0.1, started=100.0, state="failed", why="ValueError: no", hyperparameters={"model": "net"}),
    )
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("live")
    expect(listed(page)).to_have_count(4)
    yield run, page


def test_one_run_has_no_list_until_it_is_asked_for(started: tuple[Training, Page]) -> None:
    run, page = started
    toggle = page.locator(".runs-toggle")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    toggle.click()
    expect(listed(page)).to_have_count(1)
    expect(listed(page)).to_contain_text(run.run.id)
    page.reload()
    expect(listed(page)).to_have_count(1)


def test_a_folded_list_is_not_asked_for(several: tuple[Training, Page]) -> None:
    _, page = several
    page.locator("main").click()
    page.keyboard.press("r")
    expect(page.locator(".runbar")).to_be_hidden()
    page.goto(page.url.partition("#")[0] + "#v=1&run=live")  # a link: nothing is ticked by itself
    sent: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda data: sent.append(str(data))))
    with page.expect_websocket() as opened:
        page.reload()
    expect(word(page)).to_have_text("live")
    assert not any('"list"' in message for message in sent)
    page.keyboard.press("r")
    expect(listed(page)).to_have_count(4)
    with opened.value.expect_event("framesent", lambda data: '"on":false' in str(data)):
        page.keyboard.press("r")


def test_two_runs_of_this_process_are_listed_with_true_values(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    first = training(tmp_path, knobs={"run_name": "first"}, max_steps=4).begin()
    for number in range(4):
        first.step(loss=1 / (1 + number))
    first.wait_for_end()
    second = training(tmp_path, knobs={"run_name": "second"}).begin()
    second.step(loss=0.125)
    page = open_page(second.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("live")
    expect_names(page, ["second", "first"])
    expect(of(page, "first")).to_contain_text("completed")
    expect(of(page, "second")).to_contain_text("running")
    expect(of(page, "second")).to_have_attribute("aria-current", "true")
    page.get_by_role("button", name="Filter, order and columns").click()
    page.get_by_label("last loss").check()
    expect(of(page, "first")).to_contain_text("0.250")
    expect(of(page, "second")).to_contain_text("0.125")
    second.step(loss=0.0625)
    expect(of(page, "second")).to_contain_text("0.0625")
    of(page, "first").get_by_role("link").click()
    expect(page.locator(".run-name")).to_have_text("first")
    expect(of(page, "first")).to_have_attribute("aria-current", "true")


def test_the_list_is_sorted_filtered_and_remembered(several: tuple[Training, Page]) -> None:
    _, page = several
    expect_names(page, ["live", "a", "b", "c"])
    expect(of(page, "a")).to_contain_text("0.400")
    expect(of(page, "a")).to_contain_text("0.300")
    page.locator(".runs-header").get_by_role("button", name="Best").click()
    expect_names(page, ["c", "b", "a", "live"])
    page.locator(".runs-header").get_by_role("button", name="Best").click()
    expect_names(page, ["a", "b", "c", "live"])
    search = page.get_by_placeholder(re.compile("^Filter: words"))
    for text, found in (
        ("/^[ab]$/", ["a", "b"]),
        ("state=failed", ["c"]),
        ("optimizer.lr<0.05", ["b"]),
        ("val_loss>=0.3", ["a", "b"]),
        ("paper", ["a"]),
        ("nothing", []),
    ):
        search.fill(text)
        expect_names(page, found)
    expect(page.get_by_text("No run matches.")).to_be_visible()
    search.fill("")
    page.get_by_role("button", name="Filter, order and columns").click()
    page.get_by_label("What to filter by").fill("best.val_loss")
    page.get_by_label("Value", exact=True).fill("0.25")
    page.get_by_role("button", name="Add").click()
    expect_names(page, ["b", "c"])
    page.get_by_label("optimizer.lr", exact=True).check()
    expect(of(page, "b")).to_contain_text("0.01")
    search.fill("")
    page.reload()
    expect_names(page, ["a", "b", "c", "live"])
    expect(of(page, "b")).to_contain_text("0.01")


def test_a_filter_that_means_nothing_is_told_beside_its_field(several: tuple[Training, Page]) -> None:
    _, page = several
    search = page.get_by_placeholder(re.compile("^Filter: words"))
    for text, why in (
        ("val_los<0.3", "val_los<0.3: no run has 'val_los'; did you mean 'val_loss'?"),
        ("state:finished", "state:finished: there is no state 'finished'; did you mean 'completed'?"),
        ("val_loss<much", "val_loss<much: 'much' is no number"),
        ("/(?!a)/", "/(?!a)/: '(?!' is not known here, only (...) and (?:...)"),
    ):
        search.fill(text)
        expect(page.locator("#runs-problem")).to_have_text(why)
        expect(search).to_have_attribute("aria-invalid", "true")
        expect(listed(page)).to_have_count(0)
        expect(page.get_by_text("No run matches.")).to_be_hidden()
    shot(page, "filter-problem")
    search.fill("state:completed,failed -tag:paper")
    expect_names(page, ["b", "c"])
    expect(page.locator("#runs-problem")).to_be_hidden()
    expect(search).not_to_have_attribute("aria-invalid", "true")


def test_the_list_is_sorted_by_any_field(several: tuple[Training, Page]) -> None:
    _, page = several
    page.get_by_role("button", name="Filter, order and columns").click()
    by = page.get_by_label("Sort by")
    expect(by).to_have_value("-started")
    for text, names in (
        ("optimizer.lr", ["b", "live", "a", "c"]),
        ("-best.val_loss", ["a", "b", "c", "live"]),
    ):
        by.fill(text)
        by.press("Enter")
        expect_names(page, names)
    by.fill("val_los")
    by.press("Enter")
    expect(page.get_by_text("no run has 'val_los'; did you mean 'val_loss'?")).to_be_visible()
    expect_names(page, ["a", "b", "c", "live"])
    shot(page, "sort-by-any-field")


def test_an_expression_with_endless_ways_does_not_hold_up_the_list(several: tuple[Training, Page]) -> None:
    run, page = several
    put(run, *(row(f"{number}{'a' * 190}b", started=float(number)) for number in range(50)))
    expect(page.locator(".runs-head")).to_contain_text("54")
    search = page.get_by_placeholder(re.compile("^Filter: words"))
    search.fill("/^[0-9]+(a+)+$/")
    expect(page.get_by_text("No run matches.")).to_be_visible()
    search.fill("/^[0-9]+(a+)+b$/")
    expect(page.locator(".runs-head")).to_contain_text("50 of 54")
    page.get_by_role("tab", name="Events").click()
    expect(page.get_by_role("tab", name="Events")).to_have_attribute("aria-selected", "true")


def test_ticks_are_in_the_address_and_there_is_no_eleventh(several: tuple[Training, Page]) -> None:
    run, page = several
    put(run, *(row(f"n{number}", started=float(number)) for number in range(10)))
    expect(listed(page)).to_have_count(14)
    tick(page, "a").click()
    tick(page, "b").click()
    page.wait_for_function("() => location.hash.includes('with=a&with=b')")
    expect(of(page, "a")).to_have_attribute("aria-selected", "true")
    tick(page, "a").click()
    page.wait_for_function("() => !location.hash.includes('with=a')")
    for number in range(8):
        tick(page, f"n{number}").click()
    expect(page.get_by_text("10 runs, the most at a time")).to_be_visible()
    tick(page, "n8").click()
    expect(page.get_by_text("At most 10 runs are shown at a time.")).to_be_visible()
    expect(tick(page, "n8")).not_to_be_checked()
    page.get_by_role("button", name="Latest only").click()
    page.wait_for_function("() => !location.hash.includes('with=')")
    expect(of(page, "live")).to_have_attribute("aria-selected", "true")


def test_keys_go_through_the_list(several: tuple[Training, Page]) -> None:
    _, page = several
    page.locator("main").click()
    page.keyboard.press("j")  # from the run in focus, which is the first
    page.keyboard.press("x")
    page.wait_for_function("() => location.hash.includes('with=a')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.wait_for_function("() => location.hash.includes('with=a&with=b')")
    page.keyboard.press("b")
    page.wait_for_function("() => location.hash.includes('baseline=b')")
    page.keyboard.press("k")
    page.keyboard.press("x")
    page.wait_for_function("() => !location.hash.includes('with=a')")
    page.keyboard.press("End")
    expect(page.locator(".runs-row.active .runs-name")).to_have_text("c")


def test_settings_that_differ_are_compared_and_copied(several: tuple[Training, Page]) -> None:
    _, page = several
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(page.get_by_role("tab", name="Compare")).to_be_hidden()
    tick(page, "a").click()
    tick(page, "b").click()
    page.get_by_role("tab", name="Compare").click()
    table = page.get_by_role("table", name="Settings that differ, and metrics")
    expect(table.get_by_role("columnheader")).to_have_text(["live", "a", "b"])
    expect(table.get_by_role("row", name=re.compile("^optimizer.lr"))).to_contain_text("0.10.10.01")
    best = table.get_by_role("row", name=re.compile("^best val_loss"))
    expect(best.locator(".compare-best")).to_have_text("0.2")
    page.get_by_role("button", name="Copy Markdown").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    text = page.evaluate("() => navigator.clipboard.readText()")
    assert "|  | live | a | b |" in text and "| best val\\_loss |  | 0.3 | **0.2** |" in text
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    lines = list(csv.reader(io.StringIO(Path(download.value.path()).read_text())))
    assert lines[0] == ["", "live", "a", "b"] and ["optimizer.lr", "0.1", "0.1", "0.01"] in lines
    page.get_by_role("button", name="Latest only").click()
    expect(page.get_by_role("tab", name="Compare")).to_be_hidden()
    expect(page.get_by_role("tab", name="Metrics")).to_have_attribute("aria-selected", "true")


def test_the_baseline_is_compared_ticked_or_not(several: tuple[Training, Page]) -> None:
    _, page = several
    page.evaluate("() => { location.hash = '#v=1&run=live&baseline=a'; }")
    page.get_by_role("tab", name="Compare").click()
    heads = page.locator(".compare-table thead th")
    expect(heads).to_have_text(["live", "a baseline"])
    page.set_viewport_size({"width": 390, "height": 844})
    broken = page.locator(".compare-table td").evaluate_all(
        """cells => cells.filter((cell) => {
          const range = document.createRange();
          range.selectNodeContents(cell);
          return new Set([...range.getClientRects()].map(({ top }) => Math.round(top))).size > 1;
        }).map((cell) => cell.textContent)"""
    )
    assert broken == []
    shot(page, "compare-baseline-phone")


def test_runs_of_a_link_that_are_not_here_are_told_once(several: tuple[Training, Page]) -> None:
    _, page = several
    page.evaluate("() => { location.hash = '#v=1&run=live&with=a&with=x&baseline=y'; }")
    notice = page.locator(".notice", has_text="2 runs of this view are not here: x, y.")
    expect(notice).to_be_visible()
    expect(tick(page, "a")).to_be_checked()
    shot(page, "missing-runs")
    notice.get_by_role("button", name="Close").click()
    expect(notice).to_be_hidden()
    tick(page, "b").click()
    page.wait_for_function("() => location.hash.includes('with=b')")
    expect(notice).to_be_hidden()


def test_a_click_on_the_row_that_is_cut_off_ticks_it(several: tuple[Training, Page]) -> None:
    run, page = several
    put(run, *(row(f"n{number:02d}", started=float(number)) for number in range(30)))
    grid = page.locator(".runs-grid")
    height = grid.evaluate("grid => grid.clientHeight - grid.firstElementChild.offsetHeight")
    page.set_viewport_size({"width": 1440, "height": 900 + 28 - height % 46})
    page.wait_for_function(
        "() => { const grid = document.querySelector('.runs-grid');"
        " return (grid.clientHeight - grid.firstElementChild.offsetHeight) % 46 === 28; }"
    )
    foot = grid.evaluate("grid => grid.getBoundingClientRect().bottom")
    cut = page.locator(f".runs-row[aria-rowindex='{(height + 28) // 46 + 2}'] .runs-tick")
    box = cut.bounding_box()
    assert box is not None and foot - 28 < box["y"] < foot
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, delay=50)
    expect(cut).to_be_checked()


def test_the_last_finished_run_is_laid_over_the_live_one_until_latest_only(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training(knobs={"run_name": "live"}).begin()
    run.step(loss=0.5)
    put(run, row("old", heard=5.0), row("finished", heard=9.0), row("lost", heard=10.0, state="lost"))
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("live")
    expect(tick(page, "finished")).not_to_be_checked()
    give(page, "Validate")
    run.step(loss=0.5)
    expect(tick(page, "finished")).to_be_checked()
    expect(tick(page, "old")).not_to_be_checked()
    page.get_by_role("button", name="Latest only").click()
    expect(tick(page, "finished")).not_to_be_checked()
    again = page.context.new_page()
    again.goto(run.dashboard.url)
    expect(word(again)).to_have_text("live")
    expect(of(again, "live")).to_contain_text("running")
    expect(tick(again, "finished")).not_to_be_checked()


def test_odd_names_are_text(several: tuple[Training, Page]) -> None:
    run, page = several
    html = "<img src=x onerror=document.title='broken'>"
    ahead = row("ahead", started=time.time() + 7_200)
    put(
        run,
        row(html),
        row("x" * 300),
        row("שלום עולם"),
        row("one/demo", name="demo"),
        row("two/demo", name="demo"),
        ahead,
    )
    expect(listed(page)).to_have_count(10)
    assert {html, "x" * 300, "שלום עולם"} <= set(names(page))
    assert page.locator("img").count() == 0 and "broken" not in page.title()
    expect(page.locator(".runs-row", has_text="one/demo")).to_have_count(1)
    expect(page.locator(".runs-row", has_text="two/demo")).to_have_count(1)
    expect(of(page, "ahead")).to_contain_text("0 s ago")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    tick(page, html).click()
    tick(page, "x" * 300).click()
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_role("columnheader", name=html)).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("img").count() == 0
    shot(page, "odd-names")


def test_archived_runs_are_hidden_unless_asked_for(several: tuple[Training, Page]) -> None:
    run, page = several
    put(run, row("b", 0.2, started=200.0, archived=True, version=1))
    expect_names(page, ["live", "a", "c"])
    page.get_by_role("button", name="Filter, order and columns").click()
    page.get_by_label("Show archived runs").check()
    expect_names(page, ["live", "a", "b", "c"])


def test_of_five_thousand_runs_only_those_in_sight_are_in_the_document(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    run.step(loss=0.5)
    put(run, *(row(f"run-{number:04d}", number / 5_000, started=float(number)) for number in range(5_000)))
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(page.locator(".runs-head")).to_contain_text(re.compile("5.001"))
    assert page.locator(".runs-row").count() < 60
    expect(page.get_by_role("grid", name="Runs")).to_have_attribute("aria-rowcount", "5002")
    page.locator(".runs-grid").evaluate("grid => { grid.scrollTop = grid.scrollHeight; }")
    expect(of(page, "run-0000")).to_be_visible()
    assert page.locator(".runs-row").count() < 60
    page.get_by_placeholder(re.compile("^Filter: words")).fill("/run-..99/")
    expect(page.locator(".runs-head")).to_contain_text(re.compile("50 of 5.001"))
    page.locator(".runs-header").get_by_role("button", name="Best").click()
    expect(of(page, "run-0099")).to_be_visible()


def test_ten_runs_without_a_common_metric_and_one_of_two_thousand(several: tuple[Training, Page]) -> None:
    run, page = several
    many = {f"metric_{number}": Figure(float(number)) for number in range(2_000)}
    put(run, row("many", figures=many, metrics=2_500))
    put(run, *(row(f"r{number}", figures={f"own_{number}": Figure(1.0)}) for number in range(8)))
    expect(listed(page)).to_have_count(13)
    for name in ("many", *(f"r{number}" for number in range(8))):
        tick(page, name).click()
    expect(of(page, "many")).to_contain_text(re.compile("figures of 2.000 of its 2.500 metrics"))
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_role("button", name=re.compile("^Show .* more"))).to_be_visible()
    expect(page.locator(".compare")).to_contain_text(
        re.compile("many has figures of 2.000 of its 2.500 metrics here")
    )
    page.get_by_label("Filter settings and metrics").fill("own_3")
    expect(page.locator(".compare-table tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Filter, order and columns").click()
    page.get_by_label("Find a column").fill("metric_1999")
    page.get_by_label("last metric_1999").check()
    expect(of(page, "many")).to_contain_text("1999")


@pytest.mark.parametrize("width", [390, 768, 1440, 1920])
def test_the_list_fits_every_width_and_nothing_serious_hinders_anybody(
    training: Callable[..., Training], open_page: OpenPage, width: int
) -> None:
    run = training().begin()
    for number in range(1, 30):
        run.step(loss=1 / number)
    put(run, *(row(f"run-{number}", tags=["paper"] * (number % 2)) for number in range(30)))
    page = open_page(
        run.dashboard.url,
        viewport={"width": width, "height": 844},
        has_touch=width == 390,
        bypass_csp=True,  # axe brings a script along; every other test has the policy
    )
    expect(word(page)).to_have_text("live")
    if width < 1100:
        expect(page.locator(".runbar")).to_be_hidden()
        page.locator(".runs-toggle").click()
    tick(page, "run-29").click()
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        if page.locator(".runbar").is_hidden():
            page.locator(".runs-toggle").click()
        assert_nothing_hinders(page)
        shot(page, f"runs-{scheme}-{width}")
        options = page.get_by_role("button", name="Filter, order and columns")
        options.click()
        assert_nothing_hinders(page)
        options.click()
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.locator(".compare-table")).to_be_visible()
        assert_nothing_hinders(page)
        shot(page, f"compare-{scheme}-{width}")


def assert_nothing_hinders(page: Page) -> None:
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "too wide"
    found = Axe().run(page)
    impacts = [each["impact"] for each in found.response["violations"]]
    assert not {"serious", "critical"} & set(impacts), found.generate_report()


def test_controls_name_the_run_where_there_are_several(several: tuple[Training, Page]) -> None:
    _, page = several
    stop = page.get_by_role("group", name="Control of the run").get_by_role("button", name="Stop live")
    stop.click()
    expect(page.get_by_role("heading", name="Stop live?")).to_be_visible()


def test_configuration_begins_with_what_the_run_was_made_with_and_folds_the_knobs(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, max_steps=50, knobs={"hyperparameters": {"dropout": 0.3}, "seed": 7}).begin()
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("waiting for the first step")
    page.get_by_role("tab", name="Configuration").click()
    panel = page.get_by_role("tabpanel", name="Configuration")
    expect(panel.get_by_role("heading").first).to_have_text("Made with")
    made = panel.locator("dl").first
    for name, value in (("dropout", "0.3"), ("optimizer.lr", "0.1"), ("max_steps", "50"), ("seed", "7")):
        expect(made.locator(".setting", has_text=re.compile(f"^{re.escape(name)}"))).to_contain_text(value)
    expect(made).not_to_contain_text("gradient_clip_val")
    expect(panel.get_by_text("gradient_clip_val")).to_be_hidden()
    panel.get_by_text(re.compile("^All knobs of the trainer")).click()
    expect(panel.get_by_text("gradient_clip_val")).to_be_visible()


def open_editor(page: Page, name: str) -> Locator:
    of(page, name).hover()
    of(page, name).get_by_role("button", name=f"Edit {name}").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    return dialog


def test_of_two_tabs_that_edit_a_note_the_second_is_told_and_keeps_its_text(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, knobs={"run_name": "live"}).begin()
    run.step(loss=0.5)
    pages = [open_page(run.dashboard.url, viewport={"width": 1440, "height": 900}) for _ in range(2)]
    for page in pages:
        expect(word(page)).to_have_text("live")
        page.locator(".runs-toggle").click()
        open_editor(page, "live").get_by_label("Note").fill(f"of {pages.index(page)}")
    first, second = pages
    first.get_by_label("Tags").fill("paper, good one")
    first.get_by_label("Name", exact=True).fill("My <b>run</b>")
    first.get_by_role("button", name="Save", exact=True).click()
    expect(first.get_by_role("dialog")).to_be_hidden()
    expect(of(first, "My <b>run</b>")).to_contain_text("#paper · #good one")
    expect(first.locator(".run-name")).to_have_text("My <b>run</b>")
    second.get_by_role("button", name="Save", exact=True).click()
    expect(second.get_by_role("alert").filter(has_text="the note is “of 0”")).to_be_visible()
    expect(second.get_by_label("Note")).to_have_value("of 1")
    second.get_by_role("button", name="Save", exact=True).click()
    expect(second.get_by_role("dialog")).to_be_hidden()
    labels = json.loads((tmp_path / "live" / "labels.json").read_text())
    assert labels["note"] == "of 1" and labels["name"] == "My <b>run</b>"
    second.get_by_role("tab", name="Configuration").click()
    expect(second.get_by_role("tabpanel", name="Configuration")).to_contain_text("of 1")


def test_a_note_that_is_too_long_is_told_and_readers_have_no_editor(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, knobs={"run_name": "live"}).begin()
    run.step(loss=0.5)
    page = open_page(run.dashboard.url, viewport={"width": 1440, "height": 900})
    page.locator(".runs-toggle").click()
    dialog = open_editor(page, "live")
    dialog.get_by_label("Note").fill("x" * 16_385)
    dialog.get_by_role("button", name="Save", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("at most 16384 characters")
    reader = open_page(run.dashboard.read_only_url, viewport={"width": 1440, "height": 900})
    expect(word(reader)).to_have_text("live")
    reader.locator(".runs-toggle").click()
    of(reader, "live").hover()
    expect(of(reader, "live").get_by_role("button", name="Make live the baseline")).to_be_visible()
    expect(of(reader, "live").get_by_role("button", name="Edit live")).to_have_count(0)
