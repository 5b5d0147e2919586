"""A real training is killed with `kill -9` at random moments, again and again: nothing is lost but its last steps.

python -m pytest tests/engine/test_kill.py -m soak      200 kills, a minute or two
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloop.engine import StepEnd, read_events
from offloop.engine.checkpoint import CheckpointReader

pytestmark = pytest.mark.slow

EPOCHS = 40

# One process imports torch and forks the trainings: 25 imports would take a minute.
NURSERY = """
    import hashlib, importlib, os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torchmetrics", "anyio._backends._asyncio"):
        importlib.import_module(name)  # each child's first optimizer, metric and event loop would: a second and more
    sys.path.insert(0, {tests!r})
    from test_resume_plan import a_run
    from offloop.callbacks import ModelCheckpoint
    from offloop.engine import Callback, in_step

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    class SaveEachStep(Callback):
        @in_step
        def after_step(self, point):
            point.run.checkpoint_nowait("manual")  # waits for the disk rather than leaving one out

    class Say(Callback):
        async def on_resumed(self, event, run):
            say("resumed", event.step, event.exactness)
        async def on_checkpoint_saved(self, event, run):
            say("saved", event.saved_step)

    def train(directory, name, epochs):
        callbacks = [] if name == "whole" else [ModelCheckpoint(), SaveEachStep(), Say()]
        result, _, weights = a_run(Path(directory), name, *callbacks, resume="auto", epochs=int(epochs))
        found = hashlib.sha256()
        for each in weights.values():
            found.update(each.numpy().tobytes())
        say("digest", found.hexdigest(), sorted(result.metrics.items()))

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(*line.split())
                code = 0
            finally:
                os._exit(code)
        say("pid", child)
        _, status = os.waitpid(child, 0)
        say("ended", os.waitstatus_to_exitcode(status))
    os._exit(0)  # taking so many modules down takes seconds
"""


class Nursery:
    """Starts trainings, and tells what they say."""

    def __init__(self) -> None:
        code = textwrap.dedent(NURSERY).format(tests=str(Path(__file__).parent / "recovery"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._child = 0

    def start(self, directory: Path, name: str, epochs: int) -> None:
        assert self._process.stdin is not None
        print(directory, name, epochs, file=self._process.stdin, flush=True)
        word, child = self.hear()
        assert word == "pid"
        self._child = int(child)

    def hear(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        word, _, rest = self._process.stdout.readline().strip().partition(" ")
        assert word, "the process died"
        return word, rest

    def until_end(self) -> Iterator[tuple[str, str]]:
        while True:
            word, rest = self.hear()
            yield word, rest
            if word == "ended":
                return

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was at its end
            os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def kill_until_it_ends(run: Path, kills: int, source: random.Random, nursery: Nursery) -> tuple[int, str]:
    """Kill a training one to seven checkpoints after it has gone on, time and again, and let it end.

    Returns:
        How many kills that were (fewer if it came to its end before), and what its weights are.
    """
    durable = done = 0
    digest = ""
    while not digest:
        nursery.start(run.parent, run.name, EPOCHS)
        wanted = source.randint(1, 7) if done < kills else 10**9
        before, status = durable, ""
        for word, rest in nursery.until_end():
            if word == "resumed":
                assert rest == f"{before} bitwise", "it goes on from the last one, and exactly"
            elif word == "saved":
                durable, wanted = int(rest), wanted - 1
                if wanted == 0:
                    spin = source.randint(0, 20_000)
                    while spin:  # no sleep: up to a millisecond, anywhere in a step or a save
                        spin -= 1
                    nursery.kill()
            elif word == "digest":
                digest = rest
            else:
                status = rest
        if digest:
            assert status in ("0", str(-signal.SIGKILL))  # killed in its very last moment, or not at all
            break
        assert status == str(-signal.SIGKILL)
        reader = CheckpointReader(run)
        assert reader.damaged() == []
        there = reader.checkpoints()
        for info in there:
            reader.verify(info)
        assert there[-1].step >= durable, "what was said to be durable is there"
        durable = there[-1].step
        done += 1
        assert len(there) >= min(2, done), "the one before the last is never deleted too early"
        assert len(there) <= 6, "the newest two, the best, the one resumed from, and what a kill left over"
    names = os.listdir(run / "checkpoints")
    assert not [name for name in names if name.startswith(".")], "what kills left is swept"
    steps_made = [event.step for event in read_events(run) if isinstance(event, StepEnd)]
    assert steps_made == sorted(set(steps_made)), "no step stands there twice"
    assert steps_made[-1] == 5 * EPOCHS
    return done, digest


@pytest.mark.parametrize(
    "kills", [25, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_killed_training_never_goes_back_and_ends_bit_for_bit(
    kills: int, nursery: Nursery, tmp_path: Path
) -> None:
    """Five steps an epoch, a checkpoint after each; as many trainings as it takes for so many kills."""
    source = random.Random(0)
    nursery.start(tmp_path, "whole", EPOCHS)
    (digest,) = [rest for word, rest in nursery.until_end() if word == "digest"]
    for number in itertools.count():
        done, found = kill_until_it_ends(tmp_path / f"killed-{number}", kills, source, nursery)
        assert done and found == digest
        kills -= done
        if not kills:
            break
