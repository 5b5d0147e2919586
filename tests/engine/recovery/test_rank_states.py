"""What each rank of a run takes from a checkpoint, on as many ranks as saved it and on others."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rank_support import Stores

from offloop.callbacks import WeightAverage
from offloop.engine import Callback, StepPoint, in_step
from offloop.engine.callback import lookup
from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointInfo,
    CheckpointReader,
    CheckpointRequest,
    CheckpointStore,
    LoadedCheckpoint,
    SnapshotArena,
)
from offloop.engine.checkpoint.errors import UnsafeCheckpointError
from offloop.engine.checkpoint.manifest import ManifestHead
from offloop.engine.checkpoint.part_store import PartStore
from offloop.engine.checkpoint.parts import PartsChannel
from offloop.engine.data.random_state import capture_random_state, check_random_state
from offloop.engine.position.exactness import Doubt
from offloop.engine.recovery.rank_states import (
    doubts_about_environment,
    load_together,
    own_part,
    state_of_rank,
)
from offloop.engine.training.strategy import Strategy

RANDOM = capture_random_state()
WEIGHT = torch.ones(2)


def common() -> dict[str, Any]:
    return {
        "model": {"weight": WEIGHT},
        "position": {"step": 5},
        "random": RANDOM,
        "loader": {"of": 0},
        "callbacks": {"Hook": {"of": 0}, "Decider": {"of": 0}},
        "metrics": {"of": 0},
        "trainer": {"of": 0},
    }


def part(rank: int) -> dict[str, Any]:
    return {
        "random": {"of": rank},
        "loader": {"of": rank},
        "callbacks": {"Hook": {"of": rank}},
        "metrics": {"of": rank},
        "trainer": {"of": rank},
    }


def loaded(saved_ranks: int, parts: Sequence[int] | None = None) -> LoadedCheckpoint:
    head = ManifestHead(
        name="step-000000005-a0",
        serial=1,
        step=5,
        created=0.0,
        files={},
        world_size=msgspec.UNSET if saved_ranks == 1 else saved_ranks,
    )
    read = range(1, saved_ranks) if parts is None else parts
    info = CheckpointInfo(Path(head.name), head)
    return LoadedCheckpoint(info, common(), None, parts={rank: part(rank) for rank in read})


def test_on_as_many_ranks_each_has_its_own_again() -> None:
    assert state_of_rank(loaded(3), rank=0, world_size=3) == (common(), None)
    state, metrics = state_of_rank(loaded(3, [2]), rank=2, world_size=3)
    assert metrics is None
    assert state == {
        **common(),
        **part(2),
        "callbacks": {"Hook": {"of": 2}, "Decider": {"of": 0}},
    }


@pytest.mark.parametrize(("saved", "now"), [(1, 4), (4, 1), (2, 3)])
def test_on_other_ranks_rank_0_goes_on_and_the_others_begin_anew(saved: int, now: int) -> None:
    state, metrics = state_of_rank(loaded(saved), rank=0, world_size=now)
    assert state == common()
    assert metrics == [{"of": rank} for rank in range(saved)]
    drawn = [RANDOM["torch"]]
    for rank in range(1, now):
        state, metrics = state_of_rank(loaded(saved, []), rank=rank, world_size=now)
        assert metrics == [] and "metrics" not in state
        assert {**state, "random": None, "metrics": {"of": 0}} == {**common(), "random": None}
        check_random_state(state["random"])
        assert state["random"].keys() == RANDOM.keys()
        drawn.append(state["random"]["torch"])
        again, _ = state_of_rank(loaded(saved, []), rank=rank, world_size=now)
        assert torch.equal(again["random"]["torch"], drawn[-1]), "the same each time"
    assert len({bytes(each.tolist()) for each in drawn}) == now


@pytest.mark.parametrize(
    "content", [None, [], {}, {**part(1), "callbacks": []}, {"random": {}, "loader": {}}]
)
def test_part_that_is_none_is_refused(content: object) -> None:
    strange = LoadedCheckpoint(loaded(2).info, common(), None, parts={1: content})
    with pytest.raises(UnsafeCheckpointError, match=r"rank-00001-of-00002\.json .*not the state of a rank"):
        state_of_rank(strange, rank=1, world_size=2)


class Hook(Callback):
    @in_step
    def after_step(self, point: StepPoint) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"of": 1}


def test_part_has_what_hooks_remember_and_no_average() -> None:
    average = WeightAverage()
    handlers = lookup([Hook(), average])
    average.averaged_weights = lambda: {"weight": torch.ones(1)}  # type: ignore[method-assign]  # it has begun
    state = {**common(), "callbacks": {"Hook": {}, "Decider": {}, "WeightAverage": {"average": {}}}}
    own = own_part(state, handlers)
    assert own["callbacks"] == {"Hook": {}}
    assert own.keys() == {"random", "loader", "callbacks", "metrics", "trainer"}


SPLIT = {"ranks": 2, "strategy": "ddp", "rank_batches": "split", "threads": 1}
ALONE = {"ranks": 1, "strategy": "none", "rank_batches": "split", "threads": 4}


@pytest.mark.parametrize(
    ("saved", "here", "exactness"),
    [
        (SPLIT, SPLIT, []),
        ({"threads": 4}, ALONE, []),  # from before there were ranks
        (ALONE, {**ALONE, "rank_batches": "own"}, []),
        (SPLIT, {**SPLIT, "threads": 2}, ["approximate"]),
        (SPLIT, ALONE, ["equivalent", "equivalent"]),
        ({"threads": 4}, SPLIT, ["equivalent", "equivalent"]),
        (SPLIT, {**SPLIT, "ranks": 3}, ["equivalent"]),
        ({**SPLIT, "rank_batches": "whole"}, {**SPLIT, "rank_batches": "whole", "ranks": 3}, ["approximate"]),
        (SPLIT, {**SPLIT, "rank_batches": "whole"}, ["approximate"]),
        ({**SPLIT, "ranks": 1}, {**ALONE, "threads": 1}, ["equivalent"]),
        ({**ALONE, "torch": "1"}, {**ALONE, "torch": "2"}, ["approximate"]),
    ],
)
def test_doubts_of_other_ranks_say_why(
    saved: dict[str, Any], here: dict[str, Any], exactness: list[str]
) -> None:
    doubts: list[Doubt] = list(doubts_about_environment(saved, here))
    assert [each.exactness for each in doubts] == exactness
    assert all("now" in each.reason for each in doubts)


class InThreads(Strategy):
    """Exchanges values between threads, as ranks do between processes."""

    def __init__(self, rank: int, slots: list[bytes], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = msgspec.msgpack.encode(value)
        self._barrier.wait(30)
        values = [msgspec.msgpack.decode(each) for each in self._slots]
        self._barrier.wait(30)
        return values

    def agree(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(world_size: int, run: Callable[[InThreads], Any]) -> list[Any]:
    """Return what each rank returns."""
    slots, barrier = [b""] * world_size, threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: run(InThreads(rank, slots, barrier)), range(world_size)))


class Directory:
    """Stands for `Checkpoints`: where they are, and who sees them."""

    def __init__(self, directory: Path, rank: int, ranks: PartsChannel | None) -> None:
        self._reader, self._rank, self.ranks = CheckpointReader(directory), rank, ranks

    def load(self, which: str | int | Path) -> LoadedCheckpoint:
        if self._rank:
            return self._reader.load(which, ranks=[self._rank])
        return self._reader.load(which, on_corrupt="fallback")


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own directories"])
def test_all_ranks_load_what_rank_0_chooses(tmp_path: Path, is_shared: bool) -> None:
    """The part of rank 2 in the newest one is damaged, which only rank 0 looks at."""
    stores = Stores()
    directory = tmp_path / "run"
    channel = stores.channel(0, 3)
    with CheckpointStore(directory, ranks=channel) as store:
        for step in (1, 2):
            request = CheckpointRequest(step=step, number=step)
            for rank in (1, 2):
                parts = PartStore(directory, stores.channel(rank, 3))
                state = {"ranks": {str(rank): {"a": torch.tensor([step, rank])}}}
                with SnapshotArena(slots=1, files=parts.files).take(state) as snapshot:
                    parts.commit(snapshot, request)
            with SnapshotArena(slots=1).take(
                {"model": {"w": torch.full((300_000,), float(step))}}
            ) as snapshot:
                store.commit(snapshot, request)
    damaged = directory / "checkpoints" / "step-000000002-a1" / "rank-00002-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")

    def load(strategy: InThreads) -> LoadedCheckpoint:
        sees = is_shared or strategy.rank != 2
        where = directory if sees else tmp_path / "elsewhere"
        ranks = stores.channel(strategy.rank, 3, is_shared=sees)
        return load_together(Directory(where, strategy.rank, ranks), "last", strategy)  # type: ignore[arg-type]  # enough of it

    try:
        found = on_ranks(3, load)
    finally:
        stores.close()
    for rank, each in enumerate(found):
        common_part: Any = each.state
        assert each.info.step == 1 and each.info.path.parent.parent == directory
        assert torch.equal(common_part["model"]["w"], torch.ones(300_000))
        mine: Any = each.parts
        assert sorted(mine) == ([1, 2] if rank == 0 else [rank])
        assert all(torch.equal(mine[one]["a"], torch.tensor([1, one])) for one in mine)
    assert isinstance(found[0].rejected[0], CheckpointCorruptError)
    assert not (tmp_path / "elsewhere").exists()
