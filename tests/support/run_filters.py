"""The cases of run_filters.json, and random filters and expressions, for the two programs that read them."""

import json
from pathlib import Path
from typing import Any, Final

import msgspec
from hypothesis import strategies as st

from offloop.engine import ConfigError, RunFilter, RunMetric, RunRecord

CASES: Final[dict[str, Any]] = json.loads(
    Path(__file__).with_name("run_filters.json").read_text(encoding="utf-8")
)
NOW: Final[float] = CASES["now"]


def _record(fields: dict[str, Any]) -> RunRecord:
    metrics = {
        name: RunMetric(last=float(each["last"]), best=each.get("best"), mode=each.get("mode"))
        for name, each in fields.get("metrics", {}).items()
    }
    record = msgspec.convert({"directory": f"/runs/{fields['key']}", **fields, "metrics": {}}, RunRecord)
    return msgspec.structs.replace(record, metrics=metrics)


RECORDS: Final = [_record(each) for each in CASES["runs"]]


def found_by(text: str) -> str:
    """Return the keys of the runs that a filter finds, or its error."""
    try:
        wanted = RunFilter(text, now=NOW)
        wanted.check(RECORDS)
        return " ".join(each.key for each in RECORDS if wanted.matches(each))
    except ConfigError as error:
        return f"error: {error}"


NAMES: Final = (
    *CASES["fields"],
    *(
        "val_loss",
        "best.val_loss",
        "last.loss",
        "optimizer.lr",
        "hparams.loss",
        "widths",
        "lr",
        "val_los",
        "stat",
        "x",
    ),
)
VALUES: Final = (
    *CASES["states"],
    *(
        "0.4",
        "-1e3",
        "50%",
        "nan",
        "inf",
        "90s",
        "1h30min",
        "2026-11-01",
        "2026-11",
        "2026-02-30",
        "today",
        "yes",
    ),
    *("gpu-1", "keep", "'long run'", '""', "/^s.*d$/", "/(/", "sgd", "auto", "a,b", "true", "/data"),
)
_letters: Final = st.text(st.sampled_from("ab1 .:=<>!-/\\\"',()|*+?[]{}^$\n"), max_size=12)


def filter_texts() -> st.SearchStrategy[str]:
    """Return filters: any text, and such as mean something more often than not."""
    operator = st.sampled_from([":", "=", "==", "!=", "<", "<=", ">", ">=", ":<", " = "])
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=5))
    condition = st.builds(
        lambda name, sign, values: f"{name}{sign}{','.join(values)}",
        st.sampled_from(NAMES),
        operator,
        st.lists(value, min_size=1, max_size=2),
    )
    word = st.one_of(
        st.sampled_from(("seed", '"wide net"', "AND", "d", "-")), _letters, patterns().map("/{}/".format)
    )
    term = st.builds(
        lambda sign, text: sign + text, st.sampled_from(("", "", "-")), st.one_of(condition, word)
    )
    return st.one_of(st.lists(term, max_size=3).map(" ".join), st.text(max_size=30), _letters)


def patterns() -> st.SearchStrategy[str]:
    """Return regular expressions that Python and offloop read alike."""
    one = st.sampled_from(
        ("a", "b", "1", "-", "_", ".", r"\d", r"\w", r"\s", r"\W", r"\.", "[ab]", "[^a]", "[a-c1]", r"[\d_]")
    )
    edge = st.sampled_from(("^", "$", r"\b"))
    counts = st.sampled_from(("*", "+", "?", "*?", "{2}", "{1,2}", "{1,}", "{0}"))
    return st.recursive(
        one,
        lambda inner: st.one_of(
            st.lists(st.one_of(inner, edge), min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map("|".join).map("({})".format),
            st.builds(lambda text, count: f"(?:{text}){count}", inner, counts),
        ),
        max_leaves=8,
    )
