"""A resumed run goes on bit for bit: cut at every step, killed at random, resumed again and again.

python -m pytest tests/engine/recovery/test_resume_plan.py -m soak      every cut with loader workers too, half a minute
"""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from interruptions import Cut
from torch.utils.data import DataLoader

from offloop.callbacks import (
    EarlyStopping,
    LearningRateScheduler,
    MetricLogger,
    ModelCheckpoint,
    WeightAverage,
)
from offloop.engine import (
    Callback,
    CheckpointFailed,
    CheckpointSaved,
    ConfigError,
    Event,
    Metrics,
    Resumed,
    RunResult,
    StepEnd,
    StepPoint,
    Trainer,
    TrainStart,
    WeightsMismatchError,
    decides,
    in_step,
    read_events,
)
from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointStore,
    DirectoryLock,
    DiskFullError,
    RunLockedError,
)
from offloop.engine.recovery.resume_plan import ResumePlan, plan_resume
from offloop.engine.testing import (
    EndlessLoader,
    Recorder,
    reproducible,
    tiny_batches,
    tiny_loader,
    tiny_trainer,
)
from offloop.engine.training.optimizer_state import load_optimizer

STEPS = 15  # three epochs of nine batches, two to a step


class Counter(Callback):
    """A step hook with a state of its own."""

    def __init__(self) -> None:
        self.seen = 0

    def reset(self) -> None:
        self.seen = 0

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.seen += 1
        point.log("seen", float(self.seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def a_run(
    directory: Path,
    name: str,
    *callbacks: Callback,
    resume: str | int | None = None,
    workers: int = 0,
    epochs: int = 3,
    **knobs: Any,
) -> tuple[RunResult, list[Event], dict[str, torch.Tensor]]:
    """A run with everything that has a state: dropout, batch norm, AdamW, schedule, average, accumulation, metrics."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3)
    )
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.02),
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        run_dir=str(directory),
        run_name=name,
        accumulate_grad_batches=2,
        **knobs,
    )
    loader = DataLoader(tiny_loader(9).dataset, batch_size=4, shuffle=True, num_workers=workers)
    recorder = Recorder()
    torch.manual_seed(999 if resume == "must" else 11)  # a run that goes on must not need the seed
    result = trainer.train(
        loader,
        tiny_loader(3, seed=4),
        epochs=epochs,
        metrics=["accuracy"],
        callbacks=[
            recorder,
            LearningRateScheduler("one_cycle", max_lr=0.05),
            EarlyStopping(patience=50),
            WeightAverage(decay=0.8),
            Counter(),
            *callbacks,
        ],
        resume=resume,
    )
    return result, recorder.events, {name: each.clone() for name, each in model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_rest(whole: list[Event], rest: list[Event]) -> None:
    """The events after the cut are those of the uninterrupted run."""
    of_rest = [each for each in reproducible(rest) if each[0] not in ("TrainStart", "Resumed")]
    assert of_rest
    assert reproducible(whole)[-len(of_rest) :] == of_rest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return a_run(tmp_path_factory.mktemp("whole"), "whole")


@pytest.mark.parametrize("cut", range(1, STEPS + 1))
def test_run_cut_at_any_step_goes_on_bit_for_bit(cut: int, tmp_path: Path, uninterrupted: Any) -> None:
    result, events, weights = uninterrupted
    stopped, _, _ = a_run(tmp_path, "cut", Cut(cut))
    assert (stopped.status, stopped.steps) == ("stopped", cut)
    resumed, rest, resumed_weights = a_run(tmp_path, "cut", Cut(-1), resume="must")
    assert_same_weights(weights, resumed_weights)
    assert_same_rest(events, rest)
    assert resumed.metrics == result.metrics
    assert [end.metrics for end in resumed.history] == [end.metrics for end in result.history]
    assert [event.exactness for event in rest if isinstance(event, Resumed)] == ["bitwise"]
    (start,) = [event for event in rest if isinstance(event, TrainStart)]
    assert (start.attempt, start.step) == (1, cut)


@pytest.mark.parametrize(
    "cut",
    [pytest.param(cut, marks=() if cut in (3, 5, 8) else pytest.mark.soak) for cut in range(1, STEPS + 1)],
)
def test_run_with_loader_workers_goes_on_in_the_same_order(
    cut: int, tmp_path: Path, uninterrupted: Any
) -> None:
    _, events, weights = uninterrupted
    a_run(tmp_path, "cut", Cut(cut), workers=2)
    _, rest, resumed_weights = a_run(tmp_path, "cut", Cut(-1), resume="must", workers=2)
    assert_same_weights(weights, resumed_weights)
    assert_same_rest(events, rest)
    (resumed,) = [event for event in rest if isinstance(event, Resumed)]
    assert resumed.exactness == "bitwise", "tensors draw nothing in workers"


@pytest.mark.parametrize("every", [2, 3])
def test_checkpoints_at_validations_between_steps_go_on_bit_for_bit(every: int, tmp_path: Path) -> None:
    whole, events, weights = a_run(tmp_path, "whole", val_every_n_steps=every)
    for cut in range(1, 8):
        a_run(tmp_path, f"cut{cut}", Cut(cut), val_every_n_steps=every)
        result, rest, resumed_weights = a_run(
            tmp_path, f"cut{cut}", Cut(-1), resume="must", val_every_n_steps=every
        )
        assert_same_weights(weights, resumed_weights)
        assert_same_rest(events, rest)
        assert result.metrics == whole.metrics


class CancelInWindow(Callback):
    """Cancels between two batches of one step."""

    def __init__(self) -> None:
        self.batches = 0

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        self.batches += 1
        if self.batches == 7:  # the first of two for step 4
            point.run.cancel("in the middle of a step")


def test_run_cancelled_between_two_batches_of_a_step_goes_on_bit_for_bit(
    tmp_path: Path, uninterrupted: Any
) -> None:
    """What the half step had summed up is lost: a checkpoint of that moment would leave its batches out."""
    _, _, weights = uninterrupted
    cancelled, _, _ = a_run(tmp_path, "cut", ModelCheckpoint(every_n_steps=2), CancelInWindow())
    assert (cancelled.status, cancelled.steps) == ("cancelled", 3)
    _, rest, resumed_weights = a_run(tmp_path, "cut", ModelCheckpoint(every_n_steps=2), resume="must")
    assert_same_weights(weights, resumed_weights)
    (start,) = [event for event in rest if isinstance(event, TrainStart)]
    assert (start.step, start.batch) == (2, 4)


def test_resume_of_a_resume_of_a_resume(tmp_path: Path, uninterrupted: Any) -> None:
    result, events, weights = uninterrupted
    a_run(tmp_path, "run", Cut(2))
    for cut in (4, 7, 9, 13):
        a_run(tmp_path, "run", Cut(cut), resume="must")
    resumed, rest, resumed_weights = a_run(tmp_path, "run", Cut(-1), resume="must")
    assert_same_weights(weights, resumed_weights)
    assert_same_rest(events, rest)
    assert resumed.metrics == result.metrics
    (start,) = [event for event in rest if isinstance(event, TrainStart)]
    assert start.attempt == 5


def test_files_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    a_run(tmp_path, "whole", MetricLogger(every_n_steps=1))
    a_run(tmp_path, "cut", MetricLogger(every_n_steps=1), ModelCheckpoint(every_n_steps=6, keep_last=None))
    # The run is complete, and goes on from a checkpoint in its middle: what came after that is cut
    a_run(tmp_path, "cut", MetricLogger(every_n_steps=1), ModelCheckpoint(every_n_steps=6), resume=6)
    ours = {"Resumed", "CommandApplied", "TrainStart"}

    def said(name: str) -> list[Any]:
        return [each for each in reproducible(read_events(tmp_path / name)) if each[0] not in ours]

    def rows(name: str) -> list[str]:
        lines = (tmp_path / name / "metrics.csv").read_text().splitlines()
        return [",".join(line.split(",")[2:]) for line in lines]  # without time and attempt

    assert said("cut") == said("whole")
    assert rows("cut") == rows("whole")


@pytest.mark.anyio
async def test_checkpoint_command_returns_when_it_is_durable(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    with anyio.fail_after(60):
        async with trainer.start(EndlessLoader(), max_time=1e6) as run:
            saved = await run.checkpoint()
            assert isinstance(saved, CheckpointSaved)
            assert CheckpointReader(tmp_path / "run").find("last").path == Path(saved.path)
            await run.stop()


def test_failed_checkpoint_does_not_end_training(tmp_path: Path) -> None:
    class Hopeless(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"model": object()}

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 2:
                self.future = point.run.checkpoint_nowait()

    recorder, hopeless = Recorder(), Hopeless()
    result = tiny_trainer(run_dir=str(tmp_path)).train(
        tiny_loader(), epochs=1, callbacks=[recorder, hopeless]
    )
    assert result.status == "completed"
    (failed,) = recorder.of(CheckpointFailed)
    assert "callbacks.Hopeless.model" in failed.error
    assert "UnserializableStateError" in str(type(hopeless.future.exception()))


def test_a_callback_that_cannot_tell_its_state_fails_the_checkpoint_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgets(Callback):
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("what was it")

        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 2:
                point.run.checkpoint_nowait()  # and nobody looks at the answer

    recorder = Recorder()
    tiny_trainer(run_dir=tmp_path).train(tiny_loader(), epochs=1, callbacks=[recorder, Forgets()])
    (failed,) = recorder.of(CheckpointFailed)
    assert (failed.saved_step, failed.error) == (2, "KeyError: 'what was it'")
    assert "the checkpoint of step 2 was not saved" in caplog.text


def test_second_trainer_on_the_directory_of_a_run_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    class Second(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 2:
                self.saved = point.run.checkpoint_nowait()

        @decides
        def on_epoch_end(self, event: Any, run: Any) -> None:
            assert self.saved.result(timeout=30).saved_step == 2
            second = tiny_trainer(run_dir=str(tmp_path), run_name="run")
            with pytest.raises(ConfigError, match="is training in this process already"):
                second.train(tiny_loader(), epochs=5, resume="must")
            with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):  # as in another process
                CheckpointStore(tmp_path / "run")
            refused.append(run.id)

    result = tiny_trainer(run_dir=str(tmp_path), run_name="run").train(
        tiny_loader(), epochs=2, callbacks=[ModelCheckpoint(every_n_steps=4), Second()]
    )
    assert refused == ["run", "run"]
    assert (result.status, result.steps) == ("completed", 16)
    steps = [event.step for event in read_events(tmp_path / "run") if isinstance(event, StepEnd)]
    assert steps == list(range(1, 17)), "what the first one writes is not touched"
    second = tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(), epochs=3, resume="must")
    assert second.steps == 24  # free again


def test_run_that_has_not_saved_yet_is_not_begun_a_second_time(tmp_path: Path) -> None:
    """It has no store and no checkpoint then, so that `resume="auto"` elsewhere would begin it afresh."""
    refused: list[str] = []

    class Second(Callback):
        @decides
        def on_epoch_end(self, event: Any, run: Any) -> None:
            assert plan_resume("auto", tmp_path, "run") == ResumePlan(tmp_path / "run", None, 1)
            with pytest.raises(RunLockedError, match="is being written by another run"):
                DirectoryLock(tmp_path / "run")
            refused.append(run.id)

    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(), epochs=1, callbacks=[Second()])
    assert refused == ["run"]
    held = DirectoryLock(tmp_path / "run")  # free again; now as if another process had it
    written = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunLockedError):
        tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(), epochs=1, resume="auto")
    assert (tmp_path / "run" / "run.json").read_bytes() == written
    held.release()
    tiny_trainer(run_dir=str(tmp_path), run_name="run").train(tiny_loader(), epochs=1, resume="auto")


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"precision": "bf16-mixed"}, "precision was 32-true, now it is bf16-mixed"),
        ({"deterministic": True}, "deterministic was False, now it is True"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val was None, now it is 1.0"),
        ({"limit_train_batches": 8}, "limit_train_batches was None, now it is 8"),
    ],
)
def test_run_resumed_with_other_arithmetic_says_so(
    knobs: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    a_run(tmp_path, "cut", Cut(4))
    _, rest, _ = a_run(tmp_path, "cut", resume="must", **knobs)
    (resumed,) = [event for event in rest if isinstance(event, Resumed)]
    assert resumed.exactness == "approximate"
    assert reason in resumed.reasons


def test_full_disk_does_not_end_training_and_the_next_save_works(tmp_path: Path) -> None:
    """On a real file system of four megabytes, where this machine lets us mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a file system")
    ballast = mount / "ballast"

    class FillThenFree(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step == 3:
                self.before = point.run.checkpoint_nowait()
            if point.step == 4:
                self.before.result(timeout=30)
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
                os.truncate(ballast, ballast.stat().st_size - 5 * 4096)  # for the log
                self.full = point.run.checkpoint_nowait()
            if point.step == 8:
                assert isinstance(self.full.exception(timeout=30), DiskFullError)
                ballast.unlink()
                self.free = point.run.checkpoint_nowait()

    callback, recorder = FillThenFree(), Recorder()
    try:
        result, _, _ = a_run(
            mount, "run", ModelCheckpoint(every_n_steps=3, save_last=False), callback, recorder
        )
        assert (result.status, result.steps) == ("completed", STEPS)
        failed = {event.saved_step for event in recorder.of(CheckpointFailed)}
        assert {4} <= failed <= set(range(4, 9))
        assert callback.free.result(timeout=30).saved_step == 8
        assert CheckpointReader(mount / "run").damaged() == []
        resumed, _, _ = a_run(mount, "run", resume="must")
        assert resumed.steps == STEPS
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("cut", [3, 8])  # inside an epoch, and at its end
@pytest.mark.parametrize(
    ("loader", "reasons"),
    [
        (tiny_loader(4, batch_size=8), "batches was 8, now it is 4; batch_size was 4, now it is 8"),
        (tiny_loader(9), "samples was 32, now it is 36; batches was 8, now it is 9"),
        (
            tiny_batches(8),
            "samples was 32, now it is None; batch_size was 4, now it is None; "
            "loader was DataLoader, now it is list",
        ),
    ],
)
def test_run_resumed_with_another_loader_says_so(loader: Any, reasons: str, cut: int, tmp_path: Path) -> None:
    def train(loader: Any, *callbacks: Callback, resume: str | None = None) -> RunResult:
        trainer = tiny_trainer(run_dir=tmp_path, run_name="run", callbacks=[ModelCheckpoint(), *callbacks])
        return trainer.train(loader, epochs=2, resume=resume)

    train(tiny_loader(8), Cut(cut))
    recorder = Recorder()
    assert train(loader, recorder, resume="must").status == "completed"
    (resumed,) = recorder.of(Resumed)
    assert (resumed.exactness, resumed.reasons) == ("approximate", reasons)


def test_state_of_another_machine_is_no_longer_called_bitwise(tmp_path: Path) -> None:
    a_run(tmp_path, "cut", Cut(4))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        _, rest, _ = a_run(tmp_path, "cut", resume="must")
    finally:
        torch.set_num_threads(threads)
    (resumed,) = [event for event in rest if isinstance(event, Resumed)]
    assert resumed.exactness == "approximate"
    assert f"threads was {threads}, now it is {threads + 1}" in resumed.reasons


def test_state_of_another_torch_is_no_longer_called_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path, "cut", Cut(4))
    here = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "99.0")
    _, rest, _ = a_run(tmp_path, "cut", resume="must")
    (resumed,) = [event for event in rest if isinstance(event, Resumed)]
    assert resumed.exactness == "approximate"
    assert f"torch was {here}, now it is 99.0" in resumed.reasons


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("file", ["MANIFEST.json", "model.safetensors"])
def test_run_whose_checkpoints_are_all_damaged_is_not_begun_afresh(
    file: str, named: bool, tmp_path: Path
) -> None:
    """Also by those who try again: the damaged ones are set aside by then."""
    a_run(tmp_path, "cut", Cut(4))
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        (path / file).write_bytes(b"not what was written")
    log = (tmp_path / "cut" / "events.jsonl").read_bytes()
    for _ in range(3):
        trainer = tiny_trainer(run_dir=tmp_path, run_name="cut" if named else None)
        with pytest.raises(CheckpointError, match="damaged"):
            trainer.train(tiny_loader(), epochs=3, resume="auto")
    assert log in (tmp_path / "cut" / "events.jsonl").read_bytes()


def test_state_of_another_model_is_refused_and_the_text_says_what_to_do(tmp_path: Path) -> None:
    a_run(tmp_path, "cut", Cut(4))
    text = r"unexpected \(5\): 1.weight.*\n.*init_from=\".*step-000000004-a0\", init_strict=False"
    with pytest.raises(WeightsMismatchError, match=text):
        tiny_trainer(run_dir=str(tmp_path), run_name="cut").train(tiny_loader(), epochs=3, resume="must")


@pytest.mark.parametrize(
    ("before", "now", "cut", "said"),
    [
        (["accuracy"], ["accuracy", "f1_score"], 3, ("metric f1_score is new",)),
        (["accuracy"], ["accuracy", "f1_score"], 8, ("metric f1_score is new",)),
        ([], ["accuracy"], 3, ("metric accuracy is new",)),
        (["accuracy", "recall"], ["recall"], 3, ("metric accuracy is no longer computed",)),
        (["accuracy"], [], 3, ("metric accuracy is no longer computed",)),
    ],
)
def test_metrics_may_come_and_go_at_a_resume(
    before: list[str], now: list[str], cut: int, said: Any, tmp_path: Path
) -> None:
    def train(metrics: list[str], *callbacks: Callback, resume: str | None = None) -> RunResult:
        trainer = tiny_trainer(run_dir=tmp_path, run_name="run")
        return trainer.train(tiny_batches(8), epochs=2, metrics=metrics, callbacks=callbacks, resume=resume)

    train(before, Cut(cut))
    recorder = Recorder()
    result = train(now, recorder, resume="must")
    assert result.steps == 16
    (resumed,) = recorder.of(Resumed)
    assert resumed.from_script == said
    is_partial = "is new" in said[0]
    assert resumed.exactness == ("approximate" if is_partial else "bitwise")
    assert ("lacks the first batches of this epoch" in resumed.reasons) is is_partial
    whole = tiny_trainer().train(tiny_batches(8), epochs=2, metrics=now)
    assert result.history[-1].metrics == whole.history[-1].metrics  # of an epoch that was whole
    kept = {f"train_{name}" for name in now if name in before}
    assert {key: result.history[0].metrics[key] for key in kept} == {
        key: whole.history[0].metrics[key] for key in kept
    }


def test_state_of_another_optimizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """torch would take it, and fail in the middle of a step."""

    def train(kind: Any, *callbacks: Callback, resume: str | None = None) -> RunResult:
        trainer = tiny_trainer(run_dir=tmp_path, run_name="run", callbacks=[ModelCheckpoint(), *callbacks])
        trainer.optimizers = {"optimizer": kind(trainer.model.parameters(), lr=0.01)}
        return trainer.train(tiny_loader(), epochs=2, resume=resume)

    train(torch.optim.AdamW, Cut(3))
    recorder = Recorder()
    with pytest.raises(ConfigError, match=r"another optimizer: SGD needs dampening, momentum.*init_from="):
        train(torch.optim.SGD, recorder, resume="must")
    assert recorder.names() == ["TrainEnd"]
    train(torch.optim.Adam, recorder, resume="must")  # its state fits
    (resumed,) = recorder.of(Resumed)
    assert resumed.reasons == "optimizer was AdamW, now it is Adam"


def test_optimizer_state_keeps_its_dtype() -> None:
    """torch casts it to the parameters' dtype: fp32 moments of bf16 weights would lose bits."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moments = torch.tensor([1.0001, 2.0002, 3.0003])
    saved = {
        "state": {0: {"step": torch.tensor(4.0), "exp_avg": moments, "exp_avg_sq": moments * 2}},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    load_optimizer(optimizer, saved)
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], moments)
    assert torch.equal(state["exp_avg_sq"], moments * 2)
    assert state["step"] == 4


def test_resume_finds_the_run_that_is_meant(tmp_path: Path) -> None:
    assert plan_resume(None, tmp_path, None) is None
    assert plan_resume("never", tmp_path, "x") is None
    assert plan_resume("auto", tmp_path, None) is None
    assert plan_resume("auto", tmp_path, "x") is None
    for wanted in ("must", "last", "best", "v1"):
        with pytest.raises(CheckpointNotFoundError):
            plan_resume(wanted, tmp_path, "x")
        with pytest.raises(CheckpointNotFoundError):
            plan_resume(wanted, tmp_path, None)
    for wrong in ("", True, 1.5):
        with pytest.raises(ConfigError, match="resume must be"):
            plan_resume(wrong, tmp_path, None)  # type: ignore[arg-type]  # what a user may try

    a_run(tmp_path, "cut", Cut(4))
    a_run(tmp_path, "complete", ModelCheckpoint())
    plan = plan_resume("auto", tmp_path, None)
    assert plan is not None
    assert plan.directory.name == "cut", "the newest unfinished one, not the newest"
    assert (plan.which, plan.attempt) == ("last", 1)
    (checkpoint,) = CheckpointReader(tmp_path / "cut").checkpoints()
    by_path = plan_resume(str(checkpoint.path), tmp_path / "elsewhere", None)
    assert by_path is not None
    assert (by_path.directory, by_path.which) == (tmp_path / "cut", checkpoint.path)
    whole_run = plan_resume(tmp_path / "cut", tmp_path / "elsewhere", None)
    assert whole_run is not None
    assert (whole_run.directory, whole_run.which) == (tmp_path / "cut", "last")


def test_run_without_a_checkpoint_begins_afresh_under_its_name(tmp_path: Path) -> None:
    a_run(tmp_path, "run", epochs=1)
    result, events, _ = a_run(tmp_path, "run", epochs=1, resume="auto")
    assert result.steps == 5
    (start,) = [event for event in events if isinstance(event, TrainStart)]
    assert (start.attempt, start.step) == (1, 0)
    steps = [event for event in read_events(tmp_path / "run") if isinstance(event, StepEnd)]
    assert len(steps) == 5, "what the first attempt wrote is cut"


def test_checkpoint_without_a_directory_is_an_error_that_says_how() -> None:
    class Save(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Any) -> None:
            with pytest.raises(ConfigError, match="run_dir"):
                run.checkpoint_nowait()

    tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Save()])


def test_best_on_disk_is_the_best_of_the_result(tmp_path: Path) -> None:
    result, _, _ = a_run(tmp_path, "run", ModelCheckpoint(save_best_only=True))
    assert result.best is not None
    best = CheckpointReader(tmp_path / "run").find("best")
    assert result.best.path == str(best.path)
    assert best.metrics["val_loss"] == result.best.score
    assert isinstance(result.metrics, Metrics)


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ("atuo", "there is: no checkpoint; did you mean 'auto'?"),
        ("bset", "did you mean 'best'?"),
        ("must", 'resume="must" needs an unfinished run with a checkpoint; resume="auto" starts a new run'),
    ],
)
def test_a_resume_that_leads_to_nothing_says_what_to_write(resume: str, words: str, tmp_path: Path) -> None:
    for name in (None, "run"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            tiny_trainer(run_dir=tmp_path, run_name=name).train(tiny_loader(), epochs=1, resume=resume)
        assert words in str(caught.value)
