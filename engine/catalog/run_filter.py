"""RunFilter: the words and conditions by which runs are searched, on the command line and on the live page.

    filter    = [term {space term}]                 all terms must hold
    term      = ["-"] test                          with "-", it must not hold
    test      = text | condition
    condition = field operator value {"," value}    one of the values; an operator may have spaces around it
    field     = word | quoted
    value     = word | quoted | regex
    text      = word | quoted | regex               in name, id, key or a tag
    operator  = ":" | "=" | "!=" | "<" | "<=" | ">" | ">=" | ":<" and so on
    quoted    = '"' text '"' | "'" text "'"          a quote inside is written \\"
    regex     = "/" expression "/"                  as in `pattern.py`; a / inside may stand as it is

Upper and lower case are the same. `run_fields.py` has the fields, and each kind of field says which values it takes.

- A text, also that of a hyperparameter: `:` looks for a part, `=` compares the whole. Everything else: `:` is `=`.
- `!=` is `=` with "-" in front, so it holds for runs without a value; `field=""` finds these, too.
- A day, a month or a year is all of it: `started:2026-11` is that month, `started>2026-11` is after it.

`dashboard/web/src/runs/filter.ts` is the same in TypeScript; `tests/support/run_filters.json` is tried with both.
"""

import datetime
import operator
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from offloop.engine.catalog.pattern import Pattern
from offloop.engine.catalog.record import RunRecord
from offloop.engine.catalog.run_fields import (
    KINDS,
    STATES,
    RunNames,
    is_live,
    is_number,
    nearest,
    text_of,
    values_of,
)
from offloop.engine.errors import ConfigError

MAX_FILTER: Final = 1_000
"""Most characters of a filter."""
SHOWN: Final = 60
"""Characters of a term in an error."""

# A browser's \s has other characters
_SPACES: Final = re.compile("[ \t-\r]*")
_WORD: Final = re.compile("(?:[^ \t-\r<>=:!]|!(?!=))+")
_OPERATOR: Final = re.compile("[ \t-\r]*:?(<=|>=|!=|==?|<|>)[ \t-\r]*|[ \t-\r]*(:)[ \t-\r]*")
_VALUE: Final = re.compile("[^ \t-\r,]+")
_AFTER_REGEX: Final = re.compile("i?(?=[ \t-\r,]|$)")
_NUMBER: Final = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)(%?)|[+-]?inf(?:inity)?|nan", re.IGNORECASE
)
_DURATION: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?|(?:[0-9]+(?:\.[0-9]+)?(?:s|min|m|h|d|w))+")
_PART: Final = re.compile(r"([0-9.]+)([a-z]*)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DATE: Final = re.compile(
    "((?:19[7-9]|2[01][0-9])[0-9])(?:-([0-9]{2})(?:-([0-9]{2})(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2}))?)?)?)?"
)
_OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LOGIC: Final = {
    "and": "all terms must hold anyway",
    "&&": "all terms must hold anyway",
    "or": "alternatives are separated by commas, as in state:failed,lost",
    "||": "alternatives are separated by commas, as in state:failed,lost",
    "not": "a - in front turns a term round, as in -state:failed",
}
_FLAGS: Final = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}

Test = Callable[[RunRecord], bool]


