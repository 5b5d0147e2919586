"""Dashboard: the live page as a callback. Its server opens with the first run and closes with the last one."""

import atexit
import contextlib
import logging
import ssl as tls
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self

import anyio
import anyio.to_thread
import msgspec

from offloop.dashboard.curves.history import HISTORY_BYTES
from offloop.dashboard.lease import Lease, SharedServer
from offloop.dashboard.notebook import HEIGHT, CellOutput, address_in_browser, is_in_notebook
from offloop.dashboard.options import Options
from offloop.dashboard.runs.milestones import MILESTONE_BYTES
from offloop.dashboard.runs.page_file import remove_page_file, write_page_file
from offloop.dashboard.serving.announcement import announce, say
from offloop.dashboard.serving.asgi import Auth, DashboardApp
from offloop.dashboard.serving.security import host_name
from offloop.dashboard.serving.server import Server
from offloop.engine import Callback, TrainStart, checks, decides
from offloop.engine.argument_hints import explains_arguments

if TYPE_CHECKING:
    # A replay with the page loads no torch.
    from offloop.engine import ReplayedRun, Run

logger = logging.getLogger("offloop")

SAMPLES_HELD: Final = 50_000
"""Most steps that wait for the page; it reads them within milliseconds unless the machine is overloaded."""

_shared: Final = SharedServer()


