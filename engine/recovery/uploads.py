"""Uploads: a thread copies a run's directory to a remote store as it grows, while training continues.

    writer's thread            upload thread                                        store
    ───────────────            ─────────────                                        ─────
    durable ── wake() ───────> checkpoints that the store lacks, newest first
                               files, manifest last ──────────────────────────────> complete
                               CheckpointUploaded, refs, then what retention drops
                               run.json, events.jsonl, metrics.csv, ...

Each round compares the two sides instead of working through a list: what failed, what an earlier attempt left, and
what was saved while the store did not answer is uploaded in the next round. A checkpoint that retention removes
before its turn is skipped.
"""

import logging
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Final

from offloop.engine.bus.threads import Thread
from offloop.engine.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    CheckpointReader,
    RemoteError,
    RemoteRun,
)
from offloop.engine.checkpoint.lock import LOCK
from offloop.engine.checkpoint.manifest import ManifestHead
from offloop.engine.checkpoint.reader import CHECKPOINTS, REFS
from offloop.engine.checkpoint.remote import age
from offloop.engine.checkpoint.retention import best_of, select_kept_by_any
from offloop.engine.errors import RunNameTakenError, describe
from offloop.engine.events import CheckpointUploaded, Event, UploadFailed
from offloop.engine.paths import RUN_JSON
from offloop.engine.recovery.run_checkpoints import Checkpoints, WaitPolicy
from offloop.engine.run_dir import format_run_json

logger = logging.getLogger("offloop")

FILES_INTERVAL: Final = 60.0
"""Seconds between two uploads of the logs. Stores cannot append, so each upload is of the whole file."""
FILES_SHARE: Final = 0.05
"""Share of the time that uploading the logs may take: as they grow, they are uploaded less often."""
FIRST_REST: Final = 5.0
"""Seconds between a failed round and the next one; doubled after each failure."""
LONGEST_REST: Final = 300.0
"""The longest such pause, in seconds. The end of a run cuts it short."""
CLAIM_TIMEOUT: Final = 120.0
"""Seconds in which a store must accept the first file, at the start of a run."""
LONGEST_REST_AT_END: Final = 5.0
"""The longest such pause while the end of the run waits, in seconds."""


