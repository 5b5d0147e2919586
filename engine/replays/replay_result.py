"""The outcome of a replay."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from offloop.engine.bus.commands import Stop
from offloop.engine.events import Event, TrainEnd
from offloop.engine.observers.observer import CallbackCosts
from offloop.engine.replays.replayed_run import NotedCommand


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReplayResult:
    """The outcome of a replay: what callbacks asked of the run, published and raised."""

    run_id: str
    """Id of the recorded run."""
    events: int
    """Recorded events that were replayed."""
    step: int
    """Optimizer steps done at the last of them."""
    is_complete: bool
    """True if the whole log was replayed; False if the replay was stopped."""
    end: TrainEnd | None
    """The end of the recorded run; None if that was killed, or the replay stopped before."""
    commands: tuple[NotedCommand, ...]
    """The commands that callbacks gave, in order. They changed nothing: what came next was recorded."""
    published: tuple[Event, ...]
    """The events that callbacks published, in order. Those that they had published in the recorded run are among its
    events."""
    callback_errors: Mapping[str, tuple[str, ...]]
    """The first hundred errors of each callback and attempt, by the callback's name; callbacks without errors are not
    listed."""
    callback_costs: Mapping[str, CallbackCosts]
    """What callbacks cost in the last attempt, by the name of the callback."""
    hooks_left_out: tuple[str, ...]
    """Step hooks, like `Sparsity.after_step`. They did not run: a replay has no model."""
    unknown: Mapping[str, int]
    """How many events there were of each class that is not defined in this process, by its tag."""
    skipped: int
    """Lines of the log that hold no event, or one whose class has other fields by now."""
    why_skipped: str
    """What is wrong with the first of them."""
    dir: Path | None
    """Where callbacks wrote; None if none needs a directory and none was given."""

    @property
    def stop(self) -> NotedCommand | None:
        """The first `Stop` that a callback gave: where the run would have ended, and why. None without one."""
        return next((each for each in self.commands if isinstance(each.command, Stop)), None)

    @property
    def notes(self) -> list[str]:
        """What there is to know about how much was replayed, in sentences."""
        notes = []
        if self.unknown:
            named = ", ".join(f"{tag} ({count:,})" for tag, count in sorted(self.unknown.items()))
            notes.append(
                f"{sum(self.unknown.values()):,} events are of classes that are not defined here: {named}. Only "
                "on_event got them, as UnknownEvent; import their modules before the replay"
            )
        if self.skipped:
            notes.append(f"{self.skipped:,} lines hold no event that can be read: {self.why_skipped}")
        if self.hooks_left_out:
            notes.append(
                f"step hooks did not run, since a replay has no model: {', '.join(self.hooks_left_out)}"
            )
        if self.end is None and self.is_complete:
            notes.append("the log has no TrainEnd: the run was killed, or goes on")
        return notes

    def __repr__(self) -> str:
        ended = "" if self.is_complete else ", stopped"
        lines = [f"<ReplayResult {self.run_id}: {self.events:,} events up to step {self.step}{ended}"]
        lines += [f"  {each}" for each in self.commands[:10]]
        if len(self.commands) > 10:
            lines.append(f"  and {len(self.commands) - 10} more commands")
        lines += [f"  {name} failed: {errors[0]}" for name, errors in self.callback_errors.items()]
        lines += [f"  {each}" for each in self.notes]
        return "\n".join(lines) + ">"
