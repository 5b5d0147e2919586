"""`offloop demo`: trains a small GPT to write Python, then prints its output, losses, files and callback costs.

It is also the first example: it uses only public names, and `run_demo` reads from top to bottom like a training
script. The model and its text are plain PyTorch, in `char_gpt.py`.
"""

import contextlib
import math
import sys
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Final, cast

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from offloop import (
    Callback,
    Dashboard,
    GradientMonitor,
    LayerStatistics,
    MetricLogger,
    ProgressBar,
    ResourceMonitor,
    Run,
    RunResult,
    StepPoint,
    TextSample,
    Trainer,
    ValidationEnd,
    in_step,
)
from offloop.cli.char_gpt import CharGPT, Windows, char_loss, load_text, sample

# Found by trial: two CPU cores reach less than 1.8 nats per character within about a minute.
BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 6e-3
WARMUP_STEPS: Final = 50
# 32,768 characters, spread evenly over all validation files.
VALIDATION_WINDOWS: Final = 512
VALIDATE_EVERY_N_STEPS: Final = 100
# Intervals of the figures on the live page.
MEASURE_EVERY_N_STEPS: Final = 25
WRITE_EVERY_N_STEPS: Final = 100
PROMPT: Final = "\ndef "


class ValidationLosses(Callback):
    """Keeps the loss of every validation. An observer: training never waits for it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    async def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self.losses.append(event.metrics["val_loss"])


class Writer(Callback):
    """Publishes what the model writes, for the live page. A step hook: training waits for it."""

    on_error = "isolate"
    ranks = "first"

    def __init__(self, *, every_n_steps: int, seed: int) -> None:
        self.every_n_steps = every_n_steps
        self.seed = seed

    @in_step(every_n_steps="every_n_steps")
    def after_step(self, point: StepPoint) -> None:
        text = sample(cast(CharGPT, point.model), PROMPT, length=120, seed=self.seed)
        point.publish(TextSample, key="code", text=text)


def warmup_then_cosine(step: int, *, steps: int) -> float:
    """Return the factor of the learning rate at a step: linear warmup, then a cosine down to 5 %."""
    warmup_steps = min(WARMUP_STEPS, 1 + steps // 10)
    warmup = min(1.0, (step + 1) / warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return warmup * (0.05 + 0.95 * cosine)


def run_demo(
    *, steps: int, seed: int, device: str, run_dir: Path, quiet: bool, with_dashboard: bool
) -> RunResult:
    """Train the demo's model and print the results. Blocks until the run has ended and the page is closed.

    Under torchrun, rank 0 alone prints and has the page, which ends with the run.

    Args:
        steps: Optimizer steps, at least 1.
        seed: Seed of the initial weights and of the order of the batches.
        device: As for `Trainer(device=...)`.
        run_dir: Parent of the run's directory.
        quiet: Print only one line, at the end.
        with_dashboard: Serve the live page; on a terminal it stays open until Ctrl-C.
    """
    train_text, val_text = load_text()
    torch.manual_seed(seed)
    model = CharGPT()
    length = model.context
    train_set = Windows(train_text, length=length, stride=length)
    val_set = Windows(val_text, length=length, stride=len(val_text) // VALIDATION_WINDOWS)
    train_loader = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, batch_size=4 * BATCH_SIZE)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, partial(warmup_then_cosine, steps=steps))
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loss=char_loss,
        scheduler=scheduler,
        scheduler_interval="step",
        gradient_clip_val=1.0,
        val_every_n_steps=min(VALIDATE_EVERY_N_STEPS, steps),
        seed=seed,
        device=device,
        run_dir=str(run_dir),
    )

    is_first = trainer.rank == 0
    console = Console(quiet=quiet or not is_first, highlight=False)
    ranks = f" Ranks: {trainer.world_size}." if trainer.world_size > 1 else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Training a GPT of {parameters:,} parameters to write Python, on {len(train_text):,} "
        f"characters of the standard library. Device: {trainer.device}.{ranks}"
    )
    loss_before = trainer.evaluate(val_loader)["val_loss"]
    validations = ValidationLosses()
    callbacks: list[Callback] = [validations, MetricLogger()]
    if not quiet:
        callbacks += [
            ProgressBar(),
            # What the live page shows beside loss and learning rate.
            ResourceMonitor(every_seconds=1.0),
            GradientMonitor(every_n_steps=MEASURE_EVERY_N_STEPS),
            LayerStatistics(every_n_steps=MEASURE_EVERY_N_STEPS),
            Writer(every_n_steps=WRITE_EVERY_N_STEPS, seed=seed),
        ]
    dashboard = Dashboard() if with_dashboard and not quiet else None
    # Open the page before the run, and keep it open afterwards. A run of several ranks has one page.
    with dashboard if dashboard is not None and is_first else contextlib.nullcontext():
        if dashboard is not None:
            callbacks.append(dashboard)
        try:
            result = trainer.train(train_loader, val_loader, max_steps=steps, callbacks=callbacks)
        except KeyboardInterrupt:
            # The run has shut down cleanly, and its files are complete.
            if trainer.last_run is not None:
                files = f"Interrupted. The run's files are in {trainer.last_run.dir}"
                console.print(f"\n{files}", soft_wrap=True)
            raise

        if not is_first:
            return result
        if quiet:
            print(one_line(result))
            return result
        print_sample(console, model, seed)
        print_summary(console, result, [loss_before, *validations.losses])
        print_callback_costs(console, result)
        # A Ctrl-C under torchrun would be a failure of the group
        if dashboard is not None and trainer.world_size == 1 and sys.stdin.isatty() and sys.stdout.isatty():
            dashboard.wait_for_interrupt()
    return result


# Printing ----------------------------------------------------------------------------------------


def one_line(result: RunResult) -> str:
    """Return the line that `--quiet` prints."""
    return (
        f"{result.status}: {result.steps} steps in {result.seconds:.1f} s, "
        f"val_loss {result.metrics['val_loss']:.3f}, files in {result.dir}"
    )


def print_sample(console: Console, model: CharGPT, seed: int) -> None:
    """Print some Python that the model writes."""
    code = sample(model, PROMPT, length=400, seed=seed)
    # Without the incomplete last line.
    code = indent(code[: code.rfind("\n")], "    ")
    console.print("\n[bold]What the model writes now[/bold]")
    console.print(Syntax("", "python", theme="ansi_dark").highlight(code), soft_wrap=True, end="")


def print_summary(console: Console, result: RunResult, val_losses: list[float]) -> None:
    """Print the outcome of the run, its validation losses and its files."""
    console.print(f"\n[bold]Run {result.run_id}: {result.status}[/bold] ({result.reason})")
    table = Table.grid(padding=(0, 2))
    rate = result.steps / result.seconds
    table.add_row("  steps", f"{result.steps} in {result.seconds:.1f} s, {rate:.1f} steps/s")
    first, last = val_losses[0], val_losses[-1]
    table.add_row("  val_loss", " → ".join(f"{loss:.2f}" for loss in val_losses))
    table.add_row("", f"nats per character, {first - last:.2f} less than before training")
    if result.best is not None:
        table.add_row("  best", f"{result.best.score:.3f} at step {result.best.step}")
    console.print(table)
    if result.dir is not None:
        console.print(f"  files in {result.dir}", soft_wrap=True)
        for path in sorted(path for path in result.dir.rglob("*") if path.is_file()):
            size = path.stat().st_size / 1000
            console.print(f"    {path.relative_to(result.dir)!s:<16} {size:8.1f} kB")


def print_callback_costs(console: Console, result: RunResult) -> None:
    """Print the cost of every callback: "non-blocking" is a measured figure, not a claim."""
    console.print("\n[bold]Cost of every callback[/bold], outside the training thread")
    table = Table("  callback", box=None, padding=(0, 2, 0, 0))
    for column in ("events", "dropped", "CPU", "of run", "held event loop", "lag"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, cost in result.callback_costs.items():
        table.add_row(
            f"  {name}",
            f"{cost.events}",
            f"{cost.dropped}",
            f"{cost.cpu:.3f} s",
            f"{cost.cpu / result.seconds:.2%}",
            f"{cost.held:.3f} s",
            f"{cost.lag:.3f} s",
        )
    console.print(table)
