"""The agreement: one exchange of messages between all ranks, at some step boundaries.

    each rank                                            all ranks
    ─────────                                            ─────────
    numbers of its steps since the last exchange ──────> the same events
    commands, a signal, a cancellation           ──────> the same commands at the same boundary
    rank 0: its clock, the steps until the next  ──────> the same time, the same next exchange

An exchange takes about a millisecond, because the slowest rank is waited for. So it happens every m-th step, with m
such that it takes 1 % of the time, and wherever all ranks need it now: before a milestone, after a decider.
"""

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

import msgspec

from offloop.engine.bus.command_mailbox import Envelope, Mailbox
from offloop.engine.bus.commands import Call, Command
from offloop.engine.distributed.group import Group
from offloop.engine.distributed.messages import Given, Message
from offloop.engine.distributed.news import News
from offloop.engine.errors import OffloopError
from offloop.engine.training.progress import Progress
from offloop.engine.training.strategy import StepValues

SHARE: Final = 0.01
"""Share of the time that exchanges may take."""
LONGEST: Final = 0.1
"""Seconds between two exchanges, which a command waits for, that the share may lead to."""
_REMEMBERED: Final = 8
"""Exchanges whose durations are remembered. The shortest counts: in the others, one rank waited for something else."""
_FOREIGN_NUMBERS: Final = 1 << 32
"""First number of the commands that were not given on rank 0."""
_OWN_ACTORS: Final = ("user", "signal", "train")
"""Whose commands count on ranks other than 0. What callbacks command there, they command on rank 0 as well."""


class Host(Protocol):
    """What an agreement asks of the run on this rank."""

    def feed(self, envelopes: Sequence[Envelope[Any]], cancelled: str | None, /) -> None:
        """Take the commands of all ranks, and why the run is cancelled, if it is."""

    def followed(self, function: Callable[[Any], Any] | None, /) -> Callable[[Any], Any]:
        """Return a function for all ranks that calls `function` on rank 0; None: that rank is another one."""

    def own_seconds(self) -> float:
        """Return how long the run has trained, by the clock of this rank."""

    def own_hold(self) -> bool:
        """Return whether a full subscriber holds training up on this rank."""

    def own_failure(self) -> tuple[str, str] | None:
        """Return the name of this machine, and what this rank has failed with; None if it has not."""

    def other_failed(self, rank: int, host: str, what: str, /) -> None:
        """End the run, because another rank has failed."""

    def own_cadences(self) -> list[int]:
        """Return the numbers of steps at whose multiples callbacks of this rank save."""

    def take_failed_hooks(self) -> list[tuple[str, str]]:
        """Return which step hooks have failed here since the last call, and with what."""


@dataclasses.dataclass(slots=True)
class _Waiting:
    """What is to be published in its turn."""

    publish: Callable[..., None]
    is_step: bool


