"""dashboard/callback.py in real runs: when the page comes and goes, what it shows, what it can do."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pytest
import torch
from memory_link import PageModel
from socket_viewer import PATIENCE, SocketViewer, exchange, request
from warm_python import ScriptProcess, WarmPython

from offloop.callbacks import ResourceMonitor
from offloop.dashboard import Dashboard, callback
from offloop.dashboard.protocol.from_viewer import CommandRequest, RangeQuery, Watch
from offloop.engine import (
    Callback,
    CommandApplied,
    ConfigError,
    Event,
    Metrics,
    RunNameTakenError,
    Sample,
    StepEnd,
    StepPoint,
    Trainer,
    in_step,
)
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_trainer

T = TypeVar("T")


@pytest.fixture(scope="module", autouse=True)
def torch_is_complete() -> None:
    """With its first optimizer torch imports half of itself, which is seconds that no event loop shall be held."""
    tiny_trainer()


@pytest.fixture(autouse=True)
def a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No keys in the user's own directory, and no server left to the next test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield
    assert callback._shared._server is None, "a server was left"


def quiet(**options: Any) -> Dashboard:
    return Dashboard(**({"port": 0, "quiet": True} | options))


class Gated:
    """A loader that waits before its batch number `at`."""

    def __init__(self, batches: int = 8, *, at: int = 4) -> None:
        self.batches = tiny_batches(batches)
        self.at = at
        self.gate = threading.Event()
        self.reached = threading.Event()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            if number == self.at:
                self.reached.set()
                assert self.gate.wait(PATIENCE)
            yield batch


class Endless:
    """A loader without an end, of steps that take a moment."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from tiny_batches(4)


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Do something that blocks."""
    return await anyio.to_thread.run_sync(partial(work, *arguments))


def in_background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def steps_of(page: Any, key: str = "loss") -> int:
    """Return how many points of a curve a page has."""
    ids = {name: number for number, name in page.series.items()}
    return len(page.points.get(ids.get(key, -1), ()))


def has_seen_the_end(key: str, page: PageModel) -> bool:
    """True if a page watches a run that is completed."""
    is_watched = page.run is not None and page.run.key == key
    return (
        is_watched and page.status is not None and page.status.run == key and page.status.state == "completed"
    )


def knows(key: str, page: PageModel) -> bool:
    return key in page.runs and page.run is not None


# When it comes and goes --------------------------------------------------------------------------


@pytest.mark.anyio
async def test_it_opens_with_the_run_and_closes_after_telling_how_it_ended() -> None:
    dashboard, loader = quiet(), Gated()
    with pytest.raises(RuntimeError, match="not open"):
        _ = dashboard.url
    async with tiny_trainer().start(loader, tiny_loader(2), epochs=1, callbacks=[dashboard]) as run:
        viewer = await in_thread(SocketViewer, dashboard.url)
        await in_thread(viewer.wait, lambda page: steps_of(page) == 4)
        loader.gate.set()
    assert await in_thread(viewer.wait_closed) == (1001, "the run is over")
    viewer.close()
    page = viewer.page
    assert page.run is not None and page.run.key == run.id and page.run.max_steps is None
    assert page.status is not None and page.status.state == "completed" and page.status.progress == 1.0
    assert page.bye == "the run is over"
    assert steps_of(page) == 8 and steps_of(page, "val_loss") == 1
    assert page.milestones[0]["type"] == "TrainStart" and page.milestones[-1]["type"] == "TrainEnd"
    with pytest.raises(RuntimeError, match="not open"):
        _ = dashboard.url


def test_several_runs_share_one_server() -> None:
    """Two `train()` in two threads at once; it closes with the second."""
    dashboards, loaders = [quiet(), Dashboard(quiet=True)], [Gated(), Gated()]
    threads = []
    for number in range(2):
        work = partial(
            tiny_trainer(run_name=f"run{number}").train,
            loaders[number],
            epochs=1,
            callbacks=[dashboards[number]],
        )
        threads.append(in_background(work))
        assert loaders[number].reached.wait(PATIENCE)
    assert dashboards[0].url == dashboards[1].url
    with SocketViewer(dashboards[0].url) as viewer:
        viewer.wait(lambda page: page.hello)
        assert viewer.page.hello is not None
        assert [run.name for run in viewer.page.hello.runs] == ["run0", "run1"]
        loaders[0].gate.set()
        threads[0].join(PATIENCE)
        viewer.wait(lambda page: page.runs)  # it is over, and the page is still there
        viewer.say(Watch(run="run0"))
        viewer.wait(partial(has_seen_the_end, "run0"))
        loaders[1].gate.set()
        threads[1].join(PATIENCE)
        assert viewer.wait_closed()[0] == 1001


def test_other_settings_for_the_same_server_are_refused() -> None:
    with quiet(), pytest.raises(ValueError, match="other settings"):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[quiet(read_only=True)])


def test_a_tab_finds_the_next_run_of_the_process() -> None:
    """Also one of the same name."""
    with quiet() as dashboard:
        viewer = SocketViewer(dashboard.url)
        viewer.wait(lambda page: page.hello)
        assert viewer.page.run is None
        for key in ("mine", "mine~2"):
            tiny_trainer(run_name="mine").train(tiny_loader(), epochs=1, callbacks=[dashboard])
            viewer.wait(partial(knows, key))
            if viewer.page.run is None or viewer.page.run.key != key:
                viewer.say(Watch(run=key))
            viewer.wait(partial(has_seen_the_end, key))
            viewer.wait(lambda page: steps_of(page) == 8)
        assert viewer.closed is None
    assert viewer.wait_closed() == (1001, "the dashboard was closed")
    viewer.close()


@pytest.mark.anyio
async def test_as_an_async_context_manager() -> None:
    async with quiet() as dashboard:
        await tiny_trainer().train_async(tiny_loader(), epochs=1, callbacks=[dashboard])
        assert (await in_thread(request, dashboard._server, "/"))[0] == 200
    assert callback._shared._server is None


class Refuses(Callback):
    """Does not let any run begin."""

    def reset(self) -> None:
        raise ConfigError("not today")


def test_a_refused_run_leaves_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not today"):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[quiet(), Refuses()])
    assert callback._shared._server is None
    (tmp_path / "taken").mkdir()
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="taken")
    with pytest.raises(RunNameTakenError):
        trainer.train(tiny_loader(), epochs=1, callbacks=[quiet()])
    assert callback._shared._server is None


def test_a_run_that_the_process_cannot_take_leaves_no_server() -> None:
    loader = Gated()
    going = in_background(partial(tiny_trainer(deterministic=True, seed=1).train, loader, epochs=1))
    assert loader.reached.wait(PATIENCE)
    try:
        with pytest.raises(ConfigError):
            tiny_trainer(deterministic=False).train(tiny_loader(), epochs=1, callbacks=[quiet()])
        assert callback._shared._server is None
    finally:
        loader.gate.set()
        going.join(PATIENCE)


def test_a_port_that_is_taken_is_said_to_who_trains() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .* is taken"):
            tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[quiet(port=port)])


class Failing(Trainer):
    """Fails in its fifth step."""

    steps = 0

    def training_step(self, batch: Any) -> Any:
        self.steps += 1
        if self.steps == 5:
            raise ValueError("a detail of mine")
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.model(inputs), targets)


def test_a_failed_run_shows_its_traceback_to_who_may_steer_it_alone() -> None:
    dashboard, loader = quiet(), Gated()

    def train() -> None:
        with pytest.raises(ValueError, match="a detail of mine"):
            tiny_trainer(Failing).train(loader, epochs=1, callbacks=[dashboard])

    thread = in_background(train)
    assert loader.reached.wait(PATIENCE)
    with SocketViewer(dashboard.url) as owner, SocketViewer(dashboard.read_only_url) as reader:
        for viewer in (owner, reader):
            viewer.wait(lambda page: page.run)
        loader.gate.set()
        thread.join(PATIENCE)
        for viewer in (owner, reader):
            assert viewer.wait_closed()[0] == 1001
            status = viewer.page.status
            assert status is not None and status.state == "failed"
            assert status.error == "ValueError: a detail of mine"
            assert (status.traceback is not None) is (viewer is owner)
    assert owner.page.status is not None and "training_step" in str(owner.page.status.traceback)
    assert "Traceback" not in str(reader.page.milestones)


@pytest.mark.anyio
async def test_a_cancelled_run_leaves_no_server() -> None:
    dashboard, loader = quiet(), Gated()
    with anyio.move_on_after(PATIENCE) as scope:
        async with tiny_trainer().start(loader, epochs=1, callbacks=[dashboard]):
            viewer = await in_thread(SocketViewer, dashboard.url)
            await in_thread(viewer.wait, lambda page: page.run)
            loader.gate.set()
            scope.cancel()
    viewer.close()
    assert callback._shared._server is None
    assert viewer.page.status is not None and viewer.page.status.state in ("cancelled", "completed")


# What it shows -----------------------------------------------------------------------------------


def test_no_step_of_a_fast_run_is_missing() -> None:
    """What a viewer can ask for is what the run has said, value by value."""
    recorder = Recorder()
    with quiet() as dashboard:
        tiny_trainer().train(tiny_loader(500), epochs=4, callbacks=[dashboard, recorder])
        with SocketViewer(dashboard.url, shows=False) as viewer:
            viewer.wait(lambda page: page.series)
            (loss,) = [number for number, key in viewer.page.series.items() if key == "loss"]
            viewer.say(RangeQuery(query=1, series=[loss], start=0, end=1e9, points=0))
            viewer.wait(lambda page: page.ranges and not page.ranges[-1].header.more)
    steps = [step for frame in viewer.page.ranges for step in frame.step.tolist()]
    losses = [value for frame in viewer.page.ranges for value in frame.values[0].tolist()]
    said = recorder.of(StepEnd)
    assert steps == [event.step for event in said] == list(range(1, 2001))
    assert losses == [event.loss for event in said]


def test_same_seed_same_losses_whoever_looks() -> None:
    def losses(*callbacks: Callback) -> list[float]:
        recorder = Recorder()
        tiny_trainer(seed=7).train(tiny_loader(40), epochs=2, callbacks=[recorder, *callbacks])
        return [event.loss for event in recorder.of(StepEnd) if event.loss is not None]

    alone = losses()
    with quiet() as dashboard:
        assert losses(dashboard) == alone
        viewers = [SocketViewer(dashboard.url) for _ in range(3)]
        assert losses(dashboard) == alone
        for viewer in viewers:
            viewer.close()


class Weather(Sample, frozen=True, kw_only=True):
    """A sample of the user's own."""

    warmth: float = 0.0
    wind: Metrics = Metrics()


