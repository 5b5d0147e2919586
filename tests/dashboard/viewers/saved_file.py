"""Saved pages taken apart again, without the page."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def blocks_of(path: Path) -> dict[str, bytes]:
    """Return the unpacked blocks of a file."""
    found = re.findall(r'<script type="text/plain" id="(saved[-\w]*)">([^<]*)</script>', path.read_text())
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in found}


def listed(path: Path) -> Any:
    """Return what a file says about its runs."""
    return json.loads(blocks_of(path)["saved"])


class SavedRun:
    """A run of a file."""

    def __init__(self, block: bytes) -> None:
        length = int.from_bytes(block[:4], "little")
        self.head: Any = json.loads(block[4 : 4 + length])
        self.texts: list[Any] = self.head["texts"]
        self._columns: list[Any] = []
        place = 4 + length
        for layout in self.head["columns"]:
            kind, count, width = layout[:3]
            size = count * (width + (kind == "decimal"))
            self._columns.append(unpacked(layout, block[place : place + size]))
            place += size
        assert place == len(block)

    def of(self, kind: str) -> list[Any]:
        """Return the messages of a kind."""
        return [each for each in self.texts if each["type"] == kind]

    @property
    def events(self) -> list[Any]:
        return [each["event"] for each in self.of("milestone")]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a metric."""
        (series,) = self.of("series")
        (number,) = [each["id"] for each in series["series"] if each["key"] == name]
        (curve,) = [each for each in self.head["curves"] if each["id"] == number]
        steps = self._columns[curve["rows"]] + self._columns[curve["rows"] + 1]
        return steps.tolist(), self._columns[curve["values"]].tolist()

    def is_reduced(self, name: str) -> bool:
        (series,) = self.of("series")
        (number,) = [each["id"] for each in series["series"] if each["key"] == name]
        return any(each["id"] == number and each["reduced"] for each in self.head["curves"])

    @property
    def times(self) -> list[float]:
        times: list[float] = self._columns[1].tolist()
        return times


def unpacked(layout: Any, data: bytes) -> Any:
    """Return the numbers of a column."""
    kind, count, width, delta, first, scale = layout
    if not count:
        return np.empty(0)
    planes = np.frombuffer(data, np.uint8).reshape(-1, count).astype(np.uint64)
    if kind == "float":
        return np.ascontiguousarray(planes.astype(np.uint8).T).view("<f8").reshape(count)
    signless = sum(
        (planes[place] << np.uint64(8 * place) for place in range(width)), np.zeros(count, np.uint64)
    )
    whole = (signless >> np.uint64(1)).astype(np.int64) ^ -(signless & np.uint64(1)).astype(np.int64)
    whole = np.cumsum(whole) + first if delta else whole
    if kind == "whole":
        return whole / scale
    numbers = []
    for digits, exponent in zip(whole.tolist(), planes[width].tolist(), strict=True):
        power = (exponent >> 1) ^ -(exponent & 1)
        numbers.append(float("nan") if exponent == 255 else float(f"{digits}e{power}"))
    return np.array(numbers)


def runs_of(path: Path) -> dict[str, SavedRun]:
    """Return the runs of a file by key."""
    blocks = blocks_of(path)
    keys = [each["key"] for each in json.loads(blocks["saved"])["hello"]["runs"]]
    return {key: SavedRun(blocks[f"saved-{number}"]) for number, key in enumerate(keys)}
