"""SampleAnswers: answers what a viewer asks about samples, one question after the other."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from offloop.dashboard.protocol.encoding import ProtocolError, encode_event
from offloop.dashboard.protocol.from_viewer import SampleQuery
from offloop.dashboard.runs.disk_calls import DiskCall
from offloop.dashboard.runs.live_run import LiveRun
from offloop.dashboard.runs.run_samples import brief, content_of
from offloop.dashboard.runs.sample_frame import SampleHeader, encode_sample
from offloop.engine import Picture, SampleFileError, TextSample

MAX_QUESTIONS: Final = 256
"""Most unanswered questions of one viewer."""
GONE: Final = "this page's server no longer keeps it"


class Begin(Protocol):
    """Calls a function in a thread of its own, and `then` on the event loop when it is done."""

    def __call__(
        self, function: Callable[[], bytes], then: Callable[[DiskCall[bytes]], object], /
    ) -> DiskCall[bytes]: ...


class SampleAnswers:
    """Questions of one viewer, and the answer to the first of them. Event loop of the dashboard only.

    A disk is read for one question at a time: neither memory nor threads grow with what a viewer asks.
    """

    def __init__(self, begin: Begin, wake: Callable[[], None]) -> None:
        """Answer nothing yet.

        Args:
            begin: Reads from a disk.
            wake: Called when there is a frame to send.
        """
        self._begin = begin
        self._wake = wake
        self._queries: deque[tuple[LiveRun, SampleQuery]] = deque()
        # Of the answer that is being sent.
        self._frames: deque[bytes] = deque()
        self._is_reading = False

    def ask(self, live: LiveRun, query: SampleQuery) -> None:
        """Queue a question.

        Raises:
            ProtocolError: Too many wait for their answer.
        """
        if len(self._queries) >= MAX_QUESTIONS:
            raise ProtocolError(f"more than {MAX_QUESTIONS} questions for samples wait for their answer")
        self._queries.append((live, query))
        self._answer()

    @property
    def has_frame(self) -> bool:
        """True if a frame can be sent."""
        return bool(self._frames)

    def next_frame(self) -> bytes:
        """Take the next frame."""
        frame = self._frames.popleft()
        self._answer()
        return frame

    def _answer(self) -> None:
        """Begin with the next answer, if the last one is sent."""
        while self._queries and not self._frames and not self._is_reading:
            live, query = self._queries.popleft()
            header = SampleHeader(run=live.key, query=query.query)
            sample = live.samples.find(query.seq)
            if sample is None:
                self._put(header, error=GONE)
                continue
            header = msgspec.structs.replace(header, event=msgspec.Raw(encode_event(sample)))
            try:
                content = content_of(sample, query.picture)
            except SampleFileError as error:
                self._put(header, error=str(error))
                continue
            if content is None:
                self._put(header)
            elif isinstance(content, TextSample) and not content.sha256:
                self._put_content(header, content, content.text.encode(errors="backslashreplace"))
            else:
                self._read(header, live, content)

    def _read(self, header: SampleHeader, live: LiveRun, content: Picture | TextSample) -> None:
        files = live.samples.files

        def then(call: DiskCall[bytes]) -> None:
            self._is_reading = False
            try:
                self._put_content(header, content, call.result())
            except SampleFileError as error:
                self._put(header, error=str(error))
            except Exception as error:
                self._put(header, error=f"{type(error).__name__}: {error}")
            self._wake()

        try:
            self._begin(lambda: files.read(content), then)
        except OSError as error:
            self._put(header, error=str(error))
        else:
            self._is_reading = True

    def _put_content(self, header: SampleHeader, content: Picture | TextSample, data: bytes) -> None:
        changes: dict[str, Any] = {"media_type": content.media_type}
        if isinstance(content, TextSample):
            changes["event"] = msgspec.Raw(encode_event(brief(content)))
        self._put(header, data, **changes)

    def _put(self, header: SampleHeader, data: bytes = b"", **changes: Any) -> None:
        self._frames += encode_sample(msgspec.structs.replace(header, **changes), data)
