"""dashboard/curves/column_file.py: what is kept comes back as it was; what is damaged or of another log does not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from histories import content_of
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.dashboard.curves import column_file
from offloop.dashboard.curves.column_file import find, keep, place_of
from offloop.dashboard.curves.history import History
from offloop.dashboard.curves.layer_history import LayerHistory

LIMIT = 64 * 1024 * 1024
STATE = json.dumps({"step": 3}).encode()


def history_of(values: list[float], *, limit: int = LIMIT, curves: int = 2) -> History:
    """Return a history with a dense and a sparse curve."""
    history = History(limit)
    ids = [history.add_curve() for _ in range(curves)]
    for step, value in enumerate(values):
        row = history.axis.append(step, step / 10, step / 1000, 8 * step)
        for curve in ids:
            if step % (1 + 4 * curve) == 0:
                history.curves[curve].append(row, value + curve, step)
        if step % 64 == 0:
            history.check_size()
    history.add_gap(1.0, 5.0, 3)
    return history


def kept(path: Path, history: History) -> Path:
    """Keep a history."""
    keep(path, history, LayerHistory(), STATE)
    return path


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=300),
    more=st.integers(0, 90),
)
@settings(max_examples=30)
def test_what_is_kept_comes_back_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], more: int
) -> None:
    expected = history_of(values)
    found = find(kept(tmp_path_factory.mktemp("cache") / "a.columns", expected), limit=LIMIT)
    assert found is not None
    assert (content_of(found.history), found.state) == (content_of(expected), STATE)
    for history in (expected, found.history):
        for step in range(len(values), len(values) + more):
            row = history.axis.append(step, step / 10, step / 1000, 8 * step)
            history.curves[0].append(row, float(step), step)
    assert content_of(found.history) == content_of(expected)


def test_a_trimmed_history_comes_back_and_goes_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = history_of(rng.random(90_000).tolist(), limit=1_000_000)
    assert expected.trimmed is not None
    found = find(kept(tmp_path / "a.columns", expected), limit=1_000_000)
    assert found is not None
    assert content_of(found.history) == content_of(expected)
    steps = np.arange(90_000, 90_000 + 9_001, dtype=float)
    for history in (expected, found.history):
        first = history.axis.extend(steps, steps / 10, steps / 1000, 8 * steps)
        history.curves[0].extend((first + np.arange(len(steps))).astype(np.uint32), np.sin(steps), steps)
    assert content_of(found.history) == content_of(expected)


@given(place=st.floats(0, 1, exclude_max=True), what=st.sampled_from(["bit", "cut", "nothing"]))
@settings(max_examples=40)
def test_a_damaged_file_is_not_used(
    tmp_path_factory: pytest.TempPathFactory, place: float, what: str
) -> None:
    path = kept(tmp_path_factory.mktemp("cache") / "a.columns", history_of([1.0, float("nan"), 3.0]))
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if what == "bit":
        content[at] ^= 1
    elif what == "cut":
        del content[at:]
    path.write_bytes(content)
    assert (find(path, limit=LIMIT) is None) == (what != "nothing")


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert find(tmp_path / "a.columns", limit=LIMIT) is None


def test_a_file_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(tmp_path / "a.columns", history_of([1.0]))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            kept(path, history_of([1.0, 2.0]))
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_the_files_that_were_used_the_longest_time_ago_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / f"{number}.columns" for number in range(3)]
    for age, path in enumerate(places):
        if age == 2:
            monkeypatch.setattr(column_file, "MOST_BYTES", 2 * places[0].stat().st_size)
            # The first was used since the second was.
            os.utime(places[1], (1, 1))
        kept(path, history_of([1.0]))
    assert [path.exists() for path in places] == [True, False, True]


def test_each_log_has_a_place_of_its_own_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, other = place_of(tmp_path / "a" / "events.jsonl"), place_of(tmp_path / "b" / "events.jsonl")
    assert one != other
    assert one.parent == tmp_path / "cache" / "offloop"
