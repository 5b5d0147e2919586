"""What does the live page cost, and how fast is it?

Viewers are real websocket clients in a process of their own, each with 8 curves on its screen, that give credit as
soon as they have read a frame. Each case is one run; where two are compared, the loader takes turns between training
with the page's run and by hand, in neighbouring stretches of 0.4 s, and the A/A row is the hand-written loop against
itself by the same scheme.

    training     steps of 0.5 ms and of 5 ms: with no page, with the page and 0, 10 viewers, against by hand
    50 viewers   CPU time of the server's thread, as a share of a core
    stalled      one of 10 viewers stops reading: bytes held for it, when it was cut off, the gap that others saw
    command      given by a viewer -> `applied` there: host's event loop free, and held 300 ms at a time
    opening      50 curves of 100,000 points: hi -> last byte of the last snapshot
    coming back  the same port listens again -> a client that tries every 50 ms has the new `hello`

    python benchmarks/live_page.py [--quick] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from urllib.parse import parse_qs, urlsplit

import anyio
import torch
from measure import (
    HAND,
    TINY,
    Batch,
    HandWritten,
    Report,
    StretchLoader,
    Task,
    clock,
    loss_of,
    optimizer_of,
    parse,
    quantile,
    verdict,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from offloop.dashboard import Dashboard
from offloop.dashboard.options import Options
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.run_source import ProcessRun
from offloop.dashboard.serving.server import Server
from offloop.engine import Callback, Metrics, Run, StepEnd, Trainer, TrainerConfig, TrainStart

FIVE_MS = Task("5 ms step", features=256, width=704, layers=2, batch_size=64, steps_per_slice=2)
STRETCH, SETTLE = 0.4, 0.1  # seconds: a frame comes every 0.1 s
CURVES = 8
SERVER = "offloop-dashboard"  # its thread


# Viewers: another process -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def link_to(address: str) -> AsyncIterator[ClientConnection]:
    """Connect to a page's address, and say hi."""
    parts = urlsplit(address)
    token = parse_qs(parts.query)["token"][0]
    async with connect(
        f"ws://{parts.netloc}/ws",
        subprotocols=[Subprotocol("offloop.v1")],
        additional_headers={"Authorization": f"Bearer {token}"},
        compression=None,
        proxy=None,
        max_size=None,
    ) as link:
        await link.send('{"type":"hi","protocol":1}')
        yield link


async def view(address: str, counts: dict[str, float]) -> None:
    """Be a viewer until the server closes the connection."""
    with contextlib.suppress(ConnectionClosed):
        async with link_to(address) as link:
            await follow(link, counts)


async def follow(link: ClientConnection, counts: dict[str, float]) -> None:
    """Show curves, and give credit for every frame."""
    counts["open"] += 1
    last = clock()
    async for message in link:
        counts["bytes"] += len(message)
        if isinstance(message, str):
            if message.startswith('{"type":"series"'):
                ids = [each["id"] for each in json.loads(message)["series"]]
                await link.send(json.dumps({"type": "show", "series": ids[:CURVES], "points": 1000}))
            continue
        counts["frames"] += 1
        counts["gap"] = max(counts["gap"], clock() - last) if counts["frames"] > 50 else 0.0
        last = clock()
        await link.send('{"type":"drawn"}')


async def be_viewers(address: str, count: int) -> None:
    """Be some viewers; say when all are there, and at the end what they got."""
    counts = {"open": 0.0, "bytes": 0.0, "frames": 0.0, "gap": 0.0}
    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(view(address, counts))
        while counts["open"] < count:  # noqa: ASYNC110 - a look now and then will do
            await asyncio.sleep(0.01)
        print("ready", flush=True)
    print(json.dumps(counts), flush=True)


