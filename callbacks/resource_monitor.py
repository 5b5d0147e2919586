"""ResourceMonitor: the machine's resources that a run uses, and what disturbs it.

    the run's event loop                         the monitor's thread
    ────────────────────                         ────────────────────
    on_train_start: a timer ten times a          reads the system every two seconds, publishes `ResourceUsage`;
    second until TrainEnd: how late is it?       in between a timer ten times a second: how late is it?

In a healthy process both timers fire on time. The one on the event loop is late when a coroutine blocks the event loop.
The one in the thread is late when another thread keeps the interpreter, or all cores are busy. The training thread
waits as long for the interpreter after each operator that releases it.
"""

import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import anyio
import msgspec
import psutil
import torch

from offloop.engine import (
    BusClosedError,
    Callback,
    CallbackCosts,
    ConfigError,
    Metrics,
    Run,
    Sample,
    StepEnd,
    TrainEnd,
    TrainerParts,
    TrainStart,
    checks,
    first_use,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

EVERY_SECONDS: Final = 2.0
"""Default interval: a sample costs 1-3 ms of CPU time, so 0.1 % of a core."""
FIRST_AFTER: Final = 0.5
"""Seconds to the first sample at most, so that short runs have one."""
BEAT: Final = 0.1
"""Seconds between two timers. A longer delay is always seen, a shorter one by chance. A timer costs about 100 us, so
both together take 0.2 % of a core."""
STEPS_HELD: Final = 100_000
"""StepEnd events buffered between two samples; beyond, the oldest are dropped."""


class GpuUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One NVIDIA GPU of the machine; its values include what other processes use. None if the driver does not say."""

    index: int
    """Index of the GPU in the driver's order, which `CUDA_VISIBLE_DEVICES` does not change."""
    name: str = ""
    """Product name."""
    utilisation_percent: float | None = None
    """Percentage of the time in which a kernel ran, 0 to 100. 100 means never idle, not fully used."""
    memory_used_bytes: int | None = None
    """Memory in use, in bytes."""
    memory_total_bytes: int | None = None
    """Memory of the GPU, in bytes."""
    temperature_celsius: float | None = None
    """Temperature in degrees Celsius."""
    power_watts: float | None = None
    """Power draw in watts."""


class ResourceUsage(Sample, frozen=True, kw_only=True):
    """Published by `ResourceMonitor` every `every_seconds`: resources used since the previous sample.

    Thread: the monitor's own thread.
    """

    cpu_percent: float = 0.0
    """CPU time of this process, as a percentage of one core: above 100 if several are busy."""
    system_cpu_percent: float = 0.0
    """CPU time of all processes, as a percentage of all cores, 0 to 100."""
    memory_bytes: int = 0
    """Resident memory of this process in bytes, without its loader workers."""
    system_memory_bytes: int = 0
    """Memory of the machine in bytes that is not available for new processes."""
    system_memory_total_bytes: int = 0
    """Memory of the machine in bytes."""
    threads: int = 0
    """Number of threads of this process, including native ones."""
    disk_read_bytes_per_second: float = 0.0
    """Bytes read from the machine's disks a second; 0 if the system does not say."""
    disk_written_bytes_per_second: float = 0.0
    """Bytes written to the machine's disks a second; 0 if the system does not say."""
    network_sent_bytes_per_second: float = 0.0
    """Bytes sent over the machine's network a second; 0 if the system does not say."""
    network_received_bytes_per_second: float = 0.0
    """Bytes received over the machine's network a second; 0 if the system does not say."""
    gpus: tuple[GpuUsage, ...] = ()
    """NVIDIA GPUs of the machine; empty without one, or without the package `nvidia-ml-py`."""
    cuda_allocated_bytes: int | None = None
    """Memory of tensors on the run's CUDA device in bytes, by torch's allocator; None without CUDA."""
    cuda_reserved_bytes: int | None = None
    """Memory in bytes that torch's allocator holds on that device; None without CUDA."""
    cuda_peak_bytes: int | None = None
    """Highest `cuda_allocated_bytes` since the process started or torch's peak was reset; None without CUDA."""
    steps_per_second: float = 0.0
    """Optimizer steps a second."""
    samples_per_second: float = 0.0
    """Training samples a second."""
    data_wait_percent: float | None = None
    """Percentage of the time in which training waited for batches, 0 to 100; None if no step ended."""
    compute_percent: float | None = None
    """Percentage of the time inside steps as the host sees it, 0 to 100; None if no step ended. The rest to 100 lies
    between steps: validation, pauses, deciders, checkpoints, a subscriber with `on_full="block"`."""
    loop_lag: float = 0.0
    """Longest delay of a timer on the run's event loop, in seconds, including one in progress."""
    loop_lag_mean: float = 0.0
    """Mean of these delays in seconds."""
    interpreter_lag: float = 0.0
    """Longest time in seconds that a thread waited for the interpreter after a sleep."""
    interpreter_lag_mean: float = 0.0
    """Mean of these times in seconds. Below 0.0005 nothing disturbs training; near Python's switch interval (0.005
    unless a run shortens it) some thread computes in plain Python all the time."""
    callback_cpu_percent: Metrics = Metrics()
    """CPU time of the handlers of each callback, by the callback's name, as a percentage of one core."""
    callback_held_percent: Metrics = Metrics()
    """Percentage of the time in which the handlers of each callback held the event loop, 0 to 100."""
    own_cpu_percent: float = 0.0
    """CPU time of the monitor's own thread, as a percentage of one core."""

    units = dict.fromkeys(("loop_lag", "loop_lag_mean", "interpreter_lag", "interpreter_lag_mean"), "seconds")


class ResourceMonitor(Callback):
    """Publishes `ResourceUsage` at an interval. Training never waits for it, the event loop only for a timer.

    It costs about 0.3 % of one core at the default interval, see `ResourceUsage.own_cpu_percent`. GPUs are read if they
    are NVIDIA's and the package `nvidia-ml-py` is installed. With several processes, it samples that of rank 0, and its
    machine.
    """

    @explains_arguments()
    def __init__(self, every_seconds: float = EVERY_SECONDS) -> None:
        """Choose the interval.

        Args:
            every_seconds: Seconds between samples, above 0.

        Raises:
            ConfigError: It is out of range.
        """
        checks.number("every_seconds", every_seconds, above=0, below=threading.TIMEOUT_MAX, unit="seconds")
        self.every_seconds = every_seconds
        self._sampler: _Sampler | None = None

    def reset(self) -> None:
        self._sampler = None

    def prepare(self, trainer: TrainerParts) -> None:
        if self.runs_in != "here":
            raise ConfigError(
                f"{type(self).__name__} measures the process that trains, so it cannot have runs_in={self.runs_in!r}: "
                "leave that out"
            )

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        """Start the thread, then run the timer on the event loop until the run ends."""
        sampler = _Sampler(event, run, self.every_seconds)
        sampler.start()
        # Not before: a thread that could not be started cannot be stopped.
        self._sampler = sampler
        with run.events(TrainEnd, name="ResourceMonitor.end") as end:
            while True:
                sampler.loop_lag.expect(time.perf_counter() + BEAT)
                with anyio.move_on_after(BEAT):
                    await end.take_batch()
                    return
                sampler.loop_lag.fired(time.perf_counter())

    def close(self) -> None:
        """End the thread. Raises its exception, if it failed."""
        if self._sampler is not None:
            self._sampler.stop()


class _Lateness:
    """How late a timer was. One thread runs the timer, another reads."""

    def __init__(self) -> None:
        # When the timer is due next. The timer writes it, both threads read it; it is replaced whole.
        self._due: float | None = None
        # The timer appends, the reader pops from the left; both are atomic.
        self._late: deque[float] = deque()

    def expect(self, due: float) -> None:
        """Record when the timer is due."""
        self._due = due

    def fired(self, now: float) -> None:
        """Record that the timer has fired."""
        assert self._due is not None
        self._late.append(max(0.0, now - self._due))
        self._due = None

    def take(self, now: float) -> tuple[float, float]:
        """Return the longest and the mean delay since the last call. A timer that is overdue counts."""
        # Read first: a timer that fires meanwhile then counts next time, not twice.
        due = self._due
        late = [self._late.popleft() for _ in range(len(self._late))]
        if due is not None and now > due:
            late.append(now - due)
        return (max(late), sum(late) / len(late)) if late else (0.0, 0.0)


class _Sampler(Thread):
    """The monitor's thread. Not a daemon: it waits only for its own timer, and `stop` ends it."""

    def __init__(self, start: TrainStart, run: Run, every_seconds: float) -> None:
        super().__init__(self._sample, name="offloop-resource-monitor", daemon=False)
        # The event loop runs the timer of the first, this thread that of the second.
        self.loop_lag = _Lateness()
        self._interpreter_lag = _Lateness()
        self._run = run
        self._every_seconds = every_seconds
        self._device = torch.device(start.device)
        self._since: TrainStart | StepEnd = start
        self._steps = run.events(StepEnd, buffer=STEPS_HELD, name="ResourceMonitor.steps")
        self._stopped = threading.Event()
        # Written by this thread before it ends, read after the join.
        self._error: Exception | None = None

    def stop(self) -> None:
        """End the thread, wait for it, and raise its exception if it failed. Not on the event loop."""
        self._stopped.set()
        self.join()
        if self._error is not None:
            raise self._error

    def _sample(self) -> None:
        try:
            self._work()
        except BusClosedError:
            # The run is over.
            pass
        except Exception as error:
            logger.exception("ResourceMonitor failed; this run gets no more samples")
            self._error = error
        finally:
            self._steps.close()

    def _work(self) -> None:
        machine, gpus, costs = _Machine(), _Gpus(load_nvml()), self._run.callback_costs
        sampled = time.perf_counter()
        due = sampled + min(FIRST_AFTER, self._every_seconds)
        beat = min(BEAT, self._every_seconds)
        try:
            while True:
                self._interpreter_lag.expect(time.perf_counter() + beat)
                if self._stopped.wait(beat):
                    return
                now = time.perf_counter()
                self._interpreter_lag.fired(now)
                if now >= due:
                    due = now + self._every_seconds
                    before, costs = costs, self._run.callback_costs
                    self._run.publish(
                        ResourceUsage(
                            **machine.read(now - sampled),
                            **self._lags(now),
                            **self._throughput(),
                            **cuda_memory(self._device),
                            **shares(before, costs, now - sampled),
                            gpus=gpus.read(),
                        )
                    )
                    sampled = now
        finally:
            gpus.close()

    def _lags(self, now: float) -> dict[str, Any]:
        names = ("loop_lag", "loop_lag_mean", "interpreter_lag", "interpreter_lag_mean")
        return dict(zip(names, self.loop_lag.take(now) + self._interpreter_lag.take(now), strict=True))

    def _throughput(self) -> dict[str, Any]:
        steps = self._steps.take()
        values = throughput(self._since, steps)
        if steps:
            self._since = steps[-1]
        return values


class _Counters(NamedTuple):
    """Counters of the system, of which a sample shows the growth."""

    disk_read: float
    disk_written: float
    network_sent: float
    network_received: float
    own_cpu: float


class _Machine:
    """This process and its machine. Use it from one thread: percentages are since the last reading there."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        # The first calls start the intervals.
        self._process.cpu_percent()
        psutil.cpu_percent()
        self._counters = self._count()

    def read(self, seconds: float) -> dict[str, Any]:
        """Return fields of `ResourceUsage`, over the `seconds` since the last call. Blocks for 1-3 ms."""
        before, self._counters = self._counters, self._count()
        # Never negative: an unplugged device takes its count with it.
        rates = [
            max(0.0, now - then) / seconds if seconds > 0 else 0.0
            for then, now in zip(before, self._counters, strict=True)
        ]
        memory = psutil.virtual_memory()
        with self._process.oneshot():
            return {
                "cpu_percent": self._process.cpu_percent(),
                "system_cpu_percent": psutil.cpu_percent(),
                "memory_bytes": self._process.memory_info().rss,
                "system_memory_bytes": memory.total - memory.available,
                "system_memory_total_bytes": memory.total,
                "threads": self._process.num_threads(),
                "disk_read_bytes_per_second": rates[0],
                "disk_written_bytes_per_second": rates[1],
                "network_sent_bytes_per_second": rates[2],
                "network_received_bytes_per_second": rates[3],
                "own_cpu_percent": 100.0 * rates[4],
            }

    def _count(self) -> _Counters:
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        return _Counters(
            # None in some containers
            disk_read=disk.read_bytes if disk else 0,
            disk_written=disk.write_bytes if disk else 0,
            network_sent=network.bytes_sent if network else 0,
            network_received=network.bytes_recv if network else 0,
            own_cpu=time.thread_time(),
        )


class _Gpus:
    """The machine's NVIDIA GPUs, through the driver's management library."""

    def __init__(self, nvml: Any | None) -> None:
        """Take the module `pynvml`, initialised; None for no GPUs."""
        self._nvml = nvml
        self._handles: list[Any] = []
        if nvml is not None:
            count = nvml.nvmlDeviceGetCount()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def read(self) -> tuple[GpuUsage, ...]:
        """Return the state of each GPU. Values that a GPU does not report are None."""
        return tuple(self._read(index, handle) for index, handle in enumerate(self._handles))

    def close(self) -> None:
        """Release the library."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._handles = None, []

    def _read(self, index: int, handle: Any) -> GpuUsage:
        nvml = self._nvml
        assert nvml is not None

        def ask(query: str, *arguments: Any) -> Any:
            try:
                return getattr(nvml, query)(handle, *arguments)
            except nvml.NVMLError:
                # This GPU, driver or user cannot query it.
                return None

        name, memory = ask("nvmlDeviceGetName"), ask("nvmlDeviceGetMemoryInfo")
        rates = ask("nvmlDeviceGetUtilizationRates")
        power = ask("nvmlDeviceGetPowerUsage")
        return GpuUsage(
            index=index,
            name=name.decode() if isinstance(name, bytes) else name or "",
            utilisation_percent=None if rates is None else float(rates.gpu),
            memory_used_bytes=None if memory is None else memory.used,
            memory_total_bytes=None if memory is None else memory.total,
            temperature_celsius=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_watts=None if power is None else power / 1000,
        )


def load_nvml() -> Any | None:
    """Return the module `pynvml`, initialised, or None without the package, a driver or a GPU."""
    try:
        with first_use("pynvml"):
            nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def cuda_memory(device: torch.device) -> dict[str, Any]:
    """Return the memory of torch's allocator on a CUDA device; nothing for other devices. Does not synchronise."""
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    return {
        "cuda_allocated_bytes": statistics.get("allocated_bytes.all.current", 0),
        "cuda_reserved_bytes": statistics.get("reserved_bytes.all.current", 0),
        "cuda_peak_bytes": statistics.get("allocated_bytes.all.peak", 0),
    }


def throughput(since: TrainStart | StepEnd, steps: Sequence[StepEnd]) -> dict[str, Any]:
    """Return speed and shares over the steps that ended after `since`; nothing without such steps."""
    if not steps:
        return {}
    last = steps[-1]
    done, batches, seconds = last.step - since.step, last.batch - since.batch, last.time - since.time
    if done <= 0 or seconds <= 0:
        return {}
    # Above 1 if events were dropped.
    scale = done / len(steps)
    waited = scale * sum(step.data_time for step in steps)
    # The time of a step starts with its first batch, so it contains the waits for its other batches.
    waited_inside = waited * (1 - done / batches) if batches > done else 0.0
    computed = scale * sum(step.step_time for step in steps) - waited_inside
    # The scale can overestimate.
    waiting = min(100.0, 100.0 * waited / seconds)
    return {
        "steps_per_second": done / seconds,
        "samples_per_second": scale * sum(step.samples for step in steps) / seconds,
        "data_wait_percent": waiting,
        "compute_percent": min(100.0 - waiting, 100.0 * computed / seconds),
    }


def shares(
    before: Mapping[str, CallbackCosts], after: Mapping[str, CallbackCosts], seconds: float
) -> dict[str, Any]:
    """Return the share of the time that each callback took, in percent."""
    if seconds <= 0:
        return {}
    nothing = CallbackCosts()
    cpu, held = {}, {}
    for name, costs in after.items():
        earlier = before.get(name, nothing)
        cpu[name] = 100.0 * (costs.cpu - earlier.cpu) / seconds
        held[name] = 100.0 * (costs.held - earlier.held) / seconds
    return {"callback_cpu_percent": Metrics(cpu), "callback_held_percent": Metrics(held)}
