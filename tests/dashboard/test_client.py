"""dashboard/client: a program that watches a run over a real socket, on both kinds of event loop."""

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from cut_proxy import CutProxy
from run_files import events_of, write_run
from watched_runs import ENDLESS, LONG, port_of, served, serving_process, until
from websockets.sync.server import Server as PlainServer
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from offloop import connect
from offloop.dashboard import Dashboard, Watch
from offloop.dashboard.options import Options
from offloop.dashboard.runs.milestones import MILESTONES_KEPT
from offloop.dashboard.serving.server import Server
from offloop.dashboard.viewers import connection as connection_module
from offloop.engine import (
    ConfigError,
    EpochEnd,
    EpochStart,
    Event,
    RunEndedError,
    RunNotFoundError,
    Runs,
    Sample,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    WatchLostError,
    WatchRefusedError,
)
from offloop.engine.testing import EndlessLoader, Recorder, tiny_loader, tiny_trainer

pytestmark = pytest.mark.anyio


class Mark(Event, frozen=True):
    """A milestone."""

    number: int = 0
    text: str = ""


class Tick(Sample, frozen=True):
    """A sample."""

    number: int = 0


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """Load what the first run loads, which would hold the event loop for seconds."""
    tiny_trainer().train(tiny_loader(1), tiny_loader(1), epochs=1, metrics=["accuracy"])


async def marks(watch: Watch, count: int) -> list[Mark]:
    """Return as many marks, the oldest first."""
    found: list[Mark] = []
    async with watch.events(Mark) as events:
        async for event in events:
            found.append(event)
            if len(found) == count:
                break
    return found


# Events ------------------------------------------------------------------------------------------


async def test_a_program_sees_the_milestones_that_a_callback_sees() -> None:
    recorder = Recorder()
    with anyio.fail_after(LONG):
        async with Dashboard(port=0, quiet=True) as dashboard:
            async with tiny_trainer(callbacks=[dashboard, recorder]).start(
                tiny_loader(5), tiny_loader(2), epochs=2, metrics=["accuracy"]
            ) as run:
                async with connect(dashboard.url) as watch:
                    seen = [event async for event in watch.events() if not isinstance(event, Sample)]
                    again = [event async for event in watch.events(EpochEnd)]
            assert watch.id == run.id and watch.is_over and watch.state == "completed"
            assert watch.metrics == run.result.metrics and watch.step == run.step == 10
    here = [event for event in recorder.events if not isinstance(event, Sample)]
    # The page shows all knobs, but no secrets.
    assert isinstance(here[0], TrainStart) and isinstance(seen[0], TrainStart)
    assert seen[1:] == here[1:] and seen[0].hyperparameters == here[0].hyperparameters
    assert again == [event for event in seen if isinstance(event, EpochEnd)]


async def test_samples_come_in_order_with_the_milestones_and_none_is_missing() -> None:
    async with served() as (dashboard, run), connect(dashboard.url) as watch:
        events = watch.events()
        seen: list[Event] = []
        async for event in events:
            seen.append(event)
            if isinstance(event, Sample):
                break
        for number in range(300):
            run.publish(Tick(number=number))
            if number % 100 == 50:
                run.publish(Mark(number=number))
        run.publish(Mark(number=-1))
        async for event in events:
            seen.append(event)
            if isinstance(event, Mark) and event.number == -1:
                break
        await watch.stop()
        assert [each.seq for each in seen] == sorted({each.seq for each in seen})
        since = next(place for place, each in enumerate(seen) if isinstance(each, Sample))
        numbers = [each.seq for each in seen[since:]]
        assert numbers == list(range(numbers[0], numbers[-1] + 1)), "one is missing"
        ticks = [each.number for each in seen if isinstance(each, Tick)]
        assert ticks == list(range(ticks[0], 300))
        assert any(isinstance(each, StepEnd) for each in seen)
        assert events.statistics.dropped == 0


