"""Watch: a run in another process or on another machine, as a program sees and steers it."""

import contextlib
import itertools
import ssl as ssl_module
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, overload

import anyio
import msgspec

from offloop.dashboard.client.address import Address
from offloop.dashboard.client.connection import Connection
from offloop.dashboard.client.curves import MetricCurve
from offloop.dashboard.client.facts import RunFacts
from offloop.dashboard.protocol.from_server import RunInfo, RunSummary, Status
from offloop.dashboard.protocol.from_viewer import Publish
from offloop.dashboard.protocol.limits import MAX_MESSAGE, CommandName
from offloop.engine import (
    Command,
    Event,
    EventError,
    Metrics,
    Sample,
    Settings,
    Subscription,
    WatchLostError,
    checks,
    encode,
)
from offloop.engine.bus.waker import runs_event_loop
from offloop.engine.metrics.names import metric_direction
from offloop.engine.monitor import Direction
from offloop.engine.remote_run import NOT_EVERYWHERE, Places, RemoteRun

E = TypeVar("E", bound=Event)

READERS: Final = "this token may only watch: connect with the address that may steer"
BUFFER: Final = 10_000
"""Samples that a subscription holds by default, as in the process that trains."""


class Watch(RemoteRun):
    """A run that another process trains, or has trained; see `connect`.

    Its state and its commands are those of `RunHandle`, and `events` is that of `Run`. State is as new as the newest
    event that has come, or the newest command that has applied; without a connection it is what was known last. What
    only the process that trains can do says so: `call`, `cancel`, `trainer`, `result`.

    Commands return when they have applied. They raise what they raise in the process that trains, and besides:
    `CommandRejectedError`, `CommandExpiredError` when they could not be applied in time, and `CommandLostError` when
    the connection was lost for good in the middle of one, which says whether it was applied. A connection that comes
    back finds out. Unlike in the process that trains, they also wait while training waits for a decider. `publish`
    needs a connection, and raises `WatchLostError` without one.

    The properties and the `*_nowait` methods may be used from any thread, `await` in the event loop of `connect`.

    All that a program may ask of the run is here, so the class has many methods. Most have one line.
    """

    __slots__ = ("__weakref__", "_connection", "_publications")

    def __init__(
        self,
        address: Address,
        context: ssl_module.SSLContext | None,
        *,
        run: str | None,
        command_ttl: float,
        give_up_after: float,
    ) -> None:
        """Made by `connect`."""
        places = Places(lambda: False)
        places.event_loop_thread = threading.get_ident()
        super().__init__(places)
        self._publications = itertools.count()
        self._connection = Connection(
            address,
            context,
            run=run,
            give_up_after=give_up_after,
            ttl=command_ttl,
            complete=self._completed,
        )

    # The server

    @property
    def is_connected(self) -> bool:
        """True while there is a connection. Without one, the next is tried until `give_up_after`."""
        return self._connection.is_connected

    @property
    def key(self) -> str:
        """Which of the server's runs this is, as in `runs`: its name, made unique."""
        return self._info.key

    @property
    def runs(self) -> tuple[RunSummary, ...]:
        """The runs that the server has, oldest first: `key`, `name`, `state`, `started`. `connect(run=)` takes one."""
        return self._facts.runs

    @property
    def status(self) -> Status:
        """What the live page shows at its top: progress, time left, loss, speed, waiting times. At most 0.25 s old."""
        status = self._facts.status
        assert status is not None
        return status

    @property
    def curves(self) -> tuple[str, ...]:
        """Names of the metrics that have a curve so far, for `history`."""
        return tuple(self._facts.curves)

    async def history(self, metric: str) -> MetricCurve:
        """Return all points of a metric so far, as NumPy arrays: `loss`, `val_loss`, ...; `curves` has the names.

        The newest points are at most a quarter of a second old. A connection that is lost meanwhile is waited for.
        Cancellation: safe.

        Raises:
            MetricNotFoundError: The run has no such metric so far.
            WatchLostError: The connection is lost for good, or the server no longer keeps the run.
        """
        return await self._connection.curves.ask(metric, self._info.key)

    @property
    def _facts(self) -> RunFacts:
        return self._connection.facts

    @property
    def _info(self) -> RunInfo:
        info = self._connection.facts.info
        assert info is not None
        return info

    # State

    @property
    def id(self) -> str:
        return self._info.name

    @property
    def dir(self) -> Path | None:
        """Directory of the run on its own machine, None if it has none."""
        directory = self._info.directory
        return None if directory is None else Path(directory)

    @property
    def metrics(self) -> Metrics:
        return Metrics(self._facts.metrics)

    @property
    def state(self) -> str:
        """As of `Run.state`; `lost` for a run whose process has ended without saying so."""
        return self._facts.state

    @property
    def is_over(self) -> bool:
        return self._facts.is_over

    @property
    def is_saving(self) -> bool:
        return self.status.saving

    @property
    def refused(self) -> dict[str, str]:
        if self._facts.role != "control":
            return dict.fromkeys((*get_args(CommandName), "call"), READERS)
        return {**self._info.refused, "call": NOT_EVERYWHERE["call"]}

    @property
    def interrupted(self) -> bool:
        return self.status.interrupted

    @property
    def epoch(self) -> int:
        return self._facts.epoch

    @property
    def step(self) -> int:
        return self._facts.step

    @property
    def validation_batch(self) -> int:
        return self._facts.validation_batch

    @property
    def hyperparameters(self) -> Settings:
        return Settings(self._info.given_hyperparameters)

    @property
    def monitor(self) -> str:
        return self._info.monitor

    @property
    def default_monitor(self) -> str:
        return self._info.default_monitor or self._info.monitor

    def direction_of(self, metric: str) -> Direction | None:
        curve = self._facts.curves.get(metric)
        return metric_direction(metric) if curve is None or curve.better is None else curve.better

    # Events

    @overload
    def events(self, *, buffer: int = BUFFER, name: str = "events") -> Subscription[Event]: ...

    @overload
    def events(self, *types: type[E], buffer: int = BUFFER, name: str = "events") -> Subscription[E]: ...

    def events(self, *types: type[Event], buffer: int = BUFFER, name: str = "events") -> Subscription[Event]:
        """Subscribe to events, from now on; milestones since the start of the run are replayed, as of `Run.events`.

        Each milestone comes once and in order, however often the connection is lost. Those that the server no longer
        had are counted by `statistics.not_replayed`. Samples (`StepEnd`) come while there is a connection;
        `statistics.dropped` counts those that this program was too slow for. An event of a class that this program
        does not define is an `UnknownEvent`.

        The result is an iterator (`async for`) and a context manager. It ends with the run, or when the program drops
        it, as after a `break`. It raises `WatchLostError` if the connection is lost for good before. In a plain thread
        call its `take()`.

        Args:
            types: Event classes; none means all.
            buffer: Samples held for a reader that lags, at least 1.
            name: Shown in its statistics.
        """
        subscription = self._connection.feed.subscribe(types, buffer=buffer, name=name)
        if not types or any(issubclass(each, Sample) or issubclass(Sample, each) for each in types):
            self._connection.stream()
        return subscription

    # What carries commands and events

    @property
    def _has_ended(self) -> bool:
        error = self._connection.error
        if error is not None and not self.is_over:
            raise error
        return self.is_over

    @property
    def _is_closed(self) -> bool:
        return self._has_ended

    @property
    def _groups(self) -> dict[str, int]:
        return self._info.groups

    def _send_command(self, number: int, command: Command[Any], by: str | None) -> None:
        self._connection.commands.give(number, command, self._info.key, by)

    def _send_take_back(self, number: int) -> None:
        self._connection.commands.take_back(number)

    def _send_event(self, event: Event) -> None:
        if self._facts.role != "control":
            raise EventError(READERS)
        if not self.is_connected:
            raise WatchLostError(f"there is no connection now, so {type(event).__name__} is not published")
        raw = encode(event)
        if len(raw) > MAX_MESSAGE - 1024:
            raise EventError(
                f"{type(event).__name__} has {len(raw):,} bytes, and a message to the server at most {MAX_MESSAGE:,}"
            )
        number = next(self._publications)
        self._connection.post(Publish(id=f"event-{number}", run=self._info.key, event=msgspec.Raw(raw)))

    def _is_plain(self) -> bool:
        # Where no event loop runs, nothing can be awaited.
        return not runs_event_loop()


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    token: str | None = None,
    run: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    command_ttl: float = 60.0,
    give_up_after: float = 60.0,
) -> AsyncIterator[Watch]:
    """Watch and steer a run in another process or on another machine, over its live page or `offloop serve`.

        async with connect("http://gpu-box:8321/", token="...") as watch:
            async for event in watch.events(EpochEnd):
                if event.metrics["val_loss"] < 0.1:
                    await watch.stop("good enough")

    Entering it returns once the run's state and all its milestones so far are here. If the server has no run yet, it
    waits for one. A connection that is lost is made again, and catches up.

    Runs on asyncio and on trio, and loads no torch.

    Args:
        url: Address of the page, as it was printed, or without the token.
        token: Secret that the server has given. Default: that in `url`, else the environment variable `OFFLOOP_TOKEN`.
        run: Name or key of a run of that server. Default: the newest one.
        ssl: For https with a certificate that the system does not trust. Default: the system's settings.
        command_ttl: Seconds after which a command that was not applied is taken back, above 0 and at most 3600.
        give_up_after: Seconds to try again after the connection was lost, at least 0; `math.inf` for ever.

    Raises:
        ConfigError: An argument is not legal, or there is no token.
        WatchRefusedError: The server does not let this program in; `status` says why.
        WatchLostError: Nothing answers at that address, or it is no live page.
        RunNotFoundError: The server has no run `run`.
    """
    address = Address.parse(url, token)
    checks.number("command_ttl", command_ttl, above=0, at_most=3600)
    if give_up_after != float("inf"):
        checks.number("give_up_after", give_up_after, at_least=0)
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        try:
            watch = Watch(address, ssl, run=run, command_ttl=command_ttl, give_up_after=give_up_after)
            await tasks.start(watch._connection.run)
            tasks.start_soon(watch._connection.feed.tend)
            yield watch
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            # Raised below: the task group would wrap it.
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame.
            del failure
