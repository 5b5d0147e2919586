"""Protocol `offloop.v1`: the messages between a viewer and the server. Types and bytes; no socket.

A viewer opens a websocket at `ws`, relative to the page, with the subprotocol `offloop.v1`. Then:

    viewer                                   server
    ──────                                   ──────
    hi ────────────────────────────────────>
        <──────────────────────────────────── hello     the server, your role, the list of runs
        <──────────────────────────────────── run       fixed facts about the run you watch
        <──────────────────────────────────── status    current state; again after a change
        <──────────────────────────────────── series    names of its curves; later: new ones
        <──────────────────────────────────── milestone all since `hi.after`, then as they happen
    show ──── curves and width ────────────>
        <════════════════════════════════════ snapshot  these curves so far, in columns
    drawn ─────────────────────────────────>            credit for the next chart frame
        <════════════════════════════════════ delta     new points, at most ten times a second
    drawn ─────────────────────────────────>
    sample ── one of those in the index ───>
        <════════════════════════════════════ sample    a text, a picture or a table
    drawn ─────────────────────────────────>
    command ───────────────────────────────>
        <──────────────────────────────────── ack       accepted, then applied, rejected or expired

There are two lanes. Text frames (──, JSON, one message per frame, its kind in `type`) need no credit: a hidden page
learns at once that its run has failed. Binary frames (══) hold chart points, a sample or layers; one is sent only
after `drawn` has acknowledged the previous one, so a slow page receives fewer and larger frames instead of a queue. No
point is sent twice or lost in between, because a chart frame is made from the run's history once there is credit for
it.

A viewer that reconnects says in `hi` up to which milestone it knows the run; curves start again with a snapshot.
A command carries an id chosen by its viewer, so that a repeated request is not applied twice.

JSON cannot express NaN and infinities: they are sent as `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""

import math
from typing import Any, Final, Literal

import msgspec

from offloop.engine import (
    Command,
    ConfigError,
    OffloopError,
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)

SUBPROTOCOL: Final = "offloop.v1"
"""Name in the websocket handshake."""

MAX_MESSAGE: Final = 64 * 1024
"""Most bytes of a viewer's message; a longer one closes its connection with 1009."""
MAX_CHART_FRAME: Final = 256 * 1024
"""Bytes above which a snapshot or an answer is split into parts."""
MAX_SERIES_SHOWN: Final = 200
"""Most curves of one run on one viewer's screen."""
MAX_OVERLAID: Final = 9
"""Most runs whose curves a viewer receives beside those of the watched one."""
MAX_POINTS: Final = 4_000
"""Most points of one curve in a snapshot or an answer, unless all are requested."""

# Close codes, besides the usual ones (1001: the server closes, 1009: a message was too long). A viewer that is not
# admitted receives an HTTP answer instead of a websocket: 401, 403 or 503. A browser with the cookie and without the
# key receives 4001.
CLOSE_FULL: Final = 1013
"""There is no place left."""
CLOSE_UNAUTHORISED: Final = 4001
"""No key in `hi` belongs to the cookie, or the user has logged out."""
CLOSE_PROTOCOL: Final = 4002
"""The viewer violated this protocol; the reason says how."""
CLOSE_SLOW: Final = 4008
"""The viewer did not keep up; it may reconnect at once."""

Role = Literal["control", "read_only"]
LayerStatistic = Literal["norm", "update_ratio", "dead", "mean", "std", "minimum", "maximum"]
CommandName = Literal["pause", "resume", "stop", "set_lr", "checkpoint", "validate", "tag"]
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
    "lost",
]


# Viewer to server --------------------------------------------------------------------------------


