"""Runs with a page, in this process and in another one, for tests of programs that watch them."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc

from offloop.dashboard import Dashboard
from offloop.engine import Run, RunEndedError
from offloop.engine.testing import EndlessLoader, tiny_loader, tiny_trainer

ENDLESS: Final = 10**9  # steps
LONG: Final = 60.0
"""Seconds that nothing here should take, also on a busy machine."""
SERVER: Final = Path(__file__).with_name("serve_a_run.py")


@asynccontextmanager
async def served(*, callbacks: Any = (), **options: Any) -> AsyncIterator[tuple[Dashboard, Run]]:
    """A run without an end, and its page."""
    with anyio.fail_after(LONG):
        async with Dashboard(port=0, quiet=True, **options) as dashboard:
            async with tiny_trainer(callbacks=[dashboard, *callbacks]).start(
                EndlessLoader(), tiny_loader(2), max_steps=ENDLESS
            ) as run:
                yield dashboard, run
                with suppress(RunEndedError):
                    run.stop_nowait("the test is over")


@asynccontextmanager
async def serving_process(
    directory: Path, *words: str, port: int = 0
) -> AsyncIterator[tuple[anyio.abc.Process, str]]:
    """A process that trains without end, and the address of its page. It is killed in the end."""
    command = [sys.executable, str(SERVER), str(port), "run", str(directory), *words]
    async with await anyio.open_process(command, stderr=None) as process:
        try:
            assert process.stdout is not None
            said = b""
            while b"\n" not in said:
                said += await process.stdout.receive()
            yield process, said.decode().strip()
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def port_of(dashboard: Dashboard) -> int:
    assert dashboard._server is not None
    return dashboard._server.port


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is so; each turn lets everything else run."""
    while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
        await anyio.sleep(0.002)