class Weatherman(Callback):
    """Publishes one with every step."""

    @in_step
    def after_step(self, point: StepPoint) -> None:
        point.run.publish(Weather(warmth=float(point.step), wind=Metrics(north=2.0)))


def test_samples_of_all_kinds_become_curves() -> None:
    with quiet() as dashboard, SocketViewer(dashboard.url) as viewer:
        watchers = [dashboard, Weatherman(), ResourceMonitor(every_seconds=0.1)]
        loader = Gated()
        thread = in_background(partial(tiny_trainer().train, loader, epochs=1, callbacks=watchers))
        viewer.wait(lambda page: "resource_usage/memory_bytes" in page.series.values())
        loader.gate.set()
        thread.join(PATIENCE)
        viewer.wait(lambda page: page.status and page.status.state == "completed")
        viewer.wait(lambda page: steps_of(page, "weather/warmth") == 8)
        viewer.wait(lambda page: steps_of(page, "weather/wind/north") == 8)
        assert steps_of(viewer.page) == 8


class Report(Event, frozen=True, kw_only=True):
    text: str


class Reporting(Callback):
    """Publishes fifty events of 100 KB in a step."""

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == 1:
            for number in range(50):
                point.run.publish(Report(text=f"{number:02}" * 50_000))


def test_large_milestones_take_the_memory_that_was_given_and_viewers_learn_what_they_miss() -> None:
    with quiet(milestone_bytes=1_000_000) as dashboard:
        with SocketViewer(dashboard.url) as early:
            trainer = tiny_trainer(run_name="reports")
            trainer.train(tiny_loader(), epochs=1, callbacks=[dashboard, Reporting()])
            early.wait(partial(has_seen_the_end, "reports"))
            early.wait(lambda page: page.milestones[-1]["type"] == "TrainEnd")
        with SocketViewer(dashboard.read_only_url) as late:
            late.wait(lambda page: page.milestones and page.milestones[-1]["type"] == "TrainEnd")
        assert dashboard._server is not None
        (live,) = dashboard._server.hub.runs.values()
        assert live.milestones.bytes <= 1_000_000
    reports = [event["text"] for event in late.page.milestones if "text" in event]
    assert reports == [f"{number:02}" * 50_000 for number in range(50 - len(reports), 50)] and reports
    assert late.page.missed + len(late.page.milestones) >= 50
    # The early one got all of them, or learned that it did not.
    assert early.page.missed <= late.page.missed


