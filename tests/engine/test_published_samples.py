"""Texts, pictures and tables that a run publishes: what is taken, where their contents are, and what comes back."""

import hashlib
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from offloop.engine import (
    Callback,
    EpochEnd,
    EventError,
    PictureSample,
    RunHandle,
    SampleFileError,
    StepEnd,
    StepPoint,
    TableSample,
    TextSample,
    in_step,
    read_events,
)
from offloop.engine.encoding import decode, encode
from offloop.engine.samples import files
from offloop.engine.samples.picture import Picture
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer

LONG = "def f():\n    return 'ä'\n" * 2_000


def shown(data: bytes) -> np.ndarray[Any, Any]:
    """Return the pixels of an encoded picture, by another library than ours."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(format: str, size: tuple[int, int] = (7, 5), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, format=format, **options)
    return file.getvalue()


class Publishes(Callback):
    """Publishes samples after epochs, from a thread of its own."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        for make in self.samples:
            run.publish(make())


def published(tmp_path: Path, *samples: Any, epochs: int = 1) -> tuple[Path, list[Any]]:
    """Train a run that publishes samples, and return its directory and the samples in its log."""
    trainer = tiny_trainer(run_dir=str(tmp_path))
    run_dir = trainer.train(tiny_loader(), epochs=epochs, callbacks=[Publishes(*samples)]).dir
    assert run_dir is not None
    kinds = (TextSample, PictureSample, TableSample)
    return run_dir, [event for event in read_events(run_dir) if isinstance(event, kinds)]


# Pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (5, 7, 1), (3, 5, 7), (5, 7, 3), (4, 5, 7), (5, 7, 4)])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_pixels_come_back_as_they_were(shape: tuple[int, ...], make: Any) -> None:
    pixels = noise(*shape)
    picture = PictureSample("digits", make(pixels)).picture
    assert (picture.media_type, picture.width, picture.height) == ("image/png", 7, 5)
    assert picture.sha256 == hashlib.sha256(picture.data).hexdigest()
    assert picture.size == len(picture.data)
    wanted = pixels.transpose(1, 2, 0) if shape[0] in (1, 3, 4) else pixels
    assert np.array_equal(shown(picture.data), wanted.squeeze())


def test_where_both_orders_fit_a_tensor_begins_with_its_channels_and_an_array_ends_with_them() -> None:
    pixels = noise(3, 5, 3)
    of_tensor = PictureSample("x", torch.from_numpy(pixels)).picture
    of_array = PictureSample("x", pixels).picture
    assert (of_tensor.width, of_tensor.height) == (3, 5)
    assert (of_array.width, of_array.height) == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floats_from_0_to_1_become_black_to_white(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 0.5, 1.0]], dtype=dtype, requires_grad=True)
    assert shown(PictureSample("x", values).picture.data).tolist() == [[0, 128, 255]]


def test_truth_values_and_whole_numbers_are_pixels() -> None:
    assert shown(PictureSample("x", torch.tensor([[True, False]])).picture.data).tolist() == [[255, 0]]
    assert shown(PictureSample("x", np.array([[0, 255, 7]])).picture.data).tolist() == [[0, 255, 7]]


