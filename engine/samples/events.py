"""TextSample, PictureSample and TableSample: what a run shows to people, by key and step.

They are milestones, because people publish few of them and look for each. A long text and pictures would make the log
and all who read it slow, so they are in files beside it; `files.py` has the way there.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from offloop.engine.errors import EventError
from offloop.engine.events import Event
from offloop.engine.samples.content import SAMPLE_BYTES, SHA256, read_file
from offloop.engine.samples.picture import Picture, PictureLike, picture_of

INLINE_TEXT: Final = 16 * 1024
"""Bytes of a text above which it is in a file."""
EXCERPT: Final = 1_000
"""Characters of such a text that its event has."""
TABLE_BYTES: Final = 256 * 1024
"""Most bytes of a table beside its pictures: it is in the log, and readers take it in whole."""
MOST_COLUMNS: Final = 100
MOST_ROWS: Final = 10_000
LONGEST_KEY: Final = 200
LONGEST_CAPTION: Final = 2_000

Cell: TypeAlias = str | int | float | bool | Picture | None

_set = msgspec.structs.force_setattr


class TextSample(Event, frozen=True):
    """Published by programs to show a text: what a model writes, for example.

        run.publish(TextSample("code", text))

    Thread: any; a text costs about a millisecond for each MB.
    """

    key: str
    """What it is of: samples of the same key are shown together, by step."""
    text: str
    """The text, at most 10 MB. Above 16 KiB, the published event has its first 1,000 characters, and a file of the
    run's directory has it whole: see `read`."""
    caption: str = ""
    """A line to show with it."""
    sha256: str = ""
    """SHA-256 of the text's file, in hexadecimal digits: its id, and its name; empty for a text without a file."""
    size: int = 0
    """Bytes of that file."""

    def __post_init__(self) -> None:
        _check_words(self)
        if not isinstance(self.text, str):
            raise EventError(f"text must be a str, got a {type(self.text).__name__}")
        if self.sha256 and not SHA256.match(self.sha256):
            raise EventError(f"sha256 must have 64 hexadecimal digits, got {self.sha256[:80]!r}")
        if len(self.text) * 4 > SAMPLE_BYTES:
            _check_bytes("text", len(_encoded(self.text)))

    @property
    def media_type(self) -> str:
        """`text/plain`, as a `Picture` has the one of its file."""
        return "text/plain"

    def read(self, run_dir: str | os.PathLike[str]) -> str:
        """Return the whole text from the directory of its run. Blocks if it is in a file.

        Raises:
            SampleFileError: The file is missing, or is not what was published.
        """
        if not self.sha256:
            return self.text
        return read_file(Path(run_dir), self.sha256, self.media_type, self.size).decode()


class PictureSample(Event, frozen=True):
    """Published by programs to show a picture.

        run.publish(PictureSample("digits", images[0]))

    A tensor or array has the shape (H, W), (C, H, W) or (H, W, C), with 1, 3 or 4 channels, and floats from 0 (black)
    to 1 or whole numbers from 0 to 255; where two shapes are possible, a tensor of torch counts as (C, H, W) and an
    array as (H, W, C). It becomes a PNG. Also taken: an image of Pillow, a figure of matplotlib, and a PNG, JPEG or
    WebP as `bytes` or `Path`. A picture has at most 2 MB, 8,192 pixels a side and 16,777,216 in all.

    It is encoded in the thread that makes the sample, about 20 ms for 512 x 512 colours, during which other threads
    run; a tensor on a GPU is waited for. On an event loop, make large ones in a thread.

    Thread: any.
    """

    key: str
    """What it is of: samples of the same key are shown together, by step."""
    picture: Picture
    """The picture."""
    caption: str = ""
    """A line to show with it."""

    if TYPE_CHECKING:

        def __init__(
            self,
            key: str,
            picture: PictureLike,
            caption: str = "",
            *,
            run_id: str = "",
            seq: int = -1,
            time: float = 0.0,
            epoch: int = -1,
            step: int = -1,
            batch: int = -1,
        ) -> None: ...

    def __post_init__(self) -> None:
        _check_words(self)
        _set(self, "picture", picture_of(self.picture))


