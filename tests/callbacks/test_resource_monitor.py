"""ResourceMonitor: pure arithmetic on given figures, and real runs whose disturbers show."""

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import anyio
import psutil
import pytest
import torch

from offloop.callbacks import resource_monitor
from offloop.callbacks.resource_monitor import (
    GpuUsage,
    ResourceMonitor,
    ResourceUsage,
    _Gpus,
    _Lateness,
    cuda_memory,
    shares,
    throughput,
)
from offloop.engine import (
    Callback,
    CallbackCosts,
    ConfigError,
    EpochStart,
    Run,
    StepEnd,
    TrainStart,
    decode,
    encode,
)
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

FAST = 0.01


def step_end(step: int, time: float, **fields: Any) -> StepEnd:
    fields = {"batch": step, "samples": 4, "data_time": 0.1, "step_time": 0.3} | fields
    return StepEnd(loss=1.0, lr=0.1, step=step, time=time, **fields)


START = TrainStart(step=0, batch=0, time=100.0)


# Arithmetic


def test_throughput_is_measured_between_the_ends_of_steps() -> None:
    values = throughput(START, [step_end(1, 100.5), step_end(2, 101.0)])
    assert values == {
        "steps_per_second": 2.0,
        "samples_per_second": 8.0,
        "data_wait_percent": pytest.approx(20.0),
        "compute_percent": pytest.approx(60.0),
    }


def test_throughput_counts_dropped_steps_by_those_that_came() -> None:
    values = throughput(START, [step_end(2, 101.0), step_end(4, 102.0)])
    assert values["steps_per_second"] == 2.0
    assert values["samples_per_second"] == 8.0
    assert values["data_wait_percent"] == pytest.approx(20.0)


def test_shares_of_time_are_no_more_than_all_of_it() -> None:
    values = throughput(START, [step_end(4, 101.0)])  # the one that came stands for four, and was slower
    assert (values["data_wait_percent"], values["compute_percent"]) == (
        pytest.approx(40.0),
        pytest.approx(60.0),
    )


def test_waits_inside_an_accumulation_window_are_no_computing() -> None:
    # two batches a step, 0.1 s waited for each; the second wait is within step_time
    values = throughput(START, [step_end(1, 101.0, batch=2, data_time=0.2, step_time=0.9)])
    assert values["data_wait_percent"] == pytest.approx(20.0)
    assert values["compute_percent"] == pytest.approx(80.0)


def test_no_step_gives_no_shares() -> None:
    assert throughput(START, []) == {}
    usage = ResourceUsage(**throughput(START, []))
    assert (usage.steps_per_second, usage.data_wait_percent) == (0.0, None)


def test_lateness_gives_longest_and_mean_once() -> None:
    lateness = _Lateness()
    for due, came in ((1.0, 1.5), (2.0, 2.1), (3.0, 2.9)):
        lateness.expect(due)
        lateness.fired(came)
    assert lateness.take(3.0) == pytest.approx((0.5, 0.2))
    assert lateness.take(4.0) == (0.0, 0.0)


def test_timer_that_is_overdue_counts_before_it_fires() -> None:
    lateness = _Lateness()
    lateness.expect(5.0)
    assert lateness.take(4.0) == (0.0, 0.0)
    assert lateness.take(8.0) == (3.0, 3.0)


def test_shares_say_which_callback_took_how_much() -> None:
    before = {"A": CallbackCosts(cpu=1.0, held=0.5)}
    after = {"A": CallbackCosts(cpu=1.5, held=0.6), "B": CallbackCosts(cpu=0.1)}
    values = shares(before, after, seconds=2.0)
    assert values["callback_cpu_percent"] == {"A": pytest.approx(25.0), "B": pytest.approx(5.0)}
    assert values["callback_held_percent"] == {"A": pytest.approx(5.0), "B": 0.0}


# GPUs: the library's answers, as its documentation gives them


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second one tells neither its power nor its utilisation."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.is_shut_down = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"Old" if handle else "New"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10 + handle, total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle:
            raise FakeNvmlError
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise FakeNvmlError
        return 250_500

    def nvmlShutdown(self) -> None:
        self.is_shut_down = True


