"""EventTail follows a log that grows, is cut back, replaced, and holds junk: it gives what `read_events` gives."""

import logging
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.callbacks import ModelCheckpoint
from offloop.engine import EventTail, LogPlace, StepEnd, TrainStart, UnknownEvent, encode, read_attempts
from offloop.engine.catalog import tail as tail_module
from offloop.engine.events import Event
from offloop.engine.testing import tiny_loader, tiny_trainer


def line(step: int, *, time: float = 1.0) -> bytes:
    return encode(StepEnd(run_id="r", seq=step, step=step, time=time + step, lr=0.1, loss=0.5)) + b"\n"


def start(attempt: int = 0) -> bytes:
    return encode(TrainStart(run_id="r", seq=0, step=0, time=float(attempt), attempt=attempt)) + b"\n"


def everything(tail: EventTail, limit: int = 10_000) -> list[tuple[int, Event]]:
    found: list[tuple[int, Event]] = []
    while True:
        events = tail.read(limit)
        if tail.restarted:
            found.clear()
        found += events
        if not events:
            return found


def test_it_gives_what_was_appended_since_the_last_call(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    tail = EventTail(tmp_path)
    assert tail.read() == []
    log.write_bytes(start() + line(1))
    assert [type(event) for _, event in tail.read()] == [TrainStart, StepEnd]
    assert tail.read() == []
    with open(log, "ab") as file:
        file.write(line(2)[:20])
        file.flush()
        assert tail.read() == []
        file.write(line(2)[20:] + line(3))
    assert [event.step for _, event in tail.read()] == [2, 3]
    assert (tail.position, tail.skipped, tail.restarted) == (tail.size, 0, False)


def test_limit_bounds_what_one_call_returns(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(start() + b"".join(line(n) for n in range(1, 10)))
    tail = EventTail(tmp_path)
    assert [event.step for _, event in tail.read(4)] == [0, 1, 2, 3]
    assert tail.position < tail.size
    assert [event.step for _, event in tail.read(4)] == [4, 5, 6, 7]


def test_broken_lines_are_counted_and_unknown_events_pass(tmp_path: Path) -> None:
    unknown = b'{"type":"later.Event","seq":7,"step":3,"more":[1]}\n'
    content = start() + b"{broken\n" + b"\n" + b"[" * 5000 + b"\n" + unknown + b'"text"\n' + line(4)
    (tmp_path / "events.jsonl").write_bytes(content)
    tail = EventTail(tmp_path)
    events = [event for _, event in tail.read()]
    assert [event.step for event in events] == [0, 3, 4]
    assert isinstance(events[1], UnknownEvent) and events[1].raw == unknown.rstrip()
    assert tail.skipped == 4


def test_attempts_are_counted_as_read_attempts_does(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(start() + line(1) + line(2) + start(1) + line(3) + line(1) + start(5))
    assert everything(EventTail(tmp_path), 2) == list(read_attempts(log))


@given(limits=st.lists(st.integers(1, 5), min_size=1, max_size=9), junk=st.integers(0, 9))
@settings(max_examples=40)
def test_another_tail_continues_where_one_stood(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int], junk: int
) -> None:
    directory = tmp_path_factory.mktemp("run")
    lines = [start(), line(1), line(2), start(1), line(3), line(1), start(5), line(2), line(4)]
    lines.insert(junk, b"{broken\n")
    (directory / "events.jsonl").write_bytes(b"".join(lines))
    whole = EventTail(directory)
    expected = everything(whole)
    found, place = [], None
    for limit in [*limits, 100]:
        tail = EventTail(directory, place=place)
        found += tail.read(limit)
        assert not tail.restarted and tail.place is not None
        place = msgspec.json.decode(msgspec.json.encode(tail.place), type=LogPlace)
    assert found == expected
    assert place is not None and whole.place is not None
    assert (place.position, place.skipped) == (whole.place.position, whole.place.skipped)


@pytest.mark.parametrize("change", ["cut back", "another", "gone"])
def test_a_tail_that_continues_in_another_log_begins_again(tmp_path: Path, change: str) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(start() + line(1) + line(2))
    tail = EventTail(tmp_path)
    everything(tail)
    if change == "gone":
        log.unlink()
    else:
        log.write_bytes(start() + line(1) + (line(2, time=9.0) + line(3) if change == "another" else b""))
    later = EventTail(tmp_path, place=tail.place)
    events = [event.step for _, event in later.read()]
    assert later.restarted
    assert events == {"cut back": [0, 1], "another": [0, 1, 2, 3], "gone": []}[change]


@pytest.mark.parametrize("regrown", [0, 3, 500])
def test_a_log_that_was_cut_back_is_read_from_its_begin(tmp_path: Path, regrown: int) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(start() + b"".join(line(n) for n in range(1, 50)))
    tail = EventTail(tmp_path)
    tail.read()
    with open(log, "r+b") as file:
        file.truncate(len(start()) + len(line(1)))
        file.seek(0, 2)
        # As long as before or longer, and other content, as a resumed run writes it
        for n in range(2, regrown):
            file.write(line(n, time=2.0))
    assert [event for _, event in tail.read()] == [event for _, event in read_attempts(log)]
    assert tail.restarted
    tail.read()
    assert not tail.restarted


def test_a_log_that_was_replaced_is_read_from_its_begin(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(start() + line(1))
    tail = EventTail(tmp_path)
    tail.read()
    (tmp_path / "new").write_bytes(start() + line(1) + line(2))
    (tmp_path / "new").rename(log)
    assert len(tail.read()) == 3 and tail.restarted
    log.unlink()
    assert tail.read() == [] and tail.restarted
    log.write_bytes(start())
    assert len(tail.read()) == 1 and not tail.restarted


def test_a_directory_that_is_gone_is_an_error_and_may_come_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_bytes(start() + line(1))
    tail = EventTail(run)
    assert len(tail.read()) == 2
    run.rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        tail.read()
    (tmp_path / "other").rename(run)
    assert tail.read() == [] and not tail.restarted


def test_neither_links_nor_pipes_are_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(start())
    (tmp_path / "events.jsonl").symlink_to(secret)
    with pytest.raises(OSError, match="it is a link"):
        EventTail(tmp_path).read()
    (tmp_path / "events.jsonl").unlink()
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        EventTail(tmp_path).read()


def test_lines_above_the_limit_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "LONGEST_LINE", 5_000)
    monkeypatch.setattr(tail_module, "CHUNK", 1_000)
    log = tmp_path / "events.jsonl"
    long = b'{"type":"Event","text":"' + b"x" * 20_000 + b'"}\n'
    log.write_bytes(start() + long[:9_000])
    tail = EventTail(tmp_path)
    assert len(tail.read()) == 1 and tail.skipped == 0
    with open(log, "ab") as file:
        file.write(long[9_000:] + line(1))
    assert [event.step for _, event in tail.read()] == [1]
    assert tail.skipped == 1


def test_a_real_run_and_its_resumed_attempt(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="r")
    trainer.train(tiny_loader(), epochs=1, callbacks=[ModelCheckpoint()])
    tail = EventTail(tmp_path / "r")
    assert everything(tail) == list(read_attempts(tmp_path / "r"))
    again = tiny_trainer(run_dir=str(tmp_path), run_name="r")
    again.train(tiny_loader(), epochs=2, callbacks=[ModelCheckpoint()], resume="last")
    events = tail.read()
    # The checkpoint was announced, and the first run ended, after it was taken: these lines are cut off
    assert tail.restarted
    assert events == list(read_attempts(tmp_path / "r")) and events[-1][0] == 1
    assert everything(EventTail(tmp_path / "r"), 7) == list(read_attempts(tmp_path / "r"))


JUNK = st.sampled_from(
    [b"junk\n", b"\n", b'{"type":"x.Y","seq":3}\n', b"\xff\xfe\n", b'{"seq":1}\n', b"null\n"]
)
ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30)),
    st.tuples(st.just("junk"), JUNK),
    st.tuples(st.just("half"), st.integers(1, 60)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("resume"), st.floats(0, 1)),
    st.tuples(st.just("replace"), st.integers(0, 5)),
    st.tuples(st.just("delete"), st.none()),
    st.tuples(st.just("read"), st.integers(1, 40)),
)