def test_a_page_that_outlives_its_run_does_not_keep_the_model() -> None:
    with quiet() as dashboard:
        trainer = tiny_trainer(run_name="over")
        trainer.train(tiny_loader(), epochs=1, callbacks=[dashboard])
        model = weakref.ref(trainer.model)
        del trainer
        gc.collect()
        assert model() is None
        with SocketViewer(dashboard.url) as viewer:
            viewer.wait(partial(has_seen_the_end, "over"))
            viewer.wait(lambda page: steps_of(page) == 8)
            viewer.say(CommandRequest(id="late", name="pause", run="over"))
            viewer.wait(lambda page: page.acks.get("late") == ["rejected"])


def test_secrets_of_the_command_line_and_of_settings_reach_no_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train.py", "--api-key", "s3cret", "--tokenizer", "bpe", "--token=s3cret", "password=s3cret"]
    monkeypatch.setattr(sys, "argv", arguments)
    settings = {"author": "ann", "hub_token": "s3cret", "data": "postgres://me:s3cret@host/?token=s3cret"}
    with quiet() as dashboard, SocketViewer(dashboard.url) as viewer:
        trainer = tiny_trainer(run_name="masked", hyperparameters=settings)
        trainer.train(tiny_loader(), epochs=1, callbacks=[dashboard])
        viewer.wait(partial(has_seen_the_end, "masked"))
    assert viewer.page.run is not None
    hidden = "(masked)"
    assert viewer.page.run.command == [
        "train.py", "--api-key", hidden, "--tokenizer", "bpe", f"--token={hidden}", f"password={hidden}",
    ]  # fmt: skip
    shown = {"author": "ann", "hub_token": hidden, "data": f"postgres://me:{hidden}@host/?token={hidden}"}
    assert shown.items() <= viewer.page.run.hyperparameters.items()
    start = next(event for event in viewer.page.milestones if event["type"] == "TrainStart")
    assert shown.items() <= start["hyperparameters"].items()


