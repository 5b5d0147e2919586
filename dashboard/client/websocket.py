"""Websocket: a connection to a server, on any event loop. The library speaks the protocol, anyio moves the bytes."""

import logging
import os
import ssl
from collections import deque
from typing import Final, Self

import anyio
from anyio.abc import ByteStream
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import Event, State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from offloop.dashboard.client.address import Address
from offloop.dashboard.protocol.limits import SUBPROTOCOL
from offloop.engine import OffloopError, WatchLostError, WatchRefusedError

HANDSHAKE_TIMEOUT: Final = 15.0
"""Seconds until the server must have answered the handshake."""
SILENCE: Final = 45.0
"""Seconds without any byte after which the server counts as gone: it answers a ping every `PING_INTERVAL`."""
PING_INTERVAL: Final = 15.0
CLOSE_TIMEOUT: Final = 1.0
"""Seconds for the close frame; the connection is closed without it if the server does not read."""
MAX_MESSAGE: Final = 256 * 1024 * 1024
"""Most bytes of a message. A milestone may be as large as all that a server keeps, 64 MiB by default."""
READ_AT_ONCE: Final = 256 * 1024

_library_logger = logging.getLogger("offloop.dashboard.websockets")

_REFUSALS: Final = {
    401: "does not accept this token: it is of another server, or of one that has ended; use the address that it "
    "printed last",
    403: "does not let programs in here: a proxy may have added an Origin header, or wants a login",
    404: "has no live page at this address",
    421: "does not answer to this host name: give it in Dashboard(allow_hosts=...)",
}


class ClosedError(OffloopError):
    """The connection is over. Never leaves the client.

    Attributes:
        code: Close code, 1006 without a close frame.
        reason: In words.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code
        self.reason = reason


class Websocket:
    """An open websocket. One task receives, another one may send."""

    def __init__(self, stream: ByteStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        # Complete messages that were not returned yet: data, and whether it is text.
        self._messages: deque[tuple[bytes, bool]] = deque()
        # Parts of a message whose end has not come.
        self._parts: list[bytes] = []
        self._is_text = True
        # The receiving task answers pings, so two tasks may have something to send.
        self._sending = anyio.Lock()

    @classmethod
    async def open(cls, address: Address, context: ssl.SSLContext | None) -> Self:
        """Connect to a server.

        Args:
            address: Of the server.
            context: For https; None for the system's certificates.

        Raises:
            WatchRefusedError: The server does not let this program in.
            WatchLostError: Nothing answers, or something else does.
        """
        try:
            with anyio.fail_after(HANDSHAKE_TIMEOUT):
                stream = await _connect(address, context)
                try:
                    protocol, frames = await _shake_hands(stream, address)
                except BaseException:
                    await anyio.aclose_forcefully(stream)
                    raise
        except TimeoutError:
            raise WatchLostError(f"{address.shown} has not answered within {HANDSHAKE_TIMEOUT:g} s") from None
        websocket = cls(stream, protocol)
        for frame in frames:
            websocket._take(frame)
        return websocket

    async def receive(self) -> tuple[bytes, bool]:
        """Wait for the next message, and return it with whether it is text.

        Raises:
            ClosedError: The connection is over.
        """
        while not self._messages:
            if self._protocol.state is State.CLOSED:
                raise self._closed()
            await self._read()
        return self._messages.popleft()

    async def _read(self) -> None:
        try:
            with anyio.fail_after(SILENCE):
                data = await self._stream.receive(READ_AT_ONCE)
        except TimeoutError:
            raise ClosedError(1006, f"the server has said nothing for {SILENCE:g} s") from None
        except anyio.EndOfStream:
            self._protocol.receive_eof()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as error:
            raise ClosedError(1006, f"the connection broke: {error}") from None
        else:
            self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._take(event)
        await self._flush()
        if self._protocol.close_expected() and self._protocol.close_rcvd is not None:
            # Both close frames were sent: nothing more comes.
            self._protocol.receive_eof()

    def _take(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._is_text = frame.opcode is Opcode.TEXT
        elif frame.opcode is not Opcode.CONT:
            return
        data = bytes(frame.data)
        if frame.fin and not self._parts:
            self._messages.append((data, self._is_text))
            return
        self._parts.append(data)
        if frame.fin:
            self._messages.append((b"".join(self._parts), self._is_text))
            self._parts.clear()

    async def send(self, text: bytes) -> None:
        """Send a text message. Waits until the system has taken it.

        Raises:
            ClosedError: The connection is over.
        """
        if self._protocol.state is not State.OPEN:
            raise self._closed()
        self._protocol.send_text(text)
        await self._flush()

    async def _flush(self) -> None:
        async with self._sending:
            for data in self._protocol.data_to_send():
                try:
                    # An empty one means that no more will be sent; closing the stream does that.
                    if data:
                        await self._stream.send(data)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as error:
                    raise ClosedError(1006, f"the connection broke: {error}") from None

    def _closed(self) -> ClosedError:
        received = self._protocol.close_rcvd
        if received is not None:
            return ClosedError(int(received.code), received.reason)
        sent = self._protocol.close_sent
        if self._protocol.parser_exc is not None and sent is not None:
            return ClosedError(int(sent.code), f"the server broke the protocol: {sent.reason}")
        return ClosedError(1006, "the connection was cut")

    async def aclose(self) -> None:
        """Close the connection; twice is fine. Takes at most a second, also in a cancelled task."""
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(CLOSE_TIMEOUT):
                try:
                    if self._protocol.state is State.OPEN:
                        self._protocol.send_close(1000)
                    await self._flush()
                except ClosedError:
                    pass
            await anyio.aclose_forcefully(self._stream)


async def _connect(address: Address, context: ssl.SSLContext | None) -> ByteStream:
    try:
        if not address.is_secure:
            return await anyio.connect_tcp(address.host, address.port)
        return await anyio.connect_tcp(
            address.host,
            address.port,
            ssl_context=context or ssl.create_default_context(),
            tls_standard_compatible=False,
            tls_hostname=address.host,
        )
    except ssl.SSLCertVerificationError as error:
        raise WatchLostError(
            f"the certificate of {address.shown} is not valid here ({error.verify_message}): give ssl= with a context "
            "that trusts it"
        ) from None
    except ssl.SSLError as error:
        raise WatchLostError(f"{address.shown} does not speak https: {error.reason or error}") from None
    except (anyio.BrokenResourceError, anyio.EndOfStream) as error:
        # In the middle of the TLS handshake.
        raise WatchLostError(f"{address.shown} does not speak https: {_reason(error)}") from None
    except OSError as error:
        raise WatchLostError(f"nothing answers at {address.shown}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """Return why a connection failed; anyio keeps the reasons of its attempts in the cause."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    first = cause if isinstance(cause, OSError) else error
    if isinstance(first, OSError) and first.errno is not None and first.errno > 0:
        return os.strerror(first.errno).lower()
    return str(first).lower() or "it hung up"