class Agreement:
    """The exchanges of one run. Training thread only."""

    def __init__(self, group: Group, given: Mailbox, progress: Progress, news: News, host: Host) -> None:
        """Exchange the messages of this rank.

        Args:
            group: All ranks.
            given: The mailbox of the run, where commands are given on this rank.
            progress: Of the run.
            news: For commands inside a validation.
            host: The run on this rank.
        """
        self.due = 1
        """The step at whose end the next exchange is due."""
        self.seconds = 0.0
        """How long the run has trained, by the clock of rank 0."""
        self.is_held = False
        """True while a full subscriber of rank 0 holds training up."""
        self.is_first = group.rank == 0
        self._group = group
        self._given = given
        self._progress = progress
        self._news = news
        self._host = host
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)
        # Steps of this rank that the others do not know yet
        self._unsent: list[StepValues] = []
        # By rank: steps that were not delivered yet
        self._received: list[deque[StepValues]] = [deque() for _ in range(group.world_size)]
        self._waiting: deque[_Waiting] = deque()
        # Commands of this rank that are on their way, by number
        self._sent: dict[int, Envelope[Any]] = {}
        # Those that rank 0 was asked to post, until they come back. The next exchange carries the rest
        self._asked: list[Given] = []
        # Commands of other ranks that were fed: by rank and number
        self._fed: set[tuple[int, int]] = set()
        self._foreign = itertools.count(_FOREIGN_NUMBERS)
        # Of this rank, a cancellation that was told in a validation
        self._is_cancel_told = False
        # Rank 0
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._pace = 1
        self._paced_at: tuple[int, float] | None = None

    # Numbers of steps ------------------------------------------------------------------------------

    def gather_step(self, values: StepValues, publish: Callable[[StepValues], None]) -> None:
        """Keep the numbers of a step for the next exchange. `publish` then gets those of all ranks."""
        self._unsent.append(values)
        self._waiting.append(_Waiting(publish, is_step=True))

    def put(self, publish: Callable[[], None]) -> None:
        """Call `publish` after the steps before it."""
        if self._waiting:
            self._waiting.append(_Waiting(publish, is_step=False))
        else:
            publish()

    def flush(self) -> None:
        """Publish all steps so far. The ranks have made the same steps, so all of them exchange, or none."""
        while self._waiting:
            self.exchange()

    def _deliver(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            # A step whose numbers are still on the device of some rank
            if first.is_step and not all(self._received):
                return
            self._waiting.popleft()
            if not first.is_step:
                first.publish()
                continue
            parts = [each.popleft() for each in self._received]
            first.publish(
                StepValues(
                    [loss for part in parts for loss in part.losses],
                    [value for part in parts for value in part.logged],
                    sum(part.samples for part in parts),
                )
            )

    # The exchange ----------------------------------------------------------------------------------

    @property
    def has_sent(self) -> bool:
        """True while a command of this rank is on its way to all. Any thread: one look at the size of a dict."""
        return bool(self._sent)

    def is_held_here(self) -> bool:
        """Return whether a full subscriber of this rank holds training up now."""
        return self._host.own_hold()

    def is_due(self) -> bool:
        """Return whether an exchange is due at this step boundary."""
        return self._progress.step >= self.due

    def exchange(self) -> None:
        """Exchange messages with all ranks, feed their commands to the loop, and publish steps. Waits for all ranks.

        Raises:
            OffloopError: A step hook has failed on some ranks only.
        """
        step, started, given = self._progress.step, time.perf_counter(), self._given
        steps, self._unsent = self._unsent, []
        message = Message(
            steps=steps,
            commands=[*self._asked, *self._take_given()],
            asked=self._news.asks,
            cancelled=given.cancel_reason if given.cancelled else None,
            failure=self._host.own_failure(),
            hooks=self._host.take_failed_hooks(),
            news=self._news.posted,
            seconds=self._host.own_seconds(),
            pace=self._next_pace(step, started) if self.is_first else 0,
            cadences=self._host.own_cadences(),
            is_held=self._host.own_hold(),
        )
        messages = [self._decoder.decode(each) for each in self._group.gather(self._encoder.encode(message))]
        self._durations.append(time.perf_counter() - started)
        first = messages[0]
        self.seconds, self.is_held = first.seconds, first.is_held
        self.due = min([step + first.pace, *(step + each - step % each for each in first.cadences)])
        # News that this rank has not seen in its validation come before the commands since
        while not self.is_first and self._news.read < first.news:
            self._read_news(wait=True)
        if self.is_first:
            self._news.skip([each.asked for each in messages])
        for received, each in zip(self._received, messages, strict=True):
            received.extend(each.steps)
        for rank, each in enumerate(messages):
            if each.failure is not None and rank != self._group.rank:
                self._host.other_failed(rank, *each.failure)
        _compare_hooks([each.hooks for each in messages])
        cancelled = next((each.cancelled for each in messages if each.cancelled is not None), None)
        self._feed([each.commands for each in messages], cancelled)
        self._deliver()

    def _next_pace(self, step: int, now: float) -> int:
        """Return after how many steps the next exchange is due, such that exchanges take `SHARE` of the time."""
        before = self._paced_at
        if before is None or step > before[0]:
            self._paced_at = step, now
        if before is not None and step > before[0] and self._durations:
            step_time = max((now - before[1]) / (step - before[0]), 1e-6)
            wanted = math.ceil(min(self._durations) / (SHARE * step_time))
            # Not far ahead at once: the first steps of a run are slow
            self._pace = max(1, min(wanted, math.ceil(LONGEST / step_time), 2 * self._pace))
        return self._pace

    # In a validation, where ranks read different numbers of batches --------------------------------

    def look(self) -> None:
        """Post what was given on this rank, or ask rank 0 to; and take what rank 0 has posted. Does not wait."""
        given, cancelled = self._take_given(), None
        if self._given.cancelled and not self._is_cancel_told:
            self._is_cancel_told, cancelled = True, self._given.cancel_reason
        if not self.is_first:
            if given or cancelled is not None:
                self._news.ask(given, cancelled)
                self._asked += given
            while self._read_news(wait=False):
                pass
            return
        asked = self._news.asked()
        commands = [given, *(each.commands for each in asked[1:])]
        cancelled = cancelled or next((each.cancelled for each in asked if each.cancelled is not None), None)
        if any(commands) or cancelled is not None:
            self._news.post(commands, cancelled)
            self._feed(commands, cancelled)

    def _read_news(self, *, wait: bool) -> bool:
        news = self._news.next(wait=wait)
        if news is not None:
            self._feed(news.commands, news.cancelled)
        return news is not None

    # Commands --------------------------------------------------------------------------------------

    def _take_given(self) -> list[Given]:
        """Take out the commands that were given on this rank. They cannot be taken back any more."""
        taken: list[Given] = []
        for envelope in self._given.take():
            command, future = envelope.command, envelope.future
            if not self.is_first and envelope.by not in _OWN_ACTORS:
                # Who awaits it goes on: on rank 0, the same callback awaits the same command
                if future.set_running_or_notify_cancel():
                    future.set_result(None)
                continue
            if not future.set_running_or_notify_cancel():
                continue
            is_call = isinstance(command, Call)
            if is_call and not self.is_first:
                text = "call() works on rank 0 of a run of several processes: write `if trainer.rank == 0`"
                future.set_exception(OffloopError(text))
                continue
            self._sent[envelope.id] = envelope
            name = getattr(command.function, "__name__", "function") if isinstance(command, Call) else ""
            known: Any = None if is_call else command
            taken.append(Given(known, name, envelope.by, envelope.from_decider, envelope.id))
        return taken

    def _feed(self, commands: Sequence[Sequence[Given]], cancelled: str | None) -> None:
        """Feed commands to the loop, in the order of ranks. Equal ones of several ranks are one command.

        Args:
            commands: By rank.
            cancelled: Why the run is cancelled; None if it is not.
        """
        made: dict[tuple[bytes, str], tuple[int, Future[Any]]] = {}
        envelopes: list[Envelope[Any]] = []
        for rank, of_rank in enumerate(commands):
            for each in of_rank:
                if rank and (rank, each.number) in self._fed:
                    continue
                self._fed.add((rank, each.number))
                own = self._sent.pop(each.number) if rank == self._group.rank else None
                key = self._encoder.encode(each.command), each.by
                first_rank, future = made.get(key, (rank, None))
                if future is None or first_rank == rank or each.command is None:
                    future = Future()
                    made[key] = rank, future
                    number = each.number if rank == 0 else next(self._foreign)
                    command = each.command or self._call(each, own)
                    envelopes.append(Envelope(command, number, each.by, each.from_decider, future))
                if own is not None:
                    _pass_on(future, own.future)
        self._asked = [each for each in self._asked if each.number in self._sent]
        self._host.feed(envelopes, cancelled)

    def _call(self, given: Given, own: Envelope[Any] | None) -> Command[Any]:
        """Return the command of all ranks for a `Call` on rank 0."""
        command = None if own is None else own.command
        function = self._host.followed(command.function if isinstance(command, Call) else None)
        function.__name__ = given.function
        return Call(function)


def _pass_on(future: Future[Any], to: Future[Any]) -> None:
    """Complete `to` as `future` is completed."""

    def done(_: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            to.set_exception(error)
        else:
            to.set_result(future.result())

    future.add_done_callback(done)


def _compare_hooks(failed: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Raise if step hooks have failed on some ranks only: they may have changed the gradients of the others."""
    names = [[name for name, _ in of_rank] for of_rank in failed]
    if all(each == names[0] for each in names):
        return
    found = "; ".join(
        f"{name} on rank {rank} ({error})"
        for rank, of_rank in enumerate(failed)
        for name, error in dict(of_rank).items()
    )
    raise OffloopError(
        f"step hooks have failed on some ranks only, so the weights of the ranks may differ: {found}"
    )
