"""EventLog: writes every event of a run to `events.jsonl`, one encoded event per line; functions to read it.

Milestones are written at once, samples at most a second later, so a crash loses no milestone and at most a second of
samples. A reader accepts an incomplete last line and events of types that it does not know.

A run that continues from a checkpoint first cuts the log back to the moment of the checkpoint (`rewind`), and adds the
milestones that the checkpoint contains and the log does not, because the run was killed before they were written. The
position of the cut is given by the attempt that made the checkpoint and, within that attempt, by the time of the
event, which never runs backwards. Between attempts it may: the machine's clock may have been set back.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from offloop.engine.callback import Callback
from offloop.engine.checkpoint.filesystem import replace_file
from offloop.engine.encoding import decode, encode_lines
from offloop.engine.errors import EventError
from offloop.engine.events import Event, Sample, StepEnd, TrainStart
from offloop.engine.observers.line_file import LineFile
from offloop.engine.paths import LOG
from offloop.engine.samples.files import SampleFiles

logger = logging.getLogger("offloop")

FILE_NAME: Final = LOG
BATCH_INTERVAL: Final = 0.4
"""Seconds between two batches of samples alone, each of which is written at once. With the hand-over before it, a
sample waits less than a second, also if none comes after it."""
MAX_KEPT: Final = 10_000
"""Milestones that are kept while the disk is full; of more, the oldest are lost."""


class EventLog(Callback):
    """Writes the events that it receives. Every run with a directory has one.

    While the file cannot be written, milestones are kept for later and samples are lost. The first failure is reported,
    like that of any callback; a log record tells when writing works again.
    """

    needs_run_dir = True
    sample_interval = BATCH_INTERVAL

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._file: LineFile | None = None
        self._path = Path(FILE_NAME)
        self._waiting: list[Event] = []
        self._is_failing = False
        self._lost = 0  # events, since writing fails
        self._samples: SampleFiles | None = None

    def on_event(self, event: Event, run: Any) -> None:
        if run.dir is None:
            # The run could not have its directory: only `TrainEnd` comes, and there is no place for it.
            return
        self._path = run.dir / FILE_NAME
        # A handle in another process has none.
        self._samples = getattr(run, "samples", None)
        self._waiting.append(event)
        if not isinstance(event, Sample):
            self._flush()

    def events_handled(self) -> None:
        self._flush()

    def make_durable(self) -> None:
        self._flush()
        if self._is_failing:
            raise OSError(f"{self._path} cannot be written")
        if self._samples is not None:
            self._samples.make_durable()
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        try:
            self._flush()
            if self._is_failing:
                raise OSError(
                    f"{self._path} lacks the last {self._lost + len(self._waiting)} events of the run"
                )
        finally:
            if self._file is not None:
                self._file.close()

    def _flush(self) -> None:
        """Write the waiting lines. Only the first failure raises; milestones that were not written are kept."""
        if not self._waiting:
            return
        lines, refused = self._encode()
        not_written = self._write_samples()
        try:
            if self._file is None:
                self._file = LineFile(self._path)
            self._file.append(lines)
        except OSError as error:
            kept = [event for event in self._waiting if not isinstance(event, Sample)][-MAX_KEPT:]
            self._lost += len(self._waiting) - len(kept)
            self._waiting = kept
            if self._is_failing:
                return
            self._is_failing = True
            error.add_note("offloop: until it can be written again, steps are lost and milestones wait")
            raise
        self._waiting = []
        if self._is_failing:
            logger.warning("%s can be written again; %d events are missing in it", self._path, self._lost)
            self._is_failing, self._lost = False, 0
        if refused is not None:
            raise refused
        if not_written is not None:
            raise not_written

    def _write_samples(self) -> OSError | None:
        """Write the files of samples before the lines that tell of them; return the failure that is to be reported."""
        try:
            if self._samples is not None:
                self._samples.write()
        except OSError as error:
            return error
        return None

    def _encode(self) -> tuple[bytes, EventError | None]:
        """Return the lines of the waiting events, without those that cannot be encoded, and the error of the first."""
        try:
            return encode_lines(self._waiting), None
        except EventError as error:
            lines = []
            for event in self._waiting:
                with contextlib.suppress(EventError):
                    lines.append(encode_lines([event]))
            return b"".join(lines), error


class _Head(msgspec.Struct):
    """What decides whether a line is kept; decoded several times as fast as the event."""

    type: str
    seq: int = -1
    time: float = 0.0
    attempt: int = 0


decode_head = msgspec.json.Decoder(_Head, strict=False).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


class AttemptCounter:
    """Tells to which attempt each line of a log belongs: `TrainStart` names it, and `seq` starts again with it."""

    def __init__(self, attempt: int = 0, seq: int = -1) -> None:
        self.attempt = attempt
        """Attempt of the last event."""
        self.seq = seq
        """`seq` of the last event."""

    def take(self, head: "_Head | Event") -> int:
        """Return the attempt of the next event."""
        if head.seq <= self.seq:
            self.attempt += 1
        self.seq = head.seq
        if isinstance(head, TrainStart) or (isinstance(head, _Head) and head.type == TrainStart.__name__):
            self.attempt = head.attempt
        return self.attempt


def rewind(directory: Path, *, attempt: int, taken: float | None, milestones: Sequence[str] = ()) -> None:
    """Cut a run's log back to the moment of a checkpoint, and complete it up to there. Blocks on the file system.

    Args:
        directory: The run's.
        attempt: The attempt that took the checkpoint.
        taken: When it was taken, by that attempt's clock; None to remove all events.
        milestones: Those before the checkpoint that may not have been written yet, encoded, in order.

    Raises:
        OSError: The file cannot be read or written.
        msgspec.DecodeError: A milestone is no JSON object.
    """
    path = directory / FILE_NAME
    size, seq = 0, -1
    written: Counter[bytes] = Counter()
    if taken is not None and path.exists():
        position = AttemptCounter()
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    head = decode_head(line)
                except msgspec.MsgspecError:
                    # Readers skip it.
                    size += len(line)
                    continue
                of = position.take(head)
                if of > attempt or (of == attempt and head.time > taken):
                    break
                size += len(line)
                if of == attempt:
                    seq = head.seq
                    if milestones and head.type != StepEnd.__name__:
                        written[_content_of(_decode_object(line))] += 1
    added = b""
    for milestone in milestones:
        fields = _decode_object(milestone)
        content = _content_of(fields)
        if written[content]:
            written[content] -= 1
        else:
            seq += 1
            added += msgspec.json.encode(fields | {"run_id": directory.name, "seq": seq}) + b"\n"
    _replace_end(path, size, added)


def _replace_end(path: Path, size: int, added: bytes) -> None:
    """Keep the first `size` bytes of a log and put `added` after them; durable when this returns."""
    if path.is_symlink():
        # Nothing is written through a link: the run continues in a regular file.
        kept = b""
        if path.exists():
            with open(path, "rb") as file:
                kept = file.read(size)
        replace_file(path, kept + added)
    elif added or path.exists():
        log = LineFile(path)
        try:
            log.cut(size)
            log.append(added)
            log.sync()
        finally:
            log.close()


def _content_of(fields: Mapping[str, Any]) -> bytes:
    """Return the content of an event without its place in the run's order."""
    kept = {name: value for name, value in fields.items() if name not in ("run_id", "seq", "time")}
    return msgspec.json.encode(kept, order="sorted")


