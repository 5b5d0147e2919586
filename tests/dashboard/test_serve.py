"""`offloop serve`, and runs of other processes in the list of a run's page: real directories, processes and sockets."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_link import PageModel
from run_files import events_of, lines_of, step, trainer_process, write_run
from socket_viewer import PATIENCE, SocketViewer, await_on_loop, on_loop

from offloop.callbacks import ModelCheckpoint
from offloop.dashboard import Dashboard
from offloop.dashboard.options import Options
from offloop.dashboard.protocol.from_viewer import (
    CommandRequest,
    Edit,
    EditCheckpoint,
    ListCheckpoints,
    ListRuns,
    Overlay,
    Show,
    Watch,
)
from offloop.dashboard.runs import followed_runs, run_reader
from offloop.dashboard.runs.directories import Directories
from offloop.dashboard.serving.server import Server
from offloop.engine import read_run
from offloop.engine.checkpoint import CheckpointReader
from offloop.engine.testing import tiny_loader, tiny_trainer

Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve a directory of runs."""
    servers = []

    def serve(runs_dir: Path = tmp_path, **options: Any) -> Server:
        servers.append(Server(Options(port=0, **options), runs_dir))
        return servers[-1]

    yield serve
    for server in servers:
        server.close("the test is over")


def losses(viewer: SocketViewer) -> list[float]:
    """Return the losses that a viewer has been sent, in order."""
    ids = [id for id, key in viewer.page.series.items() if key == "loss"]
    return [value for _, value in sorted(viewer.page.points.get(ids[0], {}).items())] if ids else []


def wait_for_losses(viewer: SocketViewer, count: int) -> None:
    viewer.wait(lambda page: len(losses(viewer)) == count)


def state_of(page: PageModel) -> str:
    """Return the state of the run that a viewer has."""
    return "" if page.status is None else page.status.state


# Past runs


def test_past_run_is_listed_and_shown_as_its_log_has_it(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path / "past", events_of(20))
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.rows)
        wait_for_losses(viewer, 20)
        viewer.wait(lambda page: page.status and len(page.milestones) == 3)
        page = viewer.page
        assert losses(viewer) == [1 / number for number in range(1, 21)]
        assert page.hello is not None and [(each.key, each.state) for each in page.hello.runs] == [
            ("past", "completed")
        ]
        assert page.run is not None and page.run.key == "past"
        assert page.status is not None
        assert (page.status.state, page.status.step, page.status.seconds) == ("completed", 20, 20.0)
        row = page.rows["past"]
        assert (row.state, row.live, row.page, row.directory) == (
            "completed",
            False,
            None,
            str(tmp_path / "past"),
        )


def test_viewer_chooses_among_past_runs_and_takes_commands_back(serve: Serve, tmp_path: Path) -> None:
    for name, steps in (("one", 3), ("two", 5)):
        write_run(tmp_path / name, events_of(steps), created=1_000.0 + steps)
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 5)
        viewer.say(Watch(run="one"))
        wait_for_losses(viewer, 3)
        page = viewer.page
        assert page.run is not None and set(page.run.refused.values()) == {"the run is over"}
        viewer.say(CommandRequest(id="a", name="pause", run="one"))
        viewer.wait(lambda page: page.acks.get("a") == ["rejected"])
        viewer.say(Watch(run="three"))
        viewer.wait(lambda page: page.runs == ["one", "two"])
        assert page.run.key == "one", "there is no such run"


def test_past_runs_are_laid_over_each_other(serve: Serve, tmp_path: Path) -> None:
    for number in range(4):
        write_run(tmp_path / f"run{number}", events_of(3 + number), created=1_000.0 + number)
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 6)
        viewer.say(Overlay(runs=["run0", "run2", "gone"]))
        viewer.wait(lambda page: set(page.others) == {"run0", "run2"})
        viewer.wait(lambda page: all(each.series and each.status for each in page.others.values()))
        for key, other in viewer.page.others.items():
            viewer.say(Show(run=key, series=sorted(other.series)))
        viewer.wait(lambda page: len(page.others["run0"].points.get(0, {})) == 3)
        viewer.wait(lambda page: len(page.others["run2"].points.get(0, {})) == 5)
        viewer.say(Overlay(runs=["run1"]))
        viewer.wait(lambda page: "run1" in page.others)


