"""Ownership: the lease of a trainer, which serves one run at a time."""

from offloop.engine.run import Run
from offloop.engine.session.callback_lease import CallbackLease
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.session.training_thread import Training


class Lease:
    """The right of one run to its trainer and its callbacks. Any thread."""

    def __init__(self, plan: RunPlan) -> None:
        """Lease nothing yet; `take` does."""
        self._program = plan.program
        self._callbacks = CallbackLease([each.callback for each in plan.handlers], plan.run_id)

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
        with self._callbacks.lock:
            program._occupancy.check_free()
            self._callbacks.claim()
            program._occupancy.claim(training)
            program._loop, program._mixed = training.loop, training.loop.mixed
            program._last_run = run
        try:
            self._callbacks.begin(program)
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Give trainer and callbacks back. Once after each `take` that returned."""
        with self._callbacks.lock:
            self._program._loop = None
            self._program._occupancy.release()
            self._callbacks.release()
