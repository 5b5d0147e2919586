"""The states of the random generators that training draws from."""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def capture_random_state() -> dict[str, Any]:
    """Return the states of torch's, Python's and, if it is loaded, NumPy's global generators.

    They are plain values and CPU tensors, for a checkpoint. On CUDA this waits for the device.
    """
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
        # 624 words: a tensor is copied faster than a list.
        words = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [name, words, int(position), int(has_gauss), float(cached)]
    return state


def check_random_state(state: Mapping[str, Any]) -> None:
    """Raise if generators would refuse these states. Changes no generator."""
    torch.Generator().set_state(state["torch"])
    version, internal, gauss = state["python"]
    random.Random().setstate((version, tuple(internal), gauss))
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        numpy.random.RandomState().set_state(_of_numpy(state["numpy"]))


def restore_random_state(state: Mapping[str, Any]) -> list[str]:
    """Restore generators; return descriptions of those that could not be."""
    missed = []
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            missed.append(f"random states of {len(state['cuda'])} CUDA devices, but there are {devices}")
    if "numpy" in state:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            missed.append("NumPy's random state: NumPy is not loaded")
        else:
            numpy.random.set_state(_of_numpy(state["numpy"]))
    return missed


def fresh_random_state(like: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return states of the same generators, seeded anew. Changes no generator.

    Args:
        like: From `capture_random_state`.
        seed: 64 bits.
    """
    version, internal, gauss = random.Random(seed).getstate()
    state: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "python": [version, list(internal), gauss],
    }
    if "cuda" in like and torch.cuda.is_available():
        state["cuda"] = [
            torch.Generator(device=f"cuda:{index}").manual_seed(seed).get_state()
            for index in range(torch.cuda.device_count())
        ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.RandomState(seed % 2**32).get_state(
            legacy=True
        )
        words = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [name, words, int(position), int(has_gauss), float(cached)]
    return state


def differs_on_host(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the CPU's generators were drawn from between two captures."""
    if not torch.equal(state["torch"], other["torch"]) or state["python"] != other["python"]:
        return True
    if "numpy" not in state or "numpy" not in other:
        return False
    name, words, *rest = state["numpy"]
    other_name, other_words, *other_rest = other["numpy"]
    return bool(name != other_name or rest != other_rest or not torch.equal(words, other_words))


def _of_numpy(saved: Sequence[Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, cached = saved
    return name, keys.numpy().astype("uint32"), position, has_gauss, cached


def global_generators() -> set[int]:
    """Return the ids of the global generators, which every checkpoint holds."""
    owners = [random.random.__self__, torch.default_generator]  # type: ignore[attr-defined]  # a bound method
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        owners.append(numpy.random.mtrand._rand)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        owners.extend(torch.cuda.default_generators)
    return {id(each) for each in owners}


def capture_on_host() -> dict[str, Any]:
    """Return the states of the CPU's global generators as they are, for `restore_on_host`. Not for a checkpoint."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def restore_on_host(state: Mapping[str, Any]) -> None:
    """Restore what `capture_on_host` returned, in this process or in another."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(state["numpy"])


@contextmanager
def kept_on_host() -> Iterator[None]:
    """Restore the CPU's global generators after the block."""
    before = capture_on_host()
    try:
        yield
    finally:
        restore_on_host(before)
