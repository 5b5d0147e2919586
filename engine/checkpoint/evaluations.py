"""The record of evaluations: how checkpoints of a run were judged after they had been saved.

    <run>/evaluations.jsonl     one line per evaluated checkpoint, in the order of the evaluations

A checkpoint never changes, so what is found out about it later stands beside it. The record also keeps the figures of
checkpoints that retention has deleted. `CheckpointReader.checkpoints` adds the figures to those of the manifests, so
that retention, `best` and listings rank by both alike.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from offloop.engine.checkpoint.errors import CheckpointError
from offloop.engine.checkpoint.filesystem import FileSystem, replace_file
from offloop.engine.checkpoint.format import read_small_file
from offloop.engine.checkpoint.manifest import CHECKPOINT_NAME, Count, JsonNumber, json_number

FILE_NAME: Final = "evaluations.jsonl"
MAX_BYTES: Final = 64 << 20
"""Some hundred thousand evaluations; a larger file is an attempt to fill the memory."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one checkpoint."""

    checkpoint: str
    """Its name."""
    attempt: Count
    """The attempt that took it."""
    step: Count
    epoch: Count
    metrics: dict[str, JsonNumber]

    @property
    def values(self) -> dict[str, float]:
        """The metrics as numbers."""
        return {key: float(value) for key, value in self.metrics.items()}


def is_to_evaluate(serial: int, every: int) -> bool:
    """Return whether a checkpoint is evaluated, by its number among those of its run, where every so many are."""
    return serial % every == 0


def evaluation_of(
    checkpoint: str, *, attempt: int, step: int, epoch: int, metrics: Mapping[str, float]
) -> Evaluation:
    """Return the figures of a checkpoint, as they are written."""
    return Evaluation(
        checkpoint=checkpoint,
        attempt=attempt,
        step=step,
        epoch=epoch,
        metrics={key: json_number(value) for key, value in metrics.items()},
    )


@dataclasses.dataclass(slots=True)
class _Seen:
    """The record as it was read last."""

    mark: tuple[int, int, int] | None = None
    found: dict[str, Evaluation] = dataclasses.field(default_factory=dict)


class EvaluationRecord:
    """The record of one run. All methods block on the file system; use it from one thread at a time."""

    def __init__(self, directory: Path) -> None:
        """Read and write the record in `directory`, a run's; nothing is made before `add`."""
        self.path = directory / FILE_NAME
        self._seen = _Seen()

    def read(self) -> Mapping[str, Evaluation]:
        """Return the evaluations by the name of the checkpoint, the latest of each; unreadable lines are left out."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            self._seen = _Seen()
            return self._seen.found
        mark = (status.st_ino, status.st_mtime_ns, status.st_size)
        if mark != self._seen.mark:
            found: dict[str, Evaluation] = {}
            # A record that cannot be read must not keep checkpoints from being read
            with suppress(CheckpointError, OSError):
                for line in read_small_file(self.path, limit=MAX_BYTES).splitlines():
                    with suppress(msgspec.MsgspecError):
                        each = msgspec.json.decode(line, type=Evaluation)
                        if CHECKPOINT_NAME.fullmatch(each.checkpoint):
                            # Last, where it was evaluated again
                            found.pop(each.checkpoint, None)
                            found[each.checkpoint] = each
            self._seen = _Seen(mark, found)
        return self._seen.found

    def add(self, evaluation: Evaluation, filesystem: FileSystem | None = None) -> None:
        """Add an evaluation, durably; it replaces an earlier one of the same checkpoint.

        Raises:
            OSError: The file cannot be written; it is unchanged.
        """
        found = {**self.read()}
        found.pop(evaluation.checkpoint, None)
        lines = [msgspec.json.encode(each) + b"\n" for each in (*found.values(), evaluation)]
        replace_file(self.path, b"".join(lines), filesystem)


def of_this_run(evaluations: Iterable[Evaluation], *, attempt: int, resumed_step: int) -> list[Evaluation]:
    """Return the evaluations that belong to the steps that an attempt has trained or continued, by step.

    Args:
        evaluations: Those of all attempts.
        attempt: The attempt.
        resumed_step: The step at which it began. What earlier attempts did after it is no longer part of the run.
    """
    kept: dict[int, Evaluation] = {}
    for each in sorted(evaluations, key=lambda each: each.attempt):
        if each.attempt == attempt or (each.attempt < attempt and each.step <= resumed_step):
            kept[each.step] = each
    return [kept[step] for step in sorted(kept)]
