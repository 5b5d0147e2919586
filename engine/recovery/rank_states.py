"""The state of each process ("rank") of a run in its checkpoints.

A checkpoint has the state of rank 0 as one process saves it, which is the common part, and beside it what the other
ranks have of their own (`OWN`).

    resumed on        rank 0                                      other ranks
    as many ranks     common part                                 common part, with their own in place of rank 0's
    another number    common part; metrics of all ranks merged    common part; metrics empty, random numbers anew

A position in the data is a number of batches of the whole loader, so it holds for any number of ranks.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from offloop.engine.callback import Handlers
from offloop.engine.checkpoint import CheckpointInfo, CheckpointReader, LoadedCheckpoint
from offloop.engine.checkpoint.errors import UnsafeCheckpointError
from offloop.engine.checkpoint.format import iterate_file
from offloop.engine.checkpoint.manifest import MANIFEST
from offloop.engine.checkpoint.parts import part_file
from offloop.engine.data.random_state import fresh_random_state
from offloop.engine.position.exactness import Doubt, approximate, equivalent
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.training.strategy import Strategy

OWN: Final = ("random", "loader", "callbacks", "metrics", "trainer", "loss", "buffers")
"""What each rank saves of the entries of a run's state. The others are the same on all ranks."""

_OF_RANKS: Final = ("ranks", "strategy", "rank_batches")
"""Entries of a run's environment that are about ranks."""


class RankState(NamedTuple):
    """What a rank resumes from."""

    state: dict[str, Any]
    """As one process saves it."""
    metrics: Sequence[Mapping[str, Any]] | None
    """States of the training metrics, by the rank that saved them; None: that of `state` is this rank's own."""


def own_part(state: Mapping[str, Any], handlers: Sequence[Handlers]) -> dict[str, Any]:
    """Return what a rank above 0 saves of its state. Tensors are live, not copied.

    Args:
        state: The whole state of this rank.
        handlers: Those of the callbacks. Deciders answer on rank 0 alone, and averages are the same on all ranks.
    """
    of_hooks = {each.name for each in handlers if each.hooks and not each.callback.averaged_weights()}
    part = {name: state[name] for name in OWN if name in state}
    part["callbacks"] = {name: each for name, each in state["callbacks"].items() if name in of_hooks}
    return part


def state_of_rank(loaded: LoadedCheckpoint, *, rank: int, world_size: int) -> RankState:
    """Return what this rank resumes from.

    Args:
        loaded: On rank 0 with the parts of all ranks, elsewhere with that of this rank at least.
        rank, world_size: Of this run.

    Raises:
        UnsafeCheckpointError: A part is not what a run has saved.
    """
    common, saved_ranks = loaded.state, loaded.info.manifest.ranks
    if not isinstance(common, dict):
        # What is wrong with it is said where all fields are checked
        return RankState(common, None)  # type: ignore[arg-type]  # so it is
    parts = {each: _checked_part(loaded, each) for each in loaded.parts}
    if saved_ranks == world_size:
        return RankState(common if not rank else _with_part(common, parts[rank]), None)
    if not rank:
        of_others = [parts[each]["metrics"] for each in sorted(parts) if "metrics" in parts[each]]
        return RankState(common, [common["metrics"], *of_others] if "metrics" in common else None)
    state = {name: value for name, value in common.items() if name != "metrics"}
    seed = hashlib.sha256(b"%d of %d" % (rank, world_size))
    seed.update(bytes(common["random"]["torch"].tolist()))
    state["random"] = fresh_random_state(common["random"], int.from_bytes(seed.digest()[:8], "little"))
    return RankState(state, [])


