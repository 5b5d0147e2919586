"""Remote directories: whole checkpoints or none there, whatever fails; and a run that goes on from them elsewhere."""

import contextlib
import io
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import fsspec  # type: ignore[import-untyped]  # fsspec has no types
import pytest
import torch
from checkpoint_support import VolatileFileSystem, loaded_step, save, step_of
from fsspec.implementations.memory import (  # type: ignore[import-untyped]  # as above
    MemoryFile,
    MemoryFileSystem,
)
from interruptions import Cut
from torch.utils.data import DataLoader
from warm_python import WarmPython

from offloop.callbacks import MetricLogger, ModelCheckpoint
from offloop.engine import (
    Callback,
    CheckpointSaved,
    CheckpointUploaded,
    ConfigError,
    EpochEnd,
    PictureSample,
    RemoteDirectory,
    Resumed,
    Run,
    RunNameTakenError,
    RunResult,
    StepPoint,
    TextSample,
    TrainEnd,
    Trainer,
    TrainerConfig,
    TrainStart,
    UploadFailed,
    decides,
    in_step,
    read_events,
)
from offloop.engine.bus.event_bus import Bus
from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointStore,
    RemoteError,
    RemoteRun,
    Retention,
    RunLockedError,
)
from offloop.engine.checkpoint import remote as remote_module
from offloop.engine.events import Event
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.recovery import uploads as uploads_module
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.recovery.fetch import fetch_run
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.recovery.uploads import Uploads
from offloop.engine.testing import Recorder, reproducible, tiny_loader, tiny_model, tiny_trainer

URL = "faulty://bucket/runs"
NEVER = 1 << 60


