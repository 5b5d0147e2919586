"""Names of a model's tensors in and out of wrappers: torch.compile and DataParallel add parts of their own."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

WRAPPERS: Final = frozenset({"module", "_orig_mod"})
"""The parts of names that DataParallel, DistributedDataParallel and torch.compile add: in front of the model's names,
or between them, where a part of the model is wrapped."""


def bare_name(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def names_in(own: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return what each of `names` is called in a model whose names are `own`.

    A name that the model lacks, whatever is taken off, stays as it is; so do all of them where taking off the parts
    of wrappers would make two of them one.
    """
    own, names = list(own), list(names)
    if set(names) <= set(own):
        return {name: name for name in names}
    by_bare = {bare_name(name): name for name in own}
    if len(by_bare) < len(own) or len({bare_name(name) for name in names}) < len(names):
        return {name: name for name in names}
    return {name: by_bare.get(bare_name(name), name) for name in names}


def renamed(tensors: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Return tensors under the names that they have in a model whose names are `own`."""
    names = names_in(own, tensors)
    return {names[name]: each for name, each in tensors.items()}
