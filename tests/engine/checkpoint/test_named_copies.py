"""engine/checkpoint/named_copies.py: copies are whole or not there, and go with their checkpoints, whatever dies."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from checkpoint_support import DyingFileSystem, Killed, save

from offloop.engine.checkpoint import CheckpointReader, CheckpointStore, NamedCopies, Retention
from offloop.engine.checkpoint.filesystem import FileSystem


def save_and_copy(root: Path, step: int, filesystem: FileSystem | None = None) -> None:
    """Save in a process of its own, as it were: what it knew of its copies is forgotten."""
    with CheckpointStore(root / "run", retention=Retention(keep_last=2)) as store:
        commit = save(store, step)
        assert commit.problems == ()
        copies = NamedCopies(root / "models", root / "run", lambda info: f"at-{info.step}", filesystem)
        copies.mirror(store.checkpoints()[::-1])


def steps_in(root: Path) -> list[int]:
    return [info.step for info in CheckpointReader(root / "run").checkpoints()]


def test_death_at_any_operation_leaves_whole_copies_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    root, before = tmp_path / "root", tmp_path / "before"  # the same path each time, as of a run that goes on
    for step in (1, 2, 3, 4, 5):
        save_and_copy(root, step)
    root.rename(before)
    for die_at in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        filesystem = DyingFileSystem(die_at)
        with suppress(Killed):
            save_and_copy(root, 6, filesystem)
        reader = CheckpointReader(root / "models")
        for path in (root / "models").iterdir():
            if not path.name.startswith("."):
                reader.verify(reader.find(path))
        save_and_copy(root, 7)
        found = sorted(path.name for path in (root / "models").iterdir())
        assert found == ["at-6", "at-7"] and steps_in(root) == [6, 7]
        noted = [path.name for path in (root / "run" / "refs" / "copies").rglob("at-*")]
        assert sorted(noted) == found
        if filesystem.count < die_at:
            break
    assert die_at > 15


def test_copies_of_checkpoints_that_went_without_them_go_at_the_next_start(tmp_path: Path) -> None:
    for step in (1, 2):
        save_and_copy(tmp_path, step)
    with CheckpointStore(tmp_path / "run", retention=Retention(keep_last=2)) as store:
        assert save(store, 3).deleted  # and then the process was killed
    NamedCopies(tmp_path / "models", tmp_path / "run", str).take_over()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["at-2"]


# Names that several want ---------------------------------------------------------------------------


def copies_of(root: Path, filesystem: FileSystem | None = None) -> dict[str, int]:
    """Return the step that each name leads to; all that can be seen is whole."""
    reader = CheckpointReader(root / "models")
    found = {}
    for path in (root / "models").iterdir():
        if not path.name.startswith("."):
            reader.verify(reader.find(path))
            found[path.name] = reader.find(path).step
    return found


def mirror_under_one_name(root: Path, *steps: int, filesystem: FileSystem | None = None) -> None:
    known = {info.step: info for info in CheckpointReader(root / "run").checkpoints()}
    copies = NamedCopies(root / "models", root / "run", lambda info: "best", filesystem)
    copies.mirror([known[step] for step in steps])


def test_first_of_several_has_the_name_and_the_others_numbers(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "run", retention=Retention(keep_last=None)) as store:
        for step in range(1, 6):
            save(store, step)
    for wanted, expected in (
        ([1], {"best": 1}),
        ([2, 1], {"best": 2, "best-2": 1}),
        ([3, 2], {"best": 3, "best-2": 2}),
        ([3, 4, 2], {"best": 3, "best-2": 4, "best-3": 2}),
        ([2, 3, 4], {"best": 2, "best-2": 3, "best-3": 4}),  # all of them change places
        ([4], {"best": 4}),
        ([], {}),
    ):
        mirror_under_one_name(tmp_path, *wanted)
        assert copies_of(tmp_path) == expected
        assert not [path for path in (tmp_path / "models").iterdir() if path.name.startswith(".")]


def test_death_while_a_name_changes_hands_leaves_whole_copies_and_is_mended(tmp_path: Path) -> None:
    root, before = tmp_path / "root", tmp_path / "before"
    with CheckpointStore(root / "run", retention=Retention(keep_last=None)) as store:
        for step in (1, 2, 3):
            save(store, step)
    mirror_under_one_name(root, 2, 1)
    root.rename(before)
    for die_at in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        filesystem = DyingFileSystem(die_at)
        with suppress(Killed):
            mirror_under_one_name(root, 3, 2, filesystem=filesystem)
        assert copies_of(root).items() <= {("best", 2), ("best", 3), ("best-2", 1), ("best-2", 2)}
        mirror_under_one_name(root, 3, 2)
        assert copies_of(root) == {"best": 3, "best-2": 2}
        assert len(os.listdir(root / "models")) == 2
        if filesystem.count < die_at:
            break
    assert die_at > 15


def test_copy_that_cannot_be_made_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    class Refusing(FileSystem):
        def make_directory(self, path: Path) -> None:
            raise OSError(28, "injected")

    with CheckpointStore(tmp_path / "run", retention=Retention(keep_last=None)) as store:
        for step in (1, 2):
            save(store, step)
    mirror_under_one_name(tmp_path, 1)
    with suppress(OSError):
        mirror_under_one_name(tmp_path, 2, filesystem=Refusing())
    assert copies_of(tmp_path) == {"best": 1}


def test_copy_that_a_person_has_removed_stays_away(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "run") as store:
        first, second = save(store, 1).info, save(store, 2).info
    copies = NamedCopies(tmp_path / "models", tmp_path / "run", lambda info: f"at-{info.step}")
    copies.mirror([first])
    shutil.rmtree(tmp_path / "models" / "at-1")
    copies.mirror([second, first])
    copies.mirror([second, first])
    assert copies_of(tmp_path) == {"at-2": 2}


def test_owners_that_share_a_directory_leave_each_other_alone(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "run", retention=Retention(keep_last=None)) as store:
        known = {step: save(store, step).info for step in (1, 2, 3)}

    def owner(name: str) -> NamedCopies:
        return NamedCopies(tmp_path / "models", tmp_path / "run", lambda info: name)

    for loss, accuracy in ((1, 1), (2, 1), (2, 3)):  # as of a new process each time
        owner("least-loss").mirror([known[loss]])
        owner("accuracy").mirror([known[accuracy]])
        assert copies_of(tmp_path) == {"least-loss": loss, "accuracy": accuracy}
    assert owner("a").collides_with(owner("a")) is False  # two functions are two patterns


def test_another_runs_copies_and_foreign_things_are_never_touched(tmp_path: Path) -> None:
    """Not even those of a run with the same id, in another directory."""
    models = tmp_path / "models"
    for number in ("one", "two"):
        with CheckpointStore(tmp_path / number / "run") as store:
            commit = save(store, 1)
            NamedCopies(models, tmp_path / number / "run", lambda info: "best").mirror([commit.info])
    (models / "notes.txt").write_text("mine")
    (models / ".tmp-of-a-tool").mkdir()
    (models / "link").symlink_to(models / "best")
    before = sorted(os.listdir(models))
    shutil.rmtree(tmp_path / "two" / "run" / "checkpoints")
    NamedCopies(models, tmp_path / "two" / "run", str).take_over()
    assert sorted(os.listdir(models)) == [name for name in before if name != "best-2"]


def test_name_that_a_stranger_has_taken_since_is_not_removed(tmp_path: Path) -> None:
    save_and_copy(tmp_path, 1)
    copy = tmp_path / "models" / "at-1"
    shutil.rmtree(copy)
    copy.mkdir()
    (copy / "theirs").write_text("x")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    NamedCopies(tmp_path / "models", tmp_path / "run", str).take_over()
    assert (copy / "theirs").read_text() == "x"
    assert not list((tmp_path / "run" / "refs" / "copies").rglob("at-1"))


def test_link_under_a_temporary_name_is_removed_and_not_followed(tmp_path: Path) -> None:
    save_and_copy(tmp_path, 1)
    copies = NamedCopies(tmp_path / "models", tmp_path / "run", str)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    link = tmp_path / "models" / f"{copies._temporary}at-2"
    link.symlink_to(victim)
    copies.take_over()
    assert not os.path.lexists(link) and (victim / "precious").read_text() == "x"
