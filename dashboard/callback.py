"""Dashboard: the live page as a callback. Opens the server with the first run, closes it with the last one."""

import atexit
import contextlib
import getpass
import logging
import os
import ssl as tls
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.to_thread

from offloop.dashboard.history import HISTORY_BYTES
from offloop.dashboard.security import host_name, is_loopback
from offloop.dashboard.server import Options, Server
from offloop.engine import Callback, Run, TrainStart, checks, decides
from offloop.engine.argument_hints import explains_arguments

logger = logging.getLogger("offloop")

SAMPLES_HELD: Final = 50_000
"""Steps that wait for the page at most; it takes them within milliseconds unless the machine is very busy."""

# One server serves all runs of a process: two on one port would be two tabs for one training.
_lock = threading.Lock()
_server: Server | None = None
_holders = 0
_kept: Server | None = None  # the one that has a holder until the process is interrupted


class Dashboard(Callback):
    """Shows runs in the browser, live, and lets their owner steer them.

    ```python
    result = trainer.train(train_loader, val_loader, epochs=10, callbacks=[Dashboard()])
    ```

    prints an address; open it. The page shows curves, events and configuration as they come, and pauses,
    resumes, stops, validates, saves checkpoints and sets the learning rate. See `docs/dashboard.md`.

    The server listens with the first run and closes with the last one, after telling its viewers how it went;
    a tab that stays open finds the next run. `async with Dashboard():` or `with Dashboard():` keeps it open
    for the length of the block, whatever runs come and go. One server serves all runs of a process: the first
    open dashboard decides where.

    It runs in a thread of its own, and takes events from a bounded buffer; training never waits for a viewer.
    What it costs is measured in `docs/benchmarks.md`.
    """

    on_error = "isolate"  # a page that fails is no reason to lose a run

    @explains_arguments()
    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        *,
        open: bool = False,
        keep_open: bool = False,
        token: str | None = None,
        read_only: bool = False,
        frames_per_second: float = 10.0,
        history_bytes: int = HISTORY_BYTES,
        max_viewers: int = 64,
        allow_hosts: Sequence[str] = (),
        frame_ancestors: Sequence[str] = (),
        compression: bool = False,
        ssl: tls.SSLContext | None = None,
        quiet: bool = False,
    ) -> None:
        """Describe the page; nothing is opened before a run begins.

        Args:
            host: Address to listen on. Others than loopback can be reached from other machines: give `ssl` then.
            port: None for 8321, or the next one that is free; 0 for any; else exactly this one.
            open: Open the page in the browser.
            keep_open: Keep serving after the last run, and at the end of the script wait for Ctrl-C. A run that is
                itself interrupted, or ended by SIGTERM, takes its page along; so does an interactive session.
            token: What gives access, at least 16 characters; None for one that nobody guesses. Every process
                has another one, but a browser that was let in once may come back for 30 days.
            read_only: Nobody may give commands.
            frames_per_second: Chart frames that a viewer gets, above 0 and at most 60.
            history_bytes: Memory for the curves of one run, at least 1,000,000. Beyond it the oldest part keeps
                only least and greatest values.
            max_viewers: Tabs that may be open at a time.
            allow_hosts: Further names under which browsers may reach it, as behind a proxy.
            frame_ancestors: Origins that may show the page in a frame, as a notebook server; none by default.
            compression: Compress what is sent: for slow links; costs three times the CPU time.
            ssl: For https, as `ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)` with a certificate loaded.
            quiet: Do not print the address; `url` has it.

        Raises:
            ValueError: An argument is out of its range; the text says which.
        """
        if not isinstance(host, str):
            raise ValueError(
                f"host must be a name or an address, got {host!r}; a port is Dashboard(port=...)"
            )
        checks.whole_number("port", port, at_least=0, at_most=65535, optional=True)
        if token is not None and (
            len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token
        ):
            raise ValueError("token must be at least 16 printable ASCII characters, without spaces")
        checks.number("frames_per_second", frames_per_second, above=0, at_most=60)
        checks.whole_number("history_bytes", history_bytes, at_least=1_000_000)
        checks.whole_number("max_viewers", max_viewers)
        for name, values in (("allow_hosts", allow_hosts), ("frame_ancestors", frame_ancestors)):
            if isinstance(values, str):
                raise ValueError(f"{name} must be a sequence of strings, got the string {values!r}")
        for name in allow_hosts:
            if host_name(name) != name.lower() or ":" in name:
                raise ValueError(
                    f"allow_hosts must be names without port, like hub.example.org, got {name!r}"
                )
        for origin in frame_ancestors:
            if any(character in origin for character in ";, \t\r\n") or not origin:
                raise ValueError(
                    f"frame_ancestors must be origins like https://hub.example.org, got {origin!r}"
                )
        self.keep_open = keep_open
        self._options = Options(
            host=host,
            port=port,
            token=token,
            read_only=read_only,
            frames_per_second=frames_per_second,
            history_bytes=history_bytes,
            max_viewers=max_viewers,
            allow_hosts=tuple(allow_hosts),
            frame_ancestors=tuple(frame_ancestors),
            compression=compression,
            ssl=ssl,
        )
        self._open_browser = open
        self._quiet = quiet
        self._server: Server | None = None
        self._holds = 0  # a run and blocks that keep the server open through this dashboard
        self._run_holds = False
        self._run: Run | None = None

    # As a callback

    def reset(self) -> None:
        """Open the server, before the run begins: what is wrong with the address is raised to the caller.

        Raises:
            OSError: The address cannot be listened on.
        """
        self._hold()
        self._run_holds = True

    @decides
    def on_train_start(self, event: TrainStart, run: Run) -> None:
        """Let the hub subscribe before the first step, so that no step is missed."""
        assert self._server is not None
        self._run = run
        subscription = run.events(buffer=SAMPLES_HELD, name="Dashboard")
        self._server.add_run(run, event, subscription)

    def close(self) -> None:
        """Tell the viewers how the run has ended, and close the server with the last run."""
        run, self._run = self._run, None
        if run is not None and self._server is not None:
            self._server.finish_run(run)
            if run.interrupted:
                self._stop_keeping()
        if self._run_holds:
            self._run_holds = False
            self._let_go("the run is over")

    # As a context manager, and by hand

    @property
    def url(self) -> str:
        """Address of the page, with the token in it: whoever has it may steer the run.

        Raises:
            RuntimeError: It is not open.
        """
        return self._serving().url

    @property
    def read_only_url(self) -> str:
        """Address of the page for those who may look but give no commands.

        Raises:
            RuntimeError: It is not open.
        """
        return self._serving().read_only_url

    def wait_for_interrupt(self) -> None:
        """Keep serving until Ctrl-C, then close. Blocks its thread; for the end of a script."""
        server = self._server
        if server is None or not server.is_serving:
            return
        if not self._quiet:
            _say("The live page stays open: press Ctrl-C to end it.")
        with contextlib.suppress(KeyboardInterrupt):
            while server.is_serving:
                time.sleep(0.5)  # unlike a lock's, this wait ends with Ctrl-C on every system
        server.close("the server was interrupted")

    def __enter__(self) -> Self:
        self._hold()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._let_go("the dashboard was closed")

    async def __aenter__(self) -> Self:
        await _in_thread(self._hold)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await _in_thread(lambda: self._let_go("the dashboard was closed"))

    def _serving(self) -> Server:
        if self._server is None or not self._server.is_serving:
            raise RuntimeError("the dashboard is not open: it opens with a run or in `with Dashboard()`")
        return self._server

    def _hold(self) -> None:
        global _server, _holders, _kept
        with _lock:
            server, is_new = _server, False
            if server is None or not server.is_serving:
                server, is_new = Server(self._options), True
                _server, _holders = server, 0
            elif self._server is not server and self._options not in (Options(), server.options):
                raise ValueError(
                    f"one server serves all runs of a process, and one is open at port {server.port} with other "
                    "settings: give the same settings, or none"
                )
            if self._server is not server:
                self._server, self._holds = server, 0
            self._holds += 1
            _holders += 1
            if self.keep_open and _kept is not server:
                _kept = server
                _holders += 1
                atexit.register(self._at_exit)
        if is_new:
            self._announce(server)

    def _stop_keeping(self) -> None:
        """Have the server close with its last run after all."""
        global _kept, _holders
        with _lock:
            if _kept is not None and _kept is self._server is _server:
                _kept = None
                _holders -= 1

    def _at_exit(self) -> None:
        """Keep a script's page open; who leaves an interactive session wants to leave."""
        if not hasattr(sys, "ps1"):
            self.wait_for_interrupt()
        elif self._server is not None:
            self._server.close("the session has ended")

    def _let_go(self, reason: str) -> None:
        global _server, _holders
        with _lock:
            if self._server is None or self._server is not _server or self._holds == 0:
                return
            self._holds -= 1
            _holders -= 1
            if _holders:
                return
            _server = None
        self._server.close(reason)

    def _announce(self, server: Server) -> None:
        if not is_loopback(self._options.host) and self._options.ssl is None:
            logger.warning(
                "the live page listens on %s without encryption: whoever can read the network can read the "
                "token and steer the run; give Dashboard(ssl=...)",
                self._options.host,
            )
        if server.page is None:
            logger.warning("the live page was not built: in a checkout run `make page`")
        if not self._quiet:
            _say(f"Live page: {server.url}")
            if "SSH_CONNECTION" in os.environ and is_loopback(self._options.host):
                where = os.environ["SSH_CONNECTION"].split()
                machine = where[2] if len(where) > 2 else "this-machine"
                _say(
                    f"From your own machine: ssh -L {server.port}:127.0.0.1:{server.port} {_user()}@{machine}"
                )
        if self._open_browser:
            with contextlib.suppress(RuntimeError):  # no more threads: the address is printed all the same
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()


async def _in_thread(work: Callable[[], None]) -> None:
    """Do what takes a moment beside the event loop, to its end."""
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "you"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
