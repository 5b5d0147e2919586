"""One run's directory on a remote store, through fsspec. A checkpoint there counts only if it is complete.

    <url>/<run_id>/run.json  events.jsonl  metrics.csv  ...         copies of the local files
    <url>/<run_id>/checkpoints/step-000001200-a1/...                as on the local disk, byte for byte
    <url>/<run_id>/refs/last  refs/best  refs/tags/<name>

    upload   all files of the checkpoint, check their sizes, MANIFEST.json last     from here on it counts
    delete   MANIFEST.json first                                                    from here on it does not

Object stores have neither renames nor locks, so none are needed. A checkpoint counts if its manifest exists,
carries its own checksum and names only files that exist with their lengths. Downloads are checked byte by byte
before they are used.
"""

import logging
import random
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from offloop.engine.checkpoint.errors import CheckpointCorruptError, CheckpointError, RemoteError
from offloop.engine.checkpoint.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    ManifestHead,
    decode_head,
)
from offloop.engine.checkpoint.reader import CHECKPOINTS, REFS, TAGS, CheckpointInfo
from offloop.engine.checkpoint.tags import TAG_NAME

logger = logging.getLogger("offloop")
T = TypeVar("T")

ATTEMPTS: Final = 5
"""Tries of one operation, with pauses of about 15 s in total: for a busy store or a short loss of the network."""
FIRST_PAUSE: Final = 1.0
"""Upper limit in seconds of the first pause; it doubles from pause to pause (full jitter)."""
LONGEST_PAUSE: Final = 30.0
"""Upper limit in seconds of all pauses."""

_HOPELESS: Final = (PermissionError, FileNotFoundError, ImportError, NotImplementedError, TypeError)
"""Errors that another try cannot change."""


def age(name: str) -> tuple[int, int, int]:
    """Return the sort key of a checkpoint by its name: attempt, step, number."""
    step, attempt, *number = name.removeprefix("step-").split("-")
    return int(attempt.removeprefix("a")), int(step), int(number[0]) if number else 1