class Killed(BaseException):
    """Stands for the end of the process."""


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store in memory whose operations fail, die, or hang, from the n-th on or once."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    count = 0
    fail_at = NEVER
    mode = "fail"  # once; or "fail forever", "die", "hang", "truncate"
    is_free = threading.Event()

    @classmethod
    def begin(cls, fail_at: int = NEVER, mode: str = "fail") -> None:
        cls.count, cls.fail_at, cls.mode = 0, fail_at, mode

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))
        return stripped

    def _pass(self) -> bool:
        """Count an operation; True if it is to be half done and then to fail."""
        cls = type(self)
        cls.count += 1
        at = cls.count - 1
        if at < cls.fail_at or (at > cls.fail_at and cls.mode in ("fail", "truncate")):
            return False
        if cls.mode == "hang":
            assert cls.is_free.wait(60)
            return False
        return True

    def _raise(self) -> None:
        if type(self).mode == "die":
            raise Killed
        raise OSError("the network is away")

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if self._pass():
            half = Path(lpath).read_bytes()
            path = self._strip_protocol(rpath)
            self.store[path] = MemoryFile(self, path, half[: len(half) // 2])
            if type(self).mode == "truncate":
                return  # a store that says it has it
            self._raise()
        path = self._strip_protocol(rpath)
        self.store[path] = MemoryFile(self, path, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        content = MemoryFileSystem.cat_file(self, rpath)
        if self._pass():
            Path(lpath).write_bytes(content[: len(content) // 2])
            self._raise()
        Path(lpath).write_bytes(content)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        if self._pass():
            self._raise()
        content: bytes = super().cat_file(path, *args, **kwargs)
        return content

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if self._pass():
            self._raise()
        return super().ls(path, detail=detail, **kwargs)

    def rm_file(self, path: str) -> None:
        if self._pass():
            self._raise()
        super().rm_file(path)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyStore]]:
    """An empty store without faults, and no pauses."""
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.0)
    for name in ("FIRST_REST", "LONGEST_REST_AT_END"):
        monkeypatch.setattr(uploads_module, name, 0.01)
    FaultyStore.store.clear()
    FaultyStore.begin()
    FaultyStore.is_free = threading.Event()
    yield FaultyStore
    FaultyStore.is_free.set()
    FaultyStore.begin()


# The upload thread's work, without the thread ------------------------------------------------------


class OneRun:
    """A run's local directory and its uploads, as one process has them."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.events: list[Event] = []
        self.failures: list[Exception] = []
        self.retention = retention or Retention(keep_last=2, monitor="loss")
        self.checkpoints = Checkpoints(
            directory,
            run_id="run",
            optimizers={},
            model=torch.nn.Identity(),
            publish=self.events.append,
            retention=Retention(),
            wait_policy=lambda wait: wait(60.0),
            logs=DurableLogs(Bus(run_id="run"), in_haste=lambda: True),
            evaluations=Evaluations(None),
        )
        self.checkpoints.keep(Keeper(self.retention))
        self.remote = RemoteRun(URL, "run")
        self.uploads = Uploads(
            self.remote,
            directory,
            self.checkpoints,
            publish=self.events.append,
            failed=self.failures.append,
        )

    def save(self, *steps: int, **request: Any) -> None:
        filesystem = VolatileFileSystem()
        with CheckpointStore(self.directory, retention=self.retention, filesystem=filesystem) as store:
            for step in steps:
                save(store, step, **{"attempt": 0, "metrics": {"loss": 100.0 - step}, **request})
        self.uploads.wake()

    def upload(self) -> None:
        self.uploads._make_round(with_files=True)


def complete(remote: RemoteRun) -> list[int]:
    """Return the steps that are complete in the store, newest first."""
    heads = [remote.head(name) for name in remote.checkpoint_names()]
    return [head.step for head in heads if head is not None]


def fetched_step(directory: Path, which: str | int = "auto") -> int:
    """Return the step that an empty machine would go on from, every byte checked."""
    fetch_run(RemoteRun(URL, "run"), directory, which)
    return loaded_step(directory)


@pytest.fixture
def two_uploaded(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2, here and there."""
    run = OneRun(tmp_path / "first")
    (run.directory / "run.json").write_text('{"attempt": 0}')
    (run.directory / "metrics.csv").write_text("a,b\n1,2\n")
    run.save(1, 2)
    run.upload()
    assert complete(run.remote) == [2, 1]
    return run.directory


def test_upload_mirrors_the_local_directory(two_uploaded: Path) -> None:
    here = {
        str(path.relative_to(two_uploaded)): path.read_bytes()
        for path in two_uploaded.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }
    root = "/bucket/runs/run/"
    there = {path.removeprefix(root): each.getvalue() for path, each in FaultyStore.store.items()}
    assert there == here
    assert {"refs/last", "refs/best", "run.json", "metrics.csv"} < set(there)


@pytest.mark.parametrize("mode", ["fail", "fail forever", "die", "truncate"])
def test_whatever_operation_of_an_upload_fails_what_is_there_is_whole(
    mode: str, two_uploaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "ATTEMPTS", 1)
    before = dict(FaultyStore.store)
    OneRun(two_uploaded).save(3, 4)  # 1 and 2 go here; there they must stay until 3 or 4 is complete
    outcomes: list[int] = []
    for fail_at in range(200):
        FaultyStore.store.clear()
        FaultyStore.store.update(before)
        run = OneRun(two_uploaded)
        run.uploads.wake()
        FaultyStore.begin(fail_at, mode)
        with contextlib.suppress(RemoteError, Killed):
            run.upload()
        is_through = FaultyStore.count <= fail_at
        FaultyStore.begin()

        assert len(complete(run.remote)) >= 2
        step = fetched_step(tmp_path / f"fresh-{fail_at}")
        assert step in (2, 4)
        outcomes.append(step)

        after = OneRun(two_uploaded)  # in another process
        after.uploads.wake()
        after.upload()
        assert complete(after.remote) == [4, 3]
        assert after.remote.checkpoint_names() == ["step-000000004-a0", "step-000000003-a0"]
        assert (after.remote.ref("last"), after.remote.ref("best")) == ("step-000000004-a0",) * 2
        if is_through:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {2, 4}
    assert len(outcomes) > 20


@pytest.mark.parametrize("mode", ["fail", "fail forever", "die"])
def test_whatever_operation_of_a_fetch_fails_what_is_here_is_whole(
    mode: str, two_uploaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "ATTEMPTS", 1)
    for fail_at in range(100):
        fresh = tmp_path / f"fresh-{fail_at}"
        FaultyStore.begin(fail_at, mode)
        with contextlib.suppress(RemoteError, Killed):
            fetch_run(RemoteRun(URL, "run"), fresh, "auto")
        is_through = FaultyStore.count <= fail_at
        FaultyStore.begin()
        assert loaded_step(fresh) in ((2,) if is_through else (-1, 1, 2))
        assert fetched_step(fresh) == 2
        assert (fresh / "metrics.csv").read_text() == "a,b\n1,2\n"
        assert not [name for name in os.listdir(fresh) if name.startswith(".")]
        if is_through:
            break
    assert fail_at > 8


def test_operations_are_tried_again(two_uploaded: Path, tmp_path: Path) -> None:
    FaultyStore.begin(3, "fail")
    assert fetched_step(tmp_path / "fresh") == 2


def test_refused_permission_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: Any, path: str, *rest: Any, **more: Any) -> bytes:
        asked.append(path)
        raise PermissionError("no")

    monkeypatch.setattr(FaultyStore, "cat_file", refuse)
    with pytest.raises(
        RemoteError, match=r"faulty://bucket/runs/run: could not read run.json: PermissionError"
    ):
        RemoteRun(URL, "run").read("run.json")
    assert len(asked) == 1


def flip(name: str) -> None:
    path = f"/bucket/runs/run/checkpoints/{name}"
    content = bytearray(FaultyStore.store[path].getvalue())
    content[-5] ^= 1
    FaultyStore.store[path] = MemoryFile(None, path, bytes(content))


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_damaged_newest_gives_way_to_the_one_before(file: str, two_uploaded: Path, tmp_path: Path) -> None:
    flip(f"step-000000002-a0/{file}")
    assert fetched_step(tmp_path / "fresh") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_missing_file_makes_a_checkpoint_incomplete(file: str, two_uploaded: Path, tmp_path: Path) -> None:
    del FaultyStore.store[f"/bucket/runs/run/checkpoints/step-000000002-a0/{file}"]
    assert complete(RemoteRun(URL, "run")) == [1]
    assert fetched_step(tmp_path / "fresh") == 1


def test_nothing_but_damaged_ones_is_an_error_and_no_new_beginning(
    two_uploaded: Path, tmp_path: Path
) -> None:
    for step in (1, 2):
        flip(f"step-00000000{step}-a0/model.safetensors")
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        fetched_step(tmp_path / "fresh")


def test_tag_step_and_best_are_found(tmp_path: Path) -> None:
    run = OneRun(tmp_path / "run")
    run.save(1, 2)
    run.save(3, tags=("good",))
    run.save(4, metrics={"loss": 0.0})
    run.save(5, 6, 7)
    run.upload()
    assert complete(run.remote) == [7, 6, 4, 3]
    for which, step in (("good", 3), ("best", 4), (6, 6), ("step-000000003-a0", 3)):
        directory = tmp_path / str(which)
        assert fetched_step(directory, which) == step
        assert CheckpointReader(directory).find(which).step == step
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint 'other' in faulty://bucket/runs/run"):
        fetched_step(tmp_path / "other", "other")
    assert fetched_step(tmp_path / "last") == 7
    assert CheckpointReader(tmp_path / "last").find("best").step == 4  # came along


def test_what_the_store_has_and_this_machine_has_not_is_not_lost(tmp_path: Path) -> None:
    """The best and the tagged ones of an earlier machine stay, though they are not here."""
    first = OneRun(tmp_path / "first")
    first.save(1, tags=("good",))
    first.save(2, 3, 4, 5)
    first.upload()
    assert complete(first.remote) == [5, 4, 1]
    second = OneRun(tmp_path / "second")
    assert fetched_step(second.directory) == 5
    second.save(6, 7, attempt=1, metrics={"loss": 1000.0})
    second.upload()
    assert complete(second.remote) == [7, 6, 5, 1]  # 5 is the best, 1 is tagged, 4 had to go


def test_nothing_is_dropped_there_before_callbacks_have_said_what_is_kept(two_uploaded: Path) -> None:
    run = OneRun(two_uploaded, Retention(keep_last=None))
    run.save(3, 4)
    again = OneRun(two_uploaded)
    again.upload()  # no checkpoint was taken by this process yet
    assert complete(again.remote) == [4, 3, 2, 1]


def test_other_checkpoint_of_the_same_name_is_not_overwritten(two_uploaded: Path, tmp_path: Path) -> None:
    other = OneRun(tmp_path / "other")
    other.save(2, metrics={"loss": 5.0})
    with pytest.raises(RemoteError, match="has written it meanwhile"):
        other.remote.upload_checkpoint(CheckpointReader(other.directory).find(2), set())
    assert step_of(CheckpointReader(other.directory).load(2).state) == 2
    assert fetched_step(tmp_path / "fresh") == 2


def test_logs_end_with_a_whole_line(tmp_path: Path) -> None:
    run = OneRun(tmp_path / "run")
    (run.directory / "events.jsonl").write_text('{"a":1}\n{"b":')
    (run.directory / "plots").mkdir()
    (run.directory / "plots" / "loss.png").write_bytes(b"\x89PNG")
    run.upload()
    assert run.remote.read("events.jsonl") == b'{"a":1}\n'
    assert run.remote.read("plots/loss.png") == b"\x89PNG"


# Whole runs ----------------------------------------------------------------------------------------


def a_run(
    directory: Path, remote_dir: Any, *callbacks: Callback, resume: Any = None, **knobs: Any
) -> tuple[RunResult, Recorder, dict[str, Any]]:
    recorder = Recorder()
    knobs = {"run_name": "run", "run_dir": str(directory), "remote_dir": remote_dir, **knobs}
    model = tiny_model(dropout=0.3)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        callbacks=[recorder, MetricLogger(every_n_steps=1), *callbacks],
        **knobs,
    )
    loader = DataLoader(tiny_loader(6).dataset, batch_size=4, shuffle=True)
    result = trainer.train(loader, epochs=3, resume=resume)
    return result, recorder, {name: each.clone() for name, each in trainer.model.state_dict().items()}


