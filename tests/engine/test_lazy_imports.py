"""engine/lazy_imports.py, and what relies on it: packages that are imported at their first use, by any thread."""

import logging
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from offloop.engine import Callback, Event, TrainerConfig, first_use
from offloop.engine import lazy_imports as lazy_imports_module
from offloop.engine.bus.step_times import StepTimes
from offloop.engine.callback import Handlers
from offloop.engine.lazy_imports import was_importing
from offloop.engine.metrics.names import check_metrics, metric_direction
from offloop.engine.observers.cost_watch import CostWatch, Stretch
from offloop.engine.observers.observer import Observer
from offloop.engine.testing import tiny_loader, tiny_trainer


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a package that is not imported yet, with a module `part` that needs the whole root."""
    name = "offloop_test_package"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"from {name} import part\nvalue = 1\n")
    (tmp_path / name / "part.py").write_text("import sys\n")
    monkeypatch.syspath_prepend(tmp_path)
    for each in (name, f"{name}.part"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return name


def test_the_root_is_loaded_before_the_block(package: str) -> None:
    with first_use(package):
        assert sys.modules[package].value == 1


def test_a_package_that_is_missing_is_an_import_error() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match="offloop_no_such_package"),
        first_use("offloop_no_such_package"),
    ):
        raise AssertionError("not reached")
    with first_use("json"):  # the lock was given back
        pass


def test_one_thread_imports_at_a_time(package: str) -> None:
    is_trying, is_inside, problems = threading.Event(), threading.Event(), []

    def second() -> None:
        is_trying.set()
        try:
            with first_use(package):
                is_inside.set()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=second)
    with first_use(package), first_use("json"):  # one may lead to another
        thread.start()
        assert is_trying.wait(10)
        assert not is_inside.is_set()
    thread.join(10)
    assert is_inside.is_set() and not problems


def test_importing_is_noticed_and_a_package_that_is_loaded_is_not(package: str) -> None:
    with first_use("json"):
        assert was_importing(0.0)
    before = lazy_imports_module._ended_at
    with first_use("json"):
        pass
    assert lazy_imports_module._ended_at == before
    with first_use(package):
        pass
    assert lazy_imports_module._ended_at > before
    assert was_importing(before) and not was_importing(float("inf"))


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="forks")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent(tmp_path: Path, warm_python: Any) -> None:
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, threading, warnings\n"
        "from offloop.engine import first_use\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # from Python 3.12 on, of forks beside threads\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with first_use('json'):\n"
        "        held.set()\n"
        "        done.wait()\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    with first_use('json'):\n"
        "        os._exit(7)\n"
        "_, status = os.waitpid(child, 0)\n"
        "done.set()\n"
        "assert os.waitstatus_to_exitcode(status) == 7\n"
    )
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr


class Slow(Callback):
    async def on_event(self, event: Event, run: Any) -> None: ...


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_import_of_ours_is_not_blamed_on_a_callback(
    is_ours: bool, package: str, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = Handlers(Slow(), "Slow")
    watch = CostWatch(handlers, StepTimes(0.0))
    observer = Observer(handlers, None, None, lambda _: None, lambda _: None, watch=watch)
    if is_ours:
        with first_use(package):
            pass
    else:
        lazy_imports_module._ended_at = -float("inf")
    # The event loop stood still for a second that has just ended.
    observer.account(Stretch(time.perf_counter() - 1.0, 1.0, 0.01, 0))
    assert observer.costs.held == (0.01 if is_ours else 1.0)
    warned = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert bool(warned) is not is_ours


# Packages that another thread is importing at this moment -----------------------------------------


def test_metrics_are_checked_while_another_thread_imports_torchmetrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", types.ModuleType("torchmetrics"))
    for half in ({}, {"torchmetrics.metric": types.ModuleType("torchmetrics.metric")}):
        monkeypatch.delitem(sys.modules, "torchmetrics.metric", raising=False)
        for name, module in half.items():
            monkeypatch.setitem(sys.modules, name, module)
        check_metrics(["accuracy"])
        assert metric_direction("val_accuracy", ["accuracy"]) == "max"


def test_a_config_is_made_while_another_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert TrainerConfig(device="cpu").device == "cpu"


def test_runs_that_begin_together_import_torchmetrics_once_and_before_their_first_event(
    tmp_path: Path, warm_python: Any
) -> None:
    script = tmp_path / "together.py"
    script.write_text(
        "import sys, threading\n"
        "import torch\n"
        "from offloop.engine import Callback, Trainer, decides\n"
        "class Looks(Callback):\n"
        "    @decides\n"
        "    def on_train_start(self, event, run):\n"
        "        seen.append('offloop.engine.metrics.named' in sys.modules)\n"
        "def train():\n"
        "    model = torch.nn.Linear(4, 3)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    trainer = Trainer(model, optimizer, loss=torch.nn.functional.cross_entropy, device='cpu')\n"
        "    result = trainer.train(batches, epochs=1, metrics=['accuracy'], callbacks=[Looks()])\n"
        "    statuses.append(result.status)\n"
        "batches = [(torch.randn(8, 4), torch.arange(8) % 3)] * 2\n"
        "seen, statuses = [], []\n"
        "assert 'torchmetrics' not in sys.modules\n"
        "threads = [threading.Thread(target=train) for _ in range(6)]\n"
        "threads[0].start()\n"
        "while 'torchmetrics' not in sys.modules:  # the first one has begun to import it\n"
        "    threading.Event().wait(0.001)\n"
        "for each in threads[1:]:\n"
        "    each.start()\n"
        "for each in threads:\n"
        "    each.join()\n"
        "assert statuses == ['completed'] * 6, statuses\n"
        "assert seen == [True] * 6, seen\n"
    )
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr


def test_a_run_with_a_remote_directory_waits_for_no_import_of_another_thread(tmp_path: Path) -> None:
    """Its store's package is loaded when the trainer is made."""
    trainer = tiny_trainer(remote_dir=f"file://{tmp_path}/remote", run_dir=tmp_path / "runs")
    is_held, is_over = threading.Event(), threading.Event()

    def import_for_long() -> None:
        with first_use("json"):
            is_held.set()
            assert is_over.wait(60)

    thread = threading.Thread(target=import_for_long)
    thread.start()
    try:
        assert is_held.wait(60)
        assert trainer.train(tiny_loader(1), epochs=1).status == "completed"
    finally:
        is_over.set()
        thread.join()