async def test_a_program_that_wants_no_samples_gets_none() -> None:
    async with served() as (dashboard, run), connect(dashboard.url) as watch:
        await until(lambda: run.step > 100)
        run.publish(Mark())
        (mark,) = await marks(watch, 1)
        assert mark.run_id == run.id
        assert not watch._connection.wants_samples
        with watch.events(StateChanged, TrainEnd):
            assert not watch._connection.wants_samples
        with watch.events(Tick):
            assert watch._connection.wants_samples


async def test_an_event_of_a_class_that_is_not_defined_here_is_passed_on(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with serving_process(tmp_path) as (_, url), connect(url) as watch:
            event = await anext(watch.events(UnknownEvent))
            assert event.type == "__main__.Told"
            assert event.run_id == watch.id == "run"


async def test_a_message_of_a_million_bytes_arrives_whole() -> None:
    async with served() as (dashboard, run), connect(dashboard.url) as watch:
        text = "long " * 200_000
        run.publish(Mark(text=text))
        (mark,) = await marks(watch, 1)
        assert mark.text == text


async def test_a_program_that_does_not_iterate_drops_samples_and_counts_them() -> None:
    async with served() as (dashboard, _), connect(dashboard.url) as watch:
        with watch.events(StepEnd, buffer=5) as events:
            await until(lambda: events.statistics.dropped > 5)
            assert events.statistics.waiting <= 6
        assert len(events.take()) <= 6


async def test_what_is_no_event_class_is_refused() -> None:
    async with served() as (dashboard, _), connect(dashboard.url) as watch:
        with pytest.raises(TypeError, match="events takes event classes like EpochEnd, got 'EpochEnd'"):
            watch.events("EpochEnd")  # type: ignore[call-overload]  # the mistake
        with pytest.raises(ConfigError, match="buffer"):
            watch.events(buffer=0)


# Reconnecting ------------------------------------------------------------------------------------


async def test_after_a_lost_connection_all_milestones_come_once_and_in_order() -> None:
    async with served() as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch:
                events = watch.events(Mark)
                sent = 0
                for missed in (0, 1, 1_000, 3):
                    run.publish(Mark(number=sent))
                    sent += 1
                    assert (await anext(events)).number == sent - 1
                    proxy.cut()
                    await until(lambda: not watch.is_connected)
                    for _ in range(missed):
                        run.publish(Mark(number=sent))
                        sent += 1
                    proxy.restore()
                    seen = [(await anext(events)).number for _ in range(missed)]
                    assert seen == list(range(sent - missed, sent))
                    await until(lambda: watch.is_connected)
                assert events.statistics.received == sent
                assert events.statistics.not_replayed == 0
                assert [each.number for each in await marks(watch, sent)] == list(range(sent))


async def test_milestones_that_the_server_no_longer_keeps_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "offloop")
    async with served() as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch:
                events = watch.events(Mark)
                run.publish(Mark(number=-1))
                await anext(events)
                before = watch._facts.received
                proxy.cut()
                await until(lambda: not watch.is_connected)
                for number in range(MILESTONES_KEPT + 500):
                    run.publish(Mark(number=number))
                proxy.restore()
                seen = [(await anext(events)).number for _ in range(MILESTONES_KEPT)]
                assert seen == list(range(500, MILESTONES_KEPT + 500))
                assert events.statistics.not_replayed == 500
                assert watch._facts.received == before + MILESTONES_KEPT
                assert "500 milestones of run" in caplog.text
            # Whoever comes later is told how many came before.
            async with connect(dashboard.url) as late, late.events() as others:
                assert others.statistics.not_replayed == before + 500


async def test_samples_go_on_after_a_lost_connection() -> None:
    async with served() as (dashboard, _):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch, watch.events(StepEnd) as events:
                first = await anext(events)
                proxy.cut(keep_closed=False)
                await until(lambda: proxy.accepted > 1 and watch.is_connected)
                step = watch.step
                async for event in events:
                    assert event.seq > first.seq
                    if event.step > step:
                        break


async def test_a_program_that_is_cut_off_for_slowness_comes_back_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "SEND_TIMEOUT", 0.5)
    async with served() as (dashboard, run):
        with CutProxy(port_of(dashboard)) as proxy:
            async with connect(proxy.url(dashboard.url)) as watch:
                events = watch.events(Mark)
                proxy.hold()
                for number in range(300):
                    run.publish(Mark(number=number, text="x" * 10_000))
                assert dashboard._server is not None
                await until(lambda: not dashboard._server.hub.connections)  # type: ignore[union-attr]  # it is open
                proxy.cut(keep_closed=False)
                assert [(await anext(events)).number for _ in range(300)] == list(range(300))


