"""Units of curves, for their axes and values: what a sample declares, else what the name of a field says."""

from collections.abc import Mapping
from typing import Final

BY_NAME: Final = {
    "_bytes_per_second": "bytes/s",
    "_per_second": "1/s",
    "_bytes": "bytes",
    "_percent": "percent",
    "_share": "share",
    "_seconds": "seconds",
    "_celsius": "celsius",
    "_watts": "watts",
}
"""Ends of names and their units, longer ones first. The page knows how to write these units."""


def unit_of(key: str, declared: Mapping[str, str]) -> str:
    """Return the unit of a curve; empty if nothing says it.

    Args:
        key: Name of the curve: `resource_usage/callback_cpu_percent/Notify`.
        declared: Units by the name of a field.
    """
    for name in key.split("/"):
        if name in declared:
            return declared[name]
        for end, unit in BY_NAME.items():
            if name.endswith(end):
                return unit
    return ""
