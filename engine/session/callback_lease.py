"""CallbackLease: callbacks serve one run, or one replay, at a time."""

import threading
from collections.abc import Sequence
from typing import Final

from offloop.engine.callback import Callback, TrainerParts, close_unused
from offloop.engine.errors import ConfigError

# The callbacks that serve a run, by identity, and the id of that run. Any thread that starts or ends one; under the
# lock.
_owners: dict[int, str] = {}
# Reentrant: a run takes its trainer under it, too.
_owners_lock: Final = threading.RLock()


class CallbackLease:
    """The right of one run to its callbacks. Any thread."""

    lock = _owners_lock
    """One for all leases. Whoever takes more than callbacks holds it meanwhile."""

    def __init__(self, callbacks: Sequence[Callback], run_id: str) -> None:
        """Lease nothing yet; `claim` does."""
        self._callbacks = callbacks
        self._run_id = run_id

    def claim(self) -> None:
        """Take the callbacks.

        Raises:
            ConfigError: One serves another run. Nothing is taken then.
        """
        with self.lock:
            for each in self._callbacks:
                owner = _owners.get(id(each))
                if owner is not None:
                    raise ConfigError(
                        f"this {type(each).__name__} serves run {owner!r}, which is training: "
                        "give every run its own callbacks"
                    )
            for each in self._callbacks:
                _owners[id(each)] = self._run_id

    def begin(self, trainer: TrainerParts) -> None:
        """Reset and prepare the callbacks.

        Args:
            trainer: What `prepare` may look at.

        Raises:
            Exception: What `reset()` or `prepare()` of a callback raised. Those that were reset are closed then.
        """
        begun: list[Callback] = []
        try:
            for each in self._callbacks:
                each.reset()
                begun.append(each)
            for each in self._callbacks:
                each.prepare(trainer)
        except BaseException:
            close_unused(begun)
            raise

    def release(self) -> None:
        """Give the callbacks back. Once after each `claim` that returned."""
        with self.lock:
            for each in self._callbacks:
                _owners.pop(id(each), None)
