"""A notebook in a kernel of its own, and a site that shows the output of its cells."""

import contextlib
import http.server
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import nbclient
import nbformat
from anyio.from_thread import start_blocking_portal
from nbclient.exceptions import DeadKernelError

# It has no types.
_nbformat: Any = nbformat
_v4: Any = nbformat.v4
PATIENCE: Final = 60
SETUP: Final = """
import torch
from offloop import Dashboard, Trainer

x = torch.randn(64, 8)
batches = list(zip(x.split(8), x[:, :3].argmax(1).split(8)))
model = torch.nn.Linear(8, 3)
trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=torch.nn.functional.cross_entropy)
dashboard = Dashboard(port=0)
"""
TRAIN: Final = "result = trainer.train(batches, batches, epochs=3, callbacks=[dashboard])"


class Notebook:
    """A notebook whose cells are run one by one in a kernel of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notebook.ipynb"
        self.notebook: Any = _v4.new_notebook()
        self._client = nbclient.NotebookClient(
            self.notebook,
            timeout=PATIENCE,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        self._stack = ExitStack()
        # An event loop of its own, which ends with it.
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._portal.call(self._start)

    async def _start(self) -> None:
        self._client.create_kernel_manager()
        await self._client.async_start_new_kernel()
        await self._client.async_start_new_kernel_client()

    def run(self, source: str) -> list[Any]:
        """Run a new cell and return its outputs."""
        self.notebook.cells.append(_v4.new_code_cell(source))
        cell = self.notebook.cells[-1]
        done = self._portal.call(self._client.async_execute_cell, cell, len(self.notebook.cells) - 1)
        return list(done["outputs"])

    def begin(self, source: str, *, dies: bool = False) -> threading.Thread:
        """Run a new cell in a thread; `dies`: the kernel may die meanwhile."""

        def run() -> None:
            with contextlib.suppress(*[DeadKernelError] if dies else []):
                self.run(source)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def save(self) -> Any:
        """Write the notebook, and read it as another program does."""
        _nbformat.write(self.notebook, self.path)
        return _nbformat.read(self.path, as_version=4)

    def close(self) -> None:
        self._portal.call(self._client._async_cleanup_kernel)
        self._stack.close()


def html_of(output: Any) -> str:
    return str(output["data"]["text/html"])


class Lab:
    """A site on another host name, as that of a notebook server, whose page shows the output of a cell."""

    def __init__(self) -> None:
        self.html = ""
        lab = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = f"<!doctype html><title>lab</title>{lab.html}".encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *message: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Closing waits for their connections, which the browser may open and not use.
        self._server.daemon_threads = False
        # The page is at 127.0.0.1: another site for the browser, which sends it no cookie.
        self.address = f"http://localhost:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