def starts_in_log(directory: Path) -> Iterator[TrainStart]:
    """Yield the `TrainStart` of each attempt in a run's log; none if it cannot be read. Blocks."""
    try:
        with open(directory / FILE_NAME, "rb") as file:
            for line in file:
                if b'"TrainStart"' in line:
                    try:
                        event = decode(line.rstrip(b"\n"))
                    except msgspec.MsgspecError:
                        continue
                    if isinstance(event, TrainStart):
                        yield event
    except OSError:
        return


def read_attempts(path: "Path | str") -> Iterator[tuple[int, Event]]:
    """Read a run's events like `read_events`, each with the number of its attempt."""
    position = AttemptCounter()
    for event in read_events(path):
        yield position.take(event), event


def read_events(path: "Path | str") -> Iterator[Event]:
    """Read a run's events, in order, from its directory or the file itself. Blocks on the file system.

    Events of unknown types are returned as `UnknownEvent`. An incomplete last line is skipped; a broken line elsewhere
    is skipped with a warning.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # An event of an unknown type keeps these bytes.
                event = decode(line.rstrip(b"\n"))
            except (msgspec.DecodeError, RecursionError):
                if line.endswith(b"\n"):
                    logger.warning("%s:%d is no event and was skipped", path, number)
                continue
            yield event
