"""Connection: a viewer and the link to it. Reads messages, and sends what the viewer is due.

Everything here belongs to the hub's event loop. Each connection has two tasks: one reads, one writes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import anyio

from offloop.dashboard.protocol.encoding import ProtocolError, decode_viewer_message
from offloop.dashboard.protocol.from_server import FromServer
from offloop.dashboard.protocol.from_viewer import Hi
from offloop.dashboard.protocol.limits import CLOSE_PROTOCOL, CLOSE_SLOW, CLOSE_UNAUTHORISED, Role
from offloop.dashboard.runs.rows import RowCursor
from offloop.dashboard.viewers.viewer import Viewer, ViewerTooSlowError
from offloop.engine import OffloopError

HI_TIMEOUT: Final = 5.0
"""Seconds for a viewer's first message."""
SEND_TIMEOUT: Final = 10.0
"""Seconds to send one message; a viewer that takes longer has stopped reading."""
DRAW_TIMEOUT: Final = 30.0
"""Seconds for a visible page to draw a frame."""
COMMANDS_PER_SECOND: Final = 10
READERS: Final = "this address may only read"


class Link(Protocol):
    """Transport to one viewer."""

    async def receive(self) -> str | bytes | None:
        """Wait for the next message; None once the link is closed."""

    async def send(self, data: bytes, *, text: bool) -> bool:
        """Send a message, waiting for buffer space; False once the link is closed."""

    async def close(self, code: int, reason: str) -> None:
        """Close the link; twice is fine."""


