"""Deciders: the training thread asks them about an event, and waits for their answers.

    training thread                            event loop
    ───────────────                            ──────────
    decide(event)
      plain decider: called here, after the    the callback's observer reaches a barrier
      callback's observers have caught up      in its stream of events, and answers
      async decider: waits  ─────barrier─────> runs in the observer's task, at that point of the stream
                            <────answer──────  or leaves it after its timeout, or when the run is cancelled

While the training thread waits, awaiting a command returns on acceptance: the decider may be the task that awaits it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import anyio

from offloop.engine.bus.command_mailbox import Mailbox, actor, deciding
from offloop.engine.bus.event_bus import Bus
from offloop.engine.bus.waker import Waker
from offloop.engine.callback import Decider
from offloop.engine.errors import OffloopError, as_failure
from offloop.engine.events import Event
from offloop.engine.observers.driver import Driver, allowing_abandoned
from offloop.engine.observers.observer import Observer
from offloop.engine.session.lifetime import Lifetime

logger = logging.getLogger("offloop")

Answers = list[BaseException | None]
"""What comes back from a barrier: empty until there is an answer, then its error, or None.

The event loop appends, then wakes the training thread, which reads.
"""


class Deciders:
    """The deciders of one run, in declared order. Training thread, unless a method says otherwise."""

    def __init__(self, bus: Bus, mailbox: Mailbox, lifetime: Lifetime) -> None:
        """Begin without deciders; `add` brings them."""
        self._bus = bus
        self._mailbox = mailbox
        self._lifetime = lifetime
        self._by_handler: dict[str, list[tuple[Decider, Observer]]] = {}

    def add(self, observer: Observer) -> None:
        """Ask the deciders of a callback from now on. Before the training thread starts."""
        for name, decider in observer.handlers.deciders.items():
            self._by_handler.setdefault(name, []).append((decider, observer))

    def clear(self) -> None:
        """Forget the deciders, and with them their callbacks. After the training thread has ended."""
        self._by_handler = {}

    def has_any_for(self, event: Event) -> bool:
        """Return whether a decider is asked about events of this class."""
        return event.handler_name in self._by_handler

    def decide(self, event: Event) -> None:
        """Ask the deciders about an event. Blocks until all have answered, or the run is cancelled.

        Raises:
            BaseException: What a decider raised, unless its callback has `on_error="isolate"`.
        """
        for decider, observer in self._by_handler.get(event.handler_name, ()):
            if self._mailbox.cancelled:
                return
            started = time.perf_counter()
            try:
                self._ask(decider, observer, event)
            except BaseException as error:
                isolates = observer.handlers.callback.on_error == "isolate"
                if not isolates or not isinstance(as_failure(error), Exception):
                    raise
                # Reported, but asked again at the next event
                observer.failed(type(event).__name__, error, is_off=False)
            finally:
                observer.decided += time.perf_counter() - started

    def wait_for(self, observer: Observer) -> None:
        """Wait until an observer has handled everything that was published so far. Blocks."""
        caught_up: Answers = []
        self._wait_at_barrier(observer, observer.name, lambda: self._answer(caught_up, None), caught_up)

    def _ask(self, decider: Decider, observer: Observer, event: Event) -> None:
        name = f"decider {decider.callback}.{event.handler_name}"
        if decider.is_async:
            answers: Answers = []
            self._wait_at_barrier(
                observer, name, lambda: self._decide_on_event_loop(decider, observer, event, answers), answers
            )
            if answers and answers[0] is not None:
                raise answers[0]
            if not answers and not self._mailbox.cancelled:
                raise OffloopError(f"{name} cannot be asked any more: the task of its callback has ended")
            return
        if observer.handlers.observers:
            # The callback's observers share its state: they handle what came before this event first.
            caught_up: Answers = []
            self._wait_at_barrier(observer, name, lambda: self._answer(caught_up, None), caught_up)
            if self._mailbox.cancelled:
                return
        with _acting(decider.callback, self._mailbox):
            decider.method(event, observer.run)

    def _wait_at_barrier(
        self, observer: Observer, name: str, arrive: Callable[[], object], answers: Answers
    ) -> None:
        """Wait until an observer has reached this point of its stream and `arrive` has answered. Blocks.

        Ends without an answer if the run is cancelled, or the observer's task or event loop has ended.
        """
        assert observer.subscription is not None
        # Training counts as waiting before the decider can begin: a wait for a command in it must fail at once.
        with self._mailbox.standing_still(observer.name):
            self._bus.put_barrier(observer.subscription, arrive)
            self._mailbox.stand(
                lambda: (
                    bool(answers)
                    or self._mailbox.cancelled
                    or observer.has_ended
                    or self._lifetime.event_loop_is_gone
                ),
                name,
                callback=observer.name,
            )
        if not answers:
            self._lifetime.cancel_if_event_loop_is_gone()

    async def _decide_on_event_loop(
        self, decider: Decider, observer: Observer, event: Event, answers: Answers
    ) -> None:
        """Run an async decider until it answers, its timeout, or a cancellation. Event loop, observer's task."""
        failures: list[BaseException] = []
        decided, driver = anyio.Event(), Driver(observer.name)

        # In a separate task: it may have to be abandoned
        async def ask() -> None:
            try:
                here = self._mailbox.places.task(anyio.get_current_task().id)
                with _acting(decider.callback, self._mailbox), here:
                    await driver.drive(decider.method(event, observer.run), observer.account)
            except BaseException as error:
                if driver.is_ending(error):
                    raise
                failures.append(error)
            finally:
                decided.set()

        cancelled = Waker()
        try:
            with (
                self._mailbox.on_cancel(cancelled.wake),
                allowing_abandoned(lambda: driver),
            ):
                async with anyio.create_task_group() as tasks:

                    async def watch() -> None:
                        await cancelled.wait()
                        end()

                    def end() -> None:
                        driver.abandon_after(self._lifetime.swallowing)
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(watch)
                    tasks.start_soon(ask)
                    with anyio.move_on_after(decider.timeout) as time_limit:
                        await decided.wait()
                    if time_limit.cancelled_caught:
                        logger.warning(
                            "decider %s.%s took longer than its %.1f s: training continues without it",
                            decider.callback,
                            event.handler_name,
                            decider.timeout,
                        )
                        end()
                    tasks.cancel_scope.cancel()
        finally:
            self._answer(answers, as_failure(failures[0]) if failures else None)

    def _answer(self, answers: Answers, error: BaseException | None) -> None:
        """Let the training thread continue. Event loop."""
        answers.append(error)
        self._mailbox.poke()


@contextlib.contextmanager
def _acting(name: str, mailbox: Mailbox) -> Iterator[None]:
    """Mark commands given in the block as those of a decider of this run."""
    who, where = actor.set(name), deciding.set(mailbox)
    try:
        yield
    finally:
        actor.reset(who)
        deciding.reset(where)