@pytest.mark.parametrize(
    ("format", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
def test_encoded_pictures_are_kept_byte_for_byte(format: str, media_type: str, tmp_path: Path) -> None:
    data = encoded(format)
    path = tmp_path / "picture.dat"
    path.write_bytes(data)
    given: bytes | bytearray | Path
    for given in (data, bytearray(data), path):
        picture = PictureSample("x", given).picture
        assert (picture.media_type, picture.width, picture.height, picture.data) == (media_type, 7, 5, data)


def test_every_kind_of_webp_and_a_progressive_jpeg_tell_their_size() -> None:
    with_alpha = io.BytesIO()
    Image.new("RGBA", (300, 20), (1, 2, 3, 4)).save(
        with_alpha, format="WEBP", lossless=True, exif=b"Exif\0\0"
    )
    for data in (
        encoded("WEBP", (300, 20)),
        encoded("WEBP", (300, 20), lossless=True),
        with_alpha.getvalue(),
        encoded("JPEG", (300, 20), progressive=True, comment=b"\xff" * 40),
    ):
        picture = PictureSample("x", data).picture
        assert (picture.width, picture.height) == (300, 20)


def test_an_image_of_pillow_and_a_figure_are_pictures() -> None:
    image = Image.fromarray(noise(5, 7, 3))
    assert np.array_equal(shown(PictureSample("x", image).picture.data), np.asarray(image))

    class Figure:
        """Saves itself as those of matplotlib do."""

        def savefig(self, file: io.BytesIO, *, format: str) -> None:
            assert format == "png"
            file.write(encoded("PNG"))

    assert PictureSample("x", Figure()).picture.width == 7


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"GIF89a......", "PNG, JPEG or WebP"),
        (b"", "PNG, JPEG or WebP"),
        (encoded("PNG")[:18], "damaged"),
        (encoded("JPEG")[:30], "damaged"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "damaged"),
        ("plot.png", "Path"),
        (Path("/nowhere/plot.png"), "cannot be read"),
        (encoded("PNG", (30_000, 2)), "30,000 x 2"),
        (np.zeros((2, 30_000), np.uint8), "30,000 x 2"),
        (np.zeros((8_000, 8_000), np.uint8), "8,000 x 8,000"),
        (Image.new("1", (30_000, 2)), "30,000 x 2"),
        (np.zeros((0, 4)), "4 x 0"),
        (np.zeros((2, 3, 5, 7)), "make_grid"),
        (np.zeros((5, 7, 2)), r"\(H, W\)"),
        (np.zeros(7), r"\(H, W\)"),
        (np.array([[-1.0, 0.5]]), "from -1 to 0.5"),
        (np.array([[0.5, float("nan")]]), "nan"),
        (np.array([[0, 256]]), "256"),
        (np.array([[1j]]), "complex"),
        ([[0.5]], "list"),
        (None, "NoneType"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50_000_000), "2,000,000 bytes"),
        (noise(1_000, 1_000, 3), "as PNG more than 2,000,000 bytes"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_where_it_is_made(picture: Any, text: str) -> None:
    with pytest.raises(EventError, match=text) as caught:
        PictureSample("x", picture)
    assert str(caught.value).startswith("picture ")


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.write(encoded("PNG"))
        # It takes no room on the disk.
        file.truncate(1 << 40)
    with pytest.raises(EventError, match="2,000,000"):
        PictureSample("x", path)


# Texts and tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TextSample("", "a"), "key"),
        (lambda: TextSample("k" * 201, "a"), "key"),
        (lambda: TextSample("k", b"a"), "str"),  # type: ignore[arg-type]  # on purpose
        (lambda: TextSample("k", "a" * 50_000_000), "10,000,000 bytes, got 50,000,000"),
        (lambda: TextSample("k", "\ud800" * 3_000_000), "UTF-8"),
        (lambda: TextSample("k", "a", "c" * 2_001), "caption"),
        (lambda: TableSample("k", "ab", []), "columns"),
        (lambda: TableSample("k", [], []), "columns"),
        (lambda: TableSample("k", ["a"], [[1, 2]]), r"rows\[0\].*1 cells"),
        (lambda: TableSample("k", ["a"], ["a"]), r"rows\[0\]"),
        (
            lambda: TableSample("k", ["a"], [[object()]]),  # type: ignore[list-item]  # on purpose
            r"rows\[0\]\['a'\]",
        ),
        (lambda: TableSample("k", ["a"], [[b"no picture"]]), r"rows\[0\]\['a'\] must be a PNG"),
        (lambda: TableSample("k", ["a"], [[1]] * 10_001), "10,000"),
        (lambda: TableSample("k", ["a"], [["long" * 100_000]]), "262,144"),
        (lambda: TableSample("k", ["a"], [[noise(800, 800)]] * 20), "the pictures of rows"),
    ],
)
def test_bad_samples_are_refused_where_they_are_made(make: Any, text: str) -> None:
    with pytest.raises(EventError, match=text):
        make()