class RemoteRun:
    """The remote directory of a run. All methods block on the network; use it from one thread at a time.

    Failures that may pass are retried with growing pauses. All others, and the last, raise `RemoteError`.
    """

    def __init__(self, url: str, run_id: str, options: Mapping[str, Any] | None = None) -> None:
        """Set the location. Makes no request.

        Args:
            url: fsspec's URL of the directory of runs: `s3://bucket/runs`, `file:///mnt/share/runs`.
            run_id: The run's id.
            options: Options of the fsspec file system.

        Raises:
            ImportError: fsspec or the package for the URL's scheme is missing; the text says what to install.
            ValueError: An unknown scheme, or an option that it does not accept.
        """
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # fsspec has no types
            from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # as above
            from fsspec.registry import known_implementations, registry  # type: ignore[import-untyped]  # as above
        except ImportError as error:
            raise ImportError("fsspec is missing: pip install 'offloop[remote]'") from error
        scheme = url.partition("://")[0]
        known = known_implementations.get(scheme)
        if known is None and scheme not in registry:
            raise ValueError(
                f"fsspec knows no {scheme}://; it knows s3://, gs://, az://, sftp://, file://, ..."
            )
        options = dict(options or {})
        if scheme in ("file", "local"):
            options.setdefault("auto_mkdir", True)
        try:
            self._store, root = url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as error:
            package = known["class"].partition(".")[0] if known else scheme
            raise ImportError(f"{scheme}:// needs {package}: pip install {package}") from error
        except TypeError as error:
            raise ValueError(str(error)) from error
        self.url = f"{url.rstrip('/')}/{run_id}"
        # Any thread sets it; then nothing is retried.
        self.stopping = threading.Event()
        self._root = f"{root.rstrip('/')}/{run_id}"
        # Object stores write a file whole or not at all; on a file system a rename does that.
        self._renames = isinstance(self._store, LocalFileSystem)
        # A separate generator, so that the user's random numbers do not change.
        self._random = random.Random()

    # Files ---------------------------------------------------------------------------------------

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to `name`, atomically; an existing file is replaced."""
        target = self._path(name)

        def put() -> None:
            if self._renames:
                folder, _, file = target.rpartition("/")
                temporary = f"{folder}/.{file}.uploading"
                self._store.put_file(str(source), temporary)
                self._store.mv(temporary, target)
            else:
                self._store.put_file(str(source), target)

        self._try(f"upload {name}", put)

    def put_bytes(self, content: bytes, name: str) -> None:
        """Write a small file, atomically."""
        with tempfile.NamedTemporaryFile(prefix="offloop-") as file:
            file.write(content)
            file.flush()
            self.put(Path(file.name), name)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, None if there is no such file."""

        def read() -> bytes | None:
            try:
                content: bytes = self._store.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

        return self._try(f"read {name}", read)

    def get(self, name: str, target: Path) -> None:
        """Copy a file to a local path that does not exist yet."""
        self._try(f"download {name}", lambda: self._store.get_file(self._path(name), str(target)))

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._store.rm_file(self._path(name))

        self._try(f"delete {name}", delete)

    def entries(self, folder: str = "") -> dict[str, int | None]:
        """Return the names in a folder with sizes in bytes, None for folders; empty if the folder does not exist."""

        def look() -> dict[str, int | None]:
            self._store.invalidate_cache()
            try:
                found = self._store.ls(self._path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            sizes: dict[str, int | None] = {}
            for entry in found:
                name = str(entry["name"]).rstrip("/").rpartition("/")[2]
                sizes[name] = None if entry["type"] == "directory" else int(entry["size"] or 0)
            return sizes

        return self._try(f"list {folder or 'the run'}", look)

    # Checkpoints ---------------------------------------------------------------------------------

    def checkpoint_names(self) -> list[str]:
        """Return the names of checkpoints, newest first, including incomplete ones."""
        return sorted(filter(CHECKPOINT_NAME.fullmatch, self.entries(CHECKPOINTS)), key=age, reverse=True)

    def head(self, name: str) -> ManifestHead | None:
        """Return the head of a checkpoint's manifest, None if the checkpoint is not complete."""
        folder = f"{CHECKPOINTS}/{name}"
        sizes = self.entries(folder)
        if MANIFEST not in sizes:
            return None
        content = self.read(f"{folder}/{MANIFEST}")
        try:
            head = decode_head(content or b"", Path(name))
        except CheckpointCorruptError:
            return None
        is_whole = all(sizes.get(file) == record.bytes for file, record in head.files.items())
        return head if head.name == name and is_whole else None

    def upload_checkpoint(self, info: CheckpointInfo, sent: set[str]) -> None:
        """Upload a checkpoint. After a failure, calling again continues.

        Args:
            info: The local checkpoint; must not be deleted meanwhile.
            sent: Files that this method has uploaded; updated.

        Raises:
            RemoteError: The upload failed, or another checkpoint has this name.
        """
        folder = f"{CHECKPOINTS}/{info.name}"
        manifest = (info.path / MANIFEST).read_bytes()
        if (present := self.head(info.name)) is not None:
            if self.read(f"{folder}/{MANIFEST}") == manifest:
                return
            raise RemoteError(
                f"{self.url}/{folder}", f"another run (attempt {present.attempt}) has written it meanwhile"
            )
        for name in info.manifest.files:
            if name not in sent:
                self.put(info.path / name, f"{folder}/{name}")
                sent.add(name)
        sizes = self.entries(folder)
        for name, record in info.manifest.files.items():
            if sizes.get(name) != record.bytes:
                sent.discard(name)
                raise RemoteError(
                    f"{self.url}/{folder}/{name}", f"has {sizes.get(name)} bytes there, {record.bytes} here"
                )
        self.put_bytes(manifest, f"{folder}/{MANIFEST}")
        # Older checkpoints are deleted because of this one, so check that it is complete.
        if self.head(info.name) is None:
            raise RemoteError(f"{self.url}/{folder}/{MANIFEST}", "is not what was written")

    def download_checkpoint(self, name: str, directory: Path) -> None:
        """Copy the files of a checkpoint into an empty local directory, the manifest last.

        Raises:
            CheckpointCorruptError: Its manifest is missing or damaged.
        """
        folder = f"{CHECKPOINTS}/{name}"
        manifest = self.read(f"{folder}/{MANIFEST}")
        for file in decode_head(manifest or b"", Path(f"{self.url}/{folder}")).files:
            self.get(f"{folder}/{file}", directory / file)
        assert manifest is not None
        (directory / MANIFEST).write_bytes(manifest)

    def delete_checkpoint(self, name: str) -> None:
        """Delete a checkpoint, complete or not."""
        folder = f"{CHECKPOINTS}/{name}"
        files = self.entries(folder)
        for file in sorted(files, key=lambda file: file != MANIFEST):
            self.delete(f"{folder}/{file}")
        if self._renames:
            with suppress(OSError):
                self._store.rmdir(self._path(folder))

    # Refs ----------------------------------------------------------------------------------------

    def ref(self, name: str) -> str | None:
        """Return the checkpoint that a ref (`last`, `best`, `tags/<tag>`) names."""
        found = (self.read(f"{REFS}/{name}") or b"").decode("ascii", "replace").strip()
        return found if CHECKPOINT_NAME.fullmatch(found) else None

    def set_ref(self, name: str, checkpoint: str) -> None:
        """Set a ref to a checkpoint's name."""
        self.put_bytes(f"{checkpoint}\n".encode(), f"{REFS}/{name}")

    def tags(self) -> dict[str, str]:
        """Return the checkpoints that tags name."""
        names = filter(TAG_NAME.fullmatch, self.entries(f"{REFS}/{TAGS}"))
        tags = {tag: self.ref(f"{TAGS}/{tag}") for tag in names}
        return {tag: name for tag, name in tags.items() if name is not None}

    # ---------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, what: str, operation: Callable[[], T]) -> T:
        """Run an operation; retry it after a pause if the failure may pass."""
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return operation()
            except CheckpointError:
                raise
            except Exception as error:
                is_last = attempt == ATTEMPTS or isinstance(error, _HOPELESS)
                reason = f"could not {what}: {type(error).__name__}: {error}"
                if is_last or self.stopping.wait(self._random.uniform(0.0, pause)):
                    raise RemoteError(self.url, reason) from error
                logger.info("%s: %s; trying again", self.url, reason)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")


def attempts_so_far(run_json: bytes | None, names: list[str]) -> int:
    """Return the number of attempts of a run, by its `run.json` and its checkpoints."""
    said: object = None
    with suppress(msgspec.DecodeError):
        described = msgspec.json.decode(run_json or b"{}")
        said = described.get("attempt") if isinstance(described, dict) else None
    counted = [age(name)[0] for name in names]
    if isinstance(said, int):
        counted.append(said)
    return max(counted, default=-1) + 1
