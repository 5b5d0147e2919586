"""The tab of a run's checkpoints in a real browser: real checkpoints, of a run that goes on and of one that is over."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offloop import ModelCheckpoint
from offloop.dashboard.options import Options
from offloop.dashboard.serving.server import Server
from offloop.engine import load_model
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import tiny_loader, tiny_trainer

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
pytest.importorskip("axe_playwright_python", reason="tests in a browser need offloop[browser]")
from axe_playwright_python.sync_playwright import Axe
from live_page import NEXT_FRAME, PATIENCE, OpenPage, Training, shot
from playwright.sync_api import Locator, Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def rows(page: Page) -> Locator:
    return page.locator(".checkpoint-table tbody tr")


def cells(row: Locator) -> list[str]:
    return [text.strip() for text in row.locator("th, td").all_inner_texts()]


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Checkpoints").click()


def tag(page: Page, row: Locator, name: str, *, move: bool = False) -> None:
    row.get_by_role("button", name="Tag", exact=True).click()
    page.get_by_label("Tag: letters").fill(name)
    if move:
        page.get_by_text("Take it off another").click()
    page.locator("dialog[open]").get_by_role("button", name="Tag", exact=True).click()


def step_until(run: Training, shown: Locator) -> None:
    """Have the run do steps until something is shown: a command applies at the end of one that comes after it."""
    deadline = time.monotonic() + PATIENCE / 1000
    while shown.count() == 0:
        assert time.monotonic() < deadline, "the command was not applied"
        run.step(loss=1.0)
        shown.page.evaluate(NEXT_FRAME)


@pytest.fixture
def going_on(training: Callable[..., Training], open_page: OpenPage, tmp_path: Path) -> tuple[Training, Page]:
    """A run with two checkpoints, of steps 2 and 4, and its page."""
    run = training(
        tmp_path, knobs={"run_name": "run", "val_every_n_steps": 2}, callbacks=[ModelCheckpoint(save_top_k=2)]
    )
    run.trainer.val_losses = itertools.chain([0.7, 0.5], itertools.repeat(0.9))
    run.begin()
    page = open_page(run.dashboard.url)
    for _ in range(4):
        run.step(loss=1.0)
    open_tab(page)
    expect(rows(page)).to_have_count(2)
    return run, page


def test_list_has_what_is_on_disk_and_what_events_tell(
    going_on: tuple[Training, Page], tmp_path: Path
) -> None:
    _, page = going_on
    tab = page.get_by_role("tab", name="Checkpoints")
    expect(tab).to_be_visible()
    open_tab(page)
    expect(rows(page)).to_have_count(2)
    newest, oldest = (cells(rows(page).nth(place)) for place in (0, 1))
    assert (newest[0], oldest[0]) == ("4", "2")
    assert (newest[3].rstrip(" ✓"), oldest[3].rstrip(" ✓")) == ("0.5000", "0.7000")
    infos = CheckpointReader(tmp_path / "run").checkpoints()
    assert oldest[4].split() == [f"{infos[0].bytes / 1_000:.0f}", "KB"]
    expect(rows(page).nth(0).locator(".name-chip")).to_have_text(["best", "last"])
    assert oldest[7] == ""
    assert oldest[8] == "not verified"
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    assert [each["id"] for each in found] == []
    shot(page, "checkpoints")


def test_lines_to_copy_resume_and_load_that_checkpoint(
    going_on: tuple[Training, Page], tmp_path: Path
) -> None:
    _, page = going_on
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_tab(page)
    rows(page).nth(1).get_by_role("button", name="Load").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    line = page.evaluate("() => navigator.clipboard.readText()")
    path = CheckpointReader(tmp_path / "run").checkpoints()[0].path
    assert line == f'load_model("{path}", into=model)'
    assert set(eval(line, {"load_model": lambda path, into: load_model(path), "model": None})) == {
        "weight",
        "bias",
    }
    rows(page).nth(1).get_by_role("button", name="Resume").click()
    expect(page.locator(".checkpoints .stage-line")).to_have_text(
        f'trainer.train(train_loader, val_loader, resume="{path}")'
    )


def test_tag_from_the_page_of_a_run_that_goes_on(going_on: tuple[Training, Page], tmp_path: Path) -> None:
    run, page = going_on
    open_tab(page)
    tag(page, rows(page).nth(1), "good")
    step_until(run, rows(page).nth(1).locator(".name-chip"))
    expect(rows(page).nth(1).locator(".name-chip")).to_have_text(["good"])
    assert CheckpointReader(tmp_path / "run").find("good").step == 2
    tag(page, rows(page).nth(0), "good")
    step_until(run, page.locator(".checkpoints .problem:not(:empty)"))
    expect(page.locator(".checkpoints .problem")).to_contain_text("move=True moves it")
    tag(page, rows(page).nth(0), "../escape")
    expect(page.locator(".checkpoints .problem")).to_contain_text("tag must be letters")
    assert CheckpointReader(tmp_path / "run").tags() == {
        "good": CheckpointReader(tmp_path / "run").find(2).name
    }


def test_run_that_is_over_is_verified_tagged_and_untagged(open_page: OpenPage, tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="past")
    callbacks = [ModelCheckpoint(every_n_steps=2, keep_last=5)]
    # In a thread of its own: this one has the event loop of the browser.
    with ThreadPoolExecutor() as pool:
        pool.submit(trainer.train, tiny_loader(4), epochs=1, callbacks=callbacks).result()
    reader = CheckpointReader(tmp_path / "past")
    damaged, *_ = reader.checkpoints()
    weights = damaged.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    server = Server(Options(port=0), tmp_path)
    try:
        page = open_page(server.url)
        open_tab(page)
        expect(rows(page)).to_have_count(len(reader.checkpoints()))
        page.get_by_role("button", name="Verify all").click()
        bad = page.locator(f"tr[data-name='{damaged.name}']")
        expect(bad.locator(".checkpoint-state")).to_contain_text("damaged:")
        expect(bad.locator(".checkpoint-state")).to_contain_text("model.safetensors")
        good = page.locator(f"tr[data-name='{reader.checkpoints()[-1].name}']")
        expect(good.locator(".checkpoint-state")).to_contain_text("verified")
        shot(page, "checkpoints-damaged")
        tag(page, good, "paper")
        expect(good.locator(".name-chip")).to_contain_text(["last", "paper"])
        assert reader.find("paper").name == reader.checkpoints()[-1].name
        good.get_by_role("button", name="Take off the tag paper").click()
        expect(good.get_by_text("paper")).to_have_count(0)
        assert reader.tags() == {}
    finally:
        server.close("the test is over")


def test_viewer_that_only_watches_sees_them_and_changes_nothing(
    going_on: tuple[Training, Page], open_page: OpenPage
) -> None:
    run, _ = going_on
    page = open_page(run.dashboard.read_only_url)
    open_tab(page)
    expect(rows(page)).to_have_count(2)
    expect(page.get_by_role("button", name="Verify all")).to_be_hidden()
    expect(rows(page).first.get_by_role("button")).to_have_text(["Resume", "Load"])
