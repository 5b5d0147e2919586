"""Protocol `offloop.v1`: what a viewer and the server say to each other. Types and bytes; no socket.

A viewer opens a websocket at `ws` (beside the page) with the subprotocol `offloop.v1`. Then:

    viewer                                   server
    ──────                                   ──────
    hi ────────────────────────────────────>
        <──────────────────────────────────── hello     who I am, what you may do, which runs there are
        <──────────────────────────────────── run       everything that is fixed about the run you watch
        <──────────────────────────────────── series    names of its curves, later: new ones
        <──────────────────────────────────── milestone each one since `hi.after`, then as they happen
        <──────────────────────────────────── status    where it is; again when something changed
    show ──── which curves, how wide ──────>
        <════════════════════════════════════ snapshot  these curves so far, in columns
    drawn ─────────────────────────────────>            credit for the next chart frame
        <════════════════════════════════════ delta     what is new, at most ten times a second
    drawn ─────────────────────────────────>
    command ───────────────────────────────>
        <──────────────────────────────────── ack       accepted, then applied, rejected or expired

There are two lanes. Text frames (──, JSON, one message each, its kind in `type`) need no credit: a hidden
page learns at once that its run has failed. Binary frames (══) hold chart points, and one is sent only after
`drawn` has come for the one before: a slow page gets fewer and larger frames instead of a queue. Nothing is
sent twice and nothing is lost in between, because a chart frame is made from the run's history when there is
credit for it.

A viewer that comes back says in `hi` up to which milestone it knows the run; curves start again with a
snapshot. A command carries an id that its viewer has made up, so that one that is sent again is not
applied again.

JSON has no word for NaN and infinities: they travel as `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""

import math
import struct
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from offloop.engine import (
    Command,
    ConfigError,
    OffloopError,
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    Validate,
)

SUBPROTOCOL: Final = "offloop.v1"
"""Name that viewer and server agree on in the websocket handshake."""

MAX_MESSAGE: Final = 64 * 1024
"""Bytes of the largest message that a viewer may send; a longer one closes its connection with 1009."""
MAX_CHART_FRAME: Final = 256 * 1024
"""Bytes of payload after which a snapshot or an answer is split into parts."""
MAX_SERIES_SHOWN: Final = 200
"""Curves that one viewer can have on its screen at a time."""
MAX_POINTS: Final = 4_000
"""Points of one curve that a snapshot or an answer holds at most, unless all are asked for."""
HEARTBEAT: Final = 5.0
"""Seconds between two pings of a page. It takes its server for gone when nothing has come for two of them."""

# Close codes, beside the usual ones (1001 the server goes, 1009 a message was too long). Who is not let in gets no
# websocket at all, but an answer in HTTP: 401, 403, 503.
CLOSE_PROTOCOL: Final = 4002
"""The viewer does not speak this protocol; the reason says what was wrong."""
CLOSE_SLOW: Final = 4008
"""The viewer has not kept up; it may come back at once."""

Role = Literal["control", "read_only"]
State = Literal[
    "starting",
    "waiting",
    "running",
    "validating",
    "paused",
    "stopping",
    "closing",
    "completed",
    "stopped",
    "cancelled",
    "failed",
]


# Viewer to server --------------------------------------------------------------------------------


class FromViewer(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of what a viewer can send."""


class Hi(FromViewer, frozen=True, kw_only=True, tag="hi"):
    """First message of a viewer, within five seconds."""

    protocol: int
    """Version of this protocol that the viewer speaks: 1."""
    run: str | None = None
    """Key of the run to watch; None for the newest."""
    server: str | None = None
    """`Hello.server` of the connection before, None for the first one."""
    after: int = -1
    """`seq` of the last milestone that the viewer has of `run`; -1 for none. Counts only with `server`."""


class Watch(FromViewer, frozen=True, kw_only=True, tag="watch"):
    """Watch another run: everything starts again with `run`. Curves must be shown anew.

    Where that run has been let go, nothing changes and `runs` comes again.
    """

    run: str


class Show(FromViewer, frozen=True, kw_only=True, tag="show"):
    """The curves that are on the screen now, by id; the others are no longer sent.

    Curves that were not shown before come in a snapshot first.
    """

    run: str | None = None
    """Key of the run whose curves they are. If another one is watched by now, the message has crossed that change on
    its way, and is ignored. None: of the one that is watched, whichever it is."""
    series: list[int]
    points: int = 1_600
    """Points of each curve that a snapshot may hold: twice the width of the panel in pixels."""


class Drawn(FromViewer, frozen=True, kw_only=True, tag="drawn"):
    """The last chart frame is on the screen: credit for the next one."""