# What it can do ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_commands_work_while_the_hosts_event_loop_is_blocked() -> None:
    """The test itself blocks it, until each command was applied: nothing on the way may need it."""
    dashboard, recorder = quiet(), Recorder()
    async with tiny_trainer().start(Endless(), epochs=1, callbacks=[dashboard, recorder]) as run:
        viewer = await in_thread(SocketViewer, dashboard.url)
        await in_thread(viewer.wait, lambda page: page.run)

        def give(name: Any, **more: Any) -> None:
            viewer.say(CommandRequest(id=name, name=name, run=run.id, **more))
            viewer.wait(lambda page: page.acks.get(name) == ["accepted", "applied"])

        give("set_lr", lr=0.125)
        give("pause")
        step = run.step
        time.sleep(0.3)  # noqa: ASYNC251 - the host's event loop is held all the while
        assert run.step == step
        give("resume")
        give("stop", checkpoint=False)
    viewer.close()
    applied = [(event.command, event.by) for event in recorder.of(CommandApplied)]
    assert applied == [(name, "viewer 127.0.0.1") for name in ("set_lr", "pause", "resume", "stop")]
    last = recorder.of(StepEnd)[-1]
    assert last.lr == 0.125


# What it says at the start -----------------------------------------------------------------------


def test_it_prints_the_address_and_the_way_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.1 22")
    monkeypatch.setenv("LOGNAME", "ada")
    with Dashboard(port=0) as dashboard:
        port = dashboard.url.split(":")[2].partition("/")[0]
        said = capsys.readouterr().err
        assert f"Live page: {dashboard.url}\n" in said
        assert f"ssh -L {port}:127.0.0.1:{port} ada@10.0.0.1\n" in said
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[dashboard])
    assert capsys.readouterr() == ("", "")