class RunFilter:
    """A search for runs, such as `state:failed`, `val_loss<0.5`, `optimizer.lr=0.001`, `baseline`, `/seed-[0-4]$/`.

    All terms of a filter must hold. A word or a `/regex/` is looked for in name, id, key and tags; a `-` in front of a
    term turns it round. Upper and lower case are the same. `docs/runs.md` has all terms and fields.
    """

    def __init__(self, text: str, *, now: float | None = None) -> None:
        """Read a filter.

        Args:
            text: At most 1,000 characters; empty for all runs.
            now: Unix time in seconds for ages and `today`; None for that of this moment.

        Raises:
            ConfigError: A term means nothing; the text says which one and why.
        """
        if len(text) > MAX_FILTER:
            raise ConfigError(f"a filter has at most {MAX_FILTER:,} characters")
        self.text = text
        self._now = time.time() if now is None else now
        self._tests: list[Test] = []
        self._conditions: list[_Condition] = []
        reader = _Reader(text)
        while (term := reader.term()) is not None:
            self._tests.append(self._test(term))

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that the filter compares."""
        return frozenset(each.field for each in self._conditions)

    def matches(self, record: RunRecord) -> bool:
        """Return whether all terms hold for a run."""
        return all(test(record) for test in self._tests)

    def check(self, records: Iterable[RunRecord]) -> None:
        """Raise an error if the filter means nothing for some runs, such as one with a misspelled metric.

        Args:
            records: All runs that are searched; nothing is wrong if there are none.

        Raises:
            ConfigError: No run has a field that the filter compares; the text has the nearest one. Or a metric is
                compared with what is no number.
        """
        names = RunNames(records if self._conditions else ())
        for each in self._conditions:
            if problem := names.problem(each.field):
                is_meant = problem.endswith("?")
                more = "" if is_meant else "; quote it to look for this text"
                raise ConfigError(f"{each.shown}: {problem}{more}")
            odd = next((value for value in each.values if value.text and _number(value) is None), None)
            is_named = _kind_of(each.field) == "named" and not names.is_empty
            if odd is not None and is_named and not names.is_hyperparameter(each.field):
                raise ConfigError(_no_number(each, odd))

    def _test(self, term: "_Term") -> Test:
        content = term.content
        if isinstance(content, _Condition):
            self._conditions.append(content)
            test = _condition(content, self._now)
        elif isinstance(content, Pattern):
            is_in = content.is_in
            test = lambda record: any(is_in(text) for text in _texts(record))  # noqa: E731
        else:
            word = content.lower()
            test = lambda record: any(word in text.lower() for text in _texts(record))  # noqa: E731
        return (lambda record: not test(record)) if term.negated else test


def _texts(record: RunRecord) -> tuple[str, ...]:
    return (record.name, record.id, record.key, *record.labels.tags)


# Reading -------------------------------------------------------------------------------------------


class _Value(NamedTuple):
    text: str
    pattern: Pattern | None = None


class _Condition(NamedTuple):
    field: str
    sign: str
    values: tuple[_Value, ...]
    shown: str
    """The term as errors show it."""


class _Term(NamedTuple):
    negated: bool
    content: str | Pattern | _Condition


class _Reader:
    """The text of a filter, and how far it is read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.start = 0

    def shown(self) -> str:
        """The term that is read, as errors show it."""
        return _shown(self.text[self.start : self.at])

    def wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.shown()}: {reason}")

    def term(self) -> _Term | None:
        """Read the next term; None at the end."""
        self.at = self.start = _end(_SPACES, self.text, self.at)
        if self.at >= len(self.text):
            return None
        negated = (
            self.text[self.at] == "-"
            and re.match("[^ \t-\r]", self.text[self.at + 1 : self.at + 2]) is not None
        )
        self.at += negated
        first = self.text[self.at]
        if first == "/":
            found = self.regex()
            if found is None:
                self.at = len(self.text)
                raise self.wrong("the / at its end is missing; quote a text that begins with /")
            return _Term(negated, found)
        if first in "\"'":
            word = self.quoted()
        else:
            begin = self.at
            self.at = _end(_WORD, self.text, self.at)
            word = self.text[begin : self.at]
        found_operator = _OPERATOR.match(self.text, self.at)
        if found_operator is None:
            if first not in "\"'" and word.lower() in _LOGIC:
                raise self.wrong(f"{_LOGIC[word.lower()]}; quote it to look for the word")
            return _Term(negated, word)
        sign = found_operator[1] or found_operator[2]
        self.at = found_operator.end()
        if word == "":
            raise self.wrong(f"a field is missing before {sign}")
        values = [self.value(sign)]
        while self.text[self.at : self.at + 1] == ",":
            self.at = _end(_SPACES, self.text, self.at + 1)
            values.append(self.value(","))
        sign = "=" if sign == "==" else sign
        field = word.lower() if word.lower() in KINDS else word
        return _Term(negated, _Condition(field, sign, tuple(values), self.shown()))

    def value(self, after: str) -> _Value:
        first = self.text[self.at : self.at + 1]
        if first and first in "\"'":
            return _Value(self.quoted())
        if first == "/":
            begin = self.at
            if (pattern := self.regex()) is not None:
                return _Value(self.text[begin : self.at], pattern)
        begin = self.at
        self.at = _end(_VALUE, self.text, self.at)
        if begin == self.at:
            raise self.wrong(f"a value is missing after {after}")
        return _Value(self.text[begin : self.at])

    def quoted(self) -> str:
        quote = self.text[self.at]
        letters: list[str] = []
        place = self.at + 1
        while place < len(self.text):
            letter = self.text[place]
            if letter == quote:
                self.at = place + 1
                return "".join(letters)
            if letter == "\\" and self.text[place + 1 : place + 2] in (quote, "\\"):
                place += 1
                letter = self.text[place]
            letters.append(letter)
            place += 1
        self.at = len(self.text)
        raise self.wrong(f"its second {quote} is missing")

    def regex(self) -> Pattern | None:
        """Read an expression; None if it does not end."""
        place = self.at + 1
        while place < len(self.text):
            if self.text[place] == "\\":
                place += 1
            elif self.text[place] == "/" and place > self.at + 1:
                after = _AFTER_REGEX.match(self.text, place + 1)
                if after is not None:
                    source = self.text[self.at + 1 : place]
                    self.at = after.end()
                    try:
                        return Pattern(source)
                    except ConfigError as error:
                        raise self.wrong(str(error)) from None
            place += 1
        return None


