"""Which checkpoints to keep: a pure function of the checkpoints and the rules.

There may be several sets of rules. Each owner has rules for the checkpoints that were saved for it; a checkpoint
stays if any rule keeps it. The first owner that names a metric decides which one is best.
"""

import functools
import math
from collections.abc import Collection, Sequence

import msgspec

from offloop.engine import checks
from offloop.engine.checkpoint.manifest import ManifestHead
from offloop.engine.errors import ConfigError
from offloop.engine.monitor import Direction, is_better

MINIMUM_KEPT = 2
"""Always kept: if the newest turns out to be damaged, there must be a predecessor."""


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """Rules of what to keep. A checkpoint stays if any rule keeps it.

    Raises:
        ConfigError: A number is out of range, or `save_top_k` comes without `monitor`.
    """

    keep_last: int | None = 2
    """Keep so many of the newest; None keeps all, 1 has the effect of 2."""
    save_top_k: int = 0
    """Keep so many of the best by `monitor`."""
    monitor: str | None = None
    """Key in the metrics of a checkpoint; also decides which one is `best`."""
    mode: Direction = "min"
    keep_every_n_steps: int | None = None
    """Keep checkpoints at multiples of this for good."""
    owner: str = ""
    """The owner of these rules. They count checkpoints saved for it and those saved for none of today's owners.
    Empty: they count all."""

    def __post_init__(self) -> None:
        checks.whole_number("keep_last", self.keep_last, optional=True)
        checks.whole_number("save_top_k", self.save_top_k, at_least=0)
        if self.save_top_k and self.monitor is None:
            raise ConfigError("save_top_k needs monitor, the metric that decides what is best")
        checks.choice("mode", self.mode, ("min", "max"))
        checks.whole_number("keep_every_n_steps", self.keep_every_n_steps, optional=True)


def rank(checkpoints: Sequence[ManifestHead], policy: Retention) -> list[ManifestHead]:
    """Return the checkpoints that have the monitored metric, best first.

    Checkpoints with NaN or infinity are left out. Among equals the older comes first: a tie is no improvement.
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
    """Return the best checkpoint by the first policy with a monitor; None if none has its metric."""
    judging = next((each for each in policies if each.monitor is not None), None)
    ranked = [] if judging is None else rank(checkpoints, judging)
    return ranked[0] if ranked else None


def counted_by(
    checkpoints: Sequence[ManifestHead], policy: Retention, policies: Sequence[Retention]
) -> list[ManifestHead]:
    """Return the checkpoints that one of several policies counts."""
    if not policy.owner:
        return list(checkpoints)
    owners = {each.owner for each in policies}
    return [
        each for each in checkpoints if policy.owner in each.owners or not owners.intersection(each.owners)
    ]


def select_kept_by_any(
    checkpoints: Sequence[ManifestHead], policies: Sequence[Retention], *, pinned: Collection[str] = ()
) -> set[str]:
    """Return the names that at least one policy keeps of those that it counts, and those `pinned`."""
    kept = set(pinned) & {checkpoint.name for checkpoint in checkpoints}
    for policy in policies:
        kept |= select_kept(counted_by(checkpoints, policy, policies), policy)
    return kept


def select_kept(
    checkpoints: Sequence[ManifestHead], policy: Retention, *, pinned: Collection[str] = ()
) -> set[str]:
    """Return the names of the checkpoints to keep.

    Args:
        checkpoints: All committed.
        policy: The rules.
        pinned: Names that stay in any case: tagged, resumed from, best.
    """
    if policy.keep_last is None:
        return {checkpoint.name for checkpoint in checkpoints}
    by_age = sorted(checkpoints, key=lambda checkpoint: checkpoint.serial)
    kept = {checkpoint.name for checkpoint in by_age[-max(policy.keep_last, MINIMUM_KEPT) :]}
    # The best checkpoint stays without `save_top_k` too, because `best` names it.
    kept |= {checkpoint.name for checkpoint in rank(by_age, policy)[: max(policy.save_top_k, 1)]}
    every = policy.keep_every_n_steps
    if every is not None:
        kept |= {checkpoint.name for checkpoint in by_age if checkpoint.step % every == 0}
    return kept | (set(pinned) & {checkpoint.name for checkpoint in by_age})
