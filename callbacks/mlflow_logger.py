"""MLflowLogger: log a run to an MLflow tracking server, database or folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from offloop.callbacks.alerts import Alert
from offloop.callbacks.tracking import TIMEOUT, Entry, LogModel, Model, Point, TrackingLogger, expect_package
from offloop.engine import ConfigError, first_use
from offloop.engine.argument_hints import explains_arguments

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_METRICS: Final = 1000
MAX_PARAMS: Final = 100
"""Limits of one request of the REST API (MLflow's documentation of `runs/log-batch`)."""
STATUSES: Final = {
    "completed": "FINISHED",
    "stopped": "FINISHED",
    "cancelled": "KILLED",
    "failed": "FAILED",
}


class MLflowLogger(TrackingLogger):
    """Logs a run to MLflow: hyperparameters, metrics over steps, alerts, the status, and checkpoints on request.

    Metrics keep their names. Alerts are tags, `alert.<step>`. A resumed attempt continues the same MLflow run, whose id
    is stored in the run's directory. MLflow deletes nothing: what the earlier attempt logged after the checkpoint
    stays, and the hyperparameters are those of the first attempt.

    Training never waits for the server, and the end of the run at most `timeout`. Up to 10,000 points are queued in
    memory and sent once a second in one request; `lost` counts what could not be sent. MLflow's own settings bound one
    request (`MLFLOW_HTTP_REQUEST_TIMEOUT`, `MLFLOW_HTTP_REQUEST_MAX_RETRIES`).

    Requires MLflow: `pip install 'offloop[mlflow]'` (its small client) or `pip install mlflow`.
    """

    @explains_arguments()
    def __init__(
        self,
        experiment_name: str = "Default",
        *,
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        log_model: LogModel = False,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        timeout: float = TIMEOUT,
        runs_in: Literal["here", "process"] | None = None,
    ) -> None:
        """Choose the experiment and what to log.

        Args:
            experiment_name: Name of the experiment, which is created if it does not exist.
            tracking_uri: URI of the server (`http://...`), database (`sqlite:///mlflow.db`) or folder. None:
                `MLFLOW_TRACKING_URI`, or that of `mlflow.set_tracking_uri`.
            run_name: Name that MLflow shows. None: the run's id.
            tags: Tags of the MLflow run.
            log_model: Upload checkpoints as artifacts: True the best one at the end, `"all"` each when it is saved.
            every_seconds: Seconds between logged steps, above 0. None: 1.0, unless `every_n_steps` is given.
            every_n_steps: Steps between logged steps, at least 1.
            timeout: Seconds to wait at the end for what is still queued, above 0; at most the run's `drain_timeout`.
            runs_in: `"here"` logs in a thread of this process, `"process"` in a process of its own. None: `"here"`.

        Raises:
            ModuleNotFoundError: MLflow is not installed.
        """
        expect_package("mlflow", "mlflow")
        with first_use("mlflow"):
            import mlflow.entities
            import mlflow.exceptions
            import mlflow.tracking

        if not isinstance(experiment_name, str) or not experiment_name:
            raise ConfigError(f"experiment_name must be a name, got {experiment_name!r}")
        self.experiment_name = experiment_name
        self.tracking_uri = _absolute(tracking_uri or mlflow.get_tracking_uri())
        self.server = f"MLflow at {self.tracking_uri}"
        self.run_name = run_name
        self.tags = dict(tags or {})
        super().__init__(
            log_model=log_model,
            every_seconds=every_seconds,
            every_n_steps=every_n_steps,
            timeout=timeout,
            runs_in=runs_in,
        )

    def reset(self) -> None:
        super().reset()
        # Both are used by the sending thread only.
        self._client: MlflowClient | None = None
        self._has_created_run = False

    def connect(self) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri)
        if self.tracking_id is None:
            tags = {"offloop.run_id": self.run_id, **self.tags}
            run = client.create_run(
                self._experiment(client),
                run_name=self.run_name or self.run_id,
                tags=tags,
                start_time=round(1000 * self.start.time),
            )
            self._has_created_run = True
            self.remember(run.info.run_id)
        else:
            client.update_run(self.tracking_id, status="RUNNING")
        assert self.tracking_id is not None
        client.log_batch(self.tracking_id, tags=[RunTag("offloop.attempt", str(self.start.attempt))])
        if self._has_created_run:
            params = [Param(name, str(value)[:6000]) for name, value in self.parameters.items()]
            for start in range(0, len(params), MAX_PARAMS):
                client.log_batch(self.tracking_id, params=params[start : start + MAX_PARAMS])
        self._client = client

    def send(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._client, self.tracking_id
        assert client is not None and run_id is not None
        metrics = [
            Metric(_legal(name), value, round(1000 * entry.time), entry.step)
            for entry in entries
            if isinstance(entry, Point)
            for name, value in entry.values.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
        for entry in entries:
            if isinstance(entry, Alert):
                client.set_tag(run_id, f"alert.{entry.step}", f"{entry.rule}: {entry.message}"[:5000])
            elif isinstance(entry, Model):
                client.log_artifacts(run_id, os.fspath(entry.path), f"checkpoints/{entry.path.name}")
                if entry.is_best:
                    client.set_tag(run_id, "best_checkpoint", f"checkpoints/{entry.path.name}")

    def finish(self) -> None:
        assert self._client is not None and self.tracking_id is not None
        self._client.set_tag(self.tracking_id, "offloop.reason", self.reason[:5000] or self.status)
        self._client.set_terminated(self.tracking_id, STATUSES[self.status])

    def is_hopeless(self, error: Exception) -> bool:
        from mlflow.exceptions import MlflowException

        # A failed connection is one, too, with status 500.
        if isinstance(error, MlflowException):
            status = error.get_http_status_code()  # type: ignore[no-untyped-call]  # it has no types
            return 400 <= status < 500 and status not in (408, 429)
        return super().is_hopeless(error)

    def _experiment(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self.experiment_name)
        return client.create_experiment(self.experiment_name) if found is None else found.experiment_id


def _legal(name: str) -> str:
    """Return a metric's name as MLflow takes it: all but letters, digits and `_-. :/` is replaced."""
    return "".join(each if each.isalnum() or each in "_-. :/" else "_" for each in name)


def _absolute(uri: str) -> str:
    """Return a URI with an absolute path to its folder or SQLite file: the process may change its directory."""
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and path and not path.startswith((":", "/")):
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if ":" not in uri and ("/" in uri or uri.startswith((".", "~"))):
        return str(Path(uri).expanduser().absolute())
    return uri
