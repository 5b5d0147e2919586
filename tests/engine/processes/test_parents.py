"""Programs that have child processes: however they were started, and whatever the system refuses them."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from warm_python import WarmPython

pytestmark = pytest.mark.slow

CALLBACK: Final = """
import os, sys
import offloop

print("imported", flush=True)


class Note(offloop.Event, frozen=True):
    pid: int
    values: list[int | bool | str] = []


class Base(offloop.Callback):
    runs_in = "process"
    steps = 0

    def on_step_end(self, event, run):
        self.steps += FACTOR


FACTOR = 2


def train(callback_class):
    from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

    recorder = Recorder()
    result = tiny_trainer().train(tiny_loader(), epochs=2, callbacks=[callback_class(), recorder])
    assert not result.callback_errors, result.callback_errors
    for note in recorder.of(Note):
        print(note.pid != os.getpid(), *note.values)
"""
MINE: Final = """
class Mine(Base):
    def on_epoch_end(self, event, run):
        run.publish(Note(pid=os.getpid(), values=[self.steps, "torch" in sys.modules]))


train(Mine)
"""
EXPECTED: Final = ["imported", "True 16 False", "True 32 False"]
"""The program runs once, and its children do not load torch."""


def run(arguments: Sequence[str], folder: Path, program: str = "", path: str = "") -> list[str]:
    """Run a Python and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=program,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_program_that_comes_by_stdin_has_children(tmp_path: Path) -> None:
    assert run(["-"], tmp_path, CALLBACK + MINE) == EXPECTED


def test_a_program_on_the_command_line_has_children(tmp_path: Path) -> None:
    assert run(["-c", CALLBACK + MINE], tmp_path) == EXPECTED


def test_a_module_of_a_package_has_children_that_import_from_it(tmp_path: Path) -> None:
    package, elsewhere = tmp_path / "lib" / "mine", tmp_path / "elsewhere"
    package.mkdir(parents=True)
    elsewhere.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("VALUE = 'helped'")
    relative = MINE.replace("        run.publish", "        from .helper import VALUE\n        run.publish")
    relative = relative.replace('"torch" in sys.modules', "VALUE")
    (package / "main.py").write_text(CALLBACK + relative)
    printed = run(["-m", "mine.main"], elsewhere, path=str(tmp_path / "lib"))
    assert printed == ["imported", "True 16 helped", "True 32 helped"]


