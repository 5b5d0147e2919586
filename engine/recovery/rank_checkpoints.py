"""The checkpoints of a run as a process other than the first ("a rank above 0") takes part in them.

    training thread           writer's thread                   listening thread
    ───────────────           ───────────────                   ────────────────
    save(own state) ─ copy ─> its files, fsynced ─ report ──┐
    continues                                               └─> what rank 0 says: durable, or not
                                                                CheckpointSaved and the waiting future

The snapshot is free again as soon as the files are durable. So this rank is never busier than rank 0, which writes
more.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointRequest,
    CheckpointWriter,
    LoadedCheckpoint,
    SnapshotArena,
    WriterDiedError,
)
from offloop.engine.checkpoint.part_store import PartStore
from offloop.engine.checkpoint.parts import RANKS, Outcome, Part
from offloop.engine.errors import describe
from offloop.engine.events import CheckpointSaved
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.run_checkpoints import Checkpoints, is_settled
from offloop.engine.recovery.saved_events import event_of

logger = logging.getLogger("offloop")


class RankCheckpoints(Checkpoints):
    """The checkpoints that a run takes, on a rank above 0: it adds its part, and rank 0 does the rest.

    Threads: as `Checkpoints`. What the writer's thread writes there, the listening thread writes here.
    """

    # Both are made by `open`, in the training thread.
    _parts: PartStore | None = None
    _listener: CheckpointWriter[None] | None = None

    def claim(self) -> None:
        """Do nothing: rank 0 locks the directory."""

    def keep(self, keeper: Keeper) -> None:
        """Do nothing: rank 0 keeps and deletes checkpoints."""

    def open(self) -> tuple[CheckpointWriter[Any], SnapshotArena]:
        """Start the threads, unless they run.

        Raises:
            WriterDiedError: The system gives no thread.
        """
        if self._writer is None or self._arena is None:
            assert self.ranks is not None
            parts = PartStore(self.directory, self.ranks)
            listener = self._listener or CheckpointWriter(
                parts, on_saved=self._reported, on_failed=self._failed, name="offloop-checkpoint-listener"
            )
            # At the interpreter's exit, nobody waits for a rank 0 that says nothing
            listener.abandon()
            self._parts, self._listener = parts, listener
            self._writer = CheckpointWriter(parts, on_saved=self._reported, on_failed=self._failed)
            self._arena = SnapshotArena(
                files=parts.files, optimizers=self._optimizers.values(), volatile=self._volatile
            )
        return self._writer, self._arena

    def save(
        self,
        state: Mapping[str, Any],
        *,
        position: Mapping[str, int],
        metrics: Mapping[str, float],
        reason: str,
        owners: tuple[str, ...] = (),
        future: "Future[CheckpointSaved] | None" = None,
    ) -> bool:
        """Copy this rank's own state and hand it to the writer. Training thread, at the same boundary as rank 0.

        The future completes when rank 0 says that the checkpoint is durable, or has failed. For the rest see
        `Checkpoints.save`.
        """
        assert self.ranks is not None
        return super().save(
            {RANKS: {str(self.ranks.rank): state}},
            position=position,
            metrics=metrics,
            reason=reason,
            owners=owners,
            future=future,
        )

    def tag(
        self,
        tag: str,
        *,
        step: int,
        move: bool,
        future: "Future[CheckpointSaved]",
        which: str | int | None = None,
    ) -> None:
        """Have the future complete when rank 0 has tagged the checkpoint, or has failed. Training thread."""
        self._number += 1
        number = self._number

        def listen(death: CheckpointError | None) -> None:
            outcome = self._outcome(number, death)
            if outcome.error:
                future.set_exception(CheckpointError(outcome.error))
            else:
                future.set_result(event_of(outcome))

        try:
            self.open()
            assert self._listener is not None
            self._listener.call_nowait(listen)
        except CheckpointError as error:
            future.set_exception(error)

    def load(self, which: str | int | Path) -> LoadedCheckpoint:
        """Read a checkpoint with the part of this rank, and verify every byte of them. Blocks.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        assert self.ranks is not None
        return CheckpointReader(self.directory).load(which, ranks=[self.ranks.rank])

    def _decline(self, number: int, error: BaseException) -> None:
        """Report, in the writer's thread and in turn, that there is no part. Training thread."""
        part = Part(error=describe(error))

        def report(death: CheckpointError | None) -> None:
            assert self.ranks is not None
            try:
                self.ranks.report(number, part)
            except CheckpointError as failure:
                logger.error("rank 0 does not hear that there is no part: %s", failure)

        try:
            self.open()
            assert self._writer is not None and self._listener is not None
            self._writer.call_nowait(report)
            self._listener.call_nowait(lambda death: self._forget(number, death))
        except CheckpointError as failure:
            logger.error("rank 0 does not hear that there is no part: %s", failure)

    def _tell(self, number: int, outcome: Outcome) -> None:
        """Do nothing: this rank listens."""

    # The writer's thread -------------------------------------------------------------------------

    def _reported(self, request: CheckpointRequest, commit: None) -> None:
        """Listen for what comes of a save whose part is durable, or has failed. Writer's thread."""
        assert self._listener is not None
        try:
            self._listener.call_nowait(lambda death: self._listen(request, death))
        except WriterDiedError as error:
            self._report_failure(request, error)

    # The listening thread ------------------------------------------------------------------------

    def _outcome(self, number: int, death: CheckpointError | None) -> Outcome:
        """Wait for what rank 0 says about a save or a tag. Listening thread."""
        assert self.ranks is not None
        try:
            if death is not None:
                raise death
            return self.ranks.outcome(number)
        except Exception as error:
            return Outcome(error=describe(error))

    def _forget(self, number: int, death: CheckpointError | None) -> None:
        self._outcome(number, death)

    def _listen(self, request: CheckpointRequest, death: CheckpointError | None) -> None:
        """Wait for what comes of a save, and have it announced. Listening thread."""
        outcome = self._outcome(request.number, death)
        if outcome.error:
            assert self._parts is not None
            self._parts.discard(request)
            self._report_failure(request, CheckpointError(outcome.error))
            return
        self._in_flight.discard(id(request))
        event = event_of(outcome)
        self.last = event.path
        self.saved = {event.saved_step: event.path}
        waiting = self._waiting.pop(id(request), None)
        self._logs.announce(lambda: self._announce(event, waiting))

    # The end -------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Wait until rank 0 has said what came of everything; False if that takes too long. Blocks."""
        listener = self._listener
        if listener is None:
            return True
        # The first wait is for this rank's own files
        try:
            return (
                super().flush()
                and self._wait_policy(lambda seconds: is_settled(listener, seconds))
                and self._wait_policy(self._logs.flush)
            )
        except WriterDiedError as error:
            logger.error("checkpoints were not finished: %s", error)
            return False

    def _give_back(self) -> None:
        if self._listener is not None:
            try:
                self._listener.close(0.0)
            except CheckpointError as error:
                logger.error("rank 0 did not say what became of the last checkpoints: %s", error)
        super()._give_back()
