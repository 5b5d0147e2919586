"""Messages from a viewer to the server."""

from typing import Any, Literal

import msgspec

from offloop.dashboard.protocol.limits import CommandName, LayerStatistic
from offloop.engine import (
    Command,
    ConfigError,
    Pause,
    Resume,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
)


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
    """Id of 1 to 64 characters, returned in the answer."""
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
