"""Ranks in processes of their own that speak through a store of rank 0, without torchrun's agent beside them."""

import os
import socket
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from warm_python import ScriptProcess, WarmPython

PATIENCE: Final = 60.0
"""Seconds after which the system ends a script that hangs."""


def free_port() -> int:
    """Return a port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Ranks:
    """Starts ranks that run one script, and kills those that still run at the end."""

    def __init__(self, python: WarmPython, folder: Path, script: str) -> None:
        """Write the script; it gets `rank`, and `say`, which prints a line."""
        self._python = python
        self._script = folder / "rank.py"
        self._started: list[ScriptProcess] = []
        self.port = free_port()
        head = (
            "import os, signal, sys\n"
            f"signal.alarm({PATIENCE:.0f})\n"
            "rank = int(os.environ.get('RANK', 0))\n"
            "def say(*words): print(*words, flush=True)\n"
        )
        self._script.write_text(head + textwrap.dedent(script))

    def start(
        self,
        rank: int,
        world_size: int = 2,
        *,
        port: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> ScriptProcess:
        """Start one rank. What it writes to stderr comes with what it prints."""
        environment = {
            # torch asks a name server for the name of each address, and waits for seconds if the answer is lost
            "RES_OPTIONS": "timeout:1",
            **os.environ,
            **rank_variables(rank, world_size, port or self.port),
            **(variables or {}),
        }
        process = self._python.start(self._script, environment=environment, merges_streams=True)
        self._started.append(process)
        return process

    def run(
        self, world_size: int = 2, *, port: int | None = None, variables: Mapping[str, str] | None = None
    ) -> list[tuple[int | None, str]]:
        """Start all ranks and wait for them; return exit code and output of each."""
        started = [self.start(rank, world_size, port=port, variables=variables) for rank in range(world_size)]
        said = [each.communicate()[0] for each in started]
        return [(each.returncode, text) for each, text in zip(started, said, strict=True)]

    def close(self) -> None:
        """Kill what still runs, and stopped processes too."""
        for each in self._started:
            with each:
                pass