def test_run_goes_on_bit_for_bit_on_a_machine_that_has_nothing(tmp_path: Path) -> None:
    remote = (tmp_path / "remote").as_uri()
    _, whole, weights = a_run(tmp_path / "whole", None, ModelCheckpoint(every_n_steps=4), seed=3)
    _, first, _ = a_run(tmp_path / "first", remote, ModelCheckpoint(every_n_steps=4), Cut(9), seed=3)
    # One that is replaced before its turn came need not be copied; the newest always is, and goes first.
    uploaded = {event.uploaded_step for event in first.of(CheckpointUploaded)}
    assert first.of(CheckpointSaved)[-1].saved_step in uploaded
    assert first.names()[-1] == "TrainEnd"
    shutil.rmtree(tmp_path / "first")
    result, second, resumed = a_run(
        tmp_path / "second", remote, ModelCheckpoint(every_n_steps=4), resume="auto", seed=4
    )
    assert result.steps == 18
    assert all(bool((weights[name] == resumed[name]).all()) for name in weights)
    (start,) = second.of(TrainStart)
    assert (start.attempt, start.step) == (1, 9)
    assert second.of(Resumed)[0].exactness == "bitwise"

    def steps(events: Any) -> Any:
        return [each for each in reproducible(events) if each[0] in ("StepEnd", "EpochEnd")]

    expected = steps(whole.events)
    for directory in (tmp_path / "second" / "run", tmp_path / "remote" / "run"):
        assert steps(read_events(directory)) == expected  # the log of the first machine came along
        assert len((directory / "metrics.csv").read_text().splitlines()) == 1 + 18 + 3
    assert isinstance(list(read_events(tmp_path / "remote" / "run"))[-1], TrainEnd)
    assert b'"status": "completed"' in (tmp_path / "remote" / "run" / "run.json").read_bytes()


