"""Saving: the checkpoints of one run, from the boundary where they are taken to the word that they are durable.

    training thread                       writer's thread
    ───────────────                       ───────────────
    save(state) ── one copy ── snapshot ─────────> commit: files, manifest, fsync, rename, fsync
    goes on                                        retention; CheckpointSaved and the waiting future, once
                                                   the logs have what came before (`durable_logs.py`)

Training waits for the copy and, for saves that must not be left out, for a free slot to copy into.
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

from offloop.engine.best import Best
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
from offloop.engine.errors import describe
from offloop.engine.events import CheckpointFailed, CheckpointSaved, Event
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.recovery.keepers import Keeper

logger = logging.getLogger("offloop")

WaitPolicy = Callable[[Callable[[float], bool]], bool]
"""How long to wait. Given a function that waits that many seconds and returns whether it is done; returns that, too."""

Reason = Literal["interval", "best", "final", "preempt", "manual", "exception"]


def wait_for_ever(wait: Callable[[float], bool]) -> bool:
    """Wait as long as it takes. Blocks."""
    while not wait(60.0):
        pass
    return True


class Checkpoints:
    """The checkpoints that a run takes. Opens its store, lock and thread when the first one is taken.

    `save` belongs to the training thread; everything that blocks says so.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_id: str,
        optimizers: Mapping[str, torch.optim.Optimizer],
        model: torch.nn.Module,
        publish: Callable[[Event], None],
        retention: Retention | None = None,
        wait_policy: WaitPolicy = wait_for_ever,
        logs: DurableLogs | None = None,
    ) -> None:
        """Keep the checkpoints of the run in `directory`.

        Args:
            directory: The run's.
            run_id: Written into manifests.
            optimizers: Their `step` is what changes the tensors that they own.
            model: Some modules change their parameters in the forward pass.
            publish: For `CheckpointSaved` and `CheckpointFailed`; called in threads of this object's.
            retention: What every run keeps, and which checkpoint is its best.
            wait_policy: How long training waits for a slow disk.
            logs: Announces a durable checkpoint once they have what came before it; None for at once.
        """
        self._logs = logs
        self._of_run = retention or Retention()
        # By owner; replaced, never changed, by the training thread, and read by the writer's
        self._keepers: dict[str, Keeper] = {}
        self.parent: str | None = None  # the checkpoint that this attempt continues
        self.attempt = 0
        self.saved: dict[int, str] = {}  # step -> path of what is durable and not deleted; writer's thread
        self.last: str | None = None  # path of the newest; written by the writer's thread, read by anybody
        self.failed_step: int | None = (
            None  # of the last one that was not written; writer's thread, or training's
        )
        self._newest: CheckpointSaved | None = None  # what was said about it; writer's thread
        self.on_saved: Callable[[], None] | None = None  # told of each durable one, in the announcing thread
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
        self._claim: DirectoryLock | None = None
        self._arena: SnapshotArena | None = None
        self._store: CheckpointStore | None = None
        self._writer: CheckpointWriter | None = None
        self._waiting: dict[int, list[Future[CheckpointSaved]]] = {}  # by id of the request
        self._in_flight: set[int] = set()  # ids of requests; put in by one thread, taken out by another

    def claim(self) -> None:
        """Take the directory for this run, which must be there. Training thread, before anything is written.

        Raises:
            RunLockedError: Another run has it.
        """
        self._claim = DirectoryLock(self.directory)

    def keep(self, keeper: Keeper) -> None:
        """Add what an owner wants kept and copied, in place of what it wanted before. Training thread.

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
        if (
            self._writer is not None and copies is not None
        ):  # a run that is continued: it may have been killed
            self._writer.call_nowait(lambda death: self._copy(keeper))

    @property
    def save_at_end(self) -> tuple[str, ...]:
        """The owners that want a checkpoint when training ends."""
        return tuple(name for name, each in self._keepers.items() if each.save_at_end)

    def owners_among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those that are owners."""
        return tuple(name for name in names if name in self._keepers)

    def _copy(self, keeper: Keeper) -> None:
        """Bring an owner's copies up to what is kept. Writer's thread."""
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
        tags: tuple[str, ...] = (),
        owners: tuple[str, ...] = (),
        future: "Future[CheckpointSaved] | None" = None,
    ) -> bool:
        """Copy the state and hand it to the writer. Training thread, at a step boundary.

        Waits for a free slot, except for `reason="interval"`, which is left out if there is none: it
        then fails with `SnapshotBusyError`, as the next one will come.

        Args:
            state: What a resumed run needs, see `run_state.py`.
            position: epoch, step, batch.
            metrics: The latest values, which retention judges by.
            reason: Why it is taken.
            tags: Names under which it is pinned.
            owners: Whose retention counts it; none: everybody's.
            future: Completed when it is durable or has failed.

        Returns:
            True if the writer has it; it may still fail.
        """
        request = CheckpointRequest(
            step=position["step"],
            epoch=position["epoch"],
            batch=position["batch"],
            attempt=self.attempt,
            run_id=self._run_id,
            reason=reason if reason in get_args(Reason) else "manual",  # type: ignore[arg-type]  # just checked
            parent=self.parent,
            metrics=dict(metrics),
            tags=tags,
            owners=owners,
        )
        if future is not None:
            self._waiting[id(request)] = [future]
        self._in_flight.add(id(request))
        try:
            writer, arena = self.open()
            snapshot = arena.take_nowait(state) if reason == "interval" else self._take(arena, state)
            try:
                writer.submit_nowait(snapshot, request)
            except BaseException:
                snapshot.release()
                raise
        except CheckpointError as error:
            self._failed(request, error)
            return False
        return True

    @property
    def in_flight(self) -> bool:
        """True while a checkpoint is taken or written. Any thread."""
        return bool(self._in_flight)

    def tag(self, tag: str, *, step: int, move: bool, future: "Future[CheckpointSaved]") -> None:
        """Have the newest checkpoint, which is of `step`, tagged once it is durable. Any thread; does not wait.

        Args:
            tag: The name, which keeps it from being deleted.
            step: Steps done at its boundary.
            move: Whether to take the tag off another checkpoint.
            future: Completed when the tag is durable or has failed.
        """

        def set_tag(death: CheckpointError | None) -> None:
            saved = self._newest
            try:
                if death is not None:
                    raise death
                if saved is None or saved.saved_step != step:
                    raise CheckpointWriteError(
                        self.directory,
                        None,
                        f"the checkpoint of step {step} to be tagged {tag!r} was not saved",
                    )
                assert self._store is not None
                self._store.tag(tag, Path(saved.path).name, move=move)
            except Exception as error:
                logger.error("the checkpoint of step %d was not tagged %r: %s", step, tag, error)
                future.set_exception(error)
            else:
                future.set_result(saved)

        try:
            writer, _ = self.open()
            writer.call_nowait(set_tag)
        except CheckpointError as error:
            future.set_exception(error)

    def _take(self, arena: SnapshotArena, state: Mapping[str, Any]) -> Snapshot:
        """Copy the state once a slot is free, as long as there is patience for it."""
        taken: list[Snapshot] = []
        refusals: list[SnapshotBusyError] = []

        def is_done(seconds: float) -> bool:
            try:
                taken.append(arena.take(state, timeout=seconds))
            except SnapshotBusyError as error:
                refusals.append(error)
            return bool(taken)

        if not self._wait_policy(is_done):
            raise refusals[-1]
        return taken[0]

    def guard(self) -> None:
        """Let the device copy first what the next checkpoint is made of, before that is changed; does not block.

        Needed before anything but an optimizer's `step` changes model or optimizers. Training thread.
        """
        if self._arena is not None:
            self._arena.guard()

    def flush(self) -> bool:
        """Wait until everything taken is durable or has failed; False if there was no patience for it. Blocks."""
        writer = self._writer
        if writer is None:
            return True

        def is_done(seconds: float) -> bool:
            try:
                writer.flush(seconds)
            except CheckpointDeadlineError:
                return False
            return True

        try:
            return self._wait_policy(is_done) and (self._logs is None or self._wait_policy(self._logs.flush))
        except WriterDiedError as error:
            logger.error("checkpoints were not finished: %s", error)
            return False

    def close(self) -> None:
        """End the thread, give memory and lock back; after `flush`. Twice is fine.

        Where a write is still going on, that happens when it is done.
        """
        if self._logs is not None:
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
            except RuntimeError as shortage:  # the lock is kept until the process ends
                logger.error("the lock of %s stays taken: %s", self.directory, shortage)
            return
        except CheckpointError as error:
            logger.error("checkpoints were not finished: %s", error)
        self._give_back()

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
        if self._claim is not None:
            self._claim.release()
        self._optimizers, self._volatile = {}, []  # whoever keeps the run keeps no weights by it

    def located(self, best: Best) -> Best:
        """Return a moment with the path of the checkpoint that holds it, whichever attempt has saved it. Blocks."""
        if self._store is None:
            return best
        try:
            return best.located(self._store.checkpoints())
        except CheckpointError as error:
            logger.warning("%s could not be searched for the best checkpoint: %s", self.directory, error)
            return best

    @property
    def retention(self) -> tuple[Retention, ...]:
        """What is kept, as of now: the run's own rules, and those of each owner."""
        return self._of_run, *(each.retention for each in self._keepers.values())

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a checkpoint while the block reads it, if it is still there. Any thread; waits for a commit."""
        with contextlib.nullcontext() if self._store is None else self._store.held(name):
            yield

    def load(self, which: str | int | Path) -> LoadedCheckpoint:
        """Read a checkpoint back, every byte checked; of `"last"`, a damaged one gives way to the one before.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        self.open()
        assert self._store is not None
        loaded = self._store.load(which, on_corrupt="fallback")
        for error in loaded.rejected:
            logger.warning("a checkpoint was passed over: %s", error)
        return loaded

    def open(self) -> tuple[CheckpointWriter, SnapshotArena]:
        """Open store, lock and thread if they are not; all of them or none.

        Raises:
            RunLockedError: Another run has this directory.
            WriterDiedError: The system gives no thread.
        """
        if self._writer is None or self._arena is None:
            with contextlib.ExitStack() as opened:
                store = opened.enter_context(CheckpointStore(self.directory, retention=self.retention))
                arena = SnapshotArena(optimizers=self._optimizers.values(), volatile=self._volatile)
                opened.callback(arena.close)
                self._writer = CheckpointWriter(store, on_saved=self._saved, on_failed=self._failed)
                self._store, self._arena = store, arena
                opened.pop_all()
        return self._writer, self._arena

    def _saved(self, request: CheckpointRequest, commit: Commit) -> None:
        """Take note of a checkpoint that is durable, and have it announced. Writer's thread."""
        self._in_flight.discard(id(request))
        path = str(commit.info.path)
        self.last = path
        gone = set(commit.deleted)
        self.saved = {step: kept for step, kept in self.saved.items() if Path(kept).name not in gone}
        self.saved[request.step] = path
        event = CheckpointSaved(
            path=path,
            saved_step=request.step,
            reason=request.reason,
            bytes=commit.info.bytes,
            seconds=commit.seconds,
        )
        self._newest = event
        for problem in commit.problems:
            logger.warning("after checkpoint %s: %s", path, problem)
        waiting = self._waiting.pop(id(request), [])
        if self._logs is None:
            self._announce(event, waiting)
        else:
            self._logs.announce(functools.partial(self._announce, event, waiting))
        for keeper in self._keepers.values():
            if keeper.copies is not None:
                self._copy(keeper)
        if self.on_saved is not None:
            self.on_saved()

    def _announce(self, event: CheckpointSaved, waiting: "list[Future[CheckpointSaved]]") -> None:
        """Say that a checkpoint is durable. Announcing thread."""
        self._publish(event)
        for future in waiting:
            future.set_result(event)

    def _failed(self, request: CheckpointRequest, error: CheckpointError) -> None:
        """Say that a checkpoint was not written. Writer's thread, or the training thread before it got there."""
        self._in_flight.discard(id(request))
        self.failed_step = request.step
        if not isinstance(error, SnapshotBusyError):
            logger.error("the checkpoint of step %d was not saved: %s", request.step, error)
        self._publish(CheckpointFailed(saved_step=request.step, reason=request.reason, error=describe(error)))
        for future in self._waiting.pop(id(request), ()):
            future.set_exception(error)
