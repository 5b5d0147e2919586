"""ChildRun: the handle of a run in the child process of a callback.

Its state is what the parent told last. Commands and events go to the parent over the socket.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from offloop.engine.bus.command_mailbox import actor
from offloop.engine.bus.commands import Command
from offloop.engine.bus.deadlock import Places
from offloop.engine.encoding import decode, encode
from offloop.engine.events import Event, Metrics, Settings
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.processes import messages
from offloop.engine.processes.errors import unpack_error
from offloop.engine.remote_run import RemoteRun
from offloop.engine.run_handle import NOT_EVERYWHERE


class ChildRun(RemoteRun):
    """The handle of a run in a child process; see `RunHandle`."""

    __slots__ = ("_events_ended", "_facts", "_load", "_send")

    def __init__(self, load: messages.Load, places: Places, send: Callable[[messages.Message], None]) -> None:
        """Serve the callback of a child.

        Args:
            load: Tells about the run.
            places: Of this process.
            send: Sends a message to the parent. Any thread.
        """
        super().__init__(places)
        self._load = load
        self._send = send
        # Replaced by the thread that reads the socket.
        self._facts = load.facts
        # Written by the thread that reads the socket.
        self._events_ended = False

    # The thread that reads the socket

    def learn(self, facts: messages.Facts) -> None:
        """Note what the run is doing."""
        self._facts = facts

    def end(self) -> None:
        """Note that no event can be published any more."""
        self._events_ended = True

    def accepted(self, message: messages.Accepted) -> None:
        """Let go of who awaits a command."""
        self._accepted(message.id)

    def applied(self, message: messages.Applied) -> None:
        """Complete the future of a command."""
        self._facts = message.facts
        if message.error is not None:
            self._completed(message.id, error=unpack_error(message.error))
        else:
            self._completed(message.id, _result(message))

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

    @property
    def _is_closed(self) -> bool:
        return self._events_ended

    @property
    def _has_ended(self) -> bool:
        return self._events_ended or self._facts.is_over

    @property
    def _groups(self) -> dict[str, int]:
        return self._facts.groups

    # Events and commands

    def _send_event(self, event: Event) -> None:
        self._send(messages.Publish(msgspec.Raw(encode(event, "msgpack"))))

    def _send_command(self, number: int, command: Command[Any], by: str | None) -> None:
        self._send(messages.Give(number, msgspec.Raw(msgspec.msgpack.encode(command)), by or actor.get()))

    def _send_take_back(self, number: int) -> None:
        self._send(messages.TakeBack(number))


def _result(message: messages.Applied) -> Any:
    """Return the result of a command, as the process of the run has it."""
    if message.is_event:
        return decode(bytes(message.result), "msgpack")
    result = msgspec.msgpack.decode(message.result)
    return Metrics(result) if isinstance(result, dict) else result