async def test_a_server_that_was_killed_ends_the_events_with_an_error(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with serving_process(tmp_path) as (process, url), connect(url, give_up_after=0) as watch:
            events = watch.events()
            await anext(events)
            process.kill()
            with pytest.raises(WatchLostError, match="was lost and could not be made again within 0 s"):
                async for _ in events:
                    pass
            assert not watch.is_over and not watch.is_connected
            with pytest.raises(WatchLostError):
                await watch.pause()
            with pytest.raises(WatchLostError):
                await watch.history("loss")
            with pytest.raises(WatchLostError):  # whoever comes later, too, after the milestones
                async for event in watch.events(TrainStart):
                    assert event.run_id == "run"


async def test_a_run_that_was_resumed_in_another_process_is_watched_on(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with serving_process(tmp_path) as (process, url), connect(url) as watch:
            events = watch.events(TrainStart)
            assert (await anext(events)).attempt == 0
            await watch.checkpoint()
            process.kill()
            await process.wait()
            async with serving_process(tmp_path, "resume", port=urlsplit(url).port or 0):
                assert (await anext(events)).attempt == 1
                await watch.set_lr(0.5)


async def test_when_the_server_closes_after_its_run_the_events_just_end() -> None:
    with anyio.fail_after(LONG):
        async with Dashboard(port=0, quiet=True) as dashboard:
            async with tiny_trainer(callbacks=[dashboard]).start(tiny_loader(3), epochs=1):
                async with connect(dashboard.url, give_up_after=0) as watch:
                    seen = [event async for event in watch.events()]
                    assert dashboard._server is not None
                    await anyio.to_thread.run_sync(dashboard._server.close, "done")
                    await until(lambda: watch._connection.error is not None)
                    assert [event async for event in watch.events(TrainEnd)] == seen[-1:]
                    assert watch.state == "completed"


# Several runs ------------------------------------------------------------------------------------


async def test_a_program_chooses_one_of_several_runs_by_its_name(tmp_path: Path) -> None:
    with anyio.fail_after(LONG):
        async with Dashboard(port=0, quiet=True) as dashboard, Runs() as runs:
            for name in ("one", "two"):
                page = Dashboard(port=0, quiet=True)
                trainer = tiny_trainer(run_name=name, run_dir=tmp_path, callbacks=[page])
                run = await runs.start(trainer, EndlessLoader(), max_steps=ENDLESS)
                await anext(run.events(EpochStart))
            async with connect(dashboard.url, run="one") as one, connect(dashboard.url) as newest:
                assert (one.id, newest.id) == ("one", "two")
                assert [each.name for each in one.runs] == ["one", "two"]
                await one.stop("enough")
                assert [event.reason async for event in one.events(TrainEnd)] == ["enough"]
                assert newest.state == "running" and one.dir == tmp_path / "one"
            with pytest.raises(RunNotFoundError, match="no run 'three'") as raised:
                async with connect(dashboard.url, run="three"):
                    pass
            assert "has: one, two" in str(raised.value.__notes__)
            await runs["two"].stop()


async def test_without_a_run_a_program_waits_for_the_first_one() -> None:
    with anyio.fail_after(LONG):
        async with Dashboard(port=0, quiet=True) as dashboard:
            async with anyio.create_task_group() as tasks:

                async def watch() -> None:
                    async with connect(dashboard.url) as run:
                        assert [event.status async for event in run.events(TrainEnd)] == ["completed"]

                tasks.start_soon(watch)
                assert dashboard._server is not None
                hub = dashboard._server.hub
                await until(lambda: hub.connections)
                async with tiny_trainer(callbacks=[dashboard]).start(tiny_loader(2), epochs=1):
                    pass


async def test_a_past_run_is_read_from_its_directory_by_another_process(tmp_path: Path) -> None:
    written = events_of(300)
    write_run(tmp_path / "old", written)
    server = Server(Options(port=0), tmp_path)
    try:
        with anyio.fail_after(LONG):
            async with connect(server.url, run="old") as watch:
                seen = [event async for event in watch.events()]
                assert [type(each) for each in seen] == [TrainStart, EpochEnd, TrainEnd]
                assert (watch.state, watch.step, watch.metrics["train_loss"]) == ("completed", 300, 0.5)
                loss = await watch.history("loss")
                assert loss.value.tolist() == [event.loss for event in written if isinstance(event, StepEnd)]
                with pytest.raises(RunEndedError, match="pause came too late: the run is over"):
                    await watch.pause()
                assert "pause" in watch.refused
    finally:
        server.close("done")


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "http://127.0.0.1:8321/",
            "there is no token for http://127.0.0.1:8321/: use the address as it was printed",
        ),
        ("127.0.0.1:8321", "url must be the address of a live page, like http://127.0.0.1:8321/"),
        ("ftp://host/?token=secretsecretsecret", "must be the address of a live page, .* got 'ftp://host/'"),
        ("http://host:port/?token=secretsecretsecret", "url is no address"),
        ("http:///?token=secretsecretsecret", "must be the address of a live page"),
        (7, "url must be a string, got a int"),
        ("http://host/?token=one%0d%0atwo", "token must be printable ASCII characters without spaces"),
    ],
)
async def test_an_address_that_is_none_is_refused_and_the_token_not_shown(
    url: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OFFLOOP_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=why) as raised:
        async with connect(url):
            pass
    assert "secret" not in str(raised.value)


