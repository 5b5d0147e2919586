"""Whatever moment the process or the power dies at: the old checkpoint, or the new one, whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoint_support import (
    DyingFileSystem,
    Killed,
    loaded_step,
    save,
    small_state,
    step_of,
)
from power_cut import (
    Done,
    Files,
    PowerCut,
    RecordingFileSystem,
    assert_old_or_new,
    possible_steps,
    read_tree,
    seen_by_readers,
    verdict,
    write_tree,
)

from offloop.engine.checkpoint import CheckpointReader, CheckpointStore, Retention


def open_and_die(directory: Path, die_at: int, *, step: int, retention: Retention) -> bool:
    """Save in a process that stops at its n-th operation; return whether it got through."""
    filesystem = DyingFileSystem(die_at)
    store = None
    try:
        store = CheckpointStore(directory, filesystem=filesystem, retention=retention)
        save(store, step, tags=("good",))
    except Killed:
        return False
    finally:
        if store is not None:
            store.close()  # a dead process lets go of its lock
    return True


def test_death_at_any_operation_of_a_save_leaves_old_or_new(tmp_path: Path) -> None:
    """Includes opening the store, the tag, the refs and the deletion of an old one."""
    retention = Retention(keep_last=2)
    first = tmp_path / "first"
    with CheckpointStore(first, retention=retention) as store:
        for step in (1, 2, 3):
            save(store, step)
    outcomes: list[int] = []
    for die_at in range(1000):
        directory = tmp_path / str(die_at)
        shutil.copytree(first, directory)
        is_through = open_and_die(directory, die_at, step=4, retention=retention)
        step = loaded_step(directory)
        outcomes.append(step)
        assert len(CheckpointReader(directory).checkpoints()) >= 2
        with CheckpointStore(directory, retention=retention) as store:
            assert step_of(store.load().state) == step
            names = os.listdir(directory / "checkpoints")
            assert not [name for name in names if name.startswith(".")]
            last = (directory / "refs" / "last").read_text().strip()
            assert last == store.find("last").name
            save(store, 5)
        assert loaded_step(directory) == 5
        if is_through:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}
    assert len(outcomes) > 30


def record_save(directory: Path, *, retention: Retention | None = None) -> tuple[Files, list[Done]]:
    """Save steps 1 and 2, then record the operations of saving step 3."""
    retention = retention or Retention()
    with CheckpointStore(directory, retention=retention) as store:
        save(store, 1)
        save(store, 2)
    before = read_tree(directory)
    filesystem = RecordingFileSystem()
    with CheckpointStore(directory, retention=retention, filesystem=filesystem) as store:
        save(store, 3)
    return before, filesystem.log


def test_power_cut_at_any_operation_leaves_old_or_new(tmp_path: Path) -> None:
    """Exhaustive over lost changes wherever at most ten are pending, 300 random ones everywhere."""
    base = tmp_path / "run"
    before, log = record_save(base)
    possible = possible_steps(base, before, log, tmp_path / "after", rolls=300)
    assert len(possible) * 300 >= 10_000
    assert_old_or_new(base, log, possible)


def test_power_cut_while_old_ones_are_deleted_leaves_two(tmp_path: Path) -> None:
    base = tmp_path / "run"
    before, log = record_save(base, retention=Retention(keep_last=1))
    source = random.Random(1)
    cut = PowerCut(base, before)
    seen: set[object] = set()
    for done in log:
        cut.run(done)
        for files in (cut.random_tree(source) for _ in range(40)):
            key = seen_by_readers(files)
            if key in seen:
                continue
            seen.add(key)
            write_tree(files, tmp_path / "after")
            reader = CheckpointReader(tmp_path / "after")
            for info in reader.checkpoints():
                reader.verify(info)
            assert len(reader.checkpoints()) >= 2
            shutil.rmtree(tmp_path / "after")
    assert len(seen) > 2


@pytest.mark.parametrize("forgotten", ["sync", "syncdir"])
def test_the_power_cut_model_notices_a_missing_fsync(tmp_path: Path, forgotten: str) -> None:
    base = tmp_path / "run"
    before, log = record_save(base)
    careless = [done for done in log if done.operation != forgotten]
    cut = PowerCut(base, before)
    for done in careless:
        cut.run(done)
    found = {verdict(cut.random_tree(random.Random(n)), tmp_path / "after") for n in range(30)}
    assert found != {3}


SAVER = """
    import sys
    from checkpoint_support import save
    from offloop.engine.checkpoint import CheckpointStore, Retention
    with CheckpointStore(sys.argv[1], retention=Retention(keep_last=1)) as store:
        step = int(sys.argv[2])
        while True:
            save(store, step)
            print(step, flush=True)
            step += 1
"""


def test_kill_at_random_times_never_goes_back(tmp_path: Path) -> None:
    """25 real processes that do nothing but save are killed; each start finds the last one."""
    source = random.Random(0)
    directory = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = textwrap.dedent(SAVER)
    # One process imports torch and forks the savers: 25 imports would take a minute.
    nursery = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NURSERY), code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert nursery.stdin is not None and nursery.stdout is not None
    durable = 0
    try:
        for _ in range(25):
            nursery.stdin.write(f"{directory} {durable + 1}\n")
            nursery.stdin.flush()
            process = int(nursery.stdout.readline())
            wanted = source.randint(1, 6)
            for _ in range(wanted):
                durable = int(nursery.stdout.readline())
            spin = source.randint(0, 20_000)
            while spin:  # no sleep: a few hundred microseconds, anywhere in a save
                spin -= 1
            os.kill(process, signal.SIGKILL)
            while (line := nursery.stdout.readline().strip()) != "dead":
                durable = int(line)
            step = loaded_step(directory)
            assert step in (durable, durable + 1)
            durable = step
            assert len(CheckpointReader(directory).checkpoints()) <= 4
            if durable > 1:
                assert len(CheckpointReader(directory).checkpoints()) >= 2
    finally:
        nursery.stdin.close()
        nursery.wait(timeout=20)
        nursery.stdout.close()
    with CheckpointStore(directory) as store:
        assert not [n for n in os.listdir(directory / "checkpoints") if n.startswith(".")]
        for info in store.checkpoints():
            store.verify(info)


NURSERY = """
    import os, sys
    import checkpoint_support
    code = sys.argv[1]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.argv = ["saver", *line.split()]
            exec(code)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
"""


def test_small_states_tell_their_step() -> None:
    assert step_of(small_state(3)) == 3
