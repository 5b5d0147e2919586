"""The language in which runs are searched: every case of run_filters.json, which the page's tests read, too."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_filters import CASES, NOW, RECORDS, filter_texts, found_by, patterns

from offloop.engine import RUN_FIELDS, ConfigError, RunFilter, RunRecord, check_fields, sort_runs, values_of
from offloop.engine.catalog.pattern import Pattern
from offloop.engine.catalog.run_fields import STATES

pytestmark = pytest.mark.usefixtures("in_utc")


def test_the_page_has_the_same_fields_and_states() -> None:
    assert [each.name for each in RUN_FIELDS] == CASES["fields"]
    assert list(STATES) == CASES["states"]


@pytest.mark.parametrize(("text", "keys"), CASES["filters"])
def test_filters_find(text: str, keys: str) -> None:
    assert found_by(text) == keys


@pytest.mark.parametrize(("text", "why"), CASES["errors"])
def test_filters_that_mean_nothing_are_refused_in_one_line(text: str, why: str) -> None:
    assert found_by(text) == f"error: {why}"
    assert "\n" not in why


def test_a_filter_has_a_greatest_length() -> None:
    assert found_by("x" * 1_000) == ""
    assert found_by("x" * 1_001) == "error: a filter has at most 1,000 characters"
    # An error of one line
    assert len(found_by("x<" + "y" * 998)) < 200


def test_nothing_is_unknown_where_there_are_no_runs() -> None:
    RunFilter("val_loss<0.5").check([])
    check_fields([], ["val_loss"])


def test_a_filter_has_the_fields_that_it_compares() -> None:
    assert RunFilter('seed Archived:yes -"my metric">4').fields == {"archived", "my metric"}


@given(filter_texts())
def test_any_text_is_a_filter_or_is_refused_with_a_reason(text: str) -> None:
    found = found_by(text)
    assert "\n" not in found
    assert found.startswith("error: ") or set(found.split()) <= {each.key for each in RECORDS}


@pytest.mark.parametrize(("by", "keys"), CASES["orders"])
def test_runs_are_sorted(by: str, keys: str) -> None:
    assert " ".join(each.key for each in sort_runs(RECORDS, by, now=NOW)) == keys


@given(st.lists(st.text(max_size=4), unique=True), st.booleans())
def test_any_texts_have_an_order(names: list[str], descending: bool) -> None:
    runs = [
        RunRecord(key=str(place), directory="", id=name, state="lost") for place, name in enumerate(names)
    ]
    by = "-id" if descending else "id"
    assert sort_runs(reversed(runs), by) == sort_runs(runs, by)


def test_what_no_run_has_is_refused() -> None:
    check_fields(RECORDS, ["name", "val_loss", "hparams.loss"])
    with pytest.raises(ConfigError, match=re.escape("no run has 'val_los'; did you mean 'val_loss'?")):
        check_fields(RECORDS, ["val_los"])
    with pytest.raises(ConfigError, match=re.escape("no run has 'stat'; did you mean 'state'?")):
        check_fields(RECORDS, ["name", "stat"])
    # Where some runs lack it, they are last
    assert [each.key for each in sort_runs(RECORDS[3:], "val_loss")] == ["d10", "d9"]


def test_a_metric_may_have_the_name_of_a_hyperparameter() -> None:
    assert values_of(RECORDS[0], "loss") == [0.3, "cross_entropy"]
    assert values_of(RECORDS[0], "hparams.loss") == ["cross_entropy"]
    assert values_of(RECORDS[0], "last.loss") == [0.3]
    assert values_of(RECORDS[4], "age") == []


@pytest.mark.parametrize(("source", "text", "is_found"), CASES["patterns"])
def test_patterns_find(source: str, text: str, is_found: bool) -> None:
    assert Pattern(source).is_in(text) is is_found


@pytest.mark.parametrize(("source", "why"), CASES["broken"])
def test_patterns_that_are_none_are_refused(source: str, why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Pattern(source)
    assert str(raised.value) == why


@given(patterns(), st.lists(st.text(st.sampled_from("abC1-_ ."), max_size=8), max_size=5))
def test_patterns_find_what_a_regular_expression_finds(source: str, texts: list[str]) -> None:
    pattern = Pattern(source)
    regex = re.compile(source, re.IGNORECASE | re.ASCII | re.DOTALL)
    for text in texts:
        assert pattern.is_in(text) == (regex.search(text) is not None)


@given(st.text(max_size=20), st.text(max_size=10))
def test_any_text_is_a_pattern_or_is_refused_with_a_reason(source: str, text: str) -> None:
    try:
        assert Pattern(source).is_in(text) in (True, False)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "source", ["^(a+)+$", "^(a|a)*$", "^a*a*a*a*a*a*a*a*$", "^(a|aa)+$", r"(\w+\w+)+!", "(.*)(.*)(.*)x$"]
)
def test_expressions_with_endless_ways_come_to_an_end(source: str) -> None:
    pattern = Pattern(source)
    assert not any(pattern.is_in("a" * 10_000 + end) for end in "b-")


def test_what_a_pattern_remembers_is_bounded() -> None:
    pattern = Pattern("[ab]*a[ab]{80}c")
    text = "".join("ab"[(place * place // 7) % 2] for place in range(20_000))
    assert not pattern.is_in(text)
    assert sum(len(each.places) for each in pattern._sets.values()) < 250_000
