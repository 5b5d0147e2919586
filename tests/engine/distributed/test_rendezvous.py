"""Stores of real processes: ranks that come late, not at all or twice, and what earlier ranks have left."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rank_processes import Ranks
from torch._C._distributed_c10d import PrefixStore, TCPStore

CONNECT = """
from offloop.engine import ConfigError, RankFailedError
from offloop.engine.distributed.launch import find_launch
from offloop.engine.distributed.rendezvous import connect, own_client
def try_to_connect(timeout):
    try:
        return connect(find_launch("auto"), timeout=timeout)
    except (ConfigError, RankFailedError) as error:
        say(type(error).__name__, error)
        sys.exit(3)
"""


def script(text: str) -> str:
    return CONNECT + text.replace("\n    ", "\n")


def test_restarted_ranks_take_nothing_that_earlier_ones_have_left(ranks: Callable[[str], Ranks]) -> None:
    """The store outlives the ranks, as that of torchrun does. Each round has other ranks, and one more."""
    text = """
    store = try_to_connect(30)
    own_client(store).set(f"here/{rank}", str(os.getpid()))
    say(sorted(int(store.get(f"here/{each}")) for each in range(int(os.environ["WORLD_SIZE"]))))
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    several = ranks(script(text))
    for world_size in (2, 2, 3):
        variables = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        started = [
            several.start(rank, world_size, port=store.port, variables=variables)
            for rank in range(world_size)
        ]
        assert {each.communicate()[0] for each in started} == {f"{sorted(each.pid for each in started)}\n"}
    # Of each handshake stay the latest nonces, which are overwritten, and the verdict
    assert store.num_keys() == (3 - 1) + 3 + (2 + 2 + 3)


def test_rank_that_waits_may_come_first(ranks: Callable[[str], Ranks]) -> None:
    text = """
    if rank == 0:
        sys.stdin.readline()
    else:
        say("waits")
    store = try_to_connect(50)
    store.set(f"here/{rank}", "")
    store.get(f"here/{1 - rank}")
    say("met")
    """
    both = ranks(script(text))
    other, first = both.start(1), both.start(0)
    assert other.stdout.readline() == "waits\n"
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.communicate()[0] == other.communicate()[0] == "met\n"


def test_ranks_that_do_not_come_are_named_on_all_others(ranks: Callable[[str], Ranks]) -> None:
    several = ranks(script("\n    try_to_connect(2)"))
    ended = [each.communicate()[0] for each in [several.start(rank, 4) for rank in (0, 2)]]
    assert ended[0] == ended[1]
    assert ended[0].startswith("RankFailedError rank 1 on its host has not come within 2 s (of all that are")
    assert "missing: 1, 3)" in ended[0]


def test_rank_0_that_does_not_come_is_named(ranks: Callable[[str], Ranks]) -> None:
    several = ranks(script("\n    try_to_connect(0.5)"))
    (said, _) = several.start(1).communicate()
    assert said.startswith("RankFailedError rank 0 on 127.0.0.1 cannot be reached: no store at 127.0.0.1:")


def test_rank_that_was_started_twice_is_one_error_on_all(ranks: Callable[[str], Ranks]) -> None:
    text = """
    try_to_connect(30)
    """
    several = ranks(script(text))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    first = several.start(1, 3, port=store.port, variables=kept)
    rank_0 = several.start(0, 3, port=store.port, variables=kept)
    meeting = PrefixStore("offloop", store)
    seen = meeting.get("hello/1").decode()
    meeting.get(f"welcome/{seen}")
    second = several.start(1, 3, port=store.port, variables=kept)
    while meeting.get("hello/1").decode() == seen:
        pass
    meeting.get(f"welcome/{meeting.get('hello/1').decode()}")
    last = several.start(2, 3, port=store.port, variables=kept)
    said = {each.communicate()[0] for each in (first, second, rank_0, last)}
    assert len(said) == 1
    assert said.pop().startswith("ConfigError rank 1 was started twice: each process needs its own RANK")


def test_port_of_another_process_is_one_error(ranks: Callable[[str], Ranks]) -> None:
    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one = ranks(script("\n    try_to_connect(5)"))
    (said, _) = one.start(0, port=other.port).communicate()
    assert "ConfigError rank 0 cannot open MASTER_PORT=" in said and "another process has it" in said


def test_ranks_of_torchrun_meet_again_after_a_restart(tmp_path: Path) -> None:
    """One rank kills itself at first, and torchrun starts both again with the store of before."""
    file = tmp_path / "rank.py"
    file.write_text(
        "import os, pathlib, signal, sys\n"
        "import torch\n"
        "from offloop.engine.distributed.launch import find_launch\n"
        "from offloop.engine.distributed.rendezvous import connect\n"
        "from offloop.engine.distributed.group import join\n"
        "launch = find_launch('auto')\n"
        "group = join(launch, connect(launch, timeout=60), torch.device('cpu'))\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "if launch.rank == 1 and not here.exists():\n"
        "    here.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "group.gather(b'')\n"
        "(here.parent / f'met{launch.rank}').touch()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", "--monitor-interval=0.1", str(file), str(tmp_path / "killed")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RES_OPTIONS": "timeout:1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed", "met0", "met1", "rank.py"]