class Uploads:
    """The uploads of one run. `wake` never waits; `finish` and `close` block.

    The thread is a daemon, since a store may hang for ever. A checkpoint whose upload was cut off lacks its manifest
    in the store, so it does not count as complete.
    """

    def __init__(
        self,
        remote: RemoteRun,
        directory: Path,
        checkpoints: Checkpoints,
        *,
        publish: Callable[[Event], None],
        failed: Callable[[CheckpointError], None],
    ) -> None:
        """Upload `directory` to `remote`, once `start` is called.

        Args:
            remote: The store.
            directory: Of the run.
            checkpoints: Says what retention keeps, and keeps a checkpoint while it is read.
            publish: For `CheckpointUploaded` and `UploadFailed`. Called in the upload thread.
            failed: Called with the error of each failed round, in the upload thread.
        """
        self._remote = remote
        self._directory = directory
        self._checkpoints = checkpoints
        self._publish = publish
        self._failed = failed
        self._reader = CheckpointReader(directory)
        # The next five are guarded by _changed: how many rounds were requested, and how many of these are done
        self._asked = self._done = 0
        # True while `finish` waits.
        self._is_urgent = False
        self._is_closing = False
        # True once callbacks have set what retention keeps, which is before the first commit.
        self._may_drop = False
        self._changed = threading.Condition()
        # The rest belongs to the upload thread. Manifests of the checkpoints that are complete in the store:
        self._complete: dict[str, ManifestHead] | None = None
        # False while the store may hold checkpoints that retention drops.
        self._is_followed = False
        # Files that were uploaded, of checkpoints that are not complete.
        self._sent: dict[str, set[str]] = {}
        self._refs: dict[str, str] = {}
        # Time of change and size of each file as it was last uploaded.
        self._files: dict[str, tuple[int, int]] = {}
        self._files_due = 0.0
        self._random = random.Random()
        self._thread = Thread(self._run, name="offloop-uploads", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Request a round: a new checkpoint is durable. Any thread; never waits for the store."""
        with self._changed:
            self._asked += 1
            self._may_drop = True
            self._changed.notify_all()

    def finish(self, wait_policy: WaitPolicy) -> bool:
        """Upload everything that exists now, and return whether it is done. Blocks, as long as `wait_policy` says."""
        with self._changed:
            self._asked += 1
            asked, self._is_urgent = self._asked, True
            self._changed.notify_all()

        def is_done(seconds: float) -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: self._done >= asked, seconds)

        try:
            return wait_policy(is_done)
        finally:
            with self._changed:
                self._is_urgent = False

    def missing(self) -> list[str]:
        """Return the local checkpoints that the store does not have, newest first. Blocks on the file system."""
        complete = self._complete or {}
        here = CheckpointReader(self._directory).checkpoints()
        return [info.name for info in reversed(here) if info.name not in complete]

    def close(self) -> None:
        """End the thread after what it is doing. Does not wait for a store that hangs. Calling it twice is fine."""
        self._remote.stopping.set()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    # The upload thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._asked > self._done, FILES_INTERVAL)
                if self._is_closing:
                    return
                asked, is_urgent = self._asked, self._is_urgent
            try:
                self._make_round(with_files=is_urgent or time.monotonic() >= self._files_due)
            except (
                BaseException
            ) as error:  # a store's client that calls sys.exit(), too: the end waits for us
                failures += 1
                self._report(error)
                self._rest(failures)
                continue
            failures = 0
            with self._changed:
                self._done = asked
                self._changed.notify_all()

    def _rest(self, failures: int) -> None:
        """Pause after a failure, for a shorter time while `finish` waits."""
        rest = self._random.uniform(0.5, 1.0) * min(FIRST_REST * 2 ** min(failures - 1, 10), LONGEST_REST)
        with self._changed:
            if not self._is_urgent:
                self._changed.wait_for(lambda: self._is_closing or self._is_urgent, rest)
            elif not self._is_closing:
                self._changed.wait_for(lambda: self._is_closing, min(rest, LONGEST_REST_AT_END))

    def _report(self, error: BaseException) -> None:
        if self._is_closing:
            return
        logger.error(
            "not uploaded, to be tried again: %s", error, exc_info=not isinstance(error, CheckpointError)
        )
        self._publish(UploadFailed(url=self._remote.url, error=describe(error)))
        if not isinstance(error, CheckpointError):
            wrapped = CheckpointError(f"the upload failed: {error!r}")
            wrapped.__cause__ = error
            error = wrapped
        self._failed(error)

    def _make_round(self, *, with_files: bool) -> None:
        """Upload what the store lacks, and delete there what retention drops."""
        if self._complete is None:
            heads = {name: self._remote.head(name) for name in self._remote.checkpoint_names()}
            self._complete = {name: head for name, head in heads.items() if head is not None}
        tried: set[str] = set()
        while (info := self._next(tried)) is not None:
            tried.add(info.name)
            if self._upload(info):
                self._is_followed = False
                self._follow()
        # Tags change without a new checkpoint
        self._update_refs()
        if not self._is_followed:
            self._follow()
        if with_files:
            self._upload_files()

    def _next(self, tried: set[str]) -> CheckpointInfo | None:
        """Return the newest local checkpoint that the store lacks."""
        assert self._complete is not None
        for info in reversed(self._reader.checkpoints()):
            if info.name not in self._complete and info.name not in tried:
                return info
        return None

    def _upload(self, info: CheckpointInfo) -> bool:
        """Upload a checkpoint; False if retention removed it here before its turn."""
        assert self._complete is not None
        started = time.monotonic()
        with self._checkpoints.held(info.name):
            if not info.path.exists():
                return False
            self._remote.upload_checkpoint(info, self._sent.setdefault(info.name, set()))
        self._sent.pop(info.name, None)
        self._complete[info.name] = info.manifest
        self._publish(
            CheckpointUploaded(
                url=f"{self._remote.url}/{CHECKPOINTS}/{info.name}",
                uploaded_step=info.step,
                bytes=info.bytes,
                seconds=time.monotonic() - started,
            )
        )
        return True

    def _follow(self) -> None:
        """Update the refs of the store; delete what retention drops and what earlier attempts left incomplete."""
        assert self._complete is not None
        self._update_refs()
        if not self._may_drop or not self._complete:
            return
        here = {info.name for info in self._reader.checkpoints()}
        heads = list(self._complete.values())
        best = best_of(heads, self._checkpoints.retention)
        newest = max(heads, key=lambda head: age(head.name))
        tagged = [*self._reader.tags().values(), *self._remote.tags().values()]
        pinned = {*here, *tagged, *filter(None, [newest.parent, None if best is None else best.name])}
        kept = select_kept_by_any(heads, self._checkpoints.retention, pinned=pinned)
        for name in self._remote.checkpoint_names():
            is_dropped = name in self._complete and name not in kept
            is_half = name not in self._complete and name not in here and age(name) < age(newest.name)
            if is_dropped or (is_half and self._remote.head(name) is None):
                self._complete.pop(name, None)
                self._remote.delete_checkpoint(name)
        self._is_followed = True

    def _update_refs(self) -> None:
        """Point `last`, `best` and the tags of the store to checkpoints that are complete there."""
        assert self._complete is not None
        heads = list(self._complete.values())
        refs = {f"tags/{tag}": name for tag, name in self._reader.tags().items() if name in self._complete}
        if heads:
            refs["last"] = max(heads, key=lambda head: age(head.name)).name
        if best := best_of(heads, self._checkpoints.retention):
            refs["best"] = best.name
        for ref, name in refs.items():
            if self._refs.get(ref) != name:
                self._remote.set_ref(ref, name)
                self._refs[ref] = name

    def _upload_files(self) -> None:
        """Upload the run's other files that have changed."""
        started = time.monotonic()
        for folder, folders, files in os.walk(self._directory):
            inside = Path(folder).relative_to(self._directory)
            if inside == Path():
                folders[:] = [each for each in folders if each not in (CHECKPOINTS, REFS)]
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for file in sorted(files):
                if not file.startswith(".") and (inside / file) != Path(LOCK):
                    self._upload_file((inside / file).as_posix())
        now = time.monotonic()
        self._files_due = now + max(FILES_INTERVAL, (now - started) / FILES_SHARE)

    def _upload_file(self, name: str) -> None:
        source = self._directory / name
        copy = self._directory / ".upload"
        try:
            status = source.lstat()
            mark = (status.st_mtime_ns, status.st_size)
            if self._files.get(name) == mark or not stat.S_ISREG(status.st_mode):
                # Unchanged, or a link, whose target does not belong to the run
                return
            # A link of this name would be followed
            copy.unlink(missing_ok=True)
            # The file may grow while it is uploaded
            shutil.copyfile(source, copy)
        except FileNotFoundError:
            return
        try:
            if source.suffix in (".jsonl", ".csv"):
                _end_with_a_line(copy)
            self._remote.put(copy, name)
        finally:
            copy.unlink(missing_ok=True)
        self._files[name] = mark


def claim_remote(
    remote: RemoteRun, description: dict[str, Any], *, is_new: bool, until: Callable[[], bool]
) -> None:
    """Write `run.json` to the remote directory before a run begins.

    A wrong bucket or missing credentials then show at once, not after hours. Blocks, for the network.

    Args:
        remote: The run's directory in the store.
        description: The content of `run.json`.
        is_new: Whether the store must not have a run of this name.
        until: Gives up when it returns True.

    Raises:
        RunNameTakenError: The store has a run of this name.
        RemoteError: The store did not accept the file in time.
    """
    taken: Future[bool] = Future()

    def claim() -> None:
        try:
            is_taken = is_new and (remote.read(RUN_JSON) is not None or bool(remote.checkpoint_names()))
            if not is_taken:
                remote.put_bytes(format_run_json(description), RUN_JSON)
            taken.set_result(is_taken)
        except BaseException as error:
            taken.set_exception(error)

    # In a daemon thread: a store may hang for ever
    threading.Thread(target=claim, name="offloop-claim", daemon=True).start()
    deadline = time.monotonic() + CLAIM_TIMEOUT
    while not taken.done() and not until() and time.monotonic() < deadline:
        wait([taken], timeout=0.1)
    if not taken.done():
        remote.stopping.set()
        raise RemoteError(remote.url, "the store did not answer" if not until() else "the run was cancelled")
    if taken.result():
        raise RunNameTakenError(remote.url)


def _end_with_a_line(path: Path) -> None:
    """Cut off an incomplete last line."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            position = start
        file.truncate(0)