def test_gpus_are_read_and_what_one_does_not_tell_is_none() -> None:
    nvml = FakeNvml()
    gpus = _Gpus(nvml)
    assert gpus.read() == (
        GpuUsage(
            index=0,
            name="New",
            utilisation_percent=87.0,
            memory_used_bytes=10,
            memory_total_bytes=100,
            temperature_celsius=61.0,
            power_watts=250.5,
        ),
        GpuUsage(index=1, name="Old", memory_used_bytes=11, memory_total_bytes=100, temperature_celsius=61.0),
    )
    gpus.close()
    gpus.close()
    assert nvml.is_shut_down
    assert gpus.read() == ()


def test_run_publishes_its_gpus_and_lets_go_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(resource_monitor, "load_nvml", lambda: nvml)
    usage = first_usage(ResourceMonitor(FAST))
    assert [gpu.name for gpu in usage.gpus] == ["New", "Old"]
    assert nvml.is_shut_down
    assert decode(encode(usage)) == usage


@pytest.mark.parametrize("is_installed", [True, False])
def test_without_gpu_or_package_there_is_nothing_and_no_error(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise FakeNvmlError

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver() if is_installed else None)
    assert resource_monitor.load_nvml() is None
    assert first_usage(ResourceMonitor(FAST)).gpus == ()


def test_allocator_is_left_alone_without_cuda() -> None:
    assert cuda_memory(torch.device("cpu")) == {}


@pytest.mark.gpu
def test_allocator_shows_on_cuda() -> None:
    held = torch.zeros(1 << 20, device="cuda")
    memory = cuda_memory(held.device)
    assert memory["cuda_peak_bytes"] >= memory["cuda_allocated_bytes"] >= held.nbytes
    assert memory["cuda_reserved_bytes"] >= memory["cuda_allocated_bytes"]


# Real runs


class StopWhen(Callback):
    """Stops the run at the first usage that passes, and keeps it."""

    def __init__(self, passes: Any = lambda usage: True) -> None:
        self.passes = passes
        self.usage: ResourceUsage | None = None

    async def on_resource_usage(self, event: ResourceUsage, run: Run) -> None:
        if self.usage is None and self.passes(event):
            self.usage = event
            run.stop_nowait("seen")


def first_usage(
    monitor: ResourceMonitor, *callbacks: Callback, passes: Any = lambda usage: True
) -> ResourceUsage:
    """Run until a usage passes, and return it; the test's time limit ends one that never does."""
    stop = StopWhen(passes)
    trainer = tiny_trainer()
    result = trainer.train(EndlessLoader(), epochs=1, callbacks=[monitor, stop, *callbacks])
    assert result.reason == "seen"
    assert result.callback_errors == {}
    assert stop.usage is not None
    return stop.usage


def test_usage_of_a_real_run_is_plausible() -> None:
    usage = first_usage(
        ResourceMonitor(FAST), passes=lambda usage: usage.steps_per_second > 0 and usage.cpu_percent > 0
    )
    process = psutil.Process()
    assert usage.samples_per_second == pytest.approx(4 * usage.steps_per_second)
    assert usage.data_wait_percent is not None and usage.compute_percent is not None
    assert 0 < usage.data_wait_percent + usage.compute_percent <= 100.0
    assert 0.2 < usage.memory_bytes / process.memory_info().rss < 5
    assert usage.system_memory_total_bytes == psutil.virtual_memory().total
    assert usage.threads >= 3  # this one, the training thread, the monitor
    assert usage.cuda_allocated_bytes is None
    assert usage.callback_cpu_percent.keys() == {"ResourceMonitor", "StopWhen"}


class HoldsTheEventLoop(Callback):
    """Keeps the event loop to itself until the monitor has noticed."""

    def __init__(self, monitor: ResourceMonitor) -> None:
        self.monitor = monitor

    async def on_epoch_start(self, event: EpochStart, run: Run) -> None:
        while self.monitor._sampler is None:
            await anyio.lowlevel.checkpoint()
        lag = self.monitor._sampler.loop_lag
        while True:
            due = lag._due
            if due is not None and time.perf_counter() > due + 0.2:
                return


