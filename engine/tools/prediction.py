"""Prediction: a model's outputs over a loader, at once or as a stream that reads ahead a little.

event loop                              prediction thread
──────────                              ─────────────────
async for outputs in stream  <────────  puts outputs of batch n; waits while `read_ahead` of them wait
leaves the block             ────────>  ends after the batch in work
"""

import contextlib
import contextvars
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any

import anyio
import torch

from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker
from offloop.engine.data.batches import to_device

logger = logging.getLogger("offloop")

_HOST = torch.device("cpu")


def predictions(
    step: Callable[[Any], Any],
    loader: Iterable[Any],
    *,
    feed: Callable[[Any], Any],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Generator[Any, None, None]:
    """Yield the outputs of each batch, on the host, from a model in eval mode."""
    for batch in loader:
        with torch.inference_mode():
            with autocast():
                outputs = step(feed(batch))
            # A plain copy (host sync): a non-blocking one could be read before it has arrived.
            outputs = _to_host(outputs)
        yield outputs


def _to_host(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.to(_HOST)
    return to_device(outputs, _HOST, non_blocking=False)


class PredictionStream(AsyncIterator[Any]):
    """The outputs of batch after batch, in order. One reader. Ends with the loader, or when it is left."""

    def __init__(self, work: Callable[[], Generator[Any, None, None]], *, read_ahead: int) -> None:
        self._work = work
        self._read_ahead = read_ahead
        # Guards what follows, between the thread and the event loop.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._ready: deque[Any] = deque()
        self._is_left = False
        self._has_ended = False
        self._error: BaseException | None = None
        self._waker = Waker()
        context = contextvars.copy_context()
        self._thread = Thread(context.run, self._run, name="offloop-prediction", daemon=False)

    async def __anext__(self) -> Any:
        """Return the outputs of the next batch. Raises what the model or the loader raised. Cancellation: safe."""
        while True:
            with self._lock:
                if self._ready:
                    self._changed.notify()
                    return self._ready.popleft()
                if self._has_ended:
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    raise StopAsyncIteration
            await self._waker.wait()

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    async def leave(self) -> None:
        """End the thread after the batch in work, and wait for that through any number of cancellations."""
        with self._lock:
            self._is_left = True
            self._changed.notify()
        swept: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._has_ended:
                try:
                    await self._waker.wait()
                except anyio.get_cancelled_exc_class() as error:  # a native one goes through any shield
                    swept = error
        self._thread.join()  # it has done all but return
        self._waker.close()
        if self._error is not None:
            logger.error("a prediction failed after its reader had left", exc_info=self._error)
        if swept is not None:
            raise swept

    def _run(self) -> None:
        """Be the prediction thread."""
        error: BaseException | None = None
        try:
            with contextlib.closing(self._work()) as outputs:
                for each in outputs:
                    with self._lock:
                        self._ready.append(each)
                        self._waker.wake()
                        self._changed.wait_for(lambda: self._is_left or len(self._ready) < self._read_ahead)
                        if self._is_left:
                            break
        except BaseException as problem:
            error = problem
        with self._lock:
            self._error, self._has_ended = error, True
        self._waker.wake()
