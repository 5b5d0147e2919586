"""engine/session/lifetime.py and outcome.py: what ends a run, and how that is told, without a run."""

import time

import anyio
import pytest

from offloop.engine.best import BestSoFar
from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.bus.event_bus import Bus
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.session.lifetime import HASTY_MOMENT, SWALLOWING, Lifetime
from offloop.engine.session.outcome import Outcome
from offloop.engine.training.progress import Progress
from offloop.engine.training.setup import Limits


def new_lifetime() -> tuple[Lifetime, Mailbox]:
    mailbox = Mailbox()
    return Lifetime(mailbox, Bus(run_id="run", attention=mailbox.poke)), mailbox


def outcome_of(lifetime: Lifetime, progress: Progress) -> Outcome:
    best = BestSoFar("val_loss", "min", is_named=False)
    limits, none = Limits(epochs=2), Evaluations(None)
    return Outcome("run", limits=limits, progress=progress, lifetime=lifetime, best=best, evaluations=none)


def test_first_failure_is_kept_and_cancels() -> None:
    lifetime, mailbox = new_lifetime()
    first = ValueError("first")
    lifetime.fail(first)
    lifetime.fail(ValueError("second"))
    assert lifetime.failure is first and lifetime.is_cancelled()
    assert mailbox.cancel_reason == "ValueError: first"
    assert lifetime.take_failure() is first and lifetime.take_failure() is None


def test_failure_after_train_end_changes_no_status_but_an_exit_is_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lifetime, _ = new_lifetime()
    lifetime.phase = "closing"
    lifetime.fail(ValueError("late"))
    assert lifetime.failure is None and not lifetime.is_cancelled()
    leaving = SystemExit(3)
    lifetime.fail(leaving)
    assert lifetime.failure is None and lifetime.take_failure() is leaving
    assert caplog.text.count("a callback failed after the end") == 2


def test_first_signal_stops_and_the_second_hurries() -> None:
    lifetime, mailbox = new_lifetime()
    lifetime.on_signal("SIGINT", 1)
    assert mailbox.attention and not lifetime.is_cancelled() and lifetime.swallowing == SWALLOWING
    lifetime.on_signal("SIGINT", 2)
    assert mailbox.cancel_reason == "SIGINT, twice"
    assert lifetime.is_in_haste() and lifetime.swallowing == HASTY_MOMENT


def test_second_signal_ends_a_blocking_wait_and_a_deadline_does() -> None:
    lifetime, _ = new_lifetime()
    assert lifetime.wait(lambda seconds: True)
    assert not lifetime.wait(lambda seconds: False, deadline=time.perf_counter())
    lifetime.hurry("now")
    assert not lifetime.wait(lambda seconds: False, haste=0.0)


@pytest.mark.anyio
async def test_wait_on_the_event_loop_ends_with_haste_but_not_before_its_least() -> None:
    lifetime, _ = new_lifetime()
    event = anyio.Event()
    far = time.perf_counter() + 60.0
    assert not await lifetime.wait_until(event, far, unless=lambda: True)
    lifetime.hurry("now")
    assert not await lifetime.wait_until(event, far)
    event.set()
    assert await lifetime.wait_until(event, 0.0)


def test_outcome_says_the_same_everywhere() -> None:
    lifetime, _ = new_lifetime()
    progress = Progress(epoch=2, step=6, latest={"val_loss": 1.0})
    outcome = outcome_of(lifetime, progress)
    assert outcome.status() == ("completed", "epochs=2")
    progress.ending, progress.reason, progress.stopped_by = "stopped", "enough", "EarlyStopping"
    assert outcome.status() == ("stopped", "enough")
    end, ending = outcome.train_end(), outcome.ending()
    assert (end.status, end.reason, end.error, dict(end.metrics)) == (
        "stopped",
        "enough",
        None,
        {"val_loss": 1.0},
    )
    assert (ending["status"], ending["stopped_by"], ending["steps"]) == ("stopped", "EarlyStopping", 6)
    lifetime.fail(ValueError("broken"))
    assert outcome.status() == ("failed", "ValueError: broken")
    assert outcome.train_end().error == "ValueError: broken" and "stopped_by" not in outcome.ending()
