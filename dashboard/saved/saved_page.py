"""The saved page: the built page and recordings of runs in one HTML file, which a browser opens from disk.

    <head>  policy: scripts and styles of this file alone, no requests; style sheet
    <body>  the list of runs and each run, compressed, as text that no browser executes; the page's script

Whatever comes from a run is compressed and in base64, so no text of a run is ever markup.
"""

import base64
import contextlib
import hashlib
import os
import re
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from offloop.dashboard.protocol.encoding import encode_message
from offloop.dashboard.protocol.from_server import Hello, Rows, RunSummary
from offloop.dashboard.saved.recording import Detail, Recording, packed, record, shareable
from offloop.dashboard.serving.page import Page
from offloop.engine import ConfigError, OffloopError, RunCatalog, RunRecord, checks, read_run
from offloop.engine.paths import is_run, meant_run

POINTS: Final = 5_000
"""Most points of a curve, unless another number is given."""
GOAL: Final = 3_000_000
"""Bytes up to which a file keeps all digits and points: what can be sent by mail and opens at once."""
MOST_RUNS: Final = 100
"""A browser takes seconds to open the file of more."""
EVENTS: Final = (2_000, 500)
"""Most events of a run, and where even that is too many."""
SHARE_OF_SAMPLES: Final = 1 / 3
"""Share of the file that texts, pictures and tables may take; all runs have the same of it."""
BASE64: Final = 4 / 3
"""Bytes of text for each byte."""
DIGITS: Final = (None, 6, 5, 4)
"""Significant digits, from the largest file to the smallest. Four are what the page shows of a value."""


class SavedPage(NamedTuple):
    """What was written."""

    path: Path
    bytes: int
    runs: int
    digits: int | None
    """Significant digits that values are rounded to; None: they are as in the logs."""
    points: int
    """Most points of a curve."""
    samples_left_out: int
    """Texts, pictures and tables that are not in the file."""
    skipped: int
    """Lines of logs that hold no event and were skipped."""


def export_html(
    runs: Path | str | Iterable[Path | str],
    path: Path | str,
    *,
    points: int = POINTS,
    max_bytes: int | None = None,
    replace: bool = False,
) -> SavedPage:
    """Write runs into one HTML file that shows their curves, events and configuration without a server.

    The file makes no requests: it opens from disk and offline. Its viewers see what the read-only role sees on the
    live page. It leaves out host, process, command line and where the directory is, and has `~` for names of users in
    paths; names, tags, notes, hyperparameters and events are in it, with secrets masked.

    A curve of up to `points` points has all of them, a longer one minima and maxima of neighbours. Values are exact
    while the file has at most 3 MB. Beyond, they are rounded, to four significant digits at least, and curves that
    are reduced anyway get fewer points, a quarter at least. Least, greatest and last values are always exact. Times
    are rounded to milliseconds. Of the events of a run the latest 2,000 are in it; 500 if the file gets too large.

    Texts, pictures and tables may take a third of the file. Where a run has more, those that are in it are spread
    evenly over its steps.

    Runs that go on are written as they stand. The file appears whole or not at all.

    Blocks for about a second per 30 MB of the logs. Loads no torch.

    Args:
        runs: Directories of runs, or of directories of runs, of which those that are not archived are taken. At most
            100 runs.
        path: The file to write. Its directory must exist.
        points: Most points of a curve, from 100 to 5,000.
        max_bytes: Fail if the file cannot be made as small as this, at least 1,000,000. None: about 3 MB, more where
            many runs need it. A larger number keeps more digits and more texts and pictures.
        replace: Replace an existing file.

    Raises:
        ConfigError: An argument is not legal, a directory is that of no run, or `max_bytes` is not enough.
        FileExistsError: The file exists.
        OSError: A log cannot be read, or the file cannot be written.
        OffloopError: This installation has no live page.
    """
    checks.whole_number("points", points, at_least=100, at_most=POINTS)
    if max_bytes is not None:
        checks.whole_number("max_bytes", max_bytes, at_least=1_000_000)
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"path must name a file, {target} is a directory")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent} for {target.name}")
    if not replace and os.path.lexists(target):
        raise FileExistsError(17, "file exists", str(target))
    page = Page.load()
    if page is None:
        raise OffloopError("this installation of offloop has no live page: make page, or pip install again")
    chosen, goal = chosen_runs(runs), GOAL if max_bytes is None else max_bytes
    sample_bytes = int(goal * SHARE_OF_SAMPLES / BASE64 / len(chosen))
    recordings = [record(each, points=points, sample_bytes=sample_bytes) for each in chosen]
    document, detail = _smallest_needed(page, recordings, points, goal)
    if max_bytes is not None and len(document) > max_bytes:
        count = "1 run" if len(recordings) == 1 else f"{len(recordings)} runs"
        raise ConfigError(
            f"max_bytes={max_bytes:,} is not enough for {count}: with 4 digits and "
            f"{detail.points:,} points a curve the file has {len(document):,} bytes"
        )
    _write(target, document)
    return SavedPage(
        target,
        len(document),
        len(recordings),
        detail.digits,
        detail.points,
        sum(each.samples.left_out for each in recordings),
        sum(each.skipped for each in recordings),
    )


