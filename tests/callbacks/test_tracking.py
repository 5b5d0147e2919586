"""callbacks/tracking.py and the loggers for TensorBoard, MLflow and W&B: what the real packages read back, and that a
server that refuses, or takes a connection and says nothing, costs the run nothing.
"""

import csv
import importlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when it is imported: tests talk to nobody

from offloop.callbacks import (
    Alert,
    Alerts,
    Below,
    MetricLogger,
    MLflowLogger,
    ModelCheckpoint,
    TensorBoardLogger,
    WandbLogger,
    tracking,
)
from offloop.callbacks.tracking import Entry, Point, Sender, expect_package
from offloop.engine import (
    Callback,
    ConfigError,
    EpochEnd,
    Event,
    Metrics,
    PictureSample,
    Run,
    RunHandle,
    StepEnd,
    StepPoint,
    TextSample,
    ValidationEnd,
    decides,
    in_step,
    replay,
)
from offloop.engine.testing import Recorder, WaitsFor, drive, tiny_loader, tiny_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of other people's packages
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class FailAt(Callback):
    """Ends a run in a bad way."""

    def __init__(self, step: int, act: Callable[[Run], object]) -> None:
        self.step, self.act = step, act

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.step:
            self.act(point.run)


def fail(run: Run) -> None:
    raise RuntimeError("injected")


def cancel(run: Run) -> None:
    run.cancel()


def rows_of(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


SCRIPT: list[Event] = [
    *[StepEnd(loss=1 / step, lr=0.1, step=step, metrics=Metrics(mine=7.0)) for step in range(1, 5)],
    ValidationEnd(step=4, metrics=Metrics(val_loss=0.5)),
    EpochEnd(step=4, metrics=Metrics(train_loss=0.25, val_loss=0.5, lr=0.1)),
    StepEnd(loss=0.125, lr=0.01, step=5, epoch=1, grad_norm=3.0),
]
LOSSES = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.125)]


# TensorBoard ---------------------------------------------------------------------------------------


