"""Ownership: the lease of a trainer and of callbacks, each of which serves one run at a time."""

import threading

from offloop.engine.callback import Callback, close_unused
from offloop.engine.errors import ConfigError
from offloop.engine.run import Run
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.session.training_thread import Training

# The callbacks that serve a run, by identity, and the id of that run. Any thread that starts or ends one; under the
# lock.
_owners: dict[int, str] = {}
_owners_lock = threading.Lock()


class Lease:
    """The right of one run to its trainer and its callbacks. Any thread."""

    def __init__(self, plan: RunPlan) -> None:
        """Lease nothing yet; `take` does."""
        self._program = plan.program
        self._callbacks = [each.callback for each in plan.handlers]
        self._run_id = plan.run_id

    def take(self, training: Training, run: Run) -> None:
        """Take trainer and callbacks; reset and prepare the callbacks.

        Args:
            training: The training of the run, which the steps of the trainer use.
            run: The handle.

        Raises:
            TrainerBusyError: The trainer is in use.
            ConfigError: A callback serves another run.
            Exception: What `reset()` or `prepare()` of a callback raised. Nothing is taken then.
        """
        program = self._program
        program._occupancy.check_free()
        with _owners_lock:
            for each in self._callbacks:
                owner = _owners.get(id(each))
                if owner is not None:
                    raise ConfigError(
                        f"this {type(each).__name__} serves run {owner!r}, which is training: "
                        "give every run its own callbacks"
                    )
            program._occupancy.claim(training)
            program._loop, program._mixed = training.loop, training.loop.mixed
            program._last_run = run
            for each in self._callbacks:
                _owners[id(each)] = self._run_id
        begun: list[Callback] = []
        try:
            for each in self._callbacks:
                each.reset()
                begun.append(each)
            for each in self._callbacks:
                each.prepare(program)
        except BaseException:
            close_unused(begun)
            self.give_back()
            raise

    def give_back(self) -> None:
        """Give trainer and callbacks back. Once after each `take` that returned."""
        with _owners_lock:
            self._program._loop = None
            self._program._occupancy.release()
            for each in self._callbacks:
                _owners.pop(id(each), None)