def _shown(text: str) -> str:
    """Return a part of a filter as errors show it: in one line."""
    line = re.sub("[\x00- \x7f-\x9f\u2028\u2029]+", " ", text.strip(" \t\n\v\f\r"))
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


# Conditions ----------------------------------------------------------------------------------------


def _kind_of(field: str) -> str:
    """Return the kind of a field; `named` for a metric or a hyperparameter."""
    return KINDS.get(field, "named")


def _condition(condition: _Condition, now: float) -> Test:
    field, sign, values, shown = condition
    kind = _kind_of(field)
    is_order = sign in _OPERATORS
    if is_order and kind in ("text", "tag", "state", "flag"):
        raise ConfigError(f"{shown}: {field} has no order; use :, = or !=")
    if is_order and len(values) > 1:
        raise ConfigError(f"{shown}: {sign} takes one value")
    if kind == "date":
        holds = [_date_test(condition, value, now) for value in values]
    elif kind in ("number", "duration"):
        holds = [_number_test(condition, value, kind) for value in values]
    elif kind == "named":
        holds = [_named_test(condition, value) for value in values]
    else:
        holds = [_text_test(condition, value, kind) for value in values]

    def test(record: RunRecord) -> bool:
        found = values_of(record, field, now=now)
        return any(each(found) for each in holds)

    return (lambda record: not test(record)) if sign == "!=" else test


Holds = Callable[[list[Any]], bool]
"""Whether a condition holds for the values of a run."""


def _is_missing(values: list[Any]) -> bool:
    return not values


def _date_test(condition: _Condition, value: _Value, now: float) -> Holds:
    if value.text == "":
        return _is_missing
    span = _span(value.text, now)
    if span is None:
        raise ConfigError(
            f"{condition.shown}: '{_shown(value.text)}' is no date such as 2026-11-30 or 2026-11-30T14:30"
        )
    start, end = span
    tests: dict[str, Callable[[float], bool]] = {
        "<": lambda time: time < start,
        "<=": lambda time: time < end,
        ">": lambda time: time >= end,
        ">=": lambda time: time >= start,
        "=": lambda time: start <= time < end,
    }
    holds = tests.get(condition.sign, tests["="])
    return lambda values: any(holds(each) for each in values)


