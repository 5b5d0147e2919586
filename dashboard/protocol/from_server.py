"""Messages from the server to a viewer; binary frames are in `curves/`."""

from typing import Any, Literal

import msgspec

from offloop.dashboard.protocol.limits import Role, State


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
