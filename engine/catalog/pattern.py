r"""Pattern: regular expressions that take time in proportion to the text, whatever they are.

Python's `re` and the browser's `RegExp` try one way after the other, and `(a+)+$` has so many in a name of 30 letters
that neither comes to an end. A `Pattern` follows all ways at the same time: at each character it knows the set of
places in the expression where it may be, and the sets that it has met are remembered.

    a  .  [a-z]  [^0-9]  \d \w \s \D \W \S  \. \/         one character; . is any, \w is A-Z, a-z, 0-9 and _
    ^  $  \b  \B                                         beginning and end of the text, of a word
    ab  a|b  (a)  (?:a)  a*  a+  a?  a{2}  a{2,}  a{2,5}   as usual; a*? is a*

Upper and lower case are the same. What needs a memory (references to groups) or looks ahead or behind is refused.
`dashboard/web/src/pattern.ts` is the same in TypeScript; `tests/support/run_filters.json` is tried with both.
"""

import re
from typing import Final, NamedTuple

from offloop.engine.errors import ConfigError

MAX_PLACES: Final = 200
"""Most places of an expression, with repetitions written out: the time for a character is in proportion to it."""
MAX_DEPTH: Final = 50
"""Most groups inside one another."""
KEPT_PLACES: Final = 200_000
"""Most places in all sets that are remembered: about 10 MB."""

_LAST: Final = 0x10FFFF
_DIGITS: Final = ((48, 57),)
_WORD: Final = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Final = ((9, 13), (32, 32))
_COUNT: Final = re.compile(r"\{([0-9]{1,4})(,([0-9]{1,4})?)?\}")
_CONTROL: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}

Ranges = tuple[tuple[int, int], ...]
Places = frozenset[int]


def _others(ranges: Ranges) -> Ranges:
    """Return the characters that are not in ascending ranges."""
    starts = [0, *(last + 1 for _, last in ranges)]
    ends = [*(first - 1 for first, _ in ranges), _LAST]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start <= end)


_CLASSES: Final = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _SPACE,
    "D": _others(_DIGITS),
    "W": _others(_WORD),
    "S": _others(_SPACE),
}


# The expression ------------------------------------------------------------------------------------


class _Char(NamedTuple):
    ranges: Ranges
    negated: bool = False

    def accepts(self, char: str) -> bool:
        codes = [ord(form) for form in (char, char.lower(), char.upper()) if len(form) == 1]
        return self.negated != any(first <= code <= last for first, last in self.ranges for code in codes)


class _Edge(NamedTuple):
    sign: str
    """`^`, `$`, `b` or `B`."""


class _Sequence(NamedTuple):
    parts: "tuple[_Node, ...]"


class _Choice(NamedTuple):
    ways: "tuple[_Node, ...]"


class _Repeated(NamedTuple):
    part: "_Node"
    least: int
    most: int | None