class FromViewer(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of the messages from a viewer."""


class Hi(FromViewer, frozen=True, kw_only=True, tag="hi"):
    """First message of a viewer, within five seconds."""

    protocol: int
    """Version of the protocol: 1."""
    run: str | None = None
    """Key of the run to watch; None for the newest."""
    only: bool = False
    """True: no other run than `run` will do. If the server does not have it, `Hello.run` is None, and the viewer
    watches it once it begins."""
    server: str | None = None
    """`Hello.server` of the previous connection; None for the first one."""
    after: int = -1
    """`seq` of the last milestone of `run` that the viewer has; -1 for none. Ignored without `server`."""
    keys: list[str] = []
    """For a browser: the keys that it was given at this address, which its cookie needs. Programs with a token have
    none."""
    samples: Literal["whole", "index"] = "whole"
    """How the samples come that people look at. `whole`: in their milestones. `index`: those lack texts and rows;
    `SampleIndex` lists them, of overlaid runs too, and `SampleQuery` asks for one."""


class Watch(FromViewer, frozen=True, kw_only=True, tag="watch"):
    """Watch another run: everything starts again with `run`, and the viewer must send `show` again.

    If the server no longer has that run, nothing changes and it sends `runs` again.
    """

    run: str


class Show(FromViewer, frozen=True, kw_only=True, tag="show"):
    """The curves on the screen, by id; other curves are no longer sent.

    A curve that was not shown before starts with a snapshot.
    """

    run: str | None = None
    """Key of the run that the curves belong to, watched or overlaid. If the viewer has other runs by now, the message
    is ignored: it was sent before the change. None: the run that is watched."""
    series: list[int]
    points: int = 1_600
    """Most points per curve in a snapshot: twice the width of the panel in pixels."""
    samples: bool = False
    """True: chart frames have the samples seen, too, as a fourth column of the axis."""


class Drawn(FromViewer, frozen=True, kw_only=True, tag="drawn"):
    """The last chart frame is on the screen: credit for the next one."""


class RangeQuery(FromViewer, frozen=True, kw_only=True, tag="range"):
    """Request a range of curves at a finer resolution, or all its points. Answered by chart frames."""

    query: int
    """Number of the query, chosen by the viewer and returned in the answer."""
    run: str | None = None
    """As in `Show`: a query about a run that is neither watched nor overlaid any more is not answered."""
    series: list[int]
    start: float
    """First requested value of `axis`."""
    end: float
    """Last requested value of `axis`."""
    axis: Literal["step", "time", "epoch", "samples"] = "step"
    points: int = 1_600
    """Most points per curve; 0 for all points."""
    samples: bool = False
    """As in `Show`."""


class SampleQuery(FromViewer, frozen=True, kw_only=True, tag="sample"):
    """Request a text, a picture or a table. Answered by sample frames, which take turns with chart frames."""

    query: int
    """Number of the query, chosen by the viewer and returned in the answer."""
    run: str | None = None
    """As in `Show`: a query about a run that is neither watched nor overlaid any more is not answered."""
    seq: int
    """`seq` of its event."""
    picture: int | None = None
    """Number of a picture in a table, from 0, row by row. None: the table itself, without its pictures."""


class LayersQuery(FromViewer, frozen=True, kw_only=True, tag="layers"):
    """Ask for what was measured by layer, in the place of what was asked for before.

    Answered by layer frames (`curves/layer_frame.py`), which need credit as chart frames do: one statistic of all
    layers, and everything of one layer. New measurements follow, at most once a second, until `on` is false.
    """

    run: str | None = None
    """As in `Show`."""
    kind: str = ""
    """Kind of tensor: `weights`, `gradients`, `activations`. One that the run does not have means its first one."""
    statistic: LayerStatistic = "norm"
    """The statistic of all layers."""
    layer: str | None = None
    """Name of the one layer; None for the first one. Of a layer that the kind does not have there is nothing."""
    on: bool = True
    """False: nothing more."""


class CommandRequest(FromViewer, frozen=True, kw_only=True, tag="command"):
    """Give a run a command. Control role only."""

    id: str
    """Unique id of 1 to 64 characters, chosen by the viewer, such as a UUID. A repeated id is not applied again."""
    name: CommandName
    run: str
    """Key of the run."""
    lr: float | None = None
    """For `set_lr`: finite and above 0."""
    optimizer: str | None = None
    """For `set_lr`, if the run has several optimizers."""
    group: int | None = None
    """For `set_lr`: index of one parameter group. None: the largest gets `lr`, and the others are scaled alike."""
    reason: str | None = None
    """For `pause`, `stop` and `checkpoint`: why, in words; None for a standard text."""
    tag: str = ""
    """For `tag`: letters, digits, `.`, `_` and `-`, at most 64."""
    move: bool = False
    """For `tag`: take it off the checkpoint that has it."""
    which: str | int = ""
    """For `tag`: name, tag or step of a saved checkpoint; empty for the state of the next step boundary."""
    by: str = ""
    """Who gives the command, at most 64 characters. `CommandApplied.by` has it behind the viewer's address."""
    checkpoint: bool = True
    """For `stop`: save a checkpoint first."""
    ttl: float = 60.0
    """Seconds after which a command that was not applied is taken back. Above 0, at most 3600."""

    def command(self) -> Command[Any]:
        """Return the command.

        Raises:
            ConfigError: `lr` or `tag` is missing or not legal.
        """
        reason = self.reason
        match self.name:
            case "pause":
                return Pause("asked on the live page" if reason is None else reason)
            case "resume":
                return Resume()
            case "stop":
                return Stop("stopped on the live page" if reason is None else reason)
            case "set_lr":
                if self.lr is None:
                    raise ConfigError("set_lr needs lr")
                return SetLearningRate(self.lr, self.group, self.optimizer)
            case "checkpoint":
                return SaveCheckpoint() if reason is None else SaveCheckpoint(reason)
            case "validate":
                return Validate()
            case "tag":
                return TagCheckpoint(self.tag, self.move, None if self.which == "" else self.which)


class TakeBack(FromViewer, frozen=True, kw_only=True, tag="take_back"):
    """Take a command back: it is then answered as expired. Too late once it is being applied."""

    id: str
    """Id of the command."""


class Publish(FromViewer, frozen=True, kw_only=True, tag="publish"):
    """Publish an event of a class that the program which trains defines, too. Control role only; answered by `ack`."""

    id: str
    """As in `CommandRequest`."""
    run: str
    """Key of the run."""
    event: msgspec.Raw
    """As in `events.jsonl`; its position and time are set by the run."""


class ListRuns(FromViewer, frozen=True, kw_only=True, tag="list"):
    """Ask for the list of runs with their figures: answered by `rows`, and by more of them when rows change."""

    on: bool = True
    """False: no further `rows`."""


class Overlay(FromViewer, frozen=True, kw_only=True, tag="overlay"):
    """Also send the curves of these runs, beside the watched one; replaces the runs of the message before.

    Each new one starts with `run`, `status`, `series` and `latest`, as the watched run does, without its milestones.
    `show` and `range` say by `run` which run they are about. Runs that the server does not have are left out.
    """

    runs: list[str]
    """Keys, at most `MAX_OVERLAID`."""


class Edit(FromViewer, frozen=True, kw_only=True, tag="edit"):
    """Change what people say about a run. Control role only; answered by `ack`.

    It is kept in the run's directory; nothing on disk is renamed. None leaves a field as it is.
    """

    id: str
    """As in `CommandRequest`."""
    run: str
    """Key of the run."""
    version: int
    """`RunRow.version` that the change is based on. If the run has another one by now, the change is rejected."""
    name: str | None = None
    """Name to show instead of the run's id, at most 200 characters; empty for the id."""
    tags: list[str] | None = None
    """At most 50 tags of at most 100 characters."""
    note: str | None = None
    """At most 16,384 characters."""
    archived: bool | None = None
    """Archived runs are hidden in lists."""


class ListCheckpoints(FromViewer, frozen=True, kw_only=True, tag="checkpoints"):
    """Ask for the checkpoints of a run as they are on disk; answered by `checkpoints`."""

    run: str
    """Key of the run."""


class EditCheckpoint(FromViewer, frozen=True, kw_only=True, tag="edit_checkpoint"):
    """Verify a checkpoint, tag it or take a tag off it. Control role only; answered by `ack`, then `checkpoints`.

    While a run of this process goes on, `tag` is a command to it. A run that another process trains has its writer
    there: then it is rejected.
    """

    id: str
    """As in `CommandRequest`."""
    run: str
    """Key of the run."""
    checkpoint: str
    """`CheckpointRow.name`."""
    action: Literal["verify", "tag", "untag"]
    """`verify` reads every byte."""
    tag: str = ""
    """For `tag` and `untag`."""
    move: bool = False
    """For `tag`: take it off the checkpoint that has it."""


class Stream(FromViewer, frozen=True, kw_only=True, tag="stream"):
    """Send the samples of the watched run too, from now on, as `streamed`. A program's, which wants events."""

    on: bool = True
    """False: no further ones."""


class Visibility(FromViewer, frozen=True, kw_only=True, tag="visible"):
    """Whether the page is visible. A hidden page draws nothing and does not count as slow."""

    visible: bool


class Ping(FromViewer, frozen=True, kw_only=True, tag="ping"):
    """Heartbeat of a viewer, answered by `pong` at once. The page sends one every five seconds."""

    sent: float
    """Any number; returned in the answer."""


ViewerMessage = (
    Hi
    | Watch
    | Show
    | Drawn
    | RangeQuery
    | SampleQuery
    | LayersQuery
    | CommandRequest
    | TakeBack
    | Publish
    | ListRuns
    | Overlay
    | Edit
    | ListCheckpoints
    | EditCheckpoint
    | Stream
    | Visibility
    | Ping
)


# Server to viewer --------------------------------------------------------------------------------


class FromServer(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of the text messages from the server."""


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Entry of the list of runs."""

    key: str
    """Name of the run in this protocol: `run_id`, followed by `#attempt` if it was resumed. Of a directory that is
    followed: its path relative to that of the runs."""
    name: str
    """Its `run_id`."""
    state: str
    started: float
    """Unix time in seconds."""


class Hello(FromServer, frozen=True, kw_only=True, tag="hello"):
    """The server's answer to `hi`."""

    protocol: int = 1
    server: str
    """Identity of this server. A viewer of an earlier server discards its milestones and commands."""
    page: str | None
    """Hash of the served page. If it differs from the viewer's own, the viewer is outdated."""
    role: Role
    runs: list[RunSummary]
    run: str | None
    """Key of the watched run; None while there is none."""
    time: float
    """The server's clock, Unix time in seconds."""
    frame_interval: float
    """Least seconds between two chart frames."""
    saved: float | None = None
    """In a file that `offloop export --html` has made: when, Unix time in seconds. None: a server speaks."""


class Runs(FromServer, frozen=True, kw_only=True, tag="runs"):
    """The list of runs, sent when it changes. A viewer of a run that has ended may `watch` a newer one."""

    runs: list[RunSummary]


class Figure(msgspec.Struct, frozen=True, array_like=True):
    """A metric of a run in the list of runs, `[last, best]` on the wire."""

    last: Any
    """Last value; may be `"NaN"`, ..."""
    best: float | None = None
    """Best finite value, if it is known whether lower or higher is better."""


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """A run in the list of runs, with its figures."""

    key: str
    id: str
    """Its `run_id`."""
    name: str
    """What it is called: the name that somebody gave it, or its id."""
    state: State
    why: str = ""
    """Why it is in this state or cannot be read, for people; empty if there is nothing to say."""
    live: bool = False
    """True if this server's process trains it: it takes commands here."""
    page: str | None = None
    """Address of the page of the process that trains it, without a token; None if there is none."""
    attempt: int = 0
    host: str = ""
    directory: str | None = None
    started: float
    """Unix time in seconds at which its last attempt began; 0 if unknown."""
    heard: float = 0.0
    """Unix time of the newest known event, or of its end."""
    seconds: float = 0.0
    """Duration of the last attempt so far."""
    step: int = 0
    epoch: int = 0
    """Epochs done."""
    device: str = ""
    progress: float | None = None
    """Share of the run done, from 0 to 1, if known."""
    monitor: str = ""
    """Metric that defines the best checkpoint."""
    figures: dict[str, Figure] = {}
    """Metrics by name; those that came first, if there are more than 500."""
    metrics: int = 0
    """Number of its metrics."""
    hyperparameters: dict[str, Any] = {}
    """What the run was made with, by flat name (`optimizer.lr`), secrets masked."""
    tags: list[str] = []
    note: str = ""
    archived: bool = False
    version: int = 0
    """Grows with each edit of name, tags, note and archive mark."""
    sparkline: list[float] = []
    """At most 32 values of the monitored metric, or of the loss, from the first to the last."""


class Rows(FromServer, frozen=True, kw_only=True, tag="rows"):
    """Rows of the list of runs that are new or have changed, after `list`. At most once a second, at most 200 rows."""

    rows: list[RunRow]
    removed: list[str] = []
    """Keys of runs that are gone."""
    more: bool = False
    """True: further rows of the first answer follow, also because directories are still looked at."""
    total: int = 0
    """Number of runs in the list."""


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint of a run, as it is on disk."""

    name: str
    """Name of its directory: steps done, and the run's attempt."""
    path: str
    """Its directory; empty for a damaged one whose manifest cannot be read."""
    step: int = -1
    """Steps done; -1 if unknown."""
    epoch: int = 0
    """Epochs done."""
    attempt: int = 0
    reason: str = ""
    """Why it was taken."""
    created: float = 0.0
    """Unix time in seconds."""
    bytes: int = 0
    """Size on disk in bytes."""
    metrics: dict[str, Any] = {}
    """Metrics computed at its step, and those of its evaluation; may be `"NaN"`, ..."""
    is_best: bool = False
    is_last: bool = False
    tags: list[str] = []
    verified: float | None = None
    """Unix time at which this server has read every byte of it; None if it has not."""
    damaged: str = ""
    """What is wrong with it; empty if nothing is known to be."""


class Checkpoints(FromServer, frozen=True, kw_only=True, tag="checkpoints"):
    """The checkpoints of a run, oldest first."""

    run: str
    rows: list[CheckpointRow]
    verifying: list[str] = []
    """Names of those that are being read."""
    error: str = ""
    """Why they cannot be listed; empty if they can."""


class RunInfo(FromServer, frozen=True, kw_only=True, tag="run"):
    """Fixed facts about a run. What has been said about this run before counts no longer."""

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
    """The run's directory; None if it has none."""
    started: float = 0.0
    """Unix time in seconds."""
    device: str = ""
    world_size: int = 1
    """Number of processes that train together."""
    parameters: int = 0
    """Trainable parameters."""
    epochs: int | None = None
    """Limit of the whole run."""
    max_steps: int | None = None
    """Limit of the whole run."""
    max_time: float | None = None
    """Limit of the whole run in seconds."""
    steps_per_epoch: int | None = None
    batches_per_epoch: int | None = None
    optimizers: list[str] = []
    """Names, if `set_lr` must say which one."""
    monitor: str = ""
    """Metric that defines the best checkpoint."""
    config: dict[str, Any] = {}
    """All settings, secrets masked."""
    refused: dict[str, str] = {}
    """Commands that this run rejects, and why: `{"validate": "there is no val_loader"}`."""
    live: bool = False
    """True if this server's process trains it: it takes commands here."""
    default_monitor: str = ""
    """Metric for callbacks that name none."""
    given_hyperparameters: dict[str, Any] = {}
    """Those of `Trainer(hyperparameters=)` alone, as they were given, secrets masked; empty if that is not known."""
    groups: dict[str, int] = {}
    """How many parameter groups each optimizer has, by its name; empty if that is not known."""
    callbacks: list[str] = []
    """Names of its callbacks, which commands have in `by`."""
    hyperparameters: dict[str, Any] = {}
    """What the run was made with, by flat name (`optimizer.lr`), secrets masked."""
    page: str | None = None
    """For a run of another process: address of that process's page, without a token; None if it has none."""
    overlaid: bool = False
    """True if it is laid over the watched run, see `Overlay`. False: it is the watched run from now on."""


class SeriesInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A curve."""

    id: int
    key: str
    """Name of the metric: `train_loss`."""
    tab: Literal["metrics", "system"] = "metrics"
    """Tab of the page that has its panel: `system` for what a run uses of its machine."""
    panel: str
    """Panel of the curve: `train_loss` and `val_loss` share the panel `loss`."""
    group: str
    """The part of the panel's name before its first `/`; empty if there is none."""
    label: str
    """Name within the panel: `step`, `train`, `val`, or the key."""
    better: Literal["min", "max"] | None = None
    """Whether lower or higher values are better; None if unknown."""
    unit: str = ""
    """`bytes`, `bytes/s`, `1/s`, `percent`, `share` (0 to 1), `seconds`, `celsius`, `watts`, or a word of the user."""


class Series(FromServer, frozen=True, kw_only=True, tag="series"):
    """Curves that are new since the previous such message; the first one has all."""

    run: str
    series: list[SeriesInfo]


class SampleEntry(msgspec.Struct, frozen=True, array_like=True):
    """A sample in the index, `[seq, key, kind, step, epoch, time]` on the wire."""

    seq: int
    key: str
    kind: Literal["text", "picture", "table"]
    step: int
    epoch: int
    time: float


class SampleIndex(FromServer, frozen=True, kw_only=True, tag="samples"):
    """Samples that are new since the previous such message about the run; the first one has all."""

    run: str
    samples: list[SampleEntry]


class Latest(FromServer, frozen=True, kw_only=True, tag="latest"):
    """Current values of all curves, shown or not; at most once a second."""

    run: str
    values: dict[str, tuple[Any, float | None, int, float | None, int]]
    """By id, as text: last value (may be `"NaN"`, ...), minimum and its step, maximum and its step. None: there is no
    finite value."""


class Status(FromServer, frozen=True, kw_only=True, tag="status"):
    """State of the run. Sent whole: with every milestone; otherwise after a change, at most four times a second."""

    run: str
    state: State
    by: str = ""
    """Origin of the command that paused or stopped the run."""
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
    """Share of the run done, from 0 to 1, by the limit that ends it first; None without a limit."""
    seconds: float = 0.0
    """Seconds since the start of this attempt."""
    time_left: float | None = None
    """Estimated seconds until the end."""
    steps_per_second: float = 0.0
    samples_per_second: float = 0.0
    lr: float | None = None
    loss: Any = None
    """Loss of the last step; may be `"NaN"`."""
    data_share: float = 0.0
    """Share of the last five seconds in which training waited for data."""
    compute_share: float = 0.0
    """Share of the last five seconds in forward, backward and optimizer."""
    callback_share: float = 0.0
    """Share of the last five seconds in deciders and step hooks, during which training waits for callbacks."""
    validating: bool = False
    validation_batch: int = 0
    """Batches given to the validation in progress, or to the last one; 0 if that is not known."""
    interrupted: bool = False
    """True if a signal has asked the run to stop."""
    saving: bool = False
    """A checkpoint is being written."""
    stalled: float | None = None
    """Seconds since the last step, if unusually long."""
    waiting_for: str = ""
    """Code line that a stalled training thread executes."""
    dropped: int = 0
    """Samples missing from the page's history."""
    trimmed: float | None = None
    """Step before which the history holds only minima and maxima."""
    layers: int = 0
    """Number of layers of which something was measured, see `LayersQuery`."""
    viewers: int = 0


class Milestone(FromServer, frozen=True, kw_only=True, tag="milestone"):
    """An event of the run other than a sample, as in `events.jsonl`."""

    run: str
    event: msgspec.Raw


class Streamed(FromServer, frozen=True, kw_only=True, tag="streamed"):
    """Consecutive samples of the watched run, after `stream`. In order with its milestones."""

    run: str
    events: list[msgspec.Raw]
    """As in `events.jsonl`, oldest first."""


class StreamDropped(FromServer, frozen=True, kw_only=True, tag="dropped"):
    """Samples of the run that this viewer did not get, in all: it reads more slowly than they come."""

    run: str
    count: int


class MilestonesMissed(FromServer, frozen=True, kw_only=True, tag="missed"):
    """Number of milestones of the run that the server no longer has. Those that this viewer lacks do not come."""

    run: str
    count: int


class Ack(FromServer, frozen=True, kw_only=True, tag="ack"):
    """State of a command. `accepted` is followed by one of the other states."""

    id: str
    name: str
    state: Literal["accepted", "applied", "rejected", "expired"]
    step: int | None = None
    """Step at which it was applied."""
    why: str = ""
    """Reason of a rejection or an expiry, or the result in words."""
    error: str = ""
    """If the run rejects it: class of the exception, such as `ConfigError`."""
    result: dict[str, Any] | None = None
    """What an applied command returns: the metrics of `validate`, the `CheckpointSaved` of `checkpoint` and `tag`."""


class Pong(FromServer, frozen=True, kw_only=True, tag="pong"):
    """Answer to `ping`."""

    sent: float
    time: float
    """The server's clock, Unix time in seconds."""


class Bye(FromServer, frozen=True, kw_only=True, tag="bye"):
    """The server is about to close the connection."""

    reason: str


# Text messages -----------------------------------------------------------------------------------

_viewer_messages: msgspec.json.Decoder[ViewerMessage] = msgspec.json.Decoder(ViewerMessage)
_encode = msgspec.json.Encoder().encode


class ProtocolError(OffloopError):
    """A viewer violated the protocol; the text says how. Never leaves the dashboard."""


def decode_viewer_message(text: str | bytes) -> ViewerMessage:
    """Decode a viewer's message.

    Raises:
        ProtocolError: It is no message of this protocol.
    """
    try:
        return _viewer_messages.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(str(error)) from None


def encode_message(message: FromServer | FromViewer) -> bytes:
    """Encode a message as JSON. Convert numbers that may be NaN with `number` first."""
    try:
        return _encode(message)
    except UnicodeEncodeError:
        # The name of a file that is not UTF-8, in a command line, a path or an error.
        return _encode(printable(msgspec.to_builtins(message)))


def printable(value: Any) -> Any:
    """Return a JSON value with lone surrogates in its strings replaced by escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def number(value: float) -> float | str:
    """Return a number for JSON: `"NaN"`, `"Infinity"` or `"-Infinity"` if it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
