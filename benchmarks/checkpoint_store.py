"""How long does a checkpoint hold the loop up, and does writing it disturb anybody?

1. Stall: copy of a model with AdamW state (1,200 tensors, 236 MB) by `SnapshotArena`, against
   `torch._foreach_copy_` and a single memcpy of the same bytes into warm memory, and against the
   blocking part of `torch.distributed.checkpoint.async_save` with its defaults; then once more
   with as many busy processes beside as there are cores, as loader workers are.
2. Ticker: lateness of a 100 Hz task on an event loop while 1 GB in 10,000 tensors is committed, against the same
   ticker with nothing going on, and beside `async_save`.
3. Commit: seconds from call to durable, for both states.

    python benchmarks/checkpoint_store.py [--rounds 7] [--directory DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import anyio
import torch
from torch.distributed.checkpoint import state_dict_saver

from offloop.engine.checkpoint import CheckpointRequest, CheckpointStore, SnapshotArena

TICK = 0.01


def training_state(parameters: int, width: int) -> dict[str, object]:
    """Return model and AdamW state after one step: four tensors per parameter, all written."""
    model = torch.nn.ParameterList([torch.randn(width, width) for _ in range(parameters)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def tensors_of(state: object) -> list[torch.Tensor]:
    """Return the tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    if isinstance(state, list):
        return [tensor for value in state for tensor in tensors_of(value)]
    return []


def timed(function: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextlib.contextmanager
def ticking() -> Iterator[list[float]]:
    """Collect how late each tick of a 100 Hz task on an event loop in a thread is, in seconds."""
    lateness: list[float] = []
    stop = threading.Event()

    async def tick() -> None:
        due = time.perf_counter() + TICK
        while not stop.is_set():
            await anyio.sleep(max(0.0, due - time.perf_counter()))
            now = time.perf_counter()
            lateness.append(now - due)
            due = max(due + TICK, now)

    thread = threading.Thread(target=anyio.run, args=(tick,))
    thread.start()
    time.sleep(5 * TICK)
    lateness.clear()
    try:
        yield lateness
    finally:
        stop.set()
        thread.join()


def milliseconds(values: list[float]) -> str:
    """Return least and median."""
    return f"{min(values) * 1e3:8.1f} {statistics.median(values) * 1e3:8.1f}"


def async_save(state: dict[str, object], directory: Path) -> Future[object]:
    """Start DCP's asynchronous save with its defaults, without a process group."""
    future = state_dict_saver.async_save(state, checkpoint_id=directory, no_dist=True)
    assert isinstance(future, Future)
    return future


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let so many processes want a core each."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_stall(directory: Path, rounds: int, company: str) -> None:
    """Print the first table: variants alternate, so that noise meets all of them."""
    state = training_state(300, 256)
    live = tensors_of(state)
    size = sum(tensor.numel() * tensor.element_size() for tensor in live)
    print(f"\nstall, {len(live):,} tensors, {size / 1e6:.0f} MB, {company} (ms: least, median)")
    targets = [tensor.clone() for tensor in live]
    flat, flat_target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    arena = SnapshotArena()
    arena.prepare(state)
    results: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        results.setdefault(name, []).append(seconds)

    def snapshot() -> None:
        # A loop calls state_dict() anew each time, which is why its cost belongs here; the
        # dictionaries of this state are rebuilt, the tensors are the same.
        arena.take_nowait(state).release()

    def foreach() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, live)

    for number in range(rounds):
        note("one memcpy", timed(lambda: flat_target.copy_(flat)))
        note("_foreach_copy_", timed(foreach))
        note("SnapshotArena.take", timed(snapshot))
        started = time.perf_counter()
        future = async_save(state, directory / f"dcp-{number}")
        note("dcp.async_save", time.perf_counter() - started)
        future.result()
        shutil.rmtree(directory / f"dcp-{number}")
    plain = statistics.median(results["one memcpy"])
    for name, values in results.items():
        ratio = statistics.median(values) / plain
        print(f"  {name:20} {milliseconds(values)}   {ratio:5.2f} x one memcpy")
    with CheckpointStore(directory / "run") as store:
        for step in range(3):
            with arena.take_nowait(state) as taken:
                commit = store.commit(taken, CheckpointRequest(step=step))
                print(f"  commit: {commit.seconds:.2f} s")
    arena.close()


def measure_ticker(directory: Path, rounds: int) -> None:
    """Print the second table."""
    state: dict[str, object] = {"model": {f"t{i:05}": torch.randn(25_000) for i in range(10_000)}}
    arena = SnapshotArena(slots=1)
    print("\n100 Hz ticker during a commit of 10,000 tensors, 1 GB (ms late: median, p99, worst)")
    late: dict[str, list[float]] = {"nothing": [], "commit": [], "dcp.async_save": []}
    seconds: dict[str, list[float]] = {"commit": [], "dcp.async_save": []}
    with CheckpointStore(directory / "ticker") as store, arena.take_nowait(state) as snapshot:
        for step in range(rounds):
            os.sync()
            gc.collect()
            with ticking() as ticks:
                time.sleep(1.0)
            late["nothing"] += ticks
            with ticking() as ticks:
                commit = store.commit(snapshot, CheckpointRequest(step=step))
            late["commit"] += ticks
            seconds["commit"].append(commit.seconds)
            os.sync()
            future_directory = directory / f"dcp-{step}"
            future = async_save(state, future_directory)  # staging is the stall; not counted here
            started = time.perf_counter()
            with ticking() as ticks:
                future.result()
            late["dcp.async_save"] += ticks
            seconds["dcp.async_save"].append(time.perf_counter() - started)
            shutil.rmtree(future_directory)
    for name, values in late.items():
        values.sort()
        p99 = values[int(0.99 * len(values))]
        took = f"   took {statistics.median(seconds[name]):.2f} s" if name in seconds else ""
        print(
            f"  {name:20} {statistics.median(values) * 1e3:8.2f} {p99 * 1e3:8.2f}"
            f" {values[-1] * 1e3:8.2f}   of {len(values)} ticks{took}"
        )


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to be measured")
    arguments = parser.parse_args()
    # DCP remarks, in each save, that there is no process group.
    warnings.filterwarnings("ignore", module="torch.distributed")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}, {platform.system()} {platform.machine()}"
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        measure_stall(Path(directory), arguments.rounds, "nothing beside")
        cores = os.cpu_count() or 1
        with busy_processes(cores):
            beside = f"{cores} busy processes beside"
            measure_stall(Path(directory), max(1, arguments.rounds // 3), beside)
        measure_ticker(Path(directory), max(1, arguments.rounds // 2))


if __name__ == "__main__":
    main()
