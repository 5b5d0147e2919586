"""Profiler: a trace and a table of the steps asked for, and torch's profiler off in every case."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from offloop.callbacks.profiler import (
    PHASES,
    Profiler,
    ProfileWritten,
    TraceEvent,
    describe,
    device_idle_percent,
)
from offloop.engine import Callback, ConfigError, Run, StepPoint, decode, encode, in_step
from offloop.engine.testing import EndlessLoader, Recorder, reproducible, tiny_loader, tiny_trainer


def trace_of(folder: Path | None) -> list[dict[str, Any]]:
    assert folder is not None
    with gzip.open(folder / "trace.json.gz") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def ranges(trace: list[dict[str, Any]]) -> list[str]:
    found = [each for each in trace if each.get("cat") == "user_annotation" and "offloop" in each["name"]]
    return [each["name"].removeprefix("offloop: ") for each in sorted(found, key=lambda each: each["ts"])]


def assert_profiler_is_off() -> None:
    """Another one can be used: torch allows one at a time, and leaves the process broken after one left on."""
    with profile(activities=[ProfilerActivity.CPU]) as again:
        torch.ones(2).add(1)
    assert any(event.name == "aten::add" for event in again.events() or ())


class Watch(Callback):
    """Says in which steps torch's profiler is on, and does something at a step."""

    def __init__(self, at: int = -1, do: Callable[[Run], object] = lambda run: None) -> None:
        self.at, self.do = at, do
        self.on: list[int] = []

    @in_step
    def after_backward(self, point: StepPoint) -> None:
        if torch.autograd.profiler._is_profiler_enabled:
            self.on.append(point.step + 1)

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.at:
            self.do(point.run)


def test_steps_asked_for_are_in_trace_table_and_event(tmp_path: Path) -> None:
    recorder, watch = Recorder(), Watch()
    trainer = tiny_trainer(run_dir=str(tmp_path))
    result = trainer.train(
        tiny_loader(12), epochs=4, callbacks=[recorder, Profiler(wait=3, warmup=2, active=4), watch]
    )
    assert result.callback_errors == {}
    step = ["host_to_device", "forward", "backward", "between", "optimizer"]
    assert ranges(trace_of(result.dir)) == (["between", *step] * 4)
    assert watch.on == [6, 7, 8, 9]
    assert result.dir is not None
    table = (result.dir / "profile.txt").read_text()
    assert "mean of 4 steps (6 to 9)" in table
    assert sorted(path.name for path in result.dir.glob("*trace*")) == ["trace.json.gz"]
    assert not list(result.dir.glob(".trace*"))
    assert all(phase in table for phase in PHASES)
    assert_profiler_is_off()


def test_event_tells_paths_and_seconds(tmp_path: Path) -> None:
    class UntilWritten(Callback):
        async def on_profile_written(self, event: ProfileWritten, run: Run) -> None:
            run.stop_nowait("written")

    recorder = Recorder()
    trainer = tiny_trainer(run_dir=str(tmp_path))
    result = trainer.train(
        EndlessLoader(),
        epochs=1,
        callbacks=[recorder, Profiler(wait=0, warmup=1, active=3), UntilWritten()],
    )
    assert result.reason == "written"
    (event,) = recorder.of(ProfileWritten)
    assert Path(event.trace).is_file() and Path(event.table).is_file()
    assert event.steps == 3
    assert list(event.seconds) == list(PHASES)
    assert min(event.seconds[phase] for phase in ("forward", "backward", "optimizer", "data")) > 0
    assert event.device_idle_percent is None
    assert decode(encode(event)) == event


def test_windows_and_several_calls_of_the_model_keep_their_phases(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path), accumulate_grad_batches=2)
    result = trainer.train(tiny_loader(8), epochs=1, callbacks=[Profiler(wait=0, warmup=1, active=1)])
    batch = ["host_to_device", "forward", "backward", "between"]
    assert ranges(trace_of(result.dir)) == ["between", *batch, *batch, "optimizer"]