class RefusedError(OffloopError):
    """A visitor is not admitted. Never leaves the dashboard."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Visitor(Protocol):
    """Who opened a link, and whether they may."""

    def admit(self, hi: Hi) -> Role:
        """Return the role of a viewer, given its first message.

        Raises:
            RefusedError: It is not admitted.
        """

    def is_admitted(self) -> bool:
        """True while the viewer may stay."""


class Connection:
    """A viewer that was admitted, and its link."""

    def __init__(self, viewer: Viewer, link: Link, visitor: Visitor) -> None:
        self.viewer = viewer
        self.link = link
        self._visitor = visitor
        # Code and reason to close with, once the queued messages are sent.
        self.close: tuple[int, str] | None = None
        # Before closing, send the curves up to their end.
        self.may_finish = False
        # What the viewer has of the list of runs; None if it did not ask for it.
        self.rows: RowCursor | None = None
        # Keys of the runs that the viewer wants to lay over the watched one, those that are not open yet too.
        self.overlaid: Sequence[str] = ()
        self._sending_since: float | None = None
        self._scope = anyio.CancelScope()
        self._allowance = float(COMMANDS_PER_SECOND)
        self._allowance_at = time.monotonic()
        self._wake = anyio.Event()

    def wake(self) -> None:
        """Have the writing task look for something to send."""
        self._wake.set()

    def end(self, code: int, reason: str) -> None:
        """Close once the queued messages are sent. The first reason counts."""
        if self.close is None:
            self.close = (code, reason)
        self.wake()

    def put(self, message: FromServer) -> None:
        """Queue a message, or close a viewer that is too slow to take it."""
        try:
            self.viewer.put(message)
        except ViewerTooSlowError as error:
            self.end(CLOSE_SLOW, str(error))
        self.wake()

    @property
    def gets_chart(self) -> bool:
        """True if the last frame was acknowledged, there is new data, and no rate limit applies."""
        return self.viewer.gets_chart(at_once=self.may_finish)

    def why_rejected(self, id: str, what: str) -> str:
        """Return why a request for a change is rejected, whatever it asks for; empty if it is not. Counts it.

        Args:
            id: Its id.
            what: What it is, with an article: `a command`.
        """
        if not self.viewer.is_control:
            return READERS
        if not 0 < len(id) <= 64:
            return f"{what}'s id has 1 to 64 characters"
        if not self._allows_command():
            return f"more than {COMMANDS_PER_SECOND} commands a second"
        return ""

    def _allows_command(self) -> bool:
        """Count one command; False if the viewer exceeds `COMMANDS_PER_SECOND`."""
        now = time.monotonic()
        earned = (now - self._allowance_at) * COMMANDS_PER_SECOND
        self._allowance = min(self._allowance + earned, float(COMMANDS_PER_SECOND))
        self._allowance_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def end_if_stuck(self, now: float) -> None:
        """Close a viewer that neither receives nor draws."""
        viewer = self.viewer
        if self._sending_since is not None and now - self._sending_since > SEND_TIMEOUT:
            self.end(CLOSE_SLOW, f"a message was not sent within {SEND_TIMEOUT:g} s")
            self._scope.cancel()
        if viewer.visible and viewer.waiting_since is not None and now - viewer.waiting_since > DRAW_TIMEOUT:
            self.end(CLOSE_SLOW, f"no frame was drawn within {DRAW_TIMEOUT:g} s")

    def end_if_logged_out(self) -> None:
        """Close a viewer that may not stay."""
        if not self._visitor.is_admitted():
            self.end(CLOSE_UNAUTHORISED, "The user has logged out.")

    async def run(self, handle: Callable[["Connection", str | bytes], None]) -> None:
        """Pass received messages to `handle` and send what is due, until the link closes or `end` is called."""
        async with anyio.create_task_group() as tasks:
            self._scope = tasks.cancel_scope
            tasks.start_soon(self._write)
            await self._read(handle)
            tasks.cancel_scope.cancel()

    async def _read(self, handle: Callable[["Connection", str | bytes], None]) -> None:
        while (message := await self.link.receive()) is not None:
            try:
                handle(self, message)
            except ProtocolError as error:
                self.end(CLOSE_PROTOCOL, short(str(error)))
                return
            except ViewerTooSlowError as error:
                self.end(CLOSE_SLOW, str(error))
                return

    async def _write(self) -> None:
        viewer = self.viewer
        while True:
            while (text := viewer.next_text()) is not None:
                if not await self._send(text, text=True):
                    return
            if self.close is not None and not (self.may_finish and viewer.is_waiting):
                self._scope.cancel()
                return
            rows = None if self.rows is None else self.rows.next()
            if rows is not None and not await self._send(rows, text=True):
                return
            if not self.gets_chart:
                if rows is not None:
                    continue
                await self._wake.wait()
                self._wake = anyio.Event()
                continue
            chart = viewer.next_chart(at_once=self.may_finish)
            if chart is not None:
                viewer.waiting_since = time.monotonic()
                if not await self._send(chart, text=False):
                    return

    async def _send(self, data: bytes, *, text: bool) -> bool:
        """Send a message; once the link is closed, end the connection and return False."""
        self._sending_since = time.monotonic()
        is_open = await self.link.send(data, text=text)
        self._sending_since = None
        if not is_open:
            self._scope.cancel()
        return is_open


async def receive_hi(link: Link) -> Hi | None:
    """Return a viewer's first message. Close the link and return None if it is none of this protocol's, or late."""
    try:
        with anyio.fail_after(HI_TIMEOUT):
            message = await link.receive()
        if message is None:
            return None
        hi = decode_viewer_message(message)
        if not isinstance(hi, Hi):
            raise ProtocolError("the first message must be hi")
        if hi.protocol != 1:
            raise ProtocolError(f"this server speaks protocol 1, got {hi.protocol}")
        return hi
    except TimeoutError:
        await link.close(CLOSE_PROTOCOL, f"no hi within {HI_TIMEOUT:g} s")
    except ProtocolError as error:
        await link.close(CLOSE_PROTOCOL, short(str(error)))
    return None


def short(reason: str) -> str:
    """Cut a reason to what fits into a close frame: 123 bytes."""
    return reason.encode()[:120].decode(errors="ignore")