def scalars_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the files as TensorBoard does, in the order of steps.

    It reads files in the order of their names, which end in a count: within a second, the tenth comes before the ninth.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={SCALARS: 0}).Reload()
    return {
        tag: sorted((each.step, each.value) for each in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def session_of(directory: Path) -> tuple[dict[str, Any], list[int]]:
    """Return the hyperparameters and the statuses that the HPARAMS tab reads."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    hyperparameters: dict[str, Any] = {}
    statuses = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    found = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    if found.HasField("session_start_info"):
                        for name, value in found.session_start_info.hparams.items():
                            hyperparameters[name] = getattr(value, value.WhichOneof("kind"))
                    else:
                        statuses.append(found.session_end_info.status)
    return hyperparameters, statuses


def approx(points: Sequence[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]  # it keeps float32


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    board = TensorBoardLogger(every_n_steps=1)
    own = {"width": 16, "data": {"name": "tiny", "folds": [1, 2]}}
    knobs = {"run_dir": str(tmp_path), "run_name": "run", "gradient_clip_val": 1.0, "hyperparameters": own}
    result = drive(board, events=SCRIPT, **knobs).result
    assert result.callback_errors == {}
    found = scalars_of(tmp_path / "run")
    assert found == {
        "loss": approx(LOSSES),
        "lr": approx([(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1), (5, 0.01)]),
        "mine": [(step, 7.0) for step in range(1, 5)],
        "epoch": [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (5, 1.0)],
        "val_loss": [(4, 0.5)],
        "train_loss": [(4, 0.25)],
        "grad_norm": [(5, 3.0)],
    }
    hyperparameters, statuses = session_of(tmp_path / "run")
    expected = {
        "width": 16.0,
        "data.name": "tiny",
        "data.folds": "[1, 2]",
        "optimizer": "SGD",
        "optimizer.lr": 0.1,
        "gradient_clip_val": 1.0,
    }
    assert expected.items() <= hyperparameters.items()
    # Knobs at their default are none
    assert "deterministic" not in hyperparameters
    assert statuses == [1]  # STATUS_SUCCESS


def test_tensorboard_in_a_directory_of_its_own_needs_no_run_directory(tmp_path: Path) -> None:
    board = TensorBoardLogger(log_dir=tmp_path / "board")
    result = tiny_trainer().train(tiny_loader(3), epochs=1, callbacks=[board])
    assert result.dir is None
    assert [step for step, _ in scalars_of(tmp_path / "board" / result.run_id)["loss"]] == [1, 3]


def test_tensorboard_shows_alerts_and_a_failure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    recorder = Recorder()
    told = [recorder, WaitsFor(recorder, Alert), Alerts(None, Below("loss", 100.0))]
    callbacks = [TensorBoardLogger(), *told, FailAt(5, fail)]
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train(tiny_loader(3), epochs=3, callbacks=callbacks)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (alert,) = events.Tensors("alerts/text_summary")
    assert b"below 100" in alert.tensor_proto.string_val[0]
    assert session_of(tmp_path / "run")[1] == [2]  # STATUS_FAILURE


class Shows(Callback):
    """In the training thread: at the step of the epoch's end."""

    @decides
    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(TextSample("code", "def f(): ..."))
        run.publish(TextSample("long", "long " * 10_000))
        run.publish(PictureSample("digits", torch.arange(6, dtype=torch.uint8).reshape(2, 3)))


@pytest.mark.parametrize("runs_in", ["here", "process"])
def test_tensorboard_shows_texts_and_pictures(tmp_path: Path, runs_in: Any) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    trainer.train(tiny_loader(3), epochs=2, callbacks=[TensorBoardLogger(runs_in=runs_in), Shows()])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [each.step for each in events.Images("digits")] == [3, 6]
    with Image.open(io.BytesIO(events.Images("digits")[0].encoded_image_string)) as image:
        assert list(image.getdata()) == [0, 1, 2, 3, 4, 5]
    texts = [
        events.Tensors(f"{name}/text_summary")[1].tensor_proto.string_val[0] for name in ("code", "long")
    ]
    assert texts == [b"def f(): ...", b"long " * 10_000]


def test_tensorboard_gets_the_pictures_of_a_run_that_is_replayed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tiny_trainer(run_dir=str(tmp_path)).train(tiny_loader(3), epochs=2, callbacks=[Shows()]).dir
    assert run_dir is not None
    replay(run_dir, callbacks=[TensorBoardLogger()], directory=tmp_path / "replayed")
    events = EventAccumulator(str(tmp_path / "replayed")).Reload()
    assert [each.step for each in events.Images("digits")] == [3, 6]
    assert events.Tensors("long/text_summary")[1].tensor_proto.string_val[0] == b"long " * 10_000


def test_resumed_run_goes_on_in_the_same_curves_and_cuts_what_came_after_the_checkpoint(
    tmp_path: Path,
) -> None:
    def train(*callbacks: Callback, resume: Any = None) -> Any:
        return tiny_trainer(run_dir=str(tmp_path), run_name="run").train(
            tiny_loader(4),
            tiny_loader(1),
            epochs=3,
            callbacks=[
                ModelCheckpoint(every_n_steps=2, save_last=False),
                TensorBoardLogger(every_n_steps=1),
                MetricLogger(every_n_steps=1),
                *callbacks,
            ],
            resume=resume,
        )

    with pytest.raises(RuntimeError, match="injected"):
        train(FailAt(7, fail))
    result = train(resume="last")
    assert result.callback_errors == {}
    found = scalars_of(tmp_path / "run")
    assert [step for step, _ in found["loss"]] == list(range(1, 13))
    assert [step for step, _ in found["val_loss"]] == [4, 8, 12]
    rows = rows_of(tmp_path / "run")
    assert found["loss"] == approx([(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]])
    assert session_of(tmp_path / "run")[1] == [1]  # that of the failure is cut too
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert {line["attempt"] for line in lines} == {0, 1}


def test_curves_of_an_attempt_whose_clock_was_ahead_are_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's clock is set back by an hour after the first attempt."""

    def train(epochs: int) -> None:
        callbacks = [ModelCheckpoint(), TensorBoardLogger(every_n_steps=1)]
        tiny_trainer(run_dir=tmp_path, run_name="run").train(
            tiny_loader(2), epochs=epochs, callbacks=callbacks, resume="auto"
        )

    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + 3600.0)
        train(1)
    train(2)
    train(3)
    assert sorted(step for step, _ in scalars_of(tmp_path / "run")["loss"]) == [1, 2, 3, 4, 5, 6]


# MLflow --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of MLflow's; the first one to use it makes its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def client_of(store: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=store)


def history_of(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client.get_metric_history(run_id, name))


@pytest.mark.slow
def test_mlflow_reads_back_what_was_logged(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it puts artifacts
    flow = MLflowLogger(
        "first",
        tracking_uri=store,
        every_n_steps=1,
        log_model=True,
        timeout=60,
    )
    trainer = tiny_trainer(run_dir=str(tmp_path), gradient_clip_val=1.0, hyperparameters={"width": 16})
    recorder = Recorder()
    callbacks = [
        recorder,
        WaitsFor(recorder, Alert),
        flow,
        MetricLogger(every_n_steps=1),
        ModelCheckpoint(),
        Alerts(None, Below("val_loss", 100.0)),
    ]
    result = trainer.train(tiny_loader(4), tiny_loader(2), epochs=2, callbacks=callbacks)
    assert result.callback_errors == {}
    assert result.dir is not None and flow.tracking_id is not None
    client = client_of(store)
    run = client.get_run(flow.tracking_id)
    rows = rows_of(result.dir)
    for name, wanted in [("loss", "loss"), ("val_loss", "val_loss"), ("train_loss", "train_loss")]:
        expected = sorted({(int(row["step"]), float(row[wanted])) for row in rows if row[wanted]})
        assert history_of(client, flow.tracking_id, name) == expected
    assert {"width": "16", "optimizer": "SGD", "gradient_clip_val": "1.0"}.items() <= run.data.params.items()
    assert run.info.run_name == result.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["offloop.reason"] == "epochs=2"
    assert "below 100" in run.data.tags["alert.4"]
    best = f"checkpoints/{(result.dir / 'refs' / 'best').read_text().strip()}"
    assert run.data.tags["best_checkpoint"] == best
    uploaded = {Path(each.path).name for each in client.list_artifacts(flow.tracking_id, best)}
    assert {"MANIFEST.json", "model.safetensors"} <= uploaded
    assert (flow.sent > 8, flow.lost) == (True, 0)


@pytest.mark.slow
def test_mlflow_in_a_process_gets_the_same(store: str, tmp_path: Path) -> None:
    flow = MLflowLogger("process", tracking_uri=store, every_n_steps=1, timeout=60, runs_in="process")
    flow.drain_timeout = 60
    trainer = tiny_trainer(run_dir=str(tmp_path), hyperparameters={"width": 16})
    callbacks = [flow, MetricLogger(every_n_steps=1)]
    result = trainer.train(tiny_loader(4), tiny_loader(2), epochs=2, callbacks=callbacks)
    assert result.callback_errors == {} and result.dir is not None
    client = client_of(store)
    experiment = client.get_experiment_by_name("process")
    (run,) = client.search_runs([experiment.experiment_id])
    assert {"width": "16", "optimizer": "SGD"}.items() <= run.data.params.items()
    assert (run.info.run_name, run.info.status) == (result.run_id, "FINISHED")
    for name in ("loss", "val_loss", "train_loss"):
        expected = sorted({(int(row["step"]), float(row[name])) for row in rows_of(result.dir) if row[name]})
        assert history_of(client, run.info.run_id, name) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("act", "status"), [(fail, "FAILED"), (cancel, "KILLED")])
def test_mlflow_says_how_a_run_ended(store: str, act: Any, status: str) -> None:
    flow = MLflowLogger("ends", tracking_uri=store, timeout=60)
    trainer = tiny_trainer(callbacks=[flow, FailAt(3, act)])
    if act is fail:
        with pytest.raises(RuntimeError, match="injected"):
            trainer.train(tiny_loader(4), epochs=2)
    else:
        assert trainer.train(tiny_loader(4), epochs=2).status == "cancelled"
    assert client_of(store).get_run(flow.tracking_id).info.status == status


@pytest.mark.slow
def test_resumed_run_continues_the_same_mlflow_run(store: str, tmp_path: Path) -> None:
    def train(*callbacks: Callback, resume: Any = None) -> str:
        flow = MLflowLogger("resumed", tracking_uri=store, every_n_steps=1, timeout=60)
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
        try:
            trainer.train(
                tiny_loader(4), epochs=2, callbacks=[ModelCheckpoint(), flow, *callbacks], resume=resume
            )
        except RuntimeError:
            pass
        assert flow.tracking_id is not None
        return flow.tracking_id

    first = train(FailAt(6, fail))
    again = train(resume="auto")
    assert again == first
    client = client_of(store)
    run = client.get_run(first)
    assert (run.info.status, run.data.tags["offloop.attempt"]) == ("FINISHED", "1")
    assert {step for step, _ in history_of(client, first, "loss")} == set(range(1, 9))
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_hyperparameters_are_there_although_the_connection_broke_when_they_were_sent(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.001)
    failures = [OSError("broken"), OSError("broken")]
    log_batch = MlflowClient.log_batch
    works = threading.Event()

    def fails_twice(self: Any, *arguments: Any, **named: Any) -> None:
        if failures:
            raise failures.pop()
        log_batch(self, *arguments, **named)
        works.set()

    class Wait(Callback):
        """The end would give up at the next failure."""

        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            assert works.wait(60)

    monkeypatch.setattr(MlflowClient, "log_batch", fails_twice)
    flow = MLflowLogger("broken", tracking_uri=store, timeout=60)
    drive(flow, Wait(), events=[EpochEnd(metrics=Metrics(train_loss=1.0))], hyperparameters={"width": 16})
    client = client_of(store)
    run = client.get_run(flow.tracking_id)
    assert run.data.params["width"] == "16"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_names_that_mlflow_refuses_are_mended(store: str) -> None:
    flow = MLflowLogger("names", tracking_uri=store, timeout=60)
    events = [StepEnd(loss=1.0, lr=0.1, step=1, metrics=Metrics(**{"a, b(c)=d": 2.0}))]
    assert drive(flow, events=events).result.callback_errors == {}
    assert history_of(client_of(store), flow.tracking_id or "", "a_ b_c__d") == [(1, 2.0)]


# Servers that are not there ------------------------------------------------------------------------


class SilentServer:
    """Takes connections and says nothing, until it is closed."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=50)
        self._taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._take)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def _take(self) -> None:
        try:
            while True:
                self._taken.append(self._listening.accept()[0])
        except OSError:
            pass

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        for each in self._taken:
            each.close()


def closed_port() -> str:
    """Return an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(params=["refuses", "is silent"])
def dead_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that nobody can talk to."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if request.param == "refuses":
        yield closed_port()
    else:
        server = SilentServer()
        yield server.url
        server.close()  # which is an answer to whoever still waits for one


def test_run_is_unharmed_by_a_dead_mlflow_server(dead_server: str, tmp_path: Path) -> None:
    def train(name: str, *callbacks: Callback) -> Any:
        return tiny_trainer(run_dir=str(tmp_path), run_name=name).train(
            tiny_loader(20), tiny_loader(2), epochs=5, callbacks=[MetricLogger(every_n_steps=1), *callbacks]
        )

    without = train("without")
    flow = MLflowLogger(tracking_uri=dead_server, every_n_steps=1, timeout=0.5)
    result = train("with", flow)
    assert result.status == "completed"
    assert [end.metrics for end in result.history] == [end.metrics for end in without.history]
    costs = result.callback_costs["MLflowLogger"]
    assert (costs.dropped, costs.events) == (0, 1 + 100 + 5 + 5 + 1)  # start, steps, validations, epochs, end
    assert (flow.sent, flow.lost) == (0, 100 + 5 + 5)
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows if row["loss"]] == [str(step) for step in range(1, 101)]
    lines = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) == 110
    (*_, last) = errors = result.callback_errors["MLflowLogger"]
    assert len(errors) <= 2  # that it cannot be reached, if that was known before the end; and what was lost
    assert f"MLflow at {dead_server} did not receive 110 of 110 points" in last


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between two goes."""
    for name in ("SEND_INTERVAL", "FIRST_PAUSE"):
        monkeypatch.setattr(tracking, name, 0.001)


class Server:
    """What a sender talks to: fails as it is told to."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.got: list[int] = []
        self.calls: list[str] = []
        self.has_changed = threading.Condition()

    def _answer(self, what: str) -> None:
        self.calls.append(what)
        error = self.failures.pop(0) if self.failures else None
        if error is not None:
            raise error

    def connect(self) -> None:
        self._answer("connect")

    def send(self, entries: Sequence[Entry]) -> None:
        self._answer("send")
        with self.has_changed:
            self.got += [entry.step for entry in entries if isinstance(entry, Point)]
            self.has_changed.notify()

    def finish(self) -> None:
        self._answer("finish")

    def sender(self) -> Sender:
        return Sender(
            "offloop-test",
            connect=self.connect,
            send=self.send,
            finish=self.finish,
            is_hopeless=lambda error: isinstance(error, ValueError),
        )


