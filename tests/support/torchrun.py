"""Scripts on several processes, under the real `torchrun`, for tests.

Each rank writes its output into files of its own. It connects to a socket of the test's, through which it says where it
is (`expect`) and may wait to be let go on (`open`). Whatever the script has started is killed in the end: its processes
are found by a variable in their environment.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

MARK: Final = "OFFLOOP_TEST_TORCHRUN"
"""Variable by which the processes of a `Torchrun` are found."""
SOCKET: Final = "OFFLOOP_TEST_SOCKET"
"""Variable with the path of the test's socket."""
PATIENCE: Final = 60.0
"""Seconds for a script, and for each thing that is expected of it."""


@dataclasses.dataclass(frozen=True)
class Said:
    """What a rank says."""

    rank: int
    pid: int
    thread: int
    what: str


class Torchrun:
    """`python -m torch.distributed.run` with a script; a context manager that leaves no process behind."""

    def __init__(
        self,
        folder: Path,
        script: Path,
        *arguments: str,
        ranks: int = 2,
        options: Sequence[str] = ("--standalone",),
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        left_in: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            folder: Where it keeps its files.
            script: The script that each rank runs.
            arguments: Of the script.
            ranks: Processes on this machine.
            options: Of torchrun.
            prefix: A command that runs torchrun, such as `ip netns exec NAME`.
            environment: Variables in addition to those of the tests.
            left_in: Where the ranks leave their results; None for `folder`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.left_in = left_in or folder
        self._mark = uuid.uuid4().hex
        self._said: queue.Queue[Said] = queue.Queue()
        self._waiting: list[Said] = []
        self._forgotten: set[int] = set()
        self._streams: dict[tuple[int, int], TextIO] = {}
        # The path of a socket has to be short
        self._socket_folder = tempfile.TemporaryDirectory(prefix="offloop-")
        path = os.path.join(self._socket_folder.name, "socket")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            and not name.startswith(("LOCAL_", "TORCHELASTIC_", "PYTEST_"))
        }
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options]
        command += [f"--nproc-per-node={ranks}", f"--log-dir={folder / 'output'}", "--redirects=3"]
        with (folder / "torchrun.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **inherited,
                    "OMP_NUM_THREADS": "1",  # tiny tensors gain nothing from more
                    # torch asks a name server for the name of each address: a lost answer costs five seconds
                    "RES_OPTIONS": "timeout:1",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "PYTHONUNBUFFERED": "1",
                    MARK: self._mark,
                    SOCKET: path,
                    **(environment or {}),
                },
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.describe())
        self.close()

    # What ranks say ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                thread = threading.Thread(target=self._listen, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _listen(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as stream, contextlib.suppress(OSError):
            for line in stream:
                said = Said(**json.loads(line))
                self._streams[said.pid, said.thread] = stream
                self._said.put(said)

    def hear(self, timeout: float = PATIENCE) -> Said:
        """Return the next thing that a rank says.

        Raises:
            TimeoutError: No rank says anything.
        """
        while self._waiting:
            if (said := self._waiting.pop(0)).pid not in self._forgotten:
                return said
        limit = time.monotonic() + timeout
        while True:
            try:
                if (said := self._said.get(timeout=0.2)).pid not in self._forgotten:
                    return said
            except queue.Empty:
                if self.process.poll() is not None and self._said.empty():
                    raise TimeoutError("the script has ended") from None
                if time.monotonic() > limit:
                    raise TimeoutError("no rank says anything") from None

    def expect(self, what: str, *ranks: int, timeout: float = PATIENCE) -> dict[int, Said]:
        """Wait until each of these ranks says something; return what they said, by rank. The rest waits its turn."""
        found: dict[int, Said] = {}
        others: list[Said] = []
        while missing := set(ranks or (0,)) - found.keys():
            try:
                said = self.hear(timeout)
            except TimeoutError as error:
                heard = ", ".join(f"{each.what!r} of rank {each.rank}" for each in others)
                raise TimeoutError(f"no {what!r} of ranks {missing}: {error}; heard {heard}") from None
            if said.what == what and said.rank in missing:
                found[said.rank] = said
            else:
                others.append(said)
        self._waiting = others + self._waiting
        return found

    def hear_of(self, word: str, rank: int | None = None, timeout: float = PATIENCE) -> Said:
        """Return the next thing that a rank, or any, says and that begins with a word. What comes before is dropped."""
        while True:
            said = self.hear(timeout)
            if rank in (None, said.rank) and said.what.split()[0] == word:
                return said

    def forget(self, *pids: int) -> None:
        """Listen no more to these processes."""
        self._forgotten.update(pids)

    def open(self, *at: Said) -> None:
        """Let ranks go on that wait (`talk.hold`) where they said they are."""
        for each in at:
            stream = self._streams[each.pid, each.thread]
            stream.write("go\n")
            stream.flush()

    # Its processes -------------------------------------------------------------------------------------

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return its exit code; where it does not end, say where each rank stands.

        Raises:
            TimeoutError: It does not end.
        """
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            # The ranks print their stacks, see `talk`
            for pid in self.pids():
                if pid != self.process.pid and "torch.distributed.run" not in _command(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
            time.sleep(1.0)
            raise TimeoutError(f"it has not ended in {timeout:g} s") from None

    def wait_for_result(self, name: str, rank: int, *, attempt: int = 0, timeout: float = PATIENCE) -> None:
        """Wait until a rank has left its result of a scenario.

        Raises:
            TimeoutError: It does not.
        """
        limit = time.monotonic() + timeout
        while self.results(name, ranks=rank + 1, attempt=attempt)[rank] is None:
            if time.monotonic() > limit:
                raise TimeoutError(f"rank {rank} has left no result of {name}")
            time.sleep(0.02)

    def pids(self) -> list[int]:
        """Return the processes that it has started and that live, itself included."""
        mark, found = f"{MARK}={self._mark}".encode(), []
        for each in os.listdir("/proc"):
            if each.isdigit():
                with contextlib.suppress(OSError):
                    if mark in Path("/proc", each, "environ").read_bytes():
                        found.append(int(each))
        return found

    def close(self) -> None:
        """Kill whatever still runs."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in list(self._threads):
            thread.join()
        self._socket_folder.cleanup()

    # What it leaves ------------------------------------------------------------------------------------

    def outputs(self) -> Iterator[tuple[str, str]]:
        """Iterate over what torchrun and the ranks printed, each with a name."""
        yield "torchrun", (self.folder / "torchrun.log").read_text()
        for path in sorted((self.folder / "output").rglob("std*.log")):
            attempt, rank = path.parent.parent.name, path.parent.name
            yield f"{attempt}, rank {rank}, {path.stem}", path.read_text(errors="replace")

    def output(self, rank: int, attempt: int = 0) -> str:
        """Return what a rank printed to stderr."""
        (path,) = (self.folder / "output").glob(f"*/attempt_{attempt}/{rank}/stderr.log")
        return path.read_text(errors="replace")

    def _errors(self, rank: int | None) -> list[str]:
        pattern = f"*/attempt_0/{'*' if rank is None else rank}/stderr.log"
        return [each.read_text(errors="replace") for each in (self.folder / "output").glob(pattern)]

    def describe(self) -> str:
        """Return the end of all outputs, for a failed test."""
        return "\n".join(f"--- {name}\n{text[-6000:]}" for name, text in self.outputs() if text.strip())

    def wait_for_output(self, rank: int | None, text: str, timeout: float = PATIENCE) -> None:
        """Wait until a rank, or any, has printed a text to stderr.

        Raises:
            TimeoutError: It does not.
        """
        limit = time.monotonic() + timeout
        while not any(text in each for each in self._errors(rank)):
            if time.monotonic() > limit:
                raise TimeoutError(f"rank {rank} has not said {text!r}")
            time.sleep(0.02)

    def exit_codes(self) -> dict[int, int]:
        """Return the exit codes of the ranks that torchrun counts as failed."""
        text = (self.folder / "torchrun.log").read_text()
        found = re.findall(r"rank\s*: (\d+) .*?exitcode\s*: (-?\d+)", text, re.DOTALL)
        return {int(rank): int(code) for rank, code in found}

    def results(self, name: str, *, ranks: int = 2, attempt: int = 0) -> list[Any]:
        """Return what the ranks wrote as their results of a scenario, by rank; None for one that wrote nothing."""
        found: list[Any] = []
        for rank in range(ranks):
            path = self.left_in / f"{name}-{attempt}-{rank}.json"
            found.append(json.loads(path.read_text()) if path.exists() else None)
        return found

    def collectives(self, *, ranks: int = 2, attempt: int = 0) -> list[list[Any]]:
        """Return the collectives that each rank has called, in order."""
        found = []
        for rank in range(ranks):
            path = self.left_in / f"collectives-{attempt}-{rank}.jsonl"
            text = path.read_text() if path.exists() else ""
            found.append([json.loads(line) for line in text.splitlines()])
        return found

    def check_collectives(self, *, ranks: int = 2, attempts: int = 1, all_ended: bool = True) -> int:
        """Check that all ranks called the same collectives in the same order, from one thread at a time.

        Args:
            ranks: How many there were.
            attempts: How often the group was started.
            all_ended: False if a rank has died in the last attempt: the others may be a call ahead.

        Returns:
            How many collectives that were.
        """
        count = 0
        for attempt in range(attempts):
            calls = self.collectives(ranks=ranks, attempt=attempt)
            shortest = min(len(each) for each in calls)
            count += shortest
            for number in range(shortest):
                call = calls[0][number]["call"]
                for rank, each in enumerate(calls):
                    assert each[number]["call"] == call, (
                        f"collective {number} of attempt {attempt}: rank 0 {call}, rank {rank} {each[number]['call']}"
                    )
            if all_ended or attempt < attempts - 1:
                assert len({len(each) for each in calls}) == 1 or attempt < attempts - 1
        return count


def _command(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_text()
    except OSError:
        return ""
