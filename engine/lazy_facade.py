"""Packages whose public names are loaded when first used.

Importing such a package is cheap: `import offloop` loads neither torch nor msgspec nor anyio. Type checkers and
editors do not run this; they read the same names from imports under `TYPE_CHECKING`. A test holds both equal.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

__all__ = ["lazy_facade"]


class Facade(NamedTuple):
    """What a package assigns to its `__all__`, `__getattr__` and `__dir__`, in this order."""

    names: list[str]
    load: Callable[[str], Any]
    directory: Callable[[], list[str]]


def lazy_facade(
    package: str, names: Mapping[str, str], modules: Iterable[str] = (), *, events: str = ""
) -> Facade:
    """Return the facade of a package.

    Any thread may use it. A name is looked up once; from then on it is an ordinary attribute of the package.

    Args:
        package: The package's `__name__`.
        names: The public names, separated by spaces, by the module that has them, relative to the package.
        modules: Modules and packages that are attributes, too, without an import of their own.
        events: Names that are event classes, separated by spaces: a handler named after one is known before it is
            loaded.
    """
    homes = {name: module for module, of_module in names.items() for name in of_module.split()}
    modules = frozenset(modules)
    attributes = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            near = get_close_matches(name, [*homes, *modules], n=1, cutoff=0.7)
            hint = f": did you mean {near[0]}?" if near else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        attributes[name] = value
        return value

    def directory() -> list[str]:
        return sorted({*attributes, *homes, *modules})

    if events:
        from offloop.engine.events import define_later

        define_later(lambda: [load(name) for name in events.split()])
    return Facade(sorted(homes), load, directory)