@settings(max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=25))
def test_whatever_happens_to_the_log_it_gives_what_read_attempts_gives(
    actions: list[tuple[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    logging.getLogger("offloop").disabled = True
    directory = tmp_path_factory.mktemp("run")
    log = directory / "events.jsonl"
    tail, found = EventTail(directory), list[tuple[int, Event]]()
    step, attempt, clock = 0, 0, 0.0
    try:
        for what, value in actions:
            clock += 1000.0
            before = log.read_bytes() if log.exists() else b""
            whole = before[: before.rfind(b"\n") + 1]
            if what == "append":
                assert isinstance(value, int)
                with open(log, "ab") as file:
                    # A writer removes its half line first
                    file.truncate(len(whole))
                    file.write(b"".join(line(step + each, time=clock) for each in range(1, value + 1)))
                step += value
            elif what == "junk":
                assert isinstance(value, bytes)
                with open(log, "ab") as file:
                    file.write(value)
            elif what == "half":
                assert isinstance(value, int)
                with open(log, "ab") as file:
                    file.write(line(step + 1, time=clock)[:value])
            elif what in ("cut", "resume") and log.exists():
                assert isinstance(value, float)
                lines = whole.splitlines(keepends=True)
                kept = b"".join(lines[: int(len(lines) * value)])
                attempt += what == "resume"
                step = len(lines) // 2
                with open(log, "r+b") as file:
                    file.truncate(len(kept))
                    file.seek(0, 2)
                    if what == "resume":
                        file.write(encode(TrainStart(seq=0, step=step, time=clock, attempt=attempt)) + b"\n")
            elif what == "replace":
                assert isinstance(value, int)
                (directory / "new").write_bytes(b"".join(line(each, time=clock) for each in range(value)))
                (directory / "new").rename(log)
            elif what == "delete":
                log.unlink(missing_ok=True)
            elif what == "read":
                assert isinstance(value, int)
                events = tail.read(value)
                if tail.restarted:
                    found.clear()
                found += events
        while True:
            events = tail.read(7)
            if tail.restarted:
                found.clear()
            found += events
            if not events:
                break
        expected = []
        if log.exists():
            content = log.read_bytes()
            (directory / "whole.jsonl").write_bytes(content[: content.rfind(b"\n") + 1])
            expected = list(read_attempts(directory / "whole.jsonl"))
        assert found == expected
    finally:
        logging.getLogger("offloop").disabled = False