class Shows(Callback):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        run.publish(TextSample("code", f"{event.epoch} " + "long " * 10_000))
        run.publish(PictureSample("digits", torch.full((2, 2), event.epoch, dtype=torch.uint8)))


def test_pictures_and_long_texts_come_along(tmp_path: Path) -> None:
    remote = (tmp_path / "remote").as_uri()
    a_run(tmp_path / "first", remote, Shows(), ModelCheckpoint(every_n_steps=4), Cut(9), seed=3)
    shutil.rmtree(tmp_path / "first")
    # What somebody else has put there stays there.
    (tmp_path / "remote" / "run" / "samples" / "other.png").write_text("no sample")
    a_run(tmp_path / "second", remote, Shows(), ModelCheckpoint(every_n_steps=4), resume="auto", seed=4)
    for directory in (tmp_path / "second" / "run", tmp_path / "remote" / "run"):
        events = list(read_events(directory))
        texts = [event.read(directory) for event in events if isinstance(event, TextSample)]
        assert [each[0] for each in texts] == ["0", "1", "2"]
        pictures = [event.picture.read(directory) for event in events if isinstance(event, PictureSample)]
        assert len(set(pictures)) == 3
    assert not (tmp_path / "second" / "run" / "samples" / "other.png").exists()


def test_machine_that_fell_behind_takes_over_what_another_has_done(tmp_path: Path) -> None:
    a_run(tmp_path / "a", URL, Cut(4), seed=3)
    a_run(tmp_path / "b", URL, Cut(8), resume="auto")
    _, back, _ = a_run(tmp_path / "a", URL, resume="auto")
    assert [(each.attempt, each.step) for each in back.of(TrainStart)] == [(2, 8)]


