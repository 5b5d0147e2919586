"""What does a step cost in other trainers, and in offloop, with a log of every step and a progress bar?

Each contender trains the tiny MLP in a process of its own, drawing its bar on a pseudo-terminal that somebody
reads, and writing step, loss and learning rate of every step to a file (offloop: every event, and every step
once more as CSV). The same process trains by hand before and after it, reading the loss of each step; the ratio
is the contender's time per step over the mean of both. Each round goes through all contenders in another order.
"hand-written" as a contender is the A/A row.

Time per step is taken in the loader, from the 100th batch until the last one is asked for; "start and end" is
all the rest of the call that trains. A contender that cannot run is a row that says so.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt . -r benchmarks/requirements-peers.txt
    .venv-peers/bin/python benchmarks/peers.py [--quick] [--rounds 5] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measure import (
    TINY,
    Batch,
    HandWritten,
    Report,
    TimedLoader,
    clock,
    loss_of,
    median_of,
    optimizer_of,
    parse,
    shuffled,
    verdict,
)

WARM_UP = 100
STEPS = 1000
TIMEOUT = 300  # seconds for one process


class StepLog:
    """A log as one would write it by hand: a line for each step."""

    def __init__(self, directory: Path) -> None:
        self.file = open(directory / "steps.csv", "w")

    def write(self, step: int, loss: float, lr: float) -> None:
        """Write a line."""
        self.file.write(f"{step},{loss},{lr}\n")


# The contenders: each trains on the loader, once. Their packages are untyped or not installed, hence Any.


def hand_written(loader: TimedLoader, directory: Path) -> None:
    """Train by hand, without log and bar: the measure of all others."""
    HandWritten(TINY).train(iter(loader))


def by_offloop(loader: TimedLoader, directory: Path) -> None:
    """Train with offloop."""
    from offloop.callbacks.metric_logger import MetricLogger
    from offloop.callbacks.progress_bar import ProgressBar
    from offloop.engine import Trainer

    model = TINY.model()
    trainer = Trainer(model, optimizer_of(model), loss=loss_of, device="cpu", run_dir=str(directory))
    trainer.train(loader, epochs=1, callbacks=[MetricLogger(every_n_steps=1), ProgressBar()])


def by_ignite(loader: TimedLoader, directory: Path) -> None:
    """Train with Ignite."""
    engine: Any = __import__("ignite.engine", fromlist=["engine"])
    handlers: Any = __import__("ignite.handlers", fromlist=["handlers"])
    model = TINY.model()
    optimizer = optimizer_of(model)
    trainer = engine.create_supervised_trainer(model, optimizer, loss_of, device="cpu")
    log = StepLog(directory)

    @trainer.on(engine.Events.ITERATION_COMPLETED)  # type: ignore[untyped-decorator]
    def write(each: Any) -> None:
        log.write(each.state.iteration, each.state.output, optimizer.param_groups[0]["lr"])

    handlers.ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    trainer.run(loader, max_epochs=1)


def by_accelerate(loader: TimedLoader, directory: Path) -> None:
    """Train with Accelerate: a loop by hand, with its wrappers, its `log` and tqdm."""
    accelerate: Any = __import__("accelerate")
    tracking: Any = __import__("accelerate.tracking", fromlist=["tracking"])
    tqdm: Any = __import__("tqdm")

    class Tracker(tracking.GeneralTracker):  # type: ignore[misc]
        name = "step_log"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()
            self.step_log = StepLog(directory)

        @property
        def tracker(self) -> Any:
            return self.step_log

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: Any, step: int | None = None, **_: Any) -> None:
            self.step_log.write(step or 0, values["loss"], values["lr"])

    accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("benchmark")
    plain = TINY.model()
    model, optimizer = accelerator.prepare(plain, optimizer_of(plain))
    bar = tqdm.tqdm(loader)
    for step, (inputs, targets) in enumerate(bar):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        value = loss.item()
        accelerator.log({"loss": value, "lr": optimizer.param_groups[0]["lr"]}, step=step)
        bar.set_postfix(loss=value, refresh=False)
    accelerator.end_training()


def by_lightning(loader: TimedLoader, directory: Path) -> None:
    """Train with Lightning."""
    lightning: Any = __import__("lightning")
    loggers: Any = __import__("lightning.pytorch.loggers", fromlist=["loggers"])

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = TINY.model()

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            inputs, targets = batch
            loss: torch.Tensor = loss_of(self.model(inputs), targets)
            self.log("loss", loss, prog_bar=True)
            self.log("lr", self.optimizers().param_groups[0]["lr"])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=loggers.CSVLogger(str(directory)),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)


def by_transformers(loader: TimedLoader, directory: Path) -> None:
    """Train with the Transformers trainer."""
    transformers: Any = __import__("transformers")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TINY.model()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = self.model(inputs)
            return {"loss": loss_of(outputs, labels), "logits": outputs}

    class NamedLoader:
        batch_size = TINY.batch_size

        def __len__(self) -> int:
            return len(loader)

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for inputs, targets in loader:
                yield {"inputs": inputs, "labels": targets}

    log = StepLog(directory)

    class Log(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, arguments: Any, state: Any, mailbox: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                log.write(state.global_step, logs["loss"], logs["learning_rate"])

    class OwnTrainer(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> NamedLoader:
            return NamedLoader()

    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=len(loader),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer = OwnTrainer(
        model=model,
        args=arguments,
        train_dataset=[0] * len(loader),
        optimizers=(optimizer_of(model), None),
        callbacks=[Log()],
    )
    trainer.train()


def by_skorch(loader: TimedLoader, directory: Path) -> None:
    """Train with skorch."""
    skorch: Any = __import__("skorch")
    callbacks: Any = __import__("skorch.callbacks", fromlist=["callbacks"])
    log = StepLog(directory)

    class Log(callbacks.Callback):  # type: ignore[misc]
        def on_batch_end(self, net: Any, **_: Any) -> None:
            batch = net.history[-1, "batches", -1]
            log.write(len(net.history[-1, "batches"]), batch["train_loss"], 1e-3)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TINY.model()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.model(inputs)
            return outputs

    net = skorch.NeuralNet(
        Model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=1e-3,
        max_epochs=1,
        train_split=None,
        iterator_train=lambda dataset, **_: loader,
        callbacks=[Log(), callbacks.ProgressBar()],
        device="cpu",
    )
    net.fit(torch.zeros(len(loader), TINY.features), torch.zeros(len(loader), dtype=torch.int64))


def by_keras(loader: TimedLoader, directory: Path) -> None:
    """Train with Keras on torch."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras: Any = __import__("keras")
    log = StepLog(directory)

    class Log(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            log.write(batch, float(logs["loss"]), 1e-3)

    widths = [TINY.width] * TINY.layers
    model = keras.Sequential(
        [
            keras.Input((TINY.features,)),
            *(keras.layers.Dense(width, activation="relu") for width in widths),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(1e-3), loss=loss)
    model.fit(iter(loader), steps_per_epoch=len(loader), epochs=1, callbacks=[Log()], verbose=1)


CONTENDERS: dict[str, tuple[Callable[[TimedLoader, Path], None], str]] = {
    "hand-written": (hand_written, "torch"),
    "offloop": (by_offloop, "msgspec"),
    "Ignite": (by_ignite, "pytorch-ignite"),
    "Accelerate": (by_accelerate, "accelerate"),
    "Lightning": (by_lightning, "lightning"),
    "Transformers": (by_transformers, "transformers"),
    "skorch": (by_skorch, "skorch"),
    "Keras on torch": (by_keras, "keras"),
}


# One process: one contender, once


def be_contender(name: str, steps: int, result: Path) -> None:
    """Train by hand, with the contender, and by hand again; write the figures to `result`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    times: list[float] = []
    rest = 0.0
    for each in ("hand-written", name, "hand-written"):
        loader = TimedLoader(TINY, steps, WARM_UP)
        with tempfile.TemporaryDirectory() as directory:
            started = clock()
            CONTENDERS[each][0](loader, Path(directory))
            seconds = clock() - started
        torch.set_num_threads(1)  # some trainers set it
        times.append(loader.per_step)
        if each == name:
            rest = seconds - loader.per_step * loader.steps
    by_hand = (times[0] + times[2]) / 2
    figures = {"ratio": times[1] / by_hand, "us": times[1] * 1e6, "by_hand": by_hand * 1e6, "rest": rest}
    result.write_text(json.dumps(figures))


def measure(name: str, steps: int) -> dict[str, float] | str:
    """Run a contender in a process of its own; returns its figures, or why there are none."""
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal is gone with the process
            while data := os.read(master, 65536):
                shown.append(data)

    reader = threading.Thread(target=read, daemon=True)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [
            sys.executable,
            __file__,
            "--contender",
            name,
            "--steps",
            str(steps),
            "--result",
            str(result),
        ]
        quiet = {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        reader.start()
        try:
            process = subprocess.run(
                command,
                stdout=slave,
                stderr=slave,
                cwd=directory,
                env=os.environ | quiet,
                timeout=TIMEOUT,
                check=False,
            )
            code: int | str = process.returncode
        except subprocess.TimeoutExpired:
            code = f"it took longer than {TIMEOUT} s"
        finally:
            os.close(slave)
        reader.join(5)
        os.close(master)
        if result.exists():
            figures: dict[str, float] = json.loads(result.read_text())
            return figures
    lines = b"".join(shown).decode(errors="replace").strip().splitlines()
    return f"failed ({code}): {lines[-1][:120] if lines else 'said nothing'}"


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps of each training")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    """Measure and print; or be a contender."""
    arguments = parse(__doc__, add_arguments)
    if arguments.contender is not None:
        be_contender(arguments.contender, arguments.steps, arguments.result)
        return
    rounds = 1 if arguments.quick else arguments.rounds
    report = Report(
        f"Tiny MLP with a step log and a bar, against a hand-written loop: {rounds} x {arguments.steps} steps",
        ["trainer", "version", "ratio (95 %)", "us a step", "by hand, us", "start and end, s", "goal"],
    )
    there = [name for name, (_, package) in CONTENDERS.items() if version_of(package) is not None]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    failed: dict[str, str] = {name: "not installed here" for name in CONTENDERS if name not in there}
    with report.measuring():
        for order in shuffled(there, rounds):
            for name in order:
                if name in failed:
                    continue
                figures = measure(name, arguments.steps)
                if isinstance(figures, str):
                    failed[name] = figures
                else:
                    found[name].append(figures)
                print(f"{name}: {figures}", file=sys.stderr)
    a_a = median_of([each["ratio"] for each in found["hand-written"]])
    for name, (_, package) in CONTENDERS.items():
        version = (
            "-" if name == "hand-written" else version_of("offloop" if name == "offloop" else package) or "-"
        )
        if name in failed:
            report.row(name, version, failed[name], "-", "-", "-", "-")
            continue
        each_of = {key: [each[key] for each in found[name]] for key in ("ratio", "us", "by_hand", "rest")}
        ratio = median_of(each_of["ratio"])
        goal = verdict(ratio, 1.05, a_a) if name == "offloop" else "-"
        shown = (f"{median_of(each_of[key]).median:.0f}" for key in ("us", "by_hand"))
        label = "hand-written (A/A)" if name == "hand-written" else name
        report.row(label, version, ratio, *shown, f"{median_of(each_of['rest']).median:.2f}", goal)
        report.figure(name, found[name])
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
