"""dashboard/runs/followed_runs.py: whatever happens to a run, the page has what `read_events` reads, or why not."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_files import lines_of, step, write_run

from offloop.dashboard.protocol.from_server import RunRow
from offloop.dashboard.runs import followed_runs
from offloop.dashboard.runs.disk_calls import DiskCalls
from offloop.dashboard.runs.followed_runs import FollowedRuns
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.runs.run_reader import RunReader
from offloop.engine import (
    EpochEnd,
    Event,
    Metrics,
    Sample,
    StepEnd,
    TrainEnd,
    TrainStart,
    read_events,
    read_run,
)

PATIENCE: Final = 30.0


class Watcher:
    """A viewer of one run, as far as followed runs know of viewers."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.live: LiveRun | None = None
        self._happened = anyio.Event()

    def _tell(self) -> None:
        self._happened.set()
        self._happened = anyio.Event()

    def show(self, live: LiveRun, *, is_new_attempt: bool = False) -> None:
        self.live = live
        self._tell()

    def distribute(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        assert live is self.live
        self._tell()

    def changed(self, live: LiveRun) -> None:
        self._tell()

    def listed(self, rows: Sequence[RunRow], removed: Sequence[str]) -> None:
        pass

    def named(self, *, is_first: bool) -> None:
        pass

    def missing(self, key: str) -> None:
        pass

    def wanted(self, newest: str | None) -> frozenset[str]:
        return frozenset({self.key})

    def is_listening(self) -> bool:
        return True

    def is_training(self) -> bool:
        return False

    async def until(self, condition: Callable[[LiveRun], bool]) -> None:
        """Wait until the run is so."""
        with anyio.fail_after(PATIENCE):
            while self.live is None or not condition(self.live):
                await self._happened.wait()


def drawn(live: LiveRun) -> list[float]:
    """Return the losses that are drawn."""
    for series in live.series:
        if series.key == "loss":
            return live.history.curves[series.id].view(0, live.history.axis.rows, None)[1].tolist()  # type: ignore[no-any-return]
    return []


def told(live: LiveRun) -> list[str]:
    """Return the types of the milestones."""
    events = [msgspec.json.decode(each.message(is_control=True) or b"")["event"] for each in live.milestones]
    assert [each["seq"] for each in events] == sorted({each["seq"] for each in events})
    return [each["type"] for each in events]


def expected(directory: Path) -> tuple[list[float], list[str]]:
    """Return the losses and milestones that a log has; of a step that was done twice, the first."""
    losses, milestones = list[float](), list[str]()
    last = drawn_up_to = attempt = 0
    for event in read_events(directory):
        if isinstance(event, StepEnd):
            last = event.step
            if event.step > drawn_up_to:
                assert event.loss is not None
                losses.append(event.loss)
            continue
        if isinstance(event, Sample):
            continue
        milestones.append(getattr(event, "type", type(event).__name__))
        if isinstance(event, TrainStart) and event.attempt != attempt:
            attempt = event.attempt
            drawn_up_to = max(drawn_up_to, last if event.step < last else 0)
    return losses, milestones


class Writer:
    """Writes the log of a run, and does to its files what people and crashes do."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.away = directory.with_name(".away")
        self.log = directory / "events.jsonl"
        self.step = self.attempt = self.clock = 0
        # The second half of a line.
        self.rest = b""
        write_run(directory, [self._start()])

    def _start(self) -> TrainStart:
        self.clock += 1
        return TrainStart(
            run_id="run", seq=0, time=float(self.clock), epoch=0, step=self.step, attempt=self.attempt
        )

    def _append(self, content: bytes) -> None:
        with open(self.log, "ab") as log:
            log.write(self.rest + content)
        self.rest = b""

    def _event(self, kind: type[Event], **fields: Any) -> bytes:
        self.clock += 1
        return lines_of(
            [kind(run_id="run", seq=self.clock, time=float(self.clock), epoch=0, step=self.step, **fields)]
        )

    def _step(self) -> bytes:
        self.step += 1
        self.clock += 1
        return lines_of([step(self.step, time=float(self.clock), seq=self.clock)])

    def do(self, action: str, number: int) -> None:
        """Do something; what needs the directory is left out while it is away."""
        if self.away.exists():
            if action == "return":
                self.away.rename(self.directory)
            return
        match action:
            case "steps":
                self._append(b"".join(self._step() for _ in range(number)))
            case "epoch":
                self._append(self._event(EpochEnd, metrics=Metrics(train_loss=1.0)))
            case "end":
                self._append(self._event(TrainEnd, status="stopped", seconds=1.0))
            case "junk":
                self._append(
                    [b"\n", b"{}\n", b"\xff\xfe\n", b'{"type":"StepEnd"}\n', b"[" * 2_000 + b"\n"][number % 5]
                )
            case "unknown":
                self._append(b'{"type":"my.Note","seq":%d,"time":%d,"text":"x"}\n' % (self.clock, self.clock))
            case "half":
                line = self._step()
                self._append(line[: number + 5])
                self.rest = line[number + 5 :]
            case "resume" | "again":
                self.step = max(0, self.step - number)
                self.attempt += 1
                self.rest = b""
                if action == "resume":
                    self._cut()
                elif not self.log.read_bytes().endswith(b"\n"):
                    self._append(b"\n")
                self._append(lines_of([self._start()]))
            case "copy":
                shutil.copy(self.log, self.log.with_suffix(".new"))
                self.log.with_suffix(".new").rename(self.log)
            case "leave":
                self.directory.rename(self.away)

    def _cut(self) -> None:
        """Cut the log back to the step, as a resumed run does."""
        kept, last = b"", 0
        for line in self.log.read_bytes().splitlines(keepends=True):
            is_step = line.startswith(b'{"type":"StepEnd","run_id"') and line.endswith(b"\n")
            found = msgspec.json.decode(line) if is_step else {}
            last = found.get("step", last)
            if last > self.step or not line.endswith(b"\n"):
                break
            kept += line
        with open(self.log, "r+b") as log:
            log.truncate(len(kept))


ACTIONS: Final = (
    "steps",
    "epoch",
    "end",
    "junk",
    "unknown",
    "half",
    "resume",
    "again",
    "copy",
    "leave",
    "return",
)
SCHEDULES: Final = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 20)), min_size=1, max_size=12)


async def follow(schedule: Sequence[tuple[str, int]], runs_dir: Path) -> None:
    writer, watcher = Writer(runs_dir / "run"), Watcher("run")
    loop = asyncio.get_running_loop()

    def post(function: Callable[[], None]) -> None:
        # A call may end after the test.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function)

    followed = FollowedRuns(
        runs_dir,
        watcher,
        DiskCalls(post),
        history_bytes=10_000_000,
        milestone_bytes=10_000_000,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(followed.run)
        for action, number in [("steps", 3), *schedule]:
            writer.do(action, number)
            if writer.away.exists():
                await watcher.until(lambda live: "cannot be read" in live.why)
                continue
            losses, milestones = expected(writer.directory)
            await watcher.until(
                lambda live, losses=losses, milestones=milestones: (  # type: ignore[misc]
                    drawn(live) == losses and told(live) == milestones and "cannot be read" not in live.why
                )
            )
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL", "RETRY", "REFRESH"):
        monkeypatch.setattr(followed_runs, name, 0.001)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(schedule=SCHEDULES)
def test_whatever_happens_to_its_files_a_run_is_shown_as_they_are(schedule: list[tuple[str, int]]) -> None:
    with TemporaryDirectory() as directory:
        asyncio.run(follow(schedule, Path(directory)))


def test_long_log_is_coarse_at_first_and_complete_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offloop.dashboard.runs.run_reader.LONG_LOG", 1)
    monkeypatch.setattr("offloop.dashboard.runs.run_reader.COARSE_LINES", 50)
    steps = [step(number, val_loss=2.0) for number in range(1, 2_001)]
    write_run(tmp_path / "run", [TrainStart(run_id="run", seq=0, time=1.0, step=0, epoch=0), *steps])
    reader = RunReader(read_run(tmp_path / "run"), history_bytes=10_000_000, milestone_bytes=10_000_000)
    coarse = reader.coarse()
    assert coarse is not None
    few = drawn(coarse)
    assert 50 <= len(few) < 300 and few[-1] == 1 / 2_000
    assert not coarse.milestones and not coarse.history.gaps
    live = reader.fill(coarse.series)
    assert drawn(live) == [1 / number for number in range(1, 2_001)]
    assert [each.key for each in live.series] == [each.key for each in coarse.series]
    assert told(live) == ["TrainStart"] and reader.share_read == 1.0


def test_numbers_of_unknown_samples_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloop.dashboard.runs.followed_run.UNKNOWN_MILESTONES", 1)
    fields = {
        "run_id": "run",
        "epoch": 0,
        "type": "elsewhere.DiskUse",
        "used_percent": 50.0,
        "parts": [{"free_bytes": 7}],
    }
    lines = [
        msgspec.json.encode(fields | {"seq": n, "time": 1.0 + n, "step": n}) + b"\n" for n in range(1, 4)
    ]
    directory = write_run(tmp_path / "run", [TrainStart(run_id="run", seq=0, time=1.0, step=0, epoch=0)])
    with open(directory / "events.jsonl", "ab") as log:
        log.writelines(lines)
    reader = RunReader(read_run(directory), history_bytes=10_000_000, milestone_bytes=10_000_000)
    live = reader.fill()
    units = {each.key: each.unit for each in live.series}
    assert units == {"disk_use/used_percent": "percent", "disk_use/parts/0/free_bytes": "bytes"}
    assert [curve.points for curve in live.history.curves] == [2, 2]
    assert told(live) == ["TrainStart", "elsewhere.DiskUse"]
