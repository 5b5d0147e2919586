"""What a run shares with the whole process: torch's global switches, Python's switch interval, and the signals.

Several runs may go on in one process, so a switch that would change another run's results is refused, and
each is put back when the last run that holds it has ended. The switch interval changes no result: the shortest
that a run asks for holds. Signals are taken only where they are ours to take, and given back.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

import torch

from offloop.engine.bus import forked
from offloop.engine.errors import ConfigError

logger = logging.getLogger("offloop")

_lock = threading.Lock()
_running: dict[str, dict[str, bool | None]] = {}  # run id -> its switches by name; under the lock
_restore: list[Callable[[], None]] = []  # puts the switches back; under the lock


class SwitchInterval:
    """Python's switch interval, held short while runs ask for it. One thread at a time.

    Each operator of torch lets go of the interpreter, and waits for it up to this interval where another thread
    computes in Python. At Python's 5 ms, a callback that computes therefore all but stops training.
    """

    PYTHONS: Final = 0.005
    """Seconds, of a process in which the interval was never set."""

    def __init__(self) -> None:
        self._wanted: dict[str, float] = {}  # seconds by run
        self._held: float | None = None  # as Python reads it back; None while it is left alone

    def enter(self, run_id: str, seconds: float | None) -> None:
        """Hold the interval for a run; None leaves it alone, as does a process that has set its own."""
        if seconds is None:
            return
        if not self._wanted and sys.getswitchinterval() == self.PYTHONS:
            self._held = self.PYTHONS
        self._wanted[run_id] = seconds
        self._set(min(self._wanted.values()))

    def leave(self, run_id: str) -> None:
        """Let go of it for a run; twice is fine."""
        if self._wanted.pop(run_id, None) is not None:
            self._set(min(self._wanted.values(), default=self.PYTHONS))
            if not self._wanted:
                self._held = None

    def _set(self, seconds: float) -> None:
        if sys.getswitchinterval() != self._held:
            self._held = None  # the application has set its own meanwhile
        if self._held is not None:
            sys.setswitchinterval(seconds)
            self._held = sys.getswitchinterval()  # in whole microseconds


_switch_interval = SwitchInterval()  # under the lock


def enter_process(
    run_id: str, *, deterministic: bool, tf32: bool | None, seed: int | None, switch_interval: float | None
) -> None:
    """Enter a run and set the switches it asks for. Any thread; `leave_process` undoes it.

    Raises:
        ConfigError: Another run is going on that would get other results.
    """
    switches = {"deterministic": deterministic, "tf32": tf32}
    with _lock:
        if run_id in _running:
            raise ConfigError(f"run {run_id!r} is going on in this process already: choose another run_name")
        for other, theirs in _running.items():
            for name, value in switches.items():
                if theirs[name] != value:
                    raise ConfigError(
                        f"{name}={value} contradicts run {other!r}, which is going on with "
                        f"{name}={theirs[name]}: it is one switch for the whole process"
                    )
            if seed is not None:
                raise ConfigError(
                    f"seed={seed} would reseed the generators that run {other!r} draws from: leave seed out "
                    "and give the loader a generator of its own"
                )
        if not _running:
            if deterministic:
                _restore.append(_be_deterministic())
            if tf32 is not None:
                _restore.append(_set_tf32(tf32))
        _switch_interval.enter(run_id, switch_interval)
        _running[run_id] = switches


def _be_deterministic() -> Callable[[], None]:
    """Have torch choose deterministic algorithms; returns what undoes it."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

    def restore() -> None:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    return restore


def _set_tf32(allowed: bool) -> Callable[[], None]:
    """Allow or forbid TensorFloat-32 on CUDA; returns what undoes it.

    torch has two sets of switches for it and refuses to read the older one after the newer one was used; the
    older one is in every torch that we run on.
    """
    matmul: Any = torch.backends.cuda.matmul  # torch declares neither set of switches
    cudnn: Any = torch.backends.cudnn
    try:
        precision, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # somebody has used the newer one
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
    """Leave a run; the last one puts the switches back. Any thread; twice is fine."""
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
) -> Iterator[bool]:
    """Take SIGINT and SIGTERM for the length of the block, where they are ours to take.

    That is in the main thread, for a signal whose handler is still Python's default (or with `force`, any).
    The third signal ends the process at once. The block is told whether any is taken.

    Args:
        on_signal: Called in the main thread with the signal and how many have come; must not block.
        force: Take them even if the application has handlers of its own.
        only: Take these signals only.
        third_is_final: False: the third signal and later ones are given to `on_signal` as well.
        asks_application: A handler of the application's own is called first. If it raises `KeyboardInterrupt`, the
            signal is given to `on_signal` instead of raising in the midst of the block; else it is dealt with.
    """
    taken: dict[signal.Signals, Any] = {}
    count = 0
    generation = forked.generation

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        if forked.generation != generation:  # a forked child has no run to stop
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
