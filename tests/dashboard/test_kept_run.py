"""dashboard/runs/kept_run.py: a long log is read once, and the page shows the same the next time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from histories import content_of

from offloop.callbacks import Alert
from offloop.dashboard.curves import column_file
from offloop.dashboard.runs import run_reader
from offloop.dashboard.runs.followed_run import FollowedRun, take_in
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.run_reader import RunReader
from offloop.engine import (
    EpochStart,
    Event,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    ValidationEnd,
    encode,
    read_run,
)
from offloop.engine.events import Metrics


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in which short logs are kept, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run_reader, "LEAST_LOG", 1)
    return tmp_path / "cache" / "offloop"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "one"
    directory.mkdir(parents=True)
    return directory


def event(kind: type[Event], seq: int, step: int, **fields: Any) -> Event:
    return kind(run_id="one", seq=seq, step=step, epoch=step // 100, time=1000.0 + seq, **fields)


def events_from(first: int, count: int, *, attempt: int = 0) -> list[Event]:
    """Return what an attempt says from a step on."""
    events = [event(TrainStart, 0, first, attempt=attempt, epochs=9, batches_per_epoch=100)]
    for step in range(first, first + count):
        if step % 100 == 0:
            events.append(event(EpochStart, len(events), step))
        metrics = Metrics({"accuracy": step / 7})
        # A gap, a loss that is none, and a figure that comes later
        if step % 37:
            loss = float("nan") if step == first + 5 else 1 / (1 + step)
            events.append(
                event(
                    StepEnd,
                    len(events),
                    step + 1,
                    loss=loss,
                    lr=0.1,
                    grad_norm=2.0 if step > first + 50 else None,
                    metrics=metrics,
                    samples=4,
                )
            )
        if step % 50 == 49:
            events.append(
                event(ValidationEnd, len(events), step + 1, metrics=Metrics({"val_loss": 1 / (1 + step)}))
            )
            events.append(event(Alert, len(events), step + 1, rule="r", message="text", metric="loss"))
    return events


def write(directory: Path, events: Sequence[Event], *, mode: str = "ab") -> None:
    with open(directory / "events.jsonl", mode) as file:
        file.writelines(encode(each) + b"\n" for each in events)


def reader_of(directory: Path) -> RunReader:
    return RunReader(read_run(directory), history_bytes=64_000_000, milestone_bytes=64_000_000)


def shown(live: LiveRun) -> tuple[object, ...]:
    """Return all that viewers can see of a run."""
    # Without what depends on the time of the look.
    status = msgspec.structs.replace(live.status(viewers=0, is_control=True), seconds=0.0, time_left=None)
    milestones = [bytes(each) for each in live.milestones.events()]
    return (
        content_of(live.history),
        live.series,
        milestones,
        live.milestones.dropped,
        status,
        live.latest(),
        live.info,
    )


def as_if_new(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Return what viewers see if nothing was kept."""
    with monkeypatch.context() as patched:
        patched.setattr(run_reader, "find_run", lambda *_, **__: None)
        reader = reader_of(directory)
        reader.coarse()
        return shown(reader.fill())


@pytest.mark.parametrize("more", [0, 80])
@pytest.mark.parametrize("ends", [False, True])
def test_what_was_read_is_there_the_next_time(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, more: int, ends: bool
) -> None:
    write(directory, events_from(0, 230))
    expected = as_if_new(directory, monkeypatch)
    assert len(list(cache.iterdir())) == 1
    if more:
        write(directory, events_from(180, more, attempt=1))
    if ends:
        write(directory, [event(TrainEnd, 9999, 400, status="completed", seconds=3.0)])
    if more or ends:
        expected = as_if_new(directory, monkeypatch)
    reader = reader_of(directory)
    assert reader.coarse() is None
    seen: list[Event] = []
    monkeypatch.setattr(run_reader, "take_in", noting(seen))
    live = reader.fill()
    assert shown(live) == expected
    # What was read then was not read again.
    assert not any(each.step < 180 for each in seen)


def noting(seen: list[Event]) -> Any:
    def noted(source: Any, live: Any, events: Sequence[Event], *more: Any) -> Any:
        seen.extend(events)
        return take_in(source, live, events, *more)

    return noted


@pytest.mark.parametrize("change", ["cut back", "another", "broken file", "another version"])
def test_what_was_kept_of_something_else_is_read_anew(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    write(directory, events_from(0, 230))
    reader_of(directory).fill()
    (kept,) = cache.iterdir()
    if change == "cut back":
        os.truncate(directory / "events.jsonl", 9000)
        write(directory, events_from(30, 200, attempt=1))
    elif change == "another":
        write(directory, events_from(3, 230), mode="wb")
    elif change == "broken file":
        kept.write_bytes(kept.read_bytes()[:-9])
    else:
        found = column_file.find(kept, limit=64_000_000)
        assert found is not None
        column_file.keep(kept, found.history, found.layers, b'{"later": 1}')
    reader = reader_of(directory)
    reader.coarse()
    live = reader.fill()
    assert shown(live) == as_if_new(directory, monkeypatch)


def test_a_run_that_grows_is_kept_again_when_it_has_grown_enough(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(directory, events_from(0, 230))
    reader = reader_of(directory)
    reader.coarse()
    live = reader.fill()
    source = live.source
    assert isinstance(source, FollowedRun)
    (kept,) = cache.iterdir()
    sizes = [kept.stat().st_size]
    for first, count in ((230, 10), (240, 200)):
        write(directory, events_from(first, count, attempt=first))
        for _ in range(2):
            news = reader.news(live, with_record=False)
            take_in(source, live, news.events, news.written, news.before)
        sizes.append(kept.stat().st_size)
    assert sizes[0] == sizes[1] < sizes[2]
    again = reader_of(directory)
    again.coarse()
    assert shown(again.fill()) == as_if_new(directory, monkeypatch)


def test_what_cannot_be_kept_is_shown_all_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "file"))
    write(directory, events_from(0, 230))
    with caplog.at_level("INFO", "offloop"):
        live = reader_of(directory).fill()
    assert len(live.series) == 5
    assert "were not kept" in caplog.text


def test_events_of_an_unknown_type_are_kept_as_they_are(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        directory,
        [
            *events_from(0, 30),
            UnknownEvent(type="later.Event", raw=b'{"type":"later.Event","seq":40,"more":[1]}'),
        ],
    )
    expected = as_if_new(directory, monkeypatch)
    reader = reader_of(directory)
    assert reader.coarse() is None
    assert shown(reader.fill()) == expected
