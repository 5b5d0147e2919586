"""The checkpoints of a run of two ranks, each in a thread: what training waits for, and what each rank hears."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import small_state, step_of
from rank_support import Stores, check_part, part_of

from offloop.engine import CheckpointFailed, CheckpointSaved, Event
from offloop.engine.bus.event_bus import Bus
from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointStore,
    Retention,
    SnapshotBusyError,
)
from offloop.engine.checkpoint import files as files_module
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.recovery.rank_checkpoints import RankCheckpoints
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.session.lifetime import BLOCKING_LOOK_INTERVAL


class TwoRanks:
    """Both ranks of one attempt. Their training threads are the test's."""

    def __init__(self, directory: Path) -> None:
        self.stores = Stores()
        self.bus = Bus(run_id="run")
        self.given_up = ""
        self.events: list[list[Event]] = [[], []]
        self.channels = [self.stores.channel(rank, give_up=lambda: self.given_up) for rank in (0, 1)]
        self.first, self.other = (
            kind(
                directory,
                run_id="run",
                optimizers={},
                model=torch.nn.Linear(1, 1),
                publish=self.events[rank].append,
                retention=Retention(),
                wait_policy=wait_for_ever,
                logs=DurableLogs(self.bus, in_haste=lambda: False),
                evaluations=Evaluations(None),
                ranks=self.channels[rank],
            )
            for rank, kind in enumerate((Checkpoints, RankCheckpoints))
        )
        self.first.open()

    def save_first(self, step: int, reason: str = "manual") -> "Future[CheckpointSaved]":
        future: Future[CheckpointSaved] = Future()
        self.first.save(small_state(step), position=at(step), metrics={}, reason=reason, future=future)
        return future

    def save_other(self, step: int, reason: str = "manual") -> "Future[CheckpointSaved]":
        future: Future[CheckpointSaved] = Future()
        self.other.save(part_of(step, 1), position=at(step), metrics={}, reason=reason, future=future)
        return future

    def save(self, step: int, reason: str = "manual") -> "list[Future[CheckpointSaved]]":
        return [self.save_first(step, reason), self.save_other(step, reason)]

    def flush(self) -> None:
        assert self.first.flush() and self.other.flush()

    def close(self) -> None:
        self.given_up = self.given_up or "the test is over"
        for each in (self.first, self.other):
            each.close()
        self.bus.end()
        self.stores.close()


def at(step: int) -> dict[str, int]:
    return {"epoch": 0, "step": step, "batch": step}


def wait_for_ever(wait: Any) -> bool:
    while not wait(BLOCKING_LOOK_INTERVAL):
        pass
    return True


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[TwoRanks]:
    made = TwoRanks(tmp_path)
    yield made
    made.close()


def hidden(directory: Path) -> list[str]:
    return [each.name for each in (directory / "checkpoints").iterdir() if each.name.startswith(".")]


def test_both_ranks_hear_of_a_durable_checkpoint(ranks: TwoRanks, tmp_path: Path) -> None:
    futures = ranks.save(3)
    saved = [future.result(30) for future in futures]
    assert saved[0] == saved[1] and saved[0].saved_step == 3
    ranks.flush()
    assert [[type(each) for each in events] for events in ranks.events] == [[CheckpointSaved]] * 2
    assert not ranks.first.in_flight and not ranks.other.in_flight
    assert ranks.first.last == ranks.other.last == saved[0].path
    loaded = ranks.first.load("last")
    assert step_of(loaded.state) == 3
    check_part(ranks.other.load(loaded.info.name).parts[1], 3, 1)


def test_neither_rank_waits_for_the_other_in_training(ranks: TwoRanks) -> None:
    """Rank 1 takes its part of three saves before rank 0 has taken its first, and the other way round."""
    others = [ranks.save_other(step) for step in (1, 2, 3)]
    assert not any(each.done() for each in others)
    firsts = [ranks.save_first(step) for step in (1, 2, 3)]
    assert [each.result(30).saved_step for each in (*firsts, *others)] == [1, 2, 3] * 2


def test_checkpoint_is_announced_only_when_all_parts_are_durable(ranks: TwoRanks) -> None:
    first = ranks.save_first(1)
    assert ranks.first.in_flight and not first.done()
    assert not CheckpointReader(ranks.first.directory).checkpoints()
    ranks.save_other(1)
    assert first.result(30).saved_step == 1


def test_save_that_one_rank_refuses_fails_for_both_and_the_next_one_works(
    ranks: TwoRanks, tmp_path: Path
) -> None:
    """The state of one rank cannot be had; the other has taken its part of the save."""
    first = ranks.save_first(1)
    ranks.other.refuse(ValueError("no state"))
    with pytest.raises(CheckpointError, match="rank 1: ValueError: no state"):
        first.result(30)
    ranks.first.refuse(ValueError("nor here"))
    other = ranks.save_other(2)
    with pytest.raises(CheckpointError, match="ValueError: nor here"):
        other.result(30)
    assert [each.result(30).saved_step for each in ranks.save(3)] == [3, 3]
    ranks.flush()
    assert hidden(tmp_path) == []
    assert [type(each) for each in ranks.events[0]] == [CheckpointFailed, CheckpointSaved]
    assert ranks.stores.keys() == 0


