"""ProcessObserver: the observers of a callback with `runs_in = "process"`, as the run sees them.

The handlers run in a child process (`child.py`), where an ordinary `Observer` calls them, isolates their failures and
measures their costs. Here, the callback has its subscription like any other. A batch of events is taken out of it and
sent; the next one once the child has handled that.
"""

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import anyio
import msgspec

from offloop.engine.bus.command_mailbox import Mailbox, actor
from offloop.engine.bus.commands import (
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)
from offloop.engine.bus.subscription import Barrier, Subscription
from offloop.engine.bus.waker import Waker
from offloop.engine.callback import Handlers
from offloop.engine.encoding import decode, encode
from offloop.engine.errors import BusClosedError, CallbackProcessError
from offloop.engine.events import Event, TrainEnd
from offloop.engine.observers.observer import EVENTS_AT_ONCE, CallbackCosts, Observer
from offloop.engine.processes import messages, pickling
from offloop.engine.processes.child_process import ChildProcess
from offloop.engine.processes.encoded_events import EncodedEvents
from offloop.engine.processes.errors import pack_error, unpack_error
from offloop.engine.run_handle import RunHandle

logger = logging.getLogger("offloop")

ANSWER: Final = 2.0
"""Seconds for a child to acknowledge a cancellation before it is killed: code of C may hold its interpreter."""
EXIT: Final = 10.0
"""Seconds for the interpreter of the child to end after `close`, before it is killed: usually 0.03. With torch loaded
it takes several times as long, and on a busy machine several times that."""
REAP: Final = 2.0
"""Seconds to wait for the thread of a child that was killed. They block the event loop."""