def test_what_is_newer_here_is_not_fetched(tmp_path: Path) -> None:
    a_run(tmp_path, URL, Cut(4), seed=3)
    before = dict(FaultyStore.store)
    a_run(tmp_path, URL, Cut(8), resume="auto")
    FaultyStore.store.clear()
    FaultyStore.store.update(before)  # as if the store had been away
    _, back, _ = a_run(tmp_path, URL, Cut(9), resume="must")
    assert [each.step for each in back.of(TrainStart)] == [8]
    assert complete(RemoteRun(URL, "run")) == [9, 8]  # what it had missed is there now


def test_new_run_of_a_name_that_is_taken_there_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path / "a", URL, Cut(2))
    with pytest.raises(RunNameTakenError, match="faulty://bucket/runs/run"):
        a_run(tmp_path / "b", URL)
    assert not (tmp_path / "b" / "run").exists()


def test_run_that_is_going_on_here_is_left_alone_there(tmp_path: Path) -> None:
    a_run(tmp_path, URL, Cut(2))
    before = RemoteRun(URL, "run").read("run.json")
    with CheckpointStore(tmp_path / "run"), pytest.raises(RunLockedError):
        a_run(tmp_path, URL, resume="auto")
    assert RemoteRun(URL, "run").read("run.json") == before


def test_auto_begins_a_run_that_is_nowhere_and_one_without_a_checkpoint(tmp_path: Path) -> None:
    result, first, _ = a_run(tmp_path / "a", URL, resume="auto")
    assert (result.steps, first.of(TrainStart)[0].attempt) == (18, 0)
    assert complete(RemoteRun(URL, "run")) == []  # no callback took one
    result, second, _ = a_run(tmp_path / "b", URL, resume="auto")
    assert (result.steps, second.of(TrainStart)[0].attempt) == (18, 1)
    with pytest.raises(CheckpointNotFoundError):
        a_run(tmp_path / "c", URL, resume="must", run_name="nowhere")


