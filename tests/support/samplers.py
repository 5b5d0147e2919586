"""Samplers that several test files train with."""

import random
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class StatefulSampler(Sampler[int]):
    """Shuffles by a generator that is found only through its own `state_dict`."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._random = random.Random(4)

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        return iter(self._random.sample(range(self._samples), self._samples))

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = self._random.getstate()
        return {"state": [version, list(internal), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["state"]
        self._random.setstate((version, tuple(internal), gauss))
