"""Two hosts, as two network namespaces with a cable between them. Skipped where the machine allows none.

python -m pytest tests/distributed/test_two_hosts.py -m soak      a host that is lost and comes back, two minutes
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rank_scripts.worker import WORKER
from torchrun import Torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_at_a_time")]

HOSTS = ("offloop0", "offloop1")
CABLE = ("offloopv0", "offloopv1")
ADDRESSES = ("10.9.0.1", "10.9.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces with a cable."""
    try:
        for each in HOSTS:
            ip("netns", "add", each)
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for host, end, address in zip(HOSTS, CABLE, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", host, "link", "set", end, "up")
            ip("-n", host, "link", "set", "lo", "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        remove_hosts()
        why = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"this machine makes no network namespaces: {why}")
    try:
        yield
    finally:
        remove_hosts()


def remove_hosts() -> None:
    for each in HOSTS:
        with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
            ip("netns", "delete", each)


def start(folder: Path, host: int, steps: int, *, nodes: str = "2", more: Sequence[str] = ()) -> Torchrun:
    """Start torchrun on a host; both write into the same run directory, as on a shared disk."""
    options = [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        "--rdzv-id=hosts",
        f"--rdzv-endpoint={ADDRESSES[0]}:29400",
        f"--rdzv-conf=is_host={1 - host},last_call_timeout=5",
        f"--local-addr={ADDRESSES[host]}",
        *more,
    ]
    environment = {
        "GLOO_SOCKET_IFNAME": CABLE[host],
        "OFFLOOP_TEST_RUNS": str(folder / "runs"),
        "OFFLOOP_TEST_STEPS": str(steps),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return Torchrun(
        folder / HOSTS[host],
        WORKER,
        str(folder),
        "restarts",
        "two_hosts",
        ranks=1,
        options=options,
        prefix=("ip", "netns", "exec", HOSTS[host]),
        environment=environment,
        left_in=folder,
    )


def test_two_hosts_train_one_run(hosts: None, tmp_path: Path) -> None:
    with start(tmp_path, 0, 200) as near, start(tmp_path, 1, 200) as far:
        assert (near.wait(), far.wait()) == (0, 0)
        first, second = (each["result"] for each in near.results("two_hosts"))
        assert first == second
        assert first["outcome"]["steps"] == 200
        near.check_collectives()


def test_cable_that_is_cut_is_told_on_both_sides(hosts: None, tmp_path: Path) -> None:
    """A link that is down tells nobody: only missing signs of life do."""
    with start(tmp_path, 0, 10**6) as near, start(tmp_path, 1, 10**6) as far:
        near.hear_of("step")
        far.hear_of("step")
        ip("-n", HOSTS[1], "link", "set", CABLE[1], "down")
        for each in (near, far):
            each.wait_for_output(None, "ends itself: RankFailedError: rank")


@pytest.mark.soak
def test_host_that_is_lost_and_comes_back(hosts: None, tmp_path: Path) -> None:
    """The other host goes on alone, and both train again when it is back."""
    more = ("--max-restarts=5",)
    with start(tmp_path, 0, 10**6, nodes="1:2", more=more) as near:
        with start(tmp_path, 1, 10**6, nodes="1:2", more=more) as far:
            far.hear_of("step")
            near.hear_of("step")
            for pid in far.pids():
                os.kill(pid, signal.SIGKILL)
        near.hear_of("resumed", 0)
        near.hear_of("step")
        with start(tmp_path, 1, 10**6, nodes="1:2", more=more) as far:
            far.hear_of("step")
