"""`offloop models`: list, register, alias and verify versions of models."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from offloop.cli.checkpoints import SOURCE_HELP, Json, Registry, failing, shown_metric
from offloop.cli.output import (
    age,
    fail,
    number,
    plain_table,
    print_error,
    print_json,
    print_table,
    print_text,
    size,
)
from offloop.engine import ModelRegistry, ModelVersion
from offloop.engine.checkpoint import CheckpointCorruptError

app = typer.Typer(
    help="List, register, alias and verify versions of models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="List the versions of this model.")] = None,
    registry: Registry = Path("models"),
    as_json: Json = False,
) -> None:
    """List models, or the versions of one, oldest first."""
    found = ModelRegistry(registry)
    with failing():
        names = found.models() if name is None else [name]
        versions = {each: found.versions(each) for each in names}
        damaged = [error for each in names for error in found.damaged(each)]
        if as_json:
            print_json([_plain(version) for each in names for version in versions[each]])
        elif name is not None:
            _print_versions(versions[name])
        elif not names:
            print_text(f"no models in {registry}")
        else:
            table = plain_table("MODEL", ">VERSIONS", ">REGISTERED", "ALIASES")
            now = time.time()
            for each in names:
                aliases = ", ".join(f"{alias}={version}" for alias, version in found.aliases(each).items())
                newest = versions[each][-1:]
                when = age(now - newest[0].created) if newest else "-"
                table.add_row(each, str(len(versions[each])), when, aliases)
            print_table(table)
    for error in damaged:
        print_error(f"damaged: {error}")


@app.command()
def register(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    name: Annotated[str, typer.Argument(help="The model, new or existing.")],
    alias: Annotated[str | None, typer.Option(help="Alias for this version, such as champion.")] = None,
    notes: Annotated[str, typer.Option(help="Text to store with the version.")] = "",
    registry: Registry = Path("models"),
) -> None:
    """Register weights as the next version of a model.

    The registry copies the weights, so their source may be deleted. If a version with the same weights exists, no
    new one is created and the existing one gets the alias.
    """
    found = ModelRegistry(registry)
    with failing():
        version = found.register(source, name, alias=alias, notes=notes)
    named = f", {', '.join(version.aliases)}" if version.aliases else ""
    print_text(f"{version}{named}  {version.identity}")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Argument(help="Such as champion.")],
    version: Annotated[str | None, typer.Argument(help="Number of the version, or another alias.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias instead.")] = False,
    registry: Registry = Path("models"),
) -> None:
    """Point an alias to a version, or remove it."""
    found = ModelRegistry(registry)
    if remove is (version is not None):
        fail("give either a version or --remove")
    with failing():
        if version is None:
            if alias not in found.aliases(name):
                fail(f"{name} has no alias {alias!r}")
            found.unalias(name, alias)
            print_text(f"{name}@{alias} removed")
        else:
            named = found.alias(name, alias, int(version) if version.isdecimal() else version)
            print_text(f"{name}@{alias} is {named}")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Verify only this model.")] = None,
    registry: Registry = Path("models"),
) -> None:
    """Check versions against their checksums and identities.

    Exit code: 0 if all versions are intact, 1 if one is damaged, 2 if there are none or they cannot be read.
    """
    found = ModelRegistry(registry)
    damaged = 0
    with failing():
        names = found.models() if name is None else [name]
        if not names:
            fail(f"no models in {registry}")
        for each in names:
            versions = found.versions(each)
            errors = found.damaged(each)
            for version in versions:
                try:
                    found.verify(version)
                except CheckpointCorruptError as error:
                    errors.append(error)
                else:
                    print_text(f"ok       {version}  ({size(version.info.bytes)})")
            for each_error in errors:
                print_text(f"damaged  {each_error}")
            damaged += len(errors)
    if damaged:
        raise typer.Exit(1)


def _print_versions(versions: list[ModelVersion]) -> None:
    monitors = [str(version.run.get("monitor", "")) for version in versions]
    shown = shown_metric(monitors, [version.info for version in versions])
    table = plain_table(">VERSION", "RUN", ">STEP", f">{shown}", ">SIZE", ">REGISTERED", "ALIASES", "NOTES")
    now = time.time()
    for version in versions:
        table.add_row(
            str(version.number),
            version.run_id or version.source,
            str(version.step) if version.run_id else "-",
            number(version.metrics.get(shown)),
            size(version.info.bytes),
            age(now - version.created),
            ", ".join(version.aliases),
            version.notes,
        )
    print_table(table)


def _plain(version: ModelVersion) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "identity": version.identity,
        "path": str(version.path),
        "source": version.source,
        "run_id": version.run_id,
        "step": version.step,
        "metrics": version.metrics,
        "bytes": version.info.bytes,
        "created": version.created,
        "notes": version.notes,
        "run": dict(version.run),
    }
