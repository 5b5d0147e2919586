"""`offloop watch`: a run of another process in the terminal, live. Imports no torch."""

import contextlib
import functools
import getpass
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
from rich.console import Console, Group
from rich.live import Live

from offloop.cli.keys import has_keys, keys_at_once, read_keys
from offloop.cli.output import check_run, fail, interrupt_on, number, print_text, reason
from offloop.cli.watch_screen import Seen, clock_time, line_of, screen
from offloop.dashboard.client.address import TOKEN_VARIABLE
from offloop.dashboard.client.curves import MetricCurve
from offloop.dashboard.client.watch import Watch, connect
from offloop.dashboard.options import Options
from offloop.dashboard.serving.server import Server
from offloop.engine import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    LearningRateChanged,
    OffloopError,
    StateChanged,
    TrainEnd,
    ValidationEnd,
)

REDRAW: Final = 0.5
"""Seconds between two drawings."""
LINE_INTERVAL: Final = 10.0
"""Seconds between two lines where there is no terminal."""
CURVE_INTERVAL: Final = 1.0
"""Least seconds between two looks at the curve; a long one is looked at less often."""
CURVE_SHARE: Final = 50
"""A look at the curve waits for so many times as long as the last one took."""
EVENTS_KEPT: Final = 50
_SHOWN: Final = (
    ValidationEnd,
    CheckpointSaved,
    CheckpointFailed,
    LearningRateChanged,
    Evaluated,
    StateChanged,
    TrainEnd,
)


def watch_run(target: str, *, token_file: Path | None, run: str | None, metric: str | None) -> None:
    """Watch until the run is over, or until a key or Ctrl-C ends it. Blocks its thread, which is the main one."""
    why = ""
    with _source(target, token_file, run) as (url, token, name):
        # In order, so that the terminal is as it was.
        interrupt_on(signal.SIGTERM, signal.SIGHUP)
        try:
            anyio.run(functools.partial(_watch, url, token, name, metric))
        except* KeyboardInterrupt:
            pass
        except* OffloopError as errors:
            why = str(errors.exceptions[0])
    if why:
        fail(why)


