"""The protocol, spoken by a client that shares no line with ours: Node's `ws`, and what docs/dashboard.md says."""

import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from offloop.dashboard import Dashboard
from offloop.engine import CommandApplied, Sample, StepEnd, ValidationEnd
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_trainer

ROOT: Final = Path(__file__).parents[2]
NODE_MODULES: Final = ROOT / "dashboard" / "web" / "node_modules"
CLIENT: Final = Path(__file__).parent / "web_client" / "follow.cjs"
LR: Final = 0.125


@pytest.fixture
def node() -> str:
    """Node's path. .ci/run sets OFFLOOP_REQUIRE_BROWSER=1, and then it must be there, with `ws`."""
    found = shutil.which("node")
    if found is not None and (NODE_MODULES / "ws").is_dir():
        return found
    missing = "the second client needs node, and its packages: make page-test"
    if os.environ.get("OFFLOOP_REQUIRE_BROWSER") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


class UntilApplied:
    """Gives batches until a command was applied, and then a hundred more."""

    def __init__(self) -> None:
        self.applied = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        left = 100
        while left:
            for batch in tiny_batches(10):
                left -= self.applied.is_set()
                yield batch
                if not left:
                    return


class Applied(Recorder):
    """Tells the loader."""

    def __init__(self, loader: UntilApplied) -> None:
        super().__init__()
        self.loader = loader

    async def on_command_applied(self, event: CommandApplied, run: Any) -> None:
        self.events.append(event)
        self.loader.applied.set()


def test_a_client_from_the_docs_sees_the_run_and_steers_it(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    loader = UntilApplied()
    recorder = Applied(loader)
    with Dashboard(port=0, quiet=True) as dashboard:
        client = subprocess.Popen(
            [node, str(CLIENT), dashboard.url, str(LR)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"NODE_PATH": str(NODE_MODULES)},
        )
        result = tiny_trainer().train(
            loader, tiny_loader(2), epochs=1, metrics=["accuracy"], callbacks=[dashboard, recorder]
        )
    out, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors.decode()
    seen = json.loads(out)

    assert seen["hello"]["role"] == "control" and seen["hello"]["protocol"] == 1
    assert seen["run"]["key"] == result.run_id and seen["run"]["refused"].keys() == {"checkpoint", "tag"}
    assert seen["status"]["state"] == "completed" and seen["status"]["step"] == result.steps
    milestones = [event for event in recorder.events if not isinstance(event, Sample)]
    assert [event["type"] for event in seen["milestones"]] == [type(event).__name__ for event in milestones]
    assert [event["seq"] for event in seen["milestones"]] == [event.seq for event in milestones]
    assert [ack["state"] for ack in seen["acks"]] == ["accepted", "applied"]
    assert seen["bye"]["reason"] == "the dashboard was closed"
    assert seen["close"] == {"code": 1001, "reason": "the dashboard was closed"}

    steps = recorder.of(StepEnd)
    (validation,) = recorder.of(ValidationEnd)
    assert seen["curves"]["val_loss"] == [[validation.step, validation.metrics["val_loss"]]]
    if len(steps) <= 4_000:  # else the first snapshot may hold the least and the greatest alone
        assert seen["curves"]["loss"] == [[event.step, event.loss] for event in steps]
        assert seen["curves"]["lr"] == [[event.step, event.lr] for event in steps]
    assert seen["curves"]["lr"][-1] == [result.steps, LR]
    assert all(math.isfinite(value) for _, value in seen["curves"]["loss"])
