"""The checkpoints of one run, from the boundary where they are taken to the event that they are durable.

    training thread                       writer's thread
    ───────────────                       ───────────────
    save(state) ── one copy ── snapshot ─────────> commit: files, manifest, fsync, rename, fsync
    continues                                      retention; CheckpointSaved and the waiting future, once
                                                   the logs have what came before (`durable_logs.py`)

Training waits for the copy and, for checkpoints that must not be skipped, for a free slot to copy into.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from offloop.engine.best import BestSoFar
from offloop.engine.checkpoint import (
    CheckpointDeadlineError,
    CheckpointError,
    CheckpointRequest,
    CheckpointStore,
    CheckpointWriteError,
    CheckpointWriter,
    Commit,
    DirectoryLock,
    LoadedCheckpoint,
    Retention,
    Snapshot,
    SnapshotArena,
    SnapshotBusyError,
    WriterDiedError,
)
from offloop.engine.checkpoint.evaluations import evaluation_of
from offloop.engine.checkpoint.parts import Outcome, PartsChannel
from offloop.engine.errors import describe
from offloop.engine.events import CheckpointFailed, CheckpointSaved, Evaluated, Event
from offloop.engine.monitor import EVALUATED
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.recovery.keepers import Keeper
from offloop.engine.recovery.saved_events import event_about, outcome_of

logger = logging.getLogger("offloop")

WaitPolicy = Callable[[Callable[[float], bool]], bool]
"""How long to wait. Given a function that waits that many seconds and returns whether it is done; returns that, too."""

Reason = Literal["interval", "best", "final", "preempt", "manual", "exception"]


class Checkpoints:
    """The checkpoints that a run takes. Opens its store, lock and thread when the first one is taken.

    Threads: `save` runs in the training thread. Methods that block say so. All that happens to the checkpoints of a run
    goes through here, so the class has many methods.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_id: str,
        optimizers: Mapping[str, torch.optim.Optimizer],
        model: torch.nn.Module,
        publish: Callable[[Event], None],
        retention: Retention,
        wait_policy: WaitPolicy,
        logs: DurableLogs,
        evaluations: Evaluations,
        ranks: PartsChannel | None = None,
    ) -> None:
        """Keep the checkpoints of the run in `directory`.

        Args:
            directory: Of the run.
            run_id: Written into manifests.
            optimizers: A copy in progress must be done before their `step` changes the tensors that they own.
            model: Some of its modules may change their parameters in the forward pass.
            publish: For `CheckpointSaved` and `CheckpointFailed`. Called in this object's threads.
            retention: What is kept in any case, and which checkpoint is the best of the run.
            wait_policy: How long training waits for a slow disk.
            logs: Announce a durable checkpoint once they have what came before it.
            evaluations: Know which checkpoints are evaluated beside training.
            ranks: The way to the other processes of the run; None if there are none.
        """
        self._logs = logs
        self.evaluations = evaluations
        self._of_run = retention
        # By owner. Replaced as a whole by the training thread, read by the writer's thread.
        self._keepers: dict[str, Keeper] = {}
        # The checkpoint that this attempt continues.
        self.parent: str | None = None
        self.attempt = 0
        # Paths of the durable checkpoints that were not deleted, by step. Replaced by the writer's thread, read by
        # the training thread after `flush`.
        self.saved: dict[int, str] = {}
        # Path of the newest durable checkpoint. Written by the writer's thread, read by any thread.
        self.last: str | None = None
        # Step of the latest checkpoint that was not written. Written by the writer's thread or the training thread,
        # read by the training thread.
        self.failed_step: int | None = None
        # The event of the newest durable checkpoint. Writer's thread.
        self._newest: CheckpointSaved | None = None
        # Called in the writer's thread after each durable checkpoint. Written by the training thread before the first.
        self.on_saved: Callable[[], None] | None = None
        self.directory = directory
        self._run_id = run_id
        self._optimizers = optimizers
        # torch's embeddings with a max_norm scale down the rows that they look up
        self._volatile = [
            parameter
            for module in model.modules()
            if getattr(module, "max_norm", None) is not None
            for parameter in module.parameters(recurse=False)
        ]
        self._publish = publish
        self._wait_policy = wait_policy
        # The way to the other processes, if there are any. Used by the writer's thread.
        self.ranks = ranks
        # Of saves and tags so far; training thread. The same on all ranks, which know by it that they mean the same.
        self._number = 0
        self._claim: DirectoryLock | None = None
        self._arena: SnapshotArena | None = None
        self._store: CheckpointStore | None = None
        self._writer: CheckpointWriter[Any] | None = None
        # The next two by id of the request. The training thread adds, the writer's thread removes.
        self._waiting: dict[int, Future[CheckpointSaved]] = {}
        self._in_flight: set[int] = set()

    def claim(self) -> None:
        """Lock the directory, which must exist, for this run. Training thread, before anything is written.

        Raises:
            RunLockedError: Another run has locked it.
        """
        self._claim = DirectoryLock(self.directory)

    def keep(self, keeper: Keeper) -> None:
        """Add what an owner wants to keep and to copy; it replaces what the owner wanted before. Training thread.

        Raises:
            ValueError: Another owner has copies under the same names in the same directory.
        """
        others = {name: each for name, each in self._keepers.items() if name != keeper.retention.owner}
        copies = keeper.copies
        for name, other in others.items():
            if copies is not None and other.copies is not None and copies.collides_with(other.copies):
                raise ValueError(
                    f"{name} copies checkpoints to {copies.directory} under the same names already"
                )
        self._keepers = {**others, keeper.retention.owner: keeper}
        if self._store is not None:
            self._store.retention = self.retention
        # A run that is continued may have been killed before it copied its last checkpoints
        if self._writer is not None and copies is not None:
            self._writer.call_nowait(lambda death: self._copy(keeper))

    @property
    def save_at_end(self) -> tuple[str, ...]:
        """The owners that want a checkpoint when training ends."""
        return tuple(name for name, each in self._keepers.items() if each.save_at_end)

    def owners_among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names that are owners."""
        return tuple(name for name in names if name in self._keepers)

    def _copy(self, keeper: Keeper) -> None:
        """Update an owner's copies to what is kept. Writer's thread."""
        assert self._store is not None and keeper.copies is not None
        try:
            pinned = {*self._store.tags().values(), *filter(None, [self.parent])}
            checkpoints = self._store.checkpoints()
            keeper.copies.mirror(keeper.copied(checkpoints, self.retention, pinned=pinned))
        except (OSError, CheckpointError) as error:
            logger.error("checkpoints were not copied to %s: %s", keeper.copies.directory, error)

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
        """Copy the state and hand it to the writer. Training thread, at a step boundary.

        Waits for a free slot, except for `reason="interval"`: without a free slot, such a checkpoint is skipped and
        fails with `SnapshotBusyError`, as the next one will come.

        Args:
            state: What a resumed run needs, see `run_state.py`.
            position: epoch, step, batch.
            metrics: The values by which retention ranks it.
            reason: Why it is taken.
            owners: The owners whose retention counts it; none: that of every owner.
            future: Completed when the checkpoint is durable or has failed.

        Returns:
            True if the writer accepted it. Writing may still fail.
        """
        self._number += 1
        request = CheckpointRequest(
            number=self._number,
            step=position["step"],
            epoch=position["epoch"],
            batch=position["batch"],
            attempt=self.attempt,
            run_id=self._run_id,
            reason=reason if reason in get_args(Reason) else "manual",  # type: ignore[arg-type]  # just checked
            parent=self.parent,
            metrics=dict(metrics),
            owners=owners,
        )
        if future is not None:
            self._waiting[id(request)] = future
        self._in_flight.add(id(request))
        try:
            writer, arena = self.open()
            snapshot = (
                arena.take_nowait(state) if reason == "interval" else _take(arena, state, self._wait_policy)
            )
            try:
                writer.submit_nowait(snapshot, request)
            except BaseException:
                snapshot.release()
                raise
        except CheckpointError as error:
            self._report_failure(request, error)
            self._decline(request.number, error)
            return False
        return True

    def refuse(self, error: BaseException) -> None:
        """Tell the other ranks, if there are any, that their next save or tag fails. Training thread."""
        self._number += 1
        self._decline(self._number, error)

    def _decline(self, number: int, error: BaseException) -> None:
        """Tell the other ranks, in the writer's thread and in turn, that a save fails. Training thread."""
        if self.ranks is None or self._writer is None:
            return
        outcome = Outcome(error=describe(error))
        with contextlib.suppress(WriterDiedError):
            self._writer.call_nowait(lambda death: self._tell(number, outcome))

    def _tell(self, number: int, outcome: Outcome) -> None:
        """Tell the other ranks, if there are any, what came of a save or a tag. Writer's thread."""
        if self.ranks is None:
            return
        try:
            self.ranks.tell(number, outcome)
        # They notice by themselves that this process is out of reach.
        except CheckpointError as error:
            logger.error("the other ranks do not hear of checkpoint %s: %s", outcome.path, error)

    @property
    def in_flight(self) -> bool:
        """True while a checkpoint is taken or written. Any thread."""
        return bool(self._in_flight)

    def tag(
        self,
        tag: str,
        *,
        step: int,
        move: bool,
        future: "Future[CheckpointSaved]",
        which: str | int | None = None,
    ) -> None:
        """Tag a checkpoint, by default the newest, which is that of `step`. Training thread; does not wait.

        Args:
            tag: The name. A checkpoint that has one is not deleted.
            step: Optimizer steps done at this boundary.
            move: Whether to take the tag from another checkpoint.
            future: Completed when checkpoint and tag are durable, or one has failed.
            which: The checkpoint, see `CheckpointReader.find`.
        """

        self._number += 1
        number = self._number

        def set_tag(death: CheckpointError | None) -> None:
            saved = self._newest
            try:
                if death is not None:
                    raise death
                assert self._store is not None
                if which is not None:
                    saved = event_about(self._store.tag(tag, which, move=move))
                elif saved is None or saved.saved_step != step:
                    raise CheckpointWriteError(
                        self.directory,
                        None,
                        f"the checkpoint of step {step} to be tagged {tag!r} was not saved",
                    )
                else:
                    self._store.tag(tag, Path(saved.path).name, move=move)
            except Exception as error:
                what = f"of step {step}" if which is None else repr(which)
                logger.error("the checkpoint %s was not tagged %r: %s", what, tag, error)
                self._tell(number, Outcome(error=describe(error)))
                future.set_exception(error)
            else:
                self._tell(number, outcome_of(saved))
                future.set_result(saved)

        try:
            writer, _ = self.open()
            writer.call_nowait(set_tag)
        except CheckpointError as error:
            future.set_exception(error)

    def judge(self, event: Evaluated) -> None:
        """Note how a checkpoint was evaluated; it is no longer kept for that. Any thread; does not wait."""
        metrics = None
        if event.error is None:
            metrics = {key: value for key, value in event.metrics.items() if key.startswith(EVALUATED)}
        self._in_writer(functools.partial(self._judge, Path(event.path).name, metrics))

    def give_up_evaluations(self) -> None:
        """Expect no evaluation any more: the best is chosen among those that were evaluated. Does not wait."""
        if self._writer is None:
            self.evaluations.give_up()
        else:
            self._in_writer(self._give_up_evaluations)

    def _give_up_evaluations(self) -> None:
        waiting = self.evaluations.give_up()
        if not waiting:
            return
        logger.warning(
            "not evaluated: the checkpoints of steps %s. The best is chosen among the others; a run that continues "
            "this one evaluates those that are kept",
            ", ".join(map(str, waiting.values())),
        )
        for name in waiting:
            self._judge(name, None)

    def _in_writer(self, function: Callable[[], None]) -> None:
        """Call a function in the writer's thread, unless that has ended. Any thread."""
        # A writer that died keeps what is on disk
        with contextlib.suppress(WriterDiedError):
            if self._writer is not None:
                self._writer.call_nowait(lambda death: function() if death is None else None)

    def _judge(self, name: str, metrics: Mapping[str, float] | None) -> None:
        """Record the evaluation of a checkpoint, None if there is none, and apply retention. Writer's thread."""
        assert self._store is not None
        try:
            head = next((each.manifest for each in self._store.checkpoints() if each.name == name), None)
            evaluation = None
            if head is None:
                logger.warning("%s has no checkpoint %s that could be evaluated", self.directory, name)
            elif metrics is not None:
                evaluation = evaluation_of(
                    name,
                    attempt=head.attempt,
                    step=head.step,
                    epoch=head.epoch_of_step,
                    metrics=metrics,
                )
            deleted, problems = self._store.judge(name, evaluation, parent=self.parent)
        except CheckpointError as error:
            logger.error("the evaluation of %s was not recorded: %s", name, error)
            return
        for problem in problems:
            logger.warning("after the evaluation of %s: %s", name, problem)
        self.evaluations.forget(name, evaluation)
        self._follow(deleted)

    def _follow(self, deleted: Iterable[str]) -> None:
        """Follow what retention has deleted or may copy. Writer's thread."""
        gone = set(deleted)
        self.saved = {step: kept for step, kept in self.saved.items() if Path(kept).name not in gone}
        for keeper in self._keepers.values():
            if keeper.copies is not None:
                self._copy(keeper)
        if self.on_saved is not None:
            self.on_saved()

    def guard(self) -> None:
        """Make the device finish a copy in progress before it runs what comes next. Does not block.

        Needed before anything but an optimizer's `step` changes model or optimizers. Training thread.
        """
        if self._arena is not None:
            self._arena.guard()

    def flush(self) -> bool:
        """Wait until everything taken is durable or has failed; False if that takes too long. Blocks."""
        writer = self._writer
        if writer is None:
            return True
        try:
            return self._wait_policy(lambda seconds: is_settled(writer, seconds)) and self._wait_policy(
                self._logs.flush
            )
        except WriterDiedError as error:
            logger.error("checkpoints were not finished: %s", error)
            return False

    def close(self) -> None:
        """End the thread and release memory and the store's lock, after `flush`. Calling it twice is fine.

        The claim to the directory stays until `leave`.

        If a checkpoint is still being written, that happens when it is done.
        """
        self._logs.close()
        if self._writer is None:
            self._give_back()
            return
        try:
            self._writer.flush(0.0)
            self._writer.close()
        except CheckpointDeadlineError as error:
            logger.error("checkpoints were not finished: %s", error)
            self._writer.abandon()
            try:
                threading.Thread(target=self._close_late, name="offloop-close-late", daemon=True).start()
            # Without a thread, the process keeps the lock until it ends
            except RuntimeError as shortage:
                logger.error("the lock of %s stays taken: %s", self.directory, shortage)
            return
        except CheckpointError as error:
            logger.error("checkpoints were not finished: %s", error)
        self._give_back()

    def leave(self) -> None:
        """Give the directory back, when nothing more is written there. Any thread; calling it twice is fine."""
        if self._claim is not None:
            self._claim.release()

    def _close_late(self) -> None:
        assert self._writer is not None
        with contextlib.suppress(CheckpointError):
            self._writer.close()
        self._give_back()

    def _give_back(self) -> None:
        if self._arena is not None:
            self._arena.close()
        if self._store is not None:
            self._store.close()
        # A program that keeps the run must not keep the weights
        self._optimizers, self._volatile = {}, []

    def locate(self, best: BestSoFar) -> None:
        """Find the checkpoint of the best moment, which may be one of an earlier attempt. Blocks."""
        if self._store is None:
            return
        try:
            best.locate(self._store.checkpoints())
        except CheckpointError as error:
            logger.warning("%s could not be searched for the best checkpoint: %s", self.directory, error)

    @property
    def retention(self) -> tuple[Retention, ...]:
        """The current rules of what is kept: those of the run, then those of each owner."""
        return self._of_run, *(each.retention for each in self._keepers.values())

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a checkpoint, if it still exists, while the block reads it. Any thread; waits for a commit."""
        with contextlib.nullcontext() if self._store is None else self._store.held(name):
            yield

    def load(self, which: str | int | Path) -> LoadedCheckpoint:
        """Read a checkpoint and verify every byte. If the one meant by `"last"` is damaged, read the one before.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        self.open()
        assert self._store is not None
        loaded = self._store.load(which, on_corrupt="fallback")
        for error in loaded.rejected:
            logger.warning("a checkpoint was skipped: %s", error)
        return loaded

    def open(self) -> tuple[CheckpointWriter[Any], SnapshotArena]:
        """Open store, lock and thread, unless they are open: all of them or none.

        Opening the store removes what interrupted saves left. So with several ranks, rank 0 does it before any of them
        takes a checkpoint.

        Raises:
            RunLockedError: Another run has locked this directory.
            WriterDiedError: The system gives no thread.
        """
        if self._writer is None or self._arena is None:
            with contextlib.ExitStack() as opened:
                store = opened.enter_context(
                    CheckpointStore(self.directory, retention=self.retention, ranks=self.ranks)
                )
                arena = SnapshotArena(optimizers=self._optimizers.values(), volatile=self._volatile)
                opened.callback(arena.close)
                self._writer = CheckpointWriter(store, on_saved=self._saved, on_failed=self._failed)
                self._store, self._arena = store, arena
                opened.pop_all()
            self._expect_evaluations(store)
        return self._writer, self._arena

    def _expect_evaluations(self, store: CheckpointStore) -> None:
        """Keep the checkpoints of earlier attempts that are still to be evaluated."""
        if self.evaluations.every is None:
            return
        for info in store.to_evaluate(self.evaluations.every):
            self.evaluations.expect(info.manifest)
            store.pin(info.name)

    def _saved(self, request: CheckpointRequest, commit: Commit) -> None:
        """Note a durable checkpoint, and have it announced. Writer's thread."""
        self._in_flight.discard(id(request))
        path = str(commit.info.path)
        self.last = path
        self.saved = {**self.saved, request.step: path}
        to_evaluate = self.evaluations.expect(commit.info.manifest)
        if to_evaluate:
            # In time: the newest checkpoint is always kept
            assert self._store is not None
            self._store.pin(commit.info.name)
        event = CheckpointSaved(
            path=path,
            saved_step=request.step,
            reason=request.reason,
            bytes=commit.info.bytes,
            seconds=commit.seconds,
            to_evaluate=to_evaluate,
        )
        self._newest = event
        self._tell(request.number, outcome_of(event))
        for problem in commit.problems:
            logger.warning("after checkpoint %s: %s", path, problem)
        waiting = self._waiting.pop(id(request), None)
        self._logs.announce(functools.partial(self._announce, event, waiting))
        self._follow(commit.deleted)

    def _announce(self, event: CheckpointSaved, waiting: "Future[CheckpointSaved] | None") -> None:
        """Publish that a checkpoint is durable. Announcing thread."""
        self._publish(event)
        if waiting is not None:
            waiting.set_result(event)

    def _failed(self, request: CheckpointRequest, error: CheckpointError) -> None:
        """Report a checkpoint that was not written. Writer's thread."""
        self._tell(request.number, Outcome(error=describe(error)))
        self._report_failure(request, error)

    def _report_failure(self, request: CheckpointRequest, error: CheckpointError) -> None:
        """Report a checkpoint that was not written. Writer's thread, or the training thread if it got no further."""
        self._in_flight.discard(id(request))
        self.failed_step = request.step
        if not isinstance(error, SnapshotBusyError):
            logger.error("the checkpoint of step %d was not saved: %s", request.step, error)
        self._publish(CheckpointFailed(saved_step=request.step, reason=request.reason, error=describe(error)))
        waiting = self._waiting.pop(id(request), None)
        if waiting is not None:
            waiting.set_exception(error)


def is_settled(writer: CheckpointWriter[Any], seconds: float) -> bool:
    """Wait for that long until a writer has nothing left to do; return whether it has nothing. Blocks."""
    try:
        writer.flush(seconds)
    except CheckpointDeadlineError:
        return False
    return True


def _take(arena: SnapshotArena, state: Mapping[str, Any], wait_policy: WaitPolicy) -> Snapshot:
    """Copy the state once a slot is free, if one becomes free in time. Blocks."""
    taken: list[Snapshot] = []
    refusals: list[SnapshotBusyError] = []

    def is_done(seconds: float) -> bool:
        try:
            taken.append(arena.take(state, timeout=seconds))
        except SnapshotBusyError as error:
            refusals.append(error)
        return bool(taken)

    if not wait_policy(is_done):
        raise refusals[-1]
    return taken[0]
