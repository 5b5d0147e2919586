"""The store through which ranks exchange what is rare or slow: a connection that all have agreed on, once in a process.

torchrun keeps its store when it restarts a group, with the keys of the processes before. So the ranks agree on a fresh
prefix first, by keys that cannot be stale, because each has a number in its name that was drawn a moment ago:

    rank r      hello/<r> = nonce           waits for welcome/<nonce>
    rank 0      welcome/<nonce> = token     its own nonce is the token; answers each nonce that it sees
    rank r      ack/<token>/<nonce>         waits for go/<token>
    rank 0      go/<token>                  once the latest nonce of each rank is acknowledged

Everything after that has the prefix `run/<token>`. Where the host application has made the process group, the handshake
goes through the store of that group, without a collective, and the welcome names a store of our own.
"""

import contextlib
import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch.distributed as dist

from offloop.engine.distributed.launch import Launch
from offloop.engine.distributed.sockets import close_hosted_in_children, closed_in_children
from offloop.engine.errors import ConfigError, RankFailedError

if TYPE_CHECKING:
    # torch declares them here only
    from torch._C._distributed_c10d import PrefixStore as PrefixStore
    from torch._C._distributed_c10d import Store as Store
    from torch._C._distributed_c10d import TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

OPERATION_TIMEOUT: Final = datetime.timedelta(seconds=30)
"""For one operation of a client, such as `get` of a key that is not there."""
CONNECT_TIMEOUT: Final = 5.0
"""Seconds for one attempt to find a listener."""
POLL: Final = 0.02
"""Seconds between two looks at the store. A blocking wait would hold its client, which a host may share."""
VERDICT_TIMEOUT: Final = 5.0
"""Seconds for which the others wait longer than rank 0, to hear from it which rank is missing."""
_PREFIX: Final = "offloop"


class _Welcome(msgspec.Struct):
    """What rank 0 answers to a nonce."""

    token: str
    host: str
    port: int


class _Verdict(msgspec.Struct):
    """How the handshake has ended."""

    missing: list[int]
    """Ranks that did not come."""
    twice: list[int]
    """Ranks as which two processes were started."""


class RunStore(PrefixStore):
    """A client of the store, with the prefix that the ranks have agreed on. Its methods are for one thread."""

    def __init__(self, client: TCPStore, prefix: str) -> None:
        super().__init__(prefix, client)
        self.client = client
        self.prefix = prefix


_lock = threading.Lock()
# Guarded by the lock. The host's group for which the store was made, None for a group of our own.
_connected: tuple[Any, RunStore] | None = None
# The client that all threads share, and the store that it belongs to.
_client: tuple[Store, RunStore] | None = None
# The stores that this process hosts. They live as long as it does.
_hosting: list[TCPStore] = []


def connect(launch: Launch, *, timeout: float) -> RunStore:
    """Connect to the other ranks, and return the store. Blocks. Any thread; the second call returns the same store.

    No collective is called, so a thread beside the training thread may call it, also with a host's group. Nothing
    cancels it before its time is over.

    Args:
        launch: What `find_launch` has returned.
        timeout: Seconds for which the other ranks are waited for.

    Raises:
        RankFailedError: A rank did not come.
        ConfigError: The address is taken, or a rank was started twice.
    """
    global _connected
    with _lock:
        host_group = dist.group.WORLD if launch.has_host_group else None
        if _connected is None or _connected[0] is not host_group:
            _connected = host_group, _connect(launch, time.monotonic() + timeout, timeout)
        return _connected[1]


def shared_client(store: Store) -> RunStore:
    """Return the client that all threads of this process share, with the same prefix as the store. Any thread.

    One operation at a time uses it, so only operations that do not wait may: `set`, `check`, and `get` of what is
    there. A client more can take seconds, where the names of machines are looked up in vain.

    Args:
        store: What `connect` has returned.

    Raises:
        RuntimeError: The store cannot be reached.
    """
    global _client
    with _lock:
        if _client is None or _client[0] is not store:
            _client = store, own_client(store)
        return _client[1]


def own_client(store: Store) -> RunStore:
    """Return a further client of the store of `connect`, with the same prefix. Blocks while it connects. Any thread.

    A client is held by the operation in progress, which may wait for long, so each thread has its own.

    Args:
        store: What `connect` has returned.

    Raises:
        OSError: Nobody listens there any more.
        RuntimeError: The store does not answer.
    """
    assert isinstance(store, RunStore)
    return RunStore(_open_client(store.client.host, store.client.port), store.prefix)


def _connect(launch: Launch, deadline: float, timeout: float) -> RunStore:
    meeting: Store
    if launch.has_host_group:
        meeting = _store_of_host()
        host, port = (_address_here(meeting), _host_store(0)) if launch.rank == 0 else ("", 0)
    else:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if launch.rank == 0 and not _agent_hosts():
            _host_store(port)
        meeting = _await_client(host, port, deadline, timeout)
    at_meeting = PrefixStore(_PREFIX, meeting)
    welcome = _Welcome(secrets.token_hex(8), host, port)
    if launch.rank == 0:
        _receive(at_meeting, launch.world_size, welcome, deadline, timeout)
    else:
        welcome = _present(at_meeting, launch.rank, deadline + VERDICT_TIMEOUT, timeout)
    if launch.has_host_group:
        meeting = _await_client(welcome.host, welcome.port, deadline, timeout)
    assert isinstance(meeting, TCPStore)
    return RunStore(meeting, f"{_PREFIX}/run/{welcome.token}")


