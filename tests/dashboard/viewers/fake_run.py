"""A run that tests drive by hand."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from offloop.dashboard.runs.run_source import ProcessRun
from offloop.engine import Command, ConfigError, RunEndedError, SampleFiles, Validate


class FakeRun:
    """What a hub needs of a run, driven by hand: commands are futures that the test completes."""

    def __init__(self, id: str = "run") -> None:
        self.id = id
        self.state = "running"
        self.step = 0
        self.dir = None
        self.is_saving = False
        self.failure: BaseException | None = None
        self.monitor = self.default_monitor = "val_loss"
        self.validation_batch = 0
        self.interrupted = False
        self.hyperparameters: dict[str, Any] = {}
        self.trainer = SimpleNamespace(optimizers={"default": None})
        self.callback_costs: dict[str, Any] = {}
        self.refused = {"checkpoint": "the run has no directory to save into"}
        self.samples = SampleFiles(None)
        self.given: list[tuple[Command[Any], str, Future[Any]]] = []

    def direction_of(self, key: str) -> str | None:
        return "min" if "loss" in key else None

    def stack(self) -> str:
        return 'File "/home/me/train.py", line 7, in slow_loader'

    def give_nowait(self, command: Command[Any], *, by: str) -> "Future[Any]":
        if command.name in self.refused:
            raise ConfigError(self.refused[command.name])
        if isinstance(command, Validate):
            raise RunEndedError("validate came too late: the run is over")
        future: Future[Any] = Future()
        self.given.append((command, by, future))
        return future


def source_of(run: FakeRun) -> ProcessRun:
    return ProcessRun(run)  # type: ignore[arg-type]
