"""Runs a training script for `verify_resume.py`: records its steps and kills it.

This process imports torch once and forks for every attempt. In the fork, `Trainer.train`, `train_async` and `start`
get a directory, a name, `resume="auto"` and one more callback, without the script's knowledge. The callback writes
digests of every step, one line of JSON each, so that a kill loses no line.

    line on stdin: an attempt ──> fork ──> the script     lines on stdout: {"pid": ...}, then {"code": ...}
"""

import ctypes
import hashlib
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from offloop.engine.callback import Callback, decides, in_step
from offloop.engine.events import CheckpointSaved, Resumed, TrainStart
from offloop.engine.run import Run
from offloop.engine.tools.verify_resume import Attempt, Kill
from offloop.engine.trainer import BaseTrainer
from offloop.engine.training.step_hooks import StepPoint

SAVE_TIMEOUT: Final = 60.0
"""Seconds that a kill waits for the previous checkpoint; arbitrary, only a hanging disk reaches it."""


# The record ----------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a digest of a tensor's bytes, or of the text of a plain value."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
        size = value.numel() * value.element_size()
        if size:
            found.update((ctypes.c_ubyte * size).from_address(value.data_ptr()))
        return found.hexdigest()
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values in nested mappings, lists and tuples, with their paths."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}.{number}" if path else str(number))
    elif isinstance(value, torch.Tensor | bool | int | float | str | None):
        yield path, value


def digests(value: Any) -> dict[str, str]:
    """Return the digests of a nested value, by path."""
    return {path: digest(leaf) for path, leaf in leaves(value)}


def random_digests() -> dict[str, str]:
    """Return digests of the states of the global generators."""
    states = {"torch": digest(torch.get_rng_state()), "python": digest(random.getstate())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = digest((name, keys.tolist(), rest))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = digest(b"".join(bytes(each.tolist()) for each in torch.cuda.get_rng_state_all()))
    return states


class Probe(Callback):
    """Records every step, and kills the process at the chosen place."""

    # This file runs as __main__, but the callback is not one of the user
    __module__ = "offloop.engine.tools.resume_probe"
    name = "offloop-verify-resume"

    def __init__(self, number: int, record: int, kill: Kill | None) -> None:
        """Observe the script's run `number`; `record` is an open file."""
        self._number = number
        self._record = record
        self._kill = kill if kill is not None and kill.run == number else None
        self._last = -1 if self._kill is None else self._kill.last
        self._batches: list[dict[str, str]] = []
        self._saving: Future[CheckpointSaved] | None = None

    def write(self, kind: str, **values: Any) -> None:
        """Append a line."""
        line = json.dumps({"kind": kind, "run": self._number, **values})
        os.write(self._record, line.encode() + b"\n")

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self.write(
            "start",
            step=event.step,
            resumed=event.resumed_from is not None,
            max_time=event.max_time,
            model=digests(dict(run.trainer.model.state_dict())),
            random=random_digests(),
        )

    def on_resumed(self, event: Resumed, run: Run) -> None:
        self.write("resumed", step=event.step, exactness=event.exactness, reasons=event.reasons)

    @in_step
    def before_batch(self, point: StepPoint) -> None:
        self._batches.append(digests(point.batch))
        if self._kill is not None and self._saving is not None:
            kill, self._kill = self._kill, None
            if kill.after_save:
                try:
                    self._saving.result(SAVE_TIMEOUT)
                except Exception as error:
                    self.write("save failed", error=f"{type(error).__name__}: {error}")
            threading.Thread(target=die, args=(kill.delay,), daemon=True).start()

    @in_step
    def after_step(self, point: StepPoint) -> None:
        loss = point.loss
        self.write(
            "step",
            step=point.step,
            epoch=point.epoch,
            time=time.perf_counter(),
            data=self._batches,
            random=random_digests(),
            loss=None if loss is None else float(loss).hex(),
        )
        self._batches = []
        if self._saving is not None and point.step == self._last:
            die(0.0)
        if self._kill is not None and self._saving is None and point.step >= self._kill.step:
            # Applied before the next batch.
            self._saving = point.run.checkpoint_nowait("manual")

    def finish(self, trainer: BaseTrainer, callbacks: Any) -> None:
        """Record the final state; or die, if the run ended before its kill."""
        if self._saving is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        state: dict[str, Any] = {
            "model": dict(trainer.model.state_dict()),
            "optimizer": {name: each.state_dict() for name, each in trainer.optimizers.items()},
            "callbacks": {
                f"{number}.{type(each).__name__}": dict(each.state_dict())
                for number, each in enumerate([*trainer.callbacks, *callbacks])
            },
        }
        if trainer.scheduler is not None:
            state["scheduler"] = trainer.scheduler.state_dict()
        self.write("end", state=digests(state), random=random_digests())


def die(delay: float) -> None:
    """Kill this process after `delay` seconds, as a power cut would."""
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


# The script ----------------------------------------------------------------------------------------


def take_over(attempt: Attempt) -> None:
    """Patch the trainer: all runs of this process get a directory, a name, `resume="auto"` and a probe."""
    record = os.open(attempt.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    train, train_async, start = BaseTrainer.train, BaseTrainer.train_async, BaseTrainer.start
    count = 0

    def prepare(trainer: BaseTrainer, options: dict[str, Any]) -> Probe:
        nonlocal count
        probe = Probe(count, record, attempt.kill)
        probe.write("run", resume=options.get("resume"), sampling=trainer.config.sampling)
        trainer.config = trainer.config.replace(run_dir=attempt.runs, run_name=f"run-{count}")
        count += 1
        options["resume"] = "auto"
        options["callbacks"] = [*options.get("callbacks", ()), probe]
        return probe

    def probed_train(self: BaseTrainer, *loaders: Any, **options: Any) -> Any:
        probe = prepare(self, options)
        result = train(self, *loaders, **options)
        probe.finish(self, options["callbacks"][:-1])
        return result

    async def probed_train_async(self: BaseTrainer, *loaders: Any, **options: Any) -> Any:
        probe = prepare(self, options)
        result = await train_async(self, *loaders, **options)
        probe.finish(self, options["callbacks"][:-1])
        return result

    @asynccontextmanager
    async def probed_start(self: BaseTrainer, *loaders: Any, **options: Any) -> AsyncIterator[Run]:
        probe = prepare(self, options)
        async with start(self, *loaders, **options) as run:
            yield run
        probe.finish(self, options["callbacks"][:-1])

    for name, probed in (
        ("train", probed_train),
        ("train_async", probed_train_async),
        ("start", probed_start),
    ):
        setattr(BaseTrainer, name, probed)


def run_script(attempt: Attempt) -> int:
    """Run the script as `python SCRIPT ...` would; returns its exit code."""
    output = os.open(attempt.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # As in a new process; Python reseeds its own generator after a fork.
        numpy.random.seed()
    sys.argv = [attempt.script, *attempt.arguments]
    sys.path[0] = str(Path(attempt.script).parent.resolve())
    try:
        take_over(attempt)
        runpy.run_path(attempt.script, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Fork for every attempt on stdin, and print its exit code, or minus the signal that ended it."""
    # The first optimizer imports it, which takes seconds.
    importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        attempt = msgspec.json.decode(line, type=Attempt)
        child = os.fork()
        if child == 0:
            code = run_script(attempt)
            sys.stdout.flush()
            sys.stderr.flush()
            # As sys.exit, wait for other threads; there is no public name.
            threading._shutdown()  # type: ignore[attr-defined]
            os._exit(code)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
