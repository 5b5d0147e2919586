"""The exceptions of offloop.

Wrong arguments raise `ConfigError` or `TypeError`. The other exceptions are states that a caller may handle;
facts are attributes, so no caller has to match a text. `except Exception` sees all but `Preempted`.

    OffloopError
    ├── ConfigError (also ValueError)           a knob or an argument that cannot work
    ├── EventError (also TypeError)             an event that cannot ride the bus
    ├── BusClosedError                          publish or subscribe after the end
    ├── EventLoopStalledError                   the event loop took nothing for a million events
    ├── SubscriberTooSlowError                  a subscriber fell 100,000 milestones behind
    ├── DeadlockError (also RuntimeError)       a wait that could never end
    ├── TrainerBusyError                        a second run of a trainer that has one
    ├── RunEndedError                           a command to a run that has ended
    ├── RunsClosedError                         a run started in a `Runs` that is shut down
    ├── RankFailedError                         another process of a distributed run has failed
    ├── CallbackProcessError                    the process of a callback has ended, or cannot be used
    ├── RunLabelsError                          labels of a run that cannot be read
    │   └── RunLabelsChangedError               labels that were edited meanwhile
    ├── SampleFileError                         the file of a sample is missing, or is not what was published
    ├── RunNotFoundError (also KeyError)        no run of that id in a `Runs`
    ├── RunNameTakenError                       the run's directory exists already
    ├── EmptyLoaderError                        a loader that gave no batch
    ├── BatchError (also TypeError)             a batch that fits no convention
    ├── LossError (also ValueError)             a loss that is no finite scalar
    ├── MetricNotFoundError (also KeyError)     a metric that does not exist
    ├── ModelNotFoundError                      no registered model of that name, version or alias
    ├── WeightsError                            weights that cannot be read, or written elsewhere
    │   └── WeightsMismatchError                weights of another model
    ├── WatchError                              a run elsewhere cannot be watched or steered
    │   ├── WatchRefusedError                   its server does not let the program in
    │   ├── WatchLostError                      no connection, and none can be made
    │   ├── CommandRejectedError                the server or the run does not carry out a command
    │   ├── CommandExpiredError                 a command was not applied in time, and taken back
    │   └── CommandLostError                    the connection was lost in the middle of a command
    └── CheckpointError                         defined in `checkpoint/errors.py`, as all below
        ├── CheckpointWriteError                a save failed; earlier checkpoints are untouched
        │   └── DiskFullError                   no room
        ├── CheckpointReadError                 the system refused to read
        ├── CheckpointCorruptError              the content is not what was written
        │   └── UnsafeCheckpointError           ... as only in a file made by hand
        ├── CheckpointIncompatibleError         of a newer offloop or another model
        ├── CheckpointNotFoundError             no such checkpoint
        ├── CheckpointDeadlineError             not on disk in time
        ├── RemoteError                         a remote store failed after all tries
        ├── RunLockedError                      another process writes to this run
        ├── SnapshotBusyError                   all buffers still wait for the disk
        ├── SnapshotMemoryError                 no memory for the copy
        ├── UnserializableStateError            a value that cannot be saved
        └── WriterDiedError                     the writer thread has ended
    Preempted (SystemExit, code 75)             SIGTERM, after everything was saved
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

# EX_TEMPFAIL of sysexits.h, "try again later": schedulers requeue such jobs.
PREEMPTED_EXIT_CODE = 75
LIKELY: Final = 0.7
"""Similarity from which a name is suggested for another one; difflib's own 0.6 suggests mode for num_nodes."""


def nearest(name: str, legal: Iterable[str]) -> str | None:
    """Return the legal name that was probably meant, None if none is similar enough."""
    near = difflib.get_close_matches(name, list(legal), n=1, cutoff=LIKELY)
    return near[0] if near else None


class OffloopError(Exception):
    """Base of everything offloop raises for a state that a caller may handle."""


class ConfigError(OffloopError, ValueError):
    """A knob or an argument that cannot work; raised before the run starts."""


class EventError(OffloopError, TypeError):
    """An event that cannot ride the bus: a field holds what is no plain value, or it was published before."""


