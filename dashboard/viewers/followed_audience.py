"""FollowedAudience: connects the followed runs of a hub with its viewers. Event loop of the dashboard only."""

from collections.abc import Callable, Sequence
from typing import Protocol

from offloop.dashboard.protocol.from_server import RunRow
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.milestones import KeptMilestone
from offloop.dashboard.runs.rows import RunList
from offloop.dashboard.viewers.connection import Connection


class Screens(Protocol):
    """What the hub does for its viewers, whichever runs they have."""

    runs: dict[str, LiveRun]
    connections: list[Connection]
    list: RunList

    def begin_anew(self, live: LiveRun, *, is_new_attempt: bool = False) -> None:
        """Have the viewers that want a run, or have an earlier version of it, begin with this one."""

    def distribute(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        """Send what a run has taken in to its viewers."""

    def send_runs(self) -> None:
        """Send the names of all runs."""

    def send_rows(self) -> None:
        """Send the first rows of a directory at once."""

    def tell_missing(self, key: str) -> None:
        """Tell the viewers that want a run that there is none."""


class FollowedAudience:
    """The viewers of a hub, as `FollowedRuns` sees them."""

    def __init__(self, screens: Screens, changed: Callable[[str], None], *, is_eager: bool) -> None:
        """Serve the viewers of a hub.

        Args:
            screens: The hub.
            changed: Called with the key of a run whose status is to be sent again.
            is_eager: True if the names of all runs are wanted as soon as there is a viewer.
        """
        self._screens = screens
        self._changed = changed
        self._is_eager = is_eager
        self._rows: dict[str, RunRow] = {}
        self._hidden: frozenset[str] = frozenset()
        screens.list.is_whole = False

    def wanted(self, newest: str | None) -> frozenset[str]:
        screens = self._screens
        keys: set[str] = set()
        for connection in screens.connections:
            viewer = connection.viewer
            if viewer.awaits is not None:
                # The run that it has until then need not stay open.
                keys.add(viewer.awaits)
            elif viewer.live is not None:
                keys.add(viewer.live.key)
            elif self._is_eager and newest is not None:
                keys.add(newest)
            keys.update(connection.overlaid)
        return frozenset(keys - screens.runs.keys())

    def show(self, live: LiveRun, *, is_new_attempt: bool = False) -> None:
        self._screens.begin_anew(live, is_new_attempt=is_new_attempt)

    def distribute(self, live: LiveRun, milestones: Sequence[KeptMilestone]) -> None:
        self._screens.distribute(live, milestones)

    def changed(self, live: LiveRun) -> None:
        self._changed(live.key)

    def listed(self, rows: Sequence[RunRow], removed: Sequence[str]) -> None:
        for row in rows:
            self._rows[row.key] = row
            if row.directory not in self._hidden:
                self._screens.list.put(row)
        for key in removed:
            self._rows.pop(key, None)
            if key not in self._screens.runs:
                self._screens.list.remove(key)

    def named(self, *, is_first: bool) -> None:
        if is_first:
            self._screens.list.is_whole = True
            self._screens.send_rows()
        if self._is_eager:
            self._screens.send_runs()

    def missing(self, key: str) -> None:
        self._screens.tell_missing(key)

    def is_listening(self) -> bool:
        connections = self._screens.connections
        return bool(connections) if self._is_eager else any(each.rows is not None for each in connections)

    def is_training(self) -> bool:
        return any(not live.is_over for live in tuple(self._screens.runs.values()))

    def hide_runs_of_this_process(self) -> None:
        """Leave the directories of runs that this process has in the list itself out of it."""
        runs = self._screens.runs
        hidden = frozenset(live.info.directory for live in runs.values() if live.info.directory is not None)
        if hidden == self._hidden:
            return
        before, self._hidden = self._hidden, hidden
        for key, row in self._rows.items():
            if row.directory in hidden:
                if key not in runs:
                    self._screens.list.remove(key)
            elif row.directory in before:
                self._screens.list.put(row)