class ProcessObserver(Observer):
    """A callback at work in a child process. All methods belong to the event loop unless they say otherwise."""

    def __init__(
        self,
        handlers: Handlers,
        subscription: Subscription[Event] | None,
        run: RunHandle,
        publish: Callable[[Event], None],
        fail: Callable[[BaseException], None],
        mailbox: Mailbox,
        encoded: EncodedEvents,
    ) -> None:
        """Bind a callback to a run. `pack` must come before `serve`.

        Args:
            handlers: The callback's methods.
            subscription: Its events; None for a callback that observes nothing.
            run: Does what the handle of the child asks for.
            publish: Publishes events of the child, and `CallbackFailed`.
            fail: Ends the run as failed.
            mailbox: The run's.
            encoded: Encodes events for all children of the run.
        """
        super().__init__(handlers, subscription, run, publish, fail, mailbox.places)
        encoded.add_child()
        self._encoded = encoded
        self._mailbox = mailbox
        self._packed: bytes | None = None
        self._child = ChildProcess(
            self.name,
            on_message=self._on_message,
            on_exit=self._on_exit,
            on_over=lambda: self._answered.wake(),
            on_look=self._tell_facts,
        )
        # Woken by the child's thread after each answer. Its reader belongs to the task that waits.
        self._answered = Waker()
        # Written by the child's thread, read by the event loop.
        self._unhandled = 0  # batches sent and not handled yet; also written by the event loop
        self._child_costs = CallbackCosts()
        self._errors_there = 0  # how many of them are in `errors`
        self._is_loaded_there = self._is_cancelling_there = self._is_closed_there = False
        self._is_cancelled = False  # event loop only
        self._durable: list[messages.Durable] = []
        # Commands that have not applied yet, by number. The child's thread adds, any thread removes.
        self._given: dict[int, Future[Any]] = {}
        self._facts: messages.Facts | None = None  # as told last; the child's thread only
        self._is_lost = False
        self._backend = "asyncio"  # written by the event loop before the child starts

    def pack(self) -> None:
        """Pickle the callback, after its `reset`. In the thread that starts the run.

        Raises:
            ConfigError: It holds what cannot be sent to another process.
        """
        types = self.handlers.observed_types()
        self._packed = pickling.dumps(self.handlers.callback, self.name, types)

    @property
    def costs(self) -> CallbackCosts:
        """What the callback has cost so far, in its process; `cpu` is that of the whole process. Any thread."""
        here, there = super().costs, self._child_costs
        return msgspec.structs.replace(
            there, lag=here.lag, dropped=here.dropped, failures=here.failures + there.failures
        )

    async def _serve(self, subscription: Subscription[Event]) -> None:
        assert self._packed is not None
        is_trio = anyio.get_cancelled_exc_class().__module__.startswith("trio")
        self._backend = "trio" if is_trio else "asyncio"
        self._child.send(functools.partial(self._load, self._packed))
        self._packed = None
        try:
            self._child.start()
        except (RuntimeError, OSError) as error:
            self._lost(CallbackProcessError(f"the process of {self.name} could not be started: {error}"))
        while events := await subscription.take_batch(EVENTS_AT_ONCE):
            for is_barrier, group in itertools.groupby(events, lambda each: isinstance(each, Barrier)):
                if is_barrier:
                    for barrier in group:
                        await self._reach(barrier)
                elif not self.disabled:
                    await self._hand_over(list(group))
            if self.disabled:
                subscription.close()

    async def _hand_over(self, events: list[Event]) -> None:
        """Send a batch, and wait until the child has handled it."""
        self._unhandled += 1
        self._child.is_busy = True
        self._child.send(functools.partial(self._handle, events))
        try:
            while self._unhandled and self._is_alive():
                await self._answered.wait()
        finally:
            self._child.is_busy = False

    def _is_alive(self) -> bool:
        return self._child.has_started and not self._child.is_over

    async def make_durable(self, answer: "Future[None]") -> None:
        """Have the child call `make_durable`, and complete `answer` when what it has written is on disk."""
        self._durable.clear()
        if self._is_alive():
            self._child.send(messages.MakeDurable())
        try:
            while not self._durable and self._is_alive():
                await self._answered.wait()
        except BaseException:
            answer.cancel()
            raise
        if not self._durable:
            answer.set_exception(CallbackProcessError(f"the process of {self.name} has ended"))
        elif (packed := self._durable[0].error) is not None:
            answer.set_exception(unpack_error(packed))
        else:
            answer.set_result(None)

    async def close(self) -> None:
        """Have the child call the callback's `close`, and end it. Cancellation: the child is killed."""
        try:
            if self._is_cancelled and not self._is_loaded_there:
                # It still imports. Nothing of the callback has run, so there is nothing to close.
                self._child.kill()
            elif self._is_cancelled and not await self._answers():
                error = TimeoutError(
                    f"its process does not answer {ANSWER:g} s after it was cancelled: ended"
                )
                self.failed("close", error)
                self._child.kill()
            if self._is_alive():
                self._child.send(messages.Close())
                while not self._is_closed_there and self._is_alive():
                    await self._answered.wait()
                with anyio.move_on_after(EXIT):
                    while self._is_alive():
                        await self._answered.wait()
                if self._is_alive():
                    error = TimeoutError(f"its process still runs {EXIT:g} s after close(): ended")
                    self.failed("close", error)
        finally:
            if self._is_alive():
                self._child.kill()
            self._child.join(REAP)
            self._worker.close()

    async def _answers(self) -> bool:
        """Wait until the child has got `Cancel`; False if it does not answer in time."""
        with anyio.move_on_after(ANSWER):
            while not self._is_cancelling_there and self._is_alive():
                await self._answered.wait()
        return self._is_cancelling_there or not self._is_alive()

    def abandon_after(self, seconds: float) -> None:
        """Have the child cancel its handlers, and abandon one that still swallows that in so many seconds."""
        if self._is_alive():
            self._is_cancelled = True
            self._child.send(messages.Cancel(seconds))

    # The child's thread --------------------------------------------------------------------------

    def _on_message(self, message: messages.ToParent) -> None:
        actor.set(self.name)
        match message:
            case messages.Loaded():
                self._is_loaded_there = True
            case messages.Handled():
                self._note(message)
                self.disabled = self.disabled or message.is_disabled
                self._unhandled -= 1
                self._answered.wake()
            case messages.Publish():
                self._publish_there(message)
            case messages.Give():
                self._give(message)
            case messages.TakeBack():
                if (given := self._given.get(message.id)) is not None:
                    given.cancel()
            case messages.Durable():
                self._durable.append(message)
                self._answered.wake()
            case messages.Cancelling():
                self._is_cancelling_there = True
                self._answered.wake()
            case messages.Closed():
                self._note(message)
                self._is_closed_there = True
                self._answered.wake()
            case messages.Fail():
                self._fail(unpack_error(message.error, f"in the process of {self.name}"))
            case messages.CannotLoad():
                error = CallbackProcessError(
                    f"{self.name} could not be loaded in its process: {message.error.text}"
                )
                error.add_note(message.error.traceback.rstrip())
                self._lost(error)
                self._answered.wake()
            case messages.LogRecord():
                try:
                    _log(message)
                except Exception:
                    # A filter or handler of the user's has failed, and perhaps does so again.
                    with contextlib.suppress(Exception):
                        logger.exception("a log record of %s was lost", self.name)

    def _on_exit(self, error: CallbackProcessError | None) -> None:
        if self._child.was_killed:
            # Reported where that was decided.
            return
        if error is None and not (self._is_closed_there or self._is_lost):
            error = CallbackProcessError(
                f"the process of {self.name} ended with exit code 0, by its own doing: the callback gets no more "
                "events, and is not restarted",
                exit_code=0,
            )
        if error is not None:
            self._lost(error)

    def _lost(self, error: CallbackProcessError) -> None:
        """Report that there is no process any more, and let the run go on without the callback. Any thread."""
        if self._is_lost:
            return
        self._is_lost = self.disabled = True
        # Told in any case, also right after another failure.
        self._reported_at = -math.inf
        self.failed("its process", error, is_off=False)
        if self.subscription is not None:
            self.subscription.close()

    def _note(self, message: messages.Handled | messages.Closed) -> None:
        """Note costs and failures, which are totals."""
        self._child_costs = message.costs
        self.errors += message.errors[self._errors_there :]
        self._errors_there = len(message.errors)

    def _publish_there(self, message: messages.Publish) -> None:
        try:
            self._publish(decode(bytes(message.event), "msgpack"))
        except BusClosedError:
            logger.info("an event of %s came after the end of the run", self.name)
        except Exception as error:
            # It cannot be decoded here.
            self.failed("publish", error)

    def _give(self, message: messages.Give) -> None:
        """Give a command of the child to the run, and send what comes of it."""
        try:
            command = _decode_command(message.command)
            future = self.run.give_nowait(command, by=message.by)
        except Exception as error:
            self._send_applied(message.id, None, error)
            return
        self._given[message.id] = future
        future.add_done_callback(functools.partial(self._applied, message.id))
        self._mailbox.let_go(future, functools.partial(self._accepted, message.id))

    def _applied(self, command: int, future: "Future[Any]") -> None:
        """Send what came of a command. In the thread that completes it."""
        self._given.pop(command, None)
        if future.cancelled():
            return
        error = future.exception()
        self._send_applied(command, None if error is not None else future.result(), error)

    def _send_applied(self, command: int, result: Any, error: BaseException | None) -> None:
        is_event = isinstance(result, Event)
        raw = encode(result, "msgpack") if isinstance(result, Event) else msgspec.msgpack.encode(result)
        packed = None if error is None else pack_error(error)
        self._child.send(
            lambda: messages.Applied(command, msgspec.Raw(raw), is_event, packed, self._new_facts())
        )

    def _accepted(self, command: int) -> None:
        is_held_up = self.subscription is not None and self.subscription.is_blocking
        self._child.send(messages.Accepted(command, is_held_up))

    # Made in the child's thread, as they are sent

    def _load(self, packed: bytes) -> messages.Load:
        run = self.run
        levels = {"": logging.root.level}
        for name, each in list(logging.root.manager.loggerDict.items()):
            if isinstance(each, logging.Logger) and each.level:
                levels[name] = each.level
        return messages.Load(
            callback=packed,
            name=self.name,
            backend=self._backend,
            log_levels=levels,
            run_id=run.id,
            dir=None if run.dir is None else str(run.dir.absolute()),
            hyperparameters=dict(run.hyperparameters),
            monitor=run.monitor,
            default_monitor=run.default_monitor,
            directions=run._directions,
            refused=run.refused,
            facts=self._new_facts(),
        )

    def _handle(self, events: list[Event]) -> messages.Handle:
        has_ended = any(isinstance(each, TrainEnd) for each in events)
        return messages.Handle(self._encoded.of(events), self._new_facts(), has_ended)

    def _tell_facts(self) -> None:
        """Tell the child what the run is doing, if that has changed."""
        before = self._facts
        if self._new_facts() != before:
            assert self._facts is not None
            self._child.send(self._facts)

    def _new_facts(self) -> messages.Facts:
        self._facts = _facts_of(self.run)
        return self._facts


_Command = Pause | Resume | Stop | SetLearningRate | Validate | SaveCheckpoint | TagCheckpoint
"""Commands that go over a wire: all but `Call`, whose function is of one process."""
_decode_command: Final = msgspec.msgpack.Decoder(_Command).decode


def _facts_of(run: Any) -> messages.Facts:
    return messages.Facts(
        state=run.state,
        epoch=run.epoch,
        step=run.step,
        validation_batch=run.validation_batch,
        is_over=run.is_over,
        is_saving=run.is_saving,
        interrupted=run.interrupted,
        metrics=dict(run.metrics),
        groups=run._groups,
    )


def _log(message: messages.LogRecord) -> None:
    """Give a log record of the child to the loggers of this process."""
    target = logging.getLogger(message.logger)
    if not target.isEnabledFor(message.level):
        return
    path, line, function = message.where
    record = target.makeRecord(
        message.logger, message.level, path, line, message.text, (), None, func=function
    )
    record.created, record.threadName, record.process = message.created, message.thread, message.process
    target.handle(record)
