"""ResourceMonitor: what the run takes from the machine, and who disturbs it.

    the run's event loop                         a thread of the monitor's own
    ────────────────────                         ─────────────────────────────
    on_train_start: a timer, ten times a         asks the system every two seconds, publishes `ResourceUsage`;
    second, until TrainEnd: how late is it?      between, a timer ten times a second: how late is it?

Both timers fire on time in a healthy process. The one on the event loop is late when a coroutine holds the event
loop. The one in the thread is late when some thread keeps the interpreter to itself (or all cores are busy):
that is how late the training thread, too, gets the interpreter back after each operator that let go of it.
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
    Metrics,
    Run,
    Sample,
    StepEnd,
    TrainEnd,
    TrainStart,
    checks,
    first_use,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

EVERY_SECONDS: Final = 2.0
"""Default cadence: a sample costs 1-3 ms of CPU time, which is 0.1 % of a core then."""
FIRST_AFTER: Final = 0.5
"""Seconds to the first sample at most, so that a short run has one."""
BEAT: Final = 0.1
"""Seconds between two timers: a hold-up longer than this is always seen, a shorter one by chance. A beat costs about
100 us, so both timers together take 0.2 % of a core."""
STEPS_HELD: Final = 100_000
"""StepEnd events held from one sample to the next; above, the oldest are not looked at."""


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


class ResourceMonitor(Callback):
    """Publishes `ResourceUsage` at a cadence. Training never waits for it, the event loop only for a timer.

    Costs about 0.3 % of one core at the default cadence, see `ResourceUsage.own_cpu_percent`. Where there is no
    NVIDIA GPU, nothing is said about one.
    """

    @explains_arguments()
    def __init__(self, every_seconds: float = EVERY_SECONDS) -> None:
        """Choose the cadence.

        Args:
            every_seconds: Seconds between two samples, above 0.

        Raises:
            ConfigError: It is out of its range.
        """
        checks.number("every_seconds", every_seconds, above=0, below=threading.TIMEOUT_MAX, unit="seconds")
        self.every_seconds = every_seconds
        self._sampler: _Sampler | None = None

    def reset(self) -> None:
        self._sampler = None

    async def on_train_start(self, event: TrainStart, run: Run) -> None:
        """Start the thread, then be the timer on the event loop until the run ends."""
        sampler = _Sampler(event, run, self.every_seconds)
        sampler.start()
        self._sampler = sampler  # only now: one that the system gave no thread has nothing to stop
        with run.events(TrainEnd, name="ResourceMonitor.end") as end:
            while True:
                sampler.loop_lag.expect(time.perf_counter() + BEAT)
                with anyio.move_on_after(BEAT):
                    await end.take_batch()
                    return
                sampler.loop_lag.came(time.perf_counter())

    def close(self) -> None:
        """End the thread. Raises what it failed with."""
        if self._sampler is not None:
            self._sampler.stop()


class _Lateness:
    """How late a timer was. One thread is the timer, another reads."""

    def __init__(self) -> None:
        self._due: float | None = None  # when the timer should fire next; written by the timer, read by both
        self._late: deque[float] = deque()  # appended by the timer, emptied by the reader

    def expect(self, due: float) -> None:
        """The timer should fire at `due`."""
        self._due = due

    def came(self, now: float) -> None:
        """It has fired."""
        assert self._due is not None
        self._late.append(max(0.0, now - self._due))
        self._due = None

    def take(self, now: float) -> tuple[float, float]:
        """Return the longest lateness since the last call and the mean; a timer that is overdue counts."""
        due = self._due  # read before the rest: one that fires meanwhile is seen next time, not twice
        late = [self._late.popleft() for _ in range(len(self._late))]
        if due is not None and now > due:
            late.append(now - due)
        return (max(late), sum(late) / len(late)) if late else (0.0, 0.0)


class _Sampler(Thread):
    """The monitor's thread. No daemon: `stop` ends it, and it waits for nothing but its own timer."""

    def __init__(self, start: TrainStart, run: Run, every_seconds: float) -> None:
        super().__init__(self._sample, name="offloop-resource-monitor", daemon=False)
        self.loop_lag = _Lateness()  # the timer is the event loop
        self._interpreter_lag = _Lateness()  # the timer is this thread
        self._run = run
        self._every_seconds = every_seconds
        self._device = torch.device(start.device)
        self._since: TrainStart | StepEnd = start
        self._steps = run.events(StepEnd, buffer=STEPS_HELD, name="ResourceMonitor.steps")
        self._stopped = threading.Event()
        self._error: Exception | None = None  # written by this thread before it ends, read after join

    def stop(self) -> None:
        """End the thread and wait for it; raise what it failed with. Not on the event loop."""
        self._stopped.set()
        self.join()
        if self._error is not None:
            raise self._error

    def _sample(self) -> None:
        try:
            self._work()
        except BusClosedError:
            pass  # the run is over: nobody would see the sample
        except Exception as error:
            logger.exception("ResourceMonitor failed; there will be no more samples of this run")
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
                self._interpreter_lag.came(now)
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
        loop_lag, loop_lag_mean = self.loop_lag.take(now)
        interpreter_lag, interpreter_lag_mean = self._interpreter_lag.take(now)
        return {
            "loop_lag": loop_lag,
            "loop_lag_mean": loop_lag_mean,
            "interpreter_lag": interpreter_lag,
            "interpreter_lag_mean": interpreter_lag_mean,
        }

    def _throughput(self) -> dict[str, Any]:
        steps = self._steps.take()
        values = throughput(self._since, steps)
        if steps:
            self._since = steps[-1]
        return values


