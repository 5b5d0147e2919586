"""Who has failed, hangs or cannot be reached: signs of life through the store.

A thread that stands in a collective with a dead rank may stand there for ever, and no call gets it out. So each rank
has two threads of its own:

    messenger   every half second writes this rank's sign, and reads those of the others and the failure, if any
    watch       keeps the time, calls `fail` when the store does not answer, and ends a process whose training
                thread does not come out

The store has one key for each rank, overwritten by each sign, and one for the failure. The first failure that is
written counts on all ranks. Time is that of the watch of each rank: it stands still while the process is stopped, and
no rank reads another's clock.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import torch.distributed as dist

from offloop.engine.distributed.launch import Launch
from offloop.engine.distributed.rendezvous import PrefixStore, RunStore, Store, own_client, shared_client
from offloop.engine.errors import RankFailedError

logger = logging.getLogger("offloop")

PERIOD: Final = 0.5
"""Seconds between two signs. A shorter time-out has shorter periods, eight to each."""
LEAVING_PERIOD: Final = 0.05
"""Seconds between two signs once a rank wants to leave: ranks should leave at the same moment."""
REPORT_TIMEOUT: Final = 2.0
"""Seconds for which a rank that has failed waits until its report is in the store."""
CAUSE_TIMEOUT: Final = 3.0
"""Seconds for which a rank whose collective broke waits to hear who failed: longer than a report takes."""
SUSPICIOUS: Final = 4
"""Periods without a sign after which a rank is suspected, when a collective has broken."""
COMING_OUT: Final = 5.0
"""Seconds that the training thread has to come out after a failure. torchrun kills the process after 30."""
COMING_OUT_OF_A_HANG: Final = 2.0
"""Seconds that the rank has that hangs itself: its closed connections then bring the others out in time."""
FAREWELL_TIMEOUT: Final = 5.0
"""Seconds for which rank 0, which may host the store, waits until no other rank needs it any more."""
_TICK: Final = 0.25
"""Seconds between two looks of the watch."""
_LONGEST_TICK: Final = 1.0
"""Seconds that count of a longer time between two looks: the process was stopped."""
_LONGEST_REPORT: Final = 50_000
"""Characters of a traceback. Its end says most."""
_PHASES: Final = ("waits for the data", "is in the forward pass", "is past the forward pass")

_RUNS, _HAS_LEFT, _IS_GONE = range(3)
"""States of a rank. One that is gone does not look at the store any more."""


class _Sign(msgspec.Struct, array_like=True, frozen=True):
    """What a rank says of itself."""

    number: int
    """One more with each sign."""
    host: str
    place: tuple[int, int]
    excused: bool
    knows_failure: bool
    asked: int
    """How often the rank has asked for attention."""
    state: int


class _Failure(msgspec.Struct, array_like=True, frozen=True):
    """The failure of a run."""

    rank: int
    host: str
    what: str


class SignsOfLife:
    """The signs of life of one rank in one run.

    A rank has failed when it says so, gives no sign for the time-out, or does not come on for the time-out while others
    wait for it. In the last case it says so itself, with the stack of its training thread. That the store cannot be
    reached for the time-out is a failure, too.

    `fail` is called once, with the failure of another rank or the hanging of this one, in a thread of this object or in
    the one that calls `cause_of`. If the training thread has not come out within five seconds, two on the rank that
    hangs, the process ends itself with code 1.
    """

    def __init__(
        self,
        store: Store,
        launch: Launch,
        run_key: str,
        *,
        timeout: float,
        fail: Callable[[RankFailedError], None],
        wants_attention: Callable[[], bool],
        attention: Callable[[], None],
    ) -> None:
        """Prepare; nothing happens before `start`.

        Args:
            store: What `connect` has returned.
            launch: What `find_launch` has returned.
            run_key: The same on all ranks, another one for each run.
            timeout: Seconds, as above.
            fail: Called with the failure. Must not block.
            wants_attention: Returns whether to call rank 0's `attention`. Called by the messenger, with each sign.
            attention: Called on rank 0 when a rank wants attention. Must not block.
        """
        self.place: tuple[int, int] = (0, 0)
        """Where the training thread is: number of the batch, and 0 waiting for data, 1 in the forward pass, 2 after it.

        Written by the training thread, read by the messenger. It only grows, and waiting ranks come to the same place.
        """
        self.excused = False
        """True while the training thread does what may take as long as it likes: a pause, a decider, a save.

        While any rank is excused, none is late. Written by the training thread, read by the messenger.
        """
        self.has_come_out = False
        """True once the training thread waits for no other rank: a failure then ends no process.

        Written by the training thread, also by `report` and `cause_of`; read by the watch.
        """
        self.failure: RankFailedError | None = None
        """The failure that `fail` was called with. Written once, under the lock; read by any thread."""
        assert isinstance(store, RunStore)
        self._store = store
        self._launch = launch
        self._prefix = f"signs/{run_key}"
        self._others = [rank for rank in range(launch.world_size) if rank != launch.rank]
        self._keys = [*(f"sign/{rank}" for rank in range(launch.world_size)), "failure"]
        self._timeout = timeout
        self._period = min(PERIOD, timeout / 8)
        self._fail = fail
        self._wants_attention = wants_attention
        self._attention = attention
        self._lock = threading.Lock()
        # Written by `start`, before there is a thread that reads it
        self._training_thread: threading.Thread | None = None
        # Seconds that this process has run: written by the watch, read by all threads
        self._now = 0.0
        # Written by the thread that leaves, read by the messenger
        self._state = _RUNS
        # Written by the messenger, read by all threads; by rank. A sign replaces the one before as a whole
        self._signs: dict[int, _Sign] = {}
        self._changed = [0.0] * launch.world_size
        self._reached = 0.0
        # Of the messenger alone
        self._number = 0
        self._asked = 0
        self._came_on = 0.0
        self._last_place = self.place
        # A failure for the store: written under the lock, by the thread that finds it; the first one counts
        self._found: _Failure | None = None
        # True once this rank has failed itself, and others' silence means nothing. Written by the thread that reports
        self._has_reported = False
        # When `fail` was called. Written once, by the thread that calls it; read by the watch
        self._failed_at: float | None = None
        self._wake = threading.Event()
        self._read = threading.Condition()
        self._is_known = threading.Event()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"offloop-{name}", daemon=True)
            for target, name in ((self._exchange, "messenger"), (self._watch, "watch"))
        ]

    # The training thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Give signs of life from now on. Training thread only: its stack is shown when it hangs."""
        self._training_thread = threading.current_thread()
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Give no more signs. Any thread; calling it twice is fine. Blocks for two seconds if the store is stuck."""
        self._ended.set()
        self._wake.set()
        for each in self._threads:
            if each.ident is not None and each is not threading.current_thread():
                each.join(REPORT_TIMEOUT)

    @contextlib.contextmanager
    def excusing(self) -> Iterator[None]:
        """Make no rank late while the block runs, which may take as long as it likes. Training thread."""
        self.excused = True
        try:
            yield
        finally:
            self.excused = False

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed. Any thread; blocks for at most two seconds, raises nothing.

        Does nothing before `start` and after `stop`, and where another rank's failure is known already.

        Args:
            error: Why; the others get its traceback.
        """
        self.has_come_out = True
        if self.failure is not None or isinstance(error, RankFailedError):
            return
        self._has_reported = True
        try:
            text = "".join(traceback.format_exception(error))
            name = "".join(traceback.format_exception_only(error)).strip()
        # The text of a user's exception is code of the user's
        except Exception:
            text = name = type(error).__name__
        what = f"has failed: {name}\n\nOn rank {self._launch.rank}:\n{text[-_LONGEST_REPORT:]}".rstrip()
        self._put(_Failure(self._launch.rank, self._launch.host, what))
        # Until all others know: the store may go with this process
        self._wait_for_others(lambda sign: sign.knows_failure, REPORT_TIMEOUT)

    def cause_of(self, error: BaseException) -> RankFailedError | None:
        """Return which rank's failure has broken a collective. Any thread.

        Blocks for at most four seconds if the error is one of a broken connection, else not at all.

        Args:
            error: What the training thread has raised.

        Returns:
            None if all others are well, as far as anybody knows, or this rank has reported its own failure.
        """
        self.has_come_out = True
        if isinstance(error, RankFailedError):
            return error
        if self._has_reported:
            return None
        if not _tells_of_a_connection(error):
            return self.failure
        give_up = time.monotonic() + CAUSE_TIMEOUT
        while not self._is_known.wait(_TICK / 2) and time.monotonic() < give_up and not self._ended.is_set():
            if self._found is None and (suspect := self._suspect()) is not None:
                self._put(suspect)
        if self.failure is None and (gone := self._store_is_gone(self._period * SUSPICIOUS)) is not None:
            self._fail_with(gone)
        return self.failure

    # Leaving together ------------------------------------------------------------------------------

    def leave(self) -> None:
        """Say that this rank has done all it had to do: from now on it may be silent. Any thread; does not block."""
        self._state = max(self._state, _HAS_LEFT)
        self._wake.set()

    def wait_for_others(self, timeout: float | None = None) -> bool:
        """Wait after `leave` until all ranks have left, and end the signs. Any thread; blocks.

        The store may go with rank 0, so nothing may be asked of it afterwards.

        Args:
            timeout: Seconds; None for as long as the others give signs of life.

        Returns:
            False if the time is over, or a rank has failed.
        """
        have_left = (
            self._wait_for_others(lambda sign: sign.state >= _HAS_LEFT, timeout) and self.failure is None
        )
        if have_left:
            # The last sign of all but rank 0, which waits for those of the others
            if self._launch.rank == 0:
                self._wait_for_others(lambda sign: sign.state == _IS_GONE, FAREWELL_TIMEOUT)
            self._state = _IS_GONE
            self._wake.set()
            self._threads[0].join(REPORT_TIMEOUT)
        return have_left

    def _wait_for_others(self, are_there: Callable[[_Sign], bool], timeout: float | None) -> bool:
        """Wait until the signs of all others say something; False if they do not, or the run has failed."""

        def all_are_there() -> bool:
            return all(rank in self._signs and are_there(self._signs[rank]) for rank in self._others)

        def is_over() -> bool:
            has_failed = self.failure is not None and not self._has_reported
            return all_are_there() or has_failed or self._ended.is_set()

        with self._read:
            self._read.wait_for(is_over, timeout)
        return all_are_there()

    # The messenger ---------------------------------------------------------------------------------

    def _exchange(self) -> None:
        store: PrefixStore | None = None
        # A client whose connection is broken is of no use any more
        has_failed = False
        while not self._ended.is_set():
            self._wake.clear()
            try:
                if store is None:
                    client = own_client(self._store) if has_failed else shared_client(self._store)
                    store = PrefixStore(self._prefix, client)
                    self._begin(store)
                if self._state == _IS_GONE:
                    self._say_goodbye(store)
                    return
                self._meet(store)
            # Of torch when the connection is broken; of Python when there is none to be had
            except (RuntimeError, OSError):
                store, has_failed = None, True
            with self._read:
                self._read.notify_all()
            if not self._ended.is_set():
                is_waited_for = self._state != _RUNS or self._has_reported
                self._wake.wait(min(self._period, LEAVING_PERIOD) if is_waited_for else self._period)

        if store is not None and self._state == _HAS_LEFT:
            with contextlib.suppress(RuntimeError):
                self._say(store)

    def _begin(self, store: PrefixStore) -> None:
        """Make sure that all keys are there. After an outage, all ranks have the whole time again."""
        for key in self._keys:
            store.compare_set(key, "", "-")
        self._changed = [self._now] * self._launch.world_size
        self._came_on = self._now

    def _meet(self, store: PrefixStore) -> None:
        """Write this rank's sign, read the others', and judge."""
        own = self._say(store)
        if (found := self._found) is not None:
            store.compare_set("failure", "-", msgspec.json.encode(found).decode())
        *signs, failure = store.multi_get(self._keys)
        self._reached = self._now
        for rank, raw in enumerate(signs):
            if raw != b"-":
                self._take(rank, msgspec.json.decode(raw, type=_Sign))
        if failure != b"-":
            told = msgspec.json.decode(failure, type=_Failure)
            self._fail_with(RankFailedError(told.rank, told.host, told.what))
        else:
            self._judge(own)

    def _say(self, store: PrefixStore) -> _Sign:
        if self._wants_attention():
            self._asked += 1
        self._number += 1
        own = _Sign(
            number=self._number,
            host=self._launch.host,
            place=self.place,
            excused=self.excused,
            knows_failure=self.failure is not None,
            asked=self._asked,
            state=self._state,
        )
        store.set(f"sign/{self._launch.rank}", msgspec.json.encode(own).decode())
        return own

    def _take(self, rank: int, sign: _Sign) -> None:
        before = self._signs.get(rank)
        if before is None or before.number != sign.number:
            self._changed[rank] = self._now
            self._signs[rank] = sign
        asked = 0 if before is None else before.asked
        if sign.asked > asked and self._launch.rank == 0:
            _call(self._attention)

    def _judge(self, own: _Sign) -> None:
        """Look for a rank that is silent, and whether this one is late."""
        for rank in self._others:
            if self._now - self._changed[rank] >= self._timeout and not self._has_left(rank):
                what = (
                    f"has given no sign of life for {self._timeout:g} s: it was killed or stopped, its machine or "
                    "network is down, or its code holds Python's interpreter lock"
                )
                self._put(_Failure(rank, self._host_of(rank), what))
                return
        others = [sign for rank, sign in self._signs.items() if rank != self._launch.rank]
        is_behind = any(each.state == _RUNS and each.place > own.place for each in others)
        anyone_is_excused = own.excused or any(each.excused for each in others)
        if own.place != self._last_place or not is_behind or anyone_is_excused or own.state != _RUNS:
            self._last_place, self._came_on = own.place, self._now
        elif self._now - self._came_on >= self._timeout and not self._has_reported:
            batch, phase = own.place
            where = f"{_PHASES[min(phase, 2)]} of batch {batch}"
            what = (
                f"has not come on for {self._timeout:g} s, while others wait for it: it {where}. "
                f"If it is only slow, raise rank_timeout. Its training thread:\n{self._stack()}"
            )
            self._put(_Failure(self._launch.rank, self._launch.host, what))

    def _say_goodbye(self, store: PrefixStore) -> None:
        self._say(store)
        if self._launch.rank == 0 and all(self._signs[rank].state == _IS_GONE for rank in self._others):
            for key in self._keys:
                store.delete_key(key)

    # Failures --------------------------------------------------------------------------------------

    def _put(self, failure: _Failure) -> None:
        """Have a failure written to the store. If another one is there first, that one counts."""
        with self._lock:
            if self._found is None:
                self._found = failure
        self._wake.set()

    def _fail_with(self, failure: RankFailedError) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        self._is_known.set()
        # The others wait to hear that it is known
        self._wake.set()
        if not self._has_reported:
            _call(lambda: self._fail(failure))
            self._failed_at = self._now

    def _suspect(self) -> _Failure | None:
        """Return the failure of a rank that is silent for some periods, in a moment when a collective has broken."""
        patience = self._period * SUSPICIOUS
        if self._now - self._reached < patience:
            for rank in self._others:
                if self._now - self._changed[rank] >= patience and not self._has_left(rank):
                    what = "has ended without a word: its connections are closed, as when it is killed"
                    return _Failure(rank, self._host_of(rank), what)
        return None

    def _store_is_gone(self, patience: float) -> RankFailedError | None:
        silence = self._now - self._reached
        if silence < patience:
            return None
        address = f"{self._store.client.host}:{self._store.client.port}"
        what = f"cannot be reached: the store at {address} has not answered for {silence:.0f} s"
        return RankFailedError(0, self._host_of(0), what)

    def _has_left(self, rank: int) -> bool:
        sign = self._signs.get(rank)
        return sign is not None and sign.state >= _HAS_LEFT

    def _host_of(self, rank: int) -> str:
        sign = self._signs.get(rank)
        return "its host" if sign is None else sign.host

    def _stack(self) -> str:
        assert self._training_thread is not None and self._training_thread.ident is not None
        frame = sys._current_frames().get(self._training_thread.ident)
        return "  it has ended" if frame is None else "".join(traceback.format_stack(frame)).rstrip()

    # The watch -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._training_thread is not None
        before = time.monotonic()
        while not self._ended.wait(_TICK):
            after = time.monotonic()
            self._now += min(after - before, _LONGEST_TICK)
            before = after
            if self._state != _IS_GONE and (failure := self._store_is_gone(self._timeout)) is not None:
                self._fail_with(failure)
                with self._read:
                    self._read.notify_all()
            if self._failed_at is None or self.has_come_out or not self._training_thread.is_alive():
                continue
            if self._now - self._failed_at >= self._patience():
                self._end_process()

    def _patience(self) -> float:
        """Return how many seconds the training thread has to come out."""
        failure = self.failure
        is_own = failure is not None and failure.rank == self._launch.rank
        return COMING_OUT_OF_A_HANG if is_own else COMING_OUT

    def _end_process(self) -> None:
        """End this process. Its training thread stands in a collective, and no call gets it out."""
        words = (
            f"offloop: rank {self._launch.rank} on {self._launch.host} ends itself: RankFailedError: {self.failure}\n"
            f"offloop: its training thread has not come out for {self._patience():g} s:\n{self._stack()}\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, words.encode("utf-8", "backslashreplace"))
        # In a thread: whoever hangs may hold the lock of a stream
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(1)


def _tells_of_a_connection(error: BaseException | None) -> bool:
    """Return whether an error, or one that it comes from, is of gloo, NCCL or the store."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RuntimeError):
            text = str(error).lower()
            # gloo raises bare RuntimeErrors, with the path of its source
            if isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text:
                return True
        error = error.__cause__ or error.__context__
    return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _call(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception:
        logger.exception("a callback of the signs of life has raised")