def test_cells_keep_their_types() -> None:
    table = TableSample(
        "k", ["a", "b"], [["1", 1], [True, None], [np.float32(0.5), torch.tensor(7)], [noise(2, 2), "null"]]
    )
    assert table.rows[:3] == (("1", 1), (True, None), (0.5, 7))
    [picture] = table.pictures
    assert table.rows[3] == (picture, "null")
    for format in ("json", "msgpack"):
        assert decode(encode(table, format), format) == table


# In a run ------------------------------------------------------------------------------------------


def test_short_texts_are_in_the_log_and_long_ones_and_pictures_in_files(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    run_dir, [short, long, picture, table] = published(
        tmp_path,
        lambda: TextSample("short", "a"),
        lambda: TextSample("long", LONG),
        lambda: PictureSample("digits", pixels, "some"),
        lambda: TableSample("rows", ["image", "is"], [[pixels, 3], [255 - pixels, 4]]),
    )
    assert (short.text, short.sha256) == ("a", "")
    assert long.text == LONG[:1_000]
    assert long.size == len(LONG.encode())
    assert long.read(run_dir) == LONG
    assert short.read(run_dir) == "a"
    assert picture.picture.data == b""
    assert picture.caption == "some"
    assert np.array_equal(shown(picture.picture.read(run_dir)), pixels)
    assert [shown(each.read(run_dir)).tolist() for each in table.pictures] == [
        pixels.tolist(),
        (255 - pixels).tolist(),
    ]
    # The picture that is in two samples is there once.
    names = sorted(each.name for each in (run_dir / "samples").iterdir())
    assert len(names) == 3
    assert {each.partition(".")[0] for each in names} == {
        long.sha256,
        picture.picture.sha256,
        table.pictures[1].sha256,
    }
    assert b'"data"' not in (run_dir / "events.jsonl").read_bytes()


def test_files_are_there_before_the_log_tells_of_them(tmp_path: Path) -> None:
    """Seen by an observer that reads the log while the run goes on."""
    missing: list[str] = []

    class Reads(Callback):
        def on_event(self, event: Any, run: RunHandle) -> None:
            assert run.dir is not None
            for each in read_events(run.dir):
                if isinstance(each, PictureSample):
                    try:
                        each.picture.read(run.dir)
                    except SampleFileError as error:
                        missing.append(str(error))

    trainer = tiny_trainer(run_dir=str(tmp_path))
    number = iter(range(100))
    callbacks = [Publishes(lambda: PictureSample("x", np.full((30, 30), next(number), np.uint8))), Reads()]
    trainer.train(tiny_loader(), epochs=8, callbacks=callbacks)
    assert missing == []
    assert next(number) == 8


def test_a_step_hook_publishes_pictures_in_the_order_of_its_steps(tmp_path: Path) -> None:
    class Hook(Callback):
        @in_step(every_n_steps=1)
        def after_step(self, point: StepPoint) -> None:
            point.publish(PictureSample, key="weights", picture=torch.full((2, 2), point.step / 10))
            point.publish(TextSample, key="text", text=f"step {point.step}")

    recorder = Recorder()
    tiny_trainer().train(tiny_loader(), max_steps=3, callbacks=[Hook(), recorder])
    assert recorder.run is not None
    steps = [event for event in recorder.events if isinstance(event, StepEnd | PictureSample | TextSample)]
    assert [(type(each).__name__, each.step) for each in steps] == [
        (name, step) for step in (1, 2, 3) for name in ("PictureSample", "TextSample", "StepEnd")
    ]
    pictures = recorder.of(PictureSample)
    shades = [shown(recorder.run.samples.read(each.picture))[0, 0] for each in pictures]
    assert shades == [26, 51, 77]


class PublishesThere(Publishes):
    runs_in = "process"

    def __init__(self) -> None:
        pass

    def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
        run.publish(PictureSample("there", np.full((2, 3), 7, np.uint8)))
        run.publish(TextSample("there", LONG))


def test_a_callback_in_a_process_of_its_own_publishes_contents(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path))
    run_dir = trainer.train(tiny_loader(), epochs=1, callbacks=[PublishesThere()]).dir
    assert run_dir is not None
    [picture] = [each for each in read_events(run_dir) if isinstance(each, PictureSample)]
    [text] = [each for each in read_events(run_dir) if isinstance(each, TextSample)]
    assert shown(picture.picture.read(run_dir)).tolist() == [[7, 7, 7]] * 2
    assert text.read(run_dir) == LONG


