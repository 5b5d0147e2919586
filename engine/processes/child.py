"""The child process of a callback: an ordinary `Observer`, whose events come out of a socket.

    thread of the socket                         event loop of the child
    ────────────────────                         ───────────────────────
    Handle, MakeDurable  ──> Stream ──────────>  Observer.serve(): handlers, on the loop or in a worker thread
    Cancel, Close        ─────────────────────>  cancels it; closes the callback, ends
    Facts, Applied       ──> ChildRun            what the handlers ask of the run

`main` is the program. The parent has set `sys.path`; nothing here imports torch.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, NoReturn, cast

import anyio
import msgspec

from offloop.engine.bus.deadlock import Places
from offloop.engine.bus.subscription import Barrier, Subscription
from offloop.engine.bus.waker import Waker
from offloop.engine.callback import Handlers
from offloop.engine.encoding import decode
from offloop.engine.errors import note_cancellation
from offloop.engine.events import Event, UnknownEvent
from offloop.engine.observers.observer import CallbackCosts, Observer
from offloop.engine.processes import messages, pickling
from offloop.engine.processes.child_run import ChildRun
from offloop.engine.processes.errors import pack_error

logger = logging.getLogger("offloop")

READ: Final = 1 << 18
"""Bytes read at once."""
LOOK_INTERVAL: Final = 0.5
"""Seconds between two looks whether the parent is still there, where the system does not tell."""
_PR_SET_PDEATHSIG: Final = 1


def main(descriptor: int, parent: int) -> None:
    """Serve the callback that comes over a socket, until the parent says so or is gone.

    Args:
        descriptor: Of the socket.
        parent: Process id of the parent.
    """
    _end_with(parent)
    # The parent answers Ctrl-C and SIGTERM. Handlers, not SIG_IGN, which programs that a callback starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ignore)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        # Pipes, whose text the parent decodes, whatever the locale.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    link = Link(socket.socket(fileno=descriptor))
    load = link.receive()
    assert isinstance(load, messages.Load)
    _forward_log_records(link, load.log_levels)
    try:
        callback = pickling.loads(load.callback)
        child = _Child(link, load, Handlers(callback, load.name))
    except BaseException as error:
        link.send(messages.CannotLoad(pack_error(error)))
        _end()
    link.send(messages.Loaded())
    anyio.run(child.serve, backend=load.backend)
    _end()


def _end() -> NoReturn:
    """End as an interpreter ends, but leave it to the system to take everything down: with torch that takes long."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does: waits for threads of the user's
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(0)


def _ignore(_number: int, _frame: object) -> None:
    pass


def _end_with(parent: int) -> None:
    """End this process with its parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="offloop-parent", daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_INTERVAL)
    os._exit(1)


class Link:
    """The socket to the parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = messages.Frames()
        # Received and not returned yet.
        self._bodies: deque[bytes] = deque()
        # Messages of several threads must not mix. Not reentrant: no signal handler and no finalizer sends.
        self._lock = threading.Lock()

    def send(self, message: messages.Message) -> None:
        """Send a message. Any thread; blocks until the socket has taken it."""
        data = messages.frame(message)
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            # The parent has closed its end, and is about to end this process.
            pass

    def receive(self) -> messages.ToChild | None:
        """Wait for the next message; None once the parent is gone. One thread at a time."""
        while not self._bodies:
            try:
                data = self._connection.recv(READ)
            except OSError:
                data = b""
            if not data:
                return None
            self._bodies += self._frames.feed(data)
        return messages.to_child(self._bodies.popleft())