def _with_part(common: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    state = {name: value for name, value in common.items() if name not in OWN or name == "callbacks"}
    state |= part
    # Those that run on rank 0 alone are loaded everywhere: they do no harm
    state["callbacks"] = {**common["callbacks"], **part["callbacks"]}
    return state


def _checked_part(loaded: LoadedCheckpoint, rank: int) -> dict[str, Any]:
    """Return a part, after a look at its kind; its content is checked with that of the whole state."""
    part = loaded.parts[rank]
    if (
        isinstance(part, dict)
        and {"random", "loader", "callbacks"} <= part.keys()
        and all(isinstance(part.get(name, {}), dict) for name in OWN)
    ):
        return part
    name = part_file(rank, loaded.info.manifest.ranks, "json")
    raise UnsafeCheckpointError(loaded.info.path, name, "foreign", "it is not the state of a rank")


def doubts_about_ranks(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Doubt]:
    """Yield why a run on other ranks than before is not the same bit for bit.

    Args:
        saved, here: The environments of the checkpoint and of this run.
    """
    before = {"ranks": 1, "strategy": "none", "rank_batches": "split", **saved}
    is_alone = before["ranks"] == here["ranks"] == 1
    kinds = {before["rank_batches"], here["rank_batches"]}
    if not is_alone and len(kinds) > 1:
        yield approximate(f"rank_batches was {before['rank_batches']}, now it is {here['rank_batches']}")
    elif before["ranks"] != here["ranks"] and kinds == {"split"}:
        yield equivalent(
            f"the run had {_processes(before['ranks'])}, now it has {_processes(here['ranks'])}: batches, steps and "
            "losses are those of the whole, but sums are rounded in another order, and processes other than the "
            "first draw other random numbers"
        )
    elif before["ranks"] != here["ranks"]:
        yield approximate(
            f"the run had {_processes(before['ranks'])}, now it has {_processes(here['ranks'])}: with "
            f"rank_batches={here['rank_batches']!r}, a step has other samples"
        )
    elif before["strategy"] != here["strategy"]:
        yield equivalent(f"strategy was {before['strategy']}, now it is {here['strategy']}")


def doubts_about_environment(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Doubt]:
    """Yield what a difference between the environments of a checkpoint and of this run means for a resume."""
    yield from doubts_about_ranks(saved, here)
    for name, value in saved.items():
        if name in _OF_RANKS or here.get(name) == value:
            continue
        text = f"{name} was {value}, now it is {here.get(name)}"
        # torchrun sets the number of threads by that of the processes; it decides only how sums are rounded
        is_rounding = name == "threads" and saved.get("ranks", 1) != here["ranks"]
        yield equivalent(text) if is_rounding else approximate(text)


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


# Reading on all ranks ----------------------------------------------------------------------------


def load_together(checkpoints: Checkpoints, which: str | int | Path, strategy: Strategy) -> LoadedCheckpoint:
    """Load a checkpoint on all ranks: rank 0 chooses it, and checks every byte of all parts. Training thread.

    A rank that does not see the run's directory gets the files from rank 0. Blocks.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if strategy.world_size == 1:
        return checkpoints.load(which)
    loaded = None if strategy.rank else checkpoints.load(which)
    path = Path(strategy.agree("" if loaded is None else str(loaded.info.path)))
    sees = checkpoints.ranks is None or checkpoints.ranks.is_shared
    if not all(strategy.gather(sees)):
        pieces = iter(()) if loaded is None else _pieces(loaded.info)
        if strategy.rank and not sees:
            with tempfile.TemporaryDirectory(prefix="offloop-") as folder:
                received = Path(folder) / path.name
                received.mkdir()
                for name, piece in _sent(pieces, strategy):
                    with (received / name).open("ab") as file:
                        file.write(piece)
                loaded = CheckpointReader(folder).load(received, ranks=[strategy.rank])
            return replace(loaded, info=CheckpointInfo(path, loaded.info.manifest))
        for _ in _sent(pieces, strategy):
            pass
    return checkpoints.load(path.name) if loaded is None else loaded


def _pieces(info: CheckpointInfo) -> Iterator[tuple[str, bytes]]:
    """Yield the content of a checkpoint's files, by name, in pieces. Blocks."""
    for name in (MANIFEST, *info.manifest.files):
        yield name, b""
        for piece in iterate_file(info.path / name, 0, (info.path / name).stat().st_size):
            yield name, piece


def _sent(pieces: Iterator[tuple[str, bytes]], strategy: Strategy) -> Iterator[tuple[str, bytes]]:
    """Yield rank 0's pieces on all ranks."""
    while (item := strategy.agree(next(pieces, None))) is not None:
        yield item[0], item[1]