# Which runs --------------------------------------------------------------------------------------


def chosen_runs(runs: Path | str | Iterable[Path | str]) -> list[RunRecord]:
    """Return the runs of directories, each once, in the order given, with keys of their own. Blocks.

    Raises:
        ConfigError: A directory is that of no run, or there are too many runs.
    """
    found: dict[str, RunRecord] = {}
    for each in [runs] if isinstance(runs, str | Path) else runs:
        for run in _runs_in(Path(each)):
            found.setdefault(os.path.realpath(run.directory), run)
    if not found:
        raise ConfigError("runs must name at least one run")
    if len(found) > MOST_RUNS:
        raise ConfigError(f"runs must be at most {MOST_RUNS}, got {len(found)}: name those to compare")
    taken: set[str] = set()
    keyed: list[RunRecord] = []
    for run in found.values():
        # The path above it would tell where it was.
        name, number = Path(run.directory).name or run.id, 1
        key = name
        while key in taken:
            number += 1
            key = f"{name}~{number}"
        taken.add(key)
        keyed.append(msgspec.structs.replace(run, key=key))
    return keyed


def _runs_in(directory: Path) -> Sequence[RunRecord]:
    if not directory.is_dir():
        what = "is a file, and not the directory of a run" if directory.exists() else "does not exist"
        raise ConfigError(f"{directory} {what}{meant_run(directory)}")
    if is_run(directory):
        return [read_run(directory.resolve())]
    catalog = RunCatalog(directory)
    catalog.refresh()
    runs = [each for each in catalog.records.values() if not each.labels.archived]
    if not runs:
        raise ConfigError(
            f"{directory} is neither a run, which has run.json or events.jsonl, nor a directory of runs"
            f"{meant_run(directory)}"
        )
    return sorted(runs, key=lambda each: each.started)


# The file ----------------------------------------------------------------------------------------


def _smallest_needed(
    page: Page, recordings: Sequence[Recording], points: int, goal: int
) -> tuple[bytes, Detail]:
    """Return the file with as much detail as fits into `goal` bytes, or with the least; and how much that is."""
    details = [Detail(digits, points, EVENTS[0]) for digits in DIGITS]
    details += [Detail(4, points // 2, EVENTS[0]), Detail(4, points // 4, EVENTS[1])]
    made: dict[Detail, bytes] = {}

    def fits(detail: Detail) -> bool:
        made[detail] = _document(page, recordings, detail)
        return len(made[detail]) <= goal

    best = details[bisect_left(details[:-1], True, key=fits)]
    return made.get(best) or _document(page, recordings, best), best


def _document(page: Page, recordings: Sequence[Recording], detail: Detail) -> bytes:
    now = time.time()
    summaries = [
        RunSummary(key=each.row.key, name=each.row.name, state=each.row.state, started=each.started)
        for each in recordings
    ]
    newest = max(recordings, key=lambda each: each.started)
    hello = Hello(
        server=f"saved {now}",
        page=None,
        role="read_only",
        runs=summaries,
        run=newest.row.key,
        time=now,
        frame_interval=0.0,
        saved=now,
    )
    rows = Rows(rows=[each.row for each in recordings], total=len(recordings))
    listed = b'{"hello":%b,"rows":%b}' % (encode_message(hello), encode_message(rows))
    listed = shareable(listed, [each.directory for each in recordings])
    blocks: list[str] = []
    for number, each in enumerate(recordings):
        blocks.append(_block(f"saved-{number}", packed(each, detail)))
        if each.samples.parts:
            blocks.append(_block(f"saved-{number}-samples", each.samples.parts))
    # The last one: a page that has it has all.
    blocks.append(_block("saved", [listed]))
    return _shell(page, "\n".join(blocks)).encode()


def _block(name: str, parts: Iterable[bytes]) -> str:
    """Return bytes as an element that holds text."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9)
    compressed = bytearray()
    for part in parts:
        # Each part has a code of its own: planes of bytes have little in common.
        compressed += compressor.compress(part) + compressor.flush(zlib.Z_SYNC_FLUSH)
    compressed += compressor.flush()
    text = base64.b64encode(compressed).decode()
    return f'<script type="text/plain" id="{name}">{text}</script>'


def _shell(page: Page, blocks: str) -> str:
    """Return the built page with its script and its style sheet inside."""
    files = {name.rpartition("/")[2]: each.body.decode() for name, each in page.assets.items()}
    script, style = files["page.js"].strip(), files["page.css"].strip()
    assert not re.search(r"</script|<!--", script, re.IGNORECASE) and "</style" not in style
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src blob:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    index = files[""]
    for pattern, replacement in (
        ("<html ", "<html data-saved "),
        (r'<link rel="icon"[^>]*>', f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        (r'<link rel="stylesheet"[^>]*>', f"<style>{style}</style>"),
        # The browser executes it when it has all of the file, or as much as there is.
        (r'<script type="module"[^>]*></script>', f'<script type="module">{script}</script>'),
        ("</body>", f"{blocks}\n</body>"),
    ):
        parts = re.split(pattern, index)
        assert len(parts) == 2, pattern
        index = replacement.join(parts)
    return index


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _write(target: Path, document: bytes) -> None:
    """Write a file that appears whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(document)
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(target)) from None
        raise
