"""`offloop runs` and `offloop label`: list runs, and say what they are."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from offloop.cli.output import (
    age,
    check_run,
    duration,
    fail,
    number,
    plain_table,
    print_error,
    print_json,
    print_rows,
    print_table,
    print_text,
    reason,
)
from offloop.dashboard.masking import masked, masked_command
from offloop.engine import (
    RUN_FIELDS,
    ConfigError,
    OffloopError,
    RunCatalog,
    RunFilter,
    RunLabels,
    RunLabelsChangedError,
    RunRecord,
    check_fields,
    edit_labels,
    read_labels,
    read_run,
    sort_runs,
    values_of,
)
from offloop.engine.checkpoint import CheckpointError, CheckpointReader
from offloop.engine.paths import meant_run
from offloop.engine.visible_text import visible

COLUMNS: Final = ("name", "state", "step", "last", "best", "duration", "age", "tag")
"""Columns of the list, unless others are chosen."""
KINDS: Final = {each.name: each.kind for each in RUN_FIELDS}
EXPLAINED: Final = 3
"""Most runs of which is told why they are lost."""
FIELDS_HELP: Final = "\n".join(
    (
        # Click folds no paragraph that begins with this
        "\b",
        "Fields:",
        *(f"  {each.name:<10}{each.about.replace('`', '')}" for each in RUN_FIELDS),
        f"  {'METRIC':<10}last value of a metric (val_loss); best.METRIC, last.METRIC",
        f"  {'SETTING':<10}a hyperparameter (optimizer.lr); also hparams.SETTING",
    )
)
"""What `offloop runs --help` ends with."""
TRIES: Final = 5
"""Times an edit is made again because another one came first."""


def runs(
    runs_dir: Annotated[Path, typer.Argument(help="Directory of runs, or that of one run.")] = Path("runs"),
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            help='Show the runs for which all terms hold: words, "quoted words" or /regex/ in name, id, key and tags, '
            'or FIELD:VALUE, FIELD=VALUE, FIELD<VALUE as in "state:failed,lost val_loss<0.5"; "-TERM" for the others.',
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(help="Sort by a field; -FIELD for the largest and newest first."),
    ] = "-started",
    columns: Annotated[
        str | None,
        typer.Option(help="Fields to show, separated by commas."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show archived runs, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List runs: finished ones, those that go on, and those that were killed. The newest are first.

    The column of a metric and BEST have the last and best value of the metric by which the runs are judged; where
    runs differ in it, METRIC names it. AGE and DURATION are those of the last attempt of a resumed run.

    Exit code: 0, even if some runs cannot be read; 2 if the directory cannot be read.
    """
    with _naming("--filter"):
        wanted = RunFilter(" ".join(filters or []))
    catalog = RunCatalog(runs_dir)
    catalog.refresh()
    if catalog.problem:
        fail(f"{catalog.problem}{meant_run(runs_dir)}")
    records = list(catalog.records.values())
    with _naming("--filter"):
        wanted.check(records)
    with _naming("--sort"):
        check_fields(records, [sort.removeprefix("-")])
    everything = everything or "archived" in wanted.fields
    found = [each for each in records if (everything or not each.labels.archived) and wanted.matches(each)]
    found = sort_runs(found, sort)
    if as_json:
        print_json({"runs": [_plain(each) for each in found], "total": len(records)})
        return
    if not records:
        print_text(f"no runs in {runs_dir}")
        return
    shown = [each.strip() for each in (columns or "").split(",") if each.strip()] or list(COLUMNS)
    if not columns and any(visible(each.key) != each.name for each in found):
        # What `label` and `export` take
        shown.insert(1, "key")
    with _naming("--columns"):
        check_fields(records, shown)
    now = time.time()
    if found:
        titles = {name: name.upper() for name in KINDS}
        if not columns:
            _name_metric(shown, titles, {each.monitor for each in found if each.monitor})
        print_rows(
            [_header(name, titles) for name in shown],
            [[_cell(record, name, now) for name in shown] for record in found],
        )
    for text in _about_lost([each for each in found if each.state == "lost"]):
        print_error(text)
    hidden = len(records) - len(found)
    if hidden:
        print_error(f"{hidden} of {len(records)} runs are not shown")