class BusClosedError(OffloopError):
    """Something was published or subscribed after the bus had ended."""


class SampleFileError(OffloopError):
    """The file of a text or picture that a run has published is missing, or is not what was published."""


class EventLoopStalledError(OffloopError):
    """The event loop took no events until a million were waiting; the run ends as failed."""


class SubscriberTooSlowError(OffloopError):
    """A subscriber fell so many milestones behind that keeping them would exhaust the memory.

    Attributes:
        subscriber: Its name.
        milestones: How many waited for it.
    """

    def __init__(self, subscriber: str, milestones: int) -> None:
        super().__init__(f"subscriber {subscriber!r} is {milestones:,} milestones behind and was closed")
        self.subscriber = subscriber
        self.milestones = milestones


class DeadlockError(OffloopError, RuntimeError):
    """A wait that could never end, or that would hold up the run, because the run waits for the caller."""


class TrainerBusyError(OffloopError):
    """A trainer was asked for a second run before its first has ended."""


class RunEndedError(OffloopError):
    """The run had ended, or ended before the command could be applied."""


class RunsClosedError(OffloopError):
    """A `Runs` that is shut down was asked to start a run."""


class RankFailedError(OffloopError):
    """Another process of a distributed run has failed, hangs or cannot be reached.

    The text names its rank and host, and has its exception with the traceback.
    """

    def __init__(self, rank: int, host: str, what: str) -> None:
        super().__init__(f"rank {rank} on {host} {what}")
        self.rank = rank
        """Number of the process that failed."""
        self.host = host
        """Name of its machine."""
        self.what = what
        """What happened there, in words."""

    def __reduce__(self) -> tuple[type["RankFailedError"], tuple[int, str, str]]:
        return RankFailedError, (self.rank, self.host, self.what)


class CallbackProcessError(OffloopError):
    """The child process of a callback could not be started, could not load the callback, or has ended too early.

    Attributes:
        exit_code: Of the process, below 0 for a signal; None if it has none.
    """

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RunLabelsError(OffloopError):
    """`labels.json` of a run cannot be read, or another process has it locked."""


class RunLabelsChangedError(RunLabelsError):
    """The labels of a run were edited by another person or program since they were read.

    Attributes:
        version: That of the labels now.
    """

    def __init__(self, directory: str, version: int, based_on: int) -> None:
        super().__init__(
            f"the labels of {directory} were edited meanwhile: they have version {version}, and this edit is based on "
            f"version {based_on}"
        )
        self.version = version
        self._arguments = (directory, version, based_on)

    def __reduce__(self) -> tuple[type["RunLabelsChangedError"], tuple[str, int, int]]:
        return RunLabelsChangedError, self._arguments


class RunNotFoundError(OffloopError, KeyError):
    """A `Runs` has no run of that id: it never had, or the run has ended and was forgotten.

    Attributes:
        run_id: What was asked for.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        super().__init__(
            f"there is no run {run_id!r} here: it was never started, or has ended and was forgotten"
        )

    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0])


class RunNameTakenError(OffloopError):
    """The directory of the wanted run exists already.

    Attributes:
        path: That directory, or its URL in the remote one.
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is the directory of a run already: continue it with resume='auto', choose another run_name, "
            "or remove the directory if its run is not needed"
        )
        self.path = path


class EmptyLoaderError(OffloopError):
    """A loader gave no batch."""


class BatchError(OffloopError, TypeError):
    """A batch that fits no convention of the default step."""


class LossError(OffloopError, ValueError):
    """A step returned a loss that is not a scalar, has no gradient, or is not finite.

    Attributes:
        loss: The loss that is not finite; None if something else is wrong.
        step: Number of the step that it belongs to; None likewise.
    """

    def __init__(self, text: str, *, loss: float | None = None, step: int | None = None) -> None:
        self.loss = loss
        self.step = step
        super().__init__(text)