class Dashboard(Callback):
    """Shows runs live in the browser and lets their owner steer them.

    ```python
    result = trainer.train(train_loader, val_loader, epochs=10, callbacks=[Dashboard()])
    ```

    This prints an address to open. The page shows curves, events and the configuration as the run progresses, and
    can pause, resume, stop, validate, save checkpoints and set the learning rate. See `docs/dashboard.md`.

    The server opens with the first run and closes with the last one, after telling its viewers how the run ended;
    a tab that stays open finds the next run. `async with Dashboard():` or `with Dashboard():` keeps the server open
    for the whole block, however many runs it contains. One server serves all runs of a process, with the address
    and the settings of the dashboard that opened it.

    The server has its own thread and reads events from a bounded buffer, so training never waits for a viewer.
    `docs/benchmarks.md` has its measured cost.
    """

    # A failing page must not end the run.
    on_error = "isolate"

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
        milestone_bytes: int = MILESTONE_BYTES,
        max_viewers: int = 64,
        allow_hosts: Sequence[str] = (),
        frame_ancestors: Sequence[str] = (),
        compression: bool = False,
        ssl: tls.SSLContext | None = None,
        quiet: bool = False,
    ) -> None:
        """Configure the page; nothing opens before a run begins.

        Args:
            host: Address to listen on. The default is reachable from this machine only; with any other address,
                also give `ssl`.
            port: 1 to 65535 for exactly this port, 0 for any free one. Default None: 8321, or the next free port
                of the 20 after it.
            open: Open the page in the browser. Default False.
            keep_open: Keep serving after the last run; at the end of the script wait for Ctrl-C. Default False. A
                run that ends by Ctrl-C or SIGTERM closes the page all the same, as does the end of an interactive
                session.
            token: Secret in the address that grants access: at least 16 printable ASCII characters without spaces.
                Default None: a random one for each process. A browser that was admitted once keeps access to later
                processes at the same port for 30 days.
            read_only: Accept no commands from any viewer. Default False.
            frames_per_second: Chart updates per second and viewer, above 0 and at most 60. Default 10.
            history_bytes: Memory in bytes for the curves of one run, at least 1,000,000. Default 256 MiB. Beyond
                it the oldest part is reduced to minima and maxima.
            milestone_bytes: Memory in bytes for the milestones of one run, at least 1,000,000. Default 64 MiB. Beyond
                it, and beyond 2,000 milestones, new viewers do not get the oldest, and are told how many.
            max_viewers: Most tabs open at the same time, at least 1. Default 64. An eighth of them, at least one,
                is kept for viewers who may steer, unless nobody may.
            allow_hosts: More host names, without port, under which browsers may reach the server, such as that of
                a proxy. Default none.
            frame_ancestors: Origins that may embed the page in a frame, such as a notebook server's. Default none.
            compression: Compress messages, for slow links; takes three times the CPU time. Default False.
            ssl: Context for https: `ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)` with a certificate
                loaded. Default None: plain http.
            quiet: Do not print the address; read it from `url`. Default False.

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
        checks.whole_number("milestone_bytes", milestone_bytes, at_least=1_000_000)
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
            milestone_bytes=milestone_bytes,
            max_viewers=max_viewers,
            allow_hosts=tuple(allow_hosts),
            frame_ancestors=tuple(frame_ancestors),
            compression=compression,
            ssl=ssl,
        )
        self._open_browser = open
        self._quiet = quiet
        # A run calls `reset`, `on_train_start` and `close` one after the other, so their attributes need no lock.
        self._run: Run | ReplayedRun | None = None
        self._run_lease: Lease | None = None
        # `with` blocks may nest or stand in several threads: append and pop are atomic, and any lease will do.
        self._block_leases: list[Lease] = []
        # The server of the newest lease, which other dashboards may keep open longer.
        self._server: Server | None = None
        self._cell: CellOutput | None = None

    # As a callback

    def reset(self) -> None:
        """Open the server before the run begins, so that an unusable address raises in the caller.

        Raises:
            OSError: The server cannot listen on the address.
            ValueError: A server with other settings is open.
        """
        self._run_lease = self._acquire()

    @decides
    def on_train_start(self, event: TrainStart, run: "Run | ReplayedRun") -> None:
        """Subscribe the hub before the first step, so that it misses none."""
        assert self._server is not None
        self._run = run
        subscription = run.events(buffer=SAMPLES_HELD, name="Dashboard")
        self._server.add_run(run, event, subscription)
        if self._cell is not None:
            self._cell.show_frame()
        if run.dir is not None and not self._server.options.is_mounted:
            # Without the file, pages of other processes do not lead here.
            with contextlib.suppress(OSError):
                write_page_file(run.dir, self._server.address)

    def close(self) -> None:
        """Tell the viewers how the run ended; the last run closes the server."""
        run, self._run = self._run, None
        lease, self._run_lease = self._run_lease, None
        if lease is None:
            return
        if run is not None:
            if run.dir is not None:
                remove_page_file(run.dir)
            picture = lease.server.finish_run(run, with_picture=self._cell is not None)
            if self._cell is not None and picture is not None:
                self._cell.show_picture(picture, f"{run!r}")
            if run.interrupted:
                lease.unpin()
        lease.release("the run is over")

    # As a context manager, and by hand

    @property
    def url(self) -> str:
        """Address of the page with the token in it, which grants control of the runs.

        Raises:
            RuntimeError: The dashboard is not open, or mounted.
        """
        return self._at_port().url

    @property
    def read_only_url(self) -> str:
        """Address of the page for viewers who may watch but not steer.

        Raises:
            RuntimeError: The dashboard is not open, or mounted.
        """
        return self._at_port().read_only_url

    def asgi(self, *, auth: Auth | None = None) -> DashboardApp:
        """Return the page as an ASGI application, to be mounted in that of a service, such as FastAPI's.

        ```python
        dashboard = Dashboard()
        app.mount("/train", dashboard.asgi(auth=role_of))
        ```

        Runs with `callbacks=[Dashboard()]`, one for each run, show themselves there. No port is opened and no address
        printed. The page works below any path, and needs no lifespan; see `docs/embedding.md`.

        Args:
            auth: Says who asks. It is called with the ASGI `scope` of each request for the page and its status, and of
                each websocket when it is opened, and returns `"control"`, `"read_only"`, or None to refuse. A
                coroutine function runs on the event loop of the application, a plain function in a thread. A request
                is refused if it raises, or takes longer than 10 s; the first failure is logged. There is no
                token in the address.

        Raises:
            TypeError: There is no `auth`.
            ValueError: The dashboard has settings for a port, such as `host` or `token`; or a page with other settings
                is open.
        """
        if not callable(auth):
            raise TypeError(
                f'asgi() needs auth: a function of the ASGI scope that returns "control", "read_only" or None, got '
                f"{auth!r}; to let everybody steer, give auth=lambda scope: 'control'"
            )
        unmounted = Options()
        for name in ("host", "port", "token", "compression", "ssl"):
            if (given := getattr(self._options, name)) != getattr(unmounted, name):
                raise ValueError(
                    f"{name} is the application's: leave it away where the page is mounted, got {given!r}"
                )
        if self._open_browser or self.keep_open:
            raise ValueError(
                "open and keep_open are for a page of its own: leave them away where it is mounted"
            )
        options = msgspec.structs.replace(self._options, is_mounted=True)
        _shared.mount(options)
        self._options = options
        return DashboardApp(self._open, auth, options)

    async def _open(self) -> Server:
        """Return the server; it opens with the first request or run."""
        if self._server is None or not self._server.is_serving:
            await _in_thread(self._acquire)
        return self._serving()

    def show(self, height: int = HEIGHT, *, address: str | None = None) -> None:
        """Show the page in the output of this cell of a notebook, live; the last expression `dashboard` does so, too.

        ```python
        dashboard = Dashboard()
        dashboard.show()
        result = trainer.train(train_loader, val_loader, epochs=10, callbacks=[dashboard])
        ```

        The server opens, if it is not open, and stays open until the kernel ends. When a run of this dashboard is over,
        a picture of its curves takes the place of the page, so that a saved notebook shows something; `show()` in
        another cell shows the page again.

        Blocks for milliseconds.

        Args:
            height: Of the frame, pixels, at least 100.
            address: Where the browser finds the page, such as `"/user/me/proxy/8321/"`. Default None: the page's own
                address, or that of jupyter-server-proxy on a JupyterHub.

        Raises:
            RuntimeError: This is no notebook, or the page is mounted in an application.
            OSError: The server cannot listen on the address.
        """
        checks.whole_number("height", height, at_least=100)
        if not is_in_notebook():
            raise RuntimeError("show() is for notebooks; elsewhere, Dashboard(open=True) opens the browser")
        lease = self._acquire(quiet=True)
        lease.pin()
        self._block_leases.append(lease)
        server = self._at_port()
        self._cell = CellOutput(
            address or address_in_browser(server.port, server.address), *server.admit_frames(), height
        )

    def _ipython_display_(self) -> None:
        if is_in_notebook():
            self.show()
        else:
            print(repr(self))

    def wait_for_interrupt(self) -> None:
        """Keep serving until Ctrl-C, then close. Blocks its thread; for the end of a script."""
        server = self._server
        if server is None or not server.is_serving:
            return
        with contextlib.suppress(KeyboardInterrupt):
            if not self._quiet:
                say("The live page stays open: press Ctrl-C to end it.")
            while server.is_serving:
                # Unlike waiting for a lock, sleeping ends with Ctrl-C on every system.
                time.sleep(0.5)
        server.close("the server was interrupted")

    def __enter__(self) -> Self:
        self._block_leases.append(self._acquire())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._block_leases.pop().release("the dashboard was closed")

    async def __aenter__(self) -> Self:
        await _in_thread(self.__enter__)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.__exit__)

    def _serving(self) -> Server:
        if self._server is None or not self._server.is_serving:
            raise RuntimeError("the dashboard is not open: it opens with a run or in `with Dashboard()`")
        return self._server

    def _at_port(self) -> Server:
        server = self._serving()
        if server.options.is_mounted:
            raise RuntimeError(
                "the page is mounted: its address is the one where the application mounts asgi()"
            )
        return server

    def _acquire(self, *, quiet: bool = False) -> Lease:
        lease = _shared.acquire(self._options)
        self._server = lease.server
        if self.keep_open and lease.pin():
            atexit.register(self._at_exit)
        if lease.is_first and not lease.server.options.is_mounted:
            announce(
                lease.server,
                open_browser=self._open_browser,
                quiet=quiet or self._quiet,
                without_encryption="give Dashboard(ssl=...)",
            )
        return lease

    def _at_exit(self) -> None:
        """Keep a script's page open; leaving an interactive session closes it."""
        if not hasattr(sys, "ps1"):
            self.wait_for_interrupt()
        elif self._server is not None:
            self._server.close("the session has ended")


async def _in_thread(work: Callable[[], object]) -> None:
    """Run a blocking function in a worker thread; a cancellation waits until it returns."""
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