def test_a_published_picture_is_published_again_by_its_content_only(tmp_path: Path) -> None:
    sample = PictureSample("x", noise(2, 2))
    again = PictureSample("again", sample.picture)
    errors: list[EventError] = []

    class Twice(Callback):
        def on_epoch_end(self, event: EpochEnd, run: RunHandle) -> None:
            run.publish(sample)
            # Made before the content was taken out of the first.
            run.publish(again)
            try:
                run.publish(PictureSample("late", sample.picture))
            except EventError as error:
                errors.append(error)

    recorder = Recorder()
    tiny_trainer().train(tiny_loader(), epochs=1, callbacks=[Twice(), recorder])
    assert [each.key for each in recorder.of(PictureSample)] == ["x", "again"]
    assert "has no content" in str(errors[0])


def test_a_run_without_a_directory_keeps_the_newest_contents(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "MEMORY_BYTES", 100_000)
    number = iter(range(100))
    recorder = Recorder()
    make = lambda: TextSample("x", f"{next(number)}" + "a" * 40_000)  # noqa: E731  # short
    with caplog.at_level(logging.WARNING):
        tiny_trainer().train(tiny_loader(), epochs=4, callbacks=[Publishes(make), recorder])
    first, _, _, last = recorder.of(TextSample)
    assert recorder.run is not None
    store = recorder.run.samples
    assert store.read(last).startswith(b"3a")
    with pytest.raises(SampleFileError, match="no directory"):
        store.read(first)
    assert [each.message for each in caplog.records if "are dropped" in each.message].__len__() == 1


def test_where_nobody_writes_a_log_contents_are_not_kept(tmp_path: Path) -> None:
    """As on ranks other than the first."""
    store = files.SampleFiles(tmp_path, has_log=False)
    sample = PictureSample("x", noise(2, 2))
    store.keep(sample)
    store.write()
    assert sample.picture.data == b""
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SampleFileError, match="missing"):
        store.read(sample.picture)


def test_a_sample_that_is_refused_is_not_published_and_the_run_goes_on(tmp_path: Path) -> None:
    of_a_log = Picture(sha256="0" * 64, media_type="image/png", size=9, width=3, height=3)
    recorder = Recorder()
    trainer = tiny_trainer(run_dir=str(tmp_path))
    shows = Publishes(lambda: PictureSample("x", of_a_log))
    result = trainer.train(tiny_loader(), epochs=2, callbacks=[shows, recorder])
    assert result.status == "completed"
    assert recorder.of(PictureSample) == []
    assert "has no content any more" in str(result.callback_errors)
    assert not (Path(str(result.dir)) / "samples").exists()


