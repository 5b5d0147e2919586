"""A replayed run on the live page, in a real browser: it grows as recorded, and is paused and resumed there."""

import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="tests in a browser need offloop[browser]")
from live_page import OpenPage, button, chart, figure, shot, table_of, word
from playwright.sync_api import Page, expect
from run_files import events_of, write_run

from offloop import Dashboard, Replay, ReplayResult, StepEnd
from offloop.engine import EpochEnd, Event, TrainEnd, read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STEPS = 300
LONG = 60.0


class Replaying:
    """A replay in a thread, with its page."""

    def __init__(self, run: Path, *, speed: float | None) -> None:
        self.dashboard = Dashboard(port=0, quiet=True)
        self.control = Replay(run, callbacks=[self.dashboard], speed=speed, paused=True)
        self.results: list[ReplayResult] = []
        self.thread = threading.Thread(target=lambda: self.results.append(self.control.run()))

    def __enter__(self) -> "Replaying":
        self.dashboard.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.control.stop()
        self.thread.join()
        self.dashboard.__exit__(None, None, None)

    def advance(self, until: type[Event] = Event) -> Event:
        event = self.control.advance_nowait(until).result(LONG)
        assert event is not None
        return event

    def finish(self) -> ReplayResult:
        self.thread.join(LONG)
        return self.results[0]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run of 300 steps, one in a second."""
    events = events_of(STEPS)
    write_run(tmp_path / "recorded", events)
    return tmp_path / "recorded"


@pytest.fixture
def replaying(recorded: Path) -> Iterator[Replaying]:
    with Replaying(recorded, speed=1.0) as replaying:
        yield replaying


def expect_step(page: Page, step: int) -> None:
    expect(figure(page, "Step")).to_contain_text(re.compile(rf"Step{step}\b"))


def test_the_page_grows_pauses_steps_resumes_and_ends_with_the_values_of_the_log(
    replaying: Replaying, recorded: Path, open_page: OpenPage
) -> None:
    control = replaying.control
    for _ in range(3):
        replaying.advance(StepEnd)
    page = open_page(replaying.dashboard.url, viewport={"width": 1440, "height": 900})
    expect(word(page)).to_have_text("paused")
    expect(page.locator(".state-detail")).to_contain_text("a replay at 1x")
    expect_step(page, 3)
    expect(chart(page, "loss").locator("canvas")).to_be_visible()
    # What trains nothing takes no such commands
    for name in ("Validate", "Checkpoint", "Learning rate"):
        expect(button(page, name)).to_have_attribute("aria-disabled", "true")
        expect(button(page, name)).to_have_attribute("title", re.compile("replay, which trains nothing"))
    # It goes on
    control.speed = 20.0
    button(page, "Resume").click()
    expect(word(page)).not_to_have_text("paused")
    page.wait_for_function(
        "() => Number(document.querySelector('.figure-step').textContent.match(/\\d+/)[0]) > 5"
    )
    button(page, "Pause").click()
    expect(word(page)).to_have_text("paused")
    last = control.event
    assert last is not None and 5 < last.step < STEPS and control.is_paused
    expect_step(page, last.step)
    shot(page, "replay-paused")
    # A single step goes one further
    step = replaying.advance(StepEnd)
    assert step.step == last.step + 1
    expect_step(page, step.step)
    control.speed = None
    button(page, "Resume").click()
    result = replaying.finish()
    assert result.is_complete
    end = list(read_events(recorded))[-1]
    assert isinstance(end, TrainEnd)
    expect(word(page)).to_have_text(end.status)
    losses = {event.step: event.loss for event in read_events(recorded) if isinstance(event, StepEnd)}
    expect_step(page, STEPS)
    shown = table_of(page, "loss")
    numbers = {int(re.sub(r"\D", "", x)): float(values[0]) for x, values in shown.items() if values[0]}
    assert len(numbers) > 10 and numbers.keys() <= losses.keys()
    for at, value in numbers.items():
        loss = losses[at]
        assert loss is not None and math.isclose(value, loss, rel_tol=1e-3)
    shot(page, "replay-completed")


def test_stop_on_the_page_ends_the_replay(replaying: Replaying, open_page: OpenPage) -> None:
    replaying.advance(StepEnd)
    page = open_page(replaying.dashboard.url)
    expect(word(page)).to_have_text("paused")
    button(page, "Stop").click()
    page.get_by_role("dialog").get_by_role("button", name=re.compile("Stop")).click()
    expect(word(page)).to_have_text("stopped")
    result = replaying.finish()
    assert not result.is_complete and result.commands == ()
    assert not [event for event in result.published if isinstance(event, EpochEnd)]


def test_the_page_goes_on_to_the_next_attempt(tmp_path: Path, open_page: OpenPage) -> None:
    attempts = [*events_of(10, end=None), *events_of(20, attempt=1, first=11)]
    write_run(tmp_path / "resumed", attempts)
    with Replaying(tmp_path / "resumed", speed=None) as replaying:
        replaying.advance(StepEnd)
        page = open_page(replaying.dashboard.url)
        expect(word(page)).to_have_text("paused")
        expect_step(page, 1)
        button(page, "Resume").click()
        assert replaying.finish().is_complete
        expect(word(page)).to_have_text("completed")
        expect_step(page, 30)


def test_the_page_says_that_a_log_ends_without_its_end(tmp_path: Path, open_page: OpenPage) -> None:
    write_run(tmp_path / "killed", events_of(10, end=None))
    with Replaying(tmp_path / "killed", speed=None) as replaying:
        replaying.advance(StepEnd)
        page = open_page(replaying.dashboard.url)
        button(page, "Resume").click()
        replaying.finish()
        expect(word(page)).to_have_text("lost")
        expect(page.locator(".state-detail")).to_contain_text("a replay: the log of this attempt ends here")
        expect_step(page, 10)