def test_speeds_of_a_past_run_do_not_depend_on_when_it_is_read(serve: Serve, tmp_path: Path) -> None:
    """A step a second, by the times of the events."""
    write_run(tmp_path / "run", events_of(20, end=None))
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 20)
        viewer.wait(lambda page: page.status)
        status = viewer.page.status
        assert status is not None and status.state == "lost"
        assert status.seconds == pytest.approx(20.0)
        assert status.steps_per_second == 0.0, "it trains no more"
        assert status.compute_share == pytest.approx(0.5)


def test_age_and_duration_of_a_resumed_run_are_those_of_its_last_attempt(
    serve: Serve, tmp_path: Path
) -> None:
    """As `offloop runs` says them."""
    for name in ("first", "second"):
        for epochs in (1, 2):
            trainer = tiny_trainer(run_dir=str(tmp_path), run_name=name)
            trainer.train(tiny_loader(2), epochs=epochs, callbacks=[ModelCheckpoint()], resume="auto")
    with SocketViewer(serve().url) as viewer:
        # One of them is open, the other one is read from its run.json
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.status and len(page.rows) == 2)
        for name, row in viewer.page.rows.items():
            record = read_run(tmp_path / name)
            assert record.attempt == 1 and record.created < record.started
            assert row.started == pytest.approx(record.started, abs=1e-3)
            assert row.seconds == pytest.approx(record.seconds, abs=1e-3)


# Runs of other processes