class MetricNotFoundError(OffloopError, KeyError):
    """There is no metric of that name.

    Attributes:
        name: The name asked for.
        known: The names there are.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        listed = ", ".join(self.known) or "none yet"
        near = nearest(str(name), self.known)
        meant = f"; did you mean {near!r}?" if near else ""
        super().__init__(f"no metric {name!r} here; there are: {listed}{meant}")

    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0])


class ModelNotFoundError(OffloopError):
    """No registered model, version or alias of that name.

    Attributes:
        wanted: What was asked for.
        directory: The registry's.
        known: What there is instead.
    """

    def __init__(self, wanted: str, directory: str, known: Iterable[str], hint: str = "") -> None:
        self.wanted = wanted
        self.directory = directory
        self.known = tuple(known)
        there = ", ".join(self.known) or "nothing"
        super().__init__(f"no model {wanted!r} in {directory}; there is: {there}{hint}")


class WeightsError(OffloopError):
    """A file that is not plain weights, or weights that a file cannot hold."""


class WeightsMismatchError(WeightsError):
    """Weights that are not those of the model; the model is unchanged.

    Attributes:
        missing: Names that the model has and the weights have not.
        unexpected: Names that the weights have and the model has not.
        mismatched: Names of different shapes, with the shape of the weights and that of the model.
    """

    def __init__(
        self,
        text: str,
        *,
        missing: Iterable[str],
        unexpected: Iterable[str],
        mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched)
        super().__init__(text)


class WatchError(OffloopError):
    """A program cannot watch or steer a run from elsewhere."""


class WatchRefusedError(WatchError):
    """The server does not let this program in.

    Attributes:
        status: HTTP status of the refusal: 401 for no or a wrong token, 403, 421 for an unknown host name, 503 for no
            place left; 4001 and 4002 are close codes of the protocol.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class WatchLostError(WatchError):
    """There is no connection: nothing answers, something else does, or the server is gone for good."""


class CommandRejectedError(WatchError):
    """The server or the run does not carry out a command.

    Attributes:
        command: Its name.
        why: The reason.
    """

    def __init__(self, command: str, why: str) -> None:
        super().__init__(f"{command} was rejected: {why}")
        self.command = command
        self.why = why


class CommandExpiredError(WatchError):
    """A command was not applied in time, and was taken back.

    Attributes:
        command: Its name.
    """

    def __init__(self, command: str, why: str) -> None:
        super().__init__(f"{command} expired: {why}")
        self.command = command


class CommandLostError(WatchError):
    """The connection was lost, or closed, before a command was answered.

    Attributes:
        command: Its name.
        is_applied: False if the run never got it; None if that is not known.
    """

    def __init__(self, command: str, is_applied: bool | None, why: str) -> None:
        known = "it was not applied" if is_applied is False else "whether it was applied is not known"
        super().__init__(f"{why} before {command} was answered: {known}")
        self.command = command
        self.is_applied = is_applied


class Preempted(SystemExit):
    """SIGTERM ended the run after its state was saved. Exit code 75 (EX_TEMPFAIL)."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)


# Classes by which the event loops that hosted runs cancel tasks. Any thread adds to it; elements are never removed.
_cancellations: set[type[BaseException]] = set()


def note_cancellation(kind: type[BaseException]) -> None:
    """Remember the exception by which an event loop cancels its tasks, for `as_failure`. Any thread."""
    _cancellations.add(kind)


def as_failure(error: BaseException) -> BaseException:
    """Return the exception to report or raise for one that user code raised. Any thread.

    It is the same exception, except where an event loop would misread it: a stray cancellation ends tasks silently,
    and `GeneratorExit` closes them. Those become the cause of a `RuntimeError`.
    """
    if not isinstance(error, (GeneratorExit, *_cancellations)):
        return error
    failure = RuntimeError(
        f"{type(error).__name__} was raised, although neither the run nor its event loop is ending"
    )
    failure.__cause__ = error
    return failure


def describe(error: BaseException) -> str:
    """Return `Type: text` of an exception, even if its `__str__` raises or the text cannot be encoded."""
    try:
        text = str(error)
    except Exception as problem:
        text = f"<its text raised {type(problem).__name__}>"
    return encodable(f"{type(error).__name__}: {text}")


def encodable(text: str) -> str:
    """Escape lone surrogates, as in file names that are not UTF-8: neither events nor files can hold them."""
    return text.encode("utf-8", "backslashreplace").decode()
