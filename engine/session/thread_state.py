"""The state that torch keeps per thread, and how it reaches the thread in which a model runs.

    state of the caller                       in the training thread
    ────────────────────────────────────────  ──────────────────────────────────────────────────
    default device, saved-tensor hooks,       the same (`caller_state`)
    backward pass in one thread
    grad mode, inference mode                 gradients are on
    autocast                                  that of `precision`; another one is an error
    modes of torch.overrides and dispatch     an error: they would see nothing
    torch.profiler                            a warning: it would record nothing

Default dtype, number of threads, deterministic algorithms, anomaly detection and the like belong to the process.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from offloop.engine.errors import ConfigError
from offloop.engine.training.precision import AUTOCAST_DTYPES

logger = logging.getLogger("offloop")


def check_caller(precision: str, device: torch.device) -> None:
    """Raise for state of this thread that would be lost in the training thread. Call where a run is started.

    Raises:
        ConfigError: This thread is under an autocast other than that of `precision`, or inside one of torch's modes.
    """
    kind = device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if dtype != AUTOCAST_DTYPES.get(precision):
            wanted = next((name for name, each in AUTOCAST_DTYPES.items() if each == dtype), "bf16-mixed")
            raise ConfigError(
                f"training was started under torch.autocast({kind!r}, dtype={dtype}), which does not reach the "
                f"training thread: leave it out and give Trainer(precision={wanted!r})"
            )
    modes = [each for each in _get_current_function_mode_stack() if not isinstance(each, DeviceContext)]
    for mode in [*modes, *_get_current_dispatch_mode_stack()]:
        raise ConfigError(
            f"training was started inside {type(mode).__name__}, a mode that torch keeps per thread and that does "
            "not reach the training thread: enter it in training_step"
        )
    if torch._C._autograd._profiler_enabled():
        logger.warning(
            "training was started inside a profiler of torch, which records this thread, but the model trains in "
            "another one: add Profiler() to callbacks"
        )


def caller_state(
    *, with_autocast: bool = False, used: torch.device | None = None
) -> contextlib.AbstractContextManager[None]:
    """Return a context that brings state of this thread to another one.

    Args:
        with_autocast: Bring autocast too: for a model whose weights do not change. Autocast keeps the casts of
            weights until it is left, so training inside of it would continue with old ones.
        used: The device that the other thread computes on: if it is a CUDA device, that thread's current one.
    """
    # Created in the other thread: some contexts act when they are created.
    contexts: list[Callable[[], contextlib.AbstractContextManager[Any]]] = []
    if used is not None and used.type == "cuda":
        # Not undone: the thread computes on no other device.
        contexts.append(functools.partial(_using, used))
    device = torch.get_default_device()
    if device.type != "cpu":
        contexts.append(lambda: device)
    hooks = _saved_tensors_hooks()
    if hooks is not None:
        contexts.append(functools.partial(torch.autograd.graph.saved_tensors_hooks, *hooks))
    if not torch._C._is_multithreading_enabled():
        contexts.append(functools.partial(torch.autograd.set_multithreading_enabled, False))
    for kind in ("cpu", "cuda", "mps"):
        if with_autocast and torch.is_autocast_enabled(kind):
            contexts.append(functools.partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind)))
    return _entered(contexts)


@contextlib.contextmanager
def _using(device: torch.device) -> Iterator[None]:
    torch.cuda.set_device(device)
    yield


@contextlib.contextmanager
def _entered(contexts: Iterable[Callable[[], contextlib.AbstractContextManager[Any]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for make in contexts:
            stack.enter_context(make())
        yield


def _saved_tensors_hooks() -> Any:
    """Return the functions that pack and unpack the tensors saved by this thread's forward passes, None for none."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False)
    # Before torch 2.5 it takes no argument
    except TypeError:
        return torch._C._autograd._top_saved_tensors_default_hooks()  # type: ignore[call-arg]  # as stubs are newer
