"""What a run shares with the whole process: torch's global switches, Python's switch interval, and signals.

Several runs may train in one process. A switch that would change another run's results is therefore rejected, and
all switches are restored when the last run has ended. The switch interval changes no results: the shortest that a
run asks for applies. Signal handlers are installed only where the application has none, and removed again.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

import torch

from offloop.engine.bus import forked
from offloop.engine.errors import ConfigError

logger = logging.getLogger("offloop")

_lock = threading.Lock()
# The switches of each run, by its id. Guarded by the lock.
_running: dict[str, dict[str, bool | None]] = {}
# Restore the switches. Guarded by the lock.
_restore: list[Callable[[], None]] = []


class SwitchInterval:
    """Python's switch interval, kept short while runs ask for it. One thread at a time.

    Every torch operator releases the interpreter lock, and waits up to this interval to get it back if another thread
    runs Python code. At Python's 5 ms, a callback that computes therefore nearly stops training.
    """

    PYTHONS: Final = 0.005
    """Seconds in a process that never set the interval."""

    def __init__(self) -> None:
        # Seconds, by run.
        self._wanted: dict[str, float] = {}
        # As Python reads it back; None while the interval is not ours.
        self._held: float | None = None

    def enter(self, run_id: str, seconds: float | None) -> None:
        """Set the interval for a run. None changes nothing, nor does a process that has set its own."""
        if seconds is None:
            return
        if not self._wanted and sys.getswitchinterval() == self.PYTHONS:
            self._held = self.PYTHONS
        self._wanted[run_id] = seconds
        self._set(min(self._wanted.values()))

    def leave(self, run_id: str) -> None:
        """End what `enter` began. Calling it twice is fine."""
        if self._wanted.pop(run_id, None) is not None:
            self._set(min(self._wanted.values(), default=self.PYTHONS))
            if not self._wanted:
                self._held = None

    def _set(self, seconds: float) -> None:
        if sys.getswitchinterval() != self._held:
            # The application has set its own meanwhile
            self._held = None
        if self._held is not None:
            sys.setswitchinterval(seconds)
            # Python rounds to whole microseconds
            self._held = sys.getswitchinterval()


# Guarded by the lock.
_switch_interval = SwitchInterval()


def enter_process(
    run_id: str, *, deterministic: bool, tf32: bool | None, seed: int | None, switch_interval: float | None
) -> None:
    """Register a run and set the switches that it asks for. Any thread; `leave_process` undoes it.

    Raises:
        ConfigError: Another run is training, whose results this would change.
    """
    switches = {"deterministic": deterministic, "tf32": tf32}
    with _lock:
        if run_id in _running:
            raise ConfigError(f"run {run_id!r} is training in this process already: choose another run_name")
        for other, theirs in _running.items():
            for name, value in switches.items():
                if theirs[name] != value:
                    raise ConfigError(
                        f"{name}={value} contradicts run {other!r}, which is training with "
                        f"{name}={theirs[name]}: the whole process has one such switch"
                    )
            if seed is not None:
                raise ConfigError(
                    f"seed={seed} would reseed the generators that run {other!r} draws from: leave seed out "
                    "and give the loader its own generator"
                )
        if not _running:
            if deterministic:
                _restore.append(_be_deterministic())
            if tf32 is not None:
                _restore.append(_set_tf32(tf32))
        _switch_interval.enter(run_id, switch_interval)
        _running[run_id] = switches


def _be_deterministic() -> Callable[[], None]:
    """Make torch choose deterministic algorithms; return a function that undoes it."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    # torch requires it on CUDA
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

    def restore() -> None:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    return restore


def _set_tf32(allowed: bool) -> Callable[[], None]:
    """Allow or forbid TensorFloat-32 on CUDA; return a function that undoes it.

    torch has two sets of switches for it, and refuses to read the older set after the newer one was used. All
    supported versions of torch have the older set.
    """
    # torch declares the types of neither set
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    try:
        precision, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    # The newer set was used
    except RuntimeError:
        switches = (matmul, cudnn.conv, cudnn.rnn)
        before = [each.fp32_precision for each in switches]
        for each in switches:
            each.fp32_precision = "tf32" if allowed else "ieee"

        def restore_newer() -> None:
            for each, value in zip(switches, before, strict=True):
                each.fp32_precision = value

        return restore_newer
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed

    def restore() -> None:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = convolutions

    return restore


def leave_process(run_id: str) -> None:
    """Unregister a run. The last one restores the switches. Any thread; calling it twice is fine."""
    with _lock:
        _running.pop(run_id, None)
        _switch_interval.leave(run_id)
        if not _running:
            while _restore:
                _restore.pop()()


_HANDLED: Final = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS: Final[dict[signal.Signals, Any]] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextlib.contextmanager
def handled_signals(
    on_signal: Callable[[signal.Signals, int], None],
    *,
    force: bool,
    only: Sequence[signal.Signals] = _HANDLED,
    third_is_final: bool = True,
    asks_application: bool = False,
    one_within: float = 0.0,
) -> Iterator[bool]:
    """Handle SIGINT and SIGTERM for the duration of the block, unless the application does.

    Handlers are installed in the main thread only, for signals that still have Python's default handler (with
    `force`, for any). The third signal ends the process at once. The block gets whether any handler is installed.

    Args:
        on_signal: Called in the main thread with the signal and the number of signals so far; must not block.
        force: Replace the application's handlers too.
        only: The signals to handle.
        third_is_final: If False, `on_signal` gets the third signal and later ones as well.
        asks_application: Call the application's handler first. If it raises `KeyboardInterrupt`, `on_signal` gets the
            signal, so that nothing is raised inside the block; otherwise the signal is handled.
        one_within: Seconds after the first signal in which more of them count as the same one.
    """
    taken: dict[signal.Signals, Any] = {}
    count = 0
    first_at = math.inf
    generation = forked.generation

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count, first_at
        # A forked child has no run to stop
        if forked.generation != generation:
            signal.signal(number, taken[signal.Signals(number)])
            os.kill(os.getpid(), number)
            return
        before = taken[signal.Signals(number)]
        if asks_application and before != _DEFAULTS[signal.Signals(number)]:
            try:
                before(number, frame)
            except KeyboardInterrupt:
                pass
            else:
                return
        now = time.monotonic()
        if count and now - first_at < one_within:
            return
        first_at = min(first_at, now)
        count += 1
        if count > 2 and third_is_final:
            # The system's default, not Python's: a KeyboardInterrupt would wait for a step that never returns.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        on_signal(signal.Signals(number), count)

    if threading.current_thread() is threading.main_thread():
        for each in only:
            present = signal.getsignal(each)
            if force or present == _DEFAULTS[each] or (asks_application and callable(present)):
                taken[each] = signal.signal(each, handle)
    try:
        yield bool(taken)
    finally:
        for each, before in taken.items():
            signal.signal(each, before)
