"""Parts: what each process ("rank") of a run adds to a checkpoint, and how the ranks meet in one commit.

    rank 0's writer                                writer of another rank
    ───────────────                                ──────────────────────
    model, optimizers, its own state               its own state, into the same directory, fsynced
    waits for all parts          <──── store ───── lengths and checksums, or why there is no part
    manifest, fsync, rename, fsync
    durable, or why it is not    ───── store ────> if it is not: removes its files

Nobody waits for a collective: the ranks know the directory by the step, the attempt and the number of the save, and
everything else goes through the store of torch.distributed, from the writers' threads. Until the manifest is there, the
directory has its temporary name, so a rank that dies leaves no checkpoint.

    rank-00001-of-00004.json            state of rank 1; its tensors by name
    rank-00001-of-00004.safetensors     these tensors

In the manifest all names of a rank's tensors begin with `ranks.<rank>.`.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from offloop.engine.checkpoint.errors import CheckpointError, CheckpointWriteError
from offloop.engine.checkpoint.manifest import (
    CheckpointRequest,
    Count,
    FileRecord,
    StoredTensor,
    TensorView,
)

RANKS: Final = "ranks"
"""Top-level key of the parts: `ranks.1` is the part of rank 1."""

TEMPORARY: Final = ".tmp-"
"""Prefix of a directory that is being written."""

PART_TIMEOUT: Final = 600.0
"""Seconds for which rank 0 waits for the other parts. Dead ranks are noticed by other means; this is for a rank that
lives and whose disk hangs."""
OUTCOME_TIMEOUT: Final = 7200.0
"""Seconds for which a rank waits to hear of the commit. Rank 0 may have hundreds of gigabytes to write."""

LAST_MOMENT: Final = 0.5
"""Seconds for which something is still waited for that was given up: a part that is being written may yet come."""

PIECE_BYTES: Final = 1 << 20
"""Size of the values in the store. torch's store ends the connection at values above 8 MiB."""
SHORTEST_LOOK: Final = 0.001
"""Seconds between the first looks into the store; a look takes about 25 us."""
LONGEST_LOOK: Final = 0.05
"""Seconds between later looks. A commit takes 10 ms or more."""

_MEETING_PLACE = re.compile(re.escape(TEMPORARY) + r"step-[0-9]+-a[0-9]+-save-(?P<number>[0-9]+)")


def part_file(rank: int, world_size: int, ending: str) -> str:
    """Return the name of a rank's file: `rank-00001-of-00004.json`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.{ending}"


def meeting_place(request: CheckpointRequest) -> str:
    """Return the temporary name of a checkpoint's directory, which all ranks know without talking."""
    return f"{TEMPORARY}step-{request.step:09d}-a{request.attempt}-save-{request.number}"


def number_of(name: str) -> int | None:
    """Return the number of the save whose temporary directory has this name; None if it is none of several ranks."""
    found = _MEETING_PLACE.fullmatch(name)
    return None if found is None else int(found["number"])


class Part(msgspec.Struct, frozen=True):
    """What a rank reports about its part."""

    error: str = ""
    """Why there is none; empty if there is one."""
    files: dict[str, FileRecord] = {}
    tensors: dict[str, StoredTensor] = {}
    views: dict[str, TensorView] = {}
    contents: dict[str, bytes] = {}
    """Of the files that rank 0 has to write, because this rank does not see the run's directory."""


class Outcome(msgspec.Struct, frozen=True):
    """What rank 0 tells about a save, or about a tag."""

    error: str = ""
    """Why it failed; empty if it is durable."""
    path: str = ""
    """Of the checkpoint, on rank 0's machine."""
    step: int = 0
    reason: str = ""
    bytes: Count = 0
    seconds: float = 0.0


