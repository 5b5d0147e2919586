"""RunFilter: the words by which runs are searched, on the command line and on the live page.

    filter  = [term {spaces term}]           runs for which all terms hold
    term    = ["-"] test                     with "-", those for which it does not hold
    test    = name ":" word {"," word}       one of some words: of state, tag, name, id, host, note
            | name operator value            a comparison
            | "/" regex "/"                  found in name, id, directory or a tag
            | word                           contained in name, id, directory or a tag
    operator = "<" | "<=" | ">" | ">=" | "=" | "!="

Upper and lower case are the same. What contains spaces stands in double quotes: `"my run"`, `note:"too slow"`.

- `state:failed,lost` and `tag:baseline` compare whole words; `name:`, `id:`, `host:` and `note:` look for a part.
- A comparison names a metric (its last value, or `best.val_loss`), a hyperparameter (`optimizer.lr=0.001`,
  `optimizer=sgd`), or `step`, `epoch`, `seconds`, `progress`, `attempt`, `age`, `started`. If a metric and a
  hyperparameter have the same name, it holds if it holds for one of them. Where a run lacks the value, no comparison
  holds.
- `seconds` and `age` take `90`, `90s`, `5min`, `2h`, `7d`; `started` takes a local date, `2026-11-30` or
  `2026-11-30T14:30`.
"""

import datetime
import math
import operator
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from offloop.engine.catalog.record import RunRecord
from offloop.engine.errors import ConfigError

MAX_FILTER: Final = 1_000
"""Most characters of a filter."""

_TERM: Final = re.compile(r'/(?:\\.|[^/\\])+/(?=\s|$)|(?:"[^"]*"|[^\s"])+')
_COMPARISON: Final = re.compile(r"(?P<name>[^\s<>=!:]+)(?P<operator><=|>=|!=|<|>|=)(?P<value>.*)", re.DOTALL)
_WORDS: Final = re.compile(r"(?P<name>state|tag|name|id|host|note):(?P<words>.+)", re.IGNORECASE | re.DOTALL)
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?")
_SECONDS: Final = {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
_OF_RECORD: Final = (
    "step",
    "epoch",
    "seconds",
    "progress",
    "attempt",
    "started",
    "created",
    "heard",
    "parameters",
)

Test = Callable[[RunRecord], bool]


class RunFilter:
    """A search for runs, such as `state:failed`, `val_loss<0.5`, `optimizer.lr=0.001`, `baseline`, `/seed-[0-4]$/`.

    All terms of a filter must hold. A word or a `/regex/` is looked for in name, id, directory and tags; a `-` in front
    of a term turns it round. Upper and lower case are the same. `docs/runs.md` has all terms.
    """

    def __init__(self, text: str) -> None:
        """Read a filter.

        Args:
            text: At most 1,000 characters; empty for all runs.

        Raises:
            ConfigError: A term means nothing; the text says which one and why.
        """
        if len(text) > MAX_FILTER:
            raise ConfigError(f"a filter must have at most {MAX_FILTER:,} characters, got {len(text):,}")
        self.text = text
        self._tests = [_negated(term) for term in _TERM.findall(text)]

    def matches(self, record: RunRecord) -> bool:
        """Return whether all terms hold for a run."""
        return all(test(record) for test in self._tests)


def values_of(record: RunRecord, name: str, *, now: float | None = None) -> list[Any]:
    """Return the values of a run under a name: of the record itself, a metric, a hyperparameter; empty without any.

    Args:
        record: The run.
        name: `best.NAME` and `last.NAME` are a metric's, a name alone its last value.
        now: Unix time in seconds for `age`; None for that of this moment.
    """
    match name:
        case "name" | "id" | "key" | "state" | "host" | "why" | "device":
            return [getattr(record, name)]
        case "tags":
            return [", ".join(record.labels.tags)]
        case "note":
            return [record.labels.note]
        case "age":
            return [(time.time() if now is None else now) - record.started] if record.started else []
        case _ if name in _OF_RECORD:
            value = getattr(record, name)
            return [] if value is None else [value]
    kind, _, metric = name.partition(".")
    if kind in ("best", "last") and metric in record.metrics:
        value = getattr(record.metrics[metric], kind)
        return [] if value is None else [value]
    found: list[Any] = [record.metrics[name].last] if name in record.metrics else []
    if name in record.hyperparameters:
        found.append(record.hyperparameters[name])
    return found


def sorting_key(record: RunRecord, name: str) -> tuple[int, Any]:
    """Return what runs are sorted by under a name: numbers before texts, and last what is unknown or NaN."""
    for value in values_of(record, name):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return (1, str(value).casefold())
        if not math.isnan(value):
            return (0, value)
    return (2, 0)


def _negated(term: str) -> Test:
    if len(term) > 1 and term.startswith("-"):
        test = _test(term[1:])
        return lambda record: not test(record)
    return _test(term)


def _test(term: str) -> Test:
    if len(term) > 2 and term.startswith("/") and term.endswith("/"):
        try:
            regex = re.compile(term[1:-1], re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"the filter {term} is no regular expression: {error}") from None
        return lambda record: any(regex.search(text) for text in _texts(record))
    if not term.startswith('"'):
        if found := _WORDS.fullmatch(term):
            return _words_test(found["name"].lower(), _bare(found["words"]))
        if found := _COMPARISON.fullmatch(term):
            return _comparison(term, found["name"], found["operator"], _bare(found["value"]))
    word = _bare(term).casefold()
    return lambda record: any(word in text.casefold() for text in _texts(record))


def _texts(record: RunRecord) -> tuple[str, ...]:
    return (record.name, record.id, record.key, *record.labels.tags)


def _bare(text: str) -> str:
    return text.replace('"', "")


def _words_test(name: str, text: str) -> Test:
    words = [word.casefold() for word in text.split(",")]
    if name == "state":
        return lambda record: record.state in words
    if name == "tag":
        return lambda record: any(tag.casefold() in words for tag in record.labels.tags)

    def test(record: RunRecord) -> bool:
        value = record.labels.note if name == "note" else getattr(record, name)
        return any(word in value.casefold() for word in words)

    return test


def _comparison(term: str, name: str, sign: str, text: str) -> Test:
    if not text:
        raise ConfigError(f"the filter {term!r} compares with nothing: write {term}0.5, or a text")
    wanted = _wanted(term, name, text)
    if sign not in ("=", "!=") and isinstance(wanted, str):
        raise ConfigError(f"the filter {term!r} compares with {text!r}, which is no number")
    compare = _OPERATORS[sign]

    def test(record: RunRecord) -> bool:
        for value in values_of(record, name):
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not isinstance(wanted, str) and compare(value, wanted):
                    return True
            elif sign in ("=", "!=") and compare(str(value).casefold(), text.casefold()):
                return True
        return False

    return test


def _wanted(term: str, name: str, text: str) -> float | str:
    """Return what a comparison compares with: a number, or a text."""
    if name in ("started", "created", "heard"):
        try:
            return datetime.datetime.fromisoformat(text).timestamp()
        except ValueError:
            raise ConfigError(
                f"the filter {term!r} needs a date like 2026-11-30 or 2026-11-30T14:30, got {text!r}"
            ) from None
    if name in ("age", "seconds"):
        found = _DURATION.fullmatch(text)
        if found is None:
            raise ConfigError(f"the filter {term!r} needs a time like 90, 5min, 2h or 7d, got {text!r}")
        return float(found[1]) * _SECONDS[found[2]]
    try:
        return float(text)
    except ValueError:
        return text
