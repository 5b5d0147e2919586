"""Worker: a thread in which the event loop runs plain functions, one at a time, and awaits them."""

import contextvars
import queue
from collections.abc import Callable
from typing import TypeVar

from offloop.engine.bus import forked
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker
from offloop.engine.errors import as_failure

T = TypeVar("T")


class Worker:
    """One thread, started when it is first needed. All methods belong to one event loop.

    A daemon: a function that never returns must not keep the interpreter from exiting. Such a worker is
    abandoned.
    """

    def __init__(self, name: str) -> None:
        self.is_abandoned = False
        self._name = name
        # Filled by the event loop, emptied by the thread; None ends it.
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waker = Waker()  # woken by the thread after each job
        self._thread: Thread | None = None
        self._context = contextvars.copy_context()

    async def run(self, function: Callable[[], T], *, else_here: bool = False) -> T:
        """Run a function in the thread and wait for it. Cancellation: abandons the thread, which cannot be ended.

        Args:
            function: What it raises is raised here; a stray cancellation as the cause of a `RuntimeError`.
            else_here: Where the system gives no thread, run it on the event loop, which it then blocks.

        Raises:
            RuntimeError: The system gives no thread.
        """
        if self._thread is None:
            thread = Thread(self._context.run, self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not else_here:
                    raise
                return function()
            self._thread = thread
        # One of the two is appended by the thread before it wakes the event loop.
        outcome: list[T] = []
        failure: list[BaseException] = []
        generation = forked.generation

        def job() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                failure.append(error)
            if forked.generation != generation:
                forked.end_process(failure[0] if failure else None)
            self._waker.wake()

        self._jobs.put(job)
        try:
            while not outcome and not failure:
                await self._waker.wait()
        except BaseException:
            self.is_abandoned = not outcome and not failure
            raise
        if failure:
            raise as_failure(failure[0])
        return outcome[0]

    def close(self) -> None:
        """Let the thread end after its jobs, and wait for it unless it is abandoned."""
        if self._thread is not None:
            self._jobs.put(None)
            if not self.is_abandoned:
                self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