def test_callback_that_holds_the_event_loop_shows() -> None:
    monitor = ResourceMonitor(FAST)
    holder = HoldsTheEventLoop(monitor)
    usage = first_usage(monitor, holder, passes=lambda usage: usage.loop_lag >= 0.2)
    assert usage.loop_lag >= usage.loop_lag_mean > 0


class HoldsTheInterpreter(Callback):
    """Has a thread compute in plain Python while the run goes on."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.compute)
        self.interval = sys.getswitchinterval()

    def compute(self) -> None:
        while not self.done.is_set():
            sum(range(1000))

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        sys.setswitchinterval(0.05)  # how long the thread may keep it
        self.thread.start()

    def close(self) -> None:
        sys.setswitchinterval(self.interval)
        self.done.set()
        self.thread.join()


def test_thread_that_keeps_the_interpreter_shows() -> None:
    usage = first_usage(
        ResourceMonitor(FAST), HoldsTheInterpreter(), passes=lambda usage: usage.interpreter_lag >= 0.04
    )
    assert usage.interpreter_lag >= usage.interpreter_lag_mean > 0


@pytest.mark.anyio
async def test_thread_ends_with_the_run_on_any_event_loop() -> None:
    recorder = Recorder()
    with anyio.fail_after(60):
        async with tiny_trainer().start(
            EndlessLoader(), epochs=1, callbacks=[ResourceMonitor(FAST), recorder]
        ) as run:
            async for _ in run.events(ResourceUsage):
                await run.stop("seen")
                break
    assert run.result.callback_errors == {}
    assert recorder.names()[-1] == "TrainEnd"
    assert not [each for each in threading.enumerate() if each.name == "offloop-resource-monitor"]


@pytest.mark.anyio
async def test_thread_ends_when_the_run_is_cancelled_or_fails() -> None:
    class Fails(Callback):
        on_error = "raise"

        async def on_resource_usage(self, event: ResourceUsage, run: Run) -> None:
            raise RuntimeError("injected")

    with anyio.fail_after(60):
        with pytest.raises(RuntimeError, match="injected"):
            await tiny_trainer().train_async(
                EndlessLoader(), epochs=1, callbacks=[ResourceMonitor(FAST), Fails()]
            )
        with anyio.CancelScope() as scope:
            async with tiny_trainer().start(
                EndlessLoader(), epochs=1, callbacks=[ResourceMonitor(FAST)]
            ) as run:
                async for _ in run.events(ResourceUsage):
                    scope.cancel()
    assert not [each for each in threading.enumerate() if each.name == "offloop-resource-monitor"]


def test_one_monitor_serves_one_run_after_the_other() -> None:
    monitor = ResourceMonitor(FAST)
    assert first_usage(monitor).run_id != first_usage(monitor).run_id


def test_run_that_is_over_before_the_first_sample_ends_well() -> None:
    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(1), epochs=1, callbacks=[recorder, ResourceMonitor(1000.0)])
    assert result.callback_errors == {}
    assert recorder.of(ResourceUsage) == []


def test_failure_is_logged_at_once_and_reported_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise OSError("no /proc here")

    monkeypatch.setattr(psutil, "virtual_memory", broken)

    class UntilDead(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            sampler = monitor._sampler
            if sampler is not None and sampler._error is not None:
                run.stop_nowait("seen")

    monitor = ResourceMonitor(FAST)
    result = tiny_trainer().train(EndlessLoader(), epochs=1, callbacks=[monitor, UntilDead()])
    assert result.status == "stopped"
    assert result.callback_errors["ResourceMonitor"] == ("close: OSError: no /proc here",)
    assert "no more samples" in caplog.text


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "2", True, None])
def test_cadence_is_checked(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="every_seconds"):
        ResourceMonitor(wrong)
