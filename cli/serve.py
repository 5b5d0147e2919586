"""`offloop serve`: the live page for a directory of runs, whichever processes write them. Imports no torch."""

import os
import signal
import time
from pathlib import Path
from typing import Final

from offloop.cli.output import fail, interrupt_on
from offloop.dashboard.options import Options
from offloop.dashboard.serving.announcement import announce
from offloop.dashboard.serving.server import Server
from offloop.engine.paths import meant_run

HISTORY_BYTES: Final = 128 * 1024 * 1024
"""Memory for the curves of one run: half of what a run's own page takes, because several are open."""


def serve_runs(runs_dir: Path, *, port: int | None, host: str, open_browser: bool, read_only: bool) -> None:
    """Serve until Ctrl-C or SIGTERM. Blocks its thread, which is the main one."""
    try:
        os.scandir(runs_dir).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        fail(f"{runs_dir} cannot be served: {why}{meant_run(runs_dir)}")
    options = Options(host=host, port=port, read_only=read_only, history_bytes=HISTORY_BYTES)
    try:
        server = Server(options, runs_dir)
    except (OSError, UnicodeError) as error:
        fail(error.strerror or str(error) if isinstance(error, OSError) else f"--host {host!r}: {error}")
    interrupt_on(signal.SIGTERM)
    try:
        announce(
            server,
            open_browser=open_browser,
            quiet=False,
            without_encryption="leave --host out and use ssh -L, or put a proxy with https before it",
        )
        while server.is_serving:
            # Unlike waiting for a lock, sleeping ends with Ctrl-C on every system.
            time.sleep(0.5)
    except KeyboardInterrupt:
        server.close("the server was interrupted")
