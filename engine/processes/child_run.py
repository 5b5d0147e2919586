"""ChildRun: the handle of a run in the child process of a callback.

Its state is what the parent told last. Commands and events go to the parent over the socket.
"""

import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from offloop.engine.bus.command_mailbox import actor
from offloop.engine.bus.commands import Command, check
from offloop.engine.bus.deadlock import CommandFuture, Places
from offloop.engine.bus.waker import Waker
from offloop.engine.encoding import check_new, decode, encode
from offloop.engine.errors import BusClosedError, RunEndedError
from offloop.engine.events import Event, Metrics, Settings
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.processes import messages
from offloop.engine.processes.errors import unpack_error
from offloop.engine.run_handle import NOT_EVERYWHERE, RunHandle, no_attribute

T = TypeVar("T")


class _Future(CommandFuture[T]):
    """The result of a command that another process applies."""

    def __init__(self, places: Places, command: Command[T]) -> None:
        super().__init__(places, command)
        # Written by the thread that reads the socket.
        self.is_accepted = False
        self.is_held_up = False
        self.wake: Callable[[], None] = _no_one

    def accept(self, *, is_held_up: bool) -> None:
        """Note that training waits for others before the command applies. The thread that reads the socket."""
        self.is_held_up = is_held_up
        self.is_accepted = True
        self.wake()


class ChildRun(RunHandle):
    """The handle of a run in a child process; see `RunHandle`."""

    __slots__ = ("_facts", "_futures", "_has_ended", "_load", "_numbers", "_places", "_send")

    def __init__(self, load: messages.Load, places: Places, send: Callable[[messages.Message], None]) -> None:
        """Serve the callback of a child.

        Args:
            load: Tells about the run.
            places: Of this process.
            send: Sends a message to the parent. Any thread.
        """
        self._load = load
        self._places = places
        self._send = send
        # Replaced by the thread that reads the socket.
        self._facts = load.facts
        self._has_ended = False
        # Commands that have not applied yet, by number. Any thread adds, the one that reads the socket removes.
        self._futures: dict[int, _Future[Any]] = {}
        self._numbers = itertools.count()

    # The thread that reads the socket

    def learn(self, facts: messages.Facts) -> None:
        """Note what the run is doing."""
        self._facts = facts

    def end(self) -> None:
        """Note that no event can be published any more."""
        self._has_ended = True

    def accepted(self, message: messages.Accepted) -> None:
        """Let go of who awaits a command."""
        future = self._futures.get(message.id)
        if future is not None:
            future.accept(is_held_up=message.is_held_up)
            self._places.changed()

    def applied(self, message: messages.Applied) -> None:
        """Complete the future of a command."""
        self._facts = message.facts
        future = self._futures.pop(message.id, None)
        # False if it was taken back meanwhile.
        if future is None or not future.set_running_or_notify_cancel():
            return
        if message.error is not None:
            future.set_exception(unpack_error(message.error))
        else:
            future.set_result(_result(message))

    # State

    @property
    def id(self) -> str:
        return self._load.run_id

    @property
    def dir(self) -> Path | None:
        return None if self._load.dir is None else Path(self._load.dir)

    @property
    def metrics(self) -> Metrics:
        return Metrics(self._facts.metrics)

    @property
    def state(self) -> str:
        return self._facts.state

    @property
    def is_over(self) -> bool:
        return self._facts.is_over

    @property
    def is_saving(self) -> bool:
        return self._facts.is_saving

    @property
    def refused(self) -> dict[str, str]:
        return {**self._load.refused, "call": NOT_EVERYWHERE["call"]}

    @property
    def interrupted(self) -> bool:
        return self._facts.interrupted

    @property
    def epoch(self) -> int:
        return self._facts.epoch

    @property
    def step(self) -> int:
        return self._facts.step

    @property
    def validation_batch(self) -> int:
        return self._facts.validation_batch

    @property
    def hyperparameters(self) -> Settings:
        return Settings(self._load.hyperparameters)

    @property
    def monitor(self) -> str:
        return self._load.monitor

    @property
    def default_monitor(self) -> str:
        return self._load.default_monitor

    def direction_of(self, metric: str) -> Direction | None:
        return self._load.directions.get(metric) or metric_direction(metric)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name)

    # Events and commands

    def publish(self, event: Event) -> None:
        if self._has_ended:
            raise BusClosedError(f"{type(event).__name__} was published after the run had ended")
        check_new(event)
        self._send(messages.Publish(msgspec.Raw(encode(event, "msgpack"))))
        # It must not be published twice. The time that counts is set by the run.
        msgspec.structs.force_setattr(event, "time", time.time())

    def give_nowait(self, command: Command[T], *, by: str | None = None) -> Future[T]:
        if self._has_ended or self._facts.is_over:
            raise RunEndedError(f"{command.name} came too late: the run is over")
        check(command, refused=self.refused, groups=self._facts.groups)
        future: _Future[T] = _Future(self._places, command)
        number = next(self._numbers)
        self._futures[number] = future
        self._send(messages.Give(number, msgspec.Raw(msgspec.msgpack.encode(command)), by or actor.get()))
        future.add_done_callback(functools.partial(self._take_back, number))
        return future

    def _take_back(self, number: int, future: Future[Any]) -> None:
        """Take a command back whose future was cancelled."""
        if future.cancelled() and self._futures.pop(number, None) is not None:
            self._send(messages.TakeBack(number))

    async def _wait_for(self, future: Future[T]) -> T | None:
        assert isinstance(future, _Future)
        waker = Waker()
        future.wake = waker.wake
        future.add_done_callback(lambda _: waker.wake())
        while not (future.done() or future.is_accepted):
            await waker.wait()
        future.wake = _no_one
        return future.result() if future.done() else None

    def _is_plain(self) -> bool:
        return self._places.is_plain()


def _no_one() -> None:
    """Wake no one."""


def _result(message: messages.Applied) -> Any:
    """Return the result of a command, as the process of the run has it."""
    if message.is_event:
        return decode(bytes(message.result), "msgpack")
    result = msgspec.msgpack.decode(message.result)
    return Metrics(result) if isinstance(result, dict) else result