def test_a_script_elsewhere_that_changes_its_path_has_children(tmp_path: Path) -> None:
    for folder in ("scripts", "lib", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib" / "base_of_mine.py").write_text(CALLBACK)
    (tmp_path / "scripts" / "run.py").write_text(
        "import os, sys\nsys.path.insert(0, '../lib')\nfrom base_of_mine import *\n" + MINE
    )
    # The module is imported again in each child; the script is not.
    printed = run(["../scripts/run.py"], tmp_path / "elsewhere")
    assert printed == ["imported", "imported", *EXPECTED[1:]]


def test_a_worker_of_multiprocessing_has_children(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        CALLBACK
        + MINE.replace("\ntrain(Mine)", "\ndef work():\n    train(Mine)")
        + "\nif __name__ == '__main__':\n"
        "    import multiprocessing\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work, daemon=True)\n"
        "    worker.start()\n"
        "    worker.join()\n"
        "    assert worker.exitcode == 0\n"
    )
    assert run([str(script)], tmp_path) == ["imported", *EXPECTED]


IN_KERNEL: Final = """
import sys
from jupyter_client import KernelManager

manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=60)
for cell in sys.argv[1:]:
    reply = client.execute_interactive(cell, timeout=60)
    assert reply["content"]["status"] == "ok", reply
client.stop_channels()
manager.shutdown_kernel(now=True)
"""


def test_a_notebook_has_children_for_classes_of_its_cells(tmp_path: Path) -> None:
    """In a real kernel. What a child prints appears below the cell; a class that is defined anew is used anew."""
    home = {
        name: str(tmp_path) for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    }
    cells = [
        CALLBACK,
        MINE.replace("self.steps,", "print('from the child') or self.steps,"),
        "FACTOR = 3",
        MINE,
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_KERNEL, *cells],
        cwd=tmp_path,
        env={**os.environ, **home, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed.count("from the child") == 2
    notes = [each for each in printed if each != "from the child"]
    assert notes == [*EXPECTED, "True 24 False", "True 48 False"]


# What the system refuses -------------------------------------------------------------------------

LIMITS: Final = """
import ctypes, os, resource, sys
import offloop
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer
from pathlib import Path


class Mine(offloop.Callback):
    runs_in = "process"

    def on_epoch_end(self, event, run): ...


def train():
    recorder = Recorder()
    try:
        result = tiny_trainer().train(tiny_loader(2), epochs=2, callbacks=[Mine(), recorder])
    except (OSError, RuntimeError, offloop.OffloopError) as error:
        print("refused:", type(error).__name__, error)
        return
    assert len(recorder.of(offloop.EpochEnd)) == 2
    errors = result.callback_errors.get("Mine", ())
    assert len(errors) <= 1, errors
    print(*(errors or ["fine"]))


def children():
    return [each for task in Path("/proc/self/task").iterdir() for each in (task / "children").read_text().split()]


train()
"""


def outcomes(script: Path, body: str, python: WarmPython) -> list[str]:
    script.write_text(LIMITS + body + "\nassert not children()\n")
    done = python.run(script)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_refused_or_costs_only_the_callback(lines: list[str]) -> None:
    """First without a limit, then with ever higher ones: no run at first, later no process, in the end both."""
    assert lines[0] == lines[-1] == "fine"
    assert lines[1].startswith("refused:")
    assert any(
        "its process: CallbackProcessError: the process of Mine could not be started" in each
        for each in lines
    )


def test_a_limit_of_file_descriptors_refuses_the_run_or_costs_only_the_callback(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    lines = outcomes(
        tmp_path / "script.py",
        """
used = [int(each) for each in os.listdir("/proc/self/fd")]
top = max(used) + 1
held = [os.dup(0) for _ in range(top - len(used))]  # no number below is free
for more in (0, 2, 8, 14, 17, 20, 23, 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + more, 4096))
    train()
""",
        warm_python,
    )
    check_refused_or_costs_only_the_callback(lines)


def test_a_limit_of_processes_refuses_the_run_or_costs_only_the_callback(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user without processes")
    lines = outcomes(
        tmp_path / "script.py",
        """
# A real user without other processes, also of other tests, who may still read all files, and may not exceed limits.
os.setresuid(50_000 + os.getpid() % 10_000, 0, 0)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
rights = (ctypes.c_uint32 * 6)(0b110, 0b110, 0, 0, 0, 0)
assert ctypes.CDLL(None).capset(header, rights) == 0
used = len(os.listdir("/proc/self/task"))
for more in (0, 1, 2, 5):
    resource.setrlimit(resource.RLIMIT_NPROC, (used + more, used + 20))
    train()
""",
        warm_python,
    )
    check_refused_or_costs_only_the_callback(lines)


def test_a_limit_of_memory_refuses_the_run_or_costs_only_the_callback(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    lines = outcomes(
        tmp_path / "script.py",
        """
import multiprocessing
# The children begin with a limit that is too low for an interpreter, or for the callback.
own = Path("python")
for megabytes in (8, 24, 1024):
    own.write_text(f'#!/bin/sh\\nulimit -v {megabytes * 1024}\\nexec "{sys.executable}" "$@"\\n')
    own.chmod(0o755)
    multiprocessing.set_executable(str(own.absolute()))
    train()
""",
        warm_python,
    )
    lines = [each for each in lines if each == "fine" or "its process" in each or "refused" in each]
    assert lines[0] == lines[-1] == "fine"
    assert lines[1].startswith("its process: CallbackProcessError: the process of Mine ended with")


def test_a_working_directory_that_is_read_only_or_gone_does_no_harm(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    lines = outcomes(
        tmp_path / "script.py",
        """
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
train()
os.chdir("/proc")  # read-only for root, too
train()
""",
        warm_python,
    )
    assert lines == ["fine"] * 3


# A parent that is killed -------------------------------------------------------------------------

STUCK: Final = """
import os, re, sys
import offloop
from offloop.engine.testing import EndlessLoader, tiny_trainer


class Note(offloop.Event, frozen=True):
    pid: int


class Stuck(offloop.Callback):
    runs_in = "process"

    def on_train_start(self, event, run):
        run.publish(Note(pid=os.getpid()))
        re.match(r"(a+)+$", "a" * 60 + "b")


class Shows(offloop.Callback):
    def on_note(self, event, run):
        print(event.pid, flush=True)


tiny_trainer().train(EndlessLoader(), max_steps=10**9, callbacks=[Stuck(), Stuck(), Shows()])
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_no_child_is_left_by_a_parent_that_is_killed(
    times: int, tmp_path: Path, warm_python: WarmPython
) -> None:
    script = tmp_path / "script.py"
    script.write_text(STUCK)
    for _ in range(times):
        with warm_python.start(script) as parent:
            children = [os.pidfd_open(int(parent.stdout.readline())) for _ in range(2)]
            os.kill(parent.pid, signal.SIGKILL)
        for child in children:
            poll = select.poll()
            poll.register(child, select.POLLIN)
            assert poll.poll(2_000)  # the promise
            os.close(child)
