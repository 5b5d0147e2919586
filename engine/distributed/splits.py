"""Which samples the data sets of each rank hold: a `random_split` without a seed draws others in each process.

Some samples would be read twice then and some never, and validations would see samples of other ranks' training. So
all ranks take rank 0's split, as they take its weights. Parts that have nothing in common are no split of the same
draw: somebody has divided the data by hand, which is an error (and right with `rank_batches="own"`).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Subset

from offloop.engine.data.loader_parts import datasets_of
from offloop.engine.distributed.plan import Plan
from offloop.engine.position.loader_doubts import describe


def follow_splits(plan: Plan, is_first: bool, loaders: Mapping[str, Iterable[Any]]) -> None:
    """Let the `Subset`s of this rank hold the samples of rank 0's. Before rank 0 announces, after the others learn.

    Args:
        plan: Of the run.
        is_first: True on rank 0.
        loaders: The user's, which all ranks share, by name.
    """
    for name, loader in loaders.items():
        for number, (subset, own) in enumerate(_subsets(loader)):
            key = f"split/{name}/{number}"
            if is_first:
                plan.share(key, own.numpy().tobytes())
                continue
            shared = plan.shared(key)
            if shared:
                first = torch.frombuffer(bytearray(shared), dtype=torch.int64)
                if _are_of_one_split(own, first, subset):
                    subset.indices = first.tolist()


def chosen_samples(loader: Iterable[Any], name: str) -> dict[str, str]:
    """Return what must be alike on all ranks that share a loader, by what it is called in messages.

    Args:
        loader: The user's.
        name: Of the loader in messages.
    """
    return {
        f'{key} of {name} (seed the choice; rank_batches="own" is for data that is divided already)': (
            f"checksum {value:08x}"
        )
        for key, value in describe(loader).items()
        if key.startswith("samples chosen")
    }


def _subsets(loader: Any) -> Iterator[tuple[Subset[Any], torch.Tensor]]:
    """Yield the `Subset`s in a loader's data set that are given by numbers, with these."""
    for part in datasets_of(loader):
        if isinstance(part, Subset):
            try:
                indices = torch.as_tensor(part.indices, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                # Indices of another kind, such as names
                continue
            if indices.dim() == 1 and not indices.is_floating_point() and indices.dtype != torch.bool:
                yield part, indices.long()


def _are_of_one_split(own: torch.Tensor, first: torch.Tensor, subset: Subset[Any]) -> bool:
    """Return whether two ranks have drawn the same part of the same data, each in its way."""
    if len(own) != len(first) or torch.equal(own, first):
        return False
    try:
        total = len(subset.dataset)  # type: ignore[arg-type]  # most have a length
    except TypeError:
        return False
    return int(first.max()) < total and bool(torch.isin(own, first).any())