class TableSample(Event, frozen=True):
    """Published by programs to show rows of text, numbers and pictures.

        run.publish(TableSample("predictions", ["image", "said", "is"], [[image, 3, 5], ...]))

    Thread: any; each picture is encoded there, as in a `PictureSample`.
    """

    key: str
    """What it is of: samples of the same key are shown together, by step."""
    columns: tuple[str, ...]
    """Names of the columns, from 1 to 100."""
    rows: tuple[tuple[Cell, ...], ...]
    """At most 10,000 rows, each with a cell for every column: a text, a number, a truth value, None, or a picture as in
    `PictureSample`. All but the pictures has at most 256 KiB, and the pictures together 10 MB."""
    caption: str = ""
    """A line to show with it."""

    if TYPE_CHECKING:

        def __init__(
            self,
            key: str,
            columns: Sequence[str],
            rows: Iterable[Sequence[Cell | PictureLike]],
            caption: str = "",
            *,
            run_id: str = "",
            seq: int = -1,
            time: float = 0.0,
            epoch: int = -1,
            step: int = -1,
            batch: int = -1,
        ) -> None: ...

    def __post_init__(self) -> None:
        _check_words(self)
        columns: Any = self.columns
        if isinstance(columns, str) or not all(isinstance(each, str) for each in columns):
            raise EventError(f"columns must be a list of names, got {columns!r:.200}")
        if not 1 <= len(columns) <= MOST_COLUMNS:
            raise EventError(f"columns must be from 1 to {MOST_COLUMNS} names, got {len(columns)}")
        rows = tuple(_row(place, row, columns) for place, row in enumerate(self.rows))
        if len(rows) > MOST_ROWS:
            raise EventError(f"rows must be at most {MOST_ROWS:,}, got {len(rows):,}")
        _check_bytes(
            "the pictures of rows",
            sum(each.size for row in rows for each in row if isinstance(each, Picture)),
        )
        size = len(msgspec.msgpack.encode((columns, _without_pictures(rows))))
        if size > TABLE_BYTES:
            raise EventError(
                f"rows must have at most {TABLE_BYTES:,} bytes beside their pictures, got {size:,}: publish fewer, or "
                "shorter texts"
            )
        _set(self, "columns", tuple(columns))
        _set(self, "rows", rows)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures in its cells, row by row."""
        return tuple(each for row in self.rows for each in row if isinstance(each, Picture))


AnySample: TypeAlias = TextSample | PictureSample | TableSample


def _row(place: int, row: Any, columns: Sequence[str]) -> tuple[Cell, ...]:
    if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != len(columns):
        given = (
            f"{len(row)} cells" if hasattr(row, "__len__") and not isinstance(row, str) else repr(row)[:80]
        )
        raise EventError(f"rows[{place}] must have {len(columns)} cells, one for each column, got {given}")
    return tuple(_cell(cell, f"rows[{place}][{column!r}]") for cell, column in zip(row, columns, strict=True))


def _cell(value: Any, name: str) -> Cell:
    if value is None or isinstance(value, str | int | float | Picture):
        return value
    if getattr(value, "shape", None) == ():
        # A number of NumPy or torch
        return _cell(value.item(), name)
    return picture_of(value, name)


def _check_words(sample: Any) -> None:
    key, caption = sample.key, sample.caption
    if not isinstance(key, str) or not 0 < len(key) <= LONGEST_KEY:
        raise EventError(
            f"key must be a text of 1 to {LONGEST_KEY} characters that says what the sample is of, got {key!r:.80}"
        )
    if not isinstance(caption, str) or len(caption) > LONGEST_CAPTION:
        raise EventError(
            f"caption must be a text of at most {LONGEST_CAPTION:,} characters, got {caption!r:.80}"
        )


def _check_bytes(name: str, size: int) -> None:
    if size > SAMPLE_BYTES:
        raise EventError(
            f"{name} must have at most {SAMPLE_BYTES:,} bytes, got {size:,}: publish a part of it"
        )


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EventError(f"text cannot be encoded as UTF-8: {error}") from None


# Contents ----------------------------------------------------------------------------------------


def pictures_of(sample: AnySample) -> tuple[Picture, ...]:
    """Return the pictures of a sample."""
    if isinstance(sample, TableSample):
        return sample.pictures
    return (sample.picture,) if isinstance(sample, PictureSample) else ()


def take_content(sample: AnySample) -> dict[str, tuple[str, bytes]]:
    """Move what belongs into files out of a sample that is being published.

    Returns:
        By SHA-256: media type and content.

    Raises:
        EventError: A text cannot be encoded.
    """
    taken: dict[str, tuple[str, bytes]] = {
        each.sha256: (each.media_type, each.data) for each in pictures_of(sample)
    }
    match sample:
        case TextSample():
            return _take_text(sample)
        case PictureSample():
            _set(sample, "picture", _without_data(sample.picture))
        case TableSample():
            _set(sample, "rows", _without_pictures(sample.rows))
    return taken


def _take_text(sample: TextSample) -> dict[str, tuple[str, bytes]]:
    if (
        sample.sha256
        or len(sample.text) * 4 <= INLINE_TEXT
        or len(data := _encoded(sample.text)) <= INLINE_TEXT
    ):
        return {}
    digest = hashlib.sha256(data).hexdigest()
    _set(sample, "text", sample.text[:EXCERPT])
    _set(sample, "sha256", digest)
    _set(sample, "size", len(data))
    return {digest: ("text/plain", data)}


def _without_pictures(rows: tuple[tuple[Cell, ...], ...]) -> tuple[tuple[Cell, ...], ...]:
    """Return rows whose pictures have no content."""
    return tuple(
        tuple(_without_data(cell) if isinstance(cell, Picture) else cell for cell in row) for row in rows
    )


def _without_data(picture: Picture) -> Picture:
    # A copy: the picture may be in other samples, too.
    return msgspec.structs.replace(picture, data=b"") if picture.data else picture
