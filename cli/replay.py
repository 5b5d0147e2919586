"""`offloop replay`: the recorded events of a run to callbacks, the live page or the terminal. Imports no torch."""

import contextlib
import functools
import importlib
import importlib.util
import math
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import anyio
import msgspec
from anyio.abc import TaskStatus
from rich.console import Console
from rich.live import Live
from rich.text import Text

from offloop.cli.keys import has_keys, keys_at_once, read_keys
from offloop.cli.output import check_run, cut, fail, number, print_error, print_text, reason
from offloop.dashboard import Dashboard
from offloop.engine import (
    Callback,
    ConfigError,
    Event,
    NotedCommand,
    Replay,
    ReplayedRun,
    ReplayResult,
    RunEndedError,
    Sample,
    StepEnd,
    UnknownEvent,
)
from offloop.engine.visible_text import visible

REDRAW: Final = 0.25
"""Seconds between two drawings of the last line."""
LONGEST: Final = 160
"""Columns of the line of an event, where there is no terminal."""
FACTORS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1_000.0, math.inf)
"""Speeds that the keys go through."""
KEYS: Final = "space pause  n next event  s next step  + - speed  q end"
_BASE: Final = frozenset(Event.__struct_fields__)


def replay_run(
    run_dir: Path,
    *,
    callbacks: Sequence[str],
    imports: Sequence[str],
    page: bool,
    open_browser: bool,
    port: int | None,
    speed: str | None,
    paused: bool,
    directory: Path | None,
) -> None:
    """Replay until the log or a person ends it. Blocks its thread, which is the main one."""
    check_run(run_dir)
    factor = _speed(speed, default=1.0 if page or has_keys() else math.inf)
    if paused and not (page or has_keys()):
        fail("--paused needs a terminal with keys, or --page: nothing else ends the pause")
    sys.path.insert(0, "")
    for name in imports:
        _imported(name, "--import")
    chosen = [_callback(spec) for spec in callbacks]
    shown = EventPrinter(prints_all=not (chosen or page))
    dashboard = Dashboard(port=port, open=open_browser) if page else None
    try:
        control = Replay(
            run_dir,
            callbacks=[*chosen, *([] if dashboard is None else [dashboard]), shown],
            speed=factor,
            paused=paused,
            directory=directory,
        )
    except (ConfigError, TypeError, OSError) as error:
        fail(reason(error) if isinstance(error, OSError) else str(error))
    shown.control = control
    if page and paused:
        # There is no run on the page, and no button, before the first event
        control.advance_nowait()
    result: ReplayResult | None = None
    try:
        with dashboard or contextlib.nullcontext():
            result = anyio.run(functools.partial(_replay, control, shown, stays=page))
    except (ConfigError, OSError) as error:
        if isinstance(error, BrokenPipeError) or control.events_done:
            # A callback's, which has a traceback; or a pipe that nobody reads
            raise
        fail(reason(error))
    except KeyboardInterrupt:
        pass
    if result is not None:
        _tell(result, [type(callback).__name__ for callback in chosen])


def _speed(speed: str | None, *, default: float) -> float:
    if speed is None:
        return default
    try:
        factor = math.inf if speed == "max" else float(speed)
    except ValueError:
        factor = math.nan
    if not factor > 0:
        fail(
            f"--speed must be a number above 0, or max; got {speed!r}"
            + (": to hold it, give --paused" * (factor == 0))
        )
    return factor


# What is replayed into -----------------------------------------------------------------------------


