"""RankStrategy: the strategy of one rank of several, without the gradients; see `ddp.py` for those."""

import dataclasses
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch

from offloop.engine.bus.command_mailbox import Envelope
from offloop.engine.bus.commands import Stop
from offloop.engine.distributed.agreement import Agreement
from offloop.engine.distributed.following import Following
from offloop.engine.distributed.group import Group
from offloop.engine.distributed.group_strategy import GroupStrategy
from offloop.engine.distributed.news import News
from offloop.engine.distributed.rank_mailbox import RankMailbox
from offloop.engine.distributed.signs_of_life import SignsOfLife
from offloop.engine.errors import RankFailedError
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.setup import Program, Setup
from offloop.engine.training.strategy import Share, StepValues

_END: Final = object()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunHere:
    """What a strategy asks of the run on this rank. Called in the training thread."""

    is_held: Callable[[], bool]
    """Returns whether a full subscriber with the right to slow training down holds it up here."""
    cadences: Callable[[], list[int]]
    """Returns the numbers of steps at whose multiples callbacks here save."""
    on_signal: Callable[[str], None]
    """Called with the name of a signal that stops the run, on whichever rank it came."""
    failure: Callable[[], BaseException | None]
    """Returns what this rank has failed with, outside of its training thread."""
    fail: Callable[[BaseException], None]
    """Ends the run as failed."""


class RankStrategy(GroupStrategy):
    """What all strategies of several ranks share: numbers, commands and data. Training thread only.

    The methods are those of `Strategy`, more than 25 with its protocols.
    """

    def __init__(
        self, rank: int, world_size: int, mailbox: RankMailbox, program: Program, setup: Setup
    ) -> None:
        """Prepare; `join` brings the process group.

        Args:
            rank: Of this process.
            world_size: Number of ranks.
            mailbox: Of the loop.
            program: The trainer.
            setup: Of the run.
        """
        super().__init__(rank, world_size, program, setup)
        self.failed_hooks: list[tuple[str, str]] = []
        """Step hooks that have failed since the last exchange, and with what; those that run on all ranks."""
        self._mailbox = mailbox

    def join(
        self,
        loop: TrainingLoop,
        group: Group,
        news: News,
        life: SignsOfLife,
        run: RunHere,
    ) -> None:
        """Take the process group, in the set-up of the run.

        Args:
            loop: Of the run.
            group: All ranks.
            news: For commands in a validation.
            life: Tells which rank hangs.
            run: The run on this rank.
        """
        self.group = group
        self._loop = loop
        self._run = run
        self._life = life
        self.following = Following(loop, group)
        self.agreement = Agreement(group, self._mailbox.given, loop.progress, news, self)
        self._mailbox.attach(self.agreement, life)
        self.share_weights(loop.parameters())

    def close(self) -> None:
        """Release the model and the data; what was not applied fails."""
        super().close()
        self._mailbox.end()

    # The host of the agreement -----------------------------------------------------------------------

    def feed(self, envelopes: Sequence[Envelope[Any]], cancelled: str | None) -> None:
        """Pass the commands of all ranks to the loop."""
        for each in envelopes:
            if each.by == "signal" and isinstance(each.command, Stop):
                self._run.on_signal(each.command.reason)
        self._mailbox.feed(envelopes, cancelled)

    def followed(self, function: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        """Return a function for all ranks that calls `function` on rank 0."""
        return self.following.followed(function)

    def own_seconds(self) -> float:
        """Return how long the run has trained, by the clock of this rank."""
        return self._loop.seconds()

    def own_hold(self) -> bool:
        """Return whether a full subscriber holds training up on this rank."""
        return self._run.is_held()

    def own_failure(self) -> tuple[str, str] | None:
        """Return the name of this machine, and what this rank has failed with; None if it has not."""
        failure = self._run.failure()
        if failure is None or isinstance(failure, RankFailedError):
            return None
        return socket.gethostname(), "has failed:\n" + "".join(traceback.format_exception(failure)).rstrip()

    def other_failed(self, rank: int, host: str, what: str) -> None:
        """End the run, because another rank has failed."""
        self._run.fail(RankFailedError(rank, host, what))

    def take_failed_hooks(self) -> list[tuple[str, str]]:
        """Return which step hooks have failed here since the last call, and with what."""
        failed, self.failed_hooks = self.failed_hooks, []
        return failed

    def own_cadences(self) -> list[int]:
        """Return the numbers of steps at whose multiples callbacks of this rank save."""
        return self._run.cadences()

    # Numbers -----------------------------------------------------------------------------------------

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a scalar tensor over the ranks, weighted by their shares of the batch."""
        total = value.detach() * (self.share.factor / self.world_size)
        self.group.add(total)
        return total

    def gather_step(self, values: StepValues, publish: Callable[[StepValues], None]) -> None:
        """Publish the numbers of a step at the next exchange."""
        self.agreement.gather_step(values, publish)

    def put(self, publish: Callable[[], None]) -> None:
        """Publish after the steps before."""
        self.agreement.put(publish)

    def flush(self) -> None:
        """Publish all steps so far."""
        self.agreement.flush()

    # Data --------------------------------------------------------------------------------------------

    @property
    def share(self) -> Share:  # type: ignore[override]  # of one process, it never changes
        """This rank's share of the batch that the loop took last."""
        return self._shares.share

    def shared_training(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the loader of this rank's share of the training batches."""
        return self._shares.training(loader)

    def iterate(self, iterator: Iterator[Any], given: int) -> Iterator[Any]:
        """Return an iterator that keeps `share` up to date."""
        return self._watched(self._shares.iterate(iterator, given))

    def _watched(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Tell where this rank is while it waits for its data."""
        progress, life = self._loop.progress, self._life
        while True:
            life.place = progress.batch + 1, 0
            batch = next(iterator, _END)
            if batch is _END:
                return
            life.place = progress.batch + 1, 1
            yield batch

    def begin_pass(self) -> None:
        """Begin a pass over the batches of a validation: ranks read different numbers of them."""
        self._mailbox.is_in_pass = True

    def end_pass(self) -> bool:
        """Wait for the other ranks, and take the commands that not all of them have had."""
        self._mailbox.is_in_pass = False
        batch, phase = self._life.place
        self._life.place = batch, phase + 1
        self.agreement.exchange()
        # On all ranks, because another exchange is part of it
        return True

    # Decisions ---------------------------------------------------------------------------------------

    def seconds(self, own: float) -> float:
        """Return how long the run had trained at the last exchange, by the clock of rank 0."""
        return self.agreement.seconds
