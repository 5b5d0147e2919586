"""Runs that end before their time, for whoever then wants to go on with them."""

from offloop.engine import Callback, StepPoint, in_step


class StopAfter(Callback):
    """Stops a run after a step; never with -1, which is for the run that goes on."""

    def __init__(self, step: int) -> None:
        self.step = step

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step == self.step:
            self.stop(point)

    def stop(self, point: StepPoint) -> None:
        """Ask the run to stop."""
        point.run.stop_nowait("interrupted")


class Cut(StopAfter):
    """Saves and stops after a step, as somebody who has to go would."""

    def stop(self, point: StepPoint) -> None:
        point.run.checkpoint_nowait("manual")
        super().stop(point)