# The handshake ------------------------------------------------------------------------------------


def _receive(store: Store, world_size: int, welcome: _Welcome, deadline: float, timeout: float) -> None:
    """Wait for all other ranks, as rank 0.

    Raises:
        RankFailedError: One did not come.
        ConfigError: One came twice.
    """
    token = welcome.token
    answer = msgspec.json.encode(welcome).decode()
    # By rank: the nonces that were answered, and those that were acknowledged since
    answered: dict[int, set[str]] = {rank: set() for rank in range(1, world_size)}
    present: dict[int, set[str]] = {rank: set() for rank in range(1, world_size)}
    latest: dict[int, str] = {}

    def missing() -> list[int]:
        return [rank for rank in present if latest.get(rank) not in present[rank]]

    while missing() and time.monotonic() < deadline:
        for rank in present:
            if not store.check([f"hello/{rank}"]):
                continue
            nonce = latest[rank] = store.get(f"hello/{rank}").decode()
            if nonce not in answered[rank]:
                store.set(f"welcome/{nonce}", answer)
                answered[rank].add(nonce)
            present[rank].update(each for each in answered[rank] if store.check([f"ack/{token}/{each}"]))
        if missing():
            time.sleep(POLL)
    twice = [rank for rank in present if len(present[rank]) > 1]
    verdict = _Verdict(missing(), twice)
    store.set(f"go/{token}", msgspec.json.encode(verdict).decode())
    # What has been read is removed: torchrun keeps its store over restarts
    for rank, nonces in answered.items():
        for nonce in nonces:
            store.delete_key(f"welcome/{nonce}")
            if nonce in present[rank]:
                store.delete_key(f"ack/{token}/{nonce}")
    _raise_if_bad(verdict, timeout)


def _present(store: Store, rank: int, deadline: float, timeout: float) -> _Welcome:
    """Say that this rank is here, and wait for rank 0.

    Raises:
        RankFailedError: Rank 0, or another rank, did not come.
        ConfigError: One came twice.
    """
    nonce = secrets.token_hex(8)
    store.set(f"hello/{rank}", nonce)
    welcome = msgspec.json.decode(_await(store, f"welcome/{nonce}", deadline, timeout), type=_Welcome)
    store.set(f"ack/{welcome.token}/{nonce}", "")
    verdict = msgspec.json.decode(_await(store, f"go/{welcome.token}", deadline, timeout), type=_Verdict)
    _raise_if_bad(verdict, timeout)
    return welcome


def _await(store: Store, key: str, deadline: float, timeout: float) -> bytes:
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise RankFailedError(
                0,
                os.environ.get("MASTER_ADDR", "its host"),
                f"has not answered within {timeout:g} s: it has failed or not started, or another process was "
                "started as the same rank as this one",
            )
        time.sleep(POLL)
    return store.get(key)


def _raise_if_bad(verdict: _Verdict, timeout: float) -> None:
    if verdict.twice:
        raise ConfigError(
            f"rank {verdict.twice[0]} was started twice: each process needs its own RANK, as torchrun sets it; a "
            'process that a rank starts itself must use strategy="none"'
        )
    if verdict.missing:
        which = ", ".join(map(str, verdict.missing))
        others = f" (of all that are missing: {which})" if len(verdict.missing) > 1 else ""
        raise RankFailedError(
            verdict.missing[0],
            "its host",
            f"has not come within {timeout:g} s{others}: has it failed, or not started?",
        )


# Where the store is -------------------------------------------------------------------------------


def _agent_hosts() -> bool:
    """Return whether torchrun hosts the store, for all ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _host_store(port: int) -> int:
    """Host a store for the rest of the process, and return its port."""
    with _taken_port(port):
        # Multi-tenant: the user's own code in this process may host one at the same port
        store = TCPStore(
            "localhost",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=OPERATION_TIMEOUT,
            multi_tenant=True,
        )
    _hosting.append(store)
    close_hosted_in_children(store.port)
    return store.port


@contextlib.contextmanager
def _taken_port(port: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"rank 0 cannot open MASTER_PORT={port}, since another process has it: choose a free port, or is "
            "rank 0 started twice?"
        ) from error


def _await_client(host: str, port: int, deadline: float, timeout: float) -> TCPStore:
    """Connect once somebody listens."""
    while True:
        try:
            return _open_client(host, port)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise RankFailedError(
                    0, host, f"cannot be reached: no store at {host}:{port} within {timeout:g} s ({error})"
                ) from error
            time.sleep(POLL)


def _open_client(host: str, port: int) -> TCPStore:
    # torch's own attempts print a stack each
    socket.create_connection((host, port), CONNECT_TIMEOUT).close()
    with closed_in_children():
        # Patiently: torch asks for the name of the address, which takes seconds where name servers are slow
        return TCPStore(host, port, is_master=False, timeout=OPERATION_TIMEOUT, wait_for_workers=False)


def _store_of_host() -> Store:
    """Return the store of the host's process group. torch has no public name for it."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def _address_here(meeting: Store) -> str:
    """Return the address of this machine, where rank 0 is, for the others."""
    if address := os.environ.get("MASTER_ADDR"):
        return address
    while isinstance(meeting, PrefixStore):
        meeting = meeting.underlying_store
    return meeting.host if isinstance(meeting, TCPStore) else socket.gethostname()
