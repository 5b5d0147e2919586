"""The registry: versions count up and stay, whoever registers at once and whatever dies in the middle."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoint_support import FailingFileSystem, VolatileFileSystem, small_weights
from power_cut import Done, Files, PowerCut, RecordingFileSystem, read_tree, seen_by_readers, write_tree

from offloop.callbacks import ModelCheckpoint
from offloop.engine import ConfigError, ModelNotFoundError, ModelRegistry, WeightsError, load_model
from offloop.engine.checkpoint import CheckpointCorruptError, CheckpointWriteError
from offloop.engine.checkpoint.filesystem import FileSystem
from offloop.engine.testing import tiny_loader, tiny_trainer
from offloop.engine.weights.registry import content_identity

NEVER = 1 << 60


def value_of(state: dict[str, torch.Tensor]) -> float:
    assert torch.equal(state["weight"], torch.full((3, 4), float(state["count"])))
    assert torch.equal(state["tied"], state["weight"])
    return float(state["count"])


def contents(registry: ModelRegistry, name: str = "model") -> dict[int, float]:
    """Return what each version holds, with every byte checked."""
    if not registry.models():
        return {}
    found = registry.versions(name)
    for version in found:
        registry.verify(version)
    return {version.number: value_of(load_model(version)) for version in found}


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".*")]


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", filesystem=VolatileFileSystem())


def test_versions_count_from_one_and_are_found_by_number_alias_and_as_the_newest(
    registry: ModelRegistry,
) -> None:
    for value in (10, 20, 30):
        assert registry.register(small_weights(value), "model").number == value // 10
    registry.alias("model", "champion", 2)
    directory = registry.directory
    assert value_of(load_model("model:1", registry=directory)) == 10
    assert value_of(load_model("model@champion", registry=directory)) == 20
    assert value_of(load_model("model", registry=directory)) == 30
    assert value_of(load_model("model@latest", registry=directory)) == 30
    assert registry.find("model@champion").aliases == ("champion",)
    assert registry.models() == ["model"]
    assert contents(registry) == {1: 10, 2: 20, 3: 30}


def test_alias_moves_and_goes(registry: ModelRegistry) -> None:
    registry.register(small_weights(1), "model", alias="champion")
    registry.register(small_weights(2), "model", alias="challenger")
    assert registry.aliases("model") == {"challenger": 2, "champion": 1}
    assert registry.alias("model", "champion", "challenger").number == 2
    registry.unalias("model", "challenger")
    registry.unalias("model", "challenger")  # one that is gone is fine
    assert registry.aliases("model") == {"champion": 2}


def test_version_knows_the_run_that_made_it_and_outlives_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        callbacks=[ModelCheckpoint()], run_dir=str(tmp_path / "runs"), run_name="first", seed=3
    )
    trainer.train(tiny_loader(4), tiny_loader(2), epochs=2)
    registry = ModelRegistry(tmp_path / "models")
    made = registry.register(tmp_path / "runs" / "first", "tiny", alias="champion", notes="the first")
    shutil.rmtree(tmp_path / "runs")
    version = registry.find("tiny@champion")
    assert version == made
    assert (version.run_id, version.step, version.notes) == ("first", 8, "the first")
    assert version.metrics["val_loss"] > 0
    assert version.run["config"]["seed"] == 3 and version.run["versions"]["torch"]
    assert Path(version.source).name.startswith("step-000000008-a0")
    loaded = load_model(version)
    assert all(torch.equal(loaded[name], each) for name, each in trainer.model.state_dict().items())
    assert sorted(path.name for path in version.path.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "state.json",
    ]


def test_same_weights_become_no_second_version(registry: ModelRegistry) -> None:
    first = registry.register(small_weights(1), "model")
    registry.register(small_weights(2), "model")
    again = registry.register(dict(reversed(small_weights(1).items())), "model", alias="champion")
    assert again.number == first.number and again.aliases == ("champion",)
    assert contents(registry) == {1: 1, 2: 2}


def test_identity_is_of_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0000001])},
        {"a": torch.zeros(4)},
    ]
    identities = {content_identity(each) for each in [base, *others]}
    assert len(identities) == len(others) + 1
    transposed = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).t()
    assert content_identity({"a": transposed}) == content_identity({"a": torch.zeros(2, 2)})


@pytest.mark.parametrize("wrong", ["", ".hidden", "a/b", "..", "a b", "x" * 65, "a@b", "a:1"])
def test_improper_names_are_refused_before_anything_is_written(registry: ModelRegistry, wrong: str) -> None:
    with pytest.raises(ConfigError, match="name must be letters"):
        registry.register(small_weights(1), wrong)
    with pytest.raises(ConfigError, match="alias must"):
        registry.register(small_weights(1), "model", alias=wrong)
    assert not registry.directory.exists()


@pytest.mark.parametrize("alias", ["latest", "7"])
def test_alias_that_means_a_version_already_is_refused(registry: ModelRegistry, alias: str) -> None:
    with pytest.raises(ConfigError, match="name versions already"):
        registry.register(small_weights(1), "model", alias=alias)


def test_what_is_not_there_is_named_with_what_is(registry: ModelRegistry) -> None:
    with pytest.raises(ModelNotFoundError, match="there is: nothing"):
        registry.find("model")
    registry.register(small_weights(1), "model", alias="champion")
    for missing in ("model:2", "model@challenger"):
        with pytest.raises(ModelNotFoundError, match="there is: model@champion, model:1") as caught:
            registry.find(missing)
        assert caught.value.known == ("model@champion", "model:1")
    with pytest.raises(ModelNotFoundError, match="there is: model"):
        registry.versions("modle")


def test_source_without_weights_registers_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        registry.register(tmp_path / "missing.pt", "model")
    assert registry.models() == []


# Damage --------------------------------------------------------------------------------------------


def test_damaged_version_is_told_of_and_its_number_is_not_used_again(registry: ModelRegistry) -> None:
    for value in (1, 2):
        registry.register(small_weights(value), "model")
    newest = registry.find("model:2")
    (newest.path / "MANIFEST.json").write_text("{}")
    assert [version.number for version in registry.versions("model")] == [1]
    assert [error.path for error in registry.damaged("model")] == [newest.path]
    with pytest.raises(CheckpointCorruptError):
        registry.find("model:2")
    assert registry.register(small_weights(3), "model").number == 3


def test_changed_byte_is_found(registry: ModelRegistry) -> None:
    version = registry.register(small_weights(1), "model")
    file = version.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        registry.verify(version)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        load_model(version)


def test_version_in_the_place_of_another_is_found(registry: ModelRegistry) -> None:
    first, second = (registry.register(small_weights(value), "model") for value in (1, 2))
    shutil.rmtree(first.path)
    shutil.copytree(second.path, first.path)
    with pytest.raises(CheckpointCorruptError, match="not the manifest of model:1"):
        registry.find("model:1")


def test_damaged_alias_is_as_good_as_none(registry: ModelRegistry) -> None:
    registry.register(small_weights(1), "model", alias="champion")
    (registry.directory / "model" / "aliases" / "champion").write_text("../../etc")
    assert registry.aliases("model") == {}
    with pytest.raises(ModelNotFoundError):
        registry.find("model@champion")


# Crashes -------------------------------------------------------------------------------------------

NURSERY = """
    import os, signal, sys
    from checkpoint_support import InterceptedFileSystem, small_weights
    from offloop.engine import ModelRegistry
    from offloop.engine.weights.source import read_weights  # imports torch, once for all children


    class KillingFileSystem(InterceptedFileSystem):
        def __init__(self, kill_at):
            super().__init__()
            self.kill_at = kill_at

        def before(self, operation, argument):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def write(self, file, data):
            if self.count == self.kill_at:
                os.write(file, data[: len(data) // 2])
            return super().write(file, data)


    def one_that_is_killed(directory, kill_at):
        registry = ModelRegistry(directory, filesystem=KillingFileSystem(int(kill_at)))
        registry.register(small_weights(2), "model", alias="champion")


    def rival(directory, first, count):
        registry = ModelRegistry(directory)
        for value in range(int(first), int(first) + int(count)):
            version = registry.register(small_weights(value), "model", alias=f"of-{value}")
            print("said", value, version.number, flush=True)


    # Each line starts children of one kind, at once; the answer is how they ended.
    for line in sys.stdin:
        kind, *calls = line.split(";")
        children = []
        for call in calls:
            child = os.fork()
            if child == 0:
                {"kill": one_that_is_killed, "rivals": rival}[kind](*call.split())
                os._exit(0)
            children.append(child)
        print("ended", *(os.waitpid(child, 0)[1] for child in children), flush=True)
"""


class Nursery:
    """A process that has imported torch and forks those that register: each import takes seconds."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parent.parent / "checkpoint"), *sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(NURSERY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def start(self, kind: str, *calls: str) -> tuple[list[int], list[list[int]]]:
        """Return how each child ended, and the numbers that they said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(";".join([kind, *calls]) + "\n")
        self.process.stdin.flush()
        said: list[list[int]] = []
        while True:
            word, *numbers = self.process.stdout.readline().split()
            if word == "ended":
                return [int(each) for each in numbers], said
            said.append([int(each) for each in numbers])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    with made.process:
        yield made
        assert made.process.stdin is not None
        made.process.stdin.close()


def test_kill_at_any_operation_of_a_registration_leaves_old_or_new(tmp_path: Path, nursery: Nursery) -> None:
    """Real processes, killed with SIGKILL; their lock goes with them, and what they left is swept."""
    first = tmp_path / "first"
    ModelRegistry(first, filesystem=VolatileFileSystem()).register(
        small_weights(1), "model", alias="champion"
    )
    seen: list[tuple[int, int]] = []  # versions, and the one that the alias names
    for kill_at in range(1000):
        directory = tmp_path / str(kill_at)
        shutil.copytree(first, directory)
        [status], _ = nursery.start("kill", f"{directory} {kill_at}")
        registry = ModelRegistry(directory, filesystem=VolatileFileSystem())
        found = contents(registry)
        assert found in ({1: 1.0}, {1: 1.0, 2: 2.0})
        seen.append((len(found), registry.aliases("model")["champion"]))
        assert registry.register(small_weights(2), "model", alias="champion").number == 2  # as a retry would
        assert contents(registry) == {1: 1.0, 2: 2.0} and registry.aliases("model") == {"champion": 2}
        assert not leftovers(directory)
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert seen == sorted(seen) and set(seen) == {(1, 1), (2, 1), (2, 2)}
    assert len(seen) > 15


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_of_any_operation_is_typed_and_harms_nothing(tmp_path: Path, code: int) -> None:
    failures = 0
    for fail_at in range(1000):
        directory = tmp_path / str(fail_at)
        ModelRegistry(directory, filesystem=VolatileFileSystem()).register(small_weights(1), "model")
        filesystem = FailingFileSystem(fail_at, code)
        registry = ModelRegistry(directory, filesystem=filesystem)
        try:
            registry.register(small_weights(2), "model")
        except CheckpointWriteError as error:
            failures += 1
            assert error.errno == code
            assert contents(registry) == {1: 1.0}
        filesystem.fail_at = NEVER
        assert registry.register(small_weights(2), "model").number == 2
        assert contents(registry) == {1: 1.0, 2: 2.0}
        assert not leftovers(directory)
        if not filesystem.failed:
            assert failures > 10
            return
    pytest.fail("never got through")


Seen = tuple[dict[int, float], int | None]
"""What each version holds, and which one the alias names."""


def after_power_cuts(
    base: Path, before: Files, log: list[Done], scratch: Path
) -> Iterator[tuple[bool, Seen]]:
    """Yield what may be found: 60 random losses after each operation, and whether it was the last one."""
    cut, source, known = PowerCut(base, before), random.Random(0), dict[object, Seen]()
    for index in range(len(log) + 1):
        for files in [cut.random_tree(source) for _ in range(60)]:
            key = seen_by_readers(files)
            if key not in known:
                write_tree(files, scratch)
                registry = ModelRegistry(scratch)
                known[key] = (contents(registry), registry.aliases("model").get("champion"))
                shutil.rmtree(scratch)
            yield index == len(log), known[key]
        if index < len(log):
            cut.run(log[index])


def test_registered_version_survives_a_power_cut(tmp_path: Path) -> None:
    """Also the very first one, whose directories are new."""
    base = tmp_path / "models"
    base.mkdir()
    for value in (1, 2):
        before, filesystem = read_tree(base), RecordingFileSystem()
        ModelRegistry(base, filesystem=filesystem).register(small_weights(value), "model", alias="champion")
        old = {number: float(number) for number in range(1, value)}
        new = old | {value: float(value)}
        outcomes = []
        for is_done, (found, champion) in after_power_cuts(base, before, filesystem.log, tmp_path / "after"):
            assert found in (old, new)
            assert champion is None or champion in found
            assert not is_done or (found, champion) == (new, value), "durable when it says so"
            outcomes.append(found)
        assert old in outcomes and new in outcomes
        for forgotten in ("sync", "syncdir"):  # the model notices
            careless = [done for done in filesystem.log if done.operation != forgotten]
            with pytest.raises((AssertionError, CheckpointCorruptError)):
                for is_done, (found, _) in after_power_cuts(
                    base, before, careless, tmp_path / f"{forgotten}-{value}"
                ):
                    assert not is_done or found == new


def test_what_a_predecessor_left_is_durable_once_a_retry_has_returned(tmp_path: Path) -> None:
    """It was killed before its last fsyncs: the version and the alias are seen, and nobody writes them again."""
    base = tmp_path / "models"
    base.mkdir()
    before, filesystem = read_tree(base), RecordingFileSystem()
    registry = ModelRegistry(base, filesystem=filesystem)
    registry.register(small_weights(1), "model", alias="champion")
    lasting = (base, base / "model", base / "model" / "aliases")
    killed = [done for done in filesystem.log if done.operation != "syncdir" or done.path not in lasting]
    assert len(killed) < len(filesystem.log)
    filesystem.log.clear()
    registry.register(small_weights(1), "model", alias="champion")
    assert not [done for done in filesystem.log if done.operation != "syncdir"]
    log = [*killed, *filesystem.log]
    outcomes = [seen for is_done, seen in after_power_cuts(base, before, log, tmp_path / "after") if is_done]
    assert outcomes and all(seen == ({1: 1.0}, 1) for seen in outcomes)


# At once -------------------------------------------------------------------------------------------


def test_processes_that_register_at_once_neither_collide_nor_lose_a_version(
    tmp_path: Path, nursery: Nursery
) -> None:
    count = 6
    directory = tmp_path / "models"
    statuses, said = nursery.start("rivals", f"{directory} 100 {count}", f"{directory} 200 {count}")
    assert statuses == [0, 0] and len(said) == 2 * count
    registry = ModelRegistry(directory)
    assert contents(registry) == {number: float(value) for value, number in said}
    assert [version.number for version in registry.versions("model")] == list(range(1, 2 * count + 1))
    assert registry.aliases("model") == {f"of-{value}": number for value, number in said}
    assert not leftovers(directory)


def test_number_that_a_writer_without_locks_has_taken_is_left_to_it(tmp_path: Path) -> None:
    class Rival(FileSystem):
        """Puts a version in our way just before the rename."""

        done = False

        def rename(self, source: Path, target: Path) -> None:
            if not self.done:
                self.done = True
                shutil.copytree(source, target)
            super().rename(source, target)

    registry = ModelRegistry(tmp_path, filesystem=Rival())
    assert registry.register(small_weights(1), "model").number == 2
    assert [version.number for version in registry.versions("model")] == [1, 2]
    assert not leftovers(tmp_path)


def test_manifest_holds_the_lineage_as_plain_json(registry: ModelRegistry) -> None:
    version = registry.register(small_weights(1), "model", notes="by hand")
    line = (version.path / "MANIFEST.json").read_bytes().split(b"\n")[0]
    extra = msgspec.json.decode(line)["extra"]
    assert extra == {
        "model": "model",
        "identity": version.identity,
        "source": "a state dict",
        "notes": "by hand",
        "run": {},
    }
