"""dashboard/saved: texts, pictures and tables in a shared file, and which of them if there are too many."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import with_samples
from saved_file import blocks_of, runs_of

from offloop import export_html
from offloop.dashboard.serving.page import Page
from offloop.engine import PictureSample, TableSample, TextSample

pytestmark = pytest.mark.skipif(Page.load() is None, reason="the page is not built")


class SavedSamples:
    """The samples of the first run of a file."""

    def __init__(self, path: Path) -> None:
        (self.run, *_) = runs_of(path).values()
        block = blocks_of(path).get("saved-0-samples", b"\2\0\0\0[]")
        length = int.from_bytes(block[:4], "little")
        self.answers: list[Any] = json.loads(block[4 : 4 + length])
        self._contents = block[4 + length :]

    @property
    def entries(self) -> list[Any]:
        """The index."""
        return [entry for message in self.run.of("samples") for entry in message["samples"]]

    def content(self, seq: int, picture: int | None = None) -> bytes:
        (answer,) = (each for each in self.answers if each["seq"] == seq and each.get("picture") == picture)
        return self._contents[answer["at"] : answer["at"] + answer["size"]]

    def steps(self, key: str) -> list[int]:
        return [entry[3] for entry in self.entries if entry[1] == key]


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_texts_pictures_and_tables_are_as_they_were_published(tmp_path: Path) -> None:
    grey = noise(6, 4)
    long = "".join(f"line {number} \N{SNOWMAN}\n" for number in range(5_000))
    drawn = PictureSample("picture", grey, step=2)
    table = TableSample("table", ["image", "said"], [[grey, "x"], [255 - grey, "y"]], step=3)
    files = [drawn.picture.data, *(each.data for each in table.pictures)]
    texts = [TextSample("text", "short", step=1), TextSample("text", long, "a long one", step=2)]
    run = with_samples(tmp_path, "first", *texts, drawn, table)
    written = export_html([run], tmp_path / "shared.html")
    assert written.samples_left_out == 0
    saved = SavedSamples(tmp_path / "shared.html")
    assert [entry[1:4] for entry in saved.entries] == [
        ["text", "text", 1],
        ["text", "text", 2],
        ["picture", "picture", 2],
        ["table", "table", 3],
    ]
    first, second, third, fourth = (entry[0] for entry in saved.entries)
    assert saved.content(first) == b"short" and saved.content(second).decode() == long
    assert saved.content(third) == files[0]
    assert [saved.content(fourth, 0), saved.content(fourth, 1), saved.content(fourth)] == [*files[1:], b""]
    # The same picture is in the file once.
    assert files[0] == files[1]
    assert len({each["at"] for each in saved.answers if each.get("media_type") == "image/png"}) == 2
    event = next(each for each in saved.answers if each["seq"] == fourth and "picture" not in each)["event"]
    assert event["columns"] == ["image", "said"] and event["rows"][1][1] == "y"
    # Events do not repeat texts and rows.
    assert [each.get("text", "") for each in saved.run.events if each["type"] == "TextSample"] == ["", ""]


def test_a_run_without_samples_has_no_block_for_them(tmp_path: Path) -> None:
    export_html([with_samples(tmp_path, "first")], tmp_path / "shared.html")
    assert sorted(blocks_of(tmp_path / "shared.html")) == ["saved", "saved-0"]
    assert SavedSamples(tmp_path / "shared.html").entries == []


def test_too_many_samples_are_spread_over_the_run_and_the_keys(tmp_path: Path) -> None:
    pictures = [PictureSample("picture", noise(100, 100, 3, seed=step), step=step) for step in range(101)]
    texts = [TextSample("text", f"step {step}", step=step) for step in range(101)]
    run = with_samples(tmp_path, "first", *pictures, *texts)
    written = export_html([run], tmp_path / "shared.html", max_bytes=2_000_000)
    assert written.bytes <= 2_000_000
    saved = SavedSamples(tmp_path / "shared.html")
    assert written.samples_left_out == 202 - len(saved.entries)
    steps = saved.steps("picture")
    # 667 KB in base64 are room for 16 pictures of 30 KB.
    assert 10 <= len(steps) <= 17 and {0, 50, 100} <= set(steps)
    assert max(np.diff(steps)) <= 25
    assert len(saved.steps("text")) == 101
    # Only what is in the file is in its index: the newest, too.
    assert {entry[0] for entry in saved.entries} == {each["seq"] for each in saved.answers}


def test_a_sample_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    run = with_samples(tmp_path, "first", PictureSample("picture", noise(4, 4), step=1))
    (name,) = os.listdir(run / "samples")
    (run / "samples" / name).unlink()
    export_html([run], tmp_path / "shared.html")
    (answer,) = SavedSamples(tmp_path / "shared.html").answers
    assert "its file was missing when this page was saved" in answer["error"]
    assert str(tmp_path) not in json.dumps(answer)
