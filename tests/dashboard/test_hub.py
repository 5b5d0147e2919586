"""dashboard/hub.py and viewer.py: after any schedule a viewer has the server's state, each command applied once."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
import pytest
from fake_run import FakeRun, source_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_link import MemoryLink, PageModel

from offloop.dashboard.curves.chart_frame import decode_chart
from offloop.dashboard.curves.frames import DELTA_POINTS
from offloop.dashboard.hub import ENDED_RUNS_KEPT, Hub
from offloop.dashboard.protocol.encoding import decode_viewer_message
from offloop.dashboard.protocol.from_viewer import (
    CommandRequest,
    Hi,
    ListRuns,
    Overlay,
    Ping,
    RangeQuery,
    Show,
    Stream,
    Watch,
)
from offloop.dashboard.protocol.limits import CLOSE_PROTOCOL, CLOSE_SLOW, MAX_CHART_FRAME, MAX_OVERLAID, Role
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import KeptMilestone, Milestones
from offloop.dashboard.runs.rows import MAX_FIGURES, row_of
from offloop.dashboard.viewers import viewer as viewer_module
from offloop.dashboard.viewers.viewer import MAX_WAITING_TEXTS
from offloop.engine import (
    CallbackFailed,
    Command,
    CommandApplied,
    EpochEnd,
    EpochStart,
    Evaluated,
    Event,
    Metrics,
    Pause,
    Resume,
    RunEndedError,
    SaveCheckpoint,
    SetLearningRate,
    StateChanged,
    StepEnd,
    Stop,
    TrainEnd,
    TrainStart,
    Validate,
    ValidationEnd,
)
from offloop.engine.bus.event_bus import Bus


class Known:
    """A visitor who is admitted."""

    def __init__(self, role: Role) -> None:
        self.role = role

    def admit(self, hi: Hi) -> Role:
        return self.role

    def is_admitted(self) -> bool:
        return True


class Stage:
    """A hub with one run that is driven by hand, and the time that its events carry."""

    def __init__(self, tasks: anyio.abc.TaskGroup, *, frame_interval: float = 1e-6) -> None:
        self.tasks = tasks
        self.hub = Hub(post=lambda function: function(), page="page", frame_interval=frame_interval)
        self.run = FakeRun()
        self.live = LiveRun(source_of(self.run), TrainStart(run_id="run", step=0, epoch=0, time=1.0))
        self.bus = Bus(run_id="run", flush_interval=1e-4)
        self.seq = 0
        self.step = 0
        self.links: list[MemoryLink] = []
        self.hub.runs[self.live.key] = self.live

    def tell(self, event: Any) -> None:
        """Have the run say something."""
        for name, value in (("seq", self.seq), ("time", 1.0 + self.seq), ("step", self.step), ("epoch", 0)):
            msgspec.structs.force_setattr(event, name, value)
        self.seq += 1
        self.hub._send_milestones(self.live, self.live.take_in([event]))
        self.hub._tick(self.live)

    def steps(self, count: int, **values: float) -> None:
        """Have the run do steps that log some values."""
        for _ in range(count):
            self.step += 1
            self.run.step = self.step
            self.tell(StepEnd(loss=1 / self.step, lr=0.1, metrics=Metrics(values)))

    def join(self, page: PageModel, *, room: float = math.inf, role: Any = "control") -> MemoryLink:
        """Connect a viewer."""
        link = MemoryLink(room)
        self.links.append(link)
        link.say(page.hi())
        self.tasks.start_soon(lambda: self.hub.serve(link, visitor=Known(role), address="127.0.0.1"))
        return link


async def settle() -> None:
    """Let every task do what it can. (`wait_all_tasks_blocked` takes a tenth of a second where timers run.)"""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def read(link: MemoryLink, page: PageModel, *, draws: bool = True) -> None:
    """Take everything that comes, giving credit for charts, until nothing more does."""
    while True:
        await settle()
        taken = link.take()
        if taken is None:
            return
        page.take(*taken)
        if page.owes_drawn and draws:
            link.say(page.drawn())


def run_async(test: Callable[[Stage], Any], **options: Any) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            stage = Stage(tasks, **options)
            try:
                await test(stage)
            finally:
                for link in stage.links:
                    link.drop()
                tasks.cancel_scope.cancel()

    anyio.run(main)


def points_of(stage: Stage, curve: int) -> dict[float, float]:
    """Return all points of a curve as the server has them."""
    axis, ((_, indices, values, _),) = stage.live.history.columns(
        [curve], 0, stage.live.history.axis.rows, None
    )
    return dict(zip(axis["time"][indices].tolist(), values.tolist(), strict=True))


def assert_equal_state(stage: Stage, page: PageModel) -> None:
    """Fail unless a page knows exactly what the server knows."""
    assert [event["seq"] for event in page.milestones] == [each.seq for each in stage.live.milestones]
    assert page.series == {each.id: each.key for each in stage.live.series}
    assert set(page.points) == set(page.shown)
    for curve in page.shown:
        expected = points_of(stage, curve)
        assert page.points[curve].keys() == expected.keys()
        assert str(page.points[curve]) == str(expected)  # as text: NaN is NaN


ACTIONS = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 40)),
    st.tuples(st.just("steps_with_metric"), st.integers(0, 3)),
    st.tuples(st.just("milestone"), st.integers(0, 4)),
    st.tuples(st.just("nan"), st.just(0)),
    st.tuples(st.just("read"), st.integers(1, 5)),
    st.tuples(st.just("draw"), st.just(0)),
    st.tuples(st.just("show"), st.integers(0, 7)),
    st.tuples(st.just("drop"), st.just(0)),
    st.tuples(st.just("command"), st.just(0)),
    st.tuples(st.just("apply"), st.just(0)),
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.lists(ACTIONS, max_size=40), room=st.sampled_from([1, 2, 50]))
def test_after_any_schedule_a_viewer_has_the_servers_state(
    schedule: list[tuple[str, int]], room: int
) -> None:
    """Drops, reconnects, slow readers, hidden curves and commands that are sent again."""

    async def play(stage: Stage) -> None:
        page = PageModel()
        link = stage.join(page, room=room)
        commands: list[str] = []

        async def rejoin() -> MemoryLink:
            link = stage.join(page, room=room)
            shown, page.shown = page.shown, []
            await read_some(link, 10_000, lambda: bool(page.series) or not stage.live.series)
            wanted = [curve for curve in shown if curve in page.series]
            if wanted:
                link.say(page.show(wanted))
            for request in page.pending.values():
                link.say(request)  # no last word came before the connection was lost
            return link

        async def read_some(
            link: MemoryLink, count: int, is_enough: Callable[[], bool] = lambda: False
        ) -> None:
            for _ in range(count):
                await settle()
                taken = link.take()
                if taken is None or is_enough():
                    if taken is not None:
                        page.take(*taken)
                    return
                page.take(*taken)

        for action, argument in schedule:
            match action:
                case "steps":
                    stage.steps(argument)
                case "steps_with_metric":
                    stage.steps(2, **{f"metric_{argument}": 0.5})
                case "milestone":
                    for _ in range(argument):
                        stage.tell(EpochStart())
                case "nan":
                    stage.step += 1
                    stage.tell(StepEnd(loss=math.nan, lr=0.1))
                case "read":
                    await read_some(link, argument)
                case "draw" if page.owes_drawn:
                    link.say(page.drawn())
                case "show":
                    await settle()
                    link.say(page.show([curve for curve in page.series if (argument >> curve % 3) & 1]))
                case "drop":
                    link.drop()
                    await settle()
                    link = await rejoin()
                case "command":
                    request = CommandRequest(id=f"c{len(commands)}", name="pause", run="run")
                    commands.append(request.id)
                    page.pending[request.id] = request
                    link.say(request)
                case "apply" if stage.run.given:
                    future = stage.run.given[-1][-1]
                    if not future.done():
                        future.set_result(None)
        await settle()
        if page.owes_drawn:
            link.say(page.drawn())
        await read(link, page)
        if link.closed is not None:  # it was too slow: it comes back at once
            assert link.closed[0] == CLOSE_SLOW
            link = await rejoin()
            await read(link, page)
        for *_, future in stage.run.given:
            if not future.done():
                future.set_result(None)
        await read(link, page)
        assert not page.pending, "every command comes to an end"
        link.say(page.show(sorted(page.series)))
        await read(link, page)
        assert_equal_state(stage, page)
        assert len(stage.run.given) == len(commands), "each command is applied once"
        assert set(page.acks) == set(commands)

    run_async(play)


def with_page(test: Callable[..., Any]) -> Callable[[], None]:
    """Run a test with a stage, a page that has joined it, and the link between them."""

    def wrapped() -> None:
        async def play(stage: Stage) -> None:
            page = PageModel()
            link = stage.join(page)
            await read(link, page)
            await test(stage, page, link)

        run_async(play)

    wrapped.__name__ = test.__name__
    wrapped.__doc__ = test.__doc__
    return wrapped


@with_page
async def test_a_viewer_hears_at_once_what_the_run_is(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    assert page.hello is not None and page.hello.role == "control" and page.hello.page == "page"
    assert page.run is not None and page.run.key == "run" and page.run.refused == stage.run.refused
    assert page.status is not None and page.status.state == "waiting"


@with_page
async def test_one_chart_frame_at_a_time(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    stage.steps(1)
    await read(link, page)
    link.say(page.show([0, 1]))
    await read(link, page, draws=False)
    for _ in range(5):
        stage.steps(100)
        await read(link, page, draws=False)
    assert len(page.points[0]) == 1  # what came meanwhile waits in the history, not in a queue
    link.say(page.drawn())
    await read(link, page)
    assert len(page.points[0]) == 501


@with_page
async def test_milestones_need_no_credit(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    stage.steps(1)
    await read(link, page)
    link.say(page.show([0]))
    await read(link, page, draws=False)
    stage.tell(TrainEnd(status="failed", error="ValueError: no"))
    stage.hub._send_status(stage.live)
    await read(link, page, draws=False)
    assert page.milestones[-1]["type"] == "TrainEnd"
    assert page.status is not None and page.status.state == "failed" and page.status.error == "ValueError: no"


@with_page
async def test_train_and_validation_of_a_metric_share_a_panel(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.steps(1, accuracy=0.5)
    stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.4, val_accuracy=0.6)))
    stage.tell(EpochEnd(metrics=Metrics(train_loss=0.5, val_loss=0.4, val_accuracy=0.6, lr=0.1)))
    panels = {each.key: (each.panel, each.label) for each in stage.live.series}
    assert panels == {
        "loss": ("loss", "step"),
        "lr": ("lr", "step"),
        "accuracy": ("accuracy", "step"),
        "val_loss": ("loss", "val"),
        "val_accuracy": ("accuracy", "val"),
        "train_loss": ("loss", "train"),
    }
    assert [curve.points for curve in stage.live.history.curves] == [1] * 6  # nothing is drawn twice


@with_page
async def test_rates_of_parameter_groups_stand_in_the_panel_of_the_rate(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.tell(StepEnd(step=1, loss=1.0, lr=0.2, lrs=Metrics({"0": 0.1, "body/head": 0.2})))
    panels = {each.key: (each.panel, each.label) for each in stage.live.series}
    assert panels == {
        "loss": ("loss", "step"),
        "lr": ("lr", "step"),
        "lr/0": ("lr", "0"),
        "lr/body/head": ("lr", "body/head"),
    }


@with_page
async def test_an_evaluation_is_drawn_at_the_step_of_its_checkpoint(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.steps(10)
    stage.tell(Evaluated(path="x", of_step=2, metrics=Metrics(eval_loss=0.5)))
    await read(link, page)
    series = {each.key: each for each in stage.live.series}
    assert (series["eval_loss"].panel, series["eval_loss"].label) == ("loss", "eval")
    curve = series["eval_loss"].id
    link.say(page.show([0, curve]))
    await read(link, page)
    assert page.points[curve] == {2.0: 0.5}
    # A viewer that has seen later steps gets it, too
    stage.steps(10)
    stage.tell(Evaluated(path="x", of_step=8, metrics=Metrics(eval_loss=0.25)))
    stage.tell(Evaluated(path="x", of_step=8, metrics=Metrics(eval_loss=0.25)))  # evaluated again
    stage.tell(Evaluated(path="x", of_step=10, error="ValueError: no"))
    await read(link, page)
    assert page.points[curve] == {2.0: 0.5, 8.0: 0.25}
    assert len(page.points[0]) == 20


@with_page
async def test_an_evaluation_of_an_earlier_attempt_is_an_event_only(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.step = 100
    stage.steps(3)
    stage.tell(Evaluated(path="x", of_step=50, metrics=Metrics(eval_loss=0.5)))
    await read(link, page)
    assert "eval_loss" not in {each.key for each in stage.live.series}
    assert page.milestones[-1]["type"] == "Evaluated"


@with_page
async def test_missing_steps_are_a_gap(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    stage.steps(3)
    stage.step += 10
    stage.steps(3)
    (gap,) = stage.live.history.gaps
    assert (gap.after, gap.before, gap.count) == (3, 14, 10)
    await read(link, page)
    link.say(RangeQuery(query=7, series=[0], start=0, end=100))
    await read(link, page)
    assert page.ranges[0].header.gaps == [gap]
    assert stage.live.status(viewers=1, is_control=True).dropped == 10


@with_page
async def test_all_points_of_a_stretch_come_in_parts(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    stage.steps(20_000)
    await read(link, page)
    link.say(RangeQuery(query=1, series=[0, 1], start=5, end=19_995, points=0))
    await read(link, page)
    assert [frame.header.more for frame in page.ranges] == [True] * (len(page.ranges) - 1) + [False]
    assert len(page.ranges) > 1
    steps = [step for frame in page.ranges for step in frame.step.tolist()]
    assert steps == list(range(5, 19_996))


def test_an_answer_of_many_curves_comes_in_frames_of_bounded_size() -> None:
    """Each curve once, however often it is asked for."""

    async def play(stage: Stage) -> None:
        names = {f"metric_{number}": float(number) for number in range(60)}
        stage.steps(2_000, **names)
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        asked = [*sorted(page.series), *[0] * 10_000]
        link.say(RangeQuery(run="run", query=5, series=asked, start=0, end=2_000, points=4_000))
        sizes = []
        while True:
            await settle()
            if (taken := link.take()) is None:
                break
            page.take(*taken)
            sizes.append(len(taken[0]))
            if page.owes_drawn:
                link.say(page.drawn())
        assert max(sizes) < MAX_CHART_FRAME + 20_000  # and the header
        assert [frame.header.more for frame in page.ranges] == [True] * (len(page.ranges) - 1) + [False]
        answered = [column.id for frame in page.ranges for column in frame.header.series]
        assert answered == sorted(page.series)
        assert {column.points for frame in page.ranges for column in frame.header.series} == {2_000}

    run_async(play)


@with_page
async def test_an_answer_in_parts_does_not_hold_up_what_is_new(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.steps(30_000)
    await read(link, page)
    link.say(page.show([0]))
    await read(link, page)
    link.say(RangeQuery(query=1, series=[0, 1], start=0, end=30_000, points=0))
    await settle()
    stage.steps(1)
    kinds: list[str] = []
    while (taken := link.take()) is not None:
        page.take(*taken)
        if not taken[1]:
            kinds.append("range" if len(page.ranges) > kinds.count("range") else "delta")
        if page.owes_drawn:
            link.say(page.drawn())
        await settle()
    assert "delta" in kinds[:3]


@with_page
async def test_who_only_reads_gives_no_commands_and_sees_no_names(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    reader = PageModel()
    reading = stage.join(reader, role="read_only")
    stage.tell(CommandApplied(command="pause", command_id=0, by="ada"))
    stage.tell(StateChanged(state="paused", by="ada"))
    stage.tell(CallbackFailed(callback="Mine", event="EpochEnd", error="ValueError", traceback="secret"))
    await read(reading, reader)
    reading.say(CommandRequest(id="r1", name="pause", run="run"))
    await read(reading, reader)
    assert reader.acks == {"r1": ["rejected"]} and stage.run.given == []
    assert [event["type"] for event in reader.milestones] == ["StateChanged", "CallbackFailed"]
    assert "ada" not in str(reader.milestones) and "secret" not in str(reader.milestones)
    await read(link, page)
    assert "ada" in str(page.milestones) and "secret" in str(page.milestones)


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ('"name": "pause"', Pause("asked on the live page")),
        ('"name": "resume"', Resume()),
        ('"name": "stop", "checkpoint": false', Stop("stopped on the live page")),
        ('"name": "set_lr", "lr": 0.5, "optimizer": "first"', SetLearningRate(0.5, optimizer="first")),
        ('"name": "checkpoint"', SaveCheckpoint()),
        ('"name": "validate"', Validate()),
    ],
)
def test_a_message_of_the_page_is_a_typed_command(message: str, command: Command[Any]) -> None:
    request = decode_viewer_message(f'{{"type": "command", "id": "a", "run": "run", {message}}}')
    assert isinstance(request, CommandRequest) and request.command() == command


@with_page
async def test_commands_are_acknowledged_with_what_came_of_them(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    def ask(id: str, name: Any, **more: Any) -> None:
        link.say(CommandRequest(id=id, name=name, run="run", **more))

    ask("a", "pause")
    ask("b", "checkpoint")  # refused for this run
    ask("c", "set_lr")  # without lr
    ask("d", "set_lr", lr=-1.0)
    ask("e", "validate")  # the run has just ended
    ask("f", "set_lr", lr=0.5)
    await settle()
    (_, _, paused), (command, by, lr_set) = stage.run.given
    assert (command, by) == (SetLearningRate(0.5), "viewer 127.0.0.1")
    stage.run.step = 17
    paused.set_result(None)
    lr_set.set_exception(RunEndedError("the run ended before set_lr could be applied"))
    await read(link, page)
    assert page.acks == {
        "a": ["accepted", "applied"],
        "b": ["rejected"],
        "c": ["rejected"],
        "d": ["rejected"],
        "e": ["rejected"],
        "f": ["accepted", "rejected"],
    }


def test_many_viewers_share_the_frames_of_five() -> None:
    async def play(stage: Stage) -> None:
        pages = [PageModel() for _ in range(40)]
        stage.steps(3)
        for count, page in enumerate(pages, start=1):
            await read(stage.join(page), page)
            assert stage.hub.pace == pytest.approx(1e-6 * max(1.0, count / 5))
        stage.steps(3)
        for link, page in zip(stage.links, pages, strict=True):
            await read(link, page)
            assert_equal_state(stage, page)

    run_async(play)


@with_page
async def test_a_flood_of_commands_is_refused(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    for number in range(30):
        link.say(CommandRequest(id=f"c{number}", name="pause", run="run"))
    await read(link, page)
    assert 10 <= len(stage.run.given) <= 12
    assert page.acks["c29"] == ["rejected"]


@with_page
async def test_a_command_that_cannot_be_applied_in_time_is_taken_back(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    link.say(CommandRequest(id="a", name="pause", run="run", ttl=0.001))
    await settle()
    stage.hub._commands.expire(math.inf)
    await read(link, page)
    assert page.acks["a"] == ["accepted", "expired"]
    assert stage.run.given[0][-1].cancelled()


@pytest.mark.parametrize(
    ("message", "why"),
    [
        pytest.param("nonsense", "malformed", id="no-json"),
        pytest.param(b"\x00\xff", "", id="binary"),
        pytest.param('{"type":"fly"}', "fly", id="unknown-kind"),
        pytest.param('{"type":"drawn","more":1}', "more", id="unknown-field"),
        pytest.param('{"type":"show","series":["0"]}', "series", id="wrong-type"),
        pytest.param(Show(series=[99]), "no curve 99", id="no-such-curve"),
        pytest.param(Show(series=[-1]), "no curve -1", id="negative-curve"),
        pytest.param(Show(series=[], points=10**9), "points", id="too-many-points"),
        pytest.param(RangeQuery(query=1, series=[0], start=2, end=1), "start", id="backwards"),
        pytest.param(RangeQuery(query=1, series=[0], start=0, end=1, points=1), "points", id="one-point"),
        pytest.param(Show(run="run", series=[99]), "no curve 99", id="no-such-curve-of-this-run"),
        pytest.param(Hi(protocol=1), "before", id="hi-twice"),
    ],
)
def test_nonsense_closes_its_own_connection_only(message: Any, why: str) -> None:
    async def play(stage: Stage) -> None:
        stage.steps(1)
        page, other = PageModel(), PageModel()
        link, other_link = stage.join(page), stage.join(other)
        await read(link, page)
        link.say(message)
        await settle()
        assert link.closed is not None
        assert link.closed[0] == CLOSE_PROTOCOL and why in link.closed[1]
        stage.tell(EpochStart())
        await read(other_link, other)
        assert other.milestones[-1]["type"] == "EpochStart" and other_link.closed is None

    run_async(play)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    schedule=st.lists(
        st.tuples(st.sampled_from(["steps", "change", "read", "show", "ask", "draw"]), st.integers(1, 4)),
        max_size=30,
    )
)
def test_what_a_viewer_says_may_cross_a_change_of_the_run(schedule: list[tuple[str, int]]) -> None:
    """Its ids are those of the run that it knew when it spoke: they are never taken for another run's."""

    async def play(stage: Stage) -> None:
        other = LiveRun(source_of(FakeRun("other")), TrainStart(run_id="other", step=0, epoch=0, time=1.0))
        stage.hub.runs[other.key] = other
        lives, page = [stage.live, other], PageModel()
        stage.steps(3, one=1.0, two=2.0)  # curves that the other run does not have
        link = stage.join(page)
        await read(link, page)
        (connection,) = stage.hub.connections
        for action, argument in schedule:
            match action:
                case "steps":
                    stage.live = lives[argument % 2]
                    stage.steps(argument)
                case "change":
                    watched = connection.viewer.live
                    stage.hub._watch(connection, lives[watched is lives[0]])
                case "read":
                    for _ in range(argument):
                        await settle()
                        if (taken := link.take()) is not None:
                            page.take(*taken)
                case "show":
                    link.say(page.show(sorted(page.series)))
                case "ask" if page.run is not None:
                    key, ids = page.run.key, sorted(page.series)
                    link.say(RangeQuery(run=key, query=len(page.ranges), series=ids, start=0, end=1e9))
                case "draw" if page.owes_drawn:
                    link.say(page.drawn())
        await settle()
        if page.owes_drawn:
            link.say(page.drawn())
        await read(link, page)
        assert link.closed is None
        assert connection.viewer.live is not None
        stage.live = connection.viewer.live
        link.say(page.show(sorted(page.series)))
        await read(link, page)
        assert page.run is not None and page.run.key == stage.live.key
        assert_equal_state(stage, page)

    run_async(play)


