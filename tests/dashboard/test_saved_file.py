"""A shared file, opened from disk in a real browser: it shows what the logs say, and asks nobody for anything."""

import csv
import functools
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from run_files import with_samples, write_run
from saved_file import blocks_of, listed

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from drawing import Drawing
from live_page import NEXT_FRAME, OpenPage, Training, chart, figure, options, pixels, shot, table_of, word
from playwright.sync_api import Page, expect

from offloop import ModelCheckpoint, export_html
from offloop.engine import (
    EpochEnd,
    Event,
    Metrics,
    PictureSample,
    Settings,
    StepEnd,
    TableSample,
    TextSample,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    edit_labels,
)
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import tiny_loader, tiny_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EVIL: Final = "</script><img src=x onerror='window.evil = 1'>"


def loss_of(run: int, step: int) -> float:
    """Return a loss with all digits of a float64."""
    return (run + 1) / math.sqrt(step)


def write(
    directory: Path, number: int, *, steps: int = 40, end: str | None = "completed", **extra: Any
) -> Path:
    """Write a run with a validation every ten steps."""
    start = 1_790_000_000.0 + 1_000 * number
    knobs: dict[str, Any] = {
        "config": Settings(precision="bf16", api_key="s3cret"),
        "hyperparameters": Settings({"optimizer.lr": 0.1 / (number + 1)}),
    }
    events: list[Event] = [TrainStart(time=start, max_steps=40, batches_per_epoch=10, **knobs)]
    for step in range(1, steps + 1):
        at: dict[str, Any] = {
            "time": start + step / 8,
            "step": step,
            "epoch": (step - 1) // 10,
            "batch": step,
        }
        loss = extra.get("losses", {}).get(step, loss_of(number, step))
        events.append(
            StepEnd(**at, seq=len(events), lr=0.1, loss=loss, samples=4, metrics=Metrics(width=step / 3))
        )
        if step % 10 == 0:
            metrics = Metrics(val_loss=loss_of(number, step) / 3)
            events.append(ValidationEnd(**at, seq=len(events), metrics=metrics))
            events.append(EpochEnd(**at, seq=len(events), metrics=metrics))
    last: dict[str, Any] = {"time": start + steps / 8, "step": steps, "epoch": 3}
    if end is not None:
        events.append(
            TrainEnd(**last, seq=len(events), status=end, error=extra.get("error"), seconds=steps / 8)
        )
    return write_run(directory, events, **extra.get("described", {}))


