"""Ranks in threads of one process that write one checkpoint together, over a real store of torch.distributed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_support import small_state
from torch._C._distributed_c10d import TCPStore

from offloop.engine.checkpoint import CheckpointRequest, CheckpointStore, Commit, SnapshotArena
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.checkpoint.part_store import PartStore
from offloop.engine.checkpoint.parts import RANKS, Outcome, PartsChannel


def not_yet() -> str:
    """Give nothing up."""
    return ""


class Stores:
    """A store's server, and a client for each rank."""

    def __init__(self) -> None:
        self.server: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._channels: list[Any] = []
        # By rank. Now and then torch takes five seconds for a new client
        self._clients: dict[int, TCPStore] = {}

    def channel(self, rank: int, world_size: int = 2, run: str = "run/0", **options: Any) -> PartsChannel:
        """Return a channel of a rank."""
        if rank not in self._clients:
            self._clients[rank] = TCPStore(
                "127.0.0.1", self.server.port, is_master=False, wait_for_workers=False
            )
        options.setdefault("give_up", not_yet)
        channel = PartsChannel(self._clients[rank], run, rank=rank, world_size=world_size, **options)
        self._channels.append(channel)
        return channel

    def keys(self) -> int:
        """Return how many keys there are."""
        return int(self.server.num_keys())

    def close(self) -> None:
        """Close all sockets. torch closes them when an object goes."""
        for each in self._channels:
            each._store = None
        self._clients.clear()
        self.server = None


def part_of(step: int, rank: int) -> dict[str, Any]:
    """Return a part in which every tensor and number tells step and rank; with a tied tensor."""
    tensor = torch.full((5,), step + rank / 1000, dtype=torch.float64)
    return {
        "random": {"torch": torch.full((9,), step % 128 + rank, dtype=torch.uint8)},
        "a": [tensor, tensor],
        "step": step,
        "rank": rank,
    }


def check_part(part: Any, step: int, rank: int) -> None:
    """Check that a part is the one of this step and rank, whole."""
    assert part["step"] == step and part["rank"] == rank
    assert torch.equal(part["random"]["torch"], torch.full((9,), step % 128 + rank, dtype=torch.uint8))
    assert part["a"][0] is part["a"][1]
    assert torch.equal(part["a"][0], torch.full((5,), step + rank / 1000, dtype=torch.float64))


@dataclass
class Rank:
    """A rank above 0: writes its parts in a thread, as its writer does, and hears what came of them."""

    directory: Path
    channel: PartsChannel
    filesystem: FileSystem | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    failure: BaseException | None = None

    def save(self, step: int, number: int, **request: Any) -> None:
        """Take part in one save. Blocks."""
        facts = CheckpointRequest(step=step, number=number, **request)
        parts = PartStore(self.directory, self.channel, filesystem=self.filesystem)
        state = {RANKS: {str(self.channel.rank): part_of(step, self.channel.rank)}}
        with SnapshotArena(slots=1, files=parts.files).take(state) as snapshot:
            parts.commit(snapshot, facts)
        self.outcomes.append(self.channel.outcome(number))
        if self.outcomes[-1].error:
            parts.discard(facts)

    @contextmanager
    def saving(self, step: int, number: int, **request: Any) -> Iterator[None]:
        """Take part in one save beside the block."""

        def run() -> None:
            try:
                self.save(step, number, **request)
            except BaseException as error:
                self.failure = error

        thread = threading.Thread(target=run, name="rank")
        thread.start()
        try:
            yield
        finally:
            thread.join(30)
            assert not thread.is_alive()


def save_first(
    store: CheckpointStore, channel: PartsChannel, step: int, number: int, **request: Any
) -> Commit:
    """Commit a small state as rank 0, and tell the others what came of it, as rank 0's writer does."""
    try:
        with SnapshotArena(slots=1).take(small_state(step)) as snapshot:
            commit = store.commit(snapshot, CheckpointRequest(step=step, number=number, **request))
    except Exception as error:
        channel.tell(number, Outcome(error=str(error)))
        raise
    channel.tell(number, Outcome(path=str(commit.info.path), step=step))
    return commit
