"""Keepers: which checkpoints of a run an owner wants to keep and to copy. A checkpoint that any owner keeps stays."""

import dataclasses
from collections.abc import Collection, Sequence

from offloop.engine.checkpoint import CheckpointInfo, NamedCopies, Retention
from offloop.engine.checkpoint.retention import counted_by, rank, select_kept


@dataclasses.dataclass(frozen=True, slots=True)
class Keeper:
    """What one owner, usually a callback, wants to keep of the checkpoints that were taken for it."""

    retention: Retention
    """Its rules; `owner` in them is its name."""
    save_at_end: bool = False
    """True if it wants a checkpoint when training ends."""
    copies: NamedCopies | None = None
    """The directory for copies of them."""
    copies_best_only: bool = False
    """True if only the best ones are copied, and not the newest as well."""

    def copied(
        self,
        checkpoints: Sequence[CheckpointInfo],
        policies: Sequence[Retention],
        *,
        pinned: Collection[str] = (),
    ) -> list[CheckpointInfo]:
        """Return the checkpoints to copy. Where the names of copies collide, the first gets the plain name.

        Args:
            checkpoints: Those of the run, oldest first.
            policies: The rules of all keepers.
            pinned: Names of checkpoints that stay whatever the rules say.
        """
        by_name = {info.name: info for info in checkpoints}
        counted = counted_by([info.manifest for info in checkpoints], self.retention, policies)
        if self.copies_best_only:
            names = [head.name for head in rank(counted, self.retention)[: max(self.retention.save_top_k, 1)]]
        else:
            kept = select_kept(counted, self.retention, pinned=pinned)
            names = [head.name for head in reversed(counted) if head.name in kept]
        return [by_name[name] for name in names]
