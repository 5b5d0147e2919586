"""What the tests of several processes share. They run one at a time: each takes all cores."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rank_scripts.worker import WORKER
from torchrun import Torchrun


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module")
def one_at_a_time(session_folder: Path) -> Iterator[None]:
    """Hold the lock of these tests."""
    with (session_folder / "distributed.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Scenarios:
    """The results of scenarios that ran one after another in one group of ranks."""

    def __init__(self, folder: Path, names: Sequence[str], ranks: int) -> None:
        self.folder = folder
        self.names = names
        self.ranks = ranks
        self.report = json.loads((folder / "report.json").read_text())

    def of(self, name: str) -> list[Any]:
        """Return what the ranks found, by rank; fail the test if one of them failed."""
        results = [_read(self.folder / f"{name}-0-{rank}.json") for rank in range(self.ranks)]
        if not any(results):
            pytest.fail("it did not run: an earlier scenario ended the ranks", pytrace=False)
        if not all(each is not None and "result" in each for each in results):
            errors = [
                f"rank {rank}: " + ("nothing" if each is None else each.get("traceback", "fine"))
                for rank, each in enumerate(results)
            ]
            pytest.fail("\n".join([*errors, self.report["outputs"]]), pytrace=False)
        self.check_collectives(name)
        return [each["result"] for each in results]

    def check_collectives(self, name: str) -> None:
        """Check that all ranks called the same collectives in the same order."""
        calls = [_calls(self.folder / f"collectives-0-{rank}.jsonl", name) for rank in range(self.ranks)]
        for number, of_all in enumerate(zip(*calls, strict=False)):
            assert all(each == of_all[0] for each in of_all), f"collective {number}: by rank {of_all}"
        assert len({len(each) for each in calls}) == 1, f"numbers of collectives: {[len(c) for c in calls]}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _calls(path: Path, name: str) -> list[Any]:
    """Return the collectives of one scenario, each as kind and details."""
    found: list[Any] = []
    inside = False
    for line in path.read_text().splitlines():
        call = json.loads(line)["call"]
        if call[0] == "scenario":
            inside = call[1] == name
        elif inside:
            found.append(call)
    return found


@pytest.fixture(scope="module")
def run_scenarios(session_folder: Path) -> Callable[..., Scenarios]:
    """Run scenarios in one group, or return what they found if another process of pytest-xdist has run them."""

    def run(module: str, names: Sequence[str], *, ranks: int = 2) -> Scenarios:
        folder = session_folder / f"scenarios-{module}"
        with (session_folder / "distributed.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (folder / "report.json").exists():
                environment = {"OFFLOOP_TEST_RUNS": str(folder / "runs")}
                with Torchrun(
                    folder, WORKER, str(folder), module, *names, ranks=ranks, environment=environment
                ) as started:
                    try:
                        code: int | None = started.wait(150.0)
                    except TimeoutError:
                        code = None
                    report = {"code": code, "outputs": started.describe()}
                (folder / "report.json").write_text(json.dumps(report))
        return Scenarios(folder, names, ranks)

    return run