def test_failing_store_is_an_event_and_a_log_record_and_no_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Outage(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                FaultyStore.begin(0, "fail forever")

    remote = RemoteDirectory(URL, timeout=0.2)
    result, recorder, _ = a_run(tmp_path, remote, Outage(), ModelCheckpoint())
    assert result.status == "completed"
    errors = [each.error for each in recorder.of(UploadFailed)]
    assert "the network is away" in errors[0]
    assert sum("were not uploaded in time" in error for error in errors) == 1
    assert recorder.names()[-1] == "TrainEnd"
    assert recorder.of(CheckpointSaved) and not recorder.of(CheckpointUploaded)
    assert any("step-000000018-a0" in record.getMessage() for record in caplog.records)


def test_failing_store_ends_the_run_if_that_is_asked_for(tmp_path: Path) -> None:
    class Outage(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                FaultyStore.begin(0, "fail forever")
                point.run.checkpoint_nowait()

    with pytest.raises(RemoteError, match="the network is away") as caught:
        a_run(tmp_path, RemoteDirectory(URL, on_error="raise", timeout=30.0), Outage())
    assert any("step" in note for note in caught.value.__notes__)


def test_store_that_hangs_holds_neither_training_nor_the_end(tmp_path: Path) -> None:
    class Hang(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                FaultyStore.begin(0, "hang")
                point.run.checkpoint_nowait()

    try:
        result, recorder, _ = a_run(tmp_path, RemoteDirectory(URL, timeout=0.1), Hang(), ModelCheckpoint())
        assert not FaultyStore.is_free.is_set()  # it hangs still
    finally:
        FaultyStore.is_free.set()
    assert (result.status, result.steps) == ("completed", 18)
    assert "were not uploaded in time" in recorder.of(UploadFailed)[-1].error


def test_store_that_does_not_take_the_first_file_ends_the_run_before_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FaultyStore.begin(0, "fail forever")
    with pytest.raises(RemoteError, match="the network is away"):
        a_run(tmp_path, URL)
    FaultyStore.begin(0, "hang")
    monkeypatch.setattr(uploads_module, "CLAIM_TIMEOUT", 0.1)
    try:
        with pytest.raises(RemoteError, match="did not answer"):
            a_run(tmp_path, URL)
    finally:
        FaultyStore.is_free.set()
    assert not (tmp_path / "run").exists()


@pytest.mark.anyio
async def test_async_runs_fetch_beside_the_event_loop(tmp_path: Path) -> None:
    name = f"run-{len(FaultyStore.store)}"

    def a_trainer(directory: str, *callbacks: Callback) -> Any:
        return tiny_trainer(
            run_dir=str(tmp_path / directory), run_name=name, remote_dir=URL, callbacks=[*callbacks]
        )

    with anyio.fail_after(60):
        await a_trainer("a", Cut(2)).train_async(tiny_loader(3), epochs=3)
        await a_trainer("b", Cut(4)).train_async(tiny_loader(3), epochs=3, resume="auto")
        async with a_trainer("c").start(tiny_loader(3), epochs=3, resume="auto") as run:
            pass
    assert (run.result.steps, run.result.status) == (9, "completed")
    assert next(iter(read_events(run.dir))).resumed_from is None  # type: ignore[attr-defined]  # a TrainStart
    starts = [each for each in read_events(run.dir) if isinstance(each, TrainStart)]
    assert [(each.attempt, each.step) for each in starts] == [(0, 0), (1, 2), (2, 4)]


UPLOADER = """
import os, sys
from fsspec.implementations.local import LocalFileSystem
from offloop.callbacks import MetricLogger, ModelCheckpoint
from offloop.engine import Trainer
from offloop.engine.testing import tiny_loader, tiny_model
import torch
from torch.utils.data import DataLoader

torch.set_num_threads(1)  # as in the tests: another number is another machine
last = sys.argv[3]
count = 0

def put_file(self, source, target, **_):
    global count
    name = os.path.basename(target).removeprefix(".").removesuffix(".uploading")
    count += name == last
    with open(source, "rb") as file:
        content = file.read()
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        if name == last and count == 2:
            print(name, flush=True)
            sys.stdin.read()  # until we are killed
        file.write(content[len(content) // 2 :])

LocalFileSystem.put_file = put_file
model = tiny_model(dropout=0.3)
trainer = Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss=torch.nn.functional.cross_entropy,
    device="cpu", seed=3, run_name="run", run_dir=sys.argv[1], remote_dir=sys.argv[2],
    callbacks=[ModelCheckpoint(every_n_steps=2), MetricLogger(every_n_steps=1)],
)
loader = DataLoader(tiny_loader(6).dataset, batch_size=4, shuffle=True)
trainer.train(loader, epochs=3)
print("done", flush=True)
"""


@pytest.mark.slow
def test_kill_while_uploading_leaves_a_run_that_goes_on_bit_for_bit(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    script = tmp_path / "script.py"
    script.write_text(UPLOADER)
    files = ("model.safetensors", "MANIFEST.json")  # the second one of the run
    for file in files:
        arguments = str(tmp_path / f"first-{file}"), (tmp_path / f"remote-{file}").as_uri(), file
        with warm_python.start(script, *arguments) as child:  # it is killed at the end of the block
            assert child.stdout.readline().strip() == file
    _, _, weights = a_run(tmp_path / "whole", None, ModelCheckpoint(every_n_steps=2), seed=3)
    for file in files:
        remote = (tmp_path / f"remote-{file}").as_uri()
        result, second, resumed = a_run(
            tmp_path / f"second-{file}", remote, ModelCheckpoint(every_n_steps=2), resume="auto", seed=3
        )
        assert result.steps == 18
        assert second.of(Resumed)[0].exactness == "bitwise"
        assert all(bool((weights[name] == resumed[name]).all()) for name in weights)


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"run_dir": "s3://bucket/runs"}, "run_dir must be a local directory.*remote_dir='s3://bucket/runs'"),
        ({"remote_dir": "bucket/runs"}, "remote_dir must be a URL like s3://bucket/runs.*got 'bucket/runs'"),
        ({"remote_dir": "ftp://me:secret@host/runs"}, "remote_dir contains a password: .*storage_options"),
        ({"remote_dir": 3}, "remote_dir must be a URL"),
    ],
)
def test_wrong_place_is_refused_at_once(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TrainerConfig(**knobs)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"timeout": 0}, "timeout must be a finite number of seconds above 0, got 0"),
        ({"on_error": "stop"}, "on_error must be 'isolate' or 'raise', got 'stop'"),
        ({"storage_options": "x"}, "storage_options must be a dict"),
    ],
)
def test_wrong_options_are_refused_at_once(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RemoteDirectory(URL, **values)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket/runs", "s3:// needs s3fs: pip install s3fs"),
        ("gs://bucket/runs", "gs:// needs gcsfs: pip install gcsfs"),
        ("nowhere://bucket", "fsspec knows no nowhere://"),
    ],
)
def test_missing_package_is_named_before_a_run(
    url: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=text):
        a_run(tmp_path, url)
    assert not any(tmp_path.iterdir())


def test_missing_fsspec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'offloop\[remote\]'"):
        a_run(tmp_path, URL)


def test_resume_from_a_remote_directory_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs run_name"):
        a_run(tmp_path, URL, resume="auto", run_name=None)
    with pytest.raises(ConfigError, match="give Trainer\\(remote_dir"):
        a_run(tmp_path, URL, resume=f"{URL}/run")


def test_secrets_of_the_store_are_written_nowhere(tmp_path: Path) -> None:
    remote = RemoteDirectory(URL, storage_options={"key": "SECRET"})
    assert "SECRET" not in repr(remote)
    a_run(tmp_path, remote, ModelCheckpoint())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [each.getvalue() for each in FaultyStore.store.values() if isinstance(each, io.BytesIO)]
    assert any(URL.encode() in content for content in written)
    assert not any(b"SECRET" in content for content in written)