class RangeQuery(FromViewer, frozen=True, kw_only=True, tag="range"):
    """Ask for a part of curves at a finer resolution, or for all points of it. Answered by chart frames."""

    query: int
    """Number of the question, made up by the viewer; comes back in the answer."""
    run: str | None = None
    """As in `Show`: a question about another run than the one that is watched by now has no answer."""
    series: list[int]
    start: float
    """First value of `axis` that is wanted."""
    end: float
    """Last value of `axis` that is wanted."""
    axis: Literal["step", "time", "epoch"] = "step"
    points: int = 1_600
    """Points of each curve; 0 for all there are."""


class CommandRequest(FromViewer, frozen=True, kw_only=True, tag="command"):
    """Give the run a command. Only for the control role."""

    id: str
    """Unique, chosen by the viewer (a UUID, say), 1 to 64 characters. Sent again, it is not applied again."""
    name: Literal["pause", "resume", "stop", "set_lr", "checkpoint", "validate"]
    run: str
    """Key of the run."""
    lr: float | None = None
    """For `set_lr`: finite and above 0."""
    optimizer: str | None = None
    """For `set_lr`, where the run has several."""
    checkpoint: bool = True
    """For `stop`: save a checkpoint first."""
    ttl: float = 60.0
    """Seconds after which the command is taken back if it has not applied. Above 0, at most 3600."""

    def command(self) -> Command[Any]:
        """Return the command.

        Raises:
            ConfigError: `lr` is missing or not legal.
        """
        match self.name:
            case "pause":
                return Pause("asked on the live page")
            case "resume":
                return Resume()
            case "stop":
                return Stop("stopped on the live page")
            case "set_lr":
                if self.lr is None:
                    raise ConfigError("set_lr needs lr")
                return SetLearningRate(self.lr, optimizer=self.optimizer)
            case "checkpoint":
                return SaveCheckpoint()
            case "validate":
                return Validate()


class Visibility(FromViewer, frozen=True, kw_only=True, tag="visible"):
    """Whether the page can be seen. A hidden page draws nothing and is not taken for slow."""

    visible: bool


class Ping(FromViewer, frozen=True, kw_only=True, tag="ping"):
    """Heartbeat of a viewer; answered by `pong` at once."""

    sent: float
    """Anything; comes back."""


ViewerMessage = Hi | Watch | Show | Drawn | RangeQuery | CommandRequest | Visibility | Ping


# Server to viewer --------------------------------------------------------------------------------


