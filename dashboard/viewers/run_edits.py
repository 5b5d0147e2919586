"""RunEdits: what viewers say about runs, from the request to its `Ack`. Event loop of the dashboard only."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from offloop.dashboard.protocol.from_server import Ack
from offloop.dashboard.protocol.from_viewer import Edit
from offloop.dashboard.runs.disk_calls import DiskCall, DiskCalls
from offloop.dashboard.viewers.connection import Connection
from offloop.engine import OffloopError, RunLabels, RunLabelsChangedError, edit_labels

EDITS_REMEMBERED: Final = 1_000


class RunEdits:
    """Writes viewers' edits to the directories of runs, each id once, and answers them."""

    def __init__(
        self,
        calls: DiskCalls,
        directory_of: Callable[[str], str | None],
        edited: Callable[[], None],
    ) -> None:
        """Write nothing yet.

        Args:
            calls: For writing files.
            directory_of: Returns the directory of a run, by its key; None for an unknown run.
            edited: Called when the files of a run have changed.
        """
        self._calls = calls
        self._directory_of = directory_of
        self._edited = edited
        # By id; None while it is written.
        self._known: OrderedDict[str, Ack | None] = OrderedDict()

    def request(self, connection: Connection, request: Edit) -> None:
        """Write an edit, and answer it when it is durable. A repeated id gets the answer again."""
        if request.id in self._known and connection.viewer.is_control:
            known = self._known[request.id]
            if known is not None:
                connection.put(known)
            return
        why = connection.why_rejected(request.id, "an edit")
        directory = self._directory_of(request.run)
        if not why and directory is None:
            why = f"there is no run {request.run!r} with a directory"
        if why or directory is None:
            connection.put(_ack(request, why))
            return
        self._known[request.id] = None
        while len(self._known) > EDITS_REMEMBERED:
            self._known.popitem(last=False)
        write = functools.partial(
            edit_labels,
            directory,
            version=request.version,
            name=request.name,
            tags=request.tags,
            note=request.note,
            archived=request.archived,
        )
        try:
            self._calls.begin(write, lambda call: self._done(connection, request, call))
        except OSError as error:
            self._answer(connection, request, str(error))

    def _done(self, connection: Connection, request: Edit, call: DiskCall[RunLabels]) -> None:
        try:
            call.result()
        except RunLabelsChangedError:
            self._answer(connection, request, "changed meanwhile by someone else")
        except OffloopError as error:
            self._answer(connection, request, str(error))
        except OSError as error:
            self._answer(
                connection, request, f"it cannot be written: {(error.strerror or str(error)).lower()}"
            )
        else:
            self._answer(connection, request, "")
            self._edited()

    def _answer(self, connection: Connection, request: Edit, why: str) -> None:
        answer = self._known[request.id] = _ack(request, why)
        connection.put(answer)


def _ack(request: Edit, why: str) -> Ack:
    return Ack(id=request.id, name="edit", state="rejected" if why else "applied", why=why)