def point(step: int) -> Point:
    return Point(0.0, 0, step, {})


@pytest.mark.usefixtures("at_once")
def test_server_that_comes_back_gets_everything_in_order() -> None:
    down = [OSError("down"), OSError("down"), None, OSError("down"), OSError("down")]
    server = Server(*down)
    sender = server.sender()
    for step in range(250):
        sender.put(point(step))
    with server.has_changed:
        assert server.has_changed.wait_for(lambda: len(server.got) == 250, 60)
    sender.close(30)
    assert server.got == list(range(250))
    assert server.calls[:3] == ["connect"] * 3
    assert server.calls[-1] == "finish"
    assert (sender.sent, sender.lost, sender.problem) == (250, 0, "OSError: down")


@pytest.mark.usefixtures("at_once")
def test_what_a_server_will_never_take_is_left_out_and_counted() -> None:
    server = Server(None, ValueError("too long\nand a second line"))
    sender = server.sender()
    for step in range(250):
        sender.put(point(step))
    sender.close(30)
    assert sender.lost > 0 and sender.sent + sender.lost == 250
    assert server.got == list(range(sender.lost, 250))
    assert (server.calls[-1], sender.problem) == ("finish", "ValueError: too long")


def test_server_that_will_never_let_us_in_is_asked_once() -> None:
    server = Server(ValueError("no such user"))
    sender = server.sender()
    sender._thread.join()
    sender.put(point(1))
    sender.close(30)
    assert (server.calls, sender.lost, sender.is_given_up) == (["connect"], 1, True)