def _number_test(condition: _Condition, value: _Value, kind: str) -> Holds:
    if value.text == "" and condition.sign not in _OPERATORS:
        return _is_missing
    if kind == "number":
        wanted = _number(value)
        if wanted is None:
            raise ConfigError(_no_number(condition, value))
    else:
        wanted = _duration(value)
        if wanted is None:
            raise ConfigError(
                f"{condition.shown}: '{_shown(value.text)}' is no time such as 90s, 5min, 2h or 7d"
            )
    compare = _OPERATORS.get(condition.sign, _is_same)
    return lambda values: any(compare(each, wanted) for each in values)


def _named_test(condition: _Condition, value: _Value) -> Holds:
    """Test a metric, which is a number, or a hyperparameter, which may be anything."""
    number = _number(value)
    if condition.sign in _OPERATORS:
        if number is None:
            # Such as created>2026-11-30
            meant = nearest(condition.field, KINDS)
            more = f"; did you mean '{meant}'?" if meant else ""
            raise ConfigError(_no_number(condition, value) + more)
        compare = _OPERATORS[condition.sign]
        return lambda values: any(is_number(each) and compare(each, number) for each in values)
    if value.text == "":
        return lambda values: not values or "" in values
    is_text = _text_is(value, condition.sign)
    return lambda values: any(
        (number is not None and _is_same(each, number)) if is_number(each) else is_text(text_of(each))
        for each in values
    )


def _text_test(condition: _Condition, value: _Value, kind: str) -> Holds:
    text = value.text.lower()
    if kind == "state":
        if text not in STATES:
            meant = nearest(text, STATES)
            more = f"did you mean '{meant}'?" if meant else f"there are {', '.join(STATES)}"
            raise ConfigError(f"{condition.shown}: there is no state '{_shown(value.text)}'; {more}")
        return lambda values: any(is_live(each) if text == "live" else each == text for each in values)
    if kind == "flag":
        if text not in _FLAGS:
            raise ConfigError(f"{condition.shown}: '{_shown(value.text)}' is neither yes nor no")
        return lambda values: _FLAGS[text] in values
    if text == "":
        return _is_missing
    # A tag is a word
    is_text = _text_is(value, condition.sign if kind == "text" else "=")
    return lambda values: any(is_text(each) for each in values)


def _text_is(value: _Value, sign: str) -> Callable[[str], bool]:
    """Return whether a text is that of a condition, or with `:`, has it."""
    if value.pattern is not None:
        return value.pattern.is_in
    wanted = value.text.lower()
    if sign == ":":
        return lambda text: wanted in text.lower()
    return lambda text: text.lower() == wanted


def _is_same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def _number(value: _Value) -> float | None:
    """Return a number, which may be in percent; None if it is none."""
    found = _NUMBER.fullmatch(value.text)
    if found is None:
        return None
    return float(found[0]) if found[1] is None else float(found[1]) / (100 if found[2] else 1)


def _no_number(condition: _Condition, value: _Value) -> str:
    return f"{condition.shown}: '{_shown(value.text)}' is no number"


def _duration(value: _Value) -> float | None:
    """Return seconds; None if it is no duration."""
    if _DURATION.fullmatch(value.text) is None:
        return None
    return sum(float(count) * _SECONDS[unit] for count, unit in _PART.findall(value.text))


def _span(text: str, now: float) -> tuple[float, float] | None:
    """Return the first and the last moment of a local date; None if it is none."""
    today = datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    day = datetime.timedelta(days=1)
    if text.lower() in ("today", "yesterday"):
        start = today if text.lower() == "today" else today - day
        return start.timestamp(), (start + day).timestamp()
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    year, month, date, hour, minute, second = (None if each is None else int(each) for each in found.groups())
    try:
        start = datetime.datetime(year or 0, month or 1, date or 1, hour or 0, minute or 0, second or 0)
    except ValueError:
        return None
    if second is not None:
        end = start + datetime.timedelta(seconds=1)
    elif minute is not None:
        end = start + datetime.timedelta(minutes=1)
    elif date is not None:
        end = start + day
    elif month is not None:
        end = start.replace(year=start.year + month // 12, month=month % 12 + 1)
    else:
        end = start.replace(year=start.year + 1)
    return start.timestamp(), end.timestamp()
