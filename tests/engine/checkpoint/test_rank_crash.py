"""Two ranks write one checkpoint, and the power or a process dies: the old one, or the new one with both parts."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_support import step_of
from power_cut import (
    Done,
    PowerCut,
    RecordingFileSystem,
    assert_old_or_new,
    possible_steps,
    read_tree,
    verdict,
)
from rank_support import Rank, Stores, check_part, save_first

from offloop.engine.checkpoint import CheckpointReader, CheckpointStore, LoadedCheckpoint


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()


def step_of_both(loaded: LoadedCheckpoint) -> int:
    """Return the step of a checkpoint of two ranks, after checking all of it."""
    step = step_of(loaded.state)
    assert [*loaded.parts] == [1]
    check_part(loaded.parts[1], step, 1)
    return step


def record_save(directory: Path, stores: Stores) -> tuple[dict[str, bytes], list[Done]]:
    """Save steps 1 and 2, then record what both ranks do to save step 3, in the order in which they do it."""

    def save(filesystem: RecordingFileSystem | None, *steps: int) -> None:
        run = str(steps)
        channel = stores.channel(0, run=run)
        other = Rank(directory, stores.channel(1, run=run), filesystem)
        with CheckpointStore(directory, filesystem=filesystem, ranks=channel) as store:
            for step in steps:
                with other.saving(step, step):
                    save_first(store, channel, step, step)
        assert other.failure is None

    save(None, 1, 2)
    before, filesystem = read_tree(directory), RecordingFileSystem()
    save(filesystem, 3)
    return before, filesystem.log


def test_power_cut_at_any_operation_of_either_rank_leaves_old_or_new(tmp_path: Path, stores: Stores) -> None:
    """Both ranks lose power at once, as one machine; what each had fsynced before it reported is there."""
    base = tmp_path / "run"
    before, log = record_save(base, stores)
    written = [done.path.name for done in log if done.operation == "create"]
    assert {"rank-00001-of-00002.json", "rank-00001-of-00002.safetensors", "state.json"} < {*written}
    possible = possible_steps(base, before, log, tmp_path / "after", rolls=200, step_in=step_of_both)
    assert_old_or_new(base, log, possible)


def test_the_model_notices_a_part_that_is_not_fsynced(tmp_path: Path, stores: Stores) -> None:
    base = tmp_path / "run"
    before, log = record_save(base, stores)
    of_part = {
        done.number
        for done in log
        if done.operation == "create" and done.path.name == "rank-00001-of-00002.json"
    }
    cut = PowerCut(base, before)
    for done in log:
        if done.operation != "sync" or done.number not in of_part:
            cut.run(done)
    found = {verdict(cut.random_tree(random.Random(n)), tmp_path / "after", step_of_both) for n in range(30)}
    assert found != {3}


SAVER = """
    import sys
    from rank_support import Rank, not_yet, save_first
    from torch._C._distributed_c10d import TCPStore
    from offloop.engine.checkpoint import CheckpointStore, Retention
    from offloop.engine.checkpoint.parts import PartsChannel
    directory, rank, port, attempt, step = sys.argv[1], *map(int, sys.argv[2:])
    client = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    channel = PartsChannel(client, f"run/{attempt}", rank=rank, world_size=2, give_up=not_yet)
    number = 0
    if rank == 0:
        with CheckpointStore(directory, retention=Retention(keep_last=1), ranks=channel) as store:
            client.set(f"open/{attempt}", "")
            while True:
                number += 1
                save_first(store, channel, step, number, attempt=attempt)
                print("saved", step, flush=True)
                step += 1
    other = Rank(Path(directory), channel)
    client.wait([f"open/{attempt}"])
    while True:
        number += 1
        other.save(step, number, attempt=attempt)
        step += 1
"""

NURSERY = """
    import os, sys
    from pathlib import Path
    import rank_support
    code = sys.argv[1]
    for line in sys.stdin:
        children = []
        for rank in "01":
            directory, *facts = line.split()
            child = os.fork()
            if child == 0:
                sys.argv = ["saver", directory, rank, *facts]
                exec(code)
            children.append(child)
        print(*children, flush=True)
        for child in children:
            os.waitpid(child, 0)
        print("dead", flush=True)
"""


def test_kill_of_either_rank_at_random_times_never_goes_back(tmp_path: Path, stores: Stores) -> None:
    """Twelve pairs of real processes that do nothing but save are killed, one a little before the other."""
    source = random.Random(0)
    directory = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(NURSERY), textwrap.dedent(SAVER)]
    nursery = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert nursery.stdin is not None and nursery.stdout is not None
    durable = 0
    left: list[int] = []
    try:
        for attempt in range(12):
            nursery.stdin.write(f"{directory} {stores.server.port} {attempt} {durable + 1}\n")
            nursery.stdin.flush()
            children = [int(each) for each in nursery.stdout.readline().split()]
            for _ in range(source.randint(1, 6)):
                durable = int(nursery.stdout.readline().split()[1])
            source.shuffle(children)
            for child in children:
                spin = source.randint(0, 100_000)
                while spin:  # no sleep: some milliseconds at most, anywhere in a save
                    spin -= 1
                os.kill(child, signal.SIGKILL)
            while (line := nursery.stdout.readline().strip()) != "dead":
                durable = int(line.split()[1])
            reader = CheckpointReader(directory)
            step = step_of_both(reader.load("last", on_corrupt="raise"))
            assert reader.damaged() == [] and step in (durable, durable + 1)
            durable = step
            left.append(len([name for name in os.listdir(directory / "checkpoints") if name[0] == "."]))
    finally:
        nursery.stdin.close()
        nursery.wait(timeout=20)
        nursery.stdout.close()
    # Each start has swept what the one before had left: saves that had begun, and a deletion
    assert max(left) <= 3
    with CheckpointStore(directory) as store:
        assert not [name for name in os.listdir(directory / "checkpoints") if name.startswith(".")]
        for info in store.checkpoints():
            store.verify(info)
            step_of_both(store.load(info.path))
