"""Which checkpoints to keep: a pure function of what there is and what was asked for.

Several may ask: each owner has rules of its own for the checkpoints that it had taken, and one stays if any of them
wants it. The first owner that names a metric says which is best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence

import msgspec

from offloop.engine.checkpoint.manifest import ManifestHead
from offloop.engine.monitor import Direction, is_better

MINIMUM_KEPT = 2
"""Whatever the policy says: a newest one that turns out to be damaged must have a predecessor."""


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep; a checkpoint stays if any of the rules wants it.

    Raises:
        ValueError: For a number below its least, or `save_top_k` without `monitor`.
    """

    keep_last: int | None = 2
    """The newest ones; None keeps all; below 2 has the effect of 2."""
    save_top_k: int = 0
    """The best ones by `monitor`."""
    monitor: str | None = None
    """Key in the metrics of a checkpoint; also decides what ``best`` is."""
    mode: Direction = "min"
    keep_every_n_steps: int | None = None
    """Those at multiples of this, for good."""
    owner: str = ""
    """Whose rules these are: they count the checkpoints that were taken for it and those taken for no owner that
    there is now. Empty: they count all."""

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1 or None, got {self.keep_last}")
        if self.save_top_k < 0:
            raise ValueError(f"save_top_k must be at least 0, got {self.save_top_k}")
        if self.save_top_k and self.monitor is None:
            raise ValueError("save_top_k needs monitor, the metric to judge by")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if self.keep_every_n_steps is not None and self.keep_every_n_steps < 1:
            raise ValueError(f"keep_every_n_steps must be at least 1 or None, got {self.keep_every_n_steps}")


def rank(checkpoints: Sequence[ManifestHead], policy: Retention) -> list[ManifestHead]:
    """Return those that have the monitored metric, best first.

    NaN and infinities are no values. Of equal ones the older comes first: a tie is no improvement.
    """
    if policy.monitor is None:
        return []

    def score(checkpoint: ManifestHead) -> float:
        return float(checkpoint.metrics.get(policy.monitor or "", math.nan))

    def order(first: ManifestHead, second: ManifestHead) -> int:
        one, other = score(first), score(second)
        return is_better(other, one, policy.mode) - is_better(one, other, policy.mode)

    by_age = sorted(checkpoints, key=lambda checkpoint: checkpoint.serial)
    finite = [checkpoint for checkpoint in by_age if math.isfinite(score(checkpoint))]
    return sorted(finite, key=functools.cmp_to_key(order))


def best_of(checkpoints: Sequence[ManifestHead], policies: Sequence[Retention]) -> ManifestHead | None:
    """Return the best one, by the first policy that judges; None where none has its metric."""
    judging = next((each for each in policies if each.monitor is not None), None)
    ranked = [] if judging is None else rank(checkpoints, judging)
    return ranked[0] if ranked else None


def counted_by(
    checkpoints: Sequence[ManifestHead], policy: Retention, policies: Sequence[Retention]
) -> list[ManifestHead]:
    """Return the checkpoints that a policy counts, of several beside it."""
    if not policy.owner:
        return list(checkpoints)
    owners = {each.owner for each in policies}
    return [
        each for each in checkpoints if policy.owner in each.owners or not owners.intersection(each.owners)
    ]


def select_kept_by_any(
    checkpoints: Sequence[ManifestHead], policies: Sequence[Retention], *, pinned: Collection[str] = ()
) -> set[str]:
    """Return the names that any policy keeps of those that it counts, and those `pinned`; see `select_kept`."""
    kept = set(pinned) & {checkpoint.name for checkpoint in checkpoints}
    for policy in policies:
        kept |= select_kept(counted_by(checkpoints, policy, policies), policy)
    return kept


def select_kept(
    checkpoints: Sequence[ManifestHead], policy: Retention, *, pinned: Collection[str] = ()
) -> set[str]:
    """Return the names to keep of `checkpoints`, all of them committed.

    `pinned` holds the names that stay whatever the policy says: tagged, resumed from, best.
    """
    if policy.keep_last is None:
        return {checkpoint.name for checkpoint in checkpoints}
    by_age = sorted(checkpoints, key=lambda checkpoint: checkpoint.serial)
    kept = {checkpoint.name for checkpoint in by_age[-max(policy.keep_last, MINIMUM_KEPT) :]}
    # The best one of all stays even if no top-k was asked for: `best` must lead somewhere.
    kept |= {checkpoint.name for checkpoint in rank(by_age, policy)[: max(policy.save_top_k, 1)]}
    every = policy.keep_every_n_steps
    if every is not None:
        kept |= {checkpoint.name for checkpoint in by_age if checkpoint.step % every == 0}
    return kept | (set(pinned) & {checkpoint.name for checkpoint in by_age})