@pytest.fixture
def open_file(open_page: OpenPage) -> Iterator[Any]:
    """Open a file from disk; fails if the page asks for anything but the file and its own icon."""
    asked: list[str] = []

    def open_file(path: Path, view: str = "", **options: Any) -> Page:
        page = open_page("about:blank", **options)
        page.context.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(f"{path.as_uri()}{view}")
        return page

    yield open_file
    assert {re.sub(r"#.*", "", each) for each in asked if not each.startswith("blob:null/")} <= {
        each for each in asked if each.startswith("file:") and each.endswith(".html")
    }


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A file with three runs, of which one has failed."""
    runs = [write(tmp_path / f"run-{number}", number) for number in range(2)]
    runs.append(write(tmp_path / "broken", 2, steps=25, end="failed", error="ValueError: no more data"))
    export_html(runs, tmp_path / "shared.html")
    return tmp_path / "shared.html"


def test_the_file_shows_true_values_of_all_its_runs(three: Path, open_file: Any) -> None:
    page = open_file(three)
    expect(page.get_by_role("heading", name="broken", exact=True)).to_be_visible()
    expect(word(page)).to_have_text("failed")
    expect(page.locator(".notice")).to_contain_text("ValueError: no more data")
    expect(page.locator(".link-word")).to_have_text(re.compile(r"saved 2\d{3}-\d\d-\d\d"))
    # All runs are laid over each other.
    expect(chart(page, "loss").locator(".curve", has_text="run-1")).to_contain_text("val")
    page.evaluate(NEXT_FRAME)
    drawing = Drawing(chart(page, "loss"))
    for number, name, steps in ((0, "run-0", 40), (1, "run-1", 40), (2, "broken", 25)):
        line = drawing.line(name, dashed=False)
        assert [x for x, _ in line] == pytest.approx(range(1, steps + 1), abs=0.3)
        assert [y for _, y in line] == pytest.approx(
            [loss_of(number, step) for step in range(1, steps + 1)], abs=0.02
        )
    # The values to the last digit
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="CSV").click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    read = {(row["run"], int(row["step"])): float(row["loss"]) for row in rows if row["loss"]}
    expected = {("run-0", step): loss_of(0, step) for step in range(1, 41)}
    expected |= {("run-1", step): loss_of(1, step) for step in range(1, 41)}
    assert read == expected | {("broken", step): loss_of(2, step) for step in range(1, 26)}
    validated = {(row["run"], int(row["step"])): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert validated["run-1", 30] == loss_of(1, 30) / 3 and len(validated) == 4 + 4 + 2
    times = {int(row["step"]): float(row["time"]) for row in rows if row["run"] == "run-1" and row["loss"]}
    assert times[16] == 1_790_001_002.0
    shot(page, "saved-file")


def test_another_run_its_events_and_its_configuration(three: Path, open_file: Any) -> None:
    page = open_file(three, "#v=1&run=run-0")
    expect(word(page)).to_have_text("completed")
    expect(figure(page, "Step")).to_contain_text("40")
    expect(page.get_by_role("tab", name="Events")).to_have_text("Events 10")
    page.get_by_role("tab", name="Events").click()
    expect(page.locator("#panel-events")).to_contain_text("val_loss")
    page.get_by_role("tab", name="Configuration").click()
    settings = page.locator("#panel-config")
    expect(settings).to_contain_text("optimizer.lr0.1")
    page.get_by_text("All knobs of the trainer").click()
    expect(settings).to_contain_text("api_key(masked)")
    expect(settings).not_to_contain_text("directory")
    assert table_of_loss(page)["40"][0] == f"{loss_of(0, 40):.4f}"
    # From the list
    page.locator(".runs-row", has_text="run-1").get_by_role("link").click()
    expect(page.get_by_role("heading", name="run-1")).to_be_visible()
    assert "run=run-1" in page.url
    page.reload()
    expect(page.get_by_role("heading", name="run-1")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name="run-0")).to_be_visible()


def table_of_loss(page: Page) -> dict[str, list[str]]:
    page.get_by_role("tab", name="Metrics").click()
    return table_of(page, "loss")


def test_runs_are_compared_and_nothing_can_be_steered(three: Path, open_file: Any) -> None:
    page = open_file(three)
    page.get_by_role("tab", name="Compare").click()
    table = page.get_by_role("table", name="Settings that differ, and metrics")
    expect(table.get_by_role("columnheader")).to_have_text(["broken", "run-0", "run-1"])
    expect(table.get_by_role("row", name=re.compile("^optimizer.lr"))).to_contain_text("0.1")
    expect(page.get_by_role("group", name="Control of the run")).to_be_hidden()
    for name in ("Notify me", "Edit"):
        expect(page.get_by_role("button", name=re.compile(name)).locator("visible=true")).to_have_count(0)


def test_a_zoom_and_a_link_to_it_work_in_a_long_run(tmp_path: Path, open_file: Any) -> None:
    steps = 12_000
    run = write(tmp_path / "long", 0, steps=steps, losses={7_000: 200.0})
    export_html([run], tmp_path / "shared.html")
    page = open_file(tmp_path / "shared.html", "#v=1&zoom=6900,7100")
    expect(chart(page, "loss").locator(".curve", has_text="step")).to_be_visible()
    page.evaluate(NEXT_FRAME)
    line = [point for point in Drawing(chart(page, "loss")).line("step") if point[1] > 100]
    assert [x for x, _ in line] == pytest.approx([7_000], abs=1)
    # A curve that has minima and maxima only is saved as such, and asks for finer points in vain.
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="CSV").click()
    with open(download.value.path(), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert 2_500 <= len(rows) <= 5_000
    assert all(
        float(row["loss"]) == (200.0 if row["step"] == "7000" else loss_of(0, int(row["step"])))
        for row in rows
    )


def test_markup_in_names_and_errors_is_text(tmp_path: Path, open_file: Any) -> None:
    run = write(tmp_path / "run", 0, end="failed", error=f"ValueError: {EVIL}")
    edit_labels(run, version=0, name=EVIL, note=EVIL, tags=[EVIL])
    export_html([run], tmp_path / "shared.html")
    page = open_file(tmp_path / "shared.html")
    expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
    expect(page.locator(".notice")).to_contain_text(EVIL)
    page.get_by_role("tab", name="Configuration").click()
    expect(page.locator("#panel-config")).to_contain_text(EVIL)
    assert page.evaluate("() => window.evil") is None
    assert page.locator("img").count() == 0


def test_a_run_that_went_on_says_so(started: tuple[Training, Page], tmp_path: Path, open_file: Any) -> None:
    run, _ = started
    page = open_file(save_until(run, tmp_path / "shared.html", step=10))
    expect(word(page)).to_have_text("running when saved")
    expect(figure(page, "Step")).to_contain_text("10")
    expect(page).to_have_title(re.compile("running when saved"))


def save_until(run: Training, target: Path, *, step: int) -> Path:
    """Save a run until a step of it is in the file: its log is written a moment later."""
    while True:
        export_html([str(run.run.dir)], target, replace=True)
        if [each["step"] for each in listed(target)["rows"]["rows"]] == [step]:
            return target


def test_a_file_that_is_cut_off_says_so(three: Path, open_file: Any) -> None:
    whole = three.read_text()
    cut = three.with_name("cut.html")
    cut.write_text(whole[: whole.index('id="saved-1"') + 400])
    page = open_file(cut)
    expect(page.locator(".stage")).to_contain_text("This file is not whole: copy or download it again.")


def test_a_run_that_the_file_does_not_have_leads_to_the_newest(three: Path, open_file: Any) -> None:
    page = open_file(three, "#v=1&run=gone")
    expect(page.locator(".stage")).to_contain_text("This file does not have this run.")
    page.get_by_role("button", name="Show the newest run").click()
    expect(page.get_by_role("heading", name="broken", exact=True)).to_be_visible()


def test_texts_pictures_and_tables_of_runs_side_by_side(tmp_path: Path, open_file: Any) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    first = with_samples(
        tmp_path,
        "first",
        TextSample("code", "first 1", step=1),
        TextSample("code", EVIL, step=4),
        PictureSample("picture", colours, step=4),
        TableSample("table", ["image", "said"], [[255 - colours, EVIL]], step=4),
    )
    second = with_samples(tmp_path, "second", TextSample("code", "second 2", step=2))
    export_html([first, second], tmp_path / "shared.html")
    page = open_file(tmp_path / "shared.html", "#v=1&run=first&with=second&tab=samples")
    texts = page.get_by_role("region", name="code", exact=True).locator("pre")
    expect(texts).to_have_text([EVIL, "second 2"])
    picture = page.get_by_role("region", name="picture", exact=True).get_by_role("img")
    assert pixels(picture) == colours.tolist()
    table = page.get_by_role("region", name="table", exact=True)
    assert pixels(table.get_by_role("img")) == (255 - colours).tolist()
    expect(table.locator("tbody tr td:nth-child(2)")).to_have_text([EVIL])
    # In the colours of the list
    page.wait_for_function(
        """() => {
          const dots = [...document.querySelectorAll(".sample-run h3 .dot")].slice(0, 2);
          const colours = dots.map((dot) => getComputedStyle(dot).backgroundColor);
          return new Set([...colours, "rgba(0, 0, 0, 0)"]).size === 3;
        }"""
    )
    slider = page.get_by_role("slider", name="Step of code")
    slider.focus()
    page.keyboard.press("Home")
    expect(texts).to_have_text(["first 1"])
    page.keyboard.press("ArrowRight")
    expect(texts).to_have_text(["first 1", "second 2"])
    assert page.evaluate("() => window.evil") is None
    shot(page, "saved-samples")


def test_checkpoints_are_listed_and_nothing_is_offered_that_needs_the_run(
    tmp_path: Path, open_file: Any
) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path / "runs"), run_name="first")
    with ThreadPoolExecutor(1) as pool:
        # The browser's own event loop is in this thread.
        train = functools.partial(trainer.train, epochs=2, callbacks=[ModelCheckpoint()])
        pool.submit(train, tiny_loader(3), tiny_loader(2)).result()
    export_html([tmp_path / "runs" / "first"], tmp_path / "shared.html")
    page = open_file(tmp_path / "shared.html")
    page.get_by_role("tab", name="Checkpoints").click()
    rows = page.locator(".checkpoint-table tbody tr")
    reader = CheckpointReader(tmp_path / "runs" / "first")
    expect(rows.locator("th")).to_have_text([str(each.step) for each in reversed(reader.checkpoints())])
    expect(rows.first).to_contain_text("last")
    expect(page.locator(".checkpoints").get_by_role("button").locator("visible=true")).to_have_count(0)
    saved = "".join(each.decode(errors="replace") for each in blocks_of(tmp_path / "shared.html").values())
    assert str(tmp_path) not in saved and "first/checkpoints/" in saved


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1_280, 400])
def test_the_file_fits_a_screen(three: Path, open_file: Any, width: int, scheme: str) -> None:
    page = open_file(three, viewport={"width": width, "height": 800}, color_scheme=scheme)
    expect(chart(page, "loss")).to_contain_text("run-1")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    shot(page, f"saved-{width}-{scheme}")
