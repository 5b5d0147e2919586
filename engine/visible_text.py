"""Text that shows what it is: no character is invisible, or changes how its neighbours are drawn.

Controls move a terminal's cursor, bidirectional marks turn the text after them around, and a space of no width makes
two names look alike. Joiners stay: words of several languages and many emoji consist of them.
"""

import unicodedata
from typing import Final

__all__ = ["visible"]

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, formats, surrogates, and separators of lines and paragraphs."""
_JOINERS: Final = "\u200c\u200d"


def is_hidden(character: str) -> bool:
    """Tell whether a character has no shape of its own."""
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def visible(text: str, *, keep: str = "") -> str:
    """Return a text with U+FFFD in place of each hidden character.

    Args:
        text: Any text, also from a file that others wrote.
        keep: Hidden characters that stay, like a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each in keep or not is_hidden(each) else "\N{REPLACEMENT CHARACTER}" for each in text
    )
