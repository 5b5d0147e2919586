"""Checks of arguments: what is legal, and what the errors say."""

import math
import re

import pytest

from offloop.engine import ConfigError, checks


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "1", None, math.nan])
def test_whole_number_is_an_int_within_its_bounds(value: object) -> None:
    text = f"patience must be a whole number of at least 1, got {value!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        checks.whole_number("patience", value)


def test_whole_number_may_be_optional_and_bounded_above() -> None:
    checks.whole_number("port", None, optional=True)
    checks.whole_number("port", 65535, at_least=0, at_most=65535)
    with pytest.raises(
        ConfigError, match=r"^port must be a whole number from 0 to 65535, got 65536; give another$"
    ):
        checks.whole_number("port", 65536, at_least=0, at_most=65535, hint="; give another")


@pytest.mark.parametrize("value", [True, 0, -0.5, "1", None, math.nan, math.inf])
def test_number_is_an_int_or_a_float_within_its_bounds(value: object) -> None:
    text = f"max_time must be a finite number of seconds above 0, got {value!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        checks.number("max_time", value, above=0, unit="seconds")


def test_number_may_be_infinite_optional_and_of_any_size() -> None:
    checks.number("timeout", math.inf, above=0, finite=False)
    checks.number("timeout", None, above=0, optional=True)
    checks.number("timeout", 10**400, above=0)
    with pytest.raises(ConfigError, match=r"^decay must be a number above 0 and below 1, got inf$"):
        checks.number("decay", math.inf, above=0, below=1, finite=False)
    with pytest.raises(
        ConfigError, match=r"^pace must be a finite number of at least 0 and at most 60, got 61$"
    ):
        checks.number("pace", 61, at_least=0, at_most=60)


def test_flag_is_a_bool() -> None:
    checks.flag("save_last", False)
    with pytest.raises(ConfigError, match=r"^save_last must be True or False, got 1$"):
        checks.flag("save_last", 1)


def test_choice_is_one_of_the_legal_values() -> None:
    checks.choice("mode", "min", ("min", "max"))
    with pytest.raises(ConfigError, match=r"^mode must be 'min' or 'max', got 'mid'$"):
        checks.choice("mode", "mid", ("min", "max"))


def test_instance_is_no_class() -> None:
    checks.instance("model", object())
    with pytest.raises(
        TypeError, match=r"^model must be an instance: write object\(\.\.\.\) instead of object$"
    ):
        checks.instance("model", object)
