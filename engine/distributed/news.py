"""News: commands that travel through the store, where ranks cannot exchange messages: inside a validation.

rank 0       posts numbered news, for all ranks; reads what the others ask for
the others   ask rank 0; read news
"""

import msgspec

from offloop.engine.distributed.messages import Given
from offloop.engine.distributed.rendezvous import Store


class Posted(msgspec.Struct, array_like=True):
    """Commands, and a cancellation, for all ranks."""

    commands: list[list[Given]]
    """By the rank that they were given on."""
    cancelled: str | None


class Asked(msgspec.Struct, array_like=True):
    """What a rank asks rank 0 to post."""

    commands: list[Given]
    cancelled: str | None


class News:
    """The news of one run. Training thread only."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Begin with none.

        Args:
            store: A client whose keys belong to this run.
            rank: Of this process.
            world_size: Number of ranks.
        """
        self.posted = 0
        """Rank 0: how many were posted."""
        self.read = 0
        """Other ranks: how many were read."""
        self._store = store
        self._rank = rank
        # Rank 0: how often each rank has asked. Others: how often this one has
        self._asked = [0] * world_size

    def post(self, commands: list[list[Given]], cancelled: str | None) -> None:
        """Post news to all ranks. Rank 0."""
        self._store.set(f"news/{self.posted}", msgspec.msgpack.encode(Posted(commands, cancelled)).hex())
        self.posted += 1

    def next(self, *, wait: bool) -> Posted | None:
        """Return the news that this rank has not read yet; None if there is none. Other ranks.

        Args:
            wait: True if it was posted for certain.
        """
        key = f"news/{self.read}"
        if not wait and not self._store.check([key]):
            return None
        self.read += 1
        return msgspec.msgpack.decode(bytes.fromhex(self._store.get(key).decode()), type=Posted)

    def ask(self, commands: list[Given], cancelled: str | None) -> None:
        """Ask rank 0 to post commands. Other ranks."""
        key = f"asked/{self._rank}/{self._asked[self._rank]}"
        self._asked[self._rank] += 1
        self._store.set(key, msgspec.msgpack.encode(Asked(commands, cancelled)).hex())

    @property
    def asks(self) -> int:
        """How often this rank has asked. Other ranks."""
        return self._asked[self._rank] if self._rank else 0

    def skip(self, asks: list[int]) -> None:
        """Do not read what ranks have asked for so far: it has come by another way. Rank 0."""
        for rank, count in enumerate(asks):
            for number in range(self._asked[rank], count) if rank else ():
                self._store.delete_key(f"asked/{rank}/{number}")
                self._asked[rank] = number + 1

    def asked(self) -> list[Asked]:
        """Return what each rank has asked for since the last call, by rank. Rank 0."""
        found: list[Asked] = []
        for rank in range(len(self._asked)):
            commands: list[Given] = []
            cancelled: str | None = None
            while rank and self._store.check([key := f"asked/{rank}/{self._asked[rank]}"]):
                each = msgspec.msgpack.decode(bytes.fromhex(self._store.get(key).decode()), type=Asked)
                self._store.delete_key(key)
                self._asked[rank] += 1
                commands += each.commands
                cancelled = cancelled or each.cancelled
            found.append(Asked(commands, cancelled))
        return found