async def test_where_the_token_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOOP_TOKEN", "wrong-wrong-wrong")
    async with served(token="right-right-right") as (dashboard, run):
        page = f"127.0.0.1:{port_of(dashboard)}"
        async with connect(dashboard.url) as watch:  # the one in the address goes first
            assert watch.id == run.id
        async with connect(f"http://{page}/?token=wrong", token="right-right-right"):
            pass
        monkeypatch.setenv("OFFLOOP_TOKEN", "right-right-right")
        for url in (f"http://{page}", f"ws://{page}/ws", f"http://{page}/#run=other"):
            async with connect(url):
                pass


async def test_a_wrong_token_is_refused() -> None:
    async with served() as (dashboard, _):
        with pytest.raises(WatchRefusedError, match="does not accept this token") as raised:
            async with connect(dashboard.url, token="secret-of-yesterday"):
                pass
        assert raised.value.status == 401 and "yesterday" not in str(raised.value)


async def test_a_full_server_says_so() -> None:
    async with served(max_viewers=1) as (dashboard, _), connect(dashboard.url):
        with pytest.raises(
            WatchRefusedError, match="has no place left: There are already 1 viewers"
        ) as raised:
            async with connect(dashboard.url):
                pass
        assert raised.value.status == 503


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """The address of something that answers each connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token=secret-secret-secret"
        thread.join()


@pytest.mark.parametrize(
    ("data", "error", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", WatchLostError, "is no live page of offloop, or it speaks https"),
        (b"", WatchLostError, "is no live page of offloop"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", WatchRefusedError, "answers 200 OK"),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            WatchRefusedError,
            "has no live page at this address",
        ),
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
            WatchRefusedError,
            "does not let programs in",
        ),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n",
            WatchRefusedError,
            "answers 302 Found",
        ),
    ],
)
async def test_another_server_is_recognised(data: bytes, error: type[Exception], why: str) -> None:
    with anyio.fail_after(LONG), answering(data) as url, pytest.raises(error, match=why) as raised:
        async with connect(url):
            pass
    assert "secret" not in str(raised.value)


async def test_no_server_is_said_with_the_reason_of_the_system() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(
        WatchLostError, match=f"nothing answers at http://127.0.0.1:{port}/: connection refused"
    ):
        async with connect(f"http://127.0.0.1:{port}/?token=secret-secret-secret"):
            pass


@contextmanager
def speaking(first: str) -> Iterator[str]:
    """The address of a websocket server that says one thing, and then closes the connection with 4002."""

    def talk(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(first)
        connection.close(4002, "this server speaks protocol 2, got 1")

    server: PlainServer
    with serve(talk, "127.0.0.1", 0, subprotocols=[Subprotocol("offloop.v1")]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/?token=secret-secret-secret"
        server.shutdown()
    thread.join()


@pytest.mark.parametrize(
    ("first", "error", "why"),
    [
        (
            '{"type":"hello","protocol":2,"server":"s","page":null,"role":"control","runs":[],"run":null,"time":1,'
            '"frame_interval":1}',
            WatchRefusedError,
            "speaks protocol 2, and this program protocol 1: use the same version",
        ),
        ('{"type":"news"}', WatchLostError, "is no live page of offloop"),
        ("news", WatchLostError, "sent what is no message"),
        ('{"type":"hello"}', WatchLostError, "sent what is no message"),
    ],
)
async def test_a_server_of_another_protocol_is_recognised(
    first: str, error: type[Exception], why: str
) -> None:
    with anyio.fail_after(LONG), speaking(first) as url, pytest.raises(error, match=why):
        async with connect(url):
            pass


async def test_garbage_in_the_middle_is_a_lost_connection() -> None:
    async with served() as (dashboard, _), connect(dashboard.url, give_up_after=0) as watch:
        events = watch.events(Mark)
        assert dashboard._server is not None
        hub = dashboard._server.hub
        dashboard._server._post(lambda: hub.connections[0].viewer.put_latest("status", b'{"type":"status"}'))
        dashboard._server._post(hub.connections[0].wake)
        with pytest.raises(WatchLostError, match="it sent what is no message"):
            await anext(events)


async def test_over_https(certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    async with served(ssl=context) as (dashboard, run):
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        async with connect(dashboard.url, ssl=trusting) as watch:
            assert watch.id == run.id
            await watch.stop()
            assert [event.status async for event in watch.events(TrainEnd)] == ["stopped"]
        with pytest.raises(
            WatchLostError, match=r"is not valid here .*: give ssl= with a context that trusts it"
        ):
            async with connect(dashboard.url):
                pass
        with pytest.raises(WatchLostError, match="is no live page of offloop, or it speaks https"):
            async with connect(dashboard.url.replace("https", "http")):
                pass


async def test_https_to_a_server_without_it_says_so() -> None:
    async with served() as (dashboard, _):
        with pytest.raises(WatchLostError, match="does not speak https"):
            async with connect(dashboard.url.replace("http", "https")):
                pass


# Leaving -----------------------------------------------------------------------------------------


async def test_what_the_block_raises_is_raised_as_it_is() -> None:
    async with served() as (dashboard, _):
        with pytest.raises(ZeroDivisionError):
            async with connect(dashboard.url):
                raise ZeroDivisionError


async def test_cancelled_at_any_moment_nothing_is_left() -> None:
    """The fixtures of all tests look for tasks and sockets that are left."""
    async with served() as (dashboard, run):

        async def use(done: anyio.Event) -> None:
            async with connect(dashboard.url) as watch:
                events = watch.events()
                await anext(events)
                await watch.set_lr(0.5)
                await until(lambda: "lr" in watch.curves)
                await watch.history("lr")
                await anext(events)
            done.set()

        done, turns = anyio.Event(), 0
        while not done.is_set():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(use, done)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                    if done.is_set():
                        break
                tasks.cancel_scope.cancel()
            turns = turns * 5 // 4 + 1
        assert not run.is_over


async def test_watching_loads_no_torch() -> None:
    """Neither does the interface, so it works on a laptop."""
    async with served() as (dashboard, run):
        script = f"""
import anyio, sys
from offloop import EpochEnd, StepEnd, connect
async def main():
    async with connect({dashboard.url!r}) as watch:
        async for event in watch.events(StepEnd):
            break
        await watch.set_lr(0.25)
        curve = await watch.history("loss")
        print(watch.id, len(curve) > 0, "torch" in sys.modules)
anyio.run(main)
"""
        done = await anyio.run_process([sys.executable, "-c", script], check=False)
        assert done.stdout.decode() == f"{run.id} True False\n", done.stderr.decode()