def test_an_open_address_without_tls_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with quiet(host="0.0.0.0"):
        assert "without encryption" in caplog.text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"host": 8080}, r"host must be .*, got 8080; a port is Dashboard\(port=\.\.\.\)"),
        ({"port": -1}, "port must"),
        ({"port": True}, "port must"),
        ({"token": "short"}, "token must"),
        ({"token": "with spaces in it, long"}, "token must"),
        ({"frames_per_second": 0}, "frames_per_second must"),
        ({"frames_per_second": float("nan")}, "frames_per_second must"),
        ({"history_bytes": 10}, "history_bytes must"),
        ({"milestone_bytes": 10}, "milestone_bytes must"),
        ({"max_viewers": 0}, "max_viewers must"),
        ({"allow_hosts": "name"}, "allow_hosts must"),
        ({"allow_hosts": ["https://name"]}, "allow_hosts must"),
        ({"allow_hosts": ["name:8000"]}, "allow_hosts must"),
        ({"frame_ancestors": ["a; script-src *"]}, "frame_ancestors must"),
    ],
)
def test_wrong_settings_are_said_at_once(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Dashboard(**options)


# Processes of their own --------------------------------------------------------------------------


TINY = "from offloop.engine.testing import tiny_batches, tiny_loader, tiny_trainer\n"


@pytest.fixture
def child(tmp_path: Path, warm_python: WarmPython) -> Iterator[Callable[..., ScriptProcess]]:
    """Start a script in a process of its own; its stderr is its stdout."""
    with contextlib.ExitStack() as stack:

        def child(source: str, *, env: dict[str, str] | None = None) -> ScriptProcess:
            script = tmp_path / "script.py"
            script.write_text("from offloop.dashboard import Dashboard\n" + source)
            environment = os.environ | (env or {})
            return stack.enter_context(
                warm_python.start(script, environment=environment, merges_streams=True)
            )

        yield child


def line_with(process: ScriptProcess, text: str) -> str:
    """Read what a process says up to the line that has some text, and return that line."""
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return line.rstrip("\n")
    raise AssertionError(f"it never said {text!r}, but:\n{''.join(said)}")


def address_in(line: str) -> str:
    return line.rpartition("Live page: ")[2]


def test_kept_open_the_page_stays_until_ctrl_c(child: Callable[..., ScriptProcess]) -> None:
    process = child(
        TINY + "tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Dashboard(port=0, keep_open=True)])"
    )
    address = address_in(line_with(process, "Live page: "))
    line_with(process, "stays open: press Ctrl-C")
    with SocketViewer(address) as viewer:
        viewer.wait(lambda page: page.status and page.status.state == "completed")
        process.send_signal(signal.SIGINT)
        assert viewer.wait_closed() == (1001, "the server was interrupted")
    assert process.communicate()[0] == "" and process.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 75)])
