"""WandbLogger: log a run to Weights & Biases."""

import http.client
import importlib
import inspect
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from offloop.callbacks.alerts import Alert
from offloop.callbacks.tracking import TIMEOUT, Entry, LogModel, Model, Point, TrackingLogger, expect_package
from offloop.engine import ConfigError, checks
from offloop.engine.argument_hints import explains_arguments

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger("offloop")

Mode = Literal["online", "offline", "disabled"]

PROBE_TIMEOUT = 10.0
INIT_TIMEOUT: Final = 60.0
"""Seconds for W&B to answer, and to open the run, before the run is logged to disk instead."""
OURS: Final = ("project", "name", "mode", "config", "dir", "id", "resume", "reinit", "settings")
"""Arguments of `wandb.init` that this logger sets."""


class WandbLogger(TrackingLogger):
    """Logs a run to Weights & Biases: hyperparameters, metrics, alerts, the status, and checkpoints on request.

    Charts are drawn over `step`, the number of optimizer steps. A resumed attempt continues the same W&B run, whose id
    is stored in the run's directory; what the earlier attempt logged after the checkpoint stays, with its `attempt`.

    Training never waits for W&B, and the end of the run at most `timeout`. If W&B does not answer when the run starts,
    the run is logged offline, into `wandb/` in the run's directory, and the log shows how to upload it (`wandb sync`).
    If W&B stops answering later, its own process keeps everything on disk. `lost` counts what could not be handed to
    that process. Neither stdout nor stderr is captured, unless `settings={"console": "auto"}` asks for it.

    Requires wandb: `pip install 'offloop[wandb]'`, and `wandb login` once.
    """

    server = "Weights & Biases"

    @explains_arguments()
    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        mode: Mode | None = None,
        log_model: LogModel = False,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        timeout: float = TIMEOUT,
        runs_in: Literal["here", "process"] | None = None,
        settings: Mapping[str, Any] | None = None,
        **init: Any,
    ) -> None:
        """Choose the project and what to log.

        Args:
            project: Name of the project. None: `WANDB_PROJECT`, or W&B's default.
            name: Name that W&B shows. None: the run's id.
            mode: `"online"`, `"offline"` (upload later with `wandb sync`) or `"disabled"`. None: `WANDB_MODE`, or
                online.
            log_model: Upload checkpoints as artifacts: True the best one at the end, `"all"` each when it is saved.
            every_seconds: Seconds between logged steps, above 0. None: 1.0, unless `every_n_steps` is given.
            every_n_steps: Steps between logged steps, at least 1.
            timeout: Seconds to wait at the end for what is still queued, above 0; at most the run's `drain_timeout`.
            runs_in: `"here"` logs in a thread of this process, `"process"` in a process of its own. None: `"here"`.
            settings: Fields of `wandb.Settings`.
            init: Further arguments of `wandb.init`: `entity`, `group`, `tags`, `notes`, `job_type`, ...

        Raises:
            ModuleNotFoundError: wandb is not installed.
            ConfigError: A value is out of range, or the mode is online without a login.
        """
        self._wandb = expect_package("wandb", "wandb")
        self.mode = mode or os.environ.get("WANDB_MODE") or "online"
        checks.choice("mode", self.mode, ("online", "offline", "disabled"))
        if given := sorted(set(init) & set(OURS)):
            raise ConfigError(f"{given[0]} cannot be given to WandbLogger: it is set by the run")
        legal = inspect.signature(self._wandb.init).parameters
        for each in init:
            if each not in legal:
                raise ConfigError(
                    f"WandbLogger() takes no {each!r}, nor does wandb.init; legal are project, name, mode, "
                    "log_model, every_seconds, every_n_steps, timeout, settings and for wandb.init "
                    f"{', '.join(sorted(set(legal) - set(OURS)))}"
                )
        self.settings = dict(settings or {})
        is_known = (
            self.mode != "online" or "base_url" in self.settings or bool(os.environ.get("WANDB_API_KEY"))
        )
        if not is_known and not self._wandb.login(prompt=False, verify=False):
            raise ConfigError("there is no login to W&B: run `wandb login`, or give mode='offline'")
        self.project = project
        self.name = name
        self.init = init
        super().__init__(
            log_model=log_model,
            every_seconds=every_seconds,
            every_n_steps=every_n_steps,
            timeout=timeout,
            runs_in=runs_in,
        )

    def reset(self) -> None:
        super().reset()
        self.url: str | None = None
        """Address of the run at W&B; None offline, and with `runs_in="process"`, where the log has it."""
        # Used by the sending thread only.
        self._run: wandb.Run | None = None

    def connect(self) -> None:
        wandb = self._wandb
        if self.tracking_id is None:
            self.remember(importlib.import_module("wandb.sdk.lib.runid").generate_id())
        mode, why = self.mode, ""
        if mode == "online":
            mode, why = self._probe()
        try:
            self._run = self._open(mode)
        except wandb.errors.CommError as error:
            # It has stopped answering. The id stays in use until the process ends, so take another one.
            why = str(error).splitlines()[0]
            self.remember(importlib.import_module("wandb.sdk.lib.runid").generate_id())
            self._run = self._open("offline")
        if why:
            logger.warning(
                "W&B does not answer (%s): the run is logged offline; later: wandb sync %s",
                why,
                Path(self._run.dir).parent,
            )
        self.url = None if self._run.offline else self._run.url
        if self.url:
            logger.info("W&B: %s", self.url)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _probe(self) -> tuple[str, str]:
        """Return the mode to use: offline, with the reason, if the server does not answer."""
        url = self.settings.get("base_url") or self._wandb.setup().settings.base_url
        try:
            urllib.request.urlopen(url, timeout=PROBE_TIMEOUT).close()
        except urllib.error.HTTPError as error:
            # An answer, too.
            error.close()
        except (OSError, http.client.HTTPException) as error:
            return "offline", str(error)
        return "online", ""

    def _open(self, mode: str) -> "wandb.Run":
        settings = {
            # A worker process forked while output is captured could inherit a held lock.
            "console": "off",
            "silent": True,
            "init_timeout": INIT_TIMEOUT,
            # Do not wait for an answer to a question on the terminal.
            "login_timeout": 1.0,
            # W&B gives up by itself before the sending thread is abandoned.
            "finish_timeout": self.timeout / 2,
            **self.settings,
        }
        run: wandb.Run = self._wandb.init(
            project=self.project,
            name=self.name or self.run_id,
            id=self.tracking_id,
            resume="allow" if self.start.attempt and mode == "online" else None,
            mode=mode,
            dir=None if self.run_dir is None else str(self.run_dir),
            config={**self.parameters, "run_id": self.run_id},
            # Several runs in a process, the user's own among them, do not interfere.
            reinit="create_new",
            settings=self._wandb.Settings(**settings),
            **self.init,
        )
        return run

    def send(self, entries: Sequence[Entry]) -> None:
        run = self._run
        assert run is not None
        for entry in entries:
            if isinstance(entry, Point):
                run.log(
                    {
                        **entry.values,
                        "epoch": entry.epoch,
                        "step": entry.step,
                        "attempt": self.start.attempt,
                        "time": entry.time,
                    }
                )
            elif isinstance(entry, Alert):
                run.alert(title=entry.rule, text=entry.message)
            elif isinstance(entry, Model):
                artifact = self._wandb.Artifact(
                    f"checkpoint-{run.id}", type="model", metadata={"step": entry.step}
                )
                artifact.add_dir(os.fspath(entry.path))
                aliases = ["latest", f"step-{entry.step}", *(["best"] if entry.is_best else [])]
                run.log_artifact(artifact, aliases=aliases)

    def finish(self) -> None:
        assert self._run is not None
        self._run.summary.update({"status": self.status, "reason": self.reason})
        self._run.finish(exit_code=0 if self.status in ("completed", "stopped") else 1)