@contextlib.contextmanager
def _source(
    target: str, token_file: Path | None, run: str | None
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield address, token and run. A directory is served here, to this program alone."""
    if target.startswith(("http://", "https://")):
        yield target, _token(target, token_file), run
        return
    directory = Path(target)
    if run is not None:
        fail("--run is for addresses; a directory is that of one run")
    check_run(directory)
    directory = directory.resolve()
    try:
        server = Server(Options(port=0, read_only=True), directory.parent)
    except OSError as error:
        fail(reason(error))
    try:
        yield server.url, None, directory.name
    finally:
        server.close("the terminal was closed")


def _token(url: str, token_file: Path | None) -> str | None:
    """Return the token for an address that has none: of a file, of the environment, or as somebody types it."""
    if token_file is not None:
        try:
            return token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--token-file cannot be read: {reason(error) if isinstance(error, OSError) else error}")
    if "token=" in url or os.environ.get(TOKEN_VARIABLE):
        return None
    if not sys.stdin.isatty():
        fail(f"the address has no token: set {TOKEN_VARIABLE}, or give --token-file")
    return getpass.getpass("Token: ").strip()


async def _watch(url: str, token: str | None, run: str | None, metric: str | None) -> None:
    is_terminal = has_keys()
    view = _View(metric)
    async with contextlib.AsyncExitStack() as stack:
        if is_terminal:
            stack.enter_context(keys_at_once())
            live = Live(console=Console(), screen=True, auto_refresh=False, transient=True)
            stack.enter_context(live)
            draw: Callable[[], None] = functools.partial(view.draw, live)
        else:
            draw = view.print_line
        while True:
            async with connect(url, token=token, run=run) as watch:
                run = await view.follow(watch, draw, is_terminal=is_terminal)
            if run is None:
                break
    if is_terminal:
        view.print_line()


class _View:
    """What is shown of a run, and what the keys do."""

    def __init__(self, metric: str | None) -> None:
        self._metric = metric
        self._watch: Watch
        self._curve: MetricCurve | None = None
        self._events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self._notice = ""
        self._asks_stop = False
        self._next: str | None = None
        self._tasks: anyio.abc.TaskGroup
        # Something else is to be shown; another metric is to be shown.
        self._changed, self._turned = anyio.Event(), anyio.Event()

    async def follow(self, watch: Watch, draw: Callable[[], None], *, is_terminal: bool) -> str | None:
        """Show a run, and return the key of the one to be shown next; None for none."""
        self._watch, self._curve, self._next = watch, None, None
        self._events.clear()
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._read_events)
            self._tasks.start_soon(self._read_curve)
            if is_terminal:
                self._tasks.start_soon(self._read_keys)
            while is_terminal or not watch.is_over:
                draw()
                with anyio.move_on_after(REDRAW if is_terminal else LINE_INTERVAL):
                    await self._changed.wait()
                self._changed = anyio.Event()
            self._tasks.cancel_scope.cancel()
        if not is_terminal:
            draw()
        return self._next

    # What there is to see

    def draw(self, live: Live) -> None:
        """Draw the screen."""
        columns, lines = live.console.size
        seen = self._seen(has_braille=live.console.encoding.startswith("utf"))
        live.update(Group(*screen(seen, columns, lines)), refresh=True)

    def print_line(self) -> None:
        """Print how the run stands."""
        print_text(line_of(self._seen()))

    def _seen(self, *, has_braille: bool = True) -> Seen:
        watch = self._watch
        return Seen(
            name=watch.id,
            state=watch.state,
            status=watch.status,
            metrics=watch.curves,
            metric=self._shown_metric() or "",
            curve=self._curve,
            events=tuple(self._events),
            notice=self._notice,
            is_connected=watch.is_connected or watch.is_over,
            may_steer="pause" not in watch.refused,
            has_braille=has_braille,
        )

    def _shown_metric(self) -> str | None:
        names = self._watch.curves
        if self._metric in names:
            return self._metric
        return next(
            (name for name in ("loss", self._watch.monitor) if name in names), names[0] if names else None
        )

    async def _read_events(self) -> None:
        async for event in self._watch.events(*_SHOWN):
            self._events.append(f"{clock_time(event.time)}  {_told(event)}")
            if isinstance(event, TrainEnd):
                self._changed.set()
        self._changed.set()

    async def _read_curve(self) -> None:
        while True:
            began = time.monotonic()
            name = self._shown_metric()
            if name is not None:
                self._curve = await self._watch.history(name)
            taken = time.monotonic() - began
            with anyio.move_on_after(max(CURVE_INTERVAL, CURVE_SHARE * taken)):
                await self._turned.wait()
            self._turned = anyio.Event()

    # Keys

    async def _read_keys(self) -> None:
        async for keys in read_keys():
            for key in keys:
                self._press(key)
            self._changed.set()
        # The terminal is gone.
        self._leave(None)

    def _press(self, key: bytes) -> None:
        if self._asks_stop:
            self._asks_stop, self._notice = False, ""
            if key in (b"y", b"Y"):
                self._give("stop", self._watch.stop)
            return
        match key:
            case b"q" | b"Q" | b"\x03" | b"\x04":
                self._leave(None)
            case b"\x1b[C" | b"\x1bOC" | b"]":
                self._turn_metric(1)
            case b"\x1b[D" | b"\x1bOD" | b"[":
                self._turn_metric(-1)
            case b"\t":
                self._turn_run()
            case b"p" if self._watch.state == "paused":
                self._give("resume", self._watch.resume)
            case b"p":
                self._give("pause", self._watch.pause)
            case b"s" if (why := self._watch.refused.get("stop")) is not None:
                self._notice = f"stop: {why}"
            case b"s" if not self._watch.is_over:
                self._asks_stop, self._notice = True, "Stop this run? y: yes, any other key: no"
            case _:
                pass

    def _turn_metric(self, by: int) -> None:
        names, shown = list(self._watch.curves), self._shown_metric()
        if shown is not None:
            self._metric = names[(names.index(shown) + by) % len(names)]
            self._curve = None
            self._turned.set()

    def _turn_run(self) -> None:
        runs = self._watch.runs
        places = [place for place, each in enumerate(runs) if each.key == self._watch.key]
        if len(runs) < 2:
            self._notice = "the server has no other run"
            return
        self._notice = ""
        self._leave(runs[((places[-1] if places else -1) + 1) % len(runs)].key)

    def _leave(self, run: str | None) -> None:
        self._next = run
        self._tasks.cancel_scope.cancel()

    def _give(self, name: str, command: Callable[[], Awaitable[Any]]) -> None:
        async def give() -> None:
            try:
                await command()
            except OffloopError as error:
                self._notice = f"{name}: {error}"
            else:
                self._notice = f"{name}: done at step {self._watch.step:,}"
            self._changed.set()

        self._notice = f"{name} …"
        self._tasks.start_soon(give)


def _told(event: Event) -> str:
    """Return an event in a line."""
    match event:
        case ValidationEnd() | Evaluated():
            figures = "  ".join(f"{name} {number(value)}" for name, value in event.metrics.items())
            return f"step {event.step}  {figures}"
        case CheckpointSaved():
            return f"step {event.step}  checkpoint saved"
        case CheckpointFailed():
            return f"step {event.step}  checkpoint failed: {event.error}"
        case LearningRateChanged():
            return f"step {event.step}  learning rate {number(event.lr)}"
        case StateChanged():
            return f"step {event.step}  {event.state} by {event.by}" + (
                f": {event.reason}" if event.reason else ""
            )
        case TrainEnd():
            return f"step {event.step}  {event.status}" + (f": {event.reason}" if event.reason else "")
        case _:
            return type(event).__name__
