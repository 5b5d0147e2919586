"""`offloop checkpoints`: list, verify, tag, export and compare checkpoints."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from offloop.cli.output import (
    age,
    fail,
    number,
    plain_table,
    print_error,
    print_json,
    print_table,
    print_text,
    reason,
    share,
    size,
)
from offloop.engine import OffloopError, read_run
from offloop.engine.checkpoint import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointInfo,
    CheckpointReader,
    CheckpointStore,
    find_checkpoint,
    list_runs,
)
from offloop.engine.paths import meant_run

app = typer.Typer(
    help="List, verify, tag, export and compare checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Registry = Annotated[Path, typer.Option(help="Directory of the registered models.")]
SOURCE_HELP = (
    "A run (runs/first, runs/first@best, runs/first@TAG, runs/first:STEP), the directory of a checkpoint, a "
    "registered model (name, name:3, name@alias), or a file (.safetensors, .pt, .pth)."
)
Where = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a directory of runs.")]


@contextmanager
def failing() -> Iterator[None]:
    """Turn offloop's errors into one line and exit code 2."""
    try:
        yield
    except (OffloopError, OSError) as error:
        fail(reason(error))


@app.command("list")
def list_checkpoints(
    where: Annotated[Path, typer.Argument(help="A run, or a directory of runs.")] = Path("runs"),
    metric: Annotated[
        str | None, typer.Option(help="Metric to show; by default the one by which the run is judged.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the checkpoints of one run or of all, oldest first.

    Exit code: 0, even if it reports damaged checkpoints or unreadable runs; 2 if no run can be read.
    """
    unreadable: dict[Path, CheckpointError] = {}
    with failing():
        runs = [reader for reader in _readers(where) if not _is_empty(reader, unreadable)]
        readers = [reader for reader in runs if reader.directory not in unreadable]
        damaged = [error for reader in readers for error in reader.damaged()]
        if as_json:
            known = [(reader, each) for reader in readers for each in reader.checkpoints()]
            print_json(
                {
                    "checkpoints": [_plain(reader, each) for reader, each in known],
                    "damaged": [{"path": str(error.path), "error": str(error)} for error in damaged],
                    "unreadable": [
                        {"run": str(run), "error": str(error)} for run, error in unreadable.items()
                    ],
                }
            )
        elif readers:
            for place, reader in enumerate(runs):
                print_text(f"{'' if place == 0 else chr(10)}{reader.directory}")
                if reader in readers:
                    _print_run(reader, metric)
                else:
                    print_text(f"cannot be read: {unreadable[reader.directory]}")
            for error in damaged:
                print_error(f"damaged: {error}")
    if unreadable and not readers:
        fail(str(next(iter(unreadable.values()))))
    if not runs and not as_json:
        print_text(f"no checkpoints in {where}")


@app.command()
def verify(where: Where = Path("runs")) -> None:
    """Check every byte against its checksum.

    Exit code: 0 if all checkpoints are intact, 1 if one is damaged, 2 if one cannot be read or there is none.
    """
    whole = damaged = unreadable = 0
    with failing():
        for reader, info in _everything(where):
            try:
                if isinstance(info, CheckpointError):
                    raise info
                reader.verify(info)
            except CheckpointCorruptError as error:
                damaged += 1
                print_text(f"damaged  {error}")
            except CheckpointError as error:
                unreadable += 1
                print_text(f"unread   {error}")
            else:
                whole += 1
                print_text(f"ok       {info.path}  ({size(info.bytes)})")
    if not whole + damaged + unreadable:
        fail(f"no checkpoints in {where}")
    if whole + damaged:
        print_text(f"{_counted(whole + damaged, 'checkpoint')}, {damaged or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)
    if unreadable:
        fail("not all checkpoints could be read")


@app.command()
def tag(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="runs/first, runs/first@best, runs/first:STEP, or the directory of a checkpoint."
        ),
    ],
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    move: Annotated[bool, typer.Option("--move", help="Move the tag from another checkpoint.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tag instead.")] = False,
) -> None:
    """Give a checkpoint a name, which also protects it from deletion.

    While the run is in progress, use await run.tag(NAME) instead.
    """
    with failing():
        info = find_checkpoint(checkpoint)
        run = info.path.parent.parent
        holder = CheckpointReader(run).tags().get(name)
        if remove and holder is None:
            fail(f"{run} has no tag {name!r}")
        if not remove and holder not in (None, info.name) and not move:
            fail(f"tag {name!r} is on {holder}; --move moves it")
        try:
            with CheckpointStore(run) as store:
                if remove:
                    store.untag(name)
                else:
                    store.tag(name, info.name, move=True)
        except ValueError as error:
            # The name has illegal characters.
            fail(str(error))
    print_text(f"{run}: {name} removed" if remove else f"{run}: {name} is {info.name}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    file: Annotated[
        Path, typer.Argument(help="Its suffix sets the format: .safetensors, or .pt or .pth for torch.load.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    registry: Registry = Path("models"),
) -> None:
    """Write weights to a plain file for other tools.

    The file has every name of the state dict; tied tensors are stored once per name.
    """
    from offloop.engine import export_model

    if file.exists() and not force:
        fail(f"{file} exists; --force replaces it")
    with failing():
        export_model(source, file, registry=registry, overwrite=force)
    print_text(f"{file}: {size(file.stat().st_size)}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    b: Annotated[str, typer.Argument(help="As for a.")],
    limit: Annotated[int, typer.Option(help="Number of tensors to show, largest differences first.")] = 20,
    registry: Registry = Path("models"),
    as_json: Json = False,
) -> None:
    """Compare two models, their metrics and settings.

    For every tensor that differs: the share of changed elements, the largest absolute difference, and the norm of the
    difference relative to the first tensor. Then the metrics and settings that differ between the runs.

    Exit code: 0 if all tensors are equal, 1 if not, 2 if they cannot be compared.
    """
    import msgspec

    from offloop.engine import compare_models

    with failing():
        found = compare_models(a, b, registry=registry)
    if as_json:
        print_json({"equal": found.is_equal, **msgspec.to_builtins(found)})
        raise typer.Exit(0 if found.is_equal else 1)
    print_text(f"a  {found.a}\nb  {found.b}\n")
    if found.is_equal:
        print_text(f"All {_counted(found.same, 'tensor')} are equal.")
    else:
        print_text(f"{_counted(len(found.tensors), 'tensor')} differ, {found.same} are equal.")
        table = plain_table("TENSOR", "TYPE", ">CHANGED", ">MAX ABS", ">RELATIVE")
        order = sorted(
            found.tensors, key=lambda each: (each.kind in ("values", "dtype"), -_or_inf(each.relative))
        )
        for each in order[: max(limit, 0)]:
            if each.kind == "values" and each.elements:
                kind = str(each.a)
            elif each.kind.startswith("only"):
                kind = f"{each.a or each.b} only in {each.kind[-1]}"
            else:
                kind = f"{each.a} | {each.b}"
            figures = ("-", "-", "-")
            if each.elements:
                figures = (share(each.changed, each.elements), number(each.max_abs), number(each.relative))
            table.add_row(each.name, kind, *figures)
        print_table(table)
        if len(order) > limit:
            print_text(f"... and {len(order) - limit} more: --limit {len(order)}")
    for title, differing in (("metrics", found.metrics), ("settings", found.settings)):
        if differing:
            table = plain_table(title.upper(), "a", "b")
            for name, (in_a, in_b) in differing.items():
                table.add_row(name, _short(in_a), _short(in_b))
            print_text("")
            print_table(table)
    raise typer.Exit(0 if found.is_equal else 1)


def _readers(where: Path) -> list[CheckpointReader]:
    """Return the run in a directory, or the runs in its subdirectories."""
    if not where.is_dir():
        fail(f"there is no directory {where}{meant_run(where)}")
    if (where / "checkpoints").is_dir():
        return [CheckpointReader(where)]
    return list_runs(where)


def _is_empty(reader: CheckpointReader, unreadable: dict[Path, CheckpointError]) -> bool:
    """True if a run has no checkpoints. Adds the error of an unreadable run to `unreadable`."""
    try:
        return not (reader.checkpoints() or reader.damaged())
    except CheckpointError as error:
        unreadable[reader.directory] = error
        return False


def _everything(where: Path) -> Iterator[tuple[CheckpointReader, CheckpointInfo | CheckpointError]]:
    """Yield all checkpoints of a directory, or the error of an unreadable manifest or run."""
    if not where.is_dir() or (where / "MANIFEST.json").exists():
        try:
            info: CheckpointInfo | CheckpointError = find_checkpoint(where)
        except CheckpointCorruptError as error:
            info = error
        yield CheckpointReader(where.parent.parent), info
        return
    for reader in _readers(where):
        try:
            known, damaged = reader.checkpoints(), reader.damaged()
        except CheckpointError as error:
            yield reader, error
        else:
            yield from ((reader, info) for info in known)
            yield from ((reader, error) for error in damaged)


def _names_of(reader: CheckpointReader, info: CheckpointInfo) -> list[str]:
    """Return the names of a checkpoint: `best` and `last` if they apply, then its tags."""
    names = [name for name in ("best", "last") if _is(reader, info, name)]
    return [*names, *(tag for tag, name in reader.tags().items() if name == info.name)]


def _is(reader: CheckpointReader, info: CheckpointInfo, which: str) -> bool:
    try:
        return reader.find(which).name == info.name
    except CheckpointError:
        return False


def _print_run(reader: CheckpointReader, metric: str | None) -> None:
    known = reader.checkpoints()
    shown = metric or shown_metric([read_run(reader.directory).monitor], known)
    table = plain_table("CHECKPOINT", ">STEP", ">EPOCH", f">{shown}", ">SIZE", ">SAVED", "NAMES")
    now = time.time()
    for info in known:
        table.add_row(
            info.name,
            str(info.step),
            str(info.manifest.epoch),
            number(info.metrics.get(shown)),
            size(info.bytes),
            age(now - info.manifest.created),
            ", ".join(_names_of(reader, info)),
        )
    print_table(table)


def shown_metric(monitors: Iterable[str], infos: Iterable[CheckpointInfo]) -> str:
    """Return the metric to show of checkpoints: one by which their runs are judged, else val_loss, or any of theirs."""
    keys = dict.fromkeys(key for info in infos for key in info.metrics)
    return next((key for key in (*monitors, "val_loss", *keys) if key in keys), "val_loss")


def _plain(reader: CheckpointReader, info: CheckpointInfo) -> dict[str, Any]:
    manifest = info.manifest
    names = _names_of(reader, info)
    return {
        "run": str(reader.directory),
        "run_id": manifest.run_id,
        "path": str(info.path),
        "name": info.name,
        "step": info.step,
        "epoch": manifest.epoch,
        "batch": manifest.batch,
        "attempt": manifest.attempt,
        "reason": manifest.reason,
        "metrics": info.metrics,
        "bytes": info.bytes,
        "created": manifest.created,
        "is_best": "best" in names,
        "is_last": "last" in names,
        "tags": [name for name in names if name not in ("best", "last")],
    }


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _or_inf(value: float) -> float:
    return float("inf") if value != value else value


def _short(value: object) -> str:
    return number(value) if isinstance(value, float) else "-" if value is None else str(value)
