"""ProgressBar: the progress of a run, live on a terminal or in a notebook, as occasional plain lines elsewhere.

All bars of a process on one terminal share a block of lines, which one thread redraws:

    what was printed
    what was printed last, if its line is not complete    <- the cursor
                                                          ROOM lines, with that of the cursor, take what is printed next
    epoch 3/5        ━━━━━━━━━━━━━━━━      0:12 left
    step 100/200     ━━━━━━━━              40 steps/s
    loss 0.25  lr 0.0003

Other output appears at the cursor, and the next redraw moves the block below it. So no output is captured: a worker
process forked while a redraw runs would inherit a captured stream with a held lock.

No more than `ROOM` lines should be printed between two redraws. Further ones are written over the block, whose remains
stay to the right of the shorter ones: a terminal does not tell that something was printed unless it is asked, and its
answer would be read as what the user types.
"""

import contextlib
import contextvars
import functools
import io
import logging
import os
import sys
import threading
import time
from typing import Any, Final, TextIO

from rich.console import Console
from rich.text import Text

from offloop.callbacks.progress_block import WIDE, Bar, Block, wrapped
from offloop.engine import (
    Callback,
    EpochEnd,
    EpochStart,
    Evaluated,
    RunHandle,
    StateChanged,
    StepEnd,
    TrainEnd,
    TrainStart,
    ValidationEnd,
    ValidationStart,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.bus.threads import Thread

logger = logging.getLogger("offloop")

REDRAW_INTERVAL: Final = 0.1
"""Least seconds between redraws: ten a second look smooth."""
NOTEBOOK_INTERVAL: Final = 0.5
"""The same in a notebook, where a redraw is a message to a browser."""
REDRAW_SHARE: Final = 100
"""The next redraw waits this many times the CPU time of the last one: at most 1 % of the interpreter."""
UNCHANGED_INTERVAL: Final = 1.0
"""Seconds after which an unchanged block is drawn again, below output printed since."""
LINE_INTERVAL: Final = 10.0
"""Seconds between plain lines without a terminal."""
NOTEBOOK_WIDTH: Final = 100
"""Columns in a notebook, whose width is unknown."""
ROOM: Final = 3
"""Lines for output between two redraws: an epoch's summary, a warning with its line of code."""

INDEX: Final = "\x1bD"
"""Moves the cursor down in its column; scrolls at the bottom of the screen."""
SAVE_CURSOR: Final = "\x1b7"
RESTORE_CURSOR: Final = "\x1b8"

_STATUS_STYLES: Final = {"completed": "green", "failed": "red"}


class ProgressBar(Callback):
    """Shows the progress of a run and its epoch, loss, metrics, learning rate, speed and remaining time.

    The metrics are `val_loss`, the one by which the run is judged, and those that you name.
    On a terminal and in a notebook there are two bars: the run with the remaining time, and the epoch (or validation in
    progress) with the speed; values are below them. They fit any width, and several runs share a terminal. One line
    remains when a run ends. Elsewhere a plain line is printed every ten seconds.

    Training never waits for it. It shows the values of the newest step, and a redraw takes at most 1 % of the
    interpreter. Neither stdout nor stderr is redirected; other output appears above the bars. Of more than three lines
    printed within a tenth of a second, some may be followed by the remains of a bar.
    """

    # It needs the newest step only.
    buffer = 1
    sample_interval = REDRAW_INTERVAL

    @explains_arguments()
    def __init__(self, *, metrics: tuple[str, ...] | list[str] = (), file: TextIO | None = None) -> None:
        """Choose further metrics and the output.

        Args:
            metrics: Keys of further metrics, like `"val_accuracy"`, shown once they are known.
            file: Where to draw. None: standard error, or the cell of a notebook.

        Raises:
            TypeError: `metrics` is a string.
        """
        if isinstance(metrics, str):
            raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
        self.metrics = tuple(metrics)
        self._given_file = file
        self.reset()

    def reset(self) -> None:
        # Written by the callback's worker thread, read by the thread that draws; single values, replaced whole.
        self._display: _Display | None = None
        self._run: RunHandle | None = None
        self._start: TrainStart | None = None
        self._monitor = ""
        self._values: dict[str, float] = {}
        self._doing = ""
        # The validation in progress
        self._validation: ValidationStart | None = None
        # Steps per second, samples per step, and the step and time from which the speed is measured
        self._speed = 0.0
        self._samples = 0.0
        self._speed_from: tuple[int, float] | None = None
        self._epoch = self._step = 0
        # Seconds, once the run is over
        self._took: float | None = None
        self._began = time.monotonic()

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        self._start, self._run, self._monitor = event, run, run.monitor
        self._epoch, self._step = event.epoch, event.step
        self._began = time.monotonic()
        self._display = _join(self, self._given_file)

    def on_epoch_start(self, event: EpochStart, run: RunHandle) -> None:
        self._epoch = event.epoch

    def on_step_end(self, event: StepEnd, run: RunHandle) -> None:
        self._step, self._epoch = event.step, event.epoch
        if event.loss is not None:
            self._values["loss"] = event.loss
        self._values["lr"] = event.lr
        self._samples = 0.9 * self._samples + 0.1 * event.samples if self._samples else event.samples
        self._measure_speed(event)
        self._changed()

    def on_validation_start(self, event: ValidationStart, run: RunHandle) -> None:
        self._doing, self._validation = "validating", event
        self._changed()

    def on_validation_end(self, event: ValidationEnd, run: RunHandle) -> None:
        self._doing, self._validation = "", None
        self._values.update(event.metrics)
        # The time of the validation does not count as that of a step.
        self._speed_from = None
        self._changed()

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self._step = event.step
        self._values.update(event.metrics)
        self._changed()

    def on_evaluated(self, event: Evaluated, run: RunHandle) -> None:
        self._values.update(event.metrics)
        self._changed()

    def on_state_changed(self, event: StateChanged, run: RunHandle) -> None:
        self._doing = "" if event.state == "running" else event.state
        self._speed_from = None
        # The last line follows a "stopping" at once, with the same text.
        self._changed(now=event.state != "stopping")

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self._step = max(self._step, event.step)
        self._doing, self._validation, self._took = event.status, None, event.seconds
        self._values.update(event.metrics)

    def close(self) -> None:
        if self._display is not None:
            _leave(self, self._display)
            self._display = None

    def status(self) -> str:
        """Return the values as one line."""
        parts = []
        if self._start is not None:
            total = self._total_steps()
            parts.append(f"step {self._step}" + (f"/{total}" if total else ""))
        parts += self._shown_values()
        if self._speed:
            parts += [f"{self._speed:.3g} steps/s", *self._samples_per_second()]
            left = self._seconds_left()
            if left is not None and not self._doing:
                parts.append(f"{_duration(left)} left")
        if self._doing:
            parts.append(self._doing if self._took is None else f"{self._doing} in {_duration(self._took)}")
        return "  ".join(parts)

    def line(self) -> str:
        """Return epoch, number of ranks and values as one line."""
        return "  ".join([self._describe_epoch(), *self._ranks(), self.status()])

    def block(self, width: int, *, with_name: bool = False) -> Block:
        """Return the drawing for a terminal: two bars and the values, in `width` columns.

        Args:
            width: Number of columns, at least 20.
            with_name: Start with the id of the run.
        """
        if self._run is not None and self._took is None:
            # The present values: events may lag.
            self._step, self._epoch = self._run.step, self._run.epoch
        done, total = self._run_progress()
        left = self._seconds_left()
        waits = self._doing and self._doing != "validating"
        state = self._doing if waits else "" if left is None else f"{_duration(left)} left"
        # In a narrow terminal the bar needs the room.
        where = "  ".join([self._describe_epoch(), *(self._ranks() if width >= WIDE else [])])
        title = self._run.id if with_name and self._run is not None else ""
        values = [*self._shown_values(), *self._samples_per_second()]
        return Block([Bar(where, state, done or 0, total), self._second_bar()], values, width, title=title)

    def _second_bar(self) -> Bar:
        validation, run = self._validation, self._run
        if validation is not None and run is not None:
            done, total = run.validation_batch, validation.batches
            return Bar(f"validation {done}" + (f"/{total}" if total else ""), "", done, total or None)
        in_epoch, of_epoch = self._step, None
        if self._start is not None and (of_epoch := self._start.steps_per_epoch):
            in_epoch = min(max(0, self._step - self._epoch * of_epoch), of_epoch)
        speed = f"{self._speed:.3g} steps/s" if self._speed else ""
        return Bar(
            f"step {in_epoch}" + (f"/{of_epoch}" if of_epoch else ""), speed, in_epoch, of_epoch or None
        )

    def _shown_values(self) -> list[str]:
        names = dict.fromkeys(("loss", "val_loss", self._monitor, *self.metrics, "lr"))
        return [f"{name} {self._values[name]:.4g}" for name in names if name in self._values]

    def _samples_per_second(self) -> list[str]:
        return [f"{self._speed * self._samples:.3g} samples/s"] if self._speed and self._samples else []

    def _total_steps(self) -> int | None:
        start = self._start
        if start is None:
            return None
        by_epochs = None
        if start.epochs is not None and start.steps_per_epoch is not None:
            by_epochs = start.epochs * start.steps_per_epoch
        totals = [total for total in (start.max_steps, by_epochs) if total is not None]
        return min(totals, default=None)

    def _run_progress(self) -> tuple[float | None, float | None]:
        """Return how much of the run is done and its total, in steps, epochs or seconds."""
        total = self._total_steps()
        if total is not None or self._start is None:
            return self._step, total
        if self._start.epochs is not None:
            return self._epoch, self._start.epochs
        return time.monotonic() - self._began, self._start.max_time

    def _seconds_left(self) -> float | None:
        total = self._total_steps()
        lefts = []
        if total is not None and self._speed:
            lefts.append(max(0, total - self._step) / self._speed)
        if self._start is not None and self._start.max_time is not None:
            lefts.append(max(0.0, self._start.max_time - (time.monotonic() - self._began)))
        return min(lefts, default=None)

    def _describe_epoch(self) -> str:
        epochs = None if self._start is None else self._start.epochs
        number = self._epoch + 1 if epochs is None else min(self._epoch + 1, epochs)
        return f"epoch {number}" + (f"/{epochs}" if epochs else "")

    def _ranks(self) -> list[str]:
        """Return the number of processes that train together; nothing for one."""
        start = self._start
        return [] if start is None or start.world_size == 1 else [f"{start.world_size} ranks"]

    def _measure_speed(self, event: StepEnd) -> None:
        if self._speed_from is None:
            self._speed_from = event.step, event.time
            return
        step, since = self._speed_from
        # Long enough for a steady value.
        if event.time - since >= 0.5:
            speed = (event.step - step) / (event.time - since)
            self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
            self._speed_from = event.step, event.time

    def _changed(self, now: bool = False) -> None:
        if self._display is not None:
            self._display.changed(self, now)


# Where bars are drawn ------------------------------------------------------------------------------

# Guards _displays and the list of bars of each.
_lock = threading.Lock()
_displays: "dict[object, _Display]" = {}


def _join(bar: ProgressBar, file: TextIO | None) -> "_Display":
    """Add a bar to the display of a file and return the display."""
    key: object = "notebook" if file is None and _in_notebook() else "stderr" if file is None else id(file)
    with _lock:
        display = _displays.get(key)
        if display is None:
            display = _displays[key] = _open(key, file)
        display.bars.append(bar)
        display.has_names = display.has_names or len(display.bars) > 1
        display.added(bar)
        return display


def _leave(bar: ProgressBar, display: "_Display") -> None:
    with _lock:
        display.bars.remove(bar)
        is_last = not display.bars
        if is_last:
            for key in [key for key, each in _displays.items() if each is display]:
                del _displays[key]
    display.removed(bar)
    if is_last:
        display.close()


def _open(key: object, file: TextIO | None) -> "_Display":
    if key == "notebook":
        return _Notebook()
    own = _own_stderr() if file is None else None
    stream = own or file or sys.stderr
    # Under pythonw and in applications without a console there is none.
    if stream is None:
        return _Display()
    console = Console(file=stream, force_jupyter=False)
    # A closed file raises.
    with contextlib.suppress(ValueError):
        if stream.isatty() and not console.is_dumb_terminal and not console.legacy_windows:
            return _Terminal(console, own)
    return _Lines(stream, own)


def _after_fork() -> None:
    """Drop the displays in a forked process: their threads do not exist there."""
    global _lock
    _lock = threading.Lock()
    _displays.clear()


os.register_at_fork(after_in_child=_after_fork)


class _Display:
    """A display of several bars; this base class draws nothing. Any thread."""

    def __init__(self) -> None:
        self.bars: list[ProgressBar] = []
        # True once there were several bars. The last of them then keeps its name.
        self.has_names = False

    def added(self, bar: ProgressBar) -> None:
        """Called for a new bar."""

    def removed(self, bar: ProgressBar) -> None:
        """Called for a bar that ends. Writes its last line."""

    def changed(self, bar: ProgressBar, now: bool) -> None:
        """Called when a bar has new values, which `now` shows at once."""

    def close(self) -> None:
        """Release resources, after the last bar."""

    def line_of(self, bar: ProgressBar) -> str:
        """Return a bar as one line."""
        name = f"{bar._run.id}  " if self.has_names and bar._run is not None else ""
        return name + bar.line()


class _Lines(_Display):
    """Plain lines, written in the worker threads of the bars."""

    def __init__(self, file: TextIO, own: TextIO | None) -> None:
        super().__init__()
        self._file, self._own = file, own
        # By id of the bar
        self._written_at: dict[int, float] = {}

    def added(self, bar: ProgressBar) -> None:
        # The first line follows after an interval.
        self._written_at[id(bar)] = time.monotonic()

    def changed(self, bar: ProgressBar, now: bool) -> None:
        if now or time.monotonic() - self._written_at[id(bar)] >= LINE_INTERVAL:
            self._written_at[id(bar)] = time.monotonic()
            self._write(bar)

    def removed(self, bar: ProgressBar) -> None:
        del self._written_at[id(bar)]
        self._write(bar)

    def close(self) -> None:
        _close(self._own)

    def _write(self, bar: ProgressBar) -> None:
        # The reader may have gone away. One write keeps lines of several runs apart.
        with contextlib.suppress(ValueError, OSError):
            self._file.write(f"{self.line_of(bar)}\n")
            self._file.flush()


class _Live(_Display):
    """A display that a thread redraws at an interval while it has bars."""

    def __init__(self, interval: float) -> None:
        super().__init__()
        self._interval = interval
        self._drawing = threading.Lock()
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = Thread(self._draw_on, name="offloop-progress", daemon=True)

    def added(self, bar: ProgressBar) -> None:
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                # No thread can be started. The last line is still drawn.
                logger.error("the progress bar is not redrawn: %s", error)

    def changed(self, bar: ProgressBar, now: bool) -> None:
        if now:
            self._wake.set()

    def removed(self, bar: ProgressBar) -> None:
        with self._drawing, contextlib.suppress(ValueError, OSError):
            self.leave(bar)
            self.draw()

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def draw(self) -> None:
        """Draw all bars, under the lock."""

    def leave(self, bar: ProgressBar) -> None:
        """Write the last line of a bar, under the lock."""

    def _draw_on(self) -> None:
        pause = 0.0
        while not self._wake.wait(pause) or not self._is_closed:
            self._wake.clear()
            cpu = time.thread_time()
            try:
                with self._drawing:
                    self.draw()
            except (ValueError, OSError):
                # The reader has gone away.
                return
            pause = max(self._interval, REDRAW_SHARE * (time.thread_time() - cpu))
            if self._is_closed:
                return


class _Terminal(_Live):
    """A block of lines below the cursor, which stays where it is."""

    def __init__(self, console: Console, own: TextIO | None) -> None:
        super().__init__(REDRAW_INTERVAL)
        self._console, self._own = console, own
        self._drawn, self._drawn_at = "", 0.0

    def draw(self) -> None:
        with _lock:
            bars = list(self.bars)
        size = _size_of(self._console)
        self._console.size = size
        blocks = [bar.block(size[0], with_name=self.has_names) for bar in bars]
        lines = "".join([block.text(self._console) for block in blocks]).splitlines()
        room = ROOM if size[1] >= len(lines) + 2 * ROOM else 1
        if len(lines) > size[1] - 1 - room:
            lines = [*lines[: max(1, size[1] - 2 - room)], f"... {len(bars)} runs"]
        # Clear behind and below the cursor. Scroll as far as the block needs, in the same column, and only then save
        # the place of the cursor.
        height = room - 1 + len(lines)
        down = f"{INDEX * height}\x1b[{height}A" if lines else ""
        block = "\n" * (room - 1) + "".join(f"\n{line}" for line in lines)
        drawn = f"\x1b[J{down}{SAVE_CURSOR}{block}{RESTORE_CURSOR}"
        now = time.monotonic()
        if drawn != self._drawn or now - self._drawn_at > UNCHANGED_INTERVAL:
            self._drawn, self._drawn_at = drawn, now
            self._write(drawn)

    def leave(self, bar: ProgressBar) -> None:
        text = Text("\n".join(wrapped(self.line_of(bar).split("  "), _size_of(self._console)[0])))
        text.highlight_words([bar._doing], _STATUS_STYLES.get(bar._doing, "yellow"))
        with self._console.capture() as captured:
            self._console.print(text)
        self._write("\r\x1b[J" + captured.get())
        self._drawn = ""

    def close(self) -> None:
        super().close()
        _close(self._own)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class _Notebook(_Live):
    """One output per bar, in the cell that started its run."""

    def __init__(self) -> None:
        super().__init__(NOTEBOOK_INTERVAL)
        # By id of the bar
        self._outputs: dict[int, tuple[contextvars.Context, Any]] = {}

    def added(self, bar: ProgressBar) -> None:
        from IPython.display import display

        # The context identifies the cell.
        context = contextvars.copy_context()
        handle = context.run(display, self._picture(bar), raw=True, display_id=True)
        self._outputs[id(bar)] = context, handle
        super().added(bar)

    def draw(self) -> None:
        with _lock:
            bars = list(self.bars)
        for bar in bars:
            context, handle = self._outputs[id(bar)]
            context.run(functools.partial(handle.update, self._picture(bar), raw=True))

    def leave(self, bar: ProgressBar) -> None:
        context, handle = self._outputs.pop(id(bar))
        context.run(functools.partial(handle.update, self._picture(bar, is_over=True), raw=True))

    def _picture(self, bar: ProgressBar, *, is_over: bool = False) -> dict[str, str]:
        console = Console(
            file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, force_terminal=True, force_jupyter=False,
            color_system="truecolor",
        )  # fmt: skip
        over = Text("\n".join(wrapped(bar.line().split("  "), NOTEBOOK_WIDTH)))
        console.print(over if is_over else bar.block(NOTEBOOK_WIDTH))
        pre = '<pre style="white-space:pre;line-height:normal;font-family:monospace">{code}</pre>'
        return {
            "text/html": console.export_html(inline_styles=True, code_format=pre, clear=False),
            "text/plain": console.export_text(),
        }


def _size_of(console: Console) -> tuple[int, int]:
    """Return columns and lines of the terminal. The environment variable `COLUMNS` takes precedence."""
    try:
        columns, lines = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):
        columns, lines = 80, 24
    columns = int(os.environ["COLUMNS"]) if os.environ.get("COLUMNS", "").isdigit() else columns or 80
    return max(20, columns), lines or 24


def _duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _in_notebook() -> bool:
    return Console(file=io.StringIO()).is_jupyter


def _own_stderr() -> TextIO | None:
    """Return a stream to standard error that shares no lock with `sys.stderr`; None if that is captured or missing."""
    try:
        return open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    except (AttributeError, OSError, io.UnsupportedOperation):
        return None


def _close(own: TextIO | None) -> None:
    if own is not None:
        with contextlib.suppress(OSError):
            own.close()
