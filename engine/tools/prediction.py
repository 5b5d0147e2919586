"""Prediction: a model's outputs over a loader, all at once or as a stream that reads ahead.

event loop                              prediction thread
──────────                              ─────────────────
async for outputs in stream  <────────  puts outputs of batch n; waits while `read_ahead` of them wait
leaves the block             ────────>  ends after the current batch
"""

import contextlib
import contextvars
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from typing import Any

import anyio
import torch

from offloop.engine import checks
from offloop.engine.bus.threads import Thread
from offloop.engine.bus.waker import Waker
from offloop.engine.data.batches import DeviceTransfer, to_device
from offloop.engine.session.thread_state import caller_state
from offloop.engine.tools.ranks import with_other_ranks
from offloop.engine.training.arguments import check_loader
from offloop.engine.training.placement import prepare_model
from offloop.engine.training.precision import MixedPrecision
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.program_setup import make_setup
from offloop.engine.training.setup import Limits, Setup
from offloop.engine.training.training_mode import eval_mode

logger = logging.getLogger("offloop")

_HOST = torch.device("cpu")


def predict(program: TrainingProgram, loader: Iterable[Any]) -> list[Any]:
    """Return the outputs of all batches. Blocks; see `BaseTrainer.predict`."""
    with program._occupancy.use("predicting"):
        return list(_outputs(program, loader))


def predict_async(
    program: TrainingProgram, loader: Iterable[Any], read_ahead: int
) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Any]]:
    """Return a context that gives the outputs as a stream, see `BaseTrainer.predict_async`."""
    check_loader(loader, "loader")
    checks.whole_number("read_ahead", read_ahead)
    return _stream(program, loader, read_ahead)


@contextlib.asynccontextmanager
async def _stream(
    program: TrainingProgram, loader: Iterable[Any], read_ahead: int
) -> AsyncGenerator[AsyncIterator[Any]]:
    caller = caller_state(with_autocast=True, used=program.device)

    def work() -> Generator[Any, None, None]:
        with caller:
            yield from _outputs(program, loader)

    with program._occupancy.use("predicting"):
        stream = PredictionStream(work, read_ahead=read_ahead)
        stream.start()
        try:
            yield stream
        finally:
            await stream.leave()


def _outputs(program: TrainingProgram, loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Prepare the model and yield the outputs of every batch, on the host; of several ranks, on rank 0."""

    def prepare() -> Setup:
        check_loader(loader, "loader")
        return make_setup(program, Limits(epochs=1), val_loader=loader)

    with with_other_ranks(program, "predict", prepare) as (_, together):
        prepare_model(program)
        if together is None:
            yield from _own_outputs(program, loader)
        else:
            together.strategy.share_weights()
            yield from together.on_first(_own_outputs(program, together.strategy.shared_validation(loader)))


def _own_outputs(program: TrainingProgram, loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the outputs of the batches of a loader, on the host."""
    config = program.config
    mixed = MixedPrecision(config.precision, program.device)
    transfer = DeviceTransfer(program.device, channels_last=config.channels_last)
    with eval_mode(program.model):
        for batch in loader:
            with torch.inference_mode():
                with mixed.autocast():
                    outputs = program.predict_step(transfer(batch))
                # A plain copy (host sync): a non-blocking one could be read before it has arrived.
                outputs = _to_host(outputs)
            yield outputs


def _to_host(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.to(_HOST)
    return to_device(outputs, _HOST, non_blocking=False)


class PredictionStream(AsyncIterator[Any]):
    """A stream of outputs, one item per batch, in order, for one reader. Ends with the loader, or when it is left."""

    def __init__(self, work: Callable[[], Generator[Any, None, None]], *, read_ahead: int) -> None:
        self._work = work
        self._read_ahead = read_ahead
        # Guards the next four attributes, which prediction thread and event loop both read and write
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
        """Start the prediction thread."""
        self._thread.start()

    async def leave(self) -> None:
        """End the thread after the current batch; wait for it through any number of cancellations."""
        with self._lock:
            self._is_left = True
            self._changed.notify()
        cancellation: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._has_ended:
                try:
                    await self._waker.wait()
                # A native cancellation pierces any shield.
                except anyio.get_cancelled_exc_class() as error:
                    cancellation = error
        # Returns immediately: the thread is already exiting.
        self._thread.join()
        if self._error is not None:
            logger.error("a prediction failed after its reader had left", exc_info=self._error)
        if cancellation is not None:
            raise cancellation

    def _run(self) -> None:
        """Body of the prediction thread."""
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
