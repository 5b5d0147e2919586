"""Twins: stand-ins for a user's loader, or a part of one, that give the same samples in another form."""

from typing import Any


class Twin:
    """Stands for an object of the user, and has its length and its public attributes: a generator, a `state_dict`."""

    batches_per_step: int = 1
    """More than 1 where several processes take whole batches in turn."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __len__(self) -> int:
        return len(self.original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.original, name)


def batches_per_step(loader: Any) -> int:
    """Return how many batches of a user's loader each batch of its twin stands for."""
    parts = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    return max((each.batches_per_step for each in parts if isinstance(each, Twin)), default=1)


def unwrapped(part: Any) -> Any:
    """Return the user's object behind all twins."""
    while isinstance(part, Twin):
        part = part.original
    return part
