"""Picture: an encoded picture in a sample, and how one is made of what people have: tensors, arrays, files.

Pictures are recognized by what other libraries' objects can do, so this imports none of them.
"""

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from offloop.engine.errors import EventError, SampleFileError
from offloop.engine.samples.content import SHA256, MediaType, media_type_of, read_file
from offloop.engine.samples.png import encode_png

PICTURE_BYTES: Final = 2_000_000
"""Most bytes of an encoded picture."""
MOST_SIDE: Final = 8_192
"""Most pixels of a side: more than any screen has."""
MOST_PIXELS: Final = 16_777_216
"""Most pixels of a picture: a browser needs four bytes for each, however small its file is."""

_TOLERANCE: Final = 1e-3
"""How far values may be beyond 0 and 1 because of rounding."""


class _Array(Protocol):
    """What a NumPy array has."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


class _Saved(Protocol):
    """What an image of Pillow has."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def save(self, file: io.BytesIO, /, format: str) -> None: ...


class _Figure(Protocol):
    """What a figure of matplotlib has."""

    def savefig(self, file: io.BytesIO, /, *, format: str) -> None: ...


PictureLike: TypeAlias = "Picture | bytes | bytearray | os.PathLike[str] | _Array | _Saved | _Figure"
"""What a picture can be made of."""


