"""What is told of a durable checkpoint: its event, and what other processes hear, from which they make the event."""

from offloop.engine.checkpoint import CheckpointInfo
from offloop.engine.checkpoint.parts import Outcome
from offloop.engine.events import CheckpointSaved


def event_about(info: CheckpointInfo) -> CheckpointSaved:
    """Return the event of a checkpoint that was saved before; how long that took is not known any more."""
    return CheckpointSaved(
        path=str(info.path), saved_step=info.step, reason=info.manifest.reason, bytes=info.bytes
    )


def event_of(outcome: Outcome) -> CheckpointSaved:
    """Return the event of a checkpoint that another process has saved."""
    return CheckpointSaved(
        path=outcome.path,
        saved_step=outcome.step,
        reason=outcome.reason,
        bytes=outcome.bytes,
        seconds=outcome.seconds,
    )


def outcome_of(saved: CheckpointSaved) -> Outcome:
    """Return what other processes hear of a checkpoint."""
    return Outcome(
        path=saved.path,
        step=saved.saved_step,
        reason=saved.reason,
        bytes=saved.bytes,
        seconds=saved.seconds,
    )
