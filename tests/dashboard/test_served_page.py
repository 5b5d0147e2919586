"""The page of `offloop serve` in a real browser: runs that other processes train, and what happens to their files."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from live_page import OpenPage, chart, figure, shot, word
from playwright.sync_api import Locator, Page, expect
from run_files import TrainerProcess, trainer_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

AS_OTHERS: Final = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Has root, too, read only what it is permitted to."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where `offloop serve` has its page."""
    command = [sys.executable, "-m", "offloop", "serve", str(tmp_path), "--port", "0"]
    if os.geteuid() == 0:
        command = [*AS_OTHERS, *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Live page: "), line
        yield line.removeprefix("Live page: ").strip()
    finally:
        process.kill()
        process.communicate()


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
