"""Storage: the directory of one run, here and in the remote store, from its first file to the last.

training thread        open: the directory locked, run.json, the remote directory claimed; uploads begin
a thread at the end    settle: checkpoints durable, then uploaded
a thread at the end    write_ending: run.json says how the run ended; uploads end; the lock given back
"""

import contextlib
import dataclasses
import functools
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offloop.engine.best import BestSoFar
from offloop.engine.bus.event_bus import Bus
from offloop.engine.catalog.labels import edit_labels
from offloop.engine.catalog.log_end import read_log_end, take_milestones
from offloop.engine.catalog.summary import Summary
from offloop.engine.checkpoint import CheckpointError, RemoteError, Retention
from offloop.engine.checkpoint.parts import PartsChannel
from offloop.engine.errors import MetricNotFoundError, describe
from offloop.engine.events import SCHEMA, Evaluated, Event, TrainStart, UploadFailed
from offloop.engine.monitor import EVALUATED
from offloop.engine.observers.durable_logs import DurableLogs
from offloop.engine.recovery.evaluations import Evaluations
from offloop.engine.recovery.rank_checkpoints import RankCheckpoints
from offloop.engine.recovery.run_checkpoints import Checkpoints
from offloop.engine.recovery.uploads import Uploads, claim_remote
from offloop.engine.run_dir import create_run_dir, describe_environment, read_run_json, write_run_json
from offloop.engine.session.lifetime import Lifetime
from offloop.engine.session.run_plan import RunPlan

logger = logging.getLogger("offloop")


