"""Samples on their way to viewers: the index, the answers to their questions, and what hostile viewers and disks do."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import msgspec
import numpy as np
import pytest
from fake_run import FakeRun, source_of
from memory_link import MemoryLink
from run_files import write_run
from watched_runs import served, until

from offloop import connect
from offloop.dashboard.curves.chart_frame import decode_chart
from offloop.dashboard.hub import Hub
from offloop.dashboard.options import Options
from offloop.dashboard.protocol.from_viewer import Drawn, FromViewer, Hi, Overlay, SampleQuery, Show
from offloop.dashboard.protocol.limits import CLOSE_PROTOCOL, MAX_CHART_FRAME, Role
from offloop.dashboard.runs import run_samples
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.sample_frame import SampleHeader, encode_sample
from offloop.dashboard.serving.server import Server
from offloop.dashboard.viewers.sample_answers import MAX_QUESTIONS
from offloop.engine import (
    EpochEnd,
    Event,
    EventError,
    PictureSample,
    SampleFiles,
    StepEnd,
    TableSample,
    TextSample,
    TrainStart,
    read_events,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

pytestmark = pytest.mark.anyio

LONG = "long ä " * 100_000


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """Load what the first run loads, which would hold the event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), tiny_loader(1), epochs=1, metrics=["accuracy"])


class Known:
    def admit(self, hi: Hi) -> Role:
        return "read_only"

    def is_admitted(self) -> bool:
        return True


class SlowFiles(SampleFiles):
    """Files on a disk that answers when the test says so."""

    def __init__(self, directory: Path | None) -> None:
        super().__init__(directory)
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()
        self.threads: set[int] = set()

    def read(self, sample: Any) -> bytes:
        self.threads.add(threading.get_ident())
        self.asked.set()
        self.answers.wait()
        return super().read(sample)


class Header(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="sample"):
    """As a viewer reads it."""

    run: str
    query: int
    more: bool = False
    error: str = ""
    media_type: str = ""
    event: dict[str, Any] | None = None


