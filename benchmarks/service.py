"""How long an unrelated request to a service takes while it trains eight runs at once.

A FastAPI application under uvicorn, in a process of its own, that starts runs, mounts the live page, and answers
`GET /`. This process asks that, one request after the other on one connection, in stretches that take turns: without
runs (twice, for A/A), with 8 runs, and with 8 runs and a viewer of the live page. Reported are the median and the 99th
percentile of a request, and their ratios to those without runs.

    python benchmarks/service.py [--quick] [--json FILE]
"""

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import socket
import statistics
import threading
from collections.abc import AsyncIterator
from typing import Any, Final

import torch
from measure import TEN_MS, TINY, Report, clock, loss_of, optimizer_of, parse
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from offloop import Dashboard, Runs, Trainer
from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_viewer import Drawn, Hi, Show
from offloop.dashboard.protocol.limits import SUBPROTOCOL

RUNS: Final = 8
WORK: Final = {"10 ms steps": TEN_MS, "tiny MLP": TINY}


def serve(listening: socket.socket) -> None:
    """Serve until killed."""
    import fastapi
    import uvicorn

    torch.set_num_threads(1)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        async with Runs() as app.state.runs:
            yield

    app = fastapi.FastAPI(lifespan=lifespan)
    app.mount("/train", Dashboard().asgi(auth=lambda scope: "control"))

    @app.get("/")
    async def answer() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/runs/{work}")
    async def start(work: str) -> None:
        for _ in range(RUNS):
            model = WORK[work].model()
            trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu")
            batches = WORK[work].batches()
            await app.state.runs.start(trainer, batches, epochs=10**9, callbacks=[Dashboard()])

    @app.delete("/runs")
    async def cancel() -> None:
        app.state.runs.cancel_all()
        await app.state.runs.wait()

    config = uvicorn.Config(app, log_level="error", access_log=False)
    asyncio.run(uvicorn.Server(config).serve([listening]))


class Client:
    """Asks the service, on one connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, method: str = "GET", path: str = "/") -> None:
        """Make a request and read its answer."""
        self._connection.request(method, path)
        answer = self._connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status

    def stretch(self, count: int) -> list[float]:
        """Return the seconds of each of `count` requests."""
        taken = []
        for _ in range(count):
            start = clock()
            self.ask()
            taken.append(clock() - start)
        return taken


class Viewer:
    """A viewer of the live page, which draws what it gets."""

    def __init__(self, port: int) -> None:
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(
            connect(f"ws://127.0.0.1:{port}/train/ws", subprotocols=[Subprotocol(SUBPROTOCOL)], proxy=None)
        )
        self.frames = 0
        self._socket.send(encode_message(Hi(protocol=1)).decode())
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for message in self._socket:
            if isinstance(message, bytes):
                self.frames += 1
                self._socket.send(encode_message(Drawn()).decode())
            elif (told := json.loads(message))["type"] == "series":
                show = Show(run=told["run"], series=[each["id"] for each in told["series"]])
                self._socket.send(encode_message(show).decode())

    def close(self) -> None:
        """Leave."""
        self._stack.close()
        self._thread.join()


def measure(client: Client, work: str, rounds: int, count: int) -> dict[str, list[float]]:
    """Return the seconds of the requests of each contender; a round has a stretch of each."""
    taken: dict[str, list[float]] = {"without": [], "without again": [], "runs": [], "watched": []}
    for _ in range(rounds):
        for name in taken:
            viewer = None
            if name in ("runs", "watched"):
                client.ask("POST", f"/runs/{work.replace(' ', '%20')}")
            if name == "watched":
                viewer = Viewer(client.port)
            client.stretch(count // 10)
            taken[name] += client.stretch(count)
            if viewer is not None:
                viewer.close()
                assert viewer.frames, "the viewer saw nothing"
            if name in ("runs", "watched"):
                client.ask("DELETE", "/runs")
    return taken


def percentile_99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    report = Report(
        f"A request to a service that trains {RUNS} runs at once",
        ["work", "what", "median, ms", "p99, ms", "median / without", "p99 / without", "goal for p99"],
    )
    rounds, count = (1, 50) if arguments.quick else (5, 400)
    # With its protocol, without which asyncio does not set TCP_NODELAY.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(listening,), daemon=True)
    process.start()
    client = Client(listening.getsockname()[1])
    figures: dict[str, Any] = {}
    with report.measuring():
        for work in WORK:
            taken = measure(client, work, rounds, count)
            without = taken["without"]
            for name, what, goal in (
                ("without", "no run", "-"),
                ("without again", "no run, again (A/A)", "-"),
                ("runs", f"{RUNS} runs", "<= 2"),
                ("watched", f"{RUNS} runs and a viewer of the live page", "-"),
            ):
                middle, slow = statistics.median(taken[name]), percentile_99(taken[name])
                ratios = middle / statistics.median(without), slow / percentile_99(without)
                figures[f"{work}, {name}"] = [middle, slow, *ratios]
                report.row(
                    work,
                    what,
                    f"{1e3 * middle:.2f}",
                    f"{1e3 * slow:.2f}",
                    *(f"{each:.1f}" for each in ratios),
                    goal,
                )
    for name, values in figures.items():
        report.figure(name, values)
    report.note(f"{rounds} stretches of {count} requests each, on one connection, one after the other.")
    process.kill()
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