def _callback(spec: str) -> Callback:
    """Return the callback that `file.py:Name` or `package.module:Name` means; a class is called without arguments."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        fail(f"--callback must be file.py:Name or package.module:Name, got {spec!r}")
    module = _imported(place, "--callback")
    found = getattr(module, name, None)
    if found is None:
        named = [each for each, value in vars(module).items() if _is_callback(value)]
        fail(
            f"--callback {spec}: there is no {name} in {place}; callbacks there: {', '.join(named) or 'none'}"
        )
    if isinstance(found, type) and issubclass(found, Callback):
        try:
            return found()
        except TypeError as error:
            fail(f"--callback {spec}: {error}; make an instance in the file, and name that")
    if not isinstance(found, Callback):
        fail(f"--callback {spec}: it is no callback, but a {type(found).__name__}")
    return found


def _is_callback(value: object) -> bool:
    return isinstance(value, Callback) or (isinstance(value, type) and issubclass(value, Callback))


def _imported(place: str, option: str) -> ModuleType:
    """Import a module by its name, or a file as the module of its name."""
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        fail(f"{option}: there is no file {place}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Before it runs: classes and pickle look for it there
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = frames[-1]
        at = (
            f" ({where.filename}, line {where.lineno})"
            if not isinstance(error, ImportError | SyntaxError)
            else ""
        )
        what = " ".join(traceback.format_exception_only(error)).strip()
        if any(frame.name in ("train", "train_async") for frame in frames):
            at += '; the file is run: what trains in it belongs behind if __name__ == "__main__":'
        fail(f"{option} {place}: {what}{at}")
    return module


# What there is to see ------------------------------------------------------------------------------


class EventPrinter(Callback):
    """Prints events, and the commands of callbacks. The last of all callbacks."""

    # A pipe that nobody reads any more ends the replay
    on_error = "raise"
    control: Replay

    def __init__(self, *, prints_all: bool) -> None:
        self._prints_all = prints_all
        self._is_terminal = has_keys()
        self._told = 0
        self.loss: float | None = None
        self.write: Callable[[str], None] = print_text

    def on_event(self, event: Event, run: ReplayedRun) -> None:
        self.tell_commands()
        if isinstance(event, StepEnd):
            self.loss = event.loss
        is_shown = self._prints_all or (self._is_terminal and self.control.is_paused)
        # On a terminal, the last line shows the steps
        if self._is_terminal and isinstance(event, Sample | UnknownEvent) and not self.control.is_paused:
            is_shown = False
        if is_shown:
            columns = shutil.get_terminal_size().columns if self._is_terminal else LONGEST
            self.write(cut(line_of(event), columns))

    def tell_commands(self, commands: Sequence[NotedCommand] | None = None) -> None:
        """Print the commands that were given since the last call."""
        commands = self.control.commands if commands is None else commands
        for each in commands[self._told :]:
            self.write(f"-> {each}")
        self._told = max(self._told, len(commands))


def line_of(event: Event) -> str:
    """Return an event in a line: when, at which step, what, and its numbers and words."""
    name = event.type if isinstance(event, UnknownEvent) else type(event).__name__
    parts = [time.strftime("%H:%M:%S", time.localtime(event.time)), f"step {event.step}", name]
    if not isinstance(event, UnknownEvent):
        parts += _figures(event)
    return " ".join(visible("  ".join(parts)).split("\n"))


def _figures(event: Event) -> Iterator[str]:
    defaults = dict(zip(reversed(event.__struct_fields__), reversed(event.__struct_defaults__), strict=False))
    for name, value in msgspec.structs.asdict(event).items():
        if name in _BASE or (name in defaults and value == defaults[name]):
            continue
        if isinstance(value, bool | str):
            yield f"{name}={value}"
        elif isinstance(value, int | float):
            yield f"{name}={value if isinstance(value, int) else number(value)}"
        elif isinstance(value, Mapping) and all(isinstance(each, float) for each in value.values()):
            yield from (f"{key}={number(each)}" for key, each in value.items())


def _tell(result: ReplayResult, callbacks: Sequence[str]) -> None:
    """Print what there is to know at the end, where these callbacks were chosen."""
    ended = "" if result.is_complete else ", ended before its end"
    print_error(f"{result.run_id}: {result.events:,} events up to step {result.step:,}{ended}")
    if callbacks and not result.commands:
        print_error(f"{', '.join(callbacks)} gave no command")
    for name, errors in result.callback_errors.items():
        more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        print_error(f"{name} failed in {errors[0]}{more}")
    for note in result.notes:
        print_error(
            note.replace("import their modules before the replay", "give their modules with --import")
        )
    if result.dir is not None:
        print_error(f"what callbacks wrote: {result.dir}")


# While it goes on ----------------------------------------------------------------------------------


async def _replay(control: Replay, shown: EventPrinter, *, stays: bool) -> ReplayResult:
    """Replay, with keys on a terminal; with the page, until a person ends it."""
    ended = anyio.Event()
    outcome: list[ReplayResult] = []
    failure: list[Exception] = []
    with contextlib.ExitStack() as stack:
        async with anyio.create_task_group() as tasks:
            await tasks.start(_end_on_signals, control, ended.set)
            if has_keys():
                stack.enter_context(keys_at_once())
                live = Live(console=Console(), auto_refresh=False, transient=True)
                stack.enter_context(live)
                shown.write = functools.partial(_print_above, live.console)
                view = _View(control, shown, live, ended.set)
                tasks.start_soon(view.draw_at_pace)
                tasks.start_soon(view.read_keys)
            try:
                outcome.append(await control.run_async())
                shown.tell_commands(outcome[0].commands)
                if stays and not control.is_stopped:
                    await ended.wait()
            except Exception as error:
                # Not in a group
                failure.append(error)
            tasks.cancel_scope.cancel()
    if failure:
        raise failure.pop()
    return outcome[0]


async def _end_on_signals(
    control: Replay, end: Callable[[], None], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """End in order at a first signal. A second one does what the system does with it."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            control.stop()
            end()
            break


