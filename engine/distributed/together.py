"""What ranks do together outside of a run: evaluations and predictions.

All ranks call the same method, in any thread. They meet as for a run, so only one of these, or one run, can be in
progress in a process: no two threads call collectives at once.

    every rank     check the arguments ── compare them ── weights of rank 0 ── its share of the batches ── gather
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.data.val_loaders import by_prefix
from offloop.engine.distributed.group import Group
from offloop.engine.distributed.group_strategy import GroupStrategy
from offloop.engine.distributed.plan import Decision, Fingerprint, described_model
from offloop.engine.distributed.rank_run import RankRun, join_run
from offloop.engine.distributed.splits import chosen_samples, follow_splits
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Setup

FOR_OTHERS: Final = 60.0
"""Seconds that a rank which has its result waits for the others to have theirs."""
_OVER: Final = object()
"""Stands for the item of a rank that has no more."""


class Together:
    """Something that this rank does together with the others, in the thread that has met them."""

    def __init__(self, ranks: RankRun, group: Group, program: TrainingProgram, setup: Setup) -> None:
        self._ranks = ranks
        self._group = group
        self.strategy = GroupStrategy(ranks.rank, ranks.world_size, program, setup)
        """Of a loop that only validates; gives each rank rank 0's weights, and its batches."""
        self.strategy.group = group

    def on_first(self, own: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the items of all ranks on rank 0: the first of each rank, by rank, then the second ones, and so on.

        On the other ranks it yields nothing, and ends with rank 0. If rank 0 is left before its end, all end.

        Args:
            own: The items of this rank. It may have others than the other ranks, also in number.
        """
        iterator, strategy = iter(own), self.strategy
        item: Any = None
        while True:
            item = _OVER if item is _OVER else next(iterator, _OVER)
            is_over: list[bool | None] = strategy.gather(item is _OVER)
            # None: the reader on rank 0 has left
            if is_over[0] is None or all(is_over):
                return
            items = self._group.gather_on_first(None if item is _OVER else item)
            for rank, each in enumerate(items or ()):
                if not is_over[rank]:
                    yield from self._given(each)

    def _given(self, item: Any) -> Generator[Any, None, None]:
        """Yield an item. The reader may be slow, or leave: then the other ranks learn it."""
        life = self._ranks.life
        assert life is not None
        try:
            with life.excusing():
                yield item
        except GeneratorExit:
            self.strategy.gather(None)
            raise


@contextlib.contextmanager
def together(
    program: TrainingProgram, what: str, prepare: Callable[[], tuple[Setup, Fingerprint]]
) -> Iterator[tuple[Setup, Together | None]]:
    """Do something together with all ranks in the block, which calls all collectives. Blocks until all have come.

    Args:
        program: The trainer.
        what: The method that all ranks call, for errors.
        prepare: Checks the arguments; returns a setup, and what of it must be alike on all ranks.

    Returns:
        A context that gives the setup, and None where this process was started alone.

    Raises:
        ConfigError: The ranks were called differently, the argument of one cannot work, or a run is in progress.
        RankFailedError: Another rank has failed.
    """
    ranks = join_run(program.config)
    if ranks is None:
        yield prepare()[0], None
        return
    try:
        setup = _agree(ranks, program, what, prepare)
        # Nothing to end: the next collective raises, or the signs of life end the process
        ranks.begin(program.config, fail=lambda error: None, given=Mailbox())
        try:
            doing = Together(ranks, ranks.group(program.device), program, setup)
            try:
                yield setup, doing
            finally:
                doing.strategy.close()
            _leave(ranks)
        except GeneratorExit:
            # The reader of a prediction has left. The others know
            _leave(ranks)
            raise
        except BaseException as error:
            explained = ranks.explained(error)
            if explained is error:
                raise
            raise explained from error
    finally:
        ranks.close()


def _leave(ranks: RankRun) -> None:
    """Leave together with the others: they may compute metrics yet, with a store that may go with this process."""
    assert ranks.life is not None
    ranks.life.leave()
    ranks.life.wait_for_others(FOR_OTHERS)


def _agree(
    ranks: RankRun,
    program: TrainingProgram,
    what: str,
    prepare: Callable[[], tuple[Setup, Fingerprint]],
) -> Setup:
    """Make sure that all ranks do the same, or that none does."""
    plan = ranks.plan
    try:
        decision = None if ranks.is_first else plan.learn()
        setup, own = prepare()
        own = {"the call": what, "model": described_model(program.model), **own}
        loaders = {f"loader {prefix}": each for prefix, each in by_prefix(setup.val_loader).items()}
        follow_splits(plan, ranks.is_first, loaders)
        for name, loader in loaders.items():
            own |= chosen_samples(loader, name)
        if decision is None:
            plan.announce(Decision(run_id="", directory=None, which=None, fingerprint=own, deciders=[]))
        else:
            plan.check(own)
        plan.ready()
    except BaseException as error:
        plan.refuse(error)
        raise
    return setup
