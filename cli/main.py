"""The `offloop` command. It imports torch only inside the commands that train: `--help` answers at once."""

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from offloop.cli import checkpoints, models
from offloop.cli.output import fail
from offloop.engine import ConfigError

app = typer.Typer(
    name="offloop",
    help="Async, event-driven PyTorch training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help and one-line errors
    pretty_exceptions_enable=False,  # a plain traceback: short, and the same as from a script
)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offloop {metadata.version('offloop')}")
        raise typer.Exit


@app.callback()
def offloop(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Async, event-driven PyTorch training."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps, at least 1.")] = 500,
    seed: Annotated[int, typer.Option(help="Same seed, same losses; at least 0.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    run_dir: Annotated[Path, typer.Option(help="The run gets a directory of its own in this one.")] = Path(
        "runs"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print one line, at the end.")] = False,
    dashboard: Annotated[
        bool, typer.Option(help="Serve the live page; on a terminal, until Ctrl-C after the run.")
    ] = True,
) -> None:
    """Train a small GPT to write Python: one to two minutes on two CPU cores.

    It reads the source of Python's standard library, one character at a time.
    """
    if steps < 1:
        fail(f"--steps must be at least 1, got {steps}")
    if not 0 <= seed < 2**64:
        fail(f"--seed must be from 0 to 2**64 - 1, got {seed}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir must be a directory that can be written to: {error}")

    from offloop.cli.demo import run_demo

    try:
        run_demo(
            steps=steps, seed=seed, device=device, run_dir=run_dir, quiet=quiet, with_dashboard=dashboard
        )
    except (ConfigError, FileNotFoundError) as error:  # no such device; no standard library to read
        fail(str(error))


@app.command(
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
def verify_resume(
    script: Annotated[Path, typer.Argument(help="A Python script that trains with offloop.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its command line.")] = None,
    kills: Annotated[int, typer.Option(help="Number of kills, at least 1.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the choice of places.")] = 0,
    directory: Annotated[
        Path | None, typer.Option(help="Keep runs and records here; must be new or empty.")
    ] = None,
) -> None:
    """Kill a training script, resume it, and check that it computes the same bits.

    The script runs once uninterrupted, and once with kill -9 at random points and a resume after every kill. Its
    runs get a directory, a name and resume="auto" automatically; the script need not be changed.

    Exit code: 0 the same bits, 1 different bits, 2 the script could not be used.
    """
    if kills < 1:
        fail(f"--kills must be at least 1, got {kills}")
    if not script.is_file():
        fail(f"there is no script {script}")
    if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fail(f"--directory must be new or empty: {directory}")

    from rich.console import Console

    from offloop.cli.verify_resume import DIFFERENT, EQUAL, print_verdict
    from offloop.engine.tools.verify_resume import Nursery, UnusableError, verify

    with tempfile.TemporaryDirectory(prefix="offloop-verify-") as temporary:
        place = (directory or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        try:
            with Nursery() as nursery:
                verdict = verify(
                    script, arguments or [], kills=kills, seed=seed, directory=place, nursery=nursery
                )
        except UnusableError as error:
            fail(str(error))
        print_verdict(Console(highlight=False, markup=False), verdict)
    raise typer.Exit(EQUAL if verdict.is_equal else DIFFERENT)


if __name__ == "__main__":
    app(prog_name="offloop")
