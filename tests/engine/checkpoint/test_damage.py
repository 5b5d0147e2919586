"""Damaged, foreign and hostile files: always an error that names the place, never a wrong load."""

import os
import random
import shutil
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoint_support import (
    assert_same,
    in_manifest,
    put_manifest,
    rewrite_manifest,
    save,
    small_state,
    step_of,
)

from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointStore,
    UnsafeCheckpointError,
)

NAME = "step-000000001-a1"


@pytest.fixture
def checkpoint(run_directory: Path) -> Path:
    """One whole checkpoint in a run of its own."""
    with CheckpointStore(run_directory) as store:
        return save(store, 1).info.path


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize(
    "flips",
    [5_000, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
)
def test_flipped_bits_are_all_noticed(checkpoint: Path, flips: int) -> None:
    """Every file, every bit equally likely; restored after each."""
    source = random.Random(0)
    files = sorted(checkpoint.iterdir())
    sizes = [file.stat().st_size for file in files]
    for number in range(flips):
        (file,) = source.choices(files, sizes)
        position, bit = source.randrange(file.stat().st_size), source.randrange(8)
        flip(file, position, bit)
        reader = CheckpointReader(checkpoint.parents[1])
        with pytest.raises(CheckpointCorruptError) as caught:
            reader.load(checkpoint) if number % 2 else reader.verify(checkpoint)
        assert caught.value.item.split(":")[0] == file.name
        assert caught.value.path == checkpoint
        flip(file, position, bit)
    assert step_of(CheckpointReader(checkpoint.parents[1]).load().state) == 1


def test_flipped_bits_in_a_part_that_is_read_alone_are_noticed_and_others_do_no_harm(
    checkpoint: Path,
) -> None:
    source = random.Random(0)
    expected = small_state(1)["model"]
    files = sorted(checkpoint.iterdir())
    outcomes: dict[str, set[bool]] = {file.name: set() for file in files}
    for _ in range(1_000):
        file = source.choice(files)
        position, bit = source.randrange(file.stat().st_size), source.randrange(8)
        flip(file, position, bit)
        try:
            found = CheckpointReader(checkpoint.parents[1]).load_part(checkpoint, "model")
        except CheckpointCorruptError as error:
            assert error.item.split(":")[0] == file.name
            outcomes[file.name].add(False)
        else:
            assert_same(found, expected)
            outcomes[file.name].add(True)
        flip(file, position, bit)
    assert outcomes == {
        "MANIFEST.json": {False},
        "aux.safetensors": {True},
        "model.safetensors": {False},
        "optimizer.safetensors": {True},
        "state.json": {False},
    }


def test_part_that_is_not_there_is_named_with_those_that_are(checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint 'models'.*there is: model, optimizer"):
        CheckpointReader(checkpoint.parents[1]).load_part("last", "models")


@pytest.mark.parametrize("tree", [[], "text", {"model": {"$": ["tensor", "elsewhere"]}}, {"model": {"$": 3}}])
def test_hostile_tree_of_a_part_is_unsafe_or_not_there(checkpoint: Path, tree: object) -> None:
    put_state(checkpoint, msgspec.json.encode(tree))
    with pytest.raises((UnsafeCheckpointError, CheckpointNotFoundError)):
        CheckpointReader(checkpoint.parents[1]).load_part(checkpoint, "model")


def test_the_damaged_tensor_is_named(checkpoint: Path) -> None:
    flip(checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size - 3, 0)
    with pytest.raises(CheckpointCorruptError) as caught:
        CheckpointReader(checkpoint.parents[1]).load()
    assert caught.value.item == "model.safetensors:weight"
    assert caught.value.kind == "checksum"


def test_a_thousand_truncations_are_all_noticed(checkpoint: Path) -> None:
    source = random.Random(0)
    reader = CheckpointReader(checkpoint.parents[1])
    for _ in range(250):
        for file in sorted(checkpoint.iterdir()):
            content = file.read_bytes()
            length = source.randrange(len(content))
            os.truncate(file, length)
            with pytest.raises(CheckpointCorruptError):
                reader.load(checkpoint)
            with file.open("ab") as rest:  # not anew: ext4 flushes a file that was rewritten
                rest.write(content[length:])
    assert step_of(reader.load().state) == 1


def put_state(path: Path, content: bytes) -> None:
    """Replace the state and make the manifest agree."""
    (path / "state.json").write_bytes(content)

    def change(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files["state.json"] |= {"bytes": len(content), "crc32": zlib.crc32(content)}

    rewrite_manifest(path, change)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def link(path: Path) -> None:
    file = path / "model.safetensors"
    file.rename(path.parents[1] / "elsewhere")
    file.symlink_to(path.parents[1] / "elsewhere")


def pipe(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def manifest_link(path: Path) -> None:
    file = path / "MANIFEST.json"
    file.rename(path.parents[1] / "elsewhere")
    file.symlink_to(path.parents[1] / "elsewhere")


def directory_for_file(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def swap(path: Path) -> None:
    a, b = path / "model.safetensors", path / "optimizer.safetensors"
    a.rename(path / "x")
    b.rename(a)
    (path / "x").rename(b)


def header_length(length: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])

    return change


def header_length_with_matching_manifest(path: Path) -> None:
    header_length(10 << 30)(path)
    content = (path / "model.safetensors").read_bytes()

    def change(manifest: dict[str, object]) -> None:
        record = manifest["files"]["model.safetensors"]  # type: ignore[index]  # plain JSON
        record["header_crc32"] = zlib.crc32(content[: record["header_bytes"]])

    rewrite_manifest(path, change)


def sparse_giant(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, 10 << 30)


RECORD = {"bytes": 1, "crc32": 0}
VIEW = {"base": "model.weight", "dtype": "float32", "shape": [4], "stride": [1], "offset": 0}
WEIGHT = ("tensors", "model.weight")
DAMAGES: dict[str, Callable[[Path], None]] = {
    "no manifest": remove("MANIFEST.json"),
    "no state": remove("state.json"),
    "no tensors": remove("model.safetensors"),
    "linked file": link,
    "linked manifest": manifest_link,
    "a pipe": pipe,
    "a folder": directory_for_file,
    "swapped files": swap,
    "header length 0": header_length(0),
    "header length 10 GB": header_length(10 << 30),
    "header length 2**64-1": header_length(2**64 - 1),
    "header length 10 GB, checksums right": header_length_with_matching_manifest,
    "manifest of 10 GB": sparse_giant("MANIFEST.json"),
    "tensors of 10 GB": sparse_giant("model.safetensors"),
    "state of 10 GB": sparse_giant("state.json"),
    "state of 10 GB, says the manifest": in_manifest(
        "files", "state.json", value={"bytes": 10 << 30, "crc32": 0}
    ),
    "a file outside": in_manifest("files", "../escape", value=RECORD),
    "a file by absolute path": in_manifest("files", "/etc/passwd", value=RECORD),
    "a hidden file": in_manifest("files", ".hidden", value=RECORD),
    "a tensor file outside": in_manifest(*WEIGHT, "file", value="../model.safetensors"),
    "a tensor file unknown": in_manifest(*WEIGHT, "file", value="other.safetensors"),
    "another type": in_manifest(*WEIGHT, "dtype", value="float16"),
    "an unknown type": in_manifest(*WEIGHT, "dtype", value="load"),
    "another shape": in_manifest(*WEIGHT, "shape", value=[4, 4]),
    "another order of axes": in_manifest(*WEIGHT, "shape", value=[2**40, 2**40]),
    "a negative size": in_manifest(*WEIGHT, "bytes", value=-1),
    "a huge size": in_manifest(*WEIGHT, "bytes", value=2**70),
    "a tensor of another name": in_manifest(*WEIGHT, "name", value="wrong"),
    "overlapping tensors": in_manifest(*WEIGHT, "offset", value=0),
    "a view beyond the end": in_manifest("views", "x", value=VIEW | {"shape": [13]}),
    "a view before the start": in_manifest("views", "x", value=VIEW | {"offset": -4}),
    "a view far away": in_manifest("views", "x", value=VIEW | {"offset": 2**60}),
    "a view with large steps": in_manifest("views", "x", value=VIEW | {"stride": [2**61]}),
    "a view of nothing": in_manifest("views", "x", value=VIEW | {"base": "none"}),
    "a view of odd type": in_manifest("views", "x", value=VIEW | {"dtype": "Tensor"}),
    "a view of odd steps": in_manifest("views", "x", value=VIEW | {"stride": [1, 1]}),
    "a view between elements": in_manifest("views", "x", value=VIEW | {"offset": 2}),
    "no format": in_manifest("schema", value="other"),
    "manifest of another step": in_manifest("name", value="step-000000002-a1"),
    "a name that is a path": in_manifest("name", value="../../x"),
    "manifest nested deeply": lambda p: put_manifest(p, b"[" * 100_000 + b"]" * 100_000),
    "manifest with NaN": lambda p: put_manifest(p, b'{"schema": NaN}'),
    "manifest of text": lambda p: put_manifest(p, b'"offloop-checkpoint"'),
    "manifest is a pickle": lambda p: put_manifest(p, b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "manifest is empty": lambda p: put_manifest(p, b""),
    "manifest extra nested deeply": in_manifest("extra", value={"$": ["call", ["os.system"]]}),
    "state nested deeply": lambda p: put_state(p, b"[" * 100_000 + b"]" * 100_000),
    "state is a pickle": lambda p: put_state(p, b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "state is a zip": lambda p: put_state(p, b"PK\x03\x04" + bytes(100)),
    "state with NaN": lambda p: put_state(p, b'{"step": NaN}'),
    "state with an unknown tensor": lambda p: put_state(p, b'{"$": ["tensor", "x"]}'),
    "state with a call": lambda p: put_state(p, b'{"$": ["os.system", ["true"]]}'),
    "state with a bad int": lambda p: put_state(p, b'{"$": ["int", "os"]}'),
    "state with a list as key": lambda p: put_state(p, b'{"$": ["dict", [[[], 1]]]}'),
    "state with a wrong pair": lambda p: put_state(p, b'{"$": ["dict", [[1]]]}'),
    "state with a lone dollar": lambda p: put_state(p, b'{"$": 1}'),
    "state with a hidden list as key": lambda p: put_state(
        p, b'{"$": ["dict", [[{"$": ["tuple", [[]]]}, 1]]]}'
    ),
}


def peak() -> int:
    """Return the most memory this process had since `reset_peak`, in kilobytes; 0 where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in each]
    return int(line.split()[1])


def reset_peak() -> int:
    """Forget the peaks of earlier tests, which would hide this one's; return what there is."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


@pytest.mark.parametrize("damage", DAMAGES)
def test_odd_files_are_refused_cheaply(run_directory: Path, checkpoint: Path, damage: str) -> None:
    with CheckpointStore(run_directory) as store:
        save(store, 0)
        DAMAGES[damage](checkpoint)
        before = reset_peak()
        if damage != "manifest of another step":  # that one is whole, in the wrong place
            with pytest.raises(CheckpointCorruptError):
                CheckpointReader(run_directory).load(checkpoint)
        assert peak() - before < 100_000, "kilobytes"
        assert step_of(store.load("last", on_corrupt="fallback").state) == 0


def test_a_strange_file_is_reported_and_a_hidden_one_is_not(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint.parents[1])
    (checkpoint / ".nfs0001").touch()
    reader.verify(checkpoint)
    (checkpoint / "notes.txt").touch()
    with pytest.raises(CheckpointCorruptError, match=r"notes\.txt"):
        reader.verify(checkpoint)
    assert step_of(reader.load().state) == 1


def test_damaged_ones_are_quarantined_and_told_of(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        paths = [save(store, step).info.path for step in (1, 2)]
        flip(paths[1] / "state.json", 1, 0)
        loaded = store.load("last", on_corrupt="fallback")
        assert step_of(loaded.state) == 1
        (error,) = loaded.rejected
        assert isinstance(error, CheckpointCorruptError) and error.path == paths[1]
        assert [info.step for info in store.checkpoints()] == [1]
        assert (run_directory / "checkpoints" / ".bad-step-000000002-a1").is_dir()
        save(store, 2)
        assert not store.load("last", on_corrupt="fallback").rejected


def test_a_reader_falls_back_too_and_moves_nothing(run_directory: Path) -> None:
    with CheckpointStore(run_directory) as store:
        paths = [save(store, step).info.path for step in (1, 2)]
    (paths[1] / "MANIFEST.json").unlink()
    loaded = CheckpointReader(run_directory).load("last", on_corrupt="fallback")
    assert step_of(loaded.state) == 1 and len(loaded.rejected) == 1
    assert paths[1].is_dir()


def test_all_damaged_raises_the_last_reason(run_directory: Path, checkpoint: Path) -> None:
    flip(checkpoint / "state.json", 1, 0)
    with CheckpointStore(run_directory) as store:
        with pytest.raises(CheckpointCorruptError):
            store.load("last", on_corrupt="fallback")
        with pytest.raises(CheckpointNotFoundError):
            store.load("last", on_corrupt="fallback")


def test_what_the_system_refuses_to_read_is_not_called_damaged(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(run_directory) as store:
        paths = [save(store, step).info.path for step in (1, 2)]
        real_open = os.open

        def refuse(path: object, flags: int, *rest: int, **more: int) -> int:
            if str(path).endswith("2-a1/state.json"):
                raise PermissionError(13, "Permission denied")
            return real_open(path, flags, *rest, **more)  # type: ignore[arg-type]  # as it came

        monkeypatch.setattr(os, "open", refuse)
        loaded = store.load("last", on_corrupt="fallback")
        assert step_of(loaded.state) == 1
        assert not isinstance(loaded.rejected[0], CheckpointCorruptError)
        assert paths[1].is_dir()


def test_fields_that_later_versions_add_are_ignored(checkpoint: Path) -> None:
    in_manifest("colour", value={"a": 1})(checkpoint)
    assert step_of(CheckpointReader(checkpoint.parents[1]).load().state) == 1


def test_duplicate_keys_change_nothing_that_matters(checkpoint: Path) -> None:
    line = (checkpoint / "MANIFEST.json").read_bytes().partition(b"\n")[0]
    put_manifest(checkpoint, b'{"step":7,' + line[1:])
    assert step_of(CheckpointReader(checkpoint.parents[1]).load().state) == 1


AUDIT = """
    import sys
    from pathlib import Path
    import torch, safetensors  # their own imports are no concern of ours
    from offloop.engine.checkpoint import CheckpointError, CheckpointReader
    import offloop.engine.checkpoint.restore
    sys.modules["pickle"] = None  # who asks for it now fails
    run = Path(sys.argv[1])
    CheckpointReader(run / "good").load()  # what is imported lazily is there now
    seen = []

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(run)):
            return
        bad = ("open", "exec", "compile", "import", "subprocess", "os.system", "os.exec")
        if event.startswith((*bad, "os.posix_spawn", "socket", "pickle", "ctypes.dlopen")):
            seen.append((event, str(arguments)[:200]))

    sys.addaudithook(watch)
    for directory in sorted(run.iterdir()):
        try:
            CheckpointReader(directory).load("last", on_corrupt="fallback")
        except CheckpointError as error:
            pass
    assert not seen, seen
    print("ok")
"""


def test_hostile_files_run_nothing(tmp_path: Path) -> None:
    """In a process of its own, with a hook that sees every import, open and call to the system."""
    good = tmp_path / "good"
    with CheckpointStore(good) as store:
        path = save(store, 1).info.path
    for number, damage in enumerate(DAMAGES.values()):
        shutil.copytree(good, tmp_path / str(number))
        damage(tmp_path / str(number) / path.relative_to(good))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AUDIT), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "ok\n", result.stderr


def test_errors_are_ordinary_exceptions() -> None:
    assert issubclass(CheckpointError, Exception)
    assert issubclass(UnsafeCheckpointError, CheckpointCorruptError)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" + b"[]," * 2_000_000 + b"[]]", id="arrays"),
        pytest.param(b"[" + b'{"a":1},' * 2_000_000 + b"1]", id="objects"),
        pytest.param(b"[" + b"1," * 10_000_001 + b"1]", id="numbers"),
    ],
)
def test_json_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    run_directory: Path, checkpoint: Path, content: bytes
) -> None:
    put_state(checkpoint, content)
    before = reset_peak()
    with pytest.raises(UnsafeCheckpointError, match=r"state\.json.*can be read"):
        CheckpointReader(run_directory).load()
    assert (peak() - before) * 1024 < 3 * len(content)


def test_view_that_repeats_its_base_to_gigabytes_is_refused(run_directory: Path, checkpoint: Path) -> None:
    def change(manifest: Any) -> None:
        name, stored = next((n, t) for n, t in manifest["tensors"].items() if t["bytes"])
        manifest["views"]["model.tall"] = {
            "base": name, "dtype": stored["dtype"], "shape": [2**31], "stride": [0], "offset": 0,
        }  # fmt: skip

    rewrite_manifest(checkpoint, change)
    with pytest.raises(UnsafeCheckpointError, match=r"MANIFEST\.json:model\.tall.*views repeat"):
        CheckpointReader(run_directory).load()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [0, 2**63 - 1, 2**63 - 1]),
        ("shape", [2**70, 0]),
        ("shape", [1] * 1000),
        ("dtype", "int32"),
        ("dtype", "nonsense"),
        ("offset", 2**63),
        ("bytes", 2**62),
    ],
)
def test_lying_about_a_tensor_is_noticed(
    run_directory: Path, checkpoint: Path, field: str, value: object
) -> None:
    def change(manifest: Any) -> None:
        next(t for t in manifest["tensors"].values() if t["dtype"] == "float32")[field] = value

    rewrite_manifest(checkpoint, change)
    with pytest.raises(CheckpointCorruptError):
        CheckpointReader(run_directory).load()


def test_integer_without_end_is_refused(run_directory: Path, checkpoint: Path) -> None:
    put_state(checkpoint, b'{"a":{"$":["int","0x' + b"f" * 10_000 + b'"]}}')
    with pytest.raises(UnsafeCheckpointError, match="a node that offloop does not write"):
        CheckpointReader(run_directory).load()
