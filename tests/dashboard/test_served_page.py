"""The page of `offloop serve` in a real browser: runs that other processes train, and what happens to their files."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from drawing import Drawing
from live_page import NEXT_FRAME, OpenPage, acks, button, chart, figure, shot, word
from playwright.sync_api import Locator, Page, expect
from run_files import TOKEN, TrainerProcess, events_of, served, trainer_process, write_run

from offloop.engine import StepEnd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

AS_OTHERS: Final = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Has root, too, read only what it is permitted to."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where `offloop serve` has its page."""
    with served(tmp_path, *(AS_OTHERS if os.geteuid() == 0 else ())) as address:
        yield address


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[TrainerProcess]:
    with trainer_process("live", tmp_path) as trainer:
        trainer.steps(3)
        yield trainer


def look(open_page: OpenPage, address: str) -> Page:
    """Open the page of a live run of another process, with the list."""
    page = open_page(address, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("live")
    expect(figure(page, "Step")).to_contain_text("3")
    page.keyboard.press("r")
    expect(row(page)).to_contain_text("running")
    return page


def row(page: Page) -> Locator:
    return page.locator(".runs-row").filter(has=page.get_by_role("link", name="live", exact=True))


def damage(directory: Path, how: str) -> None:
    if how == "deleted":
        shutil.rmtree(directory)
    elif how == "renamed":
        directory.rename(directory.with_name(".elsewhere"))
    else:
        directory.chmod(0)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("deleted", "its directory was deleted or renamed"),
        ("renamed", "its directory was deleted or renamed"),
        ("forbidden", "permission denied"),
    ],
)
def test_a_live_run_whose_files_go_says_what_happened_and_when_in_head_and_list(
    trainer: TrainerProcess, tmp_path: Path, address: str, open_page: OpenPage, how: str, cause: str
) -> None:
    page = look(open_page, address)
    damage(tmp_path / "live", how)
    said = re.compile(rf"cannot be read since \d\d:\d\d:\d\d: {cause}")
    expect(word(page)).to_have_text("lost")
    expect(page.locator(".state-detail")).to_have_text(said)
    expect(row(page).locator(".runs-about")).to_have_text(re.compile(rf"^lost · {said.pattern}"))
    expect(row(page).locator(".runs-about")).to_have_attribute("title", said)
    # What was read stays
    expect(chart(page, "loss").locator("canvas")).to_be_visible()
    expect(figure(page, "Step")).to_contain_text("3")
    shot(page, f"files-{how}")
    if how == "forbidden":
        (tmp_path / "live").chmod(0o755)
        expect(word(page)).to_have_text("live")
        expect(page.locator(".state-detail")).to_have_text("")
        expect(row(page).locator(".runs-about")).to_contain_text("running")
        trainer.steps(1)
        expect(figure(page, "Step")).to_contain_text("4")


def test_runs_with_other_batches_are_aligned_by_the_samples_they_have_seen(
    tmp_path: Path, address: str, open_page: OpenPage
) -> None:
    """One has 4 samples in a step, the other one 8."""
    for name, size, created in (("small", 4, 1_001.0), ("large", 8, 1_000.0)):
        events = [
            msgspec.structs.replace(each, samples=size) if isinstance(each, StepEnd) else each
            for each in events_of(10)
        ]
        write_run(tmp_path / name, events, created=created)
    page = open_page(address, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("completed")
    page.evaluate("() => { location.hash = '#v=1&run=small&with=large&hide=train_loss'; }")
    expect(chart(page, "loss").locator(".curve", has_text="large").first).to_contain_text("0.1000")
    page.get_by_role("button", name="Samples", exact=True).click()
    page.wait_for_function("() => location.hash.includes('x=samples')")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(chart(page, "loss"))
    for name, size in (("small", 4), ("large", 8)):
        line = drawing.line(name)
        assert [x for x, _ in line] == pytest.approx([size * step for step in range(1, 11)], abs=0.5)
        assert [y for _, y in line] == pytest.approx([1 / step for step in range(1, 11)], abs=0.02)
    shot(page, "samples")


def test_a_click_goes_from_looking_at_a_run_of_another_process_to_steering_it(
    tmp_path: Path, address: str, open_page: OpenPage
) -> None:
    with trainer_process("live", tmp_path, "page") as trainer:
        trainer.steps(3)
        page = look(open_page, address)
        expect(button(page, "Pause")).to_have_attribute("aria-disabled", "true")
        expect(button(page, "Pause")).to_have_attribute(
            "title", re.compile("This page follows the run's files")
        )
        link = page.get_by_role("link", name="Open its own page")
        own = link.get_attribute("href")
        assert own is not None and "token" not in own
        # The browser has opened the address that the run printed, some time in the last 30 days
        once = page.context.new_page()
        once.goto(f"{own}?token={TOKEN}")
        expect(word(once)).to_have_text("live")
        once.close()
        with page.context.expect_page() as opened:
            link.click()
        steering = opened.value
        expect(word(steering)).to_have_text("live")
        button(steering, "Pause").click()
        expect(acks(steering)).to_contain_text("accepted")
        trainer.steps(1)
        expect(word(steering)).to_have_text("paused")
        expect(word(page)).to_have_text("paused")
        button(steering, "Resume").click()
        expect(word(page)).to_have_text("live")