class Picture(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A picture in a `PictureSample` or in a cell of a `TableSample`.

    Samples make it of what they are given. Its content is in a file of the run's directory; `read` returns it.
    """

    sha256: str
    """SHA-256 of the encoded picture, in hexadecimal digits: its id, and the name of its file."""
    media_type: MediaType
    """`image/png`, `image/jpeg` or `image/webp`."""
    size: int
    """Bytes of the encoded picture."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    data: bytes = b""
    """The encoded picture; empty once the sample is published."""

    def __post_init__(self) -> None:
        # Also of what a log says, which somebody may have written by hand.
        if not SHA256.match(self.sha256):
            raise EventError(f"sha256 must have 64 hexadecimal digits, got {self.sha256[:80]!r}")
        check_size(self.width, self.height, "a picture")

    def check_content(self) -> None:
        """Refuse content that is not that of this picture: it may come from another program.

        Raises:
            EventError: It is.
        """
        is_whole = (
            len(self.data) == self.size <= PICTURE_BYTES and media_type_of(self.data) == self.media_type
        )
        if (
            not is_whole
            or hashlib.sha256(self.data).hexdigest() != self.sha256
            or not self.has_size(self.data)
        ):
            raise EventError("the content of a picture is not what its checksum, size or media type say")

    def has_size(self, data: bytes) -> bool:
        """Return whether an encoded picture is as wide and high as this one."""
        try:
            return size_of(data) == (self.width, self.height)
        except ValueError:
            return False

    def read(self, run_dir: str | os.PathLike[str]) -> bytes:
        """Return the encoded picture from the directory of its run. Blocks.

        Raises:
            SampleFileError: The file is missing, or is not what was published.
        """
        if self.data:
            return self.data
        data = read_file(Path(run_dir), self.sha256, self.media_type, self.size)
        if not self.has_size(data):
            # A log that was written by hand: a browser could need any amount of memory for it.
            raise SampleFileError(f"its file is no picture of {self.width} x {self.height}")
        return data


def picture_of(value: Any, name: str = "picture") -> Picture:
    """Return a picture of a tensor, an array, an image, a figure, encoded bytes or a path. Blocks while it encodes.

    Args:
        value: What the user gave.
        name: The argument's name, for errors.

    Raises:
        EventError: It is no picture, or one that is too large.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, str):
        raise EventError(f"{name} must be a picture, got a str: for a file, pass Path({value[:80]!r})")
    if isinstance(value, os.PathLike):
        return _of_bytes(_content_of(Path(value), name), name)
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_bytes(bytes(value), name)
    if hasattr(value, "savefig"):
        return _of_bytes(_saved(value.savefig), name)
    if hasattr(value, "save") and hasattr(value, "mode"):
        width, height = value.size
        check_size(width, height, name)
        return _of_bytes(_saved(value.save), name)
    array, is_tensor = _array_of(value, name)
    pixels = _pixels_of(array, name, is_tensor=is_tensor)
    return _of_bytes(encode_png(pixels, at_most=PICTURE_BYTES), name, is_png_of_pixels=True)


def check_size(width: int, height: int, name: str) -> None:
    """Refuse a picture that is empty, or larger than browsers show.

    Raises:
        EventError: It is.
    """
    if min(width, height) < 1 or max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise EventError(
            f"{name} must be from 1 to {MOST_SIDE:,} pixels wide and high, with at most {MOST_PIXELS:,} in all, got "
            f"{width:,} x {height:,}"
        )


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of an encoded picture, from its header.

    Raises:
        ValueError: It has no whole header.
    """
    try:
        match media_type_of(data):
            case "image/png":
                if data[12:16] == b"IHDR":
                    return struct.unpack_from(">II", data, 16)
            case "image/jpeg":
                return _jpeg_size(data)
            case "image/webp":
                return _webp_size(data)
    except (struct.error, IndexError):
        pass
    raise ValueError("the header is damaged")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    place = 2
    while True:
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == 0xFFFF:
            # Padding
            place += 1
        elif marker >> 8 != 0xFF or length < 2:
            raise ValueError("the header is damaged")
        elif 0xC0 <= marker & 0xFF <= 0xCF and marker & 0xFF not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        else:
            place += 2 + length


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(
            data[27:30].ljust(3, b"\0"), "little"
        ) + 1
    raise ValueError("the header is damaged")


def _of_bytes(data: bytes, name: str, *, is_png_of_pixels: bool = False) -> Picture:
    media_type = media_type_of(data)
    if media_type is None:
        said = data[:16]
        hint = ": an SVG picture may hold programs, save it as PNG" if b"<" in said else ""
        raise EventError(
            f"{name} must be a PNG, JPEG or WebP picture, got bytes that begin with {said!r}{hint}"
        )
    if len(data) > PICTURE_BYTES:
        what = "as PNG more than" if is_png_of_pixels else f"{len(data):,} bytes, more than"
        raise EventError(
            f"{name} has {what} {PICTURE_BYTES:,} bytes: publish a smaller one, as by [..., ::2, ::2], or bytes of a "
            "JPEG"
        )
    try:
        width, height = size_of(data)
    except ValueError as error:
        raise EventError(f"{name} is no whole {media_type} picture: {error}") from error
    check_size(width, height, name)
    digest = hashlib.sha256(data).hexdigest()
    return Picture(
        sha256=digest, media_type=media_type, size=len(data), width=width, height=height, data=data
    )


def _content_of(path: Path, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            # A byte more than is legal, of whatever is behind the path
            return file.read(PICTURE_BYTES + 1)
    except OSError as error:
        raise EventError(f"{name} cannot be read from {path}: {error.strerror or error}") from error


def _saved(save: Any) -> bytes:
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()


def _array_of(value: Any, name: str) -> tuple[Any, bool]:
    """Return a NumPy array on the host, and whether the value was a tensor of torch."""
    is_tensor = hasattr(value, "detach")
    if is_tensor:
        value = value.detach().cpu()
        # NumPy has no bfloat16
        value = (value.float() if value.is_floating_point() else value).numpy()
    elif not hasattr(value, "dtype") and hasattr(value, "numpy"):
        value = value.numpy()
    elif hasattr(value, "__array__"):
        value = value.__array__()
    if not (hasattr(value, "shape") and hasattr(value, "astype")):
        raise EventError(
            f"{name} must be a tensor, an array, an image of Pillow, a figure of matplotlib, a Path, or the bytes of a "
            f"PNG, JPEG or WebP picture, got a {type(value).__name__}"
        )
    return value, is_tensor


def _pixels_of(array: Any, name: str, *, is_tensor: bool) -> Any:
    """Return an array as uint8, with the shape (height, width, channels)."""
    shape = tuple(array.shape)
    if len(shape) == 4:
        raise EventError(
            f"{name} must be one picture, got {shape[0]} of them, shape {shape}: publish them in a TableSample, or in "
            "one picture, as torchvision.utils.make_grid makes it"
        )
    if len(shape) == 2:
        array = array.reshape((*shape, 1))
    else:
        places = [
            place
            for place in ((0, -1) if is_tensor else (-1, 0))
            if len(shape) == 3 and shape[place] in (1, 3, 4)
        ]
        if not places:
            raise EventError(
                f"{name} must have the shape (H, W), (C, H, W) or (H, W, C), with 1, 3 or 4 channels C, got {shape}"
            )
        if places[0] == 0:
            array = array.transpose(1, 2, 0)
    check_size(array.shape[1], array.shape[0], name)
    kind = array.dtype.kind
    if kind == "b":
        return array.astype("uint8") * 255
    least, greatest = array.min(), array.max()
    if kind == "f":
        if not (least >= -_TOLERANCE and greatest <= 1 + _TOLERANCE):
            raise EventError(
                f"{name} has values from {least:g} to {greatest:g}; floats are legal from 0 (black) to 1: scale them, "
                "or cut them off with .clip(0, 1)"
            )
        return (array.clip(0, 1) * 255 + 0.5).astype("uint8")
    if kind not in "ui" or least < 0 or greatest > 255:
        raise EventError(
            f"{name} must have floats from 0 to 1 or whole numbers from 0 to 255, got {array.dtype} from {least} to "
            f"{greatest}"
        )
    return array.astype("uint8")
