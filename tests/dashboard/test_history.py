"""dashboard/curves/history.py: spikes are never lost, shown points never move, memory is bounded."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offloop.dashboard.curves.history import MAX_STRETCHES, Axis, Curve, History

VALUES = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]))


def curve_of(values: list[float], *, every: int = 1) -> Curve:
    """Return a curve with a point in every n-th row; the row is the step."""
    curve = Curve()
    for place, value in enumerate(values):
        curve.append(place * every, value, place * every)
    return curve


def history_of(count: int, *, limit: int, curves: int = 1) -> History:
    """Return a long history of a noisy ramp with one spike at 1 %, trimmed as it would be while running."""
    history = History(limit)
    ids = [history.add_curve() for _ in range(curves)]
    rng = np.random.default_rng(0)
    noise = rng.random(count)
    for step in range(count):
        row = history.axis.append(step, step / 10, step / 1000)
        for curve in ids:
            history.curves[curve].append(row, noise[step] + (50.0 if step == count // 100 else 0.0), step)
        if step % 64 == 0:
            history.check_size()
    return history


def finite(value: float) -> float:
    """Return what a curve keeps of a value: NaN for what is not finite."""
    return value if math.isfinite(value) else math.nan


@given(values=st.lists(VALUES, max_size=300), every=st.integers(1, 3))
def test_all_points_come_back_as_they_were(values: list[float], every: int) -> None:
    rows, found, reduced = curve_of(values, every=every).view(0, 1000, None)
    assert not reduced
    assert rows.tolist() == [place * every for place in range(len(values))]
    np.testing.assert_array_equal(found, [finite(value) for value in values])


def state_of(curve: Curve) -> tuple[object, ...]:
    """Return all that a curve knows."""
    levels = [
        (level.rows.read().tolist(), repr(level.values.read().tolist()), level.start, level.covered)
        for level in curve.levels
    ]
    return levels, curve.marks, repr(curve.last), curve.least, curve.greatest, curve.points


@given(values=st.lists(VALUES, max_size=1500), parts=st.lists(st.integers(1, 700), min_size=1, max_size=8))
@settings(max_examples=60)
def test_many_points_at_once_are_kept_as_one_by_one(values: list[float], parts: list[int]) -> None:
    expected, curve = curve_of(values), Curve()
    start, turn = 0, 0
    while start < len(values):
        part = np.array(values[start : start + parts[turn % len(parts)]])
        if turn % 3 == 2:
            for place, value in enumerate(part.tolist()):
                curve.append(start + place, value, start + place)
        else:
            steps = np.arange(start, start + len(part), dtype=float)
            curve.extend(steps.astype(np.uint32), part, steps)
        start, turn = start + len(part), turn + 1
    assert state_of(curve) == state_of(expected)


@given(values=st.lists(VALUES, min_size=1, max_size=700), cut=st.integers(0, 700))
def test_a_curve_goes_on_by_points_after_many_at_once(values: list[float], cut: int) -> None:
    many = [float(number) for number in range(5000)]
    expected, curve = curve_of([*many, *values]), Curve()
    steps = np.arange(len(many) + cut % len(values), dtype=float)
    every = np.array([*many, *values])
    curve.extend(steps.astype(np.uint32), every[: len(steps)], steps)
    for place in range(len(steps), len(every)):
        curve.append(place, float(every[place]), place)
    assert state_of(curve) == state_of(expected)


@given(
    stamps=st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)),
        min_size=1,
        max_size=99,
    )
)
def test_many_rows_at_once_are_kept_as_one_by_one(stamps: list[tuple[int, float, float, float]]) -> None:
    expected, axis = Axis(), Axis()
    for stamp in stamps:
        expected.append(*stamp)
    half = len(stamps) // 2
    for part in (stamps[:half], stamps[half:]):
        if part:
            axis.extend(*(np.array(column, float) for column in zip(*part, strict=True)))
    rows = np.arange(len(stamps), dtype=np.uint32)
    for name, column in expected.at(rows).items():
        np.testing.assert_array_equal(axis.at(rows)[name], column)


@given(
    values=st.lists(VALUES, min_size=1, max_size=700),
    points=st.integers(2, 60),
    bounds=st.tuples(st.integers(0, 700), st.integers(0, 700)),
)
@example(values=[0.0, 0.0, 0.0, 1.0, 0.0], points=2, bounds=(2, 5))
@settings(max_examples=200)
def test_fewer_points_are_true_points_with_the_least_and_the_greatest_of_them(
    values: list[float], points: int, bounds: tuple[int, int]
) -> None:
    first, end = sorted(bounds)
    rows, found, reduced = curve_of(values).view(first, end, points)
    inside = [finite(value) for value in values[first:end]]
    assert len(rows) <= points + 2  # a bucket may begin before the stretch and another end behind it
    assert all(before < after for before, after in pairwise(rows.tolist()))
    np.testing.assert_array_equal(found, [finite(values[row]) for row in rows])
    assert reduced == (len(rows) < len(inside))
    known = [value for value in inside if not math.isnan(value)]
    if known:
        assert np.nanmin(found) == min(known)
        assert np.nanmax(found) == max(known)


def test_a_spike_is_on_every_level() -> None:
    history = history_of(100_000, limit=1_000_000_000)
    for points in (10, 100, 1_000, 4_000):
        _, found, _ = history.curves[0].view(0, 100_000, points)
        assert found.max() > 50


def test_points_that_stay_stand_still_while_more_come() -> None:
    """Buckets are aligned, so that those of a longer history nest in those of a shorter one."""
    rng = np.random.default_rng(1)
    curve = curve_of(rng.random(4_000).tolist())
    before = set(curve.view(0, 4_000, 200)[0].tolist())
    for step in range(4_000, 4_050):
        curve.append(step, float(rng.random()), step)
    after = set(curve.view(0, 4_050, 200)[0].tolist())
    gone = {row for row in before - after if row < 3_968}
    assert not gone  # the same buckets choose the same points


def test_a_line_goes_to_the_edges_of_a_stretch() -> None:
    rows, found, _ = curve_of([float(value) for value in range(100)], every=10).view(
        205, 395, 50, margin=True
    )
    assert rows[0] == 200
    assert rows[-1] == 400
    assert found[0] == 20
    assert found[-1] == 40


def test_a_point_costs_at_most_20_bytes_beside_the_axis() -> None:
    history = history_of(10_000, limit=1_000_000_000, curves=3)
    assert (history.bytes - history.axis.bytes) / 30_000 <= 20


def test_beyond_its_limit_the_oldest_part_keeps_the_least_and_the_greatest() -> None:
    count, limit = 200_000, 2_000_000
    history = history_of(count, limit=limit, curves=2)
    assert history.bytes < 1.2 * limit
    assert history.trimmed is not None and 0 < history.trimmed < count
    (axis, ((_, indices, found, reduced), *_)) = history.columns([0], 0, history.axis.rows, 800)
    assert reduced
    assert found.max() > 50  # the spike at 1 % lies in the oldest part
    assert axis["step"][indices[int(np.argmax(found))]] == count // 100
    newest = int(history.trimmed)
    (axis, ((_, _, found, reduced),)) = history.columns([0], newest, history.axis.rows, None)
    assert not reduced
    assert axis["step"].tolist() == list(range(newest, count))  # what is left whole is whole


def test_a_curve_with_few_points_keeps_them_all_however_old() -> None:
    history = History(1_000_000)
    dense, sparse = history.add_curve(), history.add_curve()
    for step in range(60_000):
        row = history.axis.append(step, step, step)
        history.curves[dense].append(row, float(step % 7), step)
        if step % 10_000 == 0:
            history.curves[sparse].append(row, float(step), step)
        history.check_size()
    assert history.trimmed is not None
    axis, ((_, indices, found, _),) = history.columns([sparse], 0, history.axis.rows, None)
    assert found.tolist() == [step * 10_000.0 for step in range(6)]
    assert axis["step"][indices].tolist() == found.tolist()


def test_rows_are_found_by_step_time_and_epoch_also_in_the_trimmed_part() -> None:
    history = history_of(100_000, limit=1_000_000)
    assert history.trimmed is not None
    for step in (int(history.trimmed) + 10, 90_000, 99_999):
        assert history.axis.row_of("step", step) == step
        assert history.axis.row_of("time", step / 10) == step
        assert history.axis.row_of("epoch", step / 1000) == step
    old = history.axis.row_of("step", history.trimmed / 2)
    assert history.trimmed / 2 <= history.axis.at(np.array([old], np.uint32))["step"][0] < history.trimmed
    assert history.axis.row_of("step", 1e9) == history.axis.rows


@given(values=st.lists(VALUES, max_size=60))
def test_what_is_not_finite_is_counted_in_stretches(values: list[float]) -> None:
    curve = curve_of(values)
    assert sum(mark.count for mark in curve.marks) == sum(not math.isfinite(value) for value in values)
    for mark in curve.marks:
        stretch = values[int(mark.start) : int(mark.end) + 1]
        assert not any(map(math.isfinite, stretch))
        kinds = {"nan" if math.isnan(value) else "inf" if value > 0 else "-inf" for value in stretch}
        assert mark.kind == (kinds.pop() if len(kinds) == 1 else "mixed")


def test_marks_and_gaps_are_bounded_and_none_is_forgotten() -> None:
    curve = Curve()
    history = History()
    for step in range(4 * MAX_STRETCHES):
        curve.append(step, math.nan if step % 2 else 1.0, step)
        history.add_gap(2 * step, 2 * step + 2, 1)
    assert len(curve.marks) == len(history.gaps) == MAX_STRETCHES
    assert sum(mark.count for mark in curve.marks) == 2 * MAX_STRETCHES
    assert sum(gap.count for gap in history.gaps) == 4 * MAX_STRETCHES
    assert history.gaps[-1].before == 8 * MAX_STRETCHES


def test_last_least_and_greatest_pass_over_what_is_not_finite() -> None:
    curve = curve_of([math.nan, 3.0, -math.inf, 1.0, 5.0, math.nan])
    assert curve.least == (1.0, 3)
    assert curve.greatest == (5.0, 4)
    assert math.isnan(curve.last)


@pytest.mark.parametrize("limit", [0, 999_999, True, 1e9, None])
def test_a_limit_that_holds_nothing_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match="history_bytes must be a whole number of at least 1,000,000"):
        History(limit)  # type: ignore[arg-type]  # what is tested


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 50), st.floats(0, 50), st.floats(0, 50)),
        min_size=1,
        max_size=60,
    )
)
def test_the_axis_never_falls(stamps: list[tuple[int, float, float, float]]) -> None:
    """What another thread publishes may be stamped later than a step that arrives behind it."""
    history = History()
    for stamp in stamps:
        history.axis.append(*stamp)
    columns = history.axis.at(np.arange(len(stamps), dtype=np.uint32))
    for name, place in (("step", 0), ("time", 1), ("epoch", 2), ("samples", 3)):
        expected = np.maximum.accumulate([float(stamp[place]) for stamp in stamps])
        assert columns[name].tolist() == expected.tolist()  # type: ignore[index]  # the four names
        row = history.axis.row_of(name, float(expected[-1]))  # type: ignore[arg-type]
        assert expected[row] == expected[-1]


@pytest.mark.parametrize("size", [8, 64, 500, 512])
def test_many_points_at_once_make_the_levels_that_one_by_one_make(size: int) -> None:
    one_by_one, at_once = Curve(), Curve()
    values = np.random.default_rng(0).standard_normal(20 * size)
    rows = np.arange(len(values), dtype=np.uint32)
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        one_by_one.append(row, value, row)
    for start in range(0, len(values), size):
        part = slice(start, start + size)
        at_once.extend(rows[part], values[part], rows[part].astype(float))
    assert len(one_by_one.levels) == len(at_once.levels)
    for expected, level in zip(one_by_one.levels, at_once.levels, strict=True):
        assert level.rows.read().tolist() == expected.rows.read().tolist()
        assert level.values.read().tolist() == expected.values.read().tolist()
