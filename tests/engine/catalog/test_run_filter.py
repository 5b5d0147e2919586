"""The words by which runs are searched."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloop.engine import ConfigError, RunFilter, RunLabels, RunMetric, RunRecord, sorting_key, values_of

NAN = float("nan")
RECORDS = {
    record.key: record
    for record in (
        RunRecord(
            key="sweep/a",
            directory="/runs/sweep/a",
            id="20261101-seed-1",
            state="completed",
            started=time.mktime((2026, 11, 1, 12, 0, 0, 0, 0, -1)),
            seconds=100.0,
            step=50,
            host="gpu-1",
            metrics={"val_loss": RunMetric(last=0.4, best=0.2, mode="min"), "loss": RunMetric(last=0.3)},
            hyperparameters={
                "optimizer": "SGD",
                "optimizer.lr": 0.001,
                "loss": "cross_entropy",
                "nesterov": True,
            },
            labels=RunLabels(name="My Run", tags=("Baseline", "long run"), note="too slow for us"),
        ),
        RunRecord(
            key="b",
            directory="/runs/b",
            id="20261102-seed-2",
            state="failed",
            started=time.mktime((2026, 11, 2, 12, 0, 0, 0, 0, -1)),
            seconds=7200.0,
            step=70,
            metrics={"val_loss": RunMetric(last=NAN, best=0.5, mode="min")},
            hyperparameters={"optimizer": "AdamW", "optimizer.lr": 0.01, "sizes": [1, 2]},
        ),
        RunRecord(key="c", directory="/runs/c", id="c", state="lost"),
    )
}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", "sweep/a b c"),
        ("seed", "sweep/a b"),
        ("SEED my", "sweep/a"),
        ('"my run"', "sweep/a"),
        ("sweep", "sweep/a"),
        ("base", "sweep/a"),
        ("/seed-[2-9]$/", "b"),
        (r"/^my\srun$/", "sweep/a"),
        ("/a b/", ""),
        ("/", "sweep/a"),
        ("-seed", "c"),
        ("-/seed/ -state:lost", ""),
        ("state:failed", "b"),
        ("state:failed,LOST", "b c"),
        ("tag:baseline", "sweep/a"),
        ("tag:base", ""),
        ('tag:"long run"', "sweep/a"),
        ("note:slow", "sweep/a"),
        ("host:gpu", "sweep/a"),
        ("name:my", "sweep/a"),
        ("val_loss<0.5", "sweep/a"),
        ("val_loss<=0.4", "sweep/a"),
        ("val_loss<0.4", ""),
        ("best.val_loss>=0.2", "sweep/a b"),
        ("last.val_loss>0", "sweep/a"),
        ("val_loss!=1", "sweep/a b"),
        ("-val_loss<0.5", "b c"),
        ("optimizer.lr=0.001", "sweep/a"),
        ("optimizer.lr=1e-2", "b"),
        ("optimizer=sgd", "sweep/a"),
        ("optimizer!=sgd", "b"),
        ("loss=cross_entropy", "sweep/a"),
        ("loss=0.3", "sweep/a"),
        ("nesterov=true", "sweep/a"),
        ("step>60", "b"),
        ("seconds>1h", "b"),
        ("seconds<90.5s", "c"),
        ("started>2026-11-02", "b"),
        ("started<2026-11-01T13:00", "sweep/a c"),
        ("age<1s", ""),
        ("nothing>3", ""),
    ],
)
def test_terms(text: str, keys: str) -> None:
    wanted = RunFilter(text)
    assert " ".join(key for key, record in RECORDS.items() if wanted.matches(record)) == keys


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/[/", "is no regular expression"),
        ("val_loss<", "compares with nothing"),
        ("val_loss<much", "compares with 'much', which is no number"),
        ("started>yesterday", "needs a date like 2026-11-30"),
        ("age<soon", "needs a time like 90, 5min, 2h or 7d"),
        ("x" * 1001, "at most 1,000 characters"),
    ],
)
def test_terms_that_mean_nothing_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RunFilter(text)


@given(st.text(max_size=60))
def test_any_text_is_a_filter_or_is_refused_with_a_reason(text: str) -> None:
    try:
        wanted = RunFilter(text)
    except ConfigError:
        return
    for record in RECORDS.values():
        assert wanted.matches(record) in (True, False)


def test_sorting_puts_numbers_first_and_what_is_unknown_last() -> None:
    def order(name: str) -> list[str]:
        return sorted(RECORDS, key=lambda key: sorting_key(RECORDS[key], name))

    assert order("val_loss") == ["sweep/a", "b", "c"]
    assert order("optimizer") == ["b", "sweep/a", "c"]
    assert order("optimizer.lr") == ["sweep/a", "b", "c"]
    assert values_of(RECORDS["c"], "age") == []
    assert values_of(RECORDS["sweep/a"], "loss") == [0.3, "cross_entropy"]
