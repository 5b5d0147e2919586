"""The names of tags."""

import re

TAG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESERVED_TAGS = frozenset({"last", "best", "auto", "never", "must"})
"""Words with another meaning where a checkpoint is chosen: `resume="must"`, `runs/first@best`."""


def check_tag(tag: str) -> None:
    """Check the name of a tag.

    Raises:
        ValueError: It is too long, has other characters, or is reserved.
    """
    if not TAG_NAME.fullmatch(tag) or tag in RESERVED_TAGS:
        raise ValueError(
            f"tag must be letters, digits, '.', '_' and '-', at most 64 of them, and none of "
            f"{sorted(RESERVED_TAGS)}, got {tag!r}"
        )
