"""Callbacks that do harm to their own process. Without torch: the children load this module."""

import atexit
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from placed_callbacks import Told

from offloop.engine import Callback, EpochEnd, Event, RunHandle, TrainStart


class InProcess(Callback):
    """Runs in a process."""

    runs_in = "process"


class Counts(InProcess):
    """Notes into a file how many epochs it has seen."""

    def __init__(self, notes: Path) -> None:
        """Note into a file."""
        self.notes = notes
        self.epochs = 0

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        self.epochs += 1

    def close(self) -> None:
        self.notes.write_text(f"{self.epochs} {os.getpid()}")


class TakesAllMemory(InProcess):
    """Leaves its process no memory."""

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
        bytearray(1 << 30)

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        # In small pieces, too: nothing is left for the thread that receives events.
        self.taken: list[Any] = []
        size = 1 << 22
        while size >= 16:
            try:
                self.taken.append(bytes(size))
            except MemoryError:
                size //= 2


class LeavesProgram(InProcess):
    """Starts a program, or forks, and does not wait for its end."""

    def __init__(self, how: str, notes: Path) -> None:
        """Note the pid into a file."""
        self.how, self.notes = how, notes

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        if self.how == "starts":
            pid = subprocess.Popen(["sleep", "1000"]).pid
        else:
            pid = os.fork()
            if pid == 0:
                signal.pause()
        self.notes.write_text(f"{pid}\n")

    def close(self) -> None:
        with self.notes.open("a") as file:
            file.write("close\n")


class ForksAndReturns(InProcess):
    """Forks; both processes return from the handler."""

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Told(what=str(os.fork())))

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Told(what=f"epoch {event.epoch}"))


class StopsItself(InProcess):
    """Stops its process by a signal, as a debugger does."""

    drain_timeout = 0.1

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        run.publish(Told(what=str(os.getpid())))
        os.kill(os.getpid(), signal.SIGSTOP)


class Talks(InProcess):
    """Prints what is no ASCII, and logs."""

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        print("größer", os.fsdecode(b"\xff"))
        print("größer", file=sys.stderr)
        logging.getLogger("mine").warning("a record")

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Told(what="goes on"))


class Undecodable(Event, frozen=True):
    """Can be encoded, but not decoded."""

    values: list[object] = []  # noqa: RUF012 - a field of a struct


class PublishesUndecodable(InProcess):
    """Publishes an event that cannot be decoded."""

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(Undecodable(values=[1]))
        run.publish(Told(what="goes on"))


class LeavesThread(InProcess):
    """Leaves a thread that ends after `close`, and what is to be done at the exit."""

    def __init__(self, notes: Path) -> None:
        """Note into a file."""
        self.notes = notes

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        closed = self.closed = threading.Event()
        notes = self.notes

        def work() -> None:
            closed.wait(60)
            notes.write_text("thread\n")

        def at_exit() -> None:
            with notes.open("a") as file:
                file.write("exit\n")

        # Not a daemon, as threads that a worker thread starts are otherwise.
        threading.Thread(target=work, daemon=False).start()
        atexit.register(at_exit)

    def close(self) -> None:
        self.closed.set()
