"""engine/processes/: callbacks with runs_in = "process", in real child processes."""

import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from child_callbacks import (
    LONG,
    Decides,
    Exits,
    Gate,
    Hangs,
    Holds,
    Hooks,
    Looks,
    Raises,
    Seen,
    Slow,
    Talks,
)

from offloop.engine import (
    Callback,
    CallbackFailed,
    CallbackProcessError,
    ConfigError,
    EpochEnd,
    UnknownEvent,
)
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer


def seen(recorder: Recorder) -> dict[str, list[Any]]:
    return {event.what: event.values for event in recorder.of(Seen)}


# What a child sees -------------------------------------------------------------------------------


def test_a_child_is_a_process_of_this_one_without_torch_that_ends_with_the_run() -> None:
    recorder = Recorder()
    tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Looks(), recorder])
    pid, parent, has_torch = seen(recorder)["child"]
    assert parent == os.getpid() != pid
    assert not has_torch
    assert not _is_alive(pid)


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("exit", 3, "ended with exit code 3: the callback gets no more events, and is not restarted"),
        ("exit 0", 0, "ended with exit code 0, by its own doing"),
        ("segfault", -signal.SIGSEGV, r"ended with SIGSEGV \(exit code -11\)"),
        (
            "kill",
            -signal.SIGKILL,
            r"ended with SIGKILL \(exit code -9\); that is how Linux ends a process for",
        ),
    ],
)
def test_a_child_that_crashes_is_reported_and_the_run_goes_on(
    how: str, code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    # The report comes while training goes on: it waits for it.
    result = tiny_trainer().train(
        tiny_loader(), epochs=3, callbacks=[Exits(how), recorder, Gate("its process", step=9)]
    )
    assert (result.status, result.epochs) == ("completed", 3)
    (failed,) = recorder.of(CallbackFailed)
    assert (failed.callback, failed.event, failed.disabled) == ("Exits", "its process", True)
    assert re.search(text, failed.error)
    assert len(recorder.of(EpochEnd)) == 3
    with pytest.raises(CallbackProcessError, match=text) as raised:
        callback = Exits(how)
        callback.on_error = "raise"  # type: ignore[misc]
        tiny_trainer().train(tiny_loader(), epochs=10**6, callbacks=[callback])
    assert raised.value.exit_code == code


# Bad input ---------------------------------------------------------------------------------------


def test_what_cannot_go_to_another_process_is_an_error_before_the_run_starts() -> None:
    trainer = tiny_trainer()
    for value, what in (
        (threading.Lock(), "a _thread.lock"),
        (open(__file__), "a _io.TextIOWrapper"),
        (torch.zeros(1, device="meta"), "a tensor on meta"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"Holds.settings['log'] holds {what}")):
            trainer.train(tiny_loader(), epochs=1, callbacks=[Holds(value)])
        if hasattr(value, "close"):
            value.close()
    # Nothing is taken.
    assert trainer.train(tiny_loader(), epochs=1, callbacks=[Holds(1)]).status == "completed"


@pytest.mark.parametrize(("callback", "name"), [(Decides(), "on_epoch_end"), (Hooks(), "after_step")])
def test_deciders_and_step_hooks_stay_in_the_training_thread(callback: Callback, name: str) -> None:
    text = f'runs_in="process" and {name}, which runs in the training thread: leave runs_in out, or split it'
    with pytest.raises(ConfigError, match=text):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])


def test_another_place_is_refused() -> None:
    callback = Holds(1)
    callback.runs_in = "thread"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="runs_in must be 'here' or 'process'"):
        tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[callback])


def test_output_log_records_and_events_of_a_child_arrive(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "mine"):
        result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Talks(), recorder])
    captured = capsys.readouterr()
    assert "a" * 1_000_000 in captured.out
    assert "to stderr" in captured.err
    assert [each.message for each in caplog.records if each.name == "mine"] == ["a record"]
    (unknown,) = recorder.of(UnknownEvent)
    assert unknown.type.endswith("Local")
    assert "on_epoch_end is a plain def that returned an awaitable" in result.callback_errors["Talks"][0]


def test_a_process_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: b"/no/such/python")
    result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Holds(1)])
    assert result.status == "completed"
    (error,) = result.callback_errors["Holds"]
    assert error.startswith(
        "its process: CallbackProcessError: the process of Holds could not be started: FileNotFound"
    )


# Ends --------------------------------------------------------------------------------------------


def test_a_child_whose_interpreter_hangs_is_ended_after_its_drain_timeout(tmp_path: Path) -> None:
    """Takes the two seconds in which a child must answer its cancellation."""
    recorder, log = Recorder(), tmp_path / "log"
    result = tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Hangs(log), Gate("hangs"), recorder])
    assert result.status == "completed"
    assert any("still busy 0.2 s after the end" in each for each in result.callback_errors["Hangs"])
    assert not log.exists()
    (pid,) = seen(recorder)["hangs"]
    assert not _is_alive(pid)


SCRIPT: Final = """
import os, re, sys
import offloop
from offloop.engine.testing import EndlessLoader, tiny_trainer

print("imported", flush=True)


class Note(offloop.Event, frozen=True):
    pid: int
    has_torch: bool


class Busy(offloop.Callback):
    runs_in = "process"

    def on_train_start(self, event, run):
        run.publish(Note(pid=os.getpid(), has_torch="torch" in sys.modules))
        {body}

    def close(self):
        print("closed", flush=True)


class Shows(offloop.Callback):
    def on_note(self, event, run):
        print(f"child {{event.pid}} {{event.has_torch}}", flush=True)


tiny_trainer().train(EndlessLoader(), max_steps=10**9, callbacks=[Busy(), Shows()])
"""


def _start(tmp_path: Path, body: str) -> tuple["subprocess.Popen[str]", int]:
    """Start a script without a `__main__` guard; return it and the pid of its child once that is busy."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=body))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    _, child, has_torch = process.stdout.readline().split()
    # The class went by value: its script is not run again, and torch is not loaded.
    assert has_torch == "False"
    return process, int(child)


@pytest.mark.parametrize("body", ["while True: pass", "re.match(r'(a+)+$', 'a' * 60 + 'b')"])
def test_a_parent_that_is_killed_leaves_no_child(body: str, tmp_path: Path) -> None:
    process, child = _start(tmp_path, body)
    descriptor = os.pidfd_open(child)
    try:
        process.kill()
        process.communicate()
        _wait_for_end(descriptor)
    finally:
        os.close(descriptor)


def test_ctrl_c_reaches_the_parent_only_and_the_child_is_closed(tmp_path: Path) -> None:
    process, child = _start(tmp_path, "pass")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=LONG)
    # Run once, and closed in order.
    assert output.splitlines() == ["closed"]
    assert process.returncode in (1, -signal.SIGINT)
    assert not _is_alive(child)


def _wait_for_end(descriptor: int) -> None:
    """Wait for the end of a process that is no child of this one, two seconds at most: the promise."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(2_000)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_weights_do_not_depend_on_process_callbacks() -> None:
    def weights(*callbacks: Callback) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(seed=0)
        trainer.train(tiny_loader(), epochs=3, callbacks=callbacks)
        return trainer.model.state_dict()

    without = weights()
    for each in (weights(Slow(), Slow()), weights(Exits("exit")), weights(Raises())):
        assert all(torch.equal(each[name], without[name]) for name in without)
