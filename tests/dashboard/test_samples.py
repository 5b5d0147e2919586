"""The samples that a model has seen, as an axis of its curves."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from fake_run import FakeRun, source_of
from run_files import events_of, step, write_run
from socket_viewer import SocketViewer

from offloop.dashboard.options import Options
from offloop.dashboard.protocol.from_viewer import RangeQuery, Show
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.serving.server import Server
from offloop.engine import Event, StepEnd, TrainStart


def steps(first: int, samples: Sequence[int]) -> list[StepEnd]:
    """Return consecutive steps with so many samples each."""
    return [
        msgspec.structs.replace(step(number), samples=count) for number, count in enumerate(samples, first)
    ]


def seen(*batches: Sequence[Event], start: int = 0, attempt: int = 0) -> dict[int, float]:
    """Return the samples seen by step, of a run that takes in these events."""
    live = LiveRun(source_of(FakeRun()), TrainStart(run_id="run", step=start, time=1_000.0, attempt=attempt))
    for batch in batches:
        live.take_in(batch)
    axis = live.history.axis.at(np.arange(live.history.axis.rows, dtype=np.uint32))
    return dict(zip(axis["step"].astype(int).tolist(), axis["samples"].tolist(), strict=True))


def test_samples_add_up_whatever_the_size_of_a_batch() -> None:
    sizes = [8, 8, 3, 8, 8, 3]
    expected = dict(enumerate(np.cumsum(sizes).astype(float).tolist(), 1))
    assert seen(steps(1, sizes)) == expected
    assert seen(*[[each] for each in steps(1, sizes)]) == expected
    many = [8, 8, 3] * 100
    assert seen(steps(1, many)) == dict(enumerate(np.cumsum(many).astype(float).tolist(), 1))


def test_steps_that_are_missing_count_as_the_next_one() -> None:
    assert seen(steps(1, [8, 8]), steps(5, [4])) == {1: 8, 2: 16, 5: 28}
    # Those before a resume
    assert seen(steps(11, [8, 8]), start=10, attempt=1) == {11: 88, 12: 96}


def test_steps_that_were_trained_again_count_once() -> None:
    again = TrainStart(run_id="run", step=2, time=2_000.0, attempt=1)
    assert seen(steps(1, [8] * 4), [again], steps(3, [8] * 4)) == {1: 8, 2: 16, 3: 24, 4: 32, 5: 40, 6: 48}


def test_who_asks_gets_them_with_curves_and_answers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", events_of(6))
    server = Server(Options(port=0), tmp_path)
    try:
        with SocketViewer(server.url) as viewer:
            viewer.wait(lambda page: page.series)
            viewer.say(
                RangeQuery(query=1, series=[0], start=9, end=17, axis="samples", points=0, samples=True)
            )
            viewer.wait(lambda page: page.ranges)
            (answer,) = viewer.page.ranges
            assert answer.step.tolist() == [3, 4]
            assert answer.samples is not None and answer.samples.tolist() == [12, 16]
            viewer.say(RangeQuery(query=2, series=[0], start=3, end=4, points=0))
            viewer.wait(lambda page: len(page.ranges) == 2)
            assert viewer.page.ranges[1].samples is None
            viewer.say(Show(series=[], samples=True))
            viewer.say(Show(series=[0], samples=True))
            viewer.wait(lambda page: len(page.points.get(0, {})) == 6)
    finally:
        server.close("the test is over")