class _Counters(NamedTuple):
    """What the system counts up, and a sample shows the growth of."""

    disk_read: float
    disk_written: float
    network_sent: float
    network_received: float
    own_cpu: float


class _Machine:
    """This process and its machine. One thread: percentages are since the last reading in it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # begins the first interval
        psutil.cpu_percent()
        self._counters = self._count()

    def read(self, seconds: float) -> dict[str, Any]:
        """Return fields of `ResourceUsage`, over the `seconds` since the last call. Blocks for 1-3 ms."""
        before, self._counters = self._counters, self._count()
        # max: a device that was unplugged takes its count with it
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
            disk_read=disk.read_bytes if disk else 0,  # None in some containers
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
        """Return the state of each; what a GPU does not tell is None."""
        return tuple(self._read(index, handle) for index, handle in enumerate(self._handles))

    def close(self) -> None:
        """Let go of the library."""
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
                return None  # not with this GPU, this driver or these rights

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
    """Return the module `pynvml`, initialised, or None where there is no such package, driver or GPU."""
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
    """Return what torch's allocator holds on a CUDA device; nothing for other devices. Waits for no device."""
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    return {
        "cuda_allocated_bytes": statistics.get("allocated_bytes.all.current", 0),
        "cuda_reserved_bytes": statistics.get("reserved_bytes.all.current", 0),
        "cuda_peak_bytes": statistics.get("allocated_bytes.all.peak", 0),
    }


def throughput(since: TrainStart | StepEnd, steps: Sequence[StepEnd]) -> dict[str, Any]:
    """Return speed and shares over the steps that ended after `since`; nothing if none did."""
    if not steps:
        return {}
    last = steps[-1]
    done, batches, seconds = last.step - since.step, last.batch - since.batch, last.time - since.time
    if done <= 0 or seconds <= 0:
        return {}
    scale = done / len(steps)  # above 1 where samples were dropped on the way here
    waited = scale * sum(step.data_time for step in steps)
    # A step's time begins with its first batch, so it holds the waits for the others of its window.
    waited_inside = waited * (1 - done / batches) if batches > done else 0.0
    computed = scale * sum(step.step_time for step in steps) - waited_inside
    waiting = min(100.0, 100.0 * waited / seconds)  # the scale may overdo it
    return {
        "steps_per_second": done / seconds,
        "samples_per_second": scale * sum(step.samples for step in steps) / seconds,
        "data_wait_percent": waiting,
        "compute_percent": min(100.0 - waiting, 100.0 * computed / seconds),
    }


def shares(
    before: Mapping[str, CallbackCosts], after: Mapping[str, CallbackCosts], seconds: float
) -> dict[str, Any]:
    """Return what each callback took of the time, in per cent."""
    if seconds <= 0:
        return {}
    nothing = CallbackCosts()
    cpu, held = {}, {}
    for name, costs in after.items():
        earlier = before.get(name, nothing)
        cpu[name] = 100.0 * (costs.cpu - earlier.cpu) / seconds
        held[name] = 100.0 * (costs.held - earlier.held) / seconds
    return {"callback_cpu_percent": Metrics(cpu), "callback_held_percent": Metrics(held)}