def _print_above(console: Console, text: str) -> None:
    """Print text above the last line."""
    console.print(Text(visible(text)))


class _View:
    """The last line of the terminal, and what the keys do."""

    def __init__(self, control: Replay, shown: EventPrinter, live: Live, end: Callable[[], None]) -> None:
        self._control = control
        self._shown = shown
        self._live = live
        self._end = end
        self._changed = anyio.Event()

    async def draw_at_pace(self) -> None:
        while True:
            self._draw()
            with anyio.move_on_after(REDRAW):
                await self._changed.wait()
            self._changed = anyio.Event()

    def _draw(self) -> None:
        control = self._control
        state = "over" if control.is_over else "paused" if control.is_paused else "replay"
        speed = "max" if control.speed is None else f"{control.speed:g}x"
        event = control.event
        parts = [visible(control.id), state, speed, f"{math.floor(100 * control.progress)} %"]
        if event is not None:
            parts += [f"step {event.step:,}", f"epoch {event.epoch}"]
        if self._shown.loss is not None:
            parts.append(f"loss {number(self._shown.loss)}")
        if event is not None and control.is_paused:
            parts.append(type(event).__name__)
        columns = self._live.console.size.width
        keys = "q end" if control.is_over else KEYS
        lines = Text(cut("  ".join(parts), columns), "bold", no_wrap=True, end="")
        self._live.update(Text("\n").join([lines, Text(cut(keys, columns), "dim")]), refresh=True)

    async def read_keys(self) -> None:
        async for keys in read_keys():
            for key in keys:
                # One that comes as the replay ends does nothing
                with contextlib.suppress(RunEndedError):
                    self._press(key)
            self._changed.set()
        self._leave()

    def _press(self, key: bytes) -> None:
        control = self._control
        match key:
            case b"q" | b"Q" | b"\x03" | b"\x04":
                self._leave()
            case b" " | b"p" if control.is_paused:
                control.resume_nowait()
            case b" " | b"p":
                control.pause_nowait()
            case b"n":
                control.advance_nowait()
            case b"s":
                control.advance_nowait(StepEnd)
            case b"+" | b"=":
                self._turn_speed(1)
            case b"-":
                self._turn_speed(-1)
            case _:
                pass

    def _turn_speed(self, by: int) -> None:
        speed = self._control.speed or math.inf
        if by > 0:
            self._control.speed = next((each for each in FACTORS if each > speed), math.inf)
        else:
            self._control.speed = next((each for each in reversed(FACTORS) if each < speed), FACTORS[0])

    def _leave(self) -> None:
        self._control.stop()
        self._end()