@contextlib.contextmanager
def viewers(address: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """Have so many viewers watch; they leave with the server."""
    command = [sys.executable, __file__, "--be-viewers", str(count), address]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    except BaseException:
        process.kill()
        raise


# Training -----------------------------------------------------------------------------------------


def trainer_for(task: Task) -> Trainer:
    """Return a trainer for a task."""
    model = task.model()
    return Trainer(model, optimizer_of(model), TrainerConfig(device="cpu"), loss=loss_of)


def measure_training(task: Task, rounds: int, count: int | None) -> StretchLoader:
    """Train with the page and so many viewers, or with none of it."""
    by_hand = HandWritten(task)
    loader = StretchLoader(by_hand, rounds, seconds=STRETCH, settle=SETTLE)
    trainer = Trainer(by_hand.model, by_hand.optimizer, TrainerConfig(device="cpu"), loss=task.loss)
    with contextlib.ExitStack() as stack:
        callbacks: list[Callback] = []
        if count is not None:
            dashboard = stack.enter_context(Dashboard(port=0, quiet=True))
            callbacks.append(dashboard)
            if count:
                stack.enter_context(viewers(dashboard.url, count))
        trainer.train(loader, epochs=1, callbacks=callbacks)
    return loader


# Stalled ------------------------------------------------------------------------------------------


def measure_stalled(seconds: float) -> tuple[int, float | None, float]:
    """Return the most bytes held for a viewer that stops reading, when it was cut off, and the others' longest gap."""
    most, cut_off = 0, None
    with Dashboard(port=0, quiet=True) as dashboard, socket.socket() as stalled:
        server = dashboard._server
        assert server is not None
        with viewers(dashboard.url, 9) as process:

            class Watch:
                def __iter__(self) -> Iterator[Batch]:
                    nonlocal most, cut_off
                    batches = TINY.batches()
                    started, look_at = clock(), 0.0
                    while clock() - started < seconds:
                        yield from batches
                        if clock() < look_at:
                            continue
                        look_at = clock() + 0.05
                        mine = [
                            each
                            for each in tuple(server._requests.peers)
                            if each.remote_address and each.remote_address[1] == port
                        ]
                        if not mine and cut_off is None:
                            cut_off = clock() - started
                        for each in mine:
                            most = max(most, each.transport.get_write_buffer_size())

            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            stalled.connect(("127.0.0.1", server.port))
            port = stalled.getsockname()[1]
            stalled.sendall(
                f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Protocol: offloop.v1\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode()
            )
            # It shows curves and gives credit for any number of frames, and reads none.
            stalled.sendall(masked('{"type":"hi","protocol":1}'))

            def ask_for_more() -> None:
                with contextlib.suppress(OSError):
                    stalled.sendall(masked('{"type":"show","series":[0,1],"points":4000}'))
                    for _ in range(1_000):
                        stalled.sendall(masked('{"type":"drawn"}'))
                        time.sleep(0.05)

            asking = threading.Timer(1.0, ask_for_more)
            asking.daemon = True
            asking.start()
            trainer_for(TINY).train(Watch(), epochs=1, callbacks=[dashboard])
    assert process.stdout is not None
    return most, cut_off, float(json.loads(process.stdout.read())["gap"])


def masked(text: str) -> bytes:
    """Return a text frame as a client sends it."""
    data = text.encode()
    return bytes([0x81, 0x80 | len(data)]) + b"\0\0\0\0" + data


# Commands -----------------------------------------------------------------------------------------


async def commands(address: str, count: int) -> list[float]:
    """Give commands, one after the other, and return the seconds until each was applied."""
    taken = []
    async with link_to(address) as link:
        run = None
        while run is None:
            message = json.loads(await link.recv())
            run = message["key"] if message["type"] == "run" else None
        for number in range(count):
            await asyncio.sleep(0.11)  # 10 a second are allowed
            request = {"type": "command", "id": str(number), "name": "set_lr", "run": run, "lr": 0.001}
            started = clock()
            await link.send(json.dumps(request))
            while True:
                message = await link.recv()
                if isinstance(message, str) and '"applied"' in message and f'"id":"{number}"' in message:
                    break
            taken.append(clock() - started)
        stop = {"type": "command", "id": "stop", "name": "stop", "run": run, "checkpoint": False}
        await link.send(json.dumps(stop))
        async for _ in link:
            pass
    return taken


class Endless:
    """Gives batches for ever."""

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from TINY.batches()


async def measure_commands(count: int, *, held: bool) -> list[float]:
    """Return the seconds that commands took, beside an event loop that is free or held 300 ms at a time."""
    dashboard = Dashboard(port=0, quiet=True)
    async with trainer_for(TINY).start(Endless(), epochs=1, callbacks=[dashboard]) as run:
        command = [sys.executable, __file__, "--give-commands", str(count), dashboard.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - at the start
        while run.state not in ("completed", "stopped", "closing"):
            if held:
                time.sleep(0.3)  # noqa: ASYNC251 - that is the point
            await anyio.sleep(0.05)
            if process.poll() is not None:
                break
    assert process.stdout is not None
    return [float(each) for each in json.loads(process.stdout.read())]


# Opening ------------------------------------------------------------------------------------------


class Silent(Callback):
    """Catches a run, to show something of its own with it."""

    def on_train_start(self, event: TrainStart, run: Run) -> None:
        self.run, self.start = run, event


def measure_opening(curves: int, points: int, rounds: int) -> tuple[list[float], int]:
    """Return the seconds from hi to the last byte of the last snapshot, and the bytes."""
    catch = Silent()
    trainer_for(TINY).train(TINY.batches()[:1], epochs=1, callbacks=[catch])
    server = Server(Options(port=0))
    try:
        live = LiveRun(ProcessRun(catch.run), catch.start)
        names = [f"curve_{number}" for number in range(curves - 2)]
        for step in range(1, points + 1):
            values = Metrics(
                zip(names, ((step * number) % 97 / 97 for number in range(curves)), strict=False)
            )
            event = StepEnd(
                run_id="r",
                seq=step,
                time=1e9 + step,
                step=step,
                epoch=0,
                loss=1 / step,
                lr=0.1,
                metrics=values,
            )
            live.take_in([event])

        def show() -> None:
            server.hub.runs[live.key] = live

        done = threading.Event()
        server._post(lambda: (show(), done.set()))
        done.wait()
        taken, size = [], 0
        for _ in range(rounds):
            command = [sys.executable, __file__, "--open", str(curves), server.url]
            seconds, size = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            taken.append(float(seconds))
        return taken, size
    finally:
        server.close("measured")


async def open_all(address: str, curves: int) -> tuple[float, int]:
    """Show all curves as a page does; return the seconds until all are there, and the bytes."""
    size, started = 0, clock()
    async with link_to(address) as link:
        left = curves
        async for message in link:
            size += len(message)
            if isinstance(message, bytes):
                (length,) = struct.unpack_from("<I", message)
                left -= len(json.loads(message[4 : 4 + length])["series"])
                await link.send('{"type":"drawn"}')
                if left <= 0:
                    return clock() - started, size
            elif message.startswith('{"type":"series"'):
                ids = [each["id"] for each in json.loads(message)["series"]]
                await link.send(json.dumps({"type": "show", "series": ids, "points": 800}))
    raise AssertionError("the server went")


# Coming back --------------------------------------------------------------------------------------


async def come_back(address: str) -> float:
    """Try every 50 ms until there is a server; return the Unix time of its hello."""
    while True:
        with contextlib.suppress(OSError):
            async with link_to(address) as link:
                await link.recv()
                return time.time()
        await asyncio.sleep(0.05)


def measure_coming_back(rounds: int) -> list[float]:
    """Return the seconds from a port that listens again to a client that has heard from it."""
    first = Server(Options(port=0, token="t" * 20))
    port = first.port
    first.close("measured")
    taken = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--come-back", "0", f"http://127.0.0.1:{port}/?token={'t' * 20}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        server = Server(Options(port=port, token="t" * 20))
        listening = time.time()
        taken.append(float(process.stdout.read()) - listening)
        server.close("measured")
    return taken


# Everything ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=12, help="stretches of each contender")
    parser.add_argument("--stalled-for", type=float, default=60.0, help="seconds")


def milliseconds(values: Sequence[float]) -> str:
    """Return the quantiles as text."""
    p50, p99 = (quantile(values, share) * 1e3 for share in (0.5, 0.99))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(values)} times)"


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    report = Report(
        "The live page: cost and speed", ["case", "figure", "goal"], packages=("websockets", "numpy")
    )
    with report.measuring():
        cases = [
            (TINY, None, 1.05),
            (TINY, 0, 1.05),
            (TINY, 10, 1.05),
            (FIVE_MS, None, 1.01),
            (FIVE_MS, 0, 1.01),
            (FIVE_MS, 10, 1.01),
        ]
        for task, count, goal in cases:
            loader = measure_training(task, rounds, count)
            ratio, a_a = loader.ratio()
            who = "no page" if count is None else f"page, {count} viewers"
            step = 1e3 * quantile(loader.per_step[HAND], 0.5)
            report.row(
                f"{task.name} ({step:.2f} ms), {who}", f"{ratio}; A/A {a_a}", verdict(ratio, goal, a_a)
            )
            report.figure(f"{task.name}, {who}", ratio)
        loader = measure_training(FIVE_MS, rounds, 50)
        share = loader.shares()[SERVER]
        report.row("50 viewers, CPU of the server's thread", f"{share:.1%} of a core", "<= 10 %")
        report.figure("50 viewers, cpu", share)
        most, cut_off, gap = measure_stalled(15.0 if arguments.quick else arguments.stalled_for)
        when = "not cut off" if cut_off is None else f"cut off after {cut_off:.1f} s"
        report.row("a viewer that does not read", f"{most / 1e6:.2f} MB held, {when}", "<= 0.5 MB")
        report.row("the nine beside it", f"longest time without a frame {gap:.2f} s", "")
        report.figure("stalled", {"bytes": most, "cut_off": cut_off, "gap": gap})
        for held in (False, True):
            taken = anyio.run(lambda held=held: measure_commands(10 if arguments.quick else 100, held=held))
            name = f"command, event loop {'held 300 ms at a time' if held else 'free'}"
            report.row(name, milliseconds(taken), "one step + 50 ms")
            report.figure(name, taken)
        points = 5_000 if arguments.quick else 100_000
        taken, size = measure_opening(50, points, 2 if arguments.quick else 10)
        name = f"opening, 50 curves of {points:,} points"
        report.row(name, f"{milliseconds(taken)}, {size / 1e6:.2f} MB", "<= 1 s, 1 MB")
        report.figure("opening", {"seconds": taken, "bytes": size})
        taken = measure_coming_back(2 if arguments.quick else 10)
        report.row("the port listens again", milliseconds(taken), "<= 0.5 s")
        report.figure("coming back", taken)
    report.finish(arguments.json)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--be-viewers":
        asyncio.run(be_viewers(sys.argv[3], int(sys.argv[2])))
    elif len(sys.argv) == 4 and sys.argv[1] == "--give-commands":
        print(json.dumps(asyncio.run(commands(sys.argv[3], int(sys.argv[2])))))
    elif len(sys.argv) == 4 and sys.argv[1] == "--open":
        print(json.dumps(asyncio.run(open_all(sys.argv[3], int(sys.argv[2])))))
    elif len(sys.argv) == 4 and sys.argv[1] == "--come-back":
        print("ready", flush=True)
        print(asyncio.run(come_back(sys.argv[3])))
    else:
        with tempfile.TemporaryDirectory() as state:
            os.environ["XDG_STATE_HOME"] = (
                state  # cookies of the user's own are none of a benchmark's business
            )
            main()
