"""What ranks agree on: numbers of steps, commands, time. Threads stand for ranks; the store is torch's own."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]  # it is there

from offloop.engine.bus.command_mailbox import Envelope, Mailbox, actor
from offloop.engine.bus.commands import Call, Pause, SetLearningRate, Stop
from offloop.engine.distributed.agreement import Agreement
from offloop.engine.distributed.news import News
from offloop.engine.errors import OffloopError
from offloop.engine.training.progress import Progress
from offloop.engine.training.strategy import StepLoss, StepValues


class Meeting:
    """A process group of threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.messages: list[bytes] = [b""] * world_size


class ThreadGroup:
    """One rank of it, as `Group`."""

    def __init__(self, meeting: Meeting, rank: int, world_size: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, world_size

    def gather(self, own: bytes) -> list[bytes]:
        self.meeting.messages[self.rank] = own
        self.meeting.barrier.wait()
        messages = list(self.meeting.messages)
        self.meeting.barrier.wait()
        return messages


class Rank:
    """One rank of a run, without a run: it notes what reaches it."""

    def __init__(self, meeting: Meeting, store: Any, rank: int, world_size: int) -> None:
        self.mailbox, self.progress = Mailbox(), Progress()
        self.envelopes: list[Envelope[Any]] = []
        self.cancelled: str | None = None
        self.published: list[object] = []
        self.failures: list[tuple[int, str, str]] = []
        self.failure: tuple[str, str] | None = None
        self.cadences: list[int] = []
        self.failed_hooks: list[tuple[str, str]] = []
        news = News(store, rank, world_size)
        group: Any = ThreadGroup(meeting, rank, world_size)
        self.agreement = Agreement(group, self.mailbox, self.progress, news, self)

    def feed(self, envelopes: Sequence[Envelope[Any]], cancelled: str | None) -> None:
        self.envelopes += envelopes
        self.cancelled = self.cancelled or cancelled

    def followed(self, function: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        def call(program: Any) -> Any:
            return None if function is None else function(program)

        return call

    def own_seconds(self) -> float:
        return 1.5

    def own_hold(self) -> bool:
        return False

    def own_failure(self) -> tuple[str, str] | None:
        return self.failure

    def other_failed(self, rank: int, host: str, what: str) -> None:
        self.failures.append((rank, host, what))

    def own_cadences(self) -> list[int]:
        return self.cadences

    def take_failed_hooks(self) -> list[tuple[str, str]]:
        failed, self.failed_hooks = self.failed_hooks, []
        return failed

    def step(self, loss: float) -> None:
        self.progress.step += 1
        values = StepValues([StepLoss(loss, 1.0, 1.0)], [], 4)
        self.agreement.gather_step(
            values, lambda all_: self.published.append([each.value for each in all_.losses])
        )

    def commands(self) -> list[tuple[str, str]]:
        return [(each.command.name, each.by) for each in self.envelopes]


def ranks(count: int = 2) -> list[Rank]:
    meeting, store = Meeting(count), HashStore()
    return [Rank(meeting, store, rank, count) for rank in range(count)]


def together(all_ranks: list[Rank], *actions: Callable[[Rank], object]) -> None:
    """Let each rank do something in a thread of its own: the same, or something different for each."""
    with ThreadPoolExecutor(len(all_ranks)) as pool:
        chosen = actions * len(all_ranks) if len(actions) == 1 else actions
        for each in [pool.submit(action, rank) for action, rank in zip(chosen, all_ranks, strict=True)]:
            each.result()


def exchange(rank: Rank) -> None:
    rank.agreement.exchange()


def test_steps_are_published_with_the_numbers_of_all_ranks_in_order() -> None:
    first, second = both = ranks()
    for number in range(3):
        first.step(number)
        second.step(10 + number)
    first.agreement.put(lambda: first.published.append("sample"))
    assert not first.published, "nothing is known of the other rank yet"
    together(both, lambda rank: rank.agreement.flush())
    assert second.published == [[0, 10], [1, 11], [2, 12]]
    assert first.published == [*second.published, "sample"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_rank_whose_numbers_arrive_late_changes_no_order(arrivals: list[tuple[int, int]]) -> None:
    first, second = both = ranks()
    counts = [0, 0]
    for of_round in arrivals:
        for index, (rank, count) in enumerate(zip(both, of_round, strict=True)):
            for _ in range(count):
                rank.step(float(counts[index]))
                counts[index] += 1
        together(both, exchange)
        assert first.published == second.published
    assert first.published == [[float(number)] * 2 for number in range(min(counts))]


def test_a_command_reaches_all_ranks_and_its_future_completes_where_it_was_given() -> None:
    first, second = both = ranks()
    future = first.mailbox.give(SetLearningRate(0.5))
    together(both, exchange)
    assert first.commands() == second.commands() == [("set_lr", "user")]
    assert first.envelopes[0].command == second.envelopes[0].command
    assert not future.done()
    first.envelopes[0].future.set_result(None)
    assert future.done() and future.result() is None


def test_a_command_that_was_taken_back_reaches_nobody() -> None:
    both = ranks()
    assert both[0].mailbox.give(SetLearningRate(0.5)).cancel()
    together(both, exchange)
    assert [each.commands() for each in both] == [[], []]


def test_equal_commands_of_several_ranks_are_one() -> None:
    first, second = both = ranks()
    futures: list[Future[Any]] = [each.mailbox.give(Stop("enough")) for each in both]
    second.mailbox.give(Pause("only here"))
    together(both, exchange)
    assert first.commands() == second.commands() == [("stop", "user"), ("pause", "user")]
    second.envelopes[0].future.set_result(None)
    assert [each.done() for each in futures] == [False, True], "each rank completes its own"


def test_commands_of_callbacks_count_on_rank_0_alone() -> None:
    first, second = both = ranks()
    token = actor.set("EarlyStopping")
    try:
        for each in both:
            each.mailbox.give(Stop("no progress"))
        left_out = second.mailbox.give(Pause())
    finally:
        actor.reset(token)
    together(both, exchange)
    assert first.commands() == second.commands() == [("stop", "EarlyStopping")]
    assert left_out.result(0) is None, "whoever awaits it there goes on"


def test_a_function_is_called_on_rank_0_and_refused_elsewhere() -> None:
    first, second = both = ranks()
    called = first.mailbox.give(Call(lambda trainer: trainer + 1))
    refused = second.mailbox.give(Call(lambda trainer: trainer))
    together(both, exchange)
    assert [each.envelopes[0].command.function(41) for each in both] == [42, None]  # type: ignore[attr-defined]
    assert not called.done()
    with pytest.raises(OffloopError, match="call\\(\\) works on rank 0"):
        refused.result(0)


def test_a_cancellation_or_a_failure_of_one_rank_is_that_of_all() -> None:
    first, second = both = ranks()
    second.mailbox.cancel("Ctrl-C twice")
    first.failure = "a-host", "has failed:\nValueError: x"
    together(both, exchange)
    assert first.cancelled == second.cancelled == "Ctrl-C twice"
    assert (first.failures, second.failures) == ([], [(0, "a-host", "has failed:\nValueError: x")])


def test_a_hook_that_fails_on_all_ranks_is_left_out_and_on_one_alone_it_ends_the_run() -> None:
    first, second = both = ranks()
    first.failed_hooks, second.failed_hooks = [("A.after_step", "x")], [("A.after_step", "y")]
    together(both, exchange)
    second.failed_hooks = [("A.after_step", "ValueError: z")]

    def refused(rank: Rank) -> None:
        with pytest.raises(OffloopError, match=r"A.after_step on rank 1 \(ValueError: z\)"):
            exchange(rank)

    together(both, refused)


def test_an_exchange_is_due_at_each_multiple_of_a_cadence() -> None:
    first, second = both = ranks()
    first.cadences = [7]
    due = []
    for _ in range(30):
        together(both, lambda rank: rank.step(0.0))
        assert first.agreement.is_due() == second.agreement.is_due()
        if first.agreement.is_due():
            due.append(first.progress.step)
            together(both, exchange)
    assert {7, 14, 21, 28} <= set(due)


def test_time_is_that_of_rank_0() -> None:
    both = ranks()
    both[1].own_seconds = lambda: 99.0  # type: ignore[method-assign]
    together(both, exchange)
    assert [each.agreement.seconds for each in both] == [1.5, 1.5]


def test_a_command_is_on_its_way_until_all_ranks_have_it() -> None:
    """Rank 0 may stand in a pause, and learns from the signs of life that it must not."""
    first, second = ranks()
    second.mailbox.give(Pause())
    assert second.mailbox.attention
    look(second)
    assert second.agreement.has_sent and not second.mailbox.attention
    look(first)
    look(second)
    assert not second.agreement.has_sent


def look(rank: Rank) -> None:
    rank.agreement.look()


def test_news_reach_ranks_in_a_validation_without_an_exchange() -> None:
    first, second = ranks()
    first.mailbox.give(Pause("lunch"))
    look(first)
    assert first.commands() == [("pause", "user")]
    assert second.commands() == []
    look(second)
    look(second)
    assert second.commands() == [("pause", "user")]


def test_what_another_rank_was_told_in_a_validation_reaches_all_through_rank_0() -> None:
    first, second = ranks()
    future = second.mailbox.give(Stop("SIGTERM"), by="signal")
    look(second)
    assert second.commands() == [], "rank 0 has not posted it"
    look(first)
    look(second)
    assert first.commands() == second.commands() == [("stop", "signal")]
    second.envelopes[0].future.set_result(None)
    assert future.done()


def test_a_cancellation_in_a_validation_is_posted_once() -> None:
    first, second = ranks()
    second.mailbox.cancel("twice")
    look(second)
    look(second)
    look(first)
    look(second)
    assert (first.cancelled, second.cancelled) == ("twice", "twice")
    look(first)
    assert first.agreement._news.posted == 1


def test_news_that_a_rank_has_missed_come_before_the_commands_of_the_next_exchange() -> None:
    first, second = both = ranks()
    first.mailbox.give(Pause("first"))
    look(first)
    first.mailbox.give(Stop("second"))
    together(both, exchange)
    assert first.commands() == second.commands() == [("pause", "user"), ("stop", "user")]


def test_what_rank_0_has_not_posted_comes_with_the_next_exchange_once() -> None:
    first, second = both = ranks()
    second.mailbox.give(Pause("late"))
    look(second)
    together(both, exchange)
    assert first.commands() == second.commands() == [("pause", "user")]
    look(first)
    look(second)
    together(both, exchange)
    assert first.commands() == second.commands() == [("pause", "user")]


def test_what_rank_0_has_posted_and_nobody_read_comes_once() -> None:
    first, second = both = ranks()
    second.mailbox.give(Pause("late"))
    look(second)
    look(first)
    together(both, exchange)
    assert first.commands() == second.commands() == [("pause", "user")]