async def _shake_hands(stream: ByteStream, address: Address) -> tuple[ClientProtocol, list[Frame]]:
    """Return the protocol once the connection is open, and what came with the answer."""
    uri = WebSocketURI(address.is_secure, address.host, address.port, address.path, "")
    protocol = ClientProtocol(
        uri, subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=MAX_MESSAGE, logger=_library_logger
    )
    request = protocol.connect()
    request.headers["Authorization"] = f"Bearer {address.token}"
    protocol.send_request(request)
    came: list[Event] = []
    try:
        for data in protocol.data_to_send():
            await stream.send(data)
        while not came and protocol.handshake_exc is None:
            try:
                protocol.receive_data(await stream.receive(READ_AT_ONCE))
            except anyio.EndOfStream:
                protocol.receive_eof()
                came += protocol.events_received()
                break
            came += protocol.events_received()
    except (anyio.BrokenResourceError, OSError) as error:
        raise WatchLostError(f"{address.shown} hung up: {_reason(error)}") from None
    answer = came[0] if came else None
    if isinstance(answer, Response) and answer.status_code != 101:
        raise _refused(address, answer)
    if protocol.state is State.CONNECTING or protocol.subprotocol != SUBPROTOCOL:
        raise WatchLostError(
            f"what answers at {address.shown} is no live page of offloop"
            + ("" if address.is_secure else ", or it speaks https")
        )
    return protocol, [each for each in came[1:] if isinstance(each, Frame)]


def _refused(address: Address, answer: Response) -> WatchRefusedError:
    status = answer.status_code
    said = answer.body.decode(errors="replace").strip().partition("\n")[0][:200] if answer.body else ""
    is_ours = answer.headers.get("Cross-Origin-Resource-Policy") == "same-origin"
    if status == 503 and is_ours:
        return WatchRefusedError(status, f"{address.shown} has no place left: {said}")
    why = _REFUSALS.get(status)
    if why is None:
        why = f"answers {status} {answer.reason_phrase}" + (f": {said}" if is_ours and said else "")
    return WatchRefusedError(status, f"{address.shown} {why}")