class Store(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: Any, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def delete_key(self, key: str, /) -> bool: ...


class PartsChannel:
    """The way between the writers of a run's ranks, through the store.

    Used by the writer's thread of its rank, and on ranks above 0 by the thread that waits for outcomes. The client lets
    one operation at a time through, and none of them waits. Saves are counted by the training threads, in the same
    order on all ranks; a number is used once in an attempt.
    """

    def __init__(
        self,
        store: Store,
        run_key: str,
        *,
        rank: int,
        world_size: int,
        give_up: Callable[[], str],
        is_shared: bool = True,
        timeout: float = PART_TIMEOUT,
    ) -> None:
        """Connect the ranks of one attempt of a run. Does not talk to the store.

        Args:
            store: A client that any thread may use.
            run_key: Of the run and its attempt; the same on all ranks, and never used before in this store.
            rank, world_size: Of this process.
            give_up: Returns why nothing is to be waited for any more (a rank has failed, the run ends in haste); empty
                while there is no reason. Called in this object's threads, about 20 times a second.
            is_shared: False if this rank does not see the directory in which rank 0 writes. May be set before the first
                save.
            timeout: Seconds for which rank 0 waits for parts.
        """
        self.rank = rank
        self.world_size = world_size
        self.is_shared = is_shared
        self._store = store
        self._key = f"checkpoints/{run_key}"
        self._give_up = give_up
        self._timeout = timeout

    # Rank 0's writer -----------------------------------------------------------------------------

    def gather(self, number: int, directory: Path) -> list[Part]:
        """Return the parts of all other ranks, by rank. Blocks until they are durable.

        Args:
            number: Of the save.
            directory: For errors.

        Raises:
            CheckpointError: A rank has no part, has failed, or takes too long.
        """
        keys = [self._part_key(number, rank) for rank in range(1, self.world_size)]
        if reason := self._wait(keys, self._timeout):
            missing = [rank for rank, key in enumerate(keys, 1) if not self._check([key])]
            ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            raise CheckpointWriteError(directory, None, f"the part of {ranks} did not come: {reason}")
        parts = [self._decode(self._take(key), Part) for key in keys]
        for rank, part in enumerate(parts, 1):
            if part.error:
                raise CheckpointWriteError(directory, None, f"rank {rank}: {part.error}")
        return parts

    def tell(self, number: int, outcome: Outcome) -> None:
        """Tell the other ranks what came of a save or a tag. Once for each number. Does not block for long.

        Raises:
            CheckpointError: The store cannot be reached.
        """
        self._put(self._outcome_key(number), msgspec.msgpack.encode(outcome))

    # Other ranks ---------------------------------------------------------------------------------

    def report(self, number: int, part: Part) -> None:
        """Report this rank's part of a save. Once for each number. Does not block for long.

        Raises:
            CheckpointError: The store cannot be reached.
        """
        self._put(self._part_key(number, self.rank), msgspec.msgpack.encode(part))

    def is_decided(self, number: int) -> bool:
        """Return whether rank 0 has told what came of a save, which it does early only if it has failed.

        Raises:
            CheckpointError: The store cannot be reached.
        """
        return self._check([self._outcome_key(number)])

    def outcome(self, number: int) -> Outcome:
        """Wait for what comes of a save or a tag. Blocks. Once for each number.

        Raises:
            CheckpointError: The store cannot be reached.
        """
        key = self._outcome_key(number)
        if reason := self._wait([key], OUTCOME_TIMEOUT):
            return Outcome(error=f"rank 0 did not tell what became of it: {reason}")
        with self._reaching():
            outcome: Outcome = self._decode(self._store.get(key).partition(b":")[2], Outcome)
            # The last one to read it removes it.
            if self._store.add(f"{key}/read", 1) == self.world_size - 1:
                self._store.delete_key(key)
                self._store.delete_key(f"{key}/read")
        if outcome.error:
            # Rank 0 may have failed before it took the part.
            with suppress(CheckpointError):
                part = self._part_key(number, self.rank)
                if self._check([part]):
                    self._take(part)
        return outcome

    # Both ----------------------------------------------------------------------------------------

    def _part_key(self, number: int, rank: int) -> str:
        return f"{self._key}/part/{number}/{rank}"

    def _outcome_key(self, number: int) -> str:
        return f"{self._key}/outcome/{number}"

    def _wait(self, keys: list[str], seconds: float) -> str:
        """Wait until all keys are there; return why they did not come, empty if they did."""
        deadline = time.monotonic() + seconds
        reason = ""
        pause = SHORTEST_LOOK
        while not self._check(keys):
            if not reason and (reason := self._give_up()):
                deadline = min(deadline, time.monotonic() + LAST_MOMENT)
            if time.monotonic() > deadline:
                return reason or f"{seconds:g} s have passed"
            time.sleep(pause)
            pause = min(LONGEST_LOOK, pause * 1.5)
        return ""

    def _check(self, keys: Sequence[str]) -> bool:
        with self._reaching():
            return self._store.check(list(keys))

    def _put(self, key: str, content: bytes) -> None:
        """Store bytes under a key, in pieces. The key itself comes last: who sees it sees all."""
        pieces = [content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES)]
        with self._reaching():
            for index, piece in enumerate(pieces[1:], 1):
                self._store.set(f"{key}/{index}", piece)
            self._store.set(key, b"%d:" % len(pieces) + pieces[0])

    def _take(self, key: str) -> bytes:
        """Return the bytes under a key that is there, and remove them."""
        with self._reaching():
            count, _, first = self._store.get(key).partition(b":")
            others = [f"{key}/{index}" for index in range(1, int(count))]
            pieces = [first, *(self._store.get(each) for each in others)]
            for each in (key, *others):
                self._store.delete_key(each)
        return b"".join(pieces)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        # torch's errors of stores are RuntimeErrors.
        except RuntimeError as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"the store of the ranks cannot be reached: {text}") from error

    @staticmethod
    def _decode(content: bytes, kind: type[Any]) -> Any:
        return msgspec.msgpack.decode(content, type=kind)
