"""Labels of runs: kept in labels.json, replaced whole, and never overwritten by an edit of an older version."""

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from offloop.engine import (
    ConfigError,
    RunLabels,
    RunLabelsChangedError,
    RunLabelsError,
    edit_labels,
    read_labels,
)


def test_edits_add_up(tmp_path: Path) -> None:
    assert read_labels(tmp_path) == RunLabels()
    edit_labels(tmp_path, version=0, name="first", tags=["a", "b", "a"])
    labels = edit_labels(tmp_path, version=1, note="two\nlines", archived=True)
    assert labels == RunLabels(name="first", tags=("a", "b"), note="two\nlines", archived=True, version=2)
    assert read_labels(tmp_path) == labels
    assert edit_labels(tmp_path, version=2, name="", tags=[]).tags == ()
    assert os.listdir(tmp_path) == ["labels.json"]


def test_the_second_of_two_edits_of_one_version_is_refused(tmp_path: Path) -> None:
    edit_labels(tmp_path, version=0, note="mine")
    with pytest.raises(
        RunLabelsChangedError, match="have version 1, and this edit is based on version 0"
    ) as found:
        edit_labels(tmp_path, version=0, note="theirs")
    assert found.value.version == 1
    assert pickle.loads(pickle.dumps(found.value)).version == 1
    assert read_labels(tmp_path).note == "mine"


def test_of_many_edits_at_once_one_wins(tmp_path: Path) -> None:
    barrier, won = threading.Barrier(8), list[int]()

    def edit(number: int) -> None:
        barrier.wait()
        try:
            edit_labels(tmp_path, version=0, note=str(number))
            won.append(number)
        except RunLabelsChangedError:
            pass

    threads = [threading.Thread(target=edit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_labels(tmp_path).note == str(won[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "x" * 201}, "name must have at most 200 characters, got 201"),
        ({"name": "a\nb"}, "name must be one line"),
        ({"name": "\ud800"}, r"name must be text without invisible characters, got U\+D800"),
        ({"name": "a\u202eb"}, r"name must be text without invisible characters, got U\+202E in 'a\\u202eb'"),
        ({"tags": ["a\u200b"]}, r"tags must be text without invisible characters, got U\+200B"),
        ({"note": "one\ntwo\x1b[31m"}, r"note must be text without invisible characters, got U\+001B"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"tags": ["x" * 101]}, "tags must have at most 100 characters"),
        ({"tags": [str(n) for n in range(51)]}, "tags must be at most 50, got 51"),
        ({"tags": [" "]}, "tags must not be empty"),
        ({"tags": "abc"}, "tags must be a list of strings"),
        ({"note": "x" * 1_000_000}, "note must have at most 16,384 characters, got 1,000,000"),
        ({"archived": "yes"}, "archived must be True or False"),
    ],
)
def test_values_out_of_bounds_change_nothing(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        edit_labels(tmp_path, version=0, **changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"tags": 3}', '{"version": "x"}', "[" * 5000])
def test_a_broken_file_is_reported_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(RunLabelsError, match=r"labels\.json holds no labels"):
        read_labels(tmp_path)
    with pytest.raises(RunLabelsError):
        edit_labels(tmp_path, version=0, note="new")
    assert (tmp_path / "labels.json").read_text() == content


def test_invisible_characters_that_another_program_wrote_are_replaced(tmp_path: Path) -> None:
    labels = {"name": "a\u202eb", "tags": ["\u200bx"], "note": "one\ntwo\x1b[31m"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    found = read_labels(tmp_path)
    assert (found.name, found.tags, found.note) == ("a\ufffdb", ("\ufffdx",), "one\ntwo\ufffd[31m")


def test_words_that_need_joiners_keep_them(tmp_path: Path) -> None:
    # A Persian verb and a family: both fall apart without their joiner
    name = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \N{WOMAN}\u200d\N{GIRL}"
    edit_labels(tmp_path, version=0, name=name)
    assert read_labels(tmp_path).name == name


def test_fields_of_a_later_version_stay(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"name": "a", "colour": "red", "version": 4}')
    edit_labels(tmp_path, version=4, name="b")
    found = json.loads((tmp_path / "labels.json").read_text())
    assert found == {"name": "b", "colour": "red", "version": 5}


def test_nothing_is_written_through_a_link_or_outside_a_run(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("{}")
    (tmp_path / "labels.json").symlink_to(other)
    with pytest.raises(OSError, match="link"):
        edit_labels(tmp_path, version=0, note="x")
    assert other.read_text() == "{}"
    with pytest.raises(FileNotFoundError, match="no run directory"):
        edit_labels(tmp_path / "gone", version=0, note="x")
