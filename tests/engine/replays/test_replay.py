"""engine/replays: what callbacks get in a replay, and what comes of it, is what the recorded run gave."""

import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel
import msgspec
import numpy as np
import pytest

from offloop import EarlyStopping, MetricLogger, ModelCheckpoint, ProgressBar, ResourceMonitor
from offloop.engine import (
    Callback,
    CallbackFailed,
    ConfigError,
    EpochEnd,
    Event,
    EventLog,
    Metrics,
    PictureSample,
    Replay,
    ReplayedRun,
    ReplayResult,
    RunHandle,
    Sample,
    SetLearningRate,
    StepEnd,
    StepPoint,
    Stop,
    TextSample,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
    decides,
    encode,
    in_step,
    read_events,
    replay,
    replay_async,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

LONG: Final = 60.0


class Spread(Event, frozen=True):
    """Published by callbacks of these tests."""

    value: float


def stopper() -> EarlyStopping:
    return EarlyStopping("val_loss", patience=2, min_delta=0.02)


def logger_() -> MetricLogger:
    return MetricLogger(every_n_steps=3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that EarlyStopping has ended."""
    base = tmp_path_factory.mktemp("runs")
    result = tiny_trainer(run_dir=base, run_name="stopped", lr=0.5).train(
        tiny_loader(10), tiny_loader(4), epochs=100, callbacks=[stopper(), logger_()]
    )
    assert result.status == "stopped" and 3 <= result.epochs < 100
    return base / "stopped"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def end_of(run: Path) -> TrainEnd:
    end = list(read_events(run))[-1]
    assert isinstance(end, TrainEnd)
    return end


# What the run gave ---------------------------------------------------------------------------------


def check_as_the_run(result: ReplayResult, run: Path) -> None:
    end = end_of(run)
    assert result.stop is not None and isinstance(result.stop.command, Stop)
    assert (result.stop.by, result.stop.step, result.stop.command.reason) == (
        "EarlyStopping",
        end.step,
        end.reason,
    )
    assert result.stop.is_decision and isinstance(result.stop.event, ValidationEnd)
    assert result.commands == (result.stop,)
    assert (result.end, result.is_complete, result.step) == (end, True, end.step)
    assert (result.callback_errors, result.unknown, result.skipped, result.notes) == ({}, {}, 0, [])
    assert result.dir is not None
    for name in ("metrics.csv", "metrics.jsonl", "events.jsonl"):
        assert (result.dir / name).read_bytes() == (run / name).read_bytes(), name


def test_early_stopping_and_metric_logger_give_what_they_gave_in_the_run(
    recorded: Path, tmp_path: Path
) -> None:
    before = files_of(recorded)
    recorder = Recorder()
    result = replay(recorded, callbacks=[stopper(), logger_(), recorder], directory=tmp_path / "replay")
    check_as_the_run(result, recorded)
    assert recorder.events == list(read_events(recorded)) and recorder.is_closed
    assert result.events == len(recorder.events)
    assert result.dir == tmp_path / "replay"
    assert files_of(recorded) == before
    assert (
        repr(result).splitlines()[0]
        == f"<ReplayResult stopped: {result.events} events up to step {result.step}"
    )
    assert "EarlyStopping: stop(reason='val_loss did not improve in 2 checks" in repr(result)


@pytest.mark.anyio
async def test_the_async_form_gives_the_same_on_asyncio_and_trio(recorded: Path, tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        result = await replay_async(recorded, callbacks=[stopper(), logger_()], directory=tmp_path / "replay")
    check_as_the_run(result, recorded)


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_the_blocking_form_works_inside_an_event_loop(recorded: Path) -> None:
    assert replay(recorded, callbacks=[stopper()]).stop is not None


def test_other_arguments_tell_where_the_run_would_have_ended(recorded: Path) -> None:
    result = replay(recorded, callbacks=[EarlyStopping("val_loss", patience=1, min_delta=0.5)])
    assert result.stop is not None and result.stop.step < end_of(recorded).step
    # What comes next is recorded: it is asked again
    assert len(result.commands) > 1
    assert result.dir is None


def test_replaying_twice_gives_the_same(recorded: Path) -> None:
    patient = EarlyStopping("val_loss", patience=1, min_delta=0.5)
    first, second = (replay(recorded, callbacks=[patient]) for _ in range(2))
    assert first.commands == second.commands


# What callbacks see --------------------------------------------------------------------------------


class Sees(Callback):
    """Notes what the handle of the run says at each event."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, str]] = []
        self.metrics: dict[int, Metrics] = {}
        self.facts: dict[str, Any] = {}

    def on_event(self, event: Event, run: ReplayedRun) -> None:
        self.seen.append((type(event).__name__, run.step, run.epoch, run.state))
        self.metrics[event.seq] = run.metrics
        assert (run.step, run.epoch) == (event.step, event.epoch)
        if isinstance(event, TrainStart):
            self.facts = {
                "id": run.id,
                "is a handle": isinstance(run, RunHandle),
                "monitor": (run.monitor, run.default_monitor, run.direction_of("val_loss")),
                "over": run.is_over,
                "dir": run.dir,
            }


class SeesLater(Sees):
    """The same on the event loop."""

    async def on_event(self, event: Event, run: ReplayedRun) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        Sees.on_event(self, event, run)


@pytest.mark.parametrize("kind", [Sees, SeesLater])
def test_state_and_metrics_are_those_at_the_event(recorded: Path, kind: type[Sees]) -> None:
    sees = kind()
    result = replay(recorded, callbacks=[sees])
    assert result.callback_errors == {}
    events = list(read_events(recorded))
    states = {"ValidationStart": "validating", "StateChanged": "stopping"}
    now = "running"
    for event, seen in zip(events, sees.seen, strict=True):
        name = type(event).__name__
        now = states.get(name, "running" if name != "StepEnd" and now != "stopping" else now)
        now = "closing" if name == "TrainEnd" else now
        assert seen == (name, event.step, event.epoch, now)
    latest: dict[str, float] = {}
    for event in events:
        if isinstance(event, ValidationEnd | EpochEnd | TrainEnd):
            latest.update(event.metrics)
        assert sees.metrics[event.seq] == latest
    assert sees.facts == {
        "id": "stopped",
        "is a handle": True,
        "monitor": ("val_loss", "val_loss", "min"),
        "over": False,
        "dir": None,
    }


class Sums(Callback):
    """A decider whose observers share its state: in a thread, or on the event loop."""

    def __init__(self) -> None:
        self.starts = 0

    def on_validation_start(self, event: ValidationStart, run: RunHandle) -> None:
        self.starts += 1

    @decides
    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        assert threading.current_thread().name.startswith("offloop-replay")
        run.set_lr_nowait(float(self.starts))


class SumsLater(Callback):
    def __init__(self) -> None:
        self.starts = 0

    async def on_validation_start(self, event: ValidationStart, run: RunHandle) -> None:
        await anyio.lowlevel.checkpoint()
        self.starts += 1

    @decides
    async def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        await run.set_lr(float(self.starts))


@pytest.mark.parametrize("kind", [Sums, SumsLater])
def test_a_decider_is_asked_after_its_observers(recorded: Path, kind: type[Callback]) -> None:
    commands = replay(recorded, callbacks=[kind()]).commands
    validations = [event for event in read_events(recorded) if isinstance(event, ValidationEnd)]
    assert [(each.command, each.event, each.is_decision) for each in commands] == [
        (SetLearningRate(float(number)), event, True) for number, event in enumerate(validations, 1)
    ]


def test_deciders_are_asked_in_declared_order(recorded: Path) -> None:
    commands = replay(recorded, callbacks=[SumsLater(), Sums(), SumsLater()]).commands
    assert [each.by for each in commands[:3]] == ["SumsLater", "Sums", "SumsLater#2"]


class Asks(Callback):
    """Gives all commands, and notes what comes of them."""

    def __init__(self) -> None:
        self.came: dict[str, str] = {}

    async def on_train_start(self, event: TrainStart, run: ReplayedRun) -> None:
        for name, command in {
            "pause": run.pause,
            "resume": run.resume,
            "stop": run.stop,
            "validate": run.validate,
            "checkpoint": run.checkpoint,
        }.items():
            try:
                self.came[name] = repr(await command())  # type: ignore[operator]
            except ConfigError as error:
                self.came[name] = str(error)

    def on_epoch_end(self, event: EpochEnd, run: Any) -> None:
        # Waiting is fine in a worker, too
        assert run.stop_nowait("enough").result() is None
        for name in ("trainer", "call", "call_nowait", "result", "wait", "cancel", "trainr"):
            try:
                getattr(run, name)
            except AttributeError as error:
                self.came[name] = str(error)


def test_commands_are_noted_and_what_needs_a_model_says_so(recorded: Path) -> None:
    asks = Asks()
    result = replay(recorded, callbacks=[asks])
    assert result.callback_errors == {}
    assert [each.command.name for each in result.commands[:6]] == [
        *("pause", "resume", "stop", "validate", "checkpoint", "stop")
    ]
    assert not any(each.is_decision for each in result.commands)
    assert str(result.commands[5]) == "Asks: stop(reason='enough') at EpochEnd, step 10"
    assert [asks.came[name] for name in ("pause", "resume", "stop")] == ["None"] * 3
    for name in ("validate", "checkpoint"):
        assert asks.came[name].startswith(f"{name} was noted, and has no result: a replay has no model")
    assert asks.came["trainer"].startswith("there is no run.trainer in a replay: a replay has no model")
    assert "tiny_trainer()" in asks.came["call"]
    assert "on_train_end" in asks.came["result"] and "noted" in asks.came["cancel"]
    assert asks.came["trainr"] == "'ReplayedRun' object has no attribute 'trainr'"


# Failures ------------------------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self) -> None:
        self.is_closed = False

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        raise KeyError("no such metric")

    def close(self) -> None:
        self.is_closed = True


class FailsDeciding(Fails):
    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        raise KeyError("no such metric")


def test_an_observer_that_fails_is_reported_and_the_others_go_on(recorded: Path) -> None:
    recorder, fails = Recorder(), Fails()
    result = replay(recorded, callbacks=[fails, recorder])
    assert result.callback_errors["Fails"][0] == "EpochEnd: KeyError: 'no such metric'"
    (failed, *_) = recorder.of(CallbackFailed)
    assert (failed.callback, failed.step) == ("Fails", 10)
    # It is no event of the run's
    assert result.published == () and result.events == len(list(read_events(recorded)))
    assert fails.is_closed


def test_a_decider_that_fails_raises_as_in_training(recorded: Path) -> None:
    fails, recorder = FailsDeciding(), Recorder()
    with pytest.raises(KeyError, match="no such metric") as raised:
        replay(recorded, callbacks=[fails, recorder])
    assert raised.value.__notes__ == ["offloop: replay of run stopped, EpochEnd of step 10"]
    assert fails.is_closed and recorder.is_closed
    assert recorder.names()[-1] == "EpochEnd"


def test_a_decider_may_isolate_its_failures(recorded: Path) -> None:
    fails = FailsDeciding()
    fails.on_error = "isolate"  # type: ignore[misc]
    result = replay(recorded, callbacks=[fails])
    assert result.is_complete and len(result.callback_errors["FailsDeciding"]) > 1


# Buffers, events of callbacks, files ---------------------------------------------------------------


class Narrow(Callback):
    """A buffer of one sample."""

    buffer = 1

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.steps.append(event.step)


class NarrowBlocks(Narrow):
    on_full = "block"

    async def on_step_end(self, event: StepEnd, run: RunHandle) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        self.steps.append(event.step)


@pytest.mark.parametrize("kind", [Narrow, NarrowBlocks])
def test_no_sample_is_dropped_however_small_the_buffer(recorded: Path, kind: type[Narrow]) -> None:
    narrow = kind()
    result = replay(recorded, callbacks=[narrow])
    assert narrow.steps == [event.step for event in read_events(recorded) if isinstance(event, StepEnd)]
    assert result.callback_costs[kind.__name__].dropped == 0


class Publishes(Callback):
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Spread(value=event.metrics["train_loss"]))


class Reacts(Callback):
    """Publishes in reaction to an event of another callback."""

    def on_spread(self, event: Spread, run: RunHandle) -> None:
        if event.value >= 0:
            run.publish(Spread(value=-event.value))


def test_events_of_callbacks_reach_the_others_at_their_place(recorded: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    result = replay(recorded, callbacks=[Publishes(), Reacts(), recorder], directory=tmp_path / "with events")
    epochs = [event for event in read_events(recorded) if isinstance(event, EpochEnd)]
    spreads = recorder.of(Spread)
    losses = [event.metrics["train_loss"] for event in epochs]
    assert sorted(event.value for event in spreads) == sorted([*losses, *(-loss for loss in losses)])
    assert [event for event in spreads if event.value >= 0] == [
        Spread(
            value=end.metrics["train_loss"],
            run_id="stopped",
            time=end.time,
            epoch=end.epoch,
            step=end.step,
            batch=end.batch,
        )
        for end in epochs
    ]
    assert list(result.published) == spreads
    assert recorder.names()[-1] == "TrainEnd"
    place = recorder.names().index("Spread")
    assert recorder.names()[place - 1] == "EpochEnd"
    again = Recorder()
    replay(recorded, callbacks=[Publishes(), Reacts(), again])
    assert again.events == recorder.events


class Reads(Callback):
    """Follows events by itself, in a handler that ends with the run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.has_ended = False

    async def on_train_start(self, event: TrainStart, run: ReplayedRun) -> None:
        async for each in run.events(StepEnd, TrainEnd, buffer=4):
            if isinstance(each, TrainEnd):
                self.has_ended = True
            else:
                self.steps.append(each.step)


class Forgets(Callback):
    """Subscribes and never reads."""

    @decides
    def on_train_start(self, event: TrainStart, run: ReplayedRun) -> None:
        self.events = run.events(Sample, buffer=1)


def test_a_reader_of_events_gets_all_and_holds_up_nothing(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offloop.engine.replays.attempt.READING", LONG)
    reads, recorder = Reads(), Recorder()
    result = replay(recorded, callbacks=[reads, recorder])
    assert reads.steps == [event.step for event in read_events(recorded) if isinstance(event, StepEnd)]
    assert reads.has_ended and result.is_complete
    assert recorder.events == list(read_events(recorded))


def test_a_subscription_that_is_never_read_is_not_waited_for(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offloop.engine.replays.attempt.READING", 0.01)
    recorder = Recorder()
    assert replay(recorded, callbacks=[Forgets(), recorder]).is_complete
    assert recorder.events == list(read_events(recorded))


class InProcess(Callback):
    """Observes in a process of its own."""

    runs_in = "process"

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self.steps += 1

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        assert (run.step, run.id) == (event.step, "stopped")
        run.publish(Spread(value=self.steps))
        if event.final or event.epoch == 1:
            run.stop_nowait("seen enough")


def test_a_callback_may_run_in_its_process(recorded: Path) -> None:
    result = replay(recorded, callbacks=[InProcess()])
    assert result.callback_errors == {}
    ends = [event for event in read_events(recorded) if isinstance(event, EpochEnd)]
    assert [(event.step, event.value) for event in result.published if isinstance(event, Spread)] == [
        (end.step, float(end.step)) for end in ends
    ]
    assert result.stop is not None
    assert (result.stop.by, result.stop.step) == ("InProcess", 20)


def test_built_in_callbacks_can_be_replayed(recorded: Path, tmp_path: Path) -> None:
    result = replay(
        recorded,
        callbacks=[ProgressBar(), ResourceMonitor(every_seconds=0.01), EventLog()],
        directory=tmp_path / "all",
    )
    assert result.callback_errors == {} and result.is_complete


class NeedsDirectory(Callback):
    needs_run_dir = True

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        assert run.dir is not None
        (run.dir / "mine.txt").write_text("mine")


def test_files_go_to_a_temporary_directory_unless_one_is_given(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = replay(recorded, callbacks=[NeedsDirectory()])
    assert result.dir is not None and result.dir.parent == tmp_path
    assert (result.dir / "mine.txt").read_text() == "mine"
    assert "mine.txt" not in files_of(recorded)


class Draws(Callback):
    """Publishes a picture and a long text at the end of each epoch."""

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(PictureSample("digits", np.full((2, 2), 50 * event.epoch, np.uint8)))
        run.publish(TextSample("code", f"{event.epoch}" * 20_000))


class ReadsSamples(Callback):
    def __init__(self) -> None:
        self.read: list[bytes] = []

    def on_event(self, event: Event, run: ReplayedRun) -> None:
        if isinstance(event, PictureSample):
            self.read.append(run.samples.read(event.picture))
        elif isinstance(event, TextSample):
            self.read.append(run.samples.read(event))


def test_samples_are_read_from_the_recorded_run_and_copied_to_the_replay(tmp_path: Path) -> None:
    tiny_trainer(run_dir=tmp_path, run_name="drawn").train(tiny_loader(2), epochs=2, callbacks=[Draws()])
    run, reads = tmp_path / "drawn", ReadsSamples()
    files = files_of(run / "samples")
    assert len(files) == 4
    result = replay(run, callbacks=[reads])
    assert (result.dir, result.callback_errors, sorted(reads.read)) == (None, {}, sorted(files.values()))
    # New ones go to the replay's directory alone
    reads = ReadsSamples()
    result = replay(run, callbacks=[Draws(), reads], directory=tmp_path / "replay")
    assert (result.callback_errors, len(reads.read), len(result.published)) == ({}, 8, 4)
    assert files_of(tmp_path / "replay" / "samples") == files == files_of(run / "samples")


# Step hooks ----------------------------------------------------------------------------------------


class Hooks(Callback):
    @in_step
    def after_step(self, point: StepPoint) -> None:
        raise AssertionError("there is no step")


class HooksToo(Hooks):
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        pass


def test_step_hooks_do_not_run_and_that_is_said(recorded: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = replay(recorded, callbacks=[HooksToo()])
    assert result.hooks_left_out == ("HooksToo.after_step",)
    assert "step hooks do not run in a replay, which has no model: HooksToo.after_step" in caplog.text
    assert "step hooks did not run, since a replay has no model: HooksToo.after_step" in result.notes
    with pytest.raises(ConfigError, match=r"Hooks has only step hooks \(after_step\), which need a model"):
        replay(recorded, callbacks=[Hooks()])


class Prepares(Callback):
    def prepare(self, trainer: Any) -> None:
        self.model = trainer.model

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        pass


def test_a_callback_that_prepares_with_the_model_is_refused(recorded: Path) -> None:
    with pytest.raises(AttributeError, match=r"there is no trainer\.model in a replay"):
        replay(recorded, callbacks=[Prepares()])


# Control -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_pause_advance_resume_and_speed(recorded: Path) -> None:
    events = list(read_events(recorded))
    recorder = Recorder()
    control = Replay(recorded, callbacks=[recorder], paused=True, speed=1)
    results: list[ReplayResult] = []

    async def run() -> None:
        results.append(await control.run_async())

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await control.pause()
            assert recorder.events == [] and control.is_paused and control.event is None
            assert await control.advance() == events[0]
            assert await control.advance() == events[1]
            assert recorder.events == events[:2]
            step = await control.advance(StepEnd)
            assert step == next(event for event in events if isinstance(event, StepEnd))
            end = await control.advance(EpochEnd)
            assert isinstance(end, EpochEnd) and control.event == end
            assert recorder.events == events[: end.seq + 1] and control.events_done == end.seq + 1
            assert control.speed == 1
            control.speed = None
            await control.resume()
    assert recorder.events == events
    assert results[0].is_complete and control.is_over and control.progress == 1.0


@pytest.mark.anyio
async def test_a_replay_may_be_stopped_and_then_takes_no_commands(recorded: Path) -> None:
    recorder = Recorder()
    control = Replay(recorded, callbacks=[recorder], paused=True)
    results: list[ReplayResult] = []

    async def run() -> None:
        results.append(await control.run_async())

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await control.advance(EpochEnd)
            control.stop()
    assert not results[0].is_complete and results[0].end is None and recorder.is_closed
    assert recorder.names()[-1] == "EpochEnd"
    assert "stopped" in repr(results[0]).splitlines()[0]
    for command in (control.pause_nowait, control.resume_nowait, control.advance_nowait):
        with pytest.raises(Exception, match="came too late: the replay is over"):
            command()
    with pytest.raises(RuntimeError, match="a replay runs once"):
        await control.run_async()


class Breaks(Callback):
    """A breakpoint: pauses the replay."""

    def __init__(self, reached: threading.Event) -> None:
        self.reached = reached

    def on_epoch_end(self, event: EpochEnd, run: ReplayedRun) -> None:
        if event.epoch == 1:
            run.replay.pause_nowait().add_done_callback(lambda _: self.reached.set())


def test_a_callback_may_pause_its_replay(recorded: Path) -> None:
    reached, recorder = threading.Event(), Recorder()
    control = Replay(recorded, callbacks=[Breaks(reached), recorder])
    thread = threading.Thread(target=control.run)
    thread.start()
    assert reached.wait(LONG)
    assert recorder.names()[-1] == "EpochEnd" and recorder.events[-1].epoch == 1
    control.resume_nowait()
    thread.join(LONG)
    assert recorder.events == list(read_events(recorded))


@pytest.mark.anyio
async def test_a_cancelled_replay_closes_its_callbacks(recorded: Path) -> None:
    recorder = Recorder()
    control = Replay(recorded, callbacks=[recorder], paused=True)
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(control.run_async)
            await control.advance(EpochEnd)
            tasks.cancel_scope.cancel()
    assert recorder.is_closed and control.is_over


@pytest.mark.anyio
async def test_a_callback_serves_one_replay_at_a_time(recorded: Path) -> None:
    recorder = Recorder()
    control = Replay(recorded, callbacks=[recorder], paused=True)
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(control.run_async)
            await control.advance()
            with pytest.raises(ConfigError, match="this Recorder serves run 'stopped'"):
                await replay_async(recorded, callbacks=[recorder])
            control.stop()
    assert (await replay_async(recorded, callbacks=[recorder])).is_complete


INTERRUPTED: Final = """
import sys
from offloop import Callback, Replay

class Says(Callback):
    def on_train_start(self, event, run):
        print("started", flush=True)

    def close(self):
        print("closed", flush=True)

control = Replay(sys.argv[1], callbacks=[Says()], paused=True)
control.advance_nowait()
try:
    control.run()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_closes_the_callbacks_and_is_raised(recorded: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(recorded)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LONG)[0] == "closed\ninterrupted\n"
        assert process.returncode == 0


# Logs ----------------------------------------------------------------------------------------------


def write_log(directory: Path, events: list[Event], rest: bytes = b"") -> Path:
    directory.mkdir()
    (directory / "events.jsonl").write_bytes(b"".join(encode(event) + b"\n" for event in events) + rest)
    return directory


def test_the_log_of_a_killed_run_ends_without_its_end(recorded: Path, tmp_path: Path) -> None:
    events = list(read_events(recorded))
    run = write_log(tmp_path / "killed", events[:30], encode(events[30])[:-7])
    recorder, reads = Recorder(), Reads()
    result = replay(run, callbacks=[recorder, reads, stopper()])
    assert recorder.events == events[:30] and recorder.is_closed
    assert (result.events, result.end, result.is_complete, result.skipped) == (30, None, True, 0)
    assert result.notes == ["the log has no TrainEnd: the run was killed, or goes on"]


class Keeps(Callback):
    """A decider with a state, and a note of how often it begins and ends."""

    def __init__(self) -> None:
        self.life: list[str] = []
        self.epochs = 0

    def reset(self) -> None:
        self.life.append("reset")
        self.epochs = 0

    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.epochs += 1
        run.set_lr_nowait(float(self.epochs))

    def close(self) -> None:
        self.life.append("close")

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Any) -> None:
        self.epochs = state["epochs"]
        self.life.append(f"load {self.epochs}")


def test_the_attempts_of_a_resumed_run_follow_each_other(tmp_path: Path) -> None:
    def train(epochs: int, resume: Any = None) -> None:
        tiny_trainer(run_dir=tmp_path / "runs", run_name="resumed").train(
            tiny_loader(5),
            tiny_loader(2),
            epochs=epochs,
            callbacks=[logger_(), ModelCheckpoint(every_n_epochs=1)],
            resume=resume,
        )

    train(2)
    train(4, resume="must")
    run, keeps, recorder = tmp_path / "runs" / "resumed", Keeps(), Recorder()
    events = list(read_events(run))
    starts = [event.attempt for event in events if isinstance(event, TrainStart)]
    assert starts == [0, 1]
    seen: list[str] = []
    result = replay(run, callbacks=[keeps, logger_(), recorder], directory=tmp_path / "replay")
    assert keeps.life == ["reset", "close", "reset", "load 2", "close"]
    assert [(each.attempt, each.command) for each in result.commands] == [
        (attempt, SetLearningRate(float(number))) for attempt, number in ((0, 1), (0, 2), (1, 3), (1, 4))
    ]
    # The recorder forgets the first attempt in its reset
    assert recorder.events == events[[event.seq for event in events].index(0, 1) :]
    assert result.events == len(events) and seen == []
    assert result.dir is not None
    for name in ("metrics.csv", "metrics.jsonl", "events.jsonl"):
        assert (result.dir / name).read_bytes() == (run / name).read_bytes(), name


def unknown(number: int, name: str = "gone.module.Vanished") -> bytes:
    where = f'"run_id":"stopped","seq":{number},"time":5.0,"epoch":0,"step":1,"batch":1'
    return f'{{"type":"{name}",{where},"value":1.5}}\n'.encode()


def test_events_of_classes_that_are_not_there_any_more_are_counted(recorded: Path, tmp_path: Path) -> None:
    start, *rest = read_events(recorded)
    rest = [msgspec.structs.replace(event, seq=event.seq + 3) for event in rest]
    lines = [encode(start) + b"\n", unknown(1), unknown(2), unknown(3, "gone.Other"), b"[1, 2\n"]
    (run := tmp_path / "old").mkdir()
    (run / "events.jsonl").write_bytes(b"".join([*lines, *(encode(event) + b"\n" for event in rest)]))
    recorder = Recorder()
    result = replay(run, callbacks=[recorder, stopper()], directory=tmp_path / "replay")
    assert result.unknown == {"gone.module.Vanished": 2, "gone.Other": 1}
    assert result.skipped == 1 and "Expected `object`" in result.why_skipped
    assert result.notes[0].startswith(
        "3 events are of classes that are not defined here: gone.Other (1), gone.module.Vanished (2). "
    )
    assert recorder.names()[:5] == ["TrainStart", *["UnknownEvent"] * 3, type(rest[0]).__name__]
    assert result.stop is not None and result.callback_errors == {}
    # What EventLog writes is what was read
    assert (tmp_path / "replay" / "events.jsonl").read_bytes().splitlines(keepends=True) == [
        *lines[:4],
        *(encode(event) + b"\n" for event in rest),
    ]


def test_classes_of_a_script_are_found_by_their_name(recorded: Path, tmp_path: Path) -> None:
    (run := tmp_path / "script").mkdir()
    (run / "events.jsonl").write_bytes(
        encode(next(read_events(recorded)))
        + b"\n"
        + unknown(1, "__main__.Spread")
        + unknown(2, "__main__.Nothing")
    )
    recorder = Recorder()
    result = replay(run, callbacks=[recorder])
    assert [event.value for event in recorder.of(Spread)] == [1.5]
    assert result.unknown == {"__main__.Nothing": 1}


def test_an_event_whose_class_has_other_fields_by_now_is_counted(recorded: Path, tmp_path: Path) -> None:
    (run := tmp_path / "changed").mkdir()
    tag = Spread.__struct_config__.tag
    (run / "events.jsonl").write_bytes(
        encode(next(read_events(recorded))) + b"\n" + unknown(1, str(tag)).replace(b"1.5", b'"much"')
    )
    result = replay(run)
    assert result.skipped == 1 and "Expected `float`" in result.why_skipped


# Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (0, r"speed must be .*above 0, got 0: to hold the first event, give paused=True"),
        (-1.0, r"speed must be .*above 0, got -1.0"),
        (float("nan"), r"speed must be .*got nan"),
        ("max", r"speed must be .*got 'max'"),
        (True, r"speed must be .*got True"),
    ],
)
def test_a_speed_that_cannot_be_is_refused(recorded: Path, speed: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replay(recorded, speed=speed)
    control = Replay(recorded)
    with pytest.raises(ConfigError, match=text):
        control.speed = speed
    control.speed = float("inf")
    assert control.speed is None


def test_a_directory_that_is_no_run_is_refused(recorded: Path, tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "missing", r"there is no run .*missing"),
        (recorded.with_name("stoped"), r"there is no run .*stoped; did you mean .*stopped\?"),
        (
            recorded.parent,
            r"is not the directory of a run: it has neither run\.json nor events\.jsonl; did you mean",
        ),
        (tmp_path, "is not the directory of a run"),
    ):
        with pytest.raises(ConfigError, match=text):
            replay(path)
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no events\.jsonl, so nothing of it can be replayed"):
        replay(tmp_path / "silent")
    with pytest.raises(ConfigError, match=r"events\.jsonl has no events"):
        replay(write_log(tmp_path / "empty", []))
    with pytest.raises(ConfigError, match=r"has no events: 1 lines hold none \(.*malformed"):
        replay(write_log(tmp_path / "broken", [], b"{broken}\n"))


def test_wrong_callbacks_and_directories_are_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"callbacks must be a list of callbacks"):
        replay(recorded, callbacks=stopper())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"callbacks must be instances: write EarlyStopping\(\)"):
        replay(recorded, callbacks=[EarlyStopping])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="must not be that of the recorded run, nor inside it"):
        replay(recorded, directory=recorded)
    with pytest.raises(ConfigError, match="must not be that of the recorded run, nor inside it"):
        replay(recorded, directory=recorded / "replay")
    write_log(tmp_path / "other", [])
    with pytest.raises(ConfigError, match="must not have a run already"):
        replay(recorded, directory=tmp_path / "other")
    with pytest.raises(TypeError, match="until must be an event class like StepEnd, got 'StepEnd'"):
        Replay(recorded).advance_nowait("StepEnd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="paused must be True or False"):
        Replay(recorded, paused="yes")  # type: ignore[arg-type]