def test_a_run_that_is_interrupted_takes_even_a_page_that_is_kept_open_along(
    number: int, code: int, child: Callable[..., ScriptProcess]
) -> None:
    process = child(
        f"{TINY}import itertools\n"
        "endless = itertools.cycle(tiny_batches())\n"
        "tiny_trainer().train(endless, max_steps=10**9, callbacks=[Dashboard(port=0, keep_open=True)])"
    )
    address = address_in(line_with(process, "Live page: "))
    with SocketViewer(address) as viewer:
        viewer.wait(lambda page: steps_of(page) > 3)
        process.send_signal(number)
        assert viewer.wait_closed() == (1001, "the run is over")
    assert viewer.page.status is not None and viewer.page.status.state == "stopped"
    said, _ = process.communicate()
    assert process.returncode == code, said


def test_a_new_process_at_the_same_port_knows_the_cookie_and_the_key(
    child: Callable[..., ScriptProcess],
) -> None:
    script = "with Dashboard(port={port}) as dashboard:\n    input()"
    process = child(script.format(port=0))
    address = address_in(line_with(process, "Live page: "))
    port = address.split(":")[2].partition("/")[0]
    cookie, key = exchange(int(port), address.partition("=")[2])
    with SocketViewer(address, cookie=cookie, keys=[key]) as viewer:
        viewer.wait(lambda page: page.hello)
        process.communicate("\n")
        assert viewer.wait_closed() == (1001, "the dashboard was closed")
        known = viewer.page
    process = child(script.format(port=port))
    line_with(process, "Live page: ")
    before = known.hello.server if known.hello else ""
    with SocketViewer(address, cookie=cookie, keys=[key], page=known) as viewer:
        viewer.wait(lambda page: page.hello and page.hello.server != before)
        assert viewer.page.hello is not None and viewer.page.hello.role == "control"
        process.communicate("\n")
    assert process.returncode == 0


def test_open_calls_the_browser(tmp_path: Path, child: Callable[..., ScriptProcess]) -> None:
    pipe, browser = tmp_path / "pipe", tmp_path / "browser"
    os.mkfifo(pipe)
    browser.write_text(f'#!/bin/sh\necho "$1" > {pipe}\n')
    browser.chmod(0o755)
    process = child(
        "with Dashboard(port=0, open=True) as dashboard:\n    input()", env={"BROWSER": f"{browser} %s"}
    )
    address = address_in(line_with(process, "Live page: "))
    with pipe.open() as file:
        assert file.read() == f"{address}\n"
    process.communicate("\n")
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what loader workers do
def test_a_forked_worker_keeps_neither_the_port_nor_the_viewers() -> None:
    reader, writer = os.pipe()
    is_forked, forked = os.pipe()
    with quiet() as dashboard, SocketViewer(dashboard.url) as viewer:
        viewer.wait(lambda page: page.hello)
        server = dashboard._server
        assert server is not None
        port = server.port
        worker = os.fork()
        if worker == 0:
            os.write(forked, b".")  # what a fork does in the child is done
            os.close(writer)
            os.read(reader, 1)  # until the test is over
            os._exit(0)
        os.read(is_forked, 1)
    try:
        viewer.wait_closed()
        with quiet(port=port):
            pass
    finally:
        for descriptor in (writer, reader, forked, is_forked):
            os.close(descriptor)
        os.waitpid(worker, 0)