def test_save_that_rank_0_skips_leaves_nothing_and_does_not_stop_the_next_one(
    ranks: TwoRanks, tmp_path: Path
) -> None:
    """Rank 0 has no free snapshot; that of rank 1 is free again as soon as its part is durable."""
    firsts = [ranks.save_first(step, "interval") for step in (1, 2, 3)]
    assert isinstance(firsts[2].exception(30), SnapshotBusyError)
    others = [ranks.save_other(1)]
    others += [ranks.save_other(step) for step in (2, 3)]
    assert [each.result(30).saved_step for each in (*firsts[:2], *others[:2])] == [1, 2, 1, 2]
    with pytest.raises(CheckpointError, match="SnapshotBusyError"):
        others[2].result(30)
    assert [each.result(30).saved_step for each in ranks.save(4)] == [4, 4]
    ranks.flush()
    assert hidden(tmp_path) == []
    assert ranks.stores.keys() == 0


def test_tag_completes_on_both_ranks(ranks: TwoRanks) -> None:
    ranks.save(1)
    futures: list[Future[CheckpointSaved]] = [Future(), Future()]
    ranks.first.tag("good", step=1, move=False, future=futures[0])
    ranks.other.tag("good", step=1, move=False, future=futures[1])
    assert [each.result(30).saved_step for each in futures] == [1, 1]
    assert ranks.first.load("good").info.step == 1
    named: list[Future[CheckpointSaved]] = [Future(), Future()]
    ranks.first.tag("better", step=7, move=False, future=named[0], which="good")
    ranks.other.tag("better", step=7, move=False, future=named[1], which="good")
    assert [each.result(30).saved_step for each in named] == [1, 1]
    late: list[Future[CheckpointSaved]] = [Future(), Future()]
    ranks.first.tag("other", step=2, move=False, future=late[0])
    ranks.other.tag("other", step=2, move=False, future=late[1])
    for each in late:
        with pytest.raises(CheckpointError, match="checkpoint of step 2"):
            each.result(30)
    ranks.flush()
    assert ranks.stores.keys() == 0


def test_tag_of_a_save_that_one_rank_refuses_fails_and_the_next_save_works(ranks: TwoRanks) -> None:
    """All ranks count saves and tags alike, whatever fails where."""
    tags: list[Future[CheckpointSaved]] = [Future(), Future()]
    ranks.save_first(1)
    ranks.first.tag("good", step=1, move=False, future=tags[0])
    ranks.other.refuse(ValueError("no state"))
    ranks.other.refuse(ValueError("no state"))
    assert isinstance(tags[0].exception(30), CheckpointError)
    ranks.first.refuse(ValueError("nor here"))
    ranks.first.refuse(ValueError("nor here"))
    ranks.save_other(2)
    ranks.other.tag("good", step=2, move=False, future=tags[1])
    with pytest.raises(CheckpointError, match="nor here"):
        tags[1].result(30)
    assert [each.result(30).saved_step for each in ranks.save(3)] == [3, 3]
    ranks.flush()
    assert ranks.stores.keys() == 0


def test_rank_0_that_has_failed_is_not_waited_for(ranks: TwoRanks, tmp_path: Path) -> None:
    other = ranks.save_other(1)
    ranks.given_up = "rank 0 has failed"
    with pytest.raises(CheckpointError, match="rank 0 has failed"):
        other.result(30)
    assert ranks.other.flush()
    assert [each.saved_step for each in ranks.events[1] if isinstance(each, CheckpointFailed)] == [1]


def test_rank_that_has_died_leaves_a_temporary_directory_that_the_next_attempt_sweeps(
    ranks: TwoRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 dies between the files and the manifest: here it stops at the manifest and never comes back."""

    def die(*arguments: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(files_module, "encode_manifest", die)
    monkeypatch.setattr(CheckpointStore, "_discard", lambda self, temporary, final: None)
    monkeypatch.setattr(type(ranks.channels[0]), "tell", lambda self, number, outcome: None)
    futures = ranks.save(1)
    with pytest.raises(CheckpointError):
        futures[0].result(30)
    assert not futures[1].done()
    ranks.given_up = "rank 0 has died"
    with pytest.raises(CheckpointError, match="rank 0 has died"):
        futures[1].result(30)
    assert len(hidden(tmp_path)) == 1 and not CheckpointReader(tmp_path).checkpoints()
    monkeypatch.undo()
    ranks.first.close()
    with CheckpointStore(tmp_path):
        assert hidden(tmp_path) == []