_Node = _Char | _Edge | _Sequence | _Choice | _Repeated


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0

    def whole(self) -> _Node:
        node = self.choice(0)
        if self.at < len(self.source):
            raise ConfigError("')' has no '(' before it")
        return node

    def peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def take(self) -> str:
        char = self.peek()
        self.at += 1
        return char

    def choice(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} groups are inside one another")
        ways = [self.sequence(depth)]
        while self.peek() == "|":
            self.take()
            ways.append(self.sequence(depth))
        return ways[0] if len(ways) == 1 else _Choice(tuple(ways))

    def sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom(depth)))
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def repeated(self, part: _Node) -> _Node:
        counts = self.counts()
        if counts is None:
            return part
        sign, least, most = counts
        if isinstance(part, _Edge):
            raise ConfigError(f"'{sign}' has nothing before it to repeat")
        if most is not None and least > most:
            raise ConfigError(f"'{sign}' is out of order")
        if self.peek() == "?":
            self.take()
        if (again := self.counts()) is not None:
            raise ConfigError(f"'{again[0]}' has nothing before it to repeat")
        return _Repeated(part, least, most)

    def counts(self) -> tuple[str, int, int | None] | None:
        """Take how often something is repeated, if that comes next."""
        sign = self.peek()
        if sign in ("*", "+", "?"):
            self.take()
            return sign, int(sign == "+"), 1 if sign == "?" else None
        found = _COUNT.match(self.source, self.at)
        if found is None:
            return None
        self.at = found.end()
        least = int(found[1])
        return found[0], least, int(found[3]) if found[3] else None if found[2] else least

    def atom(self, depth: int) -> _Node:
        char = self.take()
        if char == "(":
            return self.group(depth)
        if char == "[":
            return self.char_class()
        if char == "\\":
            return self.escape()
        if char in "^$":
            return _Edge(char)
        if char == ".":
            return _Char(((0, _LAST),))
        if char in "*+?" or _COUNT.match(self.source, self.at - 1):
            raise ConfigError(f"'{char}' has nothing before it to repeat")
        return _Char(((ord(char), ord(char)),))

    def group(self, depth: int) -> _Node:
        if self.peek() == "?":
            if self.source[self.at : self.at + 2] != "?:":
                raise ConfigError(
                    f"'({self.source[self.at : self.at + 2]}' is not known here, only (...) and (?:...)"
                )
            self.at += 2
        node = self.choice(depth + 1)
        if self.take() != ")":
            raise ConfigError("'(' has no ')' after it")
        # `^*` is refused, `(^)*` is not
        return _Sequence((node,)) if isinstance(node, _Edge) else node

    def escape(self) -> _Node:
        char = self.take()
        if char in ("b", "B"):
            return _Edge(char)
        return _Char(self.escaped(char))

    def escaped(self, char: str) -> Ranges:
        if char == "":
            raise ConfigError("'\\' has nothing after it")
        if char in _CLASSES:
            return _CLASSES[char]
        code = _CONTROL.get(char, ord(char))
        if char not in _CONTROL and char.isascii() and char.isalnum():
            raise ConfigError(f"'\\{char}' is not known here")
        return ((code, code),)

    def char_class(self) -> _Node:
        negated = self.peek() == "^"
        if negated:
            self.take()
        ranges: list[tuple[int, int]] = []
        while (char := self.take()) != "]":
            if char == "":
                raise ConfigError("'[' has no ']' after it")
            found = self.member(char)
            if self.peek() == "-" and self.source[self.at + 1 : self.at + 2] not in ("", "]"):
                self.take()
                end = self.member(self.take())
                if len(found) > 1 or len(end) > 1 or found[0][0] != found[0][1] or found[0][0] > end[0][1]:
                    raise ConfigError("a range in [...] is out of order")
                found = ((found[0][0], end[0][1]),)
            ranges.extend(found)
        if not ranges:
            raise ConfigError("[] is empty")
        return _Char(tuple(ranges), negated)

    def member(self, char: str) -> Ranges:
        return self.escaped(self.take()) if char == "\\" else ((ord(char), ord(char)),)


# The places ----------------------------------------------------------------------------------------


class _Split(NamedTuple):
    ways: tuple[int, ...]


class _Step(NamedTuple):
    char: _Char
    then: int


class _At(NamedTuple):
    sign: str
    then: int


