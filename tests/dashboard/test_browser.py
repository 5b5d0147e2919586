"""The live page in a real browser, over a real socket, with a real run behind it.

Screenshots of the page's states go to the directory that OFFLOOP_SCREENSHOTS names, for people to look at.
"""

import contextlib
import csv
import json
import math
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from socket_viewer import await_on_loop
from warm_python import ScriptProcess, WarmPython

from offloop.dashboard import callback
from offloop.dashboard.runs import live_run, run_source
from offloop.dashboard.serving.page import Page as BuiltPage
from offloop.engine import Metrics, Sample

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
pytest.importorskip("axe_playwright_python", reason="tests in a browser need offloop[browser]")
from axe_playwright_python.sync_playwright import Axe
from live_page import (
    OpenPage,
    Training,
    acks,
    button,
    chart,
    figure,
    give,
    look_at_the_network,
    options,
    shot,
    table_of,
    wait_until_accepted,
    word,
)
from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


# Charts --------------------------------------------------------------------------------------------


def test_charts_show_the_true_values(started: tuple[Training, Page]) -> None:
    _, page = started
    shown = table_of(page, "loss")
    assert [float(shown[str(step)][0]) for step in range(1, 11)] == pytest.approx(
        [1 / step for step in range(1, 11)], rel=1e-3
    )


def test_train_and_validation_stand_in_one_panel(started: tuple[Training, Page]) -> None:
    run, page = started
    give(page, "Validate")
    run.step(loss=0.5)
    expect(chart(page, "loss").get_by_role("button", name=re.compile("^val"))).to_contain_text("0.25")
    assert "0.2500" in table_of(page, "loss")["11"]


def test_the_file_has_every_point_and_names_that_are_no_formulas(started: tuple[Training, Page]) -> None:
    run, page = started
    for number in range(3_000):
        run.step(loss=number / 7, **{"=1+1": number})
    expect(figure(page, "Step")).to_contain_text(re.compile("3.?010"))
    with page.expect_download() as download:
        options(page, "loss").get_by_role("button", name="CSV").click()
    lines = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    values = {float(line["step"]): float(line["loss"]) for line in lines if line.get("loss")}
    assert len(values) == 3_010
    for number in (0, 1, 1_500, 2_999):
        assert values[number + 11] == pytest.approx(number / 7, rel=1e-6)  # the loss is float32
    with page.expect_download() as download:
        options(page, "=1+1").get_by_role("button", name="CSV").click()
    assert "'=1+1" in Path(download.value.path()).read_text().splitlines()[0]


def test_a_zoom_stays_while_the_run_goes_on(started: tuple[Training, Page]) -> None:
    run, page = started
    plot = chart(page, "loss").locator("canvas").first
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('zoom=')")
    zoomed = page.evaluate("() => location.hash")
    for _ in range(50):
        run.step(loss=0.1)
    expect(figure(page, "Step")).to_contain_text("60")
    assert page.evaluate("() => location.hash") == zoomed
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("() => !location.hash.includes('zoom=')")


