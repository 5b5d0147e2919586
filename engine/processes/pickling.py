"""How a callback goes to its process: pickled once, before the run starts.

`dumps` refuses what has no meaning in another process, and names it. `loads` is its counterpart there.

    classes and functions   of a script, a notebook or a function by value, with the globals that they use; others by
                            import
    classes of events       those that the callback observes, defined and registered before it is rebuilt
    attributes              copies: open files, locks, sockets, threads, generators, tensors elsewhere than on the CPU,
                            the trainer and models that train are refused
"""

import contextlib
import io
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, Any, Final

from offloop.engine.callback import Callback
from offloop.engine.errors import ConfigError, OffloopError
from offloop.engine.events import Event, event_class, known_events
from offloop.engine.processes.by_value import ByValuePickler, modules_by_value
from offloop.engine.processes.unsendable import Parts, RefusedError

logger = logging.getLogger("offloop")

LARGE: Final = 100 * 2**20
"""Bytes above which a callback's size is logged: it takes about as many in both processes, and a tenth of a second."""
TOO_LARGE: Final = 2**30
"""Bytes above which a callback is refused: more likely a data set or a model that a handler refers to by accident."""

_DESTINATION: Final = "the process of the callback"
_HINT: Final = "create it in on_train_start (which runs there), or leave it out in __getstate__"
_HINT_FOR_USED: Final = "create it in on_train_start (which runs there) and keep it in an attribute"
_STALE: Final = "of which the process of the callback would get a copy that never changes"
_HERE: Final = "which stays in this process"


def dumps(callback: Callback, name: str, events: Iterable[type[Event]] = ()) -> bytes:
    """Pickle a callback for its process. Any thread; blocks for as long as that takes.

    Runs the callback's `__getstate__`, or `__reduce__`, if it has one. Changes nothing, and draws no random numbers.

    Args:
        callback: After its `reset`.
        name: What errors call it.
        events: Classes of events that its observers subscribe to. Classes derived from them that are known here are
            known there, too.

    Raises:
        ConfigError: Something that it holds or refers to cannot go there, or it takes more than 1 GiB. The text names
            the attribute, global or variable.
    """
    events = tuple(dict.fromkeys(events))
    with modules_by_value():
        observed = _dump((events, callback), callback, name)
        derived = _derived(events)
    if len(observed) > LARGE:
        place, size = _sizes(callback, name)
        logger.warning(
            "%s goes to its process with %s, of which %s takes %s",
            name,
            _in_megabytes(len(observed)),
            place,
            _in_megabytes(size),
        )
    return pickle.dumps((observed, derived), protocol=pickle.HIGHEST_PROTOCOL)


def loads(data: bytes) -> Callback:
    """Rebuild a callback from what `dumps` returned, in its process. Imports what it and its events need.

    Raises:
        Exception: Whatever an import or the callback's `__setstate__` raises, such as `ModuleNotFoundError`.
    """
    observed, derived = pickle.loads(data)
    callback: Callback
    _, callback = pickle.loads(observed)
    for tag, each in derived.items():
        if event_class(tag) is None:
            try:
                pickle.loads(each)
            except Exception:
                # Its events arrive as `UnknownEvent`.
                logger.warning("the class of events %s is not known here", tag, exc_info=True)
    return callback


def _derived(events: tuple[type[Event], ...]) -> dict[str, bytes]:
    """Return pickles, by tag, of the known classes that derive from observed ones, those that can go."""
    found = {}
    for each in known_events():
        if each.__module__ == Event.__module__ or each in events or not issubclass(each, events):
            continue
        file = io.BytesIO()
        with contextlib.suppress(Exception):
            # By value: its module is not imported there for the class alone, which may never arrive.
            _CallbackPickler(file, by_value=each).dump(each)
            found[f"{each.__module__}.{each.__name__}"] = file.getvalue()
    return found


