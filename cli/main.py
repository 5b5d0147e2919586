"""The `offloop` command. Only the commands that train import torch, so `--help` answers at once."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from offloop.cli import checkpoints, export, models, runs
from offloop.cli.output import fail, reason
from offloop.engine import ConfigError

# Typer exports this one only, and has its base from click or from a copy of it.
_USAGE_ERROR: Final[Any] = typer.BadParameter.__mro__[1]


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Turn wrong usage into one line and exit code 2. A group without its command still prints its help."""
    try:
        yield
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        if context is None or type(error).__name__ == "NoArgsIsHelpError":
            raise
        text = error.format_message().rstrip(".")
        fail(f"{text[:1].lower()}{text[1:]}; see {context.command_path} --help")


class _Commands(TyperGroup):
    """The commands, with errors like those of everything else."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _usage_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any) -> Any:
        with _usage_in_one_line():
            return super().invoke(*arguments)


app = typer.Typer(
    name="offloop",
    cls=_Commands,
    help="Async, event-driven PyTorch training.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help, one-line errors, and tracebacks as from a script.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(models.app, name="models")
app.command(epilog=runs.FIELDS_HELP)(runs.runs)
app.command()(runs.label)
app.command()(export.export)


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
    seed: Annotated[int, typer.Option(help="At least 0; the same seed gives the same losses.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    run_dir: Annotated[Path, typer.Option(help="Create the run's directory in this one.")] = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only one line, at the end.")] = False,
    dashboard: Annotated[
        bool, typer.Option(help="Serve the live page; on a terminal, also after the run until Ctrl-C.")
    ] = True,
) -> None:
    """Train a small GPT to write Python.

    The model learns from the source code of Python's standard library, character by character. This takes one to two
    minutes on two CPU cores.
    """
    if steps < 1:
        fail(f"--steps must be at least 1, got {steps}")
    if not 0 <= seed < 2**64:
        fail(f"--seed must be from 0 to 2**64 - 1, got {seed}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir must be a writable directory: {reason(error)}")

    from offloop.cli.demo import run_demo

    try:
        run_demo(
            steps=steps, seed=seed, device=device, run_dir=run_dir, quiet=quiet, with_dashboard=dashboard
        )
    except (ConfigError, FileNotFoundError) as error:
        # There is no such device, or no source code of the standard library.
        fail(str(error))


@app.command()
def serve(
    runs_dir: Annotated[Path, typer.Argument(metavar="[RUNS_DIR]", help="The directory of the runs.")] = Path(
        "runs"
    ),
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="0: any free one. By default 8321, or the next free one.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Let no one edit names, tags and notes.")
    ] = False,
) -> None:
    """Serve the live page for past runs, and for those that other processes train.

    The page follows the files of the runs; it cannot steer them, and leads to the page of a run that has one of its
    own. Ctrl-C ends it.
    """
    from offloop.cli.serve import serve_runs

    serve_runs(runs_dir, port=port, host=host, open_browser=open_browser, read_only=read_only)


@app.command()
def watch(
    target: Annotated[
        str, typer.Argument(metavar="ADDRESS|RUN_DIR", help="Of a live page as it was printed; or of a run.")
    ],
    metric: Annotated[
        str | None, typer.Option(help="The curve to show first; by default loss.", show_default=False)
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="At an address: the run to show first; by default the newest.", show_default=False),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Read the token from this file; by default it is in the address, in OFFLOOP_TOKEN, or asked for.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Watch a run in the terminal: its state, a curve and its events.

    Keys pause, resume and stop it, where the address lets one steer, and turn to another metric or run. Ctrl-C or q
    leaves; the run goes on. Where there is no terminal, a line is printed every ten seconds until the run is over.
    """
    from offloop.cli.watch import watch_run

    watch_run(target, token_file=token_file, run=run, metric=metric)


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a recorded run.")],
    callbacks: Annotated[
        list[str] | None,
        typer.Option(
            "--callback",
            "-c",
            metavar="FILE.py:NAME|MODULE:NAME",
            help="A callback that gets the events: a class without arguments, or an instance. May be repeated.",
        ),
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Show the replay on the live page.")] = False,
    speed: Annotated[
        str | None,
        typer.Option(
            metavar="N|max",
            help="Recorded seconds in a second. By default 1 with a terminal or --page, else max.",
            show_default=False,
        ),
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Begin with a pause.")] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE.py|MODULE",
            help="Import what defines the classes of the run's own events. May be repeated.",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Where callbacks write; by default a temporary directory, if one needs it.",
            show_default=False,
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Of the page; 0: any free one. By default 8321, or the next free one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Replay the recorded events of a run to callbacks, or to the live page, without training.

    Without either, the events are printed. On a terminal, keys pause the replay (space), go on by one event (n) or
    one step (s), make it faster or slower (+ -) and end it (q).
    """
    from offloop.cli.replay import replay_run

    replay_run(
        run_dir,
        callbacks=callbacks or [],
        imports=imports or [],
        page=page or open_browser,
        open_browser=open_browser,
        port=port,
        speed=speed,
        paused=paused,
        directory=directory,
    )


@app.command()
def logout() -> None:
    """Forget all browsers that may open live pages of yours on this machine.

    Pages that are open close within seconds, and cookies are worth nothing. The address that a run has printed lets
    browsers in again until that run ends.
    """
    from offloop.dashboard.serving.security import forget_key, key_path

    try:
        is_forgotten = forget_key()
    except OSError as error:
        fail(f"{key_path()} cannot be deleted: {error.strerror}")
    typer.echo("All browsers are logged out." if is_forgotten else "No browser was logged in.")


@app.command(context_settings={"allow_interspersed_args": False})
def verify_resume(
    script: Annotated[Path, typer.Argument(help="A Python script that trains with offloop.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its command line.")] = None,
    kills: Annotated[int, typer.Option(help="Number of kills, at least 1.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed for choosing the steps to kill after.")] = 0,
    directory: Annotated[
        Path | None, typer.Option(help="Keep runs and records in this directory, which must be new or empty.")
    ] = None,
) -> None:
    """Kill and resume a training script, and compare the bits.

    Runs the script once without interruption, and once killed with kill -9 at random steps and resumed each time.
    offloop sets the directory, the name and resume="auto" of its runs; the script needs no change.

    Exit code: 0 if all bits are equal, 1 if not, 2 if the script cannot be verified.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        fail(
            "verify-resume wants one process, and several were started together: start it without torchrun. It "
            "verifies how a script resumes in one process; on several ranks, compare the losses of metrics.csv"
        )
    if kills < 1:
        fail(f"--kills must be at least 1, got {kills}")
    if not script.is_file():
        fail(f"there is no script {script}")
    if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fail(f"--directory must be new or empty: {directory}")

    from rich.console import Console

    from offloop.cli.verify_resume import print_verdict
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
    raise typer.Exit(0 if verdict.is_equal else 1)


if __name__ == "__main__":
    app(prog_name="offloop")
