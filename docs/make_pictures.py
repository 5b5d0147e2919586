"""Make the pictures of the live page for README and docs: real runs of the demo, in a real browser.

`.venv/bin/python docs/make_pictures.py` takes some minutes and needs playwright (offloop[browser]) and a Chromium.
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

DOCS: Final = Path(__file__).parent
CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")
OFFLOOP: Final = Path(sys.executable).with_name("offloop")
MOST_BYTES: Final = 150 * 1024
"""Bytes of a picture: pages with them are read over slow links, too."""
PAST: Final = {"short": 0, "first": 0, "second": 1}
"""Names of the past runs, and their seeds."""
STEPS: Final = {"short": 150, "first": 300, "second": 300}
LIVE_STEPS: Final = 600
REACHED: Final = "() => parseInt(document.querySelector('.figure-step .value').textContent) > 310"
"""The live run has done half of its steps, and three validations."""


def demo(runs_dir: Path, *, steps: int, seed: int, dashboard: bool) -> "subprocess.Popen[str]":
    """Start a run of the demo."""
    arguments = ["--steps", str(steps), "--seed", str(seed), "--run-dir", str(runs_dir)]
    page = "--dashboard" if dashboard else "--no-dashboard"
    return subprocess.Popen(
        [str(OFFLOOP), "demo", *arguments, page],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_past_runs(runs_dir: Path) -> None:
    """Train what the live run is compared with."""
    known: set[Path] = set()
    for name, seed in PAST.items():
        process = demo(runs_dir, steps=STEPS[name], seed=seed, dashboard=False)
        process.communicate()
        assert process.returncode == 0
        (directory,) = set(runs_dir.iterdir()) - known
        known.add(directory)
        subprocess.run(
            [str(OFFLOOP), "label", str(directory), "--name", name],
            check=True,
            capture_output=True,
        )


@contextmanager
def live_run(runs_dir: Path) -> Iterator[str]:
    """Train while the pictures are taken; yields the address of the page."""
    process = demo(runs_dir, steps=LIVE_STEPS, seed=2, dashboard=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"Live page: (\S+)", line):
                yield found[1]
                return
        raise RuntimeError("the demo has printed no address")
    finally:
        process.terminate()
        process.communicate()


def open_page(browser: Browser, address: str, width: int, height: int, scheme: str) -> Page:
    """Open the page, and wait for its first chart."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        has_touch=width < 500,
    )
    page = context.new_page()
    page.goto(address)
    figure = page.get_by_role("figure", name="loss", exact=True)
    expect(figure.locator("canvas")).to_be_visible(timeout=60_000)
    return page


def show(page: Page, view: str) -> None:
    """Have the page show a view, as its address names it."""
    page.evaluate("view => { location.hash = `#v=1&${view}`; }", view)


def take(page: Page, name: str) -> None:
    """Save what the page shows."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1_500)  # what a run draws in between: a picture of no moment in particular
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = DOCS / f"{name}.png"
    image.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        # Fewer colours: of the smallest areas they are not quite the same
        image = image.quantize(256, kmeans=4, dither=Image.Dither.NONE)
        image.save(path, optimize=True)
    print(f"{path.name}: {image.width} x {image.height}, {path.stat().st_size / 1024:.0f} KiB")
    assert path.stat().st_size <= MOST_BYTES


def key_of(page: Page, name: str) -> str:
    """Return the key of a run in the list."""
    link = page.locator(".runs-row").get_by_role("link", name=name, exact=True)
    title = link.get_attribute("title")
    assert title is not None
    return title.splitlines()[1]


def main() -> None:
    """Train, look, and save."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)))
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        runs_dir = Path(name)
        make_past_runs(runs_dir)
        browser = playwright.chromium.launch(executable_path=chromium)
        with live_run(runs_dir) as address:
            page = open_page(browser, address, 1280, 720, "light")
            page.get_by_role("button", name="Close the list of runs").click()
            page.wait_for_function(REACHED, timeout=0)
            latest = page.evaluate("() => new URLSearchParams(location.hash.slice(1)).get('run')")
            show(page, f"run={latest}")
            take(page, "live_page")

            wide = open_page(browser, address, 1440, 900, "light")
            expect(wide.locator(".runs-row")).to_have_count(len(PAST) + 1)
            runs = {name: key_of(wide, name) for name in PAST}
            show(
                wide,
                f"run={latest}&with={runs['first']}&with={runs['second']}&baseline={runs['short']}&smooth=0.6",
            )
            take(wide, "live_page_runs")

            phone = open_page(browser, address, 390, 844, "light")
            show(phone, f"run={latest}")
            take(phone, "live_page_phone")

            dark = open_page(browser, address, 1440, 900, "dark")
            show(
                dark,
                f"run={latest}&with={runs['first']}&with={runs['second']}&with={runs['short']}&tab=compare",
            )
            expect(dark.locator(".compare-table tbody tr").first).to_be_visible()
            take(dark, "live_page_compare")
        browser.close()


if __name__ == "__main__":
    main()