def label(
    run: Annotated[Path, typer.Argument(help="The run's directory.")],
    name: Annotated[
        str | None, typer.Option(help='Name to show instead of the run\'s id; "" for the id.')
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Remove a tag; may be repeated.")] = None,
    note: Annotated[str | None, typer.Option(help='Note; "" for none.')] = None,
    archived: Annotated[
        bool | None, typer.Option("--archive/--unarchive", help="Hide the run in lists, or show it again.")
    ] = None,
) -> None:
    """Give a run a name, tags and a note, or archive it. Without options, show them.

    They are kept in labels.json of the run's directory, and nothing on disk is renamed.
    """
    check_run(run)
    try:
        for _ in range(TRIES):
            current = read_labels(run)
            if (name, tag, untag, note, archived) == (None, None, None, None, None):
                labels = current
                break
            tags = None
            if tag or untag:
                if missing := [each for each in untag or [] if each not in current.tags]:
                    fail(f"{run} has no tag {missing[0]!r}")
                tags = [*(each for each in current.tags if each not in (untag or [])), *(tag or [])]
            try:
                labels = edit_labels(
                    run, version=current.version, name=name, tags=tags, note=note, archived=archived
                )
                break
            except RunLabelsChangedError:
                # The changes are to single labels, so they apply to the new ones as well
                continue
        else:
            fail(f"the labels of {run} change all the time; try again")
    except (OffloopError, OSError) as error:
        fail(reason(error))
    _print_labels(run, labels)


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Fail for a wrong value of an option."""
    try:
        yield
    except ConfigError as error:
        fail(f"{option}: {error}")


def _name_metric(shown: list[str], titles: dict[str, str], monitors: set[str]) -> None:
    """Let the columns LAST and BEST say of which metric they are: by a title, or in each row if there are several."""
    if len(monitors) == 1:
        (titles["last"],) = monitors
    elif monitors:
        shown.insert(shown.index("last"), "metric")


def _header(column: str, titles: Mapping[str, str]) -> str:
    """Return the header of a column; those of numbers are aligned at the right."""
    name = column.lower()
    title = titles.get(name, column)
    return title if KINDS.get(name) in ("text", "tag", "state", "flag") else f">{title}"


def _cell(record: RunRecord, column: str, now: float) -> str:
    values = values_of(record, column, now=now)
    if not values:
        return "-"
    match column.lower():
        case "tag":
            value = ", ".join(values)
        case "age":
            value = age(values[0])
        case "duration":
            value = duration(values[0])
        case "progress":
            value = f"{values[0]:.0%}"
        case "started" | "heard":
            value = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(values[0]))
        case _:
            value = masked({column: values[0]})[column]
    if isinstance(value, float):
        return number(value)
    return str(value).strip() or "-"


def _about_lost(lost: list[RunRecord]) -> Iterator[str]:
    """Yield why runs are lost, and how they go on, of the first ones; then how to see those of the others."""
    for each in lost[:EXPLAINED]:
        yield f"{each.name} is lost: {'; '.join(filter(None, (each.why, _way_on(each))))}"
    if len(lost) > EXPLAINED:
        yield f"{len(lost) - EXPLAINED} more are lost: offloop runs -f state:lost --columns name,why tells why"


def _way_on(record: RunRecord) -> str:
    """Return how a run that was lost is continued, in words; empty if that is not known."""
    path = Path(record.directory)
    with contextlib.suppress(ValueError, OSError):
        # As a string, only what has a slash is a path
        path = each if len((each := path.relative_to(Path.cwd())).parts) > 1 else path
    try:
        has_checkpoint = bool(CheckpointReader(path).checkpoints())
    except CheckpointError:
        return ""
    if not has_checkpoint:
        return "it has no checkpoint to continue from"
    return f"train(..., resume={str(path)!r}) continues it"


def _plain(record: RunRecord) -> dict[str, Any]:
    """Return a run for `--json`."""
    metrics = {
        name: {"last": each.last, "best": each.best, "best_step": each.best_step, "mode": each.mode}
        for name, each in record.metrics.items()
    }
    names = (
        "key id name directory state why attempt host pid created started heard seconds step epoch progress"
    )
    fields = [*names.split(), "monitor", "mode"]
    limits = ("epochs", "max_steps", "max_time")
    return {
        **{name: getattr(record, name) for name in fields},
        "limits": {name: getattr(record, name) for name in limits},
        "metrics": metrics,
        "hyperparameters": masked(record.hyperparameters),
        "command": masked_command(record.command),
        "tags": list(record.labels.tags),
        "note": record.labels.note,
        "archived": record.labels.archived,
    }


def _print_labels(run: Path, labels: RunLabels) -> None:
    record = read_run(run)
    table = plain_table("LABEL", "VALUE")
    table.add_row("name", labels.name or f"- ({record.id})")
    table.add_row("tags", ", ".join(labels.tags) or "-")
    table.add_row("note", labels.note or "-")
    table.add_row("archived", "yes" if labels.archived else "no")
    if record.state == "lost":
        table.add_row("lost", "; ".join(filter(None, (record.why, _way_on(record)))))
    print_table(table)