def decode_sample(frame: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(frame[:4], "little")
    return msgspec.json.decode(frame[4 : 4 + length], type=Header), frame[4 + length :]


class Answer:
    def __init__(self, header: Header, content: bytes) -> None:
        self.header = header
        self.content = content

    @property
    def event(self) -> dict[str, Any]:
        assert self.header.event is not None
        return self.header.event


class Stage:
    """A hub with runs that publish samples, and one viewer."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.link = MemoryLink()
        self.files = SlowFiles(None)
        self.live = self.add("run")
        self.texts: list[dict[str, Any]] = []
        self.frames: list[bytes] = []
        self.gives_credit = True

    def add(self, name: str) -> LiveRun:
        run = FakeRun(name)
        run.samples = self.files
        live = LiveRun(source_of(run), TrainStart(run_id=name, step=0, epoch=0, time=1.0))
        self.hub.runs[live.key] = live
        return live

    def publish(self, *events: Event, live: LiveRun | None = None) -> None:
        live = live or self.live
        for event in events:
            self.files.keep(event)
            seq = live.samples.count
            for name, value in (("seq", seq), ("time", 2.0 + seq), ("step", seq), ("epoch", 0)):
                msgspec.structs.force_setattr(event, name, value)
            self.hub._send_milestones(live, live.take_in([event]))

    def say(self, message: FromViewer) -> None:
        self.link.say(message)

    async def read(self) -> None:
        """Take in what comes, giving credit, until there is nothing more."""
        await anyio.wait_all_tasks_blocked()
        while (taken := self.link.take()) is not None:
            data, is_text = taken
            if is_text:
                self.texts.append(msgspec.json.decode(data))
            else:
                self.frames.append(data)
                if self.gives_credit:
                    self.say(Drawn())
            await anyio.wait_all_tasks_blocked()

    async def answers(self, count: int = 1) -> list[Answer]:
        """Return the next answers, put together from their frames."""
        found: list[Answer] = []
        content = b""
        first: Header | None = None
        while len(found) < count:
            await self.read()
            while self.frames:
                header, part = decode_sample(self.frames.pop(0))
                first, content = first or header, content + part
                if not header.more:
                    found.append(Answer(first, content))
                    first, content = None, b""
            # A disk answers from a thread.
            await anyio.lowlevel.checkpoint()
        return found

    async def ask(self, seq: int, picture: int | None = None, **fields: Any) -> Answer:
        self.say(SampleQuery(query=seq, seq=seq, picture=picture, **fields))
        [answer] = await self.answers()
        return answer

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.texts if each["type"] == kind]


@asynccontextmanager
async def a_stage(**hi: Any) -> AsyncIterator[Stage]:
    token = anyio.lowlevel.current_token()
    hub = Hub(post=lambda function: anyio.from_thread.run_sync(function, token=token), frame_interval=1e-6)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            stage = Stage(hub)
            stage.say(Hi(protocol=1, **{"samples": "index", **hi}))
            tasks.start_soon(lambda: hub.serve(stage.link, visitor=Known(), address="127.0.0.1"))
            await stage.read()
            try:
                yield stage
            finally:
                stage.files.answers.set()
                while hub._calls._calls:
                    await anyio.lowlevel.checkpoint()
                stage.link.drop()
                tasks.cancel_scope.cancel()


def pixels(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)


async def test_the_index_has_all_samples_once_and_milestones_lack_what_is_asked_for() -> None:
    async with a_stage() as stage:
        stage.publish(TextSample("code", "text"), PictureSample("digits", pixels()))
        await stage.read()
        stage.publish(TableSample("rows", ["a"], [["cell"]]))
        await stage.read()
        assert [each["samples"] for each in stage.of("samples")] == [
            [[0, "code", "text", 0, 0, 2.0]],
            [[1, "digits", "picture", 1, 0, 3.0]],
            [[2, "rows", "table", 2, 0, 4.0]],
        ]
        text, picture, table = [each["event"] for each in stage.of("milestone")]
        assert (text["text"], table["rows"]) == ("", [])
        assert picture["picture"]["width"] == 4


async def test_a_program_gets_samples_whole_and_no_index() -> None:
    async with a_stage(samples="whole") as stage:
        stage.publish(TextSample("code", "text"), TableSample("rows", ["a"], [["cell"]]))
        await stage.read()
        text, table = [each["event"] for each in stage.of("milestone")]
        assert (text["text"], table["rows"]) == ("text", [["cell"]])
        assert stage.of("samples") == []


async def test_each_kind_is_answered_with_its_content() -> None:
    async with a_stage() as stage:
        picture = PictureSample("digits", pixels())
        encoded = picture.picture.data
        table = TableSample("rows", ["a", "b"], [[pixels(1), 1], [pixels(2), 2]])
        second = table.pictures[1].data
        stage.publish(TextSample("code", "short"), TextSample("code", LONG), picture, table)
        short = await stage.ask(0)
        assert (short.content, short.event["text"], short.header.media_type) == (b"short", "", "text/plain")
        long = await stage.ask(1)
        assert long.content.decode() == LONG
        shown = await stage.ask(2)
        assert (shown.content, shown.header.media_type) == (encoded, "image/png")
        rows = await stage.ask(3)
        assert (rows.content, [row[1] for row in rows.event["rows"]]) == (b"", [1, 2])
        of_row = await stage.ask(3, picture=1)
        assert (of_row.content, of_row.header.media_type) == (second, "image/png")


async def test_a_long_answer_comes_in_parts_and_curves_take_turns_with_it() -> None:
    async with a_stage() as stage:
        stage.publish(TextSample("code", LONG))
        stage.live.take_in([StepEnd(loss=1.0, lr=0.1, step=1, epoch=0, time=5.0)])
        stage.hub._send_milestones(stage.live, [])
        await stage.read()
        stage.gives_credit = False
        stage.say(Show(series=[0]))
        await stage.read()
        stage.say(SampleQuery(query=7, seq=0))
        stage.frames.clear()
        answers = stage.hub.connections[0].viewer.samples
        assert answers is not None
        while not answers.has_frame:
            await stage.read()
            await anyio.lowlevel.checkpoint()
        kinds = ""
        for step in range(2, 7):
            stage.live.take_in([StepEnd(loss=1.0, lr=0.1, step=step, epoch=0, time=5.0 + step)])
            stage.hub._tick(stage.live)
            await stage.read()
            stage.say(Drawn())
            while not stage.frames:
                await stage.read()
                await anyio.lowlevel.checkpoint()
            [frame] = stage.frames
            stage.frames.clear()
            assert len(frame) < MAX_CHART_FRAME + 2_000
            try:
                decode_chart(frame)
                kinds += "c"
            except ValueError:
                assert decode_sample(frame)[0].query == 7
                kinds += "s"
        assert "cs" in kinds and "sc" in kinds and "ss" not in kinds


async def test_a_disk_that_hangs_holds_up_the_answers_and_nothing_else() -> None:
    async with a_stage() as stage:
        stage.publish(PictureSample("digits", pixels()), TextSample("code", "text"))
        stage.files.answers.clear()
        stage.say(SampleQuery(query=0, seq=0))
        stage.say(SampleQuery(query=1, seq=1))
        while not stage.files.asked.is_set():
            await stage.read()
        stage.publish(TextSample("code", "later"))
        await stage.read()
        assert (stage.frames, len(stage.of("milestone"))) == ([], 3)
        stage.files.answers.set()
        assert [each.header.query for each in await stage.answers(2)] == [0, 1]
        # Nothing was read on the event loop.
        assert threading.get_ident() not in stage.files.threads


async def test_one_disk_is_asked_at_a_time_however_much_a_viewer_wants() -> None:
    async with a_stage() as stage:
        stage.publish(PictureSample("digits", pixels()))
        stage.files.answers.clear()
        for query in range(MAX_QUESTIONS):
            stage.say(SampleQuery(query=query, seq=0))
        await stage.read()
        while not stage.files.asked.is_set():
            await stage.read()
        assert len(stage.hub._calls._calls) == 1
        stage.say(SampleQuery(query=900, seq=0))
        stage.say(SampleQuery(query=901, seq=0))
        await stage.read()
        assert stage.link.closed is not None
        assert stage.link.closed[0] == CLOSE_PROTOCOL
        assert f"more than {MAX_QUESTIONS}" in stage.link.closed[1]


@pytest.mark.parametrize(
    ("seq", "picture", "why"),
    [
        (17, None, "no longer keeps it"),
        (-1, None, "no longer keeps it"),
        (1, 1, "the table has 1 pictures"),
        (1, -1, "the table has 1 pictures"),
    ],
)
async def test_what_is_not_there_is_said(seq: int, picture: int | None, why: str) -> None:
    async with a_stage() as stage:
        stage.publish(TextSample("code", "text"), TableSample("rows", ["a"], [[pixels()]]))
        answer = await stage.ask(seq, picture)
        assert why in answer.header.error
        assert answer.content == b""


async def test_samples_of_an_overlaid_run_are_listed_and_answered_and_those_of_others_are_not() -> None:
    async with a_stage() as stage:
        other, third = stage.add("other"), stage.add("third")
        stage.publish(TextSample("code", "of other"), live=other)
        stage.publish(TextSample("code", "of third"), live=third)
        stage.publish(TextSample("code", "of run"))
        stage.say(Overlay(runs=["other"]))
        await stage.read()
        assert [each["run"] for each in stage.of("samples")] == ["run", "other"]
        assert (await stage.ask(0, run="other")).content == b"of other"
        stage.say(SampleQuery(query=5, seq=0, run="third"))
        stage.say(SampleQuery(query=6, seq=0, run="run"))
        [answer] = await stage.answers()
        assert (answer.header.query, answer.content) == (6, b"of run")


async def test_the_oldest_samples_go_and_the_index_has_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_samples, "SAMPLES_KEPT", 10)
    async with a_stage() as stage:
        stage.publish(*(TextSample("code", str(number)) for number in range(15)))
        index = stage.live.samples.since(0)
        assert index is not None
        assert [each[0] for each in msgspec.json.decode(index)["samples"]] == list(range(5, 15))
        assert stage.live.samples.find(4) is None
        assert stage.live.samples.find(5) is not None


def test_a_content_is_divided_among_frames_and_the_first_has_the_event() -> None:
    header = SampleHeader(run="r", query=1, event=msgspec.Raw(b'{"type":"TextSample"}'))
    content = bytes(range(256)) * 3_000
    frames = [decode_sample(each) for each in encode_sample(header, content)]
    assert b"".join(part for _, part in frames) == content
    assert [each.more for each, _ in frames] == [True, True, False]
    assert [each.event is not None for each, _ in frames] == [True, False, False]


# Run directories and programs -------------------------------------------------------------------------


def past_run(directory: Path) -> SampleFiles:
    files = SampleFiles(directory)
    place: dict[str, Any] = {"run_id": "old", "epoch": 0, "step": 1, "time": 1_001.0}
    samples = [TextSample("code", "text", seq=1, **place), TextSample("long", LONG, seq=2, **place)]
    for sample in samples:
        files.keep(sample)
    start = TrainStart(run_id="old", seq=0, time=1_000.0, epoch=0, step=0)
    write_run(directory, [start, *samples, EpochEnd(seq=3, **place)])
    files.write()
    return files


async def test_a_program_gets_texts_of_a_past_run_and_reads_long_ones_where_the_directory_is(
    tmp_path: Path,
) -> None:
    past_run(tmp_path / "old")
    server = Server(Options(port=0), tmp_path)
    try:
        with anyio.fail_after(60):
            async with connect(server.url, run="old") as watch:
                short = long = None
                async for event in watch.events(TextSample):
                    short, long = long, event
                    if event.key == "long":
                        break
                assert short is not None and long is not None
                assert short.text == "text"
                assert long.text == LONG[:1_000]
                assert watch.dir is not None
                assert long.read(watch.dir) == LONG
    finally:
        server.close("done")


async def test_a_program_publishes_samples_up_to_the_size_of_a_message() -> None:
    recorder = Recorder()
    async with served(callbacks=[recorder]) as (dashboard, run), connect(dashboard.url) as watch:
        watch.publish(PictureSample("digits", pixels()))
        watch.publish(TextSample("code", "text"))
        with pytest.raises(EventError, match="a message to the server at most 65,536"):
            watch.publish(TextSample("code", LONG))
        await until(lambda: recorder.of(TextSample))
        [picture] = recorder.of(PictureSample)
        assert run.samples.read(picture.picture).startswith(b"\x89PNG")


@pytest.mark.parametrize("change", ["data", "size", "media_type"])
async def test_a_program_cannot_pass_other_bytes_off_as_a_picture(change: str) -> None:
    """Bytes that are no picture, or are another than their checksum says."""
    changed = {"data": b"<svg>", "size": 5, "media_type": "image/webp"}[change]
    sample = PictureSample("digits", pixels())
    msgspec.structs.force_setattr(
        sample, "picture", msgspec.structs.replace(sample.picture, **{change: changed})
    )
    with pytest.raises(EventError, match="is not what its checksum"):
        SampleFiles(None).keep(sample)


def test_a_kept_log_has_all_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log whose columns are kept, and whose samples are more than the milestones that are."""
    from offloop.dashboard.curves import column_file
    from offloop.dashboard.runs import milestones, run_reader
    from offloop.engine import read_run

    monkeypatch.setattr(run_reader, "LEAST_LOG", 1)
    monkeypatch.setattr(milestones, "MILESTONES_KEPT", 2)
    past_run(tmp_path / "old")
    assert len(list(read_events(tmp_path / "old"))) == 4
    record = read_run(tmp_path / "old")
    for _ in range(2):
        live = run_reader.RunReader(record, history_bytes=1 << 20, milestone_bytes=1 << 20)
        live.coarse()
        filled = live.fill()
        assert len(filled.milestones) == 2
        assert [entry.seq for entry in filled.samples._index] == [1, 2]
    assert column_file.find(column_file.place_of(tmp_path / "old" / "events.jsonl"), limit=1 << 20)
