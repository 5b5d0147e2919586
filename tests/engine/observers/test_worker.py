"""engine/observers/worker.py: a thread whose functions an event loop awaits."""

import functools
import threading

import anyio
import pytest

from offloop.engine.observers.worker import Worker


@pytest.mark.anyio
async def test_worker_returns_results_and_exceptions() -> None:
    worker = Worker("offloop-test")
    with anyio.fail_after(5):
        assert await worker.run(lambda: 3) == 3
        with pytest.raises(KeyError, match="mine"):
            await worker.run(functools.partial({"yours": 1}.__getitem__, "mine"))
        assert await worker.run(threading.get_ident) == await worker.run(threading.get_ident)
    worker.close()
    assert not worker.is_abandoned


@pytest.mark.anyio
async def test_worker_that_was_never_needed_has_no_thread() -> None:
    before = threading.active_count()
    worker = Worker("offloop-test")
    worker.close()
    assert threading.active_count() == before
