"""Scripts in processes of their own that need not import torch first, which takes most of a short script's time.

One process, the server, imports what scripts import. Each script runs in a fork of it and ends as an interpreter
ends. A request carries the descriptors of the script's streams, and one through which the server reports its exit
code; the answer is the process id.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

SERVER: Final = Path(__file__).with_name("warm_python_server.py")
PATIENCE: Final = 20.0
"""Seconds for the server to end; then it is killed."""


class ScriptProcess:
    """A script in a process of its own, in the manner of `subprocess.Popen`."""

    def __init__(self, pid: int, status: int, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._status = status  # the server writes the exit code here

    def poll(self) -> int | None:
        """Return the exit code, or None if the script still runs."""
        if self.returncode is None and select.select([self._status], [], [], 0.0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        if self.returncode is None:
            said = os.read(self._status, 100)
            os.close(self._status)
            assert said, "the server has died"
            self.returncode = int(said)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the script has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, said: str = "") -> tuple[str, str]:
        """Write to the script's stdin and close it; return what it prints until its end."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(said)
            self.stdin.close()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        reader.start()
        printed = self.stdout.read()
        reader.join()
        self.wait()
        self._close()
        return printed, errors[0]

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the process if it still runs."""
        self.kill()
        self.wait()
        self._close()


class WarmPython:
    """Runs scripts with every warning as an error, unbuffered streams and one thread for torch."""

    def __init__(self) -> None:
        """Start the server; it is ready for its first script in a few seconds."""
        self._environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",  # tiny tensors gain nothing from more
            "MLFLOW_DISABLE_TELEMETRY": "true",  # a test tells nobody
            "WANDB_ERROR_REPORTING": "false",
        }
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "error", str(SERVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | self._environment,
            )

    def run(
        self, script: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script in its own folder to its end.

        Its output goes through files: a process that it leaves behind would keep a pipe open.
        """
        stdout, stderr = (script.with_name(f"{script.name}.{each}") for each in ("stdout", "stderr"))
        with stdout.open("wb") as out, stderr.open("wb") as err, open(os.devnull, "rb") as nothing:
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            pid, status = self._fork(script, arguments, streams, environment)
        ended = os.read(status, 100)
        os.close(status)
        assert ended, f"the server of process {pid} has died"
        done = subprocess.CompletedProcess([str(script)], int(ended), stdout.read_text(), stderr.read_text())
        stdout.unlink()
        stderr.unlink()
        return done

    def start(
        self,
        script: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        merges_streams: bool = False,
        new_session: bool = False,
    ) -> ScriptProcess:
        """Start a script in its own folder, with pipes for its streams.

        Args:
            script: The file.
            arguments: What follows its name in `sys.argv`.
            environment: Its variables, in place of those of the tests.
            merges_streams: What it writes to stderr comes with what it writes to stdout.
            new_session: It leads a session, so that a signal can be sent to it and its children at once.
        """
        theirs_in, stdin = os.pipe()
        stdout, theirs_out = os.pipe()
        stderr, theirs_err = os.pipe()
        if merges_streams:
            os.dup2(theirs_out, theirs_err)
        theirs = [theirs_in, theirs_out, theirs_err]
        try:
            pid, status = self._fork(script, arguments, theirs, environment, new_session)
        finally:
            for each in theirs:
                os.close(each)
        return ScriptProcess(pid, status, open(stdin, "w"), open(stdout), open(stderr))

    def _fork(
        self,
        script: Path,
        arguments: tuple[str, ...],
        streams: Sequence[int],
        environment: Mapping[str, str] | None,
        new_session: bool = False,
    ) -> tuple[int, int]:
        """Return the process id of a script that has been started, and where its exit code is reported."""
        request = {
            "script": str(script),
            "arguments": arguments,
            "folder": str(script.parent),
            "environment": {**(os.environ if environment is None else environment), **self._environment},
            "new_session": new_session,
        }
        status, theirs = os.pipe()
        try:
            socket.send_fds(self._requests, [json.dumps(request).encode() + b"\n"], [*streams, theirs])
        finally:
            os.close(theirs)
        pid = self._requests.recv(100)
        assert pid, "the server has died"
        return int(pid), status

    def close(self) -> int:
        """End the server, and the scripts that still run; return its exit code.

        The server is told to end: it may never see the end of its socket, because every process that was forked
        meanwhile has the other end too, such as a loader's worker that a failed test has left.
        """
        with self._requests, contextlib.suppress(BrokenPipeError):
            self._requests.sendall(b"null\n")
        try:
            return self._server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._server.kill()
            return self._server.wait()
