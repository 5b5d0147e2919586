"""What all tests share: the event loops they run on, and the checks that nothing blocks and nothing is left."""

import asyncio
import functools
import gc
import inspect
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel
import hypothesis
import pytest
import torch
from torch.utils.data import dataloader
from warm_python import WarmPython

LONGEST_HOLD: Final = 2.0
"""Seconds for which a test may hold asyncio's event loop; generous, for a machine that is busy with other work."""


def patient_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that says what holds it for so long, and not already after a tenth of a second."""
    loop = asyncio.new_event_loop()
    loop.slow_callback_duration = LONGEST_HOLD
    return loop


BACKENDS: Final[list[Any]] = [
    # asyncio's debug mode refuses calls from other threads and says which callback held the event loop
    pytest.param(("asyncio", {"debug": True, "loop_factory": patient_loop}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
UVLOOP: Final[Any] = pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")
IN_MEMORY: Final = Path("/dev/shm")
"""A file system without a disk, where there is one. A checkpoint waits for its disk several times."""
ROOM: Final = 2 * 2**30
"""Bytes that must be free there: the tests need a few hundred megabytes."""


def pytest_configure(config: pytest.Config) -> None:
    # Tiny tensors gain nothing from more threads, and on a busy machine these wait for each other.
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As behind an `&`: tests send SIGINT to their children, which would inherit that it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # No test judges by the clock: an example that takes long says only that the machine is busy.
    hypothesis.settings.register_profile("offloop", deadline=None)
    hypothesis.settings.load_profile("offloop")
    config.addinivalue_line("markers", "uvloop: an anyio test that runs on uvloop too")
    if (
        IN_MEMORY.is_dir()
        and shutil.disk_usage(IN_MEMORY).free > ROOM
        and not os.statvfs(IN_MEMORY).f_flag & os.ST_NOEXEC  # some tests run what they write
    ):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))  # where tmp_path is made


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """Leave what is loaded by now out of garbage collection: a full one takes a quarter of a second otherwise."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what carries the marker `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what cannot be encoded: a worker of pytest-xdist could not send its report."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked with `anyio` on asyncio and on trio, and on uvloop if they are marked so."""
    if "anyio_backend" in metafunc.fixturenames:
        on_uvloop = metafunc.definition.get_closest_marker("uvloop") is not None
        backends = [*BACKENDS, UVLOOP] if on_uvloop else BACKENDS
        metafunc.parametrize("anyio_backend", backends, scope="module", indirect=True)


@pytest.fixture(scope="module")
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Where a test marked with `anyio` runs: a backend and its options."""
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Have async tests looked at from inside: their event loop is gone when fixtures end."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = _without_leftover_tasks(pyfuncitem.obj)


def _without_leftover_tasks(test: Any) -> Any:
    @functools.wraps(test)
    async def checked(**arguments: Any) -> None:
        before = {task.id for task in anyio.get_running_tasks()}
        await test(**arguments)
        for _ in range(3):  # a task that has just been told to end needs its turn
            await anyio.lowlevel.checkpoint()
        left = [task.name for task in anyio.get_running_tasks() if task.id not in before]
        assert not left, "the test left tasks"

    return checked


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread of offloop's or an open socket."""
    threads = set(threading.enumerate())
    sockets = _open_sockets()
    yield
    _end_persistent_workers()
    left = [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("offloop")]
    for thread in left:
        thread.join(5.0)  # one that was told to end may still be on its way
    assert not [thread.name for thread in left if thread.is_alive()], "the test left threads"
    if _open_sockets() - sockets:
        gc.collect()  # what is garbage is not left open: a failed test's frames hold a lot
        assert not _open_sockets() - sockets, "the test left sockets open"


def _end_persistent_workers() -> None:
    """End the workers that the loaders of a test have kept.

    The garbage collector may have closed their queues before it comes to the loader. They are then not told to end,
    and they ignore a SIGTERM while this process lives: the loader waits for ten seconds, in whichever test that is.
    """
    if multiprocessing.active_children():
        for each in gc.get_objects():
            if type(each) is dataloader._MultiProcessingDataLoaderIter:
                each._shutdown_workers()


def _open_sockets() -> set[str]:
    """Return the sockets of this process; none where there is no /proc."""
    try:
        numbers = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return set()
    targets = set()
    for number in numbers:
        try:
            targets.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the directory's own descriptor
            continue
    return {target for target in targets if target.startswith("socket:")}


class _SlowCallbacks(logging.Handler):
    """Keeps asyncio's records "Executing ... took ... seconds"."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "Executing %s took %.3f seconds":
            self.found.append(record.getMessage())


@pytest.fixture(autouse=True)
def nothing_holds_the_event_loop() -> Iterator[None]:
    """Fail a test that blocks asyncio's event loop."""
    handler = _SlowCallbacks()
    asyncio_logger = logging.getLogger("asyncio")
    asyncio_logger.addHandler(handler)
    try:
        yield
    finally:
        asyncio_logger.removeHandler(handler)
    assert not handler.found


@pytest.fixture(scope="module")
def in_utc() -> Iterator[None]:
    """Local times are those of UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Something that runs scripts."""
    python = WarmPython()
    yield python
    python.close()
