"""How a callback goes to its process: pickled once, before the run starts.

`dumps` refuses what has no meaning in another process, and names it. `loads` is its counterpart there.

    classes and functions   of a script, a notebook or a function by value, with the globals that they use; others by
                            import
    classes of events       those that the callback observes, by value
    attributes              copies: open files, locks, sockets, threads, generators, tensors elsewhere than on the CPU,
                            the trainer and models that train are refused
"""

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
_HINT_FOR_EVENT: Final = "make it in the handler, or in a function that the event does not refer to"
_STALE: Final = "of which the process of the callback would get a copy that never changes"
_HERE: Final = "which stays in this process"


def dumps(callback: Callback, name: str, events: Iterable[type[Event]] = ()) -> bytes:
    """Pickle a callback for its process. Any thread; blocks for as long as that takes.

    Runs the `__getstate__`, or `__reduce__`, of the callback and of what it holds once; a second time to name what
    cannot go there or is large. Changes nothing, and draws no random numbers.

    Args:
        callback: After its `reset`.
        name: What errors call it.
        events: Classes of events that its observers subscribe to. Classes derived from them that are known here are
            known there, too; for one that cannot go there, a warning is logged.

    Raises:
        ConfigError: Something that it holds or refers to cannot go there, or it takes more than 1 GiB. The text names
            the attribute, global or variable.
    """
    with modules_by_value():
        packed = _dump(callback, name)
        if len(packed) > LARGE:
            most = Parts(_CallbackPickler, callback, name).biggest()
            logger.warning("%s goes to its process with %s%s", name, _in_megabytes(len(packed)), most)
        classes = _classes_of_events(callback, name, tuple(events))
    return pickle.dumps((packed, classes), protocol=pickle.HIGHEST_PROTOCOL)


def loads(data: bytes) -> Callback:
    """Rebuild a callback from what `dumps` returned, in its process. Imports what it and its events need.

    Raises:
        Exception: Whatever an import or the callback's `__setstate__` raises, such as `ModuleNotFoundError`.
    """
    packed, classes = pickle.loads(data)
    callback: Callback = pickle.loads(packed)
    for tag, each in classes.items():
        if event_class(tag) is None:
            try:
                pickle.loads(each)
            except Exception:
                # Its events arrive as `UnknownEvent`.
                logger.warning("the class of events %s is not known here", tag, exc_info=True)
    return callback


def _dump(callback: Callback, name: str) -> bytes:
    file = _Limited()
    try:
        _CallbackPickler(file).dump(callback)
    except TooLargeError:
        most = Parts(_CallbackPickler, callback, name).biggest()
        raise ConfigError(
            f"{name} is too large for a process of its own: it refers to more than {_in_megabytes(TOO_LARGE)}{most}. "
            "Give the process a path or a function that loads it, and leave it out in __getstate__"
        ) from None
    except Exception as error:
        text = Parts(_CallbackPickler, callback, name).explain(
            error, destination=_DESTINATION, hint=_HINT, hint_for_used=_HINT_FOR_USED
        )
        raise ConfigError(text) from error
    return file.getvalue()


def _classes_of_events(callback: Callback, name: str, events: tuple[type[Event], ...]) -> dict[str, bytes]:
    """Return pickles, by tag, of the classes of events that may arrive, besides those of offloop's engine."""
    found = {}
    for each in known_events():
        if each.__module__ == Event.__module__ or not issubclass(each, events):
            continue
        try:
            found[str(each.__struct_config__.tag)] = _dump_class(each)
        except Exception as error:
            text = Parts(_EventPickler, each, each.__name__).explain(
                error, destination=_DESTINATION, hint=_HINT_FOR_EVENT, hint_for_used=_HINT_FOR_EVENT
            )
            if hasattr(callback, each.handler_name):
                raise ConfigError(f"{name}.{each.handler_name} cannot get its events: {text}") from error
            logger.warning("%s gets %s as UnknownEvent: %s", name, each.__name__, text)
    return found


def _dump_class(each: type[Event]) -> bytes:
    # By value: its module, which may import torch, is not imported there for the class alone.
    modules = {base.__module__ for base in each.__mro__ if issubclass(base, Event)} - {Event.__module__}
    file = _Limited()
    try:
        with modules_by_value(*modules):
            _EventPickler(file).dump(each)
    except Exception:
        file = _Limited()
        _EventPickler(file).dump(each)
    return file.getvalue()


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

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
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


class _EventPickler(_CallbackPickler):
    """Pickles a class of events, which may have methods that are never called there."""

    imports_late = True


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
        (
            "torch.utils.data.dataloader",
            "_BaseDataLoaderIter",
            _refuse("an iterator of a DataLoader", None, "send a DataLoader of its own, and iterate there"),
        ),
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