# Files that are not what was published ----------------------------------------------------------------


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_link(path: Path) -> None:
    """A link to the very same content elsewhere is not followed either."""
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (change, "has changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has changed"),
        (lambda path: path.write_bytes(b""), "has changed"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: shutil.rmtree(path.parent), "missing"),
        (as_link, "cannot be read"),
        (as_pipe, "has changed"),
        (lambda path: (path.unlink(), path.mkdir()), "has changed"),
    ],
)
def test_a_file_that_is_not_what_was_published_is_refused(tmp_path: Path, harm: Any, text: str) -> None:
    run_dir, [sample] = published(tmp_path, lambda: PictureSample("x", noise(3, 3)))
    harm(run_dir / "samples" / f"{sample.picture.sha256}.png")
    with pytest.raises(SampleFileError, match=text):
        sample.picture.read(run_dir)


@pytest.mark.parametrize("size", [-1, 0, 10_000_001, 10 << 30])
def test_a_log_cannot_have_a_huge_file_read(tmp_path: Path, size: int) -> None:
    """A sparse file takes no place on the disk, and would take all of the memory."""
    sample = decode(b'{"type":"TextSample","key":"k","text":"a","size":%d,"sha256":"%s"}' % (size, b"0" * 64))
    assert isinstance(sample, TextSample)
    path = tmp_path / "samples" / f"{'0' * 64}.txt"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, max(size, 0))
    with pytest.raises(SampleFileError, match=r"a sample has at most 10,000,000"):
        sample.read(tmp_path)


def test_a_folder_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    run_dir, [sample] = published(tmp_path, lambda: PictureSample("x", noise(3, 3)))
    (run_dir / "samples").rename(tmp_path / "elsewhere")
    (run_dir / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SampleFileError, match="cannot be read"):
        sample.picture.read(run_dir)


@pytest.mark.parametrize("sha256", ["../../../../etc/passwd", "", "0" * 63, "0" * 64 + "\n", "A" * 64])
def test_a_log_cannot_name_other_files(sha256: str) -> None:
    with pytest.raises(EventError, match="64 hexadecimal digits"):
        Picture(sha256=sha256, media_type="image/png", size=1, width=1, height=1)
    line = b'{"type":"TextSample","key":"k","text":"a","size":9,"sha256":"%s"}'
    if sha256 and "\n" not in sha256:
        with pytest.raises(Exception, match="64 hexadecimal digits"):
            decode(line % sha256.encode())


def test_a_log_cannot_pass_a_huge_picture_off_as_a_small_one(tmp_path: Path) -> None:
    huge = encoded("PNG", (30_000, 2))
    fields = {"sha256": hashlib.sha256(huge).hexdigest(), "media_type": "image/png", "size": len(huge)}
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / f"{fields['sha256']}.png").write_bytes(huge)
    with pytest.raises(SampleFileError, match="no picture of 5 x 2"):
        Picture(**fields, width=5, height=2).read(tmp_path)  # type: ignore[arg-type]  # a dict of several types
    with pytest.raises(EventError, match="30,000 x 2"):
        Picture(**fields, width=30_000, height=2)  # type: ignore[arg-type]  # a dict of several types


def test_a_folder_that_cannot_be_written_costs_the_pictures_and_not_the_log(tmp_path: Path) -> None:
    class Blocks(Callback):
        needs_run_dir = True

        @in_step(every_n_steps=1)
        def after_step(self, point: StepPoint) -> None:
            if point.step == 1:
                (next(tmp_path.iterdir()) / "samples").write_text("no folder")

    trainer = tiny_trainer(run_dir=str(tmp_path))
    callbacks = [Blocks(), Publishes(lambda: PictureSample("x", noise(3, 3)))]
    result = trainer.train(tiny_loader(), epochs=2, callbacks=callbacks)
    assert result.dir is not None
    assert result.status == "completed"
    events = list(read_events(result.dir))
    assert len([each for each in events if isinstance(each, PictureSample)]) == 2
    failures = [each for each in events if type(each).__name__ == "CallbackFailed"]
    assert [each.callback for each in failures] == ["EventLog"]  # type: ignore[attr-defined]  # of that class
    assert type(events[-1]).__name__ == "TrainEnd"
