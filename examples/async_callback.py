"""A callback that awaits a slow web server, and a training loop that does not wait for it.

    python examples/async_callback.py

The server takes 0.3 s to answer. Training ends long before all answers have arrived; the run then waits for the
callback to finish (`drain_timeout`, 30 s by default).
"""

import http.server
import json
import threading
import time

import anyio
import torch
from torch.utils.data import DataLoader, TensorDataset

from offloop import Callback, EpochEnd, Run, TrainEnd, Trainer


class Hook(http.server.BaseHTTPRequestHandler):
    """A slow web server."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.3)
        print(f"the server received epoch {body['epoch']}: loss {body['train_loss']:.3f}")
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Log no requests."""


class Notify(Callback):
    """Posts the metrics of each epoch. An `async def` runs on the event loop, in parallel to training."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.answers = 0

    async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        body = json.dumps({"run": run.id, "epoch": event.epoch, **event.metrics}).encode()
        head = f"POST / HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        # Or use the HTTP client of your choice.
        async with await anyio.connect_tcp(self.host, self.port) as connection:
            await connection.send(head.encode() + body)
            answer = await connection.receive()
        if b" 204 " not in answer:
            raise ConnectionError(f"the server answered {answer!r}")  # reported; training continues
        self.answers += 1

    async def on_train_end(self, event: TrainEnd, run: Run) -> None:
        print(f"training took {event.seconds:.2f} s")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads do not help with such small tensors
    inputs = torch.randn(512, 8)
    targets = (inputs.sum(dim=1) > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=torch.nn.functional.cross_entropy
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notify = Notify(*server.server_address)
        result = trainer.train(
            DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True),
            epochs=5,
            callbacks=[notify],
        )
        server.shutdown()
    cost = result.callback_costs["Notify"]
    print(
        f"{notify.answers} answers; the callback blocked the event loop for {1e3 * cost.held:.1f} ms in all"
    )


if __name__ == "__main__":
    main()
