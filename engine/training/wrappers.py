"""Names of a model's tensors inside wrappers: torch.compile and DataParallel add prefixes to them."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

WRAPPERS: Final = frozenset({"module", "_orig_mod"})
"""What DataParallel, DistributedDataParallel and torch.compile add to names: at the start, or in the middle if a part
of the model is wrapped."""


def bare_name(name: str) -> str:
    """Return a name without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def names_in(own: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return the name of each of `names` in a model whose names are `own`.

    A name that the model lacks even without prefixes stays as it is. All names stay as they are if two of them would
    become the same.
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