def test_run_of_another_process_is_followed_until_it_is_killed(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with trainer_process("run", tmp_path) as trainer, SocketViewer(server.url) as viewer:
        trainer.steps(3)
        wait_for_losses(viewer, 3)
        trainer.steps(4)
        wait_for_losses(viewer, 7)
        viewer.wait(lambda page: page.status and page.status.step == 7)
        status = viewer.page.status
        assert status is not None and status.state == "running"
        trainer.process.send_signal(signal.SIGKILL)
        viewer.wait(lambda page: page.status and page.status.state == "lost")
        assert viewer.page.status is not None
        assert viewer.page.status.reason.startswith("ended without saying so, last heard ")
        assert len(losses(viewer)) == 7


def test_run_that_ends_and_is_resumed_continues_on_the_screen(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with SocketViewer(server.url) as viewer:
        assert viewer.page.run is None
        directory = write_run(tmp_path / "run", events_of(4))
        wait_for_losses(viewer, 4)
        viewer.wait(lambda page: page.status and page.status.state == "completed")
        before = [event["type"] for event in viewer.page.milestones]
        with open(directory / "events.jsonl", "ab") as log:
            log.write(lines_of(events_of(3, attempt=1, first=5)))
        wait_for_losses(viewer, 7)
        viewer.wait(lambda page: len(page.milestones) == 2 * len(before))
        page = viewer.page
        assert page.run is not None and page.run.attempt == 1
        assert losses(viewer) == [1 / number for number in range(1, 8)]
        assert [event["type"] for event in page.milestones] == 2 * before


def test_log_that_was_cut_back_is_drawn_anew(serve: Serve, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", events_of(9))
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 9)
        kept = events_of(4, end=None)
        with open(directory / "events.jsonl", "r+b") as log:
            log.truncate(len(lines_of(kept)))
            log.seek(0, os.SEEK_END)
            log.write(lines_of(events_of(2, attempt=1, first=5)))
        wait_for_losses(viewer, 6)
        assert losses(viewer) == [1 / number for number in range(1, 7)]


def test_log_that_goes_back_without_being_cut_is_drawn_once_and_says_so(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path / "run", [*events_of(6, end=None), *events_of(4, attempt=1, first=4)])
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 7)
        viewer.wait(lambda page: page.status)
        assert viewer.page.status is not None
        assert "steps 4 to 6 were trained again" in viewer.page.status.reason


def test_page_of_a_run_leads_to_the_process_that_trains(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with trainer_process("run", tmp_path, "page") as trainer, SocketViewer(server.url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.run and page.run.page and "run" in page.rows)
        page = viewer.page
        assert page.run is not None and page.run.page is not None
        assert page.run.page.startswith("http://127.0.0.1:") and "token" not in page.run.page
        assert page.run.page in page.run.refused["stop"]
        assert page.rows["run"].page == page.run.page
        viewer.say(CommandRequest(id="a", name="stop", run="run"))
        viewer.wait(lambda page: page.acks.get("a") == ["rejected"])
        trainer.steps(1)
        wait_for_losses(viewer, 1)
        trainer.end()
        viewer.wait(lambda page: page.status and page.status.state == "completed")
        assert not (tmp_path / "run" / "page.json").exists()
        viewer.wait(lambda page: page.rows["run"].page is None)


def test_page_of_a_run_that_was_killed_leads_nowhere(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with trainer_process("run", tmp_path, "page") as trainer, SocketViewer(server.url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.run and page.run.page and "run" in page.rows)
        trainer.process.send_signal(signal.SIGKILL)
        viewer.wait(lambda page: page.run and page.run.page is None)
        viewer.wait(lambda page: page.rows["run"].state == "lost")
        assert (tmp_path / "run" / "page.json").exists()
        assert viewer.page.rows["run"].page is None
        assert viewer.page.run is not None and viewer.page.run.refused["stop"] == "the run is over"


def test_viewers_of_more_runs_than_are_opened_are_told(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_runs, "MAX_OPEN", 1)
    for number in range(2):
        write_run(tmp_path / f"run{number}", events_of(3 + number), created=1_000.0 + number)
    server = serve()
    with SocketViewer(server.url) as one:
        wait_for_losses(one, 4)
        with SocketViewer(server.url) as two:
            two.wait(lambda page: page.hello)
            two.say(Watch(run="run0"))
            two.wait(lambda page: page.status and "other runs are open" in page.status.reason)
            one.say(Watch(run="run0"))
            wait_for_losses(two, 3)
            wait_for_losses(one, 3)


# Faults


@pytest.mark.parametrize("end", [None, "completed"])
@pytest.mark.parametrize("fault", ["deleted", "renamed", "without its log"])
def test_directory_that_goes_while_it_is_shown_is_a_row_with_a_reason(
    serve: Serve, tmp_path: Path, fault: str, end: str | None
) -> None:
    directory = write_run(tmp_path / "run", events_of(5, end=end))
    write_run(tmp_path / "other", events_of(2), created=1.0)
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        wait_for_losses(viewer, 5)
        viewer.wait(lambda page: "run" in page.rows)
        if fault == "deleted":
            shutil.rmtree(directory)
        elif fault == "renamed":
            directory.rename(tmp_path / "another")
        else:
            (directory / "events.jsonl").unlink()
        gone = "events.jsonl" if fault == "without its log" else "its directory"
        why = rf"cannot be read since \d\d:\d\d:\d\d: {gone} was deleted or renamed"
        viewer.wait(lambda page: page.status and re.fullmatch(why, page.status.reason))
        viewer.wait(lambda page: re.fullmatch(why, page.rows["run"].why))
        status, row = viewer.page.status, viewer.page.rows["run"]
        assert status is not None and status.state == row.state == (end or "lost")
        assert len(losses(viewer)) == 5
        viewer.say(Watch(run="other"))
        wait_for_losses(viewer, 2)
        if fault != "without its log":
            viewer.wait(lambda page: "run" not in page.rows)


def test_directory_that_comes_back_is_followed_again(serve: Serve, tmp_path: Path) -> None:
    with trainer_process("run", tmp_path) as trainer, SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        trainer.steps(3)
        wait_for_losses(viewer, 3)
        (tmp_path / "run").rename(tmp_path / ".hidden")
        viewer.wait(lambda page: page.rows["run"].state == state_of(page) == "lost")
        (tmp_path / ".hidden").rename(tmp_path / "run")
        viewer.wait(lambda page: page.rows["run"].state == state_of(page) == "running")
        assert (
            viewer.page.status is not None and viewer.page.status.reason == viewer.page.rows["run"].why == ""
        )
        trainer.steps(2)
        wait_for_losses(viewer, 5)


def test_pipe_in_the_place_of_a_log_is_reported(serve: Serve, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "pipe", events_of(1))
    write_run(tmp_path / "other", events_of(2), created=1.0)
    (directory / "events.jsonl").unlink()
    os.mkfifo(directory / "events.jsonl")
    with SocketViewer(serve().url) as viewer:
        viewer.wait(lambda page: page.status and "no regular file" in page.status.reason)
        viewer.say(Watch(run="other"))
        wait_for_losses(viewer, 2)


def test_broken_lines_are_left_out_and_counted(serve: Serve, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", events_of(3, end=None))
    lines = lines_of(events_of(5, end=None)).splitlines(keepends=True)
    broken = [
        *lines[:3],
        b"{broken\n",
        b"[1]\n",
        *lines[3:],
        b'{"type":"my.Note","seq":9,"score":3}\n',
        b'{"type":"St',
    ]
    (directory / "events.jsonl").write_bytes(b"".join(broken))
    with SocketViewer(serve().url) as viewer:
        wait_for_losses(viewer, 5)
        viewer.wait(lambda page: page.status and "2 lines" in page.status.reason)
        viewer.wait(lambda page: [event["type"] for event in page.milestones] == ["TrainStart", "my.Note"])


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"schema": 99, "run_id": "run", "attempt": 0}'])
def test_unusable_description_is_a_row_with_a_reason(
    serve: Serve, tmp_path: Path, content: bytes | None
) -> None:
    directory = write_run(tmp_path / "run", events_of(3))
    if content is None:
        (directory / "run.json").unlink()
    else:
        (directory / "run.json").write_bytes(content)
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.rows)
        assert "run.json" in viewer.page.rows["run"].why
        wait_for_losses(viewer, 3)


def test_links_out_of_the_directory_are_not_followed(serve: Serve, tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside" / "secret", events_of(3))
    (tmp_path / "runs").mkdir()
    os.symlink(outside, tmp_path / "runs" / "link")
    inside = write_run(tmp_path / "runs" / "inside", events_of(1))
    (inside / "events.jsonl").unlink()
    os.symlink(outside / "events.jsonl", inside / "events.jsonl")
    with SocketViewer(serve(tmp_path / "runs").url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.rows)
        assert list(viewer.page.rows) == ["inside"]
        viewer.wait(lambda page: page.status and "link" in page.status.reason)
        assert not viewer.page.series


def test_disk_that_hangs_holds_up_no_other_run(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_run(tmp_path / f"hangs{number}", events_of(3), created=2_000.0)
    write_run(tmp_path / "other", events_of(2), created=1.0)
    disk = threading.Event()
    fill = run_reader.RunReader.fill

    def hang(reader: Any, *arguments: Any) -> Any:
        if reader.directory.name.startswith("hangs"):
            disk.wait()
        return fill(reader, *arguments)

    monkeypatch.setattr(run_reader.RunReader, "fill", hang)
    monkeypatch.setattr(followed_runs, "PATIENCE", 0.0)
    try:
        server = serve()
        with contextlib.ExitStack() as stack:
            viewers = [stack.enter_context(SocketViewer(server.url)) for _ in range(4)]
            for number, viewer in enumerate(viewers):
                viewer.wait(lambda page: page.hello)
                viewer.say(Watch(run=f"hangs{number}"))
            for viewer in viewers:
                viewer.wait(lambda page: page.status and "has not answered" in page.status.reason)
            with SocketViewer(server.url) as viewer:
                viewer.wait(lambda page: page.hello)
                viewer.say(Watch(run="other"))
                wait_for_losses(viewer, 2)
            disk.set()
            for viewer in viewers:
                wait_for_losses(viewer, 3)
                viewer.wait(lambda page: page.status and page.status.reason == "")
    finally:
        disk.set()


def test_viewer_that_watches_50_runs_in_turn_opens_few_of_them(serve: Serve, tmp_path: Path) -> None:
    for number in range(50):
        write_run(tmp_path / f"run{number:02}", events_of(3), created=1_000.0 + number)
    server = serve()
    most = 0
    with SocketViewer(server.url) as viewer:
        viewer.wait(lambda page: page.hello)
        for number in range(50):
            viewer.say(Watch(run=f"run{number:02}"))
        viewer.wait(lambda page: page.run and page.run.key == "run49")
        wait_for_losses(viewer, 3)
        followed = server.hub.followed
        assert followed is not None
        most = on_loop(server, lambda: len(followed._open))
    assert 1 <= most <= followed_runs.MAX_OPEN


def test_run_without_viewers_is_let_go(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed_runs, "KEPT_OPEN", 0.0)
    write_run(tmp_path / "run", events_of(3))
    server = serve()
    followed = server.hub.followed
    assert followed is not None
    with SocketViewer(server.url) as viewer:
        wait_for_losses(viewer, 3)
        assert on_loop(server, lambda: list(followed.live)) == ["run"]
    await_on_loop(server, lambda: not followed.live and not followed._open)
    with SocketViewer(server.url) as viewer:
        wait_for_losses(viewer, 3)


# The list


def test_5000_runs_are_listed(serve: Serve, tmp_path: Path) -> None:
    log = lines_of(events_of(2))
    for number in range(5_000):
        directory = tmp_path / f"run{number:04}"
        directory.mkdir()
        (directory / "run.json").write_text(
            json.dumps({"run_id": directory.name, "attempt": 0, "created": number, "status": "completed"})
        )
        (directory / "events.jsonl").write_bytes(log)
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: len(page.rows) == 5_000)
        messages = viewer.page.rows_messages
        assert max(len(each.rows) for each in messages) == 200
        assert messages[-1].total == 5_000 and not messages[-1].more
        viewer.wait(lambda page: page.run and page.run.key == "run4999")


def test_list_follows_what_changes(serve: Serve, tmp_path: Path) -> None:
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.rows_messages)
        assert viewer.page.rows == {}
        one = write_run(tmp_path / "one", events_of(3, end=None))
        viewer.wait(lambda page: "one" in page.rows)
        assert viewer.page.rows["one"].step == 3
        with open(one / "events.jsonl", "ab") as log:
            log.write(lines_of([step(4)]))
        viewer.wait(lambda page: page.rows["one"].step == 4)
        one.rename(tmp_path / "two")
        # The run that is shown keeps its row
        viewer.wait(lambda page: page.rows.keys() == {"one", "two"} and page.rows["one"].state == "lost")
        viewer.say(Watch(run="two"))
        viewer.wait(lambda page: list(page.rows) == ["two"])


def test_list_goes_on_for_who_comes_after_everyone_had_left(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_runs, "REFRESH", 0.02)
    write_run(tmp_path / "one", events_of(3))
    server = serve()
    followed = server.hub.followed
    assert followed is not None
    with SocketViewer(server.url) as viewer:
        viewer.say(ListRuns())
        wait_for_losses(viewer, 3)
    seen: list[object] = []

    def has_looked_round_three_times() -> bool:
        if followed._is_asked not in seen:
            seen.append(followed._is_asked)
        return len(seen) > 3

    await_on_loop(server, lambda: not server.hub.connections)
    await_on_loop(server, has_looked_round_three_times)
    write_run(tmp_path / "two", events_of(3))
    with SocketViewer(server.url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: "two" in page.rows)


def test_of_two_who_edit_the_second_is_told(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path / "run", events_of(3))
    url = serve().url
    with SocketViewer(url) as one, SocketViewer(url) as two:
        for viewer in (one, two):
            viewer.say(ListRuns())
            viewer.wait(lambda page: page.rows)
        one.say(Edit(id="a", run="run", version=0, note="mine"))
        one.wait(lambda page: page.acks.get("a") == ["applied"])
        two.say(Edit(id="b", run="run", version=0, note="yours"))
        two.wait(lambda page: page.acks.get("b") == ["rejected"])
        two.wait(lambda page: page.rows["run"].note == "mine")
        two.say(Edit(id="c", run="run", version=1, name="the best", tags=["good"]))
        two.wait(lambda page: page.acks.get("c") == ["applied"])
        one.wait(lambda page: page.rows["run"].name == "the best")
        assert (one.page.rows["run"].id, one.page.rows["run"].tags) == ("run", ["good"])
        one.say(Edit(id="d", run="run", version=2, note="x" * 20_000))
        one.wait(lambda page: page.acks.get("d") == ["rejected"])
        one.say(Edit(id="c", run="run", version=1, name="the best"))
        one.wait(lambda page: page.acks.get("c") == ["applied"])


def test_a_run_that_another_program_wrote_has_no_invisible_characters(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path / "a\u202eb", events_of(3))
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListRuns())
        viewer.wait(lambda page: page.rows and page.run)
        (row,) = viewer.page.rows.values()
        assert viewer.page.run is not None
        assert (row.id, row.name, viewer.page.run.name) == ("a\ufffdb",) * 3


def test_readers_edit_nothing(serve: Serve, tmp_path: Path) -> None:
    write_run(tmp_path / "run", events_of(3))
    server = serve()
    with SocketViewer(server.read_only_url) as viewer:
        viewer.say(Edit(id="a", run="run", version=0, note="mine"))
        viewer.wait(lambda page: page.acks.get("a") == ["rejected"])
    assert not (tmp_path / "run" / "labels.json").exists()


# The page of a run


def test_page_of_a_run_lists_the_runs_beside_it_and_itself_once(tmp_path: Path) -> None:
    write_run(tmp_path / "past", events_of(3))
    (tmp_path / "past" / "labels.json").write_text('{"name": "Old", "version": 1}')
    begun, seen = threading.Event(), threading.Event()

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(tiny_loader()):
                if number == 4:
                    begun.set()
                    assert seen.wait(PATIENCE)
                yield batch

    with Dashboard(port=0, quiet=True) as dashboard:
        trainer = tiny_trainer(run_name="now", run_dir=tmp_path)
        thread = threading.Thread(
            target=lambda: trainer.train(Batches(), epochs=1, callbacks=[Dashboard(port=0, quiet=True)])
        )
        thread.start()
        try:
            assert begun.wait(PATIENCE)
            with SocketViewer(dashboard.url) as viewer:
                viewer.wait(lambda page: page.run)
                assert viewer.page.hello is not None
                assert [each.key for each in viewer.page.hello.runs] == ["now"]
                viewer.say(ListRuns())
                viewer.wait(lambda page: len(page.rows) == 2)
                rows = viewer.page.rows
                assert (rows["now"].live, rows["past"].live, rows["past"].name) == (True, False, "Old")
                viewer.say(Edit(id="a", run="now", version=0, note="going on"))
                viewer.wait(lambda page: page.rows["now"].note == "going on")
                viewer.say(Watch(run="past"))
                wait_for_losses(viewer, 3)
                assert viewer.page.run is not None and viewer.page.run.key == "past"
        finally:
            seen.set()
            thread.join()


def test_page_of_several_runs_lists_the_runs_beside_each_of_them(tmp_path: Path) -> None:
    """Of the same names: each is opened, and edited, in its own directory."""
    for number, place in enumerate(("one", "two")):
        write_run(tmp_path / place / "past", events_of(3 + number))
    with Dashboard(port=0, quiet=True) as dashboard:
        for place in ("one", "two"):
            trainer = tiny_trainer(run_name=f"now-{place}", run_dir=tmp_path / place)
            trainer.train(tiny_loader(2), epochs=1, callbacks=[Dashboard(port=0, quiet=True)])
        with SocketViewer(dashboard.url) as viewer:
            viewer.say(ListRuns())
            viewer.wait(lambda page: len(page.rows) == 4)
            places = {key: row.directory for key, row in viewer.page.rows.items()}
            other = str(tmp_path / "two" / "past")
            assert places == {
                "now-one": str(tmp_path / "one" / "now-one"),
                "now-two": str(tmp_path / "two" / "now-two"),
                "past": str(tmp_path / "one" / "past"),
                other: other,
            }
            viewer.say(Edit(id="a", run=other, version=0, note="mine"))
            viewer.wait(lambda page: page.rows[other].note == "mine")
            assert viewer.page.rows["past"].note == ""
            viewer.say(Watch(run=other))
            wait_for_losses(viewer, 4)
            viewer.say(Watch(run="past"))
            wait_for_losses(viewer, 3)
            (tmp_path / "two" / "past" / "events.jsonl").unlink()
            (tmp_path / "two" / "past" / "run.json").unlink()
            viewer.wait(lambda page: other not in page.rows)


def test_a_directory_inside_another_one_is_listed_once(tmp_path: Path) -> None:
    write_run(tmp_path / "inner" / "past", events_of(3))
    directories = Directories(tmp_path / "inner")
    assert directories.add(tmp_path) and not directories.add(tmp_path)
    changed, removed = directories.refresh()
    assert ([each.key for each in changed], removed) == (["past"], [])
    write_run(tmp_path / "outer", events_of(3))
    changed, removed = directories.refresh()
    assert ([each.key for each in changed], removed) == ([str(tmp_path / "outer")], [])


# The command


def offloop_serve(*arguments: str) -> "subprocess.Popen[str]":
    """Start `offloop serve`; at its end it prints whether torch was loaded."""
    script = (
        "import sys\n"
        "from offloop.cli.main import app\n"
        "try:\n"
        "    app(['serve', *sys.argv[1:]], prog_name='offloop')\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_command_serves_without_torch_and_ends_in_order(tmp_path: Path) -> None:
    write_run(tmp_path / "run", events_of(3))
    process = offloop_serve(str(tmp_path), "--port", "0", "--read-only")
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Live page: http://127.0.0.1:")
        with SocketViewer(line.removeprefix("Live page: ").strip()) as viewer:
            wait_for_losses(viewer, 3)
            assert viewer.page.hello is not None and viewer.page.hello.role == "read_only"
            process.send_signal(signal.SIGINT)
            assert viewer.wait_closed()[0] == 1001
            assert viewer.page.bye == "the server was interrupted"
        out, rest = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, rest) == (0, "False\n", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_command_refuses_what_is_no_directory(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "file").touch()
    process = offloop_serve(str(tmp_path / kind))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("\n") == 1 and str(tmp_path / kind) in error


def test_command_serves_runs_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    process = offloop_serve()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.startswith("offloop: runs ")


# Checkpoints


def test_checkpoints_of_a_run_are_found_by_name_and_never_by_a_path(serve: Serve, tmp_path: Path) -> None:
    for name in ("past", "other"):
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name=name)
        trainer.train(tiny_loader(5), epochs=1, callbacks=[ModelCheckpoint()])
    elsewhere = CheckpointReader(tmp_path / "other").checkpoints()[0].path
    with SocketViewer(serve().url) as viewer:
        viewer.say(ListCheckpoints(run="past"))
        viewer.wait(lambda page: page.checkpoints)
        (listed,) = viewer.page.checkpoints[-1].rows
        assert (listed.step, listed.path, listed.is_last, listed.verified) == (
            5,
            str(tmp_path / "past" / "checkpoints" / listed.name),
            True,
            None,
        )
        strange = {
            str(elsewhere): "verify",
            f"../../other/checkpoints/{listed.name}": "tag",
            "last": "untag",
            "x\0y": "verify",
        }
        for name, action in strange.items():
            viewer.say(
                EditCheckpoint(id=name[-9:], run="past", checkpoint=name, action=action, tag="v1")  # type: ignore[arg-type]
            )
            viewer.wait(lambda page, id=name[-9:]: page.acks.get(id) == ["rejected"])  # type: ignore[misc]
        for number, tag in enumerate(("last", "../x")):
            viewer.say(
                EditCheckpoint(id=f"t{number}", run="past", checkpoint=listed.name, action="tag", tag=tag)
            )
            viewer.wait(lambda page, number=number: page.acks.get(f"t{number}") == ["rejected"])  # type: ignore[misc]
        viewer.say(EditCheckpoint(id="v", run="past", checkpoint=listed.name, action="verify"))
        viewer.wait(lambda page: page.acks.get("v") == ["applied"] and page.checkpoints[-1].rows[0].verified)
        viewer.say(EditCheckpoint(id="g", run="nowhere", checkpoint=listed.name, action="verify"))
        viewer.wait(lambda page: page.acks.get("g") == ["rejected"])
        viewer.say(ListCheckpoints(run="nowhere"))
        viewer.wait(lambda page: page.checkpoints[-1].error)
    assert CheckpointReader(tmp_path / "past").tags() == CheckpointReader(tmp_path / "other").tags() == {}