def _dump(value: object, callback: Callback, name: str) -> bytes:
    file = _Limited()
    try:
        _CallbackPickler(file).dump(value)
    except TooLargeError:
        place, size = _sizes(callback, name)
        raise ConfigError(
            f"{name} is too large for a process of its own: it refers to more than {_in_megabytes(TOO_LARGE)}, of "
            f"which {place} takes {_in_megabytes(size)}. Give the process a path or a function that loads it, and "
            "leave it out in __getstate__"
        ) from None
    except Exception as error:
        text = Parts(_CallbackPickler, callback, name).explain(
            error, destination=_DESTINATION, hint=_HINT, hint_for_used=_HINT_FOR_USED
        )
        raise ConfigError(text) from error
    return file.getvalue()


def _sizes(callback: Callback, name: str) -> tuple[str, int]:
    with modules_by_value():
        return Parts(_CallbackPickler, callback, name).biggest()


def _in_megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"


class TooLargeError(OffloopError):
    """A callback takes more room than is sensible."""


class _Limited(io.BytesIO):
    """A file in memory that refuses to grow without end."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > TOO_LARGE:
            raise TooLargeError
        return super().write(data)


class _CallbackPickler(ByValuePickler):
    """Refuses what would go to the process of a callback, and be of no use there."""

    def __init__(self, file: IO[bytes], *, by_value: type | None = None) -> None:
        super().__init__(file, by_value=by_value)
        self._refusals = tuple(_refusals())

    def reducer_override(self, obj: Any) -> Any:
        if obj is sys.stdout or obj is sys.stderr:
            # Those of the process, which end up here; in a notebook or a test they are no plain files.
            return getattr, (sys, "stdout" if obj is sys.stdout else "stderr")
        if not isinstance(obj, type):
            for kind, check in self._refusals:
                if issubclass(type(obj), kind):
                    check(obj)
        return super().reducer_override(obj)


_Check = Callable[[Any], None]


def _refusals() -> Iterable[tuple[type, _Check]]:
    """Iterate over classes whose instances are looked at. Those of torch only where torch is loaded."""
    yield io.IOBase, _check_file
    yield threading.Thread, _refuse("a thread", None, None)
    stale = "read what it needs from the events"
    for module, name, check in (
        (
            "offloop.engine.trainer",
            "BaseTrainer",
            _refuse("the trainer", _HERE, "use the `run` of its handlers"),
        ),
        ("offloop.engine.run", "Run", _refuse("a run", _HERE, "use the `run` of its handlers")),
        ("torch", "Tensor", _check_tensor),
        ("torch.nn", "Parameter", _check_parameter),
        ("torch.nn", "Module", _check_model),
        ("torch.optim", "Optimizer", _refuse("an optimizer", _STALE, stale)),
        ("torch.optim.lr_scheduler", "LRScheduler", _refuse("a scheduler", _STALE, stale)),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            yield kind, check


def _refuse(what: str, why: str | None, hint: str | None) -> _Check:
    def check(_obj: object) -> None:
        raise RefusedError(what, why, hint)

    return check


def _check_file(file: io.IOBase) -> None:
    # cloudpickle would send the content of a file that is open for reading.
    if not isinstance(file, io.BytesIO | io.StringIO):
        kind = type(file)
        raise RefusedError(f"a {kind.__module__}.{kind.__qualname__}", None, None)


def _check_tensor(tensor: Any) -> None:
    if tensor.device.type != "cpu":
        hint = "send its .cpu(), or create it in on_train_start (which runs there)"
        raise RefusedError(f"a tensor on {tensor.device}", None, hint)


def _check_parameter(parameter: Any) -> None:
    if parameter.requires_grad:
        raise RefusedError(
            "a parameter that is trained", _STALE, "send its .detach().clone() if that is meant"
        )


def _check_model(model: Any) -> None:
    if any(each.requires_grad for each in model.parameters()):
        raise RefusedError(
            f"a model that is trained ({type(model).__qualname__})",
            _STALE,
            "use CheckpointEvaluator, or a handler in this process; for a model that only computes, call "
            "requires_grad_(False) first",
        )
