"""What is kept of layers, and what a viewer gets of it: true values, whatever events say and in whatever order."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from fake_run import FakeRun, source_of
from hypothesis import given
from hypothesis import strategies as st

from offloop.dashboard.curves.layer_frame import LayerFrame, decode_layers
from offloop.dashboard.curves.layer_history import (
    MAX_NAME,
    MAX_ROWS,
    STATISTICS,
    LayerHistory,
    figures_of,
    levels_of,
    shares_of,
    without_layers,
)
from offloop.dashboard.protocol.from_viewer import LayersQuery
from offloop.dashboard.runs.live_run import LiveRun, Numbers
from offloop.dashboard.viewers.layer_cursor import LayerCursor
from offloop.engine import TrainStart, UnknownEvent

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "x", [], {}]),
)
BY_LAYER = st.one_of(ODD, st.dictionaries(st.text(max_size=3), ODD, max_size=4))
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.one_of(st.sampled_from(["weights", "gradients", ""]), ODD),
        "mean": BY_LAYER,
        "std": BY_LAYER,
        "norm": BY_LAYER,
        "dead": BY_LAYER,
        "norms": BY_LAYER,
        "update_ratios": BY_LAYER,
        "histogram": st.one_of(
            ODD, st.dictionaries(st.text(max_size=3), st.one_of(ODD, st.lists(ODD, max_size=5)), max_size=4)
        ),
    },
)


def weights(mean: float = 0.0, std: float = 1.0, **more: Any) -> dict[str, Any]:
    """The fields of an event about two layers."""
    return {
        "kind": "weights",
        "mean": {"a": mean, "b": 0.0},
        "std": {"a": std, "b": 2.0},
        "minimum": {"a": -1.0, "b": -2.0},
        "maximum": {"a": 1.0, "b": 2.0},
        "histogram": {"a": [1, 2, 1], "b": [0, 4, 0]},
    } | more


def history_of(*events: dict[str, Any], limit: int = 10**9, every: int = 1) -> LayerHistory:
    history = LayerHistory(limit)
    for number, fields in enumerate(events, 1):
        history.add(number * every, figures_of("LayersMeasured", fields))
    return history


def row_values(history: LayerHistory, kind: str, statistic: str) -> list[list[float]]:
    table = history.tables[kind]
    return table.overview(statistic, 0, len(table.rows)).tolist()  # type: ignore[no-any-return]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=600).filter(any))
def test_a_level_tells_the_share_of_a_bin_to_two_hundredths_of_a_percent(counts: list[int]) -> None:
    levels = levels_of(np.array([counts], float))
    expected = np.array(counts) / sum(counts)
    kept = expected >= 1e-9
    assert shares_of(levels)[0, kept] == pytest.approx(expected[kept], rel=2e-4)
    assert ((levels[0] == 0) == (expected == 0)).all()


def test_gradients_and_layers_measured_in_the_same_step_are_one_row() -> None:
    history = LayerHistory()
    history.add(50, figures_of("GradientStatistics", {"norms": {"a": 3.0}, "update_ratios": {"a": 0.5}}))
    history.add(50, figures_of("LayersMeasured", weights()))
    history.add(50, figures_of("LayersMeasured", weights(kind="gradients", norm={"b": 7.0})))
    assert [row.step for row in history.tables["weights"].rows] == [50]
    assert row_values(history, "weights", "update_ratio") == [[0.5, pytest.approx(math.nan, nan_ok=True)]]
    assert row_values(history, "weights", "std") == [[1.0, 2.0]]
    assert row_values(history, "gradients", "norm") == [[3.0, 7.0]]


def test_a_value_that_is_not_finite_is_told_from_one_that_was_not_measured() -> None:
    history = history_of(weights(norm={"a": math.nan}), weights(norm={"a": "-Infinity", "b": None}))
    ((nan, missing), (infinite, none)) = row_values(history, "weights", "norm")
    assert (nan, infinite) == (math.inf, -math.inf)
    assert math.isnan(missing) and math.isnan(none)


@given(
    st.lists(st.tuples(st.sampled_from(["LayersMeasured", "GradientStatistics"]), st.integers(0, 9), EVENT))
)
def test_odd_events_leave_tables_that_can_be_sent_and_kept(events: list[tuple[str, int, Any]]) -> None:
    history = LayerHistory()
    for name, step, fields in events:
        history.add(step, figures_of(name, fields))
    for table in history.tables.values():
        steps = [row.step for row in table.rows]
        assert steps == sorted(set(steps))
        assert table.overview("norm", 0, len(steps)).shape == (len(steps), len(table.names))
        assert table.summary().shape == (4, len(table.names))
        for place in range(len(table.names)):
            values, histogram, bins = table.layer(place, 0, len(steps))
            assert values.shape == (len(STATISTICS), len(steps))
            assert histogram.shape == (len(steps), max(bins, default=0))
    again = LayerHistory.of(history.facts(), iter(list(history.columns())))
    assert again.facts() == history.facts()
    for ours, theirs in zip(history.columns(), again.columns(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_change_is_the_share_by_which_mean_and_deviation_have_moved_in_ten_measurements() -> None:
    # Then: mean 0, std 1 in step 2. Now: mean 3, std 4 in step 12; root mean square 5.
    history = history_of(weights(mean=100.0), *[weights()] * 10, weights(mean=3.0, std=4.0))
    change = history.tables["weights"].summary()[3]
    assert change.tolist() == pytest.approx([math.hypot(3, 3) / 5, 0.0])


def test_a_full_history_keeps_rows_at_equal_distances_and_the_newest() -> None:
    one = history_of(weights()).bytes
    history = history_of(*[weights()] * 1_000, limit=40 * one, every=50)
    steps = [row.step for row in history.tables["weights"].rows]
    assert history.bytes <= 40 * one
    assert (steps[0], steps[-1]) == (50, 50_000)
    distances = set(np.diff(steps[:-1]).tolist())
    assert distances == {50 * 32}


def test_rows_of_two_callbacks_are_thinned_out_each_for_itself() -> None:
    history = LayerHistory()
    for step in range(50, 50 * MAX_ROWS * 3, 50):
        history.add(step, figures_of("GradientStatistics", {"norms": {"a": 1.0}}))
        if step % 100 == 0:
            history.add(step, figures_of("LayersMeasured", weights(kind="gradients")))
    rows = history.tables["gradients"].rows
    with_histograms = sum(row.has_histograms for row in rows)
    assert len(rows) <= MAX_ROWS + 1
    assert len(rows) / 3 < with_histograms < 2 * len(rows) / 3


class Viewing:
    """A viewer that keeps the rows it is sent, as the page does."""

    def __init__(self, live: LiveRun) -> None:
        self.cursor = LayerCursor(live)
        self.frames: list[LayerFrame] = []
        self.rows: list[tuple[float, list[float]]] = []
        self.levels: list[list[int]] = []

    def receive(self) -> None:
        while (data := self.cursor.next_frame()) is not None:
            frame = decode_layers(data)
            self.frames.append(frame)
            first = frame.header.first
            if frame.histogram is None:
                assert first <= len(self.rows)
                self.rows[first:] = zip(frame.steps.tolist(), frame.values.tolist(), strict=True)
            else:
                self.levels[first:] = frame.histogram.tolist()


def run_with_layers() -> LiveRun:
    return LiveRun(source_of(FakeRun()), TrainStart(run_id="run", time=1.0, step=0, epoch=0))


@given(st.lists(st.sampled_from(["add", "merge", "thin", "layer", "receive"]), max_size=40))
def test_a_viewer_has_what_the_tables_have_after_any_changes(changes: list[str]) -> None:
    live = run_with_layers()
    viewing = Viewing(live)
    viewing.cursor.ask(LayersQuery(kind="weights", statistic="norm", layer="a"))
    step, layers = 0, {"a": 1.0}
    for change in changes:
        if change == "receive":
            viewing.receive()
        elif change == "thin" and live.layers.tables:
            live.layers.tables["weights"].thin()
        else:
            step += change == "add"
            layers |= {f"layer {len(layers)}": 1.0} if change == "layer" else {}
            fields = {"kind": "weights", "norm": layers | {"a": float(step)}, "histogram": {"a": [step, 1]}}
            live.layers.add(step, figures_of("LayersMeasured", fields))
    viewing.receive()
    if table := live.layers.tables.get("weights"):
        expected = table.overview("norm", 0, len(table.rows)).tolist()
        np.testing.assert_array_equal([values for _, values in viewing.rows], expected)
        assert [step for step, _ in viewing.rows] == [row.step for row in table.rows]
        assert viewing.levels == table.layer(0, 0, len(table.rows))[1].tolist()
    assert not viewing.cursor.wants_frame(at_once=True)


def test_a_large_table_comes_in_parts() -> None:
    live = run_with_layers()
    names = {f"layer {number}": float(number) for number in range(900)}
    for step in range(200):
        live.layers.add(step, figures_of("LayersMeasured", {"kind": "weights", "norm": names}))
    viewing = Viewing(live)
    viewing.cursor.ask(LayersQuery())
    viewing.receive()
    assert [frame.header.more for frame in viewing.frames] == [True, True, False, False]
    assert viewing.frames[0].header.names == list(names)
    assert len(viewing.rows) == 200


def test_new_measurements_wait_for_their_turn_and_answers_do_not() -> None:
    live = run_with_layers()
    viewing = Viewing(live)
    live.layers.add(1, figures_of("LayersMeasured", weights()))
    assert not viewing.cursor.wants_frame()
    viewing.cursor.ask(LayersQuery())
    assert viewing.cursor.wants_frame()
    viewing.receive()
    live.layers.add(2, figures_of("LayersMeasured", weights()))
    assert not viewing.cursor.wants_frame()
    viewing.cursor.ask(LayersQuery(statistic="std"))
    assert viewing.cursor.wants_frame()
    viewing.receive()
    assert viewing.rows[-1] == (2, [1.0, 2.0])
    viewing.cursor.ask(LayersQuery(on=False))
    live.layers.add(3, figures_of("LayersMeasured", weights()))
    assert not viewing.cursor.wants_frame(at_once=True)


def test_numbers_by_layer_are_no_curves_however_they_are_named() -> None:
    measured = {"layers_measured/weights/mean/0.weight": 1.0, "layers_measured/dead/0": 0.5}
    assert not list(without_layers("LayersMeasured", measured.items()))
    gradients = {"gradient_statistics/norm": 5.0, "gradient_statistics/norms/0.weight": 3.0}
    assert list(without_layers("GradientStatistics", gradients.items())) == [
        ("gradient_statistics/norm", 5.0)
    ]


def test_layers_are_no_curves_but_totals_are() -> None:
    live = run_with_layers()
    fields = {"norm": 5.0, "norms": {"a": 3.0}, "update_ratios": {"a": 0.5}}
    event = UnknownEvent(run_id="run", time=2.0, step=4, epoch=0, type="GradientStatistics", raw=b"{}")
    layers = figures_of("GradientStatistics", fields)
    live.take_in([Numbers(event, {"gradient_statistics/norm": 5.0}, layers)])
    assert [each.key for each in live.series] == ["gradient_statistics/norm"]
    assert live.status(viewers=1, is_control=True).layers == 1


def test_names_that_are_left_out_take_no_memory() -> None:
    history = LayerHistory()
    history.add(0, figures_of("LayersMeasured", {"kind": "weights", "norm": {"first": 1.0}}))

    def measure(step: int) -> int:
        tracemalloc.start()
        names = {f"{step}.{number}.{'x' * MAX_NAME}": 1.0 for number in range(2_000)}
        history.add(step, figures_of("LayersMeasured", {"kind": "weights", "norm": names}))
        del names
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return taken

    assert max(map(measure, range(1, 4))) < 100_000
    assert history.tables["weights"].names == ["first"]


def test_counts_beyond_every_number_are_infinitely_many_elements() -> None:
    history = LayerHistory()
    histogram = {"sum": [1e308, 1e308], "float32": [1e300, 0.0]}
    history.add(1, figures_of("LayersMeasured", {"kind": "weights", "histogram": histogram}))
    elements = history.tables["weights"].overview("elements", 0, 1)
    assert np.isposinf(elements).all()