@pytest.mark.parametrize("how", ["stop", "cancel", "fail", "limit"])
def test_run_that_ends_early_leaves_the_profiler_off_and_what_there_is(how: str, tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        raise ZeroDivisionError

    ends: dict[str, Callable[[Run], object]] = {
        "stop": lambda run: run.stop_nowait("early"),
        "cancel": lambda run: run.cancel("early"),
        "fail": fail,
        "limit": lambda run: None,
    }
    trainer = tiny_trainer(run_dir=str(tmp_path))
    callbacks = [Profiler(wait=1, warmup=1, active=100), Watch(at=5, do=ends[how])]
    if how == "fail":
        with pytest.raises(ZeroDivisionError):
            trainer.train(EndlessLoader(), max_steps=5, callbacks=callbacks)
    else:
        trainer.train(EndlessLoader(), max_steps=5, callbacks=callbacks)
    assert_profiler_is_off()
    run = trainer.last_run
    assert run is not None and run.dir is not None
    assert run.result.callback_errors == {}
    assert (run.dir / "profile.txt").read_text().startswith("Where a step's time goes: mean of 3 steps")
    assert ranges(trace_of(run.dir)).count("optimizer") == 3


def test_run_that_ends_while_warming_up_leaves_no_files_and_the_profiler_off(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path))
    result = trainer.train(tiny_loader(4), epochs=1, callbacks=[Profiler(wait=1, warmup=50, active=2)])
    assert result.callback_errors == {}
    assert result.dir is not None
    assert not list(result.dir.glob("trace*"))
    assert_profiler_is_off()


def test_run_is_the_same_bit_for_bit_with_and_without(tmp_path: Path) -> None:
    def outcome(*callbacks: Callback) -> tuple[list[Any], list[torch.Tensor]]:
        recorder = Recorder()
        trainer = tiny_trainer(run_dir=str(tmp_path))
        trainer.train(tiny_loader(8), tiny_loader(2), epochs=2, callbacks=[recorder, *callbacks])
        events = [each for each in reproducible(recorder.events) if each[0] != "ProfileWritten"]
        return events, list(trainer.model.state_dict().values())

    events, weights = outcome()
    events_profiled, weights_profiled = outcome(Profiler(wait=2, warmup=1, active=3))
    assert events == events_profiled
    assert all(map(torch.equal, weights, weights_profiled))


@pytest.mark.anyio
async def test_files_are_written_beside_any_event_loop(tmp_path: Path) -> None:
    with anyio.fail_after(60):
        async with tiny_trainer(run_dir=str(tmp_path)).start(
            EndlessLoader(), epochs=1, callbacks=[Profiler(wait=0, warmup=1, active=2)]
        ) as run:
            async for event in run.events(ProfileWritten):
                written = event
                await run.stop("seen")
    assert trace_of(Path(written.trace).parent)
    assert run.result.callback_errors == {}


def test_failure_to_write_is_reported_and_ends_nothing(tmp_path: Path) -> None:
    class InTheWay(Callback):
        @in_step
        def before_batch(self, point: StepPoint) -> None:
            (point.run.dir / "profile.txt").mkdir(exist_ok=True)

    result = tiny_trainer(run_dir=str(tmp_path)).train(
        tiny_loader(8), epochs=1, callbacks=[InTheWay(), Profiler(wait=0, warmup=1, active=2)]
    )
    assert result.status == "completed"
    (error,) = result.callback_errors["Profiler"]
    assert error.startswith("close: IsADirectoryError")


def test_table_says_what_takes_the_time() -> None:
    seconds = dict.fromkeys(PHASES, 0.001) | {"data": 0.014}
    table = describe(seconds, [8, 9, 10], device_idle_percent=81.2)
    assert "mean of 3 steps (8 to 10), 20.00 ms each" in table
    assert "14.00 ms  70.0 %  data" in table
    assert "Most of it is data: waiting for batches from the loader." in table
    assert "was idle for 81 %" in table


def test_device_idle_time_counts_overlapping_work_once() -> None:
    def event(cat: str, start: float, duration: float, name: str = "") -> TraceEvent:
        return TraceEvent(name=name, cat=cat, ts=start, dur=duration)

    steps = [event("user_annotation", 100, 50, "ProfilerStep#1"), event("", 150, 50, "ProfilerStep#2")]
    work = [
        event("kernel", 90, 20),  # 10 of it in the steps
        event("kernel", 120, 10),
        event("gpu_memcpy", 125, 10),  # 5 of it beside the kernel
        event("cpu_op", 140, 60),
        event("kernel", 195, 20),  # 5 of it in the steps
    ]
    assert device_idle_percent([*steps, *work]) == pytest.approx(70.0)
    assert device_idle_percent([]) == 100.0


@pytest.mark.parametrize("wrong", [{"wait": -1}, {"warmup": 0}, {"active": 0}, {"active": 1.5}])
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Profiler(**wrong)
