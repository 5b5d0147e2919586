"""dashboard/column_file.py: what is kept comes back as it was, and what is damaged or of another log does not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from histories import content_of
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.dashboard import column_file
from offloop.dashboard.column_file import Covered, find, keep, place_of
from offloop.dashboard.history import History

LIMIT = 64 * 1024 * 1024
STATE = json.dumps({"step": 3}).encode()


def history_of(values: list[float], *, limit: int = LIMIT, curves: int = 2) -> History:
    """Return a history with a dense and a sparse curve."""
    history = History(limit)
    ids = [history.add_curve() for _ in range(curves)]
    for step, value in enumerate(values):
        row = history.axis.append(step, step / 10, step / 1000)
        for curve in ids:
            if step % (1 + 4 * curve) == 0:
                history.curves[curve].append(row, value + curve, step)
        if step % 64 == 0:
            history.check_size()
    history.add_gap(1.0, 5.0, 3)
    return history


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(b'{"type":"Note","seq":%d}\n' % seq for seq in range(20_000)))
    return path


def kept(log: Path, history: History) -> Path:
    """Keep a history that covers the whole log."""
    path = log.with_suffix(".columns")
    keep(path, history, covered=Covered.of(log, log.stat().st_size), state=STATE)
    return path


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=300),
    more=st.integers(0, 90),
)
@settings(max_examples=30)
def test_what_is_kept_comes_back_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], more: int
) -> None:
    log = tmp_path_factory.mktemp("run") / "events.jsonl"
    log.write_bytes(b"x" * 100)
    expected = history_of(values)
    found = find(kept(log, expected), log, limit=LIMIT)
    assert found is not None
    assert (content_of(found.history), found.state) == (content_of(expected), STATE)
    for history in (expected, found.history):
        for step in range(len(values), len(values) + more):
            row = history.axis.append(step, step / 10, step / 1000)
            history.curves[0].append(row, float(step), step)
    assert content_of(found.history) == content_of(expected)


def test_a_trimmed_history_comes_back_and_goes_on(log: Path) -> None:
    rng = np.random.default_rng(0)
    expected = history_of(rng.random(90_000).tolist(), limit=1_000_000)
    assert expected.trimmed is not None
    found = find(kept(log, expected), log, limit=1_000_000)
    assert found is not None
    assert content_of(found.history) == content_of(expected)
    steps = np.arange(90_000, 90_000 + 9_001, dtype=float)
    for history in (expected, found.history):
        first = history.axis.extend(steps, steps / 10, steps / 1000)
        history.curves[0].extend((first + np.arange(len(steps))).astype(np.uint32), np.sin(steps), steps)
    assert content_of(found.history) == content_of(expected)


def test_a_log_that_has_grown_is_continued_from_where_the_columns_end(log: Path) -> None:
    size = log.stat().st_size
    path = kept(log, history_of([1.0, 2.0]))
    with open(log, "ab") as file:
        file.write(b'{"type":"Note","seq":20000}\n')
    found = find(path, log, limit=LIMIT)
    assert found is not None
    assert found.covered.size == size


@pytest.mark.parametrize("change", ["cut", "replaced", "other end"])
def test_the_columns_of_a_log_that_is_another_one_by_now_are_not_used(log: Path, change: str) -> None:
    path = kept(log, history_of([1.0, 2.0]))
    content = log.read_bytes()
    log.write_bytes(
        {"cut": content[:-1], "replaced": b"y" + content[1:], "other end": content[:-2] + b" \n"}[change]
    )
    assert find(path, log, limit=LIMIT) is None


@given(place=st.floats(0, 1, exclude_max=True), what=st.sampled_from(["bit", "cut", "nothing"]))
@settings(max_examples=40)
def test_a_damaged_file_is_not_used(
    tmp_path_factory: pytest.TempPathFactory, place: float, what: str
) -> None:
    log = tmp_path_factory.mktemp("run") / "events.jsonl"
    log.write_bytes(b"x" * 100)
    path = kept(log, history_of([1.0, float("nan"), 3.0]))
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if what == "bit":
        content[at] ^= 1
    elif what == "cut":
        del content[at:]
    path.write_bytes(content)
    assert (find(path, log, limit=LIMIT) is None) == (what != "nothing")


def test_a_missing_file_is_none(log: Path) -> None:
    assert find(log.with_suffix(".columns"), log, limit=LIMIT) is None


def test_a_file_that_cannot_be_written_leaves_the_older_one(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(log, history_of([1.0]))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            kept(log, history_of([1.0, 2.0]))
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_the_files_that_were_used_the_longest_time_ago_make_room(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [log.with_name(f"{number}.columns") for number in range(3)]
    covered = Covered.of(log, log.stat().st_size)
    for age, path in enumerate(places):
        if age == 2:
            monkeypatch.setattr(column_file, "MOST_BYTES", 2 * places[0].stat().st_size)
            # The first was used since the second was.
            os.utime(places[1], (1, 1))
        keep(path, history_of([1.0]), covered=covered, state=STATE)
    assert [path.exists() for path in places] == [True, False, True]


def test_each_log_has_a_place_of_its_own_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, other = place_of(tmp_path / "a" / "events.jsonl"), place_of(tmp_path / "b" / "events.jsonl")
    assert one != other
    assert one.parent == tmp_path / "cache" / "offloop"