class Storage:
    """What a run keeps on disk and in its remote directory. Everything that blocks says so."""

    def __init__(
        self,
        plan: RunPlan,
        directory: Path,
        bus: Bus,
        logs: DurableLogs,
        lifetime: Lifetime,
        evaluations: Evaluations,
    ) -> None:
        """Keep a run in `directory`. Nothing is written before `open`."""
        keys = [each.callback.best_by[0] for each in plan.handlers if each.callback.best_by is not None]
        # The metrics of evaluated checkpoints by which the best is chosen
        self._chosen_by = [key for key in keys if key.startswith(EVALUATED)]
        # The newest error of an evaluation. Written by any thread, read at the end
        self._evaluation_error = ""
        self._monitors = monitors = plan.monitors
        self._ranks = plan.ranks
        self._channel: PartsChannel | None = None
        of_rank = Checkpoints
        if plan.ranks is not None:
            ranks = plan.ranks
            self._channel = PartsChannel(
                ranks.client(),
                "parts",
                rank=ranks.rank,
                world_size=ranks.world_size,
                give_up=self._why_give_up,
            )
            of_rank = Checkpoints if ranks.is_first else RankCheckpoints
        self._lifetime = lifetime
        # None once the run has failed before the directory was its own. Written by the training thread.
        self.directory: Path | None = directory
        self.checkpoints = of_rank(
            directory,
            run_id=plan.run_id,
            optimizers=plan.setup.optimizers,
            model=plan.program.model,
            publish=bus.publish_or_log,
            retention=Retention(monitor=monitors.best, mode=monitors.best_direction),
            wait_policy=lifetime.wait,
            logs=logs,
            evaluations=evaluations,
            ranks=self._channel,
        )
        self._run_id = plan.run_id
        self._resume = plan.resume
        # Not the setup itself, which holds the optimizers: a program may keep the run.
        self._made_with = {
            "hyperparameters": dict(plan.setup.hyperparameters),
            "limits": dataclasses.asdict(plan.setup.limits),
            "device": str(plan.setup.device),
            "world_size": 1 if plan.ranks is None else plan.ranks.world_size,
        }
        self._config = plan.setup.config
        self._remote = plan.remote
        self._bus = bus
        self._summary = Summary(monitors.best, monitors.direction_of)
        # Guards the summary: the training thread and evaluators add to it.
        self._summary_lock = threading.Lock()
        # What run.json says; empty until the directory is this run's. Written by the training thread, read after it
        # has ended.
        self._description: dict[str, Any] = {}
        # Made by the training thread before the first event.
        self._uploads: Uploads | None = None
        # How long the end of the run waits for the store. Written by the upload thread, too: 0 if it ended the run.
        self._upload_deadline = math.inf

    @property
    def is_open(self) -> bool:
        """True once the directory is this run's."""
        return bool(self._description)

    # The training thread -------------------------------------------------------------------------

    def open(self, init_from: str | None) -> None:
        """Create the run's directory, or enter that of the run that is continued. Blocks.

        Args:
            init_from: Where the first weights came from, in words.

        Raises:
            RunNameTakenError: Another run has the directory, here or in the store.
            RunLockedError: The run to continue is still training, elsewhere.
            RemoteError: The store did not accept the run.
        """
        directory, resume = self.directory, self._resume
        assert directory is not None
        if self._ranks is not None and not self._ranks.is_first:
            self.checkpoints.attempt = 0 if resume is None else resume.attempt
            return
        now = time.time()
        description = {
            "schema": SCHEMA,
            "run_id": self._run_id,
            "attempt": 0 if resume is None else resume.attempt,
            "created": now,
            "started": now,
            "status": "running",
            "monitor": self._monitors.best,
            "mode": self._monitors.best_direction,
            **self._made_with,
            "config": self._config.as_settings(),
            "init_from": init_from,
            **describe_environment(),
        }
        if resume is not None:
            self.checkpoints.claim()
            # Takes the lock: a run that trains elsewhere is left alone
            self.checkpoints.open()
            self.checkpoints.attempt = resume.attempt
            if resume.over is not None:
                # run.json says that the run is over also if this attempt is killed
                description |= resume.over._asdict()
            before = read_run_json(directory)
            description["created"] = before.get("created", description["created"])
            description["init_from"] = init_from or before.get("init_from")
        if self._remote is not None:
            claim_remote(self._remote, description, is_new=resume is None, until=self._lifetime.is_cancelled)
        if resume is None:
            create_run_dir(directory)
            # First: a reader must not take a run that has just begun for one whose process was killed
            self.checkpoints.claim()
            if self._config.tags or self._config.note:
                edit_labels(directory, version=0, tags=self._config.tags, note=self._config.note)
            write_run_json(directory, description)
            if self._ranks is not None:
                # Before another rank writes: opening removes what interrupted saves have left
                self.checkpoints.open()
        else:
            write_run_json(directory, description)
        self._description = description
        if self._remote is not None:
            uploads = Uploads(
                self._remote,
                directory,
                self.checkpoints,
                publish=self._bus.publish_or_log,
                failed=self._upload_failed,
            )
            # Raises where the system gives no thread. Then there are no uploads to wait for
            uploads.start()
            self._uploads, self.checkpoints.on_saved = uploads, uploads.wake

    def find_out_what_is_shared(self, agree: Callable[[Any], Any]) -> None:
        """Find out whether this rank sees the directory of rank 0. After `open`, in the training thread of all ranks.

        Args:
            agree: Returns rank 0's value, on all ranks.
        """
        assert self.directory is not None and self._channel is not None and self._ranks is not None
        name = None
        if self._ranks.is_first:
            # A name that no other directory has
            with tempfile.NamedTemporaryFile(prefix=".shared-", dir=self.directory) as mark:
                name = agree(Path(mark.name).name)
                agree(None)
            return
        name = agree(None)
        self._channel.is_shared = (self.directory / name).exists()
        agree(None)
        if not self._channel.is_shared:
            logger.info("rank %d does not see %s: rank 0 writes its parts", self._ranks.rank, self.directory)

    def _why_give_up(self) -> str:
        """Return why a rank's part of a checkpoint is not to be waited for any more; empty if it is. Any thread."""
        failure = self._lifetime.failure
        if failure is not None:
            return describe(failure)
        return "the run ends in haste" if self._lifetime.signal_count > 1 else ""

    def note(self, milestone: Event) -> None:
        """Note what run.json is to say about the run at its end. Training thread."""
        if not self.is_open:
            return
        if isinstance(milestone, TrainStart):
            self._description |= {
                "parameters": milestone.parameters,
                "steps_per_epoch": milestone.steps_per_epoch,
            }
            if milestone.attempt and self.directory is not None:
                # The log was cut back to the checkpoint already
                with contextlib.suppress(OSError):
                    take_milestones(self.directory, self._summary)
        with self._summary_lock:
            self._summary.take(milestone)

    def disown(self) -> None:
        """Give the directory up if it is not open: it was not made, or is another run's."""
        if not self.is_open:
            self.directory = None

    def _upload_failed(self, error: CheckpointError) -> None:
        """End the run if that was asked for. Upload thread, or a thread at the end."""
        assert self._config.remote is not None
        if self._config.remote.on_error == "raise":
            # The run does not wait for a store that has ended it
            self._upload_deadline = 0.0
            self._lifetime.fail(error)

    # The end -------------------------------------------------------------------------------------

    def judge(self, event: Evaluated) -> None:
        """Note how a checkpoint was evaluated. Without a metric that chooses the best, the run fails. Any thread."""
        missing = [key for key in self._chosen_by if key not in event.metrics]
        if event.error is not None:
            self._evaluation_error = event.error
        elif missing:
            self._lifetime.fail(MetricNotFoundError(missing[0], event.metrics))
        self.checkpoints.judge(event)
        with self._summary_lock:
            self._summary.take(event)

    def finish_saving(self, ending_of: Callable[[], Mapping[str, Any]]) -> None:
        """Wait until accepted checkpoints are durable and announced, before evaluations are waited for. Blocks."""
        self.checkpoints.flush()
        self._write_stop(ending_of())

    def _write_stop(self, ending: Mapping[str, Any]) -> None:
        """Write at once that a callback has stopped the run.

        If the process is killed while callbacks drain, the next attempt must not train on.
        """
        if "stopped_by" in ending and self.is_open:
            assert self.directory is not None
            with contextlib.suppress(OSError):
                write_run_json(self.directory, {**self._description, **ending})

    def settle(self, ending_of: Callable[[], Mapping[str, Any]], best: BestSoFar) -> None:
        """Wait until accepted checkpoints are durable and uploaded. Blocks.

        Args:
            ending_of: Returns what run.json is to say about the end. Asked when checkpoints are durable: until then a
                callback may still fail.
            best: Learns which checkpoint holds the best moment.
        """
        self.checkpoints.flush()
        self._write_stop(ending_of())
        if self.checkpoints.evaluations.every is not None:
            self.checkpoints.give_up_evaluations()
            self.checkpoints.flush()
        self.checkpoints.locate(best)
        if self._chosen_by and best.moment is None:
            why = f", which failed with {self._evaluation_error}" if self._evaluation_error else ""
            logger.warning(
                "run %s has no best checkpoint by %s: it depends on evaluations%s",
                self._run_id,
                best.monitor,
                why or ", and none gave a finite value",
            )
        if self._uploads is not None:
            assert self._config.remote is not None
            seconds = self._config.remote.timeout
            if self._lifetime.is_cancelled() and self._lifetime.failure is None:
                # A caller that cancelled the run waits for its end
                seconds = min(seconds, self._config.drain_timeout)
            self._upload_deadline = min(self._upload_deadline, time.perf_counter() + seconds)
            if not self._await_uploads(self._uploads):
                self._report_missing(self._uploads)
        self.checkpoints.close()
        if not self.is_open:
            self.checkpoints.leave()

    def write_ending(self, ending: Mapping[str, Any]) -> None:
        """Write how the run ended, here and in the store, and give the directory back. Blocks."""
        assert self.directory is not None
        try:
            write_run_json(self.directory, {**self._description, **ending, **self._values()})
            if self._uploads is not None:
                if not self._await_uploads(self._uploads):
                    logger.warning("%s does not say how the run ended", self._remote and self._remote.url)
                self._uploads.close()
        finally:
            # Not before: callbacks were handling events, and a reader takes a run whose lock is free for killed
            self.checkpoints.leave()

    def _values(self) -> dict[str, Any]:
        """Return last and best values of all metrics, so that a list of runs reads one small file of each. Blocks."""
        assert self.directory is not None
        values, sparkline = self._summary.as_settings(), self._summary.sparkline
        with contextlib.suppress(OSError):
            # Values of steps, of which the summary knows none
            end = read_log_end(self.directory, is_short=True)
            values = {**end.summary.as_settings(), **values}
            sparkline = sparkline or end.sparkline
        return {"summary": values, "sparkline": sparkline}

    def _await_uploads(self, uploads: Uploads) -> bool:
        """Wait until everything is uploaded, or the time for it is up. A second signal ends it at once. Blocks."""
        return uploads.finish(
            functools.partial(self._lifetime.wait, deadline=self._upload_deadline, haste=0.0)
        )

    def _report_missing(self, uploads: Uploads) -> None:
        """Report what the remote directory lacks at the end of the run."""
        assert self._remote is not None
        missing = uploads.missing()
        what = f"checkpoints {', '.join(missing)}" if missing else "the logs"
        error = RemoteError(self._remote.url, f"at the end of the run, {what} were not uploaded in time")
        logger.error("%s; they are in %s", error, self.directory)
        self._bus.publish_or_log(UploadFailed(url=self._remote.url, error=f"RemoteError: {error}"))
        self._upload_failed(error)
