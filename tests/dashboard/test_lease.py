"""dashboard/lease.py: who keeps the server of a process open, and who closes it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloop.dashboard.lease import Lease, SharedServer
from offloop.dashboard.options import Options

OPTIONS = Options(port=0)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedServer]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shared = SharedServer()
    yield shared
    assert shared._server is None, "a server was left"


def test_the_last_lease_closes_the_server(shared: SharedServer) -> None:
    first, second = shared.acquire(OPTIONS), shared.acquire(Options())
    assert first.server is second.server
    assert first.is_first and not second.is_first
    first.release("over")
    assert second.server.is_serving
    second.release("over")
    assert not second.server.is_serving


def test_releasing_twice_is_releasing_once(shared: SharedServer) -> None:
    first, second = shared.acquire(OPTIONS), shared.acquire(OPTIONS)
    first.release("over")
    first.release("over")
    assert second.server.is_serving
    second.release("over")
    third = shared.acquire(OPTIONS)
    second.release("over")
    assert third.is_first and third.server.is_serving
    third.release("over")


def test_other_settings_are_refused_and_take_no_lease(shared: SharedServer) -> None:
    lease = shared.acquire(OPTIONS)
    with pytest.raises(ValueError, match="other settings"):
        shared.acquire(Options(port=0, read_only=True))
    lease.release("over")
    assert not lease.server.is_serving


def test_a_pinned_server_outlives_its_leases_until_one_unpins_it(shared: SharedServer) -> None:
    first = shared.acquire(OPTIONS)
    assert first.pin() and not first.pin()
    first.release("over")
    assert first.server.is_serving
    second = shared.acquire(OPTIONS)
    assert not second.is_first
    first.unpin()  # it has no say any more
    second.unpin()
    second.release("over")
    assert not second.server.is_serving


def test_leases_of_a_server_that_was_closed_say_nothing_about_the_next_one(shared: SharedServer) -> None:
    old = shared.acquire(OPTIONS)
    assert old.pin()
    old.server.close("interrupted")
    new = shared.acquire(OPTIONS)
    assert new.is_first and new.server is not old.server
    old.release("over")
    assert new.server.is_serving
    new.release("over")
    assert not new.server.is_serving


def test_threads_that_come_at_once_share_one_server(shared: SharedServer) -> None:
    barrier = threading.Barrier(8)
    leases: list[Lease] = []

    def use() -> None:
        barrier.wait()
        leases.append(shared.acquire(OPTIONS))
        barrier.wait()
        leases[-1].release("over")
        for lease in tuple(leases):  # all of them, from every thread
            lease.release("over")

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(lease.server) for lease in leases}) == 1
    assert [lease.is_first for lease in leases].count(True) == 1
    assert not leases[0].server.is_serving
