"""Runs examples/web_service.py in a process of its own, and uses it over HTTP."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
from memory_link import PageModel
from socket_viewer import PATIENCE, SocketViewer

HOST: Final = Path(__file__).parent / "host_application.py"
OWNER: Final = {"Authorization": "Bearer of the owner"}


class Service:
    """The example's service in a process of its own, or what stands in front of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.http = httpx.Client(base_url=address, headers=OWNER, timeout=PATIENCE)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def start(self) -> str:
        return str(self.http.post("/runs", json={"lr": 0.1}).json()["run"])

    def cancel(self, run: str) -> None:
        assert self.http.delete(f"/runs/{run}").json() == {"status": "cancelled"}

    def watch(self, token: str = "of the owner", page: PageModel | None = None) -> SocketViewer:
        return SocketViewer(f"{self.address}/train/", token=token, page=page)


@contextlib.contextmanager
def serving(server: str, root_path: str = "") -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(HOST), server, root_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