# Several runs at once -----------------------------------------------------------------------------


class Stages:
    """A hub with several runs that are driven by hand."""

    def __init__(self, stage: Stage, count: int) -> None:
        self.stage = stage
        self.lives = [stage.live]
        self.steps_done = [0] * count
        for number in range(1, count):
            start = TrainStart(run_id=f"run{number}", step=0, epoch=0, time=1.0)
            self.lives.append(LiveRun(source_of(FakeRun(f"run{number}")), start))
            stage.hub.runs[self.lives[-1].key] = self.lives[-1]

    def steps(self, number: int, count: int, **values: float) -> None:
        """Have one of the runs do steps."""
        with self.on(number) as stage:
            stage.steps(count, **values)

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[Stage]:
        """Have the stage be about one of the runs."""
        stage = self.stage
        stage.live, stage.step = self.lives[number], self.steps_done[number]
        yield stage
        self.steps_done[number] = stage.step


OVERLAY_ACTIONS = st.one_of(
    st.tuples(st.just("steps"), st.integers(0, 3), st.integers(1, 30)),
    st.tuples(st.just("metric"), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("milestone"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("overlay"), st.integers(0, 15), st.just(0)),
    st.tuples(st.just("watch"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("show"), st.integers(0, 7), st.integers(0, 4)),
    st.tuples(st.just("ask"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("read"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("draw"), st.just(0), st.just(0)),
    st.tuples(st.just("drop"), st.just(0), st.just(0)),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.lists(OVERLAY_ACTIONS, max_size=40), room=st.sampled_from([1, 3, 50]))
def test_after_any_schedule_a_viewer_of_several_runs_has_all_points_of_each(
    schedule: list[tuple[str, int, int]], room: int
) -> None:
    """The page itself fails where a point comes twice, a frame without credit, or a milestone of another run."""

    async def play(stage: Stage) -> None:
        runs = Stages(stage, 4)
        runs.steps(1, 3, one=1.0)
        page = PageModel()
        link = stage.join(page, room=room)

        def models() -> list[PageModel]:
            return [page, *page.others.values()]

        async def read_some(count: int) -> None:
            for _ in range(count):
                await settle()
                if (taken := link.take()) is not None:
                    page.take(*taken)

        for action, first, second in schedule:
            match action:
                case "steps":
                    runs.steps(first, second)
                case "metric":
                    runs.steps(first, 1, **{f"metric_{second}": 0.5})
                case "milestone":
                    with runs.on(first):
                        stage.tell(EpochStart())
                case "overlay":
                    keys = [live.key for number, live in enumerate(runs.lives) if first >> number & 1]
                    link.say(Overlay(runs=[*keys, "gone"]))
                case "watch":
                    await settle()
                    if not stage.hub._watching(runs.lives[first]):
                        link.say(Watch(run=runs.lives[first].key))
                case "show":
                    await settle()
                    model = models()[second % len(models())]
                    link.say(model.show([curve for curve in model.series if (first >> curve % 3) & 1]))
                case "ask" if models()[first % len(models())].series:
                    model = models()[first % len(models())]
                    key = None if model.run is None else model.run.key
                    link.say(RangeQuery(run=key, query=1, series=sorted(model.series), start=0, end=1e9))
                case "read":
                    await read_some(first)
                case "draw" if page.owes_drawn:
                    link.say(page.drawn())
                case "drop":
                    link.drop()
                    await settle()
                    link = stage.join(page, room=room)
                    page.shown = []
        await settle()
        if page.owes_drawn:
            link.say(page.drawn())
        await read(link, page)
        assert link.closed is None
        link.say(Overlay(runs=[live.key for live in runs.lives]))
        await read(link, page)
        assert page.run is not None
        assert {page.run.key, *page.others} == {live.key for live in runs.lives}
        for model in models():
            link.say(model.show(sorted(model.series)))
        await read(link, page)
        for number in range(4):  # also after the snapshots
            runs.steps(number, 2)
        await read(link, page)
        for number, live in enumerate(runs.lives):
            with runs.on(number):
                model = page.others.get(live.key, page)
                if model is page:
                    assert_equal_state(stage, page)
                else:
                    model.milestones = [{"seq": each.seq} for each in live.milestones]
                    assert_equal_state(stage, model)
                    assert model.status is not None

    run_async(play)


@with_page
async def test_an_overlaid_run_sends_all_but_its_milestones(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    runs = Stages(stage, 3)
    runs.steps(1, 3)
    link.say(Overlay(runs=["run1", "unknown", "run"]))
    await read(link, page)
    assert set(page.others) == {"run1"}
    other = page.others["run1"]
    assert other.run is not None and other.run.overlaid
    assert other.series == {0: "loss", 1: "lr"}
    assert other.status is not None and other.latest is not None and other.latest.values["1"][0] == 0.1
    link.say(other.show([0]))
    await read(link, page)
    assert len(other.points[0]) == 3
    with runs.on(1):
        stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.5)))
    await read(link, page)
    assert other.series[2] == "val_loss" and page.milestones == []
    # Without it in the next message nothing more comes of it.
    link.say(Overlay(runs=[]))
    await settle()
    runs.steps(1, 3)
    await read(link, page)
    assert len(other.points[0]) == 3


@with_page
async def test_an_overlaid_run_that_is_watched_from_then_on_sends_its_milestones(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    runs = Stages(stage, 2)
    with runs.on(1):
        stage.tell(EpochStart())
    link.say(Overlay(runs=["run1"]))
    await read(link, page)
    assert page.milestones == []
    link.say(Watch(run="run1"))
    await read(link, page)
    assert page.run is not None and (page.run.key, page.run.overlaid) == ("run1", False)
    assert page.others == {} and [event["type"] for event in page.milestones] == ["EpochStart"]
    (connection,) = stage.hub.connections
    assert [connection.viewer.has(live) for live in runs.lives] == [False, True]


@with_page
async def test_a_run_that_is_let_go_is_no_longer_overlaid(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    runs = Stages(stage, ENDED_RUNS_KEPT + 2)
    link.say(Overlay(runs=["run1", "run2"]))
    await read(link, page)
    for number in range(1, ENDED_RUNS_KEPT + 2):
        with runs.on(number):
            stage.tell(TrainEnd(status="completed"))
    stage.hub._forget_old_runs()
    (connection,) = stage.hub.connections
    assert "run1" not in stage.hub.runs
    assert [connection.viewer.has(live) for live in runs.lives[:3]] == [True, False, True]


@with_page
async def test_overlaid_runs_take_turns(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    """One answer in many frames holds up no other run, nor does a run with new points all the time."""
    runs = Stages(stage, 3)
    for number in range(3):
        runs.steps(number, 20_000)
    await read(link, page)
    link.say(Overlay(runs=["run1", "run2"]))
    await read(link, page)
    for model in (page, *page.others.values()):
        link.say(model.show([0]))
    await read(link, page)
    link.say(RangeQuery(run="run1", query=1, series=[0, 1], start=0, end=1e9, points=0))
    await settle()
    order: list[str] = []
    for _ in range(9):
        for number in range(3):
            runs.steps(number, 1)
        while (taken := link.take()) is None or taken[1]:
            if taken is not None:
                page.take(*taken)
            await settle()
        page.take(*taken)
        order.append(decode_chart(taken[0]).header.run)
        link.say(page.drawn())
        await settle()
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:9]) == ["run", "run1", "run2"]


def test_viewers_with_the_same_runs_share_the_frames_of_each() -> None:
    async def play(stage: Stage) -> None:
        runs = Stages(stage, 2)
        runs.steps(0, 1)
        runs.steps(1, 1)
        pages = [PageModel(), PageModel()]
        for page, watched, other in zip(pages, ("run", "run1"), ("run1", "run"), strict=True):
            link = stage.join(page)
            await read(link, page)
            link.say(Watch(run=watched))
            link.say(Overlay(runs=[other]))
            await read(link, page)
            for model in (page, *page.others.values()):
                link.say(model.show([0, 1]))
            await read(link, page)
        runs.steps(1, 5)
        await settle()
        first, second = ([data for data, text in link.sent if not text] for link in stage.links)
        assert len(first) == len(second) == 1 and first[0] is second[0]

    run_async(play)


def test_a_viewer_counts_once_for_each_run_that_goes_on() -> None:
    async def play(stage: Stage) -> None:
        runs = Stages(stage, 10)
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        link.say(Overlay(runs=[live.key for live in runs.lives[:9]]))
        await read(link, page)
        assert stage.hub.pace == pytest.approx(2e-6)
        for number in range(9):
            with runs.on(number):
                stage.tell(TrainEnd(status="completed"))
        assert stage.hub.pace == pytest.approx(1e-6)

    run_async(play)


@with_page
async def test_more_runs_than_allowed_are_refused(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    link.say(Overlay(runs=[str(number) for number in range(MAX_OVERLAID + 1)]))
    await read(link, page)
    assert link.closed == (CLOSE_PROTOCOL, "at most 9 runs can be overlaid, got 10")


def test_a_viewer_of_one_run_only_waits_for_it_and_is_shown_no_other() -> None:
    async def play(stage: Stage) -> None:
        page = PageModel()
        link = MemoryLink()
        stage.links.append(link)
        link.say(Hi(protocol=1, run="later", only=True))
        stage.tasks.start_soon(lambda: stage.hub.serve(link, visitor=Known("control"), address="127.0.0.1"))
        await read(link, page)
        assert page.hello is not None and page.hello.run is None and page.run is None
        for name in ("another", "later"):
            live = LiveRun(source_of(FakeRun(name)), TrainStart(run_id=name, step=0, epoch=0, time=1.0))
            stage.tasks.start_soon(stage.hub.follow, live, Quiet())  # type: ignore[arg-type]
            await read(link, page)
            assert page.run is None or page.run.key == "later"
        assert page.run is not None and page.run.key == "later"

    run_async(play)


class Quiet:
    """A subscription to a run that says nothing."""

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None: ...

    def take(self, limit: int) -> list[Any]:
        return []

    async def wait(self, *, samples: bool) -> bool:
        await anyio.sleep_forever()
        return False


@with_page
async def test_a_run_that_was_let_go_is_not_watched_and_the_list_says_so(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    link.say(Watch(run="let go"))
    await read(link, page)
    assert link.closed is None
    assert page.runs == ["run"] and page.run is not None and page.run.key == "run"


@pytest.mark.parametrize("first", ["nonsense", Ping(sent=1.0), Hi(protocol=2)])
def test_who_does_not_say_hi_is_not_let_in(first: Any) -> None:
    async def play(stage: Stage) -> None:
        link = MemoryLink()
        stage.links.append(link)
        link.say(first)
        stage.tasks.start_soon(lambda: stage.hub.serve(link, visitor=Known("control"), address="x"))
        await settle()
        assert link.closed is not None and link.closed[0] == CLOSE_PROTOCOL
        assert stage.hub.connections == []

    run_async(play)


def test_a_viewer_that_reads_nothing_is_cut_off_and_costs_the_others_nothing() -> None:
    async def play(stage: Stage) -> None:
        stuck, page = PageModel(), PageModel()
        stuck_link, link = stage.join(stuck, room=1), stage.join(page)
        await settle()
        for _ in range(2 * MAX_WAITING_TEXTS):
            stage.tell(EpochStart())
            await read(link, page)
        assert len(page.milestones) == 2 * MAX_WAITING_TEXTS
        assert len(stuck_link.sent) == 1  # the rest was never more than the bound, and is gone with it
        (connection,) = [each for each in stage.hub.connections if each.link is stuck_link]
        assert connection.close is not None and connection.close[0] == CLOSE_SLOW
        assert len(connection.viewer._texts) <= MAX_WAITING_TEXTS + 8

    run_async(play)


def test_viewers_that_show_the_same_share_one_encoding() -> None:
    async def play(stage: Stage) -> None:
        stage.steps(1)
        pages = [PageModel() for _ in range(3)]
        links = [stage.join(page) for page in pages]
        for page, link in zip(pages, links, strict=True):
            await read(link, page)
            link.say(page.show([0, 1] if page is not pages[2] else [0]))
            await read(link, page)
        stage.steps(5)
        await settle()
        first, second, third = ([data for data, text in link.sent if not text] for link in links)
        assert first[0] is second[0]
        assert first[0] != third[0]

    run_async(play)


def test_viewers_of_a_run_get_their_frames_together_whenever_they_came() -> None:
    async def play(stage: Stage) -> None:
        pages = [PageModel(), PageModel()]
        stage.steps(1)
        for page in pages:
            link = stage.join(page)
            await read(link, page)
            link.say(page.show([0, 1]))
            await read(link, page)
            stage.steps(1)
            await read(link, page)

        def take_in(step: int) -> None:
            event = StepEnd(run_id="run", seq=step, time=90.0 + step, epoch=0, step=step, loss=0.5, lr=0.1)
            stage.hub._send_milestones(stage.live, stage.live.take_in([event]))

        for link, page in zip(stage.links, pages, strict=True):
            await read(link, page)
        before = [len(link.sent) for link in stage.links]
        for step in (4, 5):
            take_in(step)
            await settle()
        assert [len(link.sent) for link in stage.links] == before  # it is not time for a frame
        stage.hub._tick(stage.live)
        await settle()
        first, second = ([data for data, text in link.sent if not text] for link in stage.links)
        assert len(first) == len(second) == 1 and first[0] is second[0]
        take_in(6)
        for link, page in zip(stage.links, pages, strict=True):
            await read(link, page)  # which gives credit for a frame that it is not time for
            assert set(page.points[0]) == {1.0, 2.0, 3.0, 94.0, 95.0}  # by time

    run_async(play)


def test_a_milestone_is_encoded_once_for_all_viewers_of_a_role() -> None:
    async def play(stage: Stage) -> None:
        def told(link: MemoryLink) -> list[bytes]:
            return [data for data, _ in link.sent if data.startswith(b'{"type":"milestone"')]

        present = [stage.join(PageModel()) for _ in range(2)]
        await settle()
        stage.tell(CallbackFailed(callback="Mine", event="EpochEnd", error="ValueError", traceback="secret"))
        late = stage.join(PageModel())
        await settle()
        (first,), (second,), (third,) = map(told, [*present, late])
        assert first is second is third
        reader = stage.join(PageModel(), role="read_only")
        await settle()
        assert b"secret" in first and b"secret" not in told(reader)[0]

    run_async(play)


class Report(Event, frozen=True, kw_only=True):
    text: str


def seqs(page: PageModel) -> list[int]:
    return [event["seq"] for event in page.milestones]


def test_a_viewer_that_streams_gets_samples_in_order_with_the_milestones() -> None:
    async def play(stage: Stage) -> None:
        plain, streaming = PageModel(), PageModel()
        links = {stage.join(plain): plain, (link := stage.join(streaming)): streaming}
        await settle()
        link.say(Stream())
        await settle()
        stage.steps(3)
        stage.tell(Report(run_id="run", text="now"))
        stage.steps(1_200)
        for each, page in links.items():
            await read(each, page)
        assert plain.streamed == [] and seqs(plain) == seqs(streaming)
        assert [event["step"] for event in streaming.streamed] == list(range(1, 1_204))
        assert streaming.dropped == 0
        link.say(Stream(on=False))
        await settle()
        stage.steps(5)
        await read(link, streaming)
        assert len(streaming.streamed) == 1_203

    run_async(play)


def test_a_viewer_that_streams_too_slowly_loses_the_oldest_samples_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(viewer_module, "MAX_WAITING_SAMPLES", 1_000)

    async def play(stage: Stage) -> None:
        page = PageModel()
        link = stage.join(page, room=1)
        await settle()
        link.say(Stream())
        await read(link, page)
        for _ in range(30):
            stage.steps(100)
            await settle()
        await read(link, page)
        steps = [event["step"] for event in page.streamed]
        assert steps == sorted(steps) and steps[-1] == 3_000
        assert page.dropped >= 1_900 and page.dropped + len(steps) == 3_000

    run_async(play)


def bounded(stage: Stage, reports: int) -> Callable[[], Report]:
    """Give a run room for some reports, and return what makes them."""
    report = Report(run_id="run", text="x" * 10_000)
    size = Milestones("run").add([report])[0].size
    stage.live.milestones = Milestones("run", most_bytes=reports * (size + 200))
    return lambda: Report(run_id="run", text="x" * 10_000)


@pytest.mark.parametrize("role", ["control", "read_only"])
def test_beyond_their_bytes_the_oldest_milestones_go_and_new_viewers_learn_how_many(role: Any) -> None:
    async def play(stage: Stage) -> None:
        make = bounded(stage, 5)
        early, late = PageModel(), PageModel()
        link = stage.join(early, role=role)
        for _ in range(20):
            stage.tell(make())
            await read(link, early)
        assert seqs(early) == list(range(20)) and early.missed == 0  # nothing went before it was sent
        assert len(stage.live.milestones) == 5 and stage.live.milestones.dropped == 15
        link = stage.join(late, role=role)
        await read(link, late)
        assert seqs(late) == list(range(15, 20)) and late.missed == 15

    run_async(play)


def test_milestones_that_wait_for_a_slow_viewer_take_no_more_memory_than_those_that_are_kept() -> None:
    """It hears that it has missed some, and then gets the rest."""

    async def play(stage: Stage) -> None:
        make = bounded(stage, 5)
        page = PageModel()
        link = stage.join(page, room=1)
        await settle()
        for _ in range(100):
            stage.tell(make())
            await settle()
        (connection,) = stage.hub.connections
        waiting = [each for each in connection.viewer._texts if isinstance(each, KeptMilestone)]
        assert sum(len(each.message(is_control=True) or b"") for each in waiting) <= 5 * 10_300
        while link.sent:
            await read(link, page)
        assert seqs(page)[-5:] == list(range(95, 100))
        assert page.missed == 95
        assert connection.close is None

    run_async(play)


def test_a_new_viewer_sees_the_status_and_the_curves_before_the_milestones() -> None:
    async def play(stage: Stage) -> None:
        stage.steps(1)
        stage.tell(Report(text="x"))
        link = stage.join(PageModel())
        await settle()
        kinds = [msgspec.json.decode(data)["type"] for data, text in link.sent if text]
        assert kinds[:5] == ["hello", "run", "status", "series", "milestone"]

    run_async(play)


def test_the_stalled_and_the_unknown_are_said() -> None:
    async def play(stage: Stage) -> None:
        stage.steps(2)
        status = stage.live.status(viewers=0, is_control=True)
        assert status.stalled is not None  # these steps were long ago
        assert status.waiting_for == "train.py:7, in slow_loader"
        assert stage.live.status(viewers=0, is_control=False).waiting_for == ""

    run_async(play)


def test_a_burst_of_milestones_is_no_sign_of_a_slow_viewer() -> None:
    async def play(stage: Stage) -> None:
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        (connection,) = stage.hub.connections
        for burst in range(3):
            events = [EpochStart() for _ in range(3 * MAX_WAITING_TEXTS)]
            for number, event in enumerate(events, start=stage.seq):
                msgspec.structs.force_setattr(event, "seq", number)
            stage.seq += len(events)
            stage.hub._send_milestones(stage.live, stage.live.take_in(events))
            if burst < 2:
                await read(link, page)
        stage.tell(EpochStart())  # one behind is forgiven
        assert connection.close is None
        await read(link, page)
        assert [event["seq"] for event in page.milestones] == list(range(stage.seq))

    run_async(play)


def test_a_viewer_that_lags_is_told_and_gets_frames_of_bounded_size() -> None:
    """With few curves one reduced delta, with many snapshots in parts; either way the page ends with the run."""

    async def play(stage: Stage, metrics: int) -> None:
        values = {f"metric_{number}": float(number) for number in range(metrics)}
        stage.steps(1, **values)
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        link.say(page.show(sorted(page.series), points=500))
        await read(link, page, draws=False)
        assert page.owes_drawn
        stage.steps(3 * DELTA_POINTS, **values)
        link.say(page.drawn())
        sizes, reduced = [], False
        while True:
            await settle()
            if (taken := link.take()) is None:
                break
            if not taken[1]:
                sizes.append(len(taken[0]))
                reduced |= any(column.reduced for column in decode_chart(taken[0]).header.series)
            page.take(*taken)
            if page.owes_drawn:
                link.say(page.drawn())
        assert reduced
        assert max(sizes) < MAX_CHART_FRAME + 100_000
        stage.steps(1, **values)
        await read(link, page)
        last = 1.0 + stage.seq - 1
        assert all(last in page.points[curve] for curve in page.points)

    for metrics in (0, 60):
        run_async(functools.partial(play, metrics=metrics))


@with_page
async def test_an_answer_goes_to_nobody_who_may_not_give_the_command(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    link.say(CommandRequest(id="known", name="pause", run="run"))
    await read(link, page)
    reader = PageModel()
    reading = stage.join(reader, role="read_only")
    await read(reading, reader)
    reading.say(CommandRequest(id="known", name="pause", run="run"))
    await read(reading, reader)
    stage.run.given[0][-1].set_result(None)
    await read(link, page)
    await read(reading, reader)
    assert page.acks == {"known": ["accepted", "applied"]} and reader.acks == {"known": ["rejected"]}


@with_page
async def test_what_is_remembered_of_a_command_is_neither_its_viewer_nor_the_runs_frames(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    link.say(CommandRequest(id="failed", name="pause", run="run"))
    link.say(CommandRequest(id="pending", name="pause", run="run"))
    await read(link, page)
    stage.run.given[0][-1].set_exception(RunEndedError("too late"))
    link.drop()
    await settle()
    assert [command.connection for command in stage.hub._commands._known.values()] == [None, None]
    assert stage.hub._commands._known["failed"].future is None
    link = stage.join(page)  # it comes back, and asks what has become of them
    for request in ("failed", "pending"):
        link.say(CommandRequest(id=request, name="pause", run="run"))
    await read(link, page)
    stage.run.given[1][-1].set_result(None)
    await read(link, page)
    assert page.acks == {"failed": ["accepted", "rejected"], "pending": ["accepted", "accepted", "applied"]}
    assert len(stage.run.given) == 2


def test_who_comes_while_the_last_one_goes_does_not_hold_up_the_end() -> None:
    async def play(stage: Stage) -> None:
        first, second = PageModel(), PageModel()
        first_link = stage.join(first)
        await settle()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stage.hub.wait_until_empty)
                await settle()
                second_link = stage.join(second)
                await settle()
                first_link.drop()
                second_link.drop()

    run_async(play)


def test_who_is_told_of_a_curve_at_the_very_end_can_still_show_it() -> None:
    """A run of one epoch has its first validation just before its end."""

    async def play(stage: Stage) -> None:
        stage.steps(1)
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        link.say(page.show(sorted(page.series)))
        await read(link, page)
        stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.5)))
        stage.tell(TrainEnd(status="completed"))
        stage.hub.say_goodbye(1001, "the run is over")
        await read(link, page)
        assert link.closed is None
        link.say(page.show(sorted(page.series)))
        await read(link, page, draws=False)
        assert link.closed == (1001, "the run is over")
        (curve,) = [number for number, key in page.series.items() if key == "val_loss"]
        assert list(page.points[curve].values()) == [0.5]

    run_async(play)


class Broken:
    """A subscription that cannot be read."""

    def __enter__(self) -> "Broken":
        return self

    def __exit__(self, *_: object) -> None: ...

    def take(self, limit: int) -> list[Any]:
        return []

    async def wait(self, *, samples: bool) -> bool:
        raise RuntimeError("a defect")


def test_a_defect_in_one_run_ends_that_run_here_and_leaves_the_others_alone() -> None:
    async def play(stage: Stage) -> None:
        page, other = PageModel(), PageModel()
        link, other_link = stage.join(page), stage.join(other)
        await read(link, page)
        live = LiveRun(source_of(FakeRun("broken")), TrainStart(run_id="broken", step=0, epoch=0, time=1.0))
        with pytest.raises(ExceptionGroup) as defects:
            await stage.hub.follow(live, Broken())  # type: ignore[arg-type]
        assert [str(each) for each in defects.value.exceptions] == ["a defect"]
        assert live.is_over
        stage.tell(EpochStart())
        await read(link, page)
        await read(other_link, other)
        assert page.runs == other.runs == ["run", "broken"]
        assert page.milestones[-1]["type"] == other.milestones[-1]["type"] == "EpochStart"

    run_async(play)


@pytest.mark.parametrize("world_size", [1, 8])
def test_page_learns_how_many_ranks_a_run_has(world_size: int) -> None:
    async def play(stage: Stage) -> None:
        start = TrainStart(run_id="ranks", step=0, epoch=0, time=1.0, world_size=world_size)
        live = LiveRun(source_of(FakeRun("ranks")), start)
        stage.hub.runs[live.key] = live
        page = PageModel()
        link = stage.join(page)
        await read(link, page)
        link.say(Watch(run=live.key))
        await read(link, page)
        assert page.run is not None
        assert (page.run.key, page.run.world_size) == (live.key, world_size)

    run_async(play)


def test_text_that_is_no_text_goes_out_with_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a file may be any bytes: on the command line, and in what was raised about it."""
    monkeypatch.setattr("sys.argv", ["train.py", "caf\udce9"])

    async def play(stage: Stage) -> None:
        page = PageModel()
        link = stage.join(page)
        stage.tell(TrainEnd(status="failed", error="ValueError: caf\udce9"))
        stage.hub._send_status(stage.live)
        await read(link, page)
        assert link.closed is None
        assert page.run is not None and page.run.command == ["train.py", r"caf\udce9"]
        assert page.milestones[-1]["error"] == r"ValueError: caf\udce9"
        assert page.status is not None and page.status.error == r"ValueError: caf\udce9"

    run_async(play)


def test_a_slow_viewer_of_a_run_that_is_let_go_is_closed_like_any_other() -> None:
    async def play(stage: Stage) -> None:
        stage.steps(1)
        page = PageModel()
        link = stage.join(page, room=8)
        await read(link, page)
        link.say(page.show([0]))
        await read(link, page)
        stage.steps(1)
        for _ in range(2 * MAX_WAITING_TEXTS):  # it takes none of them
            stage.tell(EpochStart())
            await settle()
        stage.steps(1)
        stage.tell(TrainEnd(status="completed"))
        for number in range(ENDED_RUNS_KEPT):
            live = LiveRun(source_of(FakeRun(f"{number}")), TrainStart(run_id="x", step=0, epoch=0, time=1.0))
            live.take_in([TrainEnd(status="completed")])
            stage.hub.runs[live.key] = live
        stage.hub._forget_old_runs()
        assert stage.live.key not in stage.hub.runs
        stage.hub.say_goodbye(1001, "the run is over")
        await read(link, page, draws=False)
        assert link.closed is not None and link.closed[0] == CLOSE_SLOW

    run_async(play)


def test_a_run_that_falls_silent_ends_like_the_run() -> None:
    async def play(stage: Stage) -> None:
        stage.run.state = "completed"
        assert stage.live.state == "closing"  # its last events are on their way
        stage.live.finish()
        assert stage.live.state == "completed" and stage.live.is_over

    run_async(play)


@with_page
async def test_a_list_is_answered_and_kept_up_to_date(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.steps(40)
    stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.5)))
    stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.25)))
    stage.tell(ValidationEnd(metrics=Metrics(val_loss=math.nan)))
    await read(link, page)
    assert not page.rows, "nobody asked"
    link.say(ListRuns())
    await read(link, page)
    mine = page.rows["run"]
    assert (mine.id, mine.state, mine.live, mine.step, mine.monitor) == (
        "run",
        "running",
        True,
        40,
        "val_loss",
    )
    assert mine.figures["val_loss"].last == "NaN" and mine.figures["val_loss"].best == 0.25
    assert mine.figures["loss"].last == 1 / 40 and mine.figures["lr"].best is None
    assert mine.sparkline == [0.5, 0.25]
    assert mine.started == 1.0 and mine.heard == stage.seq

    stage.steps(1)
    await read(link, page)
    assert page.rows["run"].step == 40, "not with each step"
    stage.hub._send_rows()  # as the beat does once a second
    await read(link, page)
    assert page.rows["run"].step == 41
    link.say(ListRuns(on=False))
    await read(link, page)
    stage.tell(TrainEnd(status="failed", error="ValueError: no"))
    stage.hub._send_rows()
    await read(link, page)
    assert page.rows["run"].state == "running", "it does not listen"
    link.say(ListRuns())
    await read(link, page)
    assert (page.rows["run"].state, page.rows["run"].why) == ("failed", "ValueError: no")
    assert not page.rows["run"].live


@with_page
async def test_of_two_thousand_metrics_the_first_and_the_monitored_are_listed(
    stage: Stage, page: PageModel, link: MemoryLink
) -> None:
    stage.tell(StepEnd(step=1, loss=1.0, lr=0.1, metrics=Metrics({f"m{n}": float(n) for n in range(1_900)})))
    stage.tell(ValidationEnd(metrics=Metrics(val_loss=0.5)))
    row = row_of(stage.live)
    figures = row.figures
    assert len(figures) == MAX_FIGURES + 1
    assert row.metrics == len(stage.live.series) > 1_900
    assert "val_loss" in figures and "m0" in figures and "m1899" not in figures


@with_page
async def test_a_run_without_a_step_has_a_row(stage: Stage, page: PageModel, link: MemoryLink) -> None:
    mine = row_of(stage.live)
    assert (mine.key, mine.state, mine.figures, mine.sparkline, mine.heard) == ("run", "waiting", {}, [], 1.0)