def test_the_address_shows_the_same_view_again(started: tuple[Training, Page], open_page: OpenPage) -> None:
    run, page = started
    page.get_by_role("button", name="Epoch", exact=True).click()
    page.get_by_role("button", name="log y").click()
    page.wait_for_function("() => location.hash.includes('x=epoch')")
    other = open_page(run.dashboard.url)
    expect(word(other)).to_have_text("live")
    other.goto("about:blank")
    other.goto(page.url)
    expect(other.get_by_role("button", name="Epoch", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(other.get_by_role("button", name="log y")).to_have_attribute("aria-pressed", "true")


def test_what_is_not_finite_is_marked(started: tuple[Training, Page]) -> None:
    run, page = started
    for value in (1.0, math.nan, math.inf, 2.0):
        run.step(loss=0.5, odd=value)
    expect(chart(page, "odd")).to_be_visible()
    expect(chart(page, "odd")).to_contain_text(re.compile("not finite|NaN", re.IGNORECASE))
    shot(page, "not-finite")


def test_a_metric_that_is_named_like_markup_is_text(started: tuple[Training, Page]) -> None:
    run, page = started
    name = "<img src=x onerror=document.title='broken'>"
    run.step(loss=0.5, **{name: 1.0})
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    assert page.locator("img").count() == 0
    assert "broken" not in page.title()


def test_search_leaves_the_panels_that_are_meant(started: tuple[Training, Page]) -> None:
    _, page = started
    page.get_by_label("Search metrics").fill("lr")
    expect(chart(page, "lr")).to_be_visible()
    expect(chart(page, "loss")).to_be_hidden()


# Control -------------------------------------------------------------------------------------------


def test_pause_and_resume_take_effect_and_are_acknowledged(started: tuple[Training, Page]) -> None:
    run, page = started
    give(page, "Pause")
    run.step(loss=0.5)
    expect(word(page)).to_have_text("paused")
    expect(acks(page)).to_contain_text(re.compile("at step 11"))
    assert run.run.state == "paused"
    expect(page.locator(".state-detail")).to_contain_text("viewer 127.0.0.1")
    shot(page, "paused")
    button(page, "Resume").click()
    expect(word(page)).to_have_text("live")
    assert run.run.state == "running"


def test_the_learning_rate_is_set_and_a_great_leap_asks_twice(started: tuple[Training, Page]) -> None:
    run, page = started
    button(page, "Learning rate").click()
    dialog = page.get_by_role("dialog", name="Learning rate")
    dialog.get_by_label("New value").fill("-1")
    expect(dialog.get_by_role("alert")).not_to_be_empty()
    dialog.get_by_label("New value").fill("5")
    dialog.get_by_role("button", name="Set").click()
    expect(dialog).to_be_visible()  # fifty times as much: it asks
    shot(page, "learning-rate")
    dialog.get_by_label("New value").fill("0.05")
    dialog.get_by_role("button", name="Set").click()
    expect(dialog).to_be_hidden()
    wait_until_accepted(page)
    run.step(loss=0.5)
    expect(acks(page)).to_contain_text("at step 11")
    run.step(loss=0.5)
    expect(figure(page, "Learning rate")).to_contain_text("0.05")
    assert next(iter(run.trainer.optimizers.values())).param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_checkpoint_is_saved(started: tuple[Training, Page]) -> None:
    run, page = started
    give(page, "Checkpoint")
    run.step(loss=0.5)
    expect(acks(page)).to_contain_text("at step 11")
    assert run.run.dir is not None and list((run.run.dir / "checkpoints").iterdir())


def test_stop_asks_first_and_saves_a_checkpoint(started: tuple[Training, Page]) -> None:
    run, page = started
    button(page, "Stop").click()
    dialog = page.get_by_role("dialog")
    shot(page, "stop-asks")
    dialog.get_by_role("button", name="Keep training").click()
    expect(dialog).to_be_hidden()
    run.step(loss=0.5)
    expect(figure(page, "Step")).to_contain_text("11")
    button(page, "Stop").click()
    dialog.get_by_role("button", name="Stop training").click()
    wait_until_accepted(page)
    run.trainer.before_epoch_ends.clear()
    run.step(loss=0.5)
    expect(word(page)).to_have_text("stopping")
    shot(page, "stopping")
    run.free()
    run.wait_for_end()
    expect(word(page)).to_have_text("stopped")
    shot(page, "stopped")
    assert run.run.result.status == "stopped"
    assert run.run.dir is not None and list((run.run.dir / "checkpoints").iterdir())


def test_a_button_that_may_not_be_used_says_why(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training().begin()
    run.step(loss=1.0)
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    expect(button(page, "Checkpoint")).to_have_attribute("aria-disabled", "true")
    expect(button(page, "Checkpoint")).to_have_attribute("title", re.compile("no directory"))


def test_who_only_reads_sees_everything_and_can_do_nothing(
    started: tuple[Training, Page], open_page: OpenPage
) -> None:
    run, _ = started
    page = open_page(run.dashboard.read_only_url)
    expect(page.get_by_text("read-only")).to_be_visible()
    expect(chart(page, "loss")).to_be_visible()
    assert len(table_of(page, "loss")) == 10
    for name in ("Pause", "Checkpoint", "Validate", "Learning rate", "Stop"):
        expect(button(page, name)).to_have_attribute("aria-disabled", "true")
    shot(page, "read-only")


# States --------------------------------------------------------------------------------------------


def test_from_no_run_to_completed(
    training: Callable[..., Training], open_page: OpenPage, tmp_path: Path
) -> None:
    run = training(tmp_path, max_steps=5)
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("no run yet")
    line = page.locator(".stage code")
    expect(line).to_contain_text("callbacks=[Dashboard()]")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".stage").get_by_role("button", name="Copy").click()
    expect(page.locator(".stage").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == line.inner_text()
    shot(page, "no-run-yet")
    run.begin()
    expect(word(page)).to_have_text("waiting for the first step")
    shot(page, "waiting")
    run.step(loss=1.0)
    expect(word(page)).to_have_text("live")
    shot(page, "live")
    for _ in range(4):
        run.step(loss=0.5)
    expect(word(page)).to_have_text("completed")
    assert "completed" in page.title()
    shot(page, "completed")


def test_validating(started: tuple[Training, Page]) -> None:
    run, page = started
    run.trainer.before_validation_ends.clear()
    give(page, "Validate")
    run.step(loss=0.5)
    expect(word(page)).to_have_text("validating")
    shot(page, "validating")
    run.trainer.before_validation_ends.set()
    expect(word(page)).to_have_text("live")


def test_writing_a_checkpoint(started: tuple[Training, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    run, page = started
    gate, fsync = threading.Event(), os.fsync

    def slow_disk(descriptor: int) -> None:
        gate.wait()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_disk)
    try:
        give(page, "Checkpoint")
        run.step(loss=0.5)
        expect(page.get_by_text("writing a checkpoint")).to_be_visible()
        shot(page, "writing-a-checkpoint")
    finally:
        gate.set()
    expect(page.get_by_text("writing a checkpoint")).to_be_hidden()


def test_failed_shows_the_traceback_to_the_control_role_only(
    started: tuple[Training, Page], open_page: OpenPage
) -> None:
    run, page = started
    reader = open_page(run.dashboard.read_only_url)
    expect(word(reader)).to_have_text("live")
    run.trainer.steps.put(ValueError("the data set is cursed"))
    run.wait_for_end()
    expect(word(page)).to_have_text("failed")
    expect(page.get_by_text("the data set is cursed").first).to_be_visible()
    page.get_by_text("Traceback", exact=True).click()
    expect(page.locator("pre", has_text="in training_step")).to_be_visible()
    shot(page, "failed")
    expect(word(reader)).to_have_text("failed")
    assert reader.locator("pre", has_text="in training_step").count() == 0
    assert isinstance(run.error, ValueError)


def test_stalled_says_where_training_hangs(
    started: tuple[Training, Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = started
    monkeypatch.setattr(live_run, "STALL", 0.01)
    monkeypatch.setattr(live_run, "STALL_STEPS", 0)
    expect(word(page)).to_have_text("stalled")
    expect(page.get_by_text("live_page.py").first).to_be_visible()
    shot(page, "stalled")
    monkeypatch.undo()
    run.step(loss=0.5)
    expect(word(page)).to_have_text("live")


def test_lagging_and_the_server_that_answers_again(started: tuple[Training, Page]) -> None:
    run, page = started
    gate = threading.Event()
    run.server._post(gate.wait)  # whatever holds the server's event loop
    look_at_the_network(page)  # it asks at once, and not within the next five seconds
    try:
        expect(word(page)).to_have_text("lagging")
        shot(page, "lagging")
    finally:
        gate.set()
    await_on_loop(run.server, lambda: True)
    look_at_the_network(page)
    expect(word(page)).to_have_text("live")


def test_samples_that_were_dropped_are_a_gap(
    training: Callable[..., Training], open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "SAMPLES_HELD", 10)
    run = training().begin()
    run.step(loss=1.0)
    page = open_page(run.dashboard.url)
    expect(figure(page, "Step")).to_contain_text("1")
    expect(word(page)).to_have_text("live")
    gate = threading.Event()
    run.server._post(gate.wait)
    for _ in range(200):
        run.step(loss=0.5)
    run.drops.seen.wait()
    gate.set()
    expect(page.get_by_text("samples were dropped.")).to_be_visible()
    shot(page, "samples-dropped")


class Wide(Sample, frozen=True, kw_only=True):
    values: Metrics


def test_a_trimmed_history_is_said(training: Callable[..., Training], open_page: OpenPage) -> None:
    run = training(history_bytes=1_000_000).begin()
    run.step(loss=1.0)
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    for number in range(6_000):
        run.run.publish(Wide(values=Metrics({f"m{place}": float(number) for place in range(20)})))
    expect(page.get_by_text("The history is trimmed.")).to_be_visible()
    shot(page, "history-trimmed")


def test_not_authorised_too_many_viewers_and_an_older_page(
    training: Callable[..., Training], open_page: OpenPage
) -> None:
    run = training(max_viewers=1).begin()
    run.step(loss=1.0)
    stranger = open_page(run.dashboard.url.partition("?")[0])
    expect(word(stranger)).to_have_text("not authorised")
    shot(stranger, "not-authorised")
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    crowd = open_page(run.dashboard.url)
    expect(word(crowd)).to_have_text("too many viewers")
    shot(crowd, "too-many-viewers")
    page.close()
    await_on_loop(run.server, lambda: not any(each.role for each in run.server._requests.peers))
    # Every five seconds it does so by itself: dashboard/web/tests/connection.test.ts
    look_at_the_network(crowd)
    run.step(loss=1.0)  # ten seconds after a step the run counts as stalled
    expect(word(crowd)).to_have_text("live")
    run.server.hub.page = "another"
    crowd.reload()
    expect(crowd.get_by_text("This page is older than its server.")).to_be_visible()
    shot(crowd, "page-older-than-server")


def test_a_page_that_was_not_built_says_how_to_get_it(
    training: Callable[..., Training], open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuiltPage, "load", lambda: None)
    run = training()
    page = open_page(run.dashboard.url)
    expect(page.get_by_text("make page")).to_be_visible()
    shot(page, "page-not-built")


# The server goes and comes back ----------------------------------------------------------------------


@pytest.fixture
def serve(warm_python: WarmPython, tmp_path: Path) -> Callable[[int, str], ScriptProcess]:
    """Start a process that trains without end and shows it at a port, under a name; leaving it kills it."""

    def serve(port: int, run_name: str) -> ScriptProcess:
        script = Path(__file__).parent / "viewers" / "serve_a_run.py"
        return warm_python.start(script, str(port), run_name, str(tmp_path))

    return serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_tab_left_open_finds_the_next_run_after_a_kill(
    open_page: OpenPage, serve: Callable[[int, str], ScriptProcess]
) -> None:
    port = free_port()
    with serve(port, "first") as first:
        page = open_page(first.stdout.readline().strip())
        expect(word(page)).to_have_text("live")
        expect(chart(page, "loss")).to_be_visible()
    expect(word(page)).to_have_text(re.compile("reconnecting|server gone"))
    shot(page, "reconnecting")
    expect(word(page)).to_have_text("server gone")
    expect(chart(page, "loss")).to_be_visible()  # it keeps what it holds
    shot(page, "server-gone")
    with serve(port, "second"):
        expect(page.get_by_role("heading", name="second")).to_be_visible()
        expect(word(page)).to_have_text("live")
        expect(chart(page, "loss")).to_be_visible()


# How it looks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 768, 1920])
def test_it_fits_every_width_and_nothing_serious_hinders_anybody(
    training: Callable[..., Training], open_page: OpenPage, width: int
) -> None:
    run = training().begin()
    for number in range(1, 30):
        run.step(loss=1 / number, accuracy=1 - 1 / number)
    page = open_page(
        run.dashboard.url,
        viewport={"width": width, "height": 900},
        has_touch=width == 320,
        bypass_csp=True,  # axe brings a script along; every other test has the policy
    )
    expect(word(page)).to_have_text("live")
    expect(chart(page, "accuracy")).to_be_visible()
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        for tab in ("Events", "Configuration", "Metrics"):
            page.get_by_role("tab", name=tab).click()
            is_narrow = page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            assert is_narrow, f"{tab} is too wide"
            found = Axe().run(page)
            impacts = [each["impact"] for each in found.response["violations"]]
            assert not {"serious", "critical"} & set(impacts), found.generate_report()
        shot(page, f"{scheme}-{width}")


GROUND_IS_THE_PANELS = """() => [...document.querySelectorAll(".chart")].every((figure) => {
  const canvas = figure.querySelector("canvas");
  const ground = canvas.getContext("2d").getImageData(1, 1, 1, 1).data.slice(0, 3).join(", ");
  return getComputedStyle(figure).backgroundColor === `rgb(${ground})`;
})"""


def test_charts_stand_on_the_ground_of_their_panels_in_both_themes(started: tuple[Training, Page]) -> None:
    _, page = started
    for theme in ("dark", "light"):
        page.keyboard.press("t")
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        expect(chart(page, "loss")).to_be_visible()
        page.wait_for_function(GROUND_IS_THE_PANELS)
        shot(page, f"theme-{theme}")


def test_a_chart_is_read_out_by_keys(started: tuple[Training, Page]) -> None:
    _, page = started
    # Before there is a point, there is nowhere to go.
    expect(chart(page, "loss").locator(".curve-value").first).to_have_text("0.1000")
    cursor = chart(page, "loss").get_by_role("slider")
    cursor.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(cursor).to_have_attribute("aria-valuetext", re.compile("step"))


def test_question_mark_lists_the_keys(started: tuple[Training, Page]) -> None:
    _, page = started
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    shot(page, "keys")


def test_header_tells_how_many_ranks_train(
    training: Callable[..., Training], open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = run_source.ProcessRun.describe
    monkeypatch.setattr(
        run_source.ProcessRun,
        "describe",
        lambda *arguments: msgspec.structs.replace(describe(*arguments), world_size=4),
    )
    run = training().begin()
    run.step(loss=0.5)
    page = open_page(run.dashboard.url)
    expect(page.locator(".about")).to_contain_text("4 ranks")
    page.get_by_role("tab", name="Configuration").click()
    expect(page.get_by_role("tabpanel", name="Configuration")).to_contain_text(re.compile("ranks *4"))
    shot(page, "ranks")


def test_header_of_one_process_says_nothing_of_ranks(started: tuple[Training, Page]) -> None:
    _, page = started
    expect(page.locator(".about")).to_contain_text("cpu")
    expect(page.locator(".fact-ranks")).to_have_count(0)


def test_events_and_configuration_are_there_and_secrets_are_not(started: tuple[Training, Page]) -> None:
    run, page = started
    give(page, "Pause")
    run.step(loss=0.5)
    expect(word(page)).to_have_text("paused")
    page.get_by_role("tab", name="Events").click()
    log = page.get_by_role("tabpanel", name="Events")
    expect(log).to_contain_text("pause")
    expect(log).to_contain_text("viewer 127.0.0.1")
    shot(page, "events")
    page.get_by_role("tab", name="Configuration").click()
    expect(page.get_by_role("tabpanel", name="Configuration")).to_contain_text("gradient_clip_val")
    shot(page, "configuration")


def test_nothing_is_asked_of_anybody_but_its_server(
    training: Callable[..., Training], browser: Browser
) -> None:
    run = training().begin()
    run.step(loss=1.0)
    asked: list[str] = []
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(run.dashboard.url)
        expect(word(page)).to_have_text("live")
    own = run.dashboard.url.partition("?")[0]
    assert asked and not [url for url in asked if not url.startswith((own, "blob:"))]


def test_who_shows_curves_says_of_which_run(training: Callable[..., Training], browser: Browser) -> None:
    """Their ids would be those of others, should the server go on to another run meanwhile."""
    run = training().begin()
    run.step(loss=1.0)
    said: list[Any] = []
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.on(
            "websocket", lambda socket: socket.on("framesent", lambda text: said.append(json.loads(text)))
        )
        page.goto(run.dashboard.url)
        expect(page.locator("canvas")).to_have_count(2)
    assert {message["run"] for message in said if message["type"] == "show"} == {run.run.id}
