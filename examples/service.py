"""A small async service that starts, lists and cancels training runs, one JSON object a line, over TCP.

    {"do": "start"}                      -> {"run": "..."}          answered at once; the run continues
    {"do": "list"}                       -> {"runs": {"...": "running, step 120"}}
    {"do": "cancel", "run": "..."}       -> {"status": "cancelled"}

Run it: python examples/service.py; it runs a client that makes these requests, and ends.
"""

import contextlib
import json
from typing import Any

import anyio
import anyio.abc
import torch
from anyio.streams.buffered import BufferedByteReceiveStream

from offloop import Runs, Trainer


class Service:
    """Answers requests about runs, which outlive the connection that started them and fail independently."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "start":
            run = await self.runs.start(make_trainer(), BATCHES, epochs=1_000_000)
            return {"run": run.id}
        if request["do"] == "list":
            return {"runs": {name: f"{run.state}, step {run.step}" for name, run in self.runs.items()}}
        if request["do"] == "cancel":
            run = self.runs[request["run"]]
            run.cancel("asked to")
            return {"status": (await run.wait()).status}
        return {"error": f"unknown request {request['do']!r}"}

    async def serve(self, connection: anyio.abc.SocketStream) -> None:
        async with connection:
            lines = BufferedByteReceiveStream(connection)
            with contextlib.suppress(anyio.IncompleteRead):  # the client has left
                while True:
                    line = await lines.receive_until(b"\n", max_bytes=65_536)
                    try:
                        answer = await self.answer(json.loads(line))
                    except (KeyError, ValueError) as error:
                        answer = {"error": repr(error)}
                    await connection.send(json.dumps(answer).encode() + b"\n")


BATCHES = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(64)]


def make_trainer() -> Trainer:
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return Trainer(model, optimizer, loss=torch.nn.functional.cross_entropy)


async def show(port: int) -> None:
    async with await anyio.connect_tcp("127.0.0.1", port) as connection:
        lines = BufferedByteReceiveStream(connection)

        async def ask(request: dict[str, Any]) -> Any:
            await connection.send(json.dumps(request).encode() + b"\n")
            answer = json.loads(await lines.receive_until(b"\n", max_bytes=65_536))
            print(request, "->", answer)
            return answer

        first, second = await ask({"do": "start"}), await ask({"do": "start"})
        await ask({"do": "list"})
        for started in (first, second):
            await ask({"do": "cancel", "run": started["run"]})


async def main() -> None:
    async with (
        Runs() as runs,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as connections,
    ):
        connections.start_soon(listener.serve, Service(runs).serve)
        await show(listener.extra(anyio.abc.SocketAttribute.local_port))
        connections.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main)
