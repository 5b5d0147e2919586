"""MountedLink: a viewer's link from the application's event loop, asyncio or trio, to the server's thread.

    application's event loop                                  server's thread
    ────────────────────────                                  ───────────────
    receive() ──> put ──> [ 4 messages at most ] ──> receive ──> hub
    send()   <── take <── [ 1 message at most  ] <── send   <── hub

Neither side waits for the other's event loop: each waits until there is something to take, or room to put it.
"""

from collections import deque
from typing import Final, Generic, NamedTuple, TypeVar

from offloop.engine.bus.waker import Waker

MESSAGES_READ_AHEAD: Final = 4
"""Messages of a viewer that wait to be handled; beyond that nothing more is read from it."""

T = TypeVar("T")


class Outgoing(NamedTuple):
    """A message to a viewer."""

    data: bytes
    is_text: bool


class Closing(NamedTuple):
    """The last thing that a viewer is sent."""

    code: int
    reason: str


class Pipe(Generic[T]):
    """Carries items from one task to another, which may belong to event loops of two threads.

    One task puts, one takes. Cancelling either loses no item that was put.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # `append` and `popleft` are atomic.
        self._items: deque[T] = deque()
        self._is_closed = False
        self._filled = Waker()
        self._drained = Waker()

    async def put(self, item: T) -> bool:
        """Put an item, waiting for room; False if the pipe is closed."""
        while len(self._items) >= self._size and not self._is_closed:
            await self._drained.wait()
        if self._is_closed:
            return False
        self._items.append(item)
        self._filled.wake()
        return True

    async def take(self) -> T | None:
        """Wait for the next item; None once the pipe is closed and empty."""
        while not self._items:
            if self._is_closed:
                return None
            await self._filled.wait()
        item = self._items.popleft()
        self._drained.wake()
        return item

    def close(self) -> None:
        """Accept no more items. Any thread; never waits; twice is fine."""
        self._is_closed = True
        self._filled.wake()
        self._drained.wake()


class MountedLink:
    """A `Link` for the hub; its other ends are for the application."""

    def __init__(self) -> None:
        self.incoming: Pipe[str | bytes] = Pipe(MESSAGES_READ_AHEAD)
        """What the viewer says: the application puts."""
        self.outgoing: Pipe[Outgoing | Closing] = Pipe(1)
        """What the viewer is sent: the application takes."""
        self.closing: Closing | None = None
        """Why the application closes the link, if it does."""

    async def receive(self) -> str | bytes | None:
        return await self.incoming.take()

    async def send(self, data: bytes, *, text: bool) -> bool:
        return await self.outgoing.put(Outgoing(data, text))

    async def close(self, code: int, reason: str) -> None:
        await self.outgoing.put(Closing(code, reason))
        self.shut()

    def shut(self) -> None:
        """Let each side know that the other one is gone. Any thread; never waits; twice is fine."""
        self.incoming.close()
        self.outgoing.close()