class FromServer(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of what the server sends as text."""


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A run of this process, in a list."""

    key: str
    """What viewers call it: `run_id`, with `#attempt` behind it for a resumed one."""
    name: str
    """Its `run_id`."""
    state: str
    started: float
    """Unix time in seconds."""


class Hello(FromServer, frozen=True, kw_only=True, tag="hello"):
    """The server's answer to `hi`."""

    protocol: int = 1
    server: str
    """Identity of this server process: milestones and commands of another one are forgotten."""
    page: str | None
    """Hash of the page that it serves: another one than the viewer's own means that the page is older."""
    role: Role
    runs: list[RunSummary]
    run: str | None
    """Key of the run that is watched; None while there is none."""
    time: float
    """The server's clock, Unix time in seconds."""
    frame_interval: float
    """Seconds between two chart frames, at least."""


class Runs(FromServer, frozen=True, kw_only=True, tag="runs"):
    """The list of runs has changed. A viewer of a run that has ended may `watch` a newer one."""

    runs: list[RunSummary]


class RunInfo(FromServer, frozen=True, kw_only=True, tag="run"):
    """Everything that is fixed about the run that is watched. What follows is about this run."""

    key: str
    name: str
    attempt: int = 0
    host: str = ""
    pid: int = 0
    command: list[str] = []
    """Its command line."""
    commit: str | None = None
    """Git commit of the working directory."""
    directory: str | None = None
    """Where it writes; None if it does not."""
    started: float = 0.0
    """Unix time in seconds."""
    device: str = ""
    parameters: int = 0
    """Trainable parameters."""
    epochs: int | None = None
    """Limit, in total."""
    max_steps: int | None = None
    """Limit, in total."""
    max_time: float | None = None
    """Limit in seconds, in total."""
    steps_per_epoch: int | None = None
    batches_per_epoch: int | None = None
    optimizers: list[str] = []
    """Names, where `set_lr` must say which."""
    monitor: str = ""
    """The metric that says which moment is best."""
    config: dict[str, Any] = {}
    """Every knob; secrets are masked."""
    refused: dict[str, str] = {}
    """Commands that cannot be given to this run, and why: `{"validate": "there is no val_loader"}`."""


class SeriesInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A curve."""

    id: int
    key: str
    """Name of the metric: `train_loss`."""
    panel: str
    """What it is drawn with: `train_loss` and `val_loss` share the panel `loss`."""
    group: str
    """What stands before the first `/` of the panel's name; empty for the run's own metrics."""
    label: str
    """What tells it from the others in its panel: `step`, `train`, `val`; else the key."""
    better: Literal["min", "max"] | None = None
    """Whether less or more is better; None if nobody knows."""


class Series(FromServer, frozen=True, kw_only=True, tag="series"):
    """Curves that are new since the last such message; the first one has all."""

    run: str
    series: list[SeriesInfo]


class Latest(FromServer, frozen=True, kw_only=True, tag="latest"):
    """Where every curve is, shown or not; at most once a second."""

    run: str
    values: dict[str, tuple[Any, float | None, int, float | None, int]]
    """By id, as text: last value (may be `"NaN"`, ...), least and its step, greatest and its step; None: no finite."""


class Status(FromServer, frozen=True, kw_only=True, tag="status"):
    """Where the run is. Sent whole: with each milestone, and else when something has changed, four times a second."""

    run: str
    state: State
    by: str = ""
    """Who paused or stopped it."""
    reason: str = ""
    error: str | None = None
    """The exception of a failed run, as `Type: text`."""
    traceback: str | None = None
    """Its traceback; for the control role only."""
    epoch: int = 0
    """Index of the epoch in progress, from 0."""
    step: int = 0
    """Optimizer steps done."""
    progress: float | None = None
    """Share of the run that is done, from 0 to 1, by the limit that ends it first; None without a limit."""
    seconds: float = 0.0
    """Since the start of this attempt."""
    time_left: float | None = None
    """Seconds, as far as one can know."""
    steps_per_second: float = 0.0
    samples_per_second: float = 0.0
    lr: float | None = None
    loss: Any = None
    """Of the last step; may be `"NaN"`."""
    data_share: float = 0.0
    """Share of the last seconds that training waited for data."""
    compute_share: float = 0.0
    """Share of the last seconds in forward, backward and optimizer."""
    callback_share: float = 0.0
    """Share of the last seconds in deciders and step hooks: what callbacks have made training wait."""
    validating: bool = False
    saving: bool = False
    """A checkpoint is being written."""
    stalled: float | None = None
    """Seconds since the last step, where that is unusually long."""
    waiting_for: str = ""
    """Where the training thread is, when it is stalled."""
    dropped: int = 0
    """Samples that the page's history has missed."""
    trimmed: float | None = None
    """Step before which only least and greatest values are left of the history."""
    viewers: int = 0


class Milestone(FromServer, frozen=True, kw_only=True, tag="milestone"):
    """An event of the run that is no sample, whole, as it stands in `events.jsonl`."""

    run: str
    event: msgspec.Raw


class MilestonesMissed(FromServer, frozen=True, kw_only=True, tag="missed"):
    """There were more milestones than are kept: these are not sent."""

    run: str
    count: int


class Ack(FromServer, frozen=True, kw_only=True, tag="ack"):
    """What has become of a command. `accepted` is followed by one of the others."""

    id: str
    name: str
    state: Literal["accepted", "applied", "rejected", "expired"]
    step: int | None = None
    """Where it was applied."""
    why: str = ""
    """Why it was rejected or has expired, or what has come of it."""


class Pong(FromServer, frozen=True, kw_only=True, tag="pong"):
    """Answer to `ping`."""

    sent: float
    time: float
    """The server's clock, Unix time in seconds."""


class Bye(FromServer, frozen=True, kw_only=True, tag="bye"):
    """The server is about to close the connection, or has been told to."""

    reason: str


ServerMessage = (
    Hello | Runs | RunInfo | Series | Latest | Status | Milestone | MilestonesMissed | Ack | Pong | Bye
)


# Chart frames ------------------------------------------------------------------------------------


class NonFinite(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of points of one curve without a finite value, `[start, end, kind, count]` on the wire."""

    start: float
    """Step of the first one."""
    end: float
    """Step of the last one."""
    kind: Literal["nan", "inf", "-inf", "mixed"]
    count: int


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of steps whose samples were dropped, `[after, before, count]`: no line is drawn across."""

    after: float
    """Last step that is there."""
    before: float
    """First step that is there again."""
    count: int
    """Steps that are missing."""


class ChartColumn(msgspec.Struct, frozen=True, kw_only=True):
    """What the header says about one curve in a chart frame."""

    id: int
    points: int
    """Length of its columns."""
    dense: bool = False
    """True: it has a point in every row of the axis, and no column of indices."""
    reduced: bool = False
    """True: of several neighbouring points only the least and the greatest are here."""
    marks: list[NonFinite] = []
    """Where it is not finite. In its column such a point is NaN. A stretch that has grown comes again, known by where
    it starts."""


class ChartHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="chart"):
    """Header of a chart frame."""

    run: str
    kind: Literal["snapshot", "delta", "range"]
    """`snapshot` replaces the curves it names, `delta` is appended to them, `range` answers a question."""
    query: int | None = None
    """Which question."""
    more: bool = False
    """True: this answer goes on in the next chart frame, whose points are appended."""
    rows: int
    """Length of the axis columns `step`, `time` and `epoch`."""
    series: list[ChartColumn]
    gaps: list[Gap] = []
    """Those that touch this frame; known by where they start, like marks."""
    trimmed: float | None = None
    """Step before which only least and greatest values are left."""


Float64s = npt.NDArray[np.float64]


class ChartFrame(msgspec.Struct, kw_only=True):
    """A chart frame, taken apart."""

    header: ChartHeader
    step: Float64s  # (rows,)
    time: Float64s  # (rows,), Unix time in seconds
    epoch: Float64s  # (rows,), epochs done with a fraction
    values: list[Float64s]  # of each curve, (points,)
    indices: list[npt.NDArray[np.uint32]]  # of each curve, (points,): which row each point is in


_encode_header = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(ChartHeader).decode


def encode_chart(frame: ChartFrame) -> bytes:
    """Lay a chart frame out, little-endian throughout.

    u32         length of the header
    header      JSON, filled up with spaces so that what follows starts at a multiple of 8
    f64 x rows  step, then time, then epoch
    f64 x n     values, curve after curve as the header lists them
    u32 x n     rows of the points, curve after curve, without those that are dense
    """
    header = _encode_header(frame.header)
    header += b" " * (-(4 + len(header)) % 8)
    parts = [struct.pack("<I", len(header)), header]
    parts += [column.astype("<f8", copy=False).tobytes() for column in (frame.step, frame.time, frame.epoch)]
    parts += [values.astype("<f8", copy=False).tobytes() for values in frame.values]
    for column, indices in zip(frame.header.series, frame.indices, strict=True):
        if not column.dense:
            parts.append(indices.astype("<u4", copy=False).tobytes())
    return b"".join(parts)


def decode_chart(data: bytes) -> ChartFrame:
    """Take a chart frame apart.

    Raises:
        ValueError: The bytes are no chart frame. (`msgspec.DecodeError` is one.)
    """
    if len(data) < 4:
        raise ValueError(f"a chart frame has at least 4 bytes, got {len(data)}")
    (length,) = struct.unpack_from("<I", data)
    header = _decode_header(data[4 : 4 + length])
    counts = [header.rows] * 3 + [column.points for column in header.series]
    sparse = [0 if column.dense else column.points for column in header.series]
    if len(data) != 4 + length + 8 * sum(counts) + 4 * sum(sparse):
        raise ValueError(f"the chart frame has {len(data)} bytes, its header speaks of another length")
    offset = 4 + length
    columns = []
    for count in counts:
        columns.append(np.frombuffer(data, "<f8", count, offset))
        offset += 8 * count
    indices = []
    for column in header.series:
        if column.dense:
            indices.append(np.arange(header.rows, dtype=np.uint32))
        else:
            indices.append(np.frombuffer(data, "<u4", column.points, offset))
            offset += 4 * column.points
    step, time, epoch, *values = columns
    return ChartFrame(header=header, step=step, time=time, epoch=epoch, values=values, indices=indices)


# Text messages -----------------------------------------------------------------------------------

_viewer_messages: msgspec.json.Decoder[ViewerMessage] = msgspec.json.Decoder(ViewerMessage)
_server_messages: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)
_encode = msgspec.json.Encoder().encode


class ProtocolError(OffloopError):
    """A viewer sent something that is no message of this protocol; the text says what. Never leaves the dashboard."""


def decode_viewer_message(text: str | bytes) -> ViewerMessage:
    """Read what a viewer has sent.

    Raises:
        ProtocolError: It is no message of this protocol.
    """
    try:
        return _viewer_messages.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(str(error)) from None


def decode_server_message(text: str | bytes) -> ServerMessage:
    """Read what a server has sent as text; for clients.

    Raises:
        msgspec.DecodeError: It is no message of this protocol.
    """
    return _server_messages.decode(text)


def encode_message(message: FromServer | FromViewer) -> bytes:
    """Encode a message as JSON. Numbers that may be NaN must have gone through `number` before."""
    try:
        return _encode(message)
    except UnicodeEncodeError:  # names of files that are no UTF-8, in a command line, a path or an error
        return _encode(printable(msgspec.to_builtins(message)))


def printable(value: Any) -> Any:
    """Return what JSON is made of, with every half of a character in its texts written as an escape."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def number(value: float) -> float | str:
    """Return a number as JSON can hold it: `"NaN"`, `"Infinity"` and `"-Infinity"` for those it cannot."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