def test_memory_is_bounded_and_the_oldest_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_WAITING", 10)
    let_in = threading.Event()
    server = Server()
    monkeypatch.setattr(server, "connect", let_in.wait)
    sender = server.sender()
    for step in range(25):
        sender.put(point(step))
    let_in.set()
    sender.close(30)
    assert server.got == list(range(15, 25))
    assert (sender.sent, sender.lost) == (10, 15)


def test_end_is_not_kept_waiting_by_a_server_that_hangs() -> None:
    hangs = threading.Event()
    server = Server()
    server.connect = hangs.wait  # type: ignore[method-assign, assignment]  # the point of the test
    sender = server.sender()
    sender.put(point(1))
    sender.close(0.01)
    assert (sender.sent, sender.lost) == (0, 1)
    assert sender.problem == "it had not answered 0.01 s after the end"
    hangs.set()
    sender._thread.join()
    assert server.calls == []  # it came too late to send anything


# W&B: in processes of their own, because its service lives as long as its process -------------------


def records_of(path: Path) -> Iterator[Any]:
    """Read a run's records from W&B's file: blocks of 32 KiB of chunks, as in LevelDB's log."""
    record: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(parts)
            parts = b""


WANDB_SCRIPT = """
import logging, os, sys
from offloop.callbacks import Alert, Alerts, Below, MetricLogger, ModelCheckpoint, WandbLogger, wandb_logger
from offloop.engine import Callback, ConfigError, decides, in_step
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

wandb_logger.PROBE_TIMEOUT = 1.0
logging.basicConfig()
streams = sys.stdout, sys.stderr

try:
    WandbLogger("project")
except ConfigError as error:
    print(error)


class Fail(Callback):
    @in_step
    def after_step(self, point):
        if point.step == 6:
            raise RuntimeError("injected")


class UntilAlert(Callback):
    @decides
    def on_validation_end(self, event, run):
        seen.wait_for(Alert)


ids = []
for resume, more in [(None, [Fail()]), ("auto", [])]:
    logger = WandbLogger("project", mode="offline", tags=["tag"], every_n_steps=1,
                         log_model=True, timeout=60)
    seen = Recorder()
    told = [seen, UntilAlert(), Alerts(None, Below("val_loss", 100.0))]
    callbacks = [ModelCheckpoint(), logger, MetricLogger(every_n_steps=1), *told]
    try:
        result = tiny_trainer(run_dir="runs", run_name="offline", hyperparameters={"width": 16}).train(
            tiny_loader(4), tiny_loader(2), epochs=2, callbacks=[*callbacks, *more], resume=resume
        )
    except RuntimeError:
        continue
    finally:
        ids.append(logger.tracking_id)
    assert result.callback_errors == {}, result.callback_errors
    assert logger.lost == 0
assert ids[0] == ids[1] != None


def train(name, *callbacks):
    return tiny_trainer(run_dir="runs", run_name=name).train(tiny_loader(20), epochs=5, callbacks=callbacks)


there = WandbLogger("project", mode="offline", every_n_steps=1, timeout=60, runs_in="process")
there.drain_timeout = 60
result = train("process", there)
assert result.callback_errors == {}, result.callback_errors

without = train("without")
os.environ["WANDB_API_KEY"] = "0" * 40
for name in ("refuses", "is silent"):
    logger = WandbLogger("project", every_n_steps=1, timeout=60, settings={"base_url": os.environ[name]})
    result = train(name, logger)
    assert result.status == "completed"
    assert [end.metrics for end in result.history] == [end.metrics for end in without.history]
    assert result.callback_costs["WandbLogger"].dropped == 0
    assert (logger.sent, logger.lost, logger.url) == (105, 0, None), result.callback_errors
assert (sys.stdout, sys.stderr) == streams
"""


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A process with runs that are logged to W&B: the directory of them, what it printed, and its log."""
    directory = tmp_path_factory.mktemp("wandb")
    silent = SilentServer()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(directory), "NETRC": "none"}
    environment |= {"WANDB_ERROR_REPORTING": "false", "refuses": closed_port(), "is silent": silent.url}
    try:
        done = subprocess.run(
            [sys.executable, "-c", WANDB_SCRIPT],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        silent.close()
    assert done.returncode == 0, done.stderr
    return directory / "runs", done.stdout, done.stderr


@pytest.mark.slow
def test_wandb_reads_back_what_was_logged_and_a_resumed_run_keeps_its_id(
    wandb_runs: tuple[Path, str, str],
) -> None:
    run_dir = wandb_runs[0] / "offline"
    first, second = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name  # the id
    history: dict[Path, list[dict[str, Any]]] = {}
    for path in (first, second):
        records = list(records_of(path))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {"width": 16, "optimizer": "SGD", "run_id": "offline"}.items() <= config.items()
        assert (run.project, run.display_name, list(run.tags)) == ("project", "offline", ["tag"])
        history[path] = [
            {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        kinds = {record.WhichOneof("record_type") for record in records}
        assert "alert" in kinds
        if path == second:
            assert "artifact" in kinds or any(record.request.log_artifact.artifact.name for record in records)
        exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        assert exits == [1 if path == first else 0]
    losses = [line for line in history[second] if "loss" in line]
    assert [line["step"] for line in losses] == [5, 6, 7, 8]
    assert {line["attempt"] for line in losses} == {1}
    rows = {int(row["step"]): float(row["loss"]) for row in rows_of(run_dir) if row["loss"]}
    assert {line["step"]: line["loss"] for line in losses}.items() <= rows.items()
    assert [(line["step"], line["epoch"]) for line in history[second] if "val_loss" in line] == [(8, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_run_is_logged_offline_when_wandb_does_not_answer(
    server: str, wandb_runs: tuple[Path, str, str]
) -> None:
    runs, _, said = wandb_runs
    (path,) = (runs / server).glob("wandb/offline-run-*/run-*.wandb")
    kinds = [record.WhichOneof("record_type") for record in records_of(path)]
    assert kinds.count("history") == 105
    assert f"the run is logged offline; later: wandb sync {path.parent}" in said


@pytest.mark.slow
def test_wandb_in_a_process_gets_the_same(wandb_runs: tuple[Path, str, str]) -> None:
    (path,) = (wandb_runs[0] / "process").glob("wandb/offline-run-*/run-*.wandb")
    records = list(records_of(path))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {"optimizer": "SGD", "run_id": "process"}.items() <= config.items()
    kinds = [record.WhichOneof("record_type") for record in records]
    assert (kinds.count("history"), kinds.count("exit")) == (105, 1)


@pytest.mark.slow
def test_wandb_without_an_account_is_an_error_before_the_run(wandb_runs: tuple[Path, str, str]) -> None:
    assert wandb_runs[1].splitlines()[0] == (
        "there is no login to W&B: run `wandb login`, or give mode='offline'"
    )


# Arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"hyperparameters": {"width": 16}}, "loggers take those of the run: Trainer.hyperparameters="),
        ({"log_model": "best"}, "log_model must be False, True"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"experiment_name": ""}, "experiment_name must be a name"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=text):
        MLflowLogger(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "of"}, "mode must be"),
        ({"mode": "offline", "id": "mine"}, "id cannot be given"),
        (
            {"offline": True},
            r"WandbLogger\(\) takes no 'offline', nor does wandb.init; legal are project, name, mode,",
        ),
    ],
)
def test_wandb_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        WandbLogger("project", **arguments)


@pytest.mark.parametrize(
    ("make", "package"),
    [(TensorBoardLogger, "tensorboard"), (MLflowLogger, "mlflow"), (WandbLogger, "wandb")],
)
def test_missing_package_is_one_line_with_the_command(
    make: type[Callback], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ModuleNotFoundError) as caught:
        make()
    assert str(caught.value) == f"{package} is not installed: pip install 'offloop[{package}]'"


def test_package_that_is_broken_says_what_it_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'what_it_needs'"):
        expect_package("half_installed", "half")
