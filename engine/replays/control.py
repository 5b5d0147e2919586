"""ReplayControl: what others may do with a replay while it goes on."""

import math
from concurrent.futures import Future

from offloop.engine import checks
from offloop.engine.bus.waker import result_of
from offloop.engine.events import Event
from offloop.engine.replays.pace import Pace


class ReplayControl:
    """A replay as others have it: they may pause it, let it advance, set its speed and stop it. Any thread.

    The commands come in two forms, as those of a run: `await replay.pause()` returns when the command has been applied,
    `replay.pause_nowait()` returns a future at once. They raise `RunEndedError` when the replay is over.
    """

    def __init__(self, speed: float | None, *, is_paused: bool) -> None:
        """Begin before the first event. Only `Replay` does it."""
        self._pace = Pace(_checked(speed), is_paused=is_paused)

    @property
    def speed(self) -> float | None:
        """Recorded seconds that pass in a second, above 0; None: as fast as callbacks handle the events. May be set."""
        speed = self._pace.speed
        return None if speed == math.inf else speed

    @speed.setter
    def speed(self, speed: float | None) -> None:
        self._pace.set_speed(_checked(speed))

    @property
    def is_paused(self) -> bool:
        """True while events wait for `resume` or `advance`."""
        return self._pace.is_paused

    @property
    def is_stopped(self) -> bool:
        """True if no further events come, because somebody has stopped the replay."""
        return self._pace.is_stopped

    def pause_nowait(self) -> Future[None]:
        """Hold the next event. Done when all before it are handled."""
        return self._pace.pause()

    def resume_nowait(self) -> Future[None]:
        """Continue after a pause."""
        return self._pace.resume()

    def advance_nowait(self, until: type[Event] = Event) -> Future[Event | None]:
        """Pause, and hand over the events up to the next one of a class; by default one event.

        Args:
            until: The class: `StepEnd` goes on by one optimizer step.

        Returns:
            Done with that event when it is handled; with None if there is no further one.

        Raises:
            TypeError: `until` is no event class.
        """
        if not (isinstance(until, type) and issubclass(until, Event)):
            raise TypeError(f"until must be an event class like StepEnd, got {until!r}")
        return self._pace.advance(until)

    def stop(self) -> None:
        """Hand over no further events; the callbacks are closed. Twice is fine. Does not wait."""
        self._pace.stop()

    async def pause(self) -> None:
        """Hold the next event; returns when all before it are handled."""
        await result_of(self.pause_nowait())

    async def resume(self) -> None:
        """Continue after a pause."""
        await result_of(self.resume_nowait())

    async def advance(self, until: type[Event] = Event) -> Event | None:
        """Pause, hand over the events up to the next one of a class, and return that one; None if there is none."""
        return await result_of(self.advance_nowait(until))


def _checked(speed: float | None) -> float:
    hint = ": to hold the first event, give paused=True" if speed == 0 else "; None is as fast as possible"
    checks.number("speed", speed, above=0, finite=False, optional=True, hint=hint)
    return math.inf if speed is None else float(speed)