class _LogHandler(logging.Handler):
    """Sends log records to the parent."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._link.send(
                messages.LogRecord(
                    logger=record.name,
                    level=record.levelno,
                    text=self.format(record).encode("utf-8", "backslashreplace").decode(),
                    created=record.created,
                    thread=record.threadName or "",
                    where=(record.pathname, record.lineno, record.funcName),
                    process=os.getpid(),
                )
            )
        except Exception:
            self.handleError(record)


def _forward_log_records(link: Link, levels: dict[str, int]) -> None:
    logging.root.handlers = [_LogHandler(link)]
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


class Stream:
    """The events of the child, in the order of the run. It has the interface of a `Subscription`."""

    statistics = None

    def __init__(self, handled: Callable[[], None]) -> None:
        """Begin empty.

        Args:
            handled: Called, on the event loop, when all of a batch is handled.
        """
        self._handled = handled
        # True if training waits for this callback. Written by the thread of the socket, read by the handler's.
        self.is_blocking = False
        # Appended by the thread of the socket, emptied by the event loop.
        self._batches: deque[list[Any]] = deque()
        self._waker = Waker()
        self._is_closed = False
        self._is_handling = False  # event loop only

    def put(self, batch: list[Any]) -> None:
        """Append a batch of events, or a barrier. The thread of the socket."""
        self._batches.append(batch)
        self._waker.wake()

    def close(self) -> None:
        """End the stream. Any thread; what is in it is not handled."""
        self._is_closed = True
        self._waker.wake()

    async def take_batch(self, _limit: int | None = None) -> list[Any]:
        """Wait for the next batch; empty at the end. The batch before it counts as handled."""
        if self._is_handling:
            self._is_handling = self.is_blocking = False
            self._handled()
        while not self._batches and not self._is_closed:
            await self._waker.wait()
        if self._is_closed:
            return []
        batch = self._batches.popleft()
        self._is_handling = not isinstance(batch[0], Barrier)
        return batch


class _Child:
    """The callback at work in this process."""

    def __init__(self, link: Link, load: messages.Load, handlers: Handlers) -> None:
        self._link = link
        self._places = Places(lambda: False)
        self.run = ChildRun(load, self._places, link.send)
        self._stream = Stream(self._tell_handled)
        subscription = cast("Subscription[Event]", self._stream)
        self._observer = Observer(
            handlers,
            subscription,
            self.run,
            self.run.publish,
            self._fail,
            self._places,
        )
        # Written by the thread of the socket before it wakes the event loop.
        self._swallowing: float | None = None
        self._is_closing = False
        self._undecodable: set[str] = set()  # classes of events; the thread of the socket only
        self._told = Waker()

    async def serve(self) -> None:
        """Handle events until the parent closes this process."""
        note_cancellation(anyio.get_cancelled_exc_class())
        self._places.event_loop_thread = threading.get_ident()
        thread = threading.Thread(target=self._receive, name="offloop-socket", daemon=True)
        thread.start()
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._observe, scope)
            while not self._is_closing:
                await self._told.wait()
                if self._swallowing is not None:
                    self._observer.abandon_after(self._swallowing)
                    scope.cancel()
            self._stream.close()
        await self._close()
        self._link.send(messages.Closed(self._costs(), self._observer.errors))

    async def _observe(self, scope: anyio.CancelScope) -> None:
        # In a separate task: a handler may have to be abandoned
        with scope, self._observer.allowing_abandoned():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._observer.serve)

    async def _close(self) -> None:
        with self._observer.allowing_abandoned():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._observer.close)

    def _costs(self) -> CallbackCosts:
        return msgspec.structs.replace(self._observer.costs, cpu=time.process_time())

    def _tell_handled(self) -> None:
        observer = self._observer
        self._link.send(messages.Handled(self._costs(), observer.errors, observer.disabled))

    def _fail(self, error: BaseException) -> None:
        self._link.send(messages.Fail(pack_error(error)))

    def _answer_durable(self, answer: "Future[None]") -> None:
        error = None if answer.cancelled() else answer.exception()
        self._link.send(messages.Durable(None if error is None else pack_error(error)))

    def _decode(self, data: bytes) -> Event:
        try:
            return decode(data, "msgpack")
        except Exception as error:
            fields = msgspec.msgpack.decode(data)
            kind = fields["type"]
            if kind not in self._undecodable:
                self._undecodable.add(kind)
                name = self._observer.name
                logger.warning("%s gets %s as UnknownEvent: it cannot be decoded: %s", name, kind, error)
            position = {name: fields[name] for name in Event.__struct_fields__ if name in fields}
            return UnknownEvent(type=kind, raw=data, format="msgpack", **position)

    def _receive(self) -> None:
        """Body of the thread of the socket."""
        try:
            self._receive_all()
        except BaseException:
            # Most likely for want of memory. Nothing could be handled any more, and no one would know.
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def _receive_all(self) -> None:
        while (message := self._link.receive()) is not None:
            match message:
                case messages.Handle():
                    self.run.learn(message.facts)
                    if message.has_ended:
                        self.run.end()
                    self._stream.put([self._decode(bytes(each)) for each in message.events])
                case messages.MakeDurable():
                    answer: Future[None] = Future()
                    answer.add_done_callback(self._answer_durable)
                    barrier = Barrier(
                        cast("Subscription[Event]", self._stream),
                        functools.partial(self._observer.make_durable, answer),
                    )
                    self._stream.put([barrier])
                case messages.Facts():
                    self.run.learn(message)
                case messages.Accepted():
                    self._stream.is_blocking = message.is_held_up
                    self.run.accepted(message)
                case messages.Applied():
                    self.run.applied(message)
                case messages.Cancel():
                    self._link.send(messages.Cancelling())
                    self._swallowing = message.swallowing
                    self._told.wake()
                case messages.Close():
                    self._is_closing = True
                    self._told.wake()
