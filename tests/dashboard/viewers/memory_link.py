"""A viewer without a browser and a link without a socket: what a page holds after any schedule of messages."""

import math
from collections import deque
from typing import Any

import anyio
import msgspec

from offloop.dashboard.client import messages
from offloop.dashboard.curves.chart_frame import ChartFrame, decode_chart
from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_server import (
    Ack,
    Bye,
    Checkpoints,
    Hello,
    Latest,
    Milestone,
    MilestonesMissed,
    Rows,
    RunInfo,
    RunRow,
    Runs,
    Series,
    Status,
    StreamDropped,
    Streamed,
)
from offloop.dashboard.protocol.from_viewer import CommandRequest, Drawn, FromViewer, Hi, Show

ServerMessage = messages.ServerMessage | Rows | Checkpoints
_messages: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)


class MemoryLink:
    """Both ends of a connection in memory. What is sent waits until the viewer takes it, `room` messages at most."""

    def __init__(self, room: float = math.inf) -> None:
        self.sent: deque[tuple[bytes, bool]] = deque()
        self.closed: tuple[int, str] | None = None
        self._room = room
        self._taken = anyio.Event()
        self._to_server, self._from_viewer = anyio.create_memory_object_stream[str | bytes](math.inf)

    # The server's end: a Link

    async def receive(self) -> str | bytes | None:
        try:
            return await self._from_viewer.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return None

    async def send(self, data: bytes, *, text: bool) -> bool:
        while len(self.sent) >= self._room:
            self._taken = anyio.Event()
            await self._taken.wait()
        self.sent.append((data, text))
        return True

    async def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)
        self._to_server.close()
        self._from_viewer.close()

    # The viewer's end

    def say(self, message: FromViewer | str | bytes) -> None:
        """Send a message to the server."""
        data = message if isinstance(message, str | bytes) else encode_message(message)
        self._to_server.send_nowait(data)

    def take(self) -> tuple[bytes, bool] | None:
        """Take the oldest message that has come, None if there is none."""
        if not self.sent:
            return None
        self._taken.set()
        return self.sent.popleft()

    def drop(self) -> None:
        """Lose the connection: what is on its way is lost with it."""
        self._to_server.close()
        self._from_viewer.close()
        self.sent.clear()


def attempt_of(run: RunInfo) -> tuple[object, ...]:
    """Return which attempt of which run it is: that of another one begins with no milestones."""
    return run.key, run.attempt, run.started


class PageModel:
    """What a page knows, built from nothing but messages, the way docs/dashboard.md says."""

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.run: RunInfo | None = None
        self.series: dict[int, str] = {}
        self.shown: list[int] = []
        self.points: dict[int, dict[float, float]] = {}  # of each curve: value by time, which is unique
        self.milestones: list[dict[str, Any]] = []
        self.missed = 0
        self.streamed: list[dict[str, Any]] = []
        self.dropped = 0
        self.status: Status | None = None
        self.latest: Latest | None = None
        self.acks: dict[str, list[str]] = {}
        self.pending: dict[str, CommandRequest] = {}
        self.bye: str | None = None
        self.runs: list[str] = []
        self.rows: dict[str, RunRow] = {}
        self.rows_messages: list[Rows] = []
        self.checkpoints: list[Checkpoints] = []
        self.owes_drawn = 0
        self.ranges: list[ChartFrame] = []
        self.keys: list[str] = []
        # By key, of the runs that are laid over the watched one.
        self.others: dict[str, PageModel] = {}

    def hi(self) -> Hi:
        """Return the first message of a connection."""
        after = self.milestones[-1]["seq"] if self.milestones else -1
        server = None if self.hello is None else self.hello.server
        self.owes_drawn = 0
        self.points.clear()
        self.series.clear()
        self.others.clear()
        run = None if self.run is None else self.run.key
        return Hi(protocol=1, run=run, server=server, after=after, keys=self.keys)

    def take(self, data: bytes, text: bool) -> None:
        """Take a message in."""
        if not text:
            self._chart(data)
            return
        message = _messages.decode(data)
        if isinstance(message, RunInfo):
            self.others.pop(message.key, None)
            if message.overlaid:
                self.others[message.key] = PageModel()
                self.others[message.key].run = message
                return
        run = message.run if isinstance(message, Series | Status | Latest | Milestone) else None
        if run is not None and (self.run is None or run != self.run.key):
            assert not isinstance(message, Milestone), "a milestone of a run that is not watched"
            if run in self.others:
                self.others[run].take(data, text)
            return
        match message:
            case Hello():
                if self.hello is not None and self.hello.server != message.server:
                    self.milestones.clear()
                self.hello = message
            case RunInfo():
                if self.run is not None and attempt_of(self.run) != attempt_of(message):
                    self.milestones.clear()
                self.run = message
                self.series.clear()
                self.points.clear()
                self.shown = []
            case Series():
                for each in message.series:
                    self.series[each.id] = each.key
            case Milestone():
                event = msgspec.json.decode(message.event)
                assert not self.milestones or event["seq"] > self.milestones[-1]["seq"], (
                    "out of order, or twice"
                )
                self.milestones.append(event)
            case MilestonesMissed():
                self.missed = message.count
            case Streamed():
                self.streamed += [msgspec.json.decode(each) for each in message.events]
            case StreamDropped():
                self.dropped = message.count
            case Status():
                self.status = message
            case Latest():
                self.latest = message
            case Ack():
                self.acks.setdefault(message.id, []).append(message.state)
                if message.state != "accepted":
                    self.pending.pop(message.id, None)
            case Bye():
                self.bye = message.reason
            case Runs():
                self.runs = [run.key for run in message.runs]
            case Checkpoints():
                self.checkpoints.append(message)
            case Rows():
                self.rows_messages.append(message)
                self.rows |= {row.key: row for row in message.rows}
                for key in message.removed:
                    self.rows.pop(key, None)

    def _chart(self, data: bytes) -> None:
        frame = decode_chart(data)
        self.owes_drawn += 1
        assert self.owes_drawn == 1, "a chart frame came without credit"
        assert self.run is not None
        if frame.header.run != self.run.key:
            # Or of a run that was here before
            if (other := self.others.get(frame.header.run)) is not None:
                other.owes_drawn = 0
                other.take(data, text=False)
            return
        if frame.header.kind == "range":
            self.ranges.append(frame)
            return
        for column, values, indices in zip(frame.header.series, frame.values, frame.indices, strict=True):
            points = self.points.setdefault(column.id, {})
            if frame.header.kind == "snapshot":
                points.clear()
            for row, value in zip(indices.tolist(), values.tolist(), strict=True):
                time = float(frame.time[row])
                assert time not in points, "a point came twice"
                points[time] = value

    def show(self, series: list[int], points: int = 4_000) -> Show:
        """Change what is on the screen."""
        self.shown = series
        for gone in set(self.points) - set(series):
            del self.points[gone]
        return Show(run=None if self.run is None else self.run.key, series=series, points=points)

    def drawn(self) -> Drawn:
        """Give credit for the next chart frame."""
        self.owes_drawn = 0
        return Drawn()