class _Program:
    """An expression as places: each is a character, an edge or a fork, and 0 is the end."""

    def __init__(self, node: _Node) -> None:
        self.places: list[_Split | _Step | _At | None] = [None]
        self._calls = 0
        self.start = self._put(node, 0)

    def _add(self, place: _Split | _Step | _At) -> int:
        self.places.append(place)
        if len(self.places) > MAX_PLACES:
            raise ConfigError(f"it is too large: more than {MAX_PLACES} characters, repetitions written out")
        return len(self.places) - 1

    def _put(self, node: _Node, then: int) -> int:
        """Add the places of a part that `then` follows, and return the first."""
        # Also of what has no places, such as ()
        self._calls += 1
        if self._calls > 10 * MAX_PLACES:
            raise ConfigError(f"it is too large: more than {MAX_PLACES} characters, repetitions written out")
        match node:
            case _Char():
                return self._add(_Step(node, then))
            case _Edge(sign):
                return self._add(_At(sign, then))
            case _Sequence(parts):
                for part in reversed(parts):
                    then = self._put(part, then)
                return then
            case _Choice(ways):
                return self._add(_Split(tuple(self._put(way, then) for way in ways)))
            case _Repeated(part, least, None):
                loop = self._add(_Split(()))
                first = self._put(part, loop)
                self.places[loop] = _Split((first, then))
                start = first if least else loop
                for _ in range(least - 1):
                    start = self._put(part, start)
                return start
            case _Repeated(part, least, int(most)):
                start = then
                for _ in range(most - least):
                    start = self._add(_Split((self._put(part, start), then)))
                for _ in range(least):
                    start = self._put(part, start)
                return start
        raise AssertionError(node)

    def reached(self, places: Places, before: str, after: str) -> list[_Step] | None:
        """Return the characters that may come next; None if the end is reached.

        Args:
            places: Where it may be.
            before: The kind of the character before: `word`, `other`, or `edge` at the beginning.
            after: That of the next one, or `edge` at the end.
        """
        steps: list[_Step] = []
        seen: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            match self.places[place]:
                case None:
                    return None
                case _Step() as step:
                    steps.append(step)
                case _Split(ways):
                    waiting.extend(ways)
                case _At(sign, then):
                    if _holds(sign, before, after):
                        waiting.append(then)
        return steps


def _holds(sign: str, before: str, after: str) -> bool:
    if sign == "^":
        return before == "edge"
    if sign == "$":
        return after == "edge"
    return ((before == "word") != (after == "word")) == (sign == "b")


def _kind(char: str) -> str:
    return "word" if char == "_" or (char.isascii() and char.isalnum()) else "other"


class _Set:
    """A set of places, after a character of a kind, and where the next characters lead."""

    def __init__(self, places: Places, before: str) -> None:
        self.places = places
        self.before = before
        self.moves: dict[str, _Set | None] = {}
        """By character; None: the expression is found."""
        self.is_found_at_end: bool | None = None


class Pattern:
    """A regular expression, which is found in a text in time in proportion to its length."""

    def __init__(self, source: str) -> None:
        """Read an expression.

        Raises:
            ConfigError: It is none, is too large, or has what is not known here; the text is the reason alone.
        """
        self.source = source
        self._program = _Program(_Parser(source).whole())
        self._sets: dict[tuple[Places, str], _Set] = {}
        self._kept = 0
        self._start = _Set(frozenset((self._program.start,)), "edge")

    def is_in(self, text: str) -> bool:
        """Return whether the expression is found somewhere in a text."""
        now = self._start
        for char in text:
            try:
                after = now.moves[char]
            except KeyError:
                after = self._move(now, char)
            if after is None:
                return True
            now = after
        if now.is_found_at_end is None:
            now.is_found_at_end = self._program.reached(now.places, now.before, "edge") is None
        return now.is_found_at_end

    def _move(self, now: _Set, char: str) -> _Set | None:
        if self._kept > KEPT_PLACES:
            self._sets.clear()
            self._start.moves.clear()
            self._kept = 0
        kind = _kind(char)
        steps = self._program.reached(now.places, now.before, kind)
        if steps is None:
            now.moves[char] = None
            return None
        # It may begin at each character anew
        places = frozenset((self._program.start, *(step.then for step in steps if step.char.accepts(char))))
        self._kept += 1 + len(places)
        key = (places, kind)
        after = self._sets.get(key)
        if after is None:
            after = self._sets[key] = _Set(places, kind)
        now.moves[char] = after
        return after
