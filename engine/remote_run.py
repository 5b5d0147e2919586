"""RemoteRun: the handle of a run that another process trains. Commands are messages, and so are their results.

    here                                            the process that trains
    ────                                            ───────────────────────
    run.stop_nowait()     ── number, command ──>    its mailbox
    the command's future  <── result, or error ──   the training thread has applied it

Two handles are made of it: that of a callback in a process of its own (`processes/child_run.py`), and that of a program
which watches a run from elsewhere (`offloop.connect`). They differ in how messages travel, and in what they know of the
run's state.
"""

import functools
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from offloop.engine.bus.commands import Command, check
from offloop.engine.bus.deadlock import CommandFuture, Places
from offloop.engine.bus.subscribers import Subscribers
from offloop.engine.bus.subscription import OnFull, Subscription, check_arguments
from offloop.engine.bus.waker import Waker
from offloop.engine.encoding import check_new
from offloop.engine.errors import BusClosedError, OffloopError, RunEndedError
from offloop.engine.events import Event
from offloop.engine.run_handle import NOT_EVERYWHERE, RunHandle, no_attribute

__all__ = ["NOT_EVERYWHERE", "Feed", "Places", "RemoteFuture", "RemoteRun"]

T = TypeVar("T")


class RemoteFuture(CommandFuture[T]):
    """The result of a command that another process applies."""

    def __init__(self, places: Places, command: Command[T]) -> None:
        super().__init__(places, command)
        # Written by whoever gets the messages, read by the task that waits.
        self.is_accepted = False
        self._waker = Waker()
        self.add_done_callback(lambda _: self._waker.wake())

    def accept(self) -> None:
        """Note that training waits for others before the command applies. Any thread."""
        self.is_accepted = True
        self._waker.wake()

    async def wait(self) -> T | None:
        """Wait for the result; None if the command is only accepted because training waits for others."""
        while not (self.done() or self.is_accepted):
            await self._waker.wait()
        return self.result() if self.done() else None


class RemoteRun(RunHandle):
    """The handle of a run that another process trains; see `RunHandle`."""

    __slots__ = ("_futures", "_numbers", "_places")

    def __init__(self, places: Places) -> None:
        """Give no command yet.

        Args:
            places: Threads of this process that must not wait for a command.
        """
        self._places = places
        # Commands that have not applied yet, by number. Any thread adds, the one that gets the messages removes.
        self._futures: dict[int, RemoteFuture[Any]] = {}
        self._numbers = itertools.count()

    # What an implementation has

    @property
    def _has_ended(self) -> bool:
        """True if the run takes no command any more."""
        raise NotImplementedError

    @property
    def _groups(self) -> dict[str, int]:
        """How many parameter groups each optimizer has, by its name; empty if that is not known."""
        raise NotImplementedError

    @property
    def _is_closed(self) -> bool:
        """True if no event can be published any more."""
        raise NotImplementedError

    def _send_event(self, event: Event) -> None:
        """Send an event to publish. Any thread; does not wait."""
        raise NotImplementedError

    def _send_command(self, number: int, command: Command[Any], by: str | None) -> None:
        """Send a command. Any thread; does not wait."""
        raise NotImplementedError

    def _send_take_back(self, number: int) -> None:
        """Take a command back. Any thread; does not wait."""
        raise NotImplementedError

    # What comes of commands: called where messages come in

    def _accepted(self, number: int) -> None:
        """Let go of who awaits a command: training waits for others."""
        future = self._futures.get(number)
        if future is not None:
            future.accept()
            self._places.changed()

    def _completed(self, number: int, result: Any = None, error: BaseException | None = None) -> None:
        """Complete the future of a command; nothing if it is done already, or was taken back."""
        future = self._futures.pop(number, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    # Events and commands

    def publish(self, event: Event) -> None:
        if self._is_closed:
            raise BusClosedError(f"{type(event).__name__} was published after the run had ended")
        check_new(event)
        self._send_event(event)
        # It must not be published twice. The time that counts is set by the run.
        msgspec.structs.force_setattr(event, "time", time.time())

    def give_nowait(self, command: Command[T], *, by: str | None = None) -> Future[T]:
        if self._has_ended:
            raise RunEndedError(f"{command.name} came too late: the run is over")
        check(command, refused=self.refused, groups=self._groups)
        future: RemoteFuture[T] = RemoteFuture(self._places, command)
        number = next(self._numbers)
        self._futures[number] = future
        self._send_command(number, command, by)
        future.add_done_callback(functools.partial(self._take_back, number))
        return future

    def _take_back(self, number: int, future: Future[Any]) -> None:
        """Take a command back whose future was cancelled."""
        if future.cancelled() and self._futures.pop(number, None) is not None:
            self._send_take_back(number)

    async def _wait_for(self, future: Future[T]) -> T | None:
        assert isinstance(future, RemoteFuture)
        result: T | None = await future.wait()
        return result

    def _is_plain(self) -> bool:
        return self._places.is_plain()

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name)


class Feed:
    """Subscriptions to events that come from another process, with the guarantees of `Run.events`.

    One task of one event loop puts events in and tends the feed; any thread subscribes.
    """

    def __init__(self) -> None:
        self._waker = Waker()
        self._subscribers = Subscribers(time.time, _nothing, self._waker)
        self._subscribers.thread = threading.get_ident()

    @property
    def has_ended(self) -> bool:
        """True after `end`."""
        return self._subscribers.has_ended

    def subscribe(self, types: tuple[type[Event], ...], *, buffer: int, name: str) -> Subscription[Event]:
        """Subscribe as `Run.events` does: milestones so far are replayed. Any thread.

        Training waits for no subscriber elsewhere, so there is no `on_full="block"`.
        """
        on_full: OnFull = "drop_oldest"
        check_arguments(types, buffer, on_full)
        subscription: Subscription[Event] = Subscription(
            self._subscribers, types or (Event,), name=name, buffer=buffer, on_full=on_full
        )
        self._subscribers.add(subscription, replay=True)
        return subscription

    def put(self, events: list[Event], milestones: Sequence[Event]) -> None:
        """Hand events to the subscribers, and keep the milestones among them for later ones."""
        self._subscribers.hand_over(events, (), list(milestones))

    def note_missed(self, count: int) -> None:
        """Count milestones that did not come, as `SubscriptionStatistics.not_replayed`."""
        self._subscribers.note_missed(count)

    def note_dropped(self, count: int) -> None:
        """Count samples that did not come, as `SubscriptionStatistics.dropped`."""
        self._subscribers.note_dropped(count)

    def end(self, error: OffloopError | None = None) -> None:
        """End all subscriptions, present and future ones, once they have given what they have; twice is fine.

        Args:
            error: Raised in those who iterate; None for an end in order.
        """
        if not self._subscribers.has_ended:
            self._subscribers.end(error)

    async def tend(self) -> None:
        """Let go of subscriptions that others have closed. Runs until cancelled."""
        while True:
            await self._waker.wait()
            self._subscribers.reap()


def _nothing() -> None:
    """Training does not wait for subscribers elsewhere."""
