"""tests/support/warm_python.py: a script that is run in a fork behaves as one that is run by Python."""

import os
import signal
from pathlib import Path

import pytest
import warm_python as warm_python_module
from warm_python import WarmPython


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import warnings; warnings.warn('old')", 1, "UserWarning: old"),
        ("import sys; print('half', file=sys.stderr); sys.exit(3)", 3, "half"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("assert __name__ == '__main__' and open(__file__)", 0, ""),
    ],
)
def test_failure_of_a_script_is_seen(
    source: str, code: int, words: str, script: Path, warm_python: WarmPython
) -> None:
    script.write_text(source)
    done = warm_python.run(script)
    assert done.returncode == code
    assert words in done.stderr


def test_script_runs_to_the_end_of_its_threads(script: Path, warm_python: WarmPython) -> None:
    script.write_text(
        "import atexit, threading\n"
        "atexit.register(print, 'exit')\n"
        "began = threading.Event()\n"
        "def work():\n"
        "    began.wait()\n"
        "    print('thread')\n"
        "threading.Thread(target=work).start()\n"
        "print('main')\n"
        "began.set()\n"
    )
    assert sorted(warm_python.run(script).stdout.split()) == ["exit", "main", "thread"]


def test_script_has_pipes_arguments_environment_and_signals(script: Path, warm_python: WarmPython) -> None:
    script.write_text(
        "import os, signal, sys\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "print(sys.argv[1], os.environ['WORD'], os.getpid() == os.getsid(0))\n"
        "print(input(), file=sys.stderr)\n"
        "signal.pause()\n"
    )
    with warm_python.start(script, "a", environment={"WORD": "b"}, new_session=True) as process:
        assert process.stdout.readline() == "a b True\n"
        print("c", file=process.stdin, flush=True)
        assert process.stderr.readline() == "c\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate()
        assert printed == "" and "KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT
    with warm_python.start(script, "a", environment={"WORD": "b"}, merges_streams=True) as process:
        assert process.stdout.readline() == "a b False\n"
        print("c", file=process.stdin, flush=True)
        assert process.stdout.readline() == "c\n"
    assert process.returncode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_it_ends_although_a_process_that_was_forked_meanwhile_does_not(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a loader's worker that a failed test has left: it holds all that this process holds."""
    script.write_text(
        "import socket, sys; assert socket.socket(fileno=int(sys.argv[1])).recv(9) == b'null\\n'"
    )
    monkeypatch.setattr(warm_python_module, "SERVER", script)
    python = WarmPython()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        assert python.close() == 0
    finally:
        os.close(writer)
        os.waitpid(child, 0)
