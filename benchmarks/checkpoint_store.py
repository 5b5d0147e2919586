"""How long does a checkpoint hold the loop up, and does writing it disturb anybody?

1. Stall: copy of a model with AdamW state (1,200 tensors, 236 MB) by `SnapshotArena`, against
   `torch._foreach_copy_` and a single memcpy of the same bytes into warm memory, and against the
   blocking part of `torch.distributed.checkpoint.async_save` with its defaults; then once more
   with as many busy processes beside as there are cores, as loader workers are. They take turns, and each is
   compared with the memcpy of its round.
2. Ticker: lateness of a 100 Hz task on an event loop while 1 GB in 10,000 tensors is committed, against the same
   ticker with nothing going on, and beside `async_save`.
3. Commit: seconds from call to durable, for both states.

    python benchmarks/checkpoint_store.py [--quick] [--rounds 7] [--json FILE] [--directory DIR]
"""

import argparse
import contextlib
import gc
import os
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
from measure import Report, clock, parse, quantile, ratio_of, shuffled, verdict
from torch.distributed.checkpoint import state_dict_saver

from offloop.engine.checkpoint import CheckpointRequest, CheckpointStore, SnapshotArena

TICK = 0.01
MEMCPY, FOREACH, SNAPSHOT = "one memcpy", "torch._foreach_copy_", "offloop's snapshot"
ASYNC_SAVE, NOTHING, COMMIT = "dcp.async_save", "nothing", "offloop's commit"

Size = tuple[int, int]
"""Of a model: number of parameters and width, each of shape (width, width)."""


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


@contextlib.contextmanager
def ticking() -> Iterator[list[float]]:
    """Collect how late each tick of a 100 Hz task on an event loop in a thread is, in seconds."""
    lateness: list[float] = []
    stop = threading.Event()

    async def tick() -> None:
        due = clock() + TICK
        while not stop.is_set():
            await anyio.sleep(max(0.0, due - clock()))
            now = clock()
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


def measure_stall(report: Report, size: Size, directory: Path, rounds: int, beside: str = "") -> None:
    """Add the rows of what copies a state; variants take turns, so that noise meets all of them."""
    state = training_state(*size)
    live = tensors_of(state)
    count = sum(tensor.numel() * tensor.element_size() for tensor in live)
    targets = [tensor.clone() for tensor in live]
    flat, flat_target = torch.ones(count, dtype=torch.uint8), torch.ones(count, dtype=torch.uint8)
    arena = SnapshotArena()
    arena.prepare(state)

    def snapshot() -> None:
        # A loop calls state_dict() anew each time, which is why its cost belongs here; the
        # dictionaries of this state are rebuilt, the tensors are the same.
        arena.take_nowait(state).release()

    def foreach() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, live)

    def save() -> Future[object]:
        return async_save(state, directory / "dcp")

    contenders: dict[str, Callable[[], object]] = {
        MEMCPY: lambda: flat_target.copy_(flat),
        FOREACH: foreach,
        SNAPSHOT: snapshot,
        ASYNC_SAVE: save,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with report.measuring():
        for order in shuffled(list(contenders), rounds):
            for name in order:
                started = clock()
                under_way = contenders[name]()
                seconds[name].append(clock() - started)
                if isinstance(under_way, Future):  # nobody is to be disturbed by what it writes
                    under_way.result()
                    shutil.rmtree(directory / "dcp")
    for name, values in seconds.items():
        ratio = ratio_of(values, seconds[MEMCPY])
        goal = verdict(ratio, 1.3) if name == SNAPSHOT else "-"
        least, middle, worst = min(values), statistics.median(values), max(values)
        cells = [f"{1e3 * each:.1f}" for each in (least, middle, worst)]
        report.row(f"{beside}{name}", cells[0], cells[1], "-", cells[2], ratio, goal)
        report.figure(f"stall, {beside}{name}", values)
    quarter = ratio_of(seconds[SNAPSHOT], seconds[ASYNC_SAVE])
    report.note(f"{beside}{SNAPSHOT} / {ASYNC_SAVE}: {quarter}; goal {verdict(quarter, 0.25)}")
    with CheckpointStore(tempfile.mkdtemp(dir=directory)) as store, arena.take_nowait(state) as taken_once:
        durable = [store.commit(taken_once, CheckpointRequest(step=step)).seconds for step in range(3)]
    report.note(
        f"{beside}commit of {len(live):,} tensors, {count / 1e6:.0f} MB: {statistics.median(durable):.2f} s"
    )
    report.figure(f"commit, {beside}seconds", durable)
    arena.close()


def measure_ticker(report: Report, tensors: int, directory: Path, rounds: int) -> None:
    """Add the rows of the ticker."""
    state: dict[str, object] = {"model": {f"t{i:05}": torch.randn(25_000) for i in range(tensors)}}
    arena = SnapshotArena(slots=1)
    late: dict[str, list[float]] = {NOTHING: [], COMMIT: [], ASYNC_SAVE: []}
    seconds: dict[str, list[float]] = {COMMIT: [], ASYNC_SAVE: []}
    with (
        report.measuring(),
        CheckpointStore(directory / "ticker") as store,
        arena.take_nowait(state) as snapshot,
    ):
        for step in range(rounds):
            os.sync()
            gc.collect()
            with ticking() as ticks:
                time.sleep(1.0)
            late[NOTHING] += ticks
            with ticking() as ticks:
                commit = store.commit(snapshot, CheckpointRequest(step=step))
            late[COMMIT] += ticks
            seconds[COMMIT].append(commit.seconds)
            os.sync()
            future_directory = directory / f"dcp-{step}"
            future = async_save(state, future_directory)  # staging is the stall; not counted here
            started = clock()
            with ticking() as ticks:
                future.result()
            late[ASYNC_SAVE] += ticks
            seconds[ASYNC_SAVE].append(clock() - started)
            shutil.rmtree(future_directory)
    for name, values in late.items():
        p99 = quantile(values, 0.99)
        cells = [f"{1e3 * each:.1f}" for each in (min(values), statistics.median(values), p99, max(values))]
        goal = ("<= 10: met" if p99 <= 0.01 else "<= 10: missed") if name == COMMIT else "-"
        report.row(f"ticker beside {name}", *cells, "-", goal)
        report.figure(f"ticker beside {name}", values)
    report.figure("ticker, seconds", seconds)
    took = ", ".join(f"{name} {statistics.median(each):.2f} s" for name, each in seconds.items())
    report.note(f"Durations of what the ticker ran beside, {tensors / 10_000:g} GB: {took}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=7, help="copies of each kind")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")


def main() -> None:
    """Run all."""
    arguments = parse(__doc__, add_arguments)
    rounds, size, tensors = (2, (30, 64), 200) if arguments.quick else (arguments.rounds, (300, 256), 10_000)
    # DCP remarks, in each save, that there is no process group.
    warnings.filterwarnings("ignore", module="torch.distributed")
    report = Report(
        f"How long a checkpoint stalls the loop, and how late a 100 Hz task is beside its commit: {rounds} rounds",
        ["ms", "least", "median", "p99", "worst", "/ memcpy (95 %)", "goal"],
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        measure_stall(report, size, Path(directory), rounds)
        cores = os.cpu_count() or 1
        with busy_processes(cores):
            beside = f"{cores} busy processes beside: "
            measure_stall(report, size, Path(directory), max(1, rounds // 3), beside)
        measure_ticker(report, tensors, Path(directory), max(1, rounds // 2))
    report.note(f"torch uses {torch.get_num_threads()} threads.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
