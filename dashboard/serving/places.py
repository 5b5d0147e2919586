"""Places: how many viewers a server has, and who finds no place any more."""

from offloop.dashboard.options import Options
from offloop.dashboard.protocol.limits import Role


class Places:
    """The places of a server's viewers. Only its thread takes them; any may look."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._taken: set[object] = set()

    def __len__(self) -> int:
        """Return the number of admitted viewers, including programs that have not said hi."""
        return len(self._taken)

    def take(self, visitor: object) -> None:
        """Give a visitor a place, whether or not there is one left."""
        self._taken.add(visitor)

    def leave(self, visitor: object) -> None:
        """Take the place back, if the visitor has one."""
        self._taken.discard(visitor)

    def is_full(self, role: Role) -> bool:
        """True if there is no place for another viewer of this role: readers leave some to those who may steer."""
        places = self._options.max_viewers
        if role == "read_only" and not self._options.read_only:
            # An eighth is kept.
            places -= max(1, places // 8)
        return len(self._taken) >= places

    @property
    def why_full(self) -> str:
        """Reason of a refusal."""
        return f"There are already {len(self)} viewers."
