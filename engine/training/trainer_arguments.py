"""The arguments of `Trainer(...)`, written out for editors, type checkers and `help()`.

A test holds the knobs equal to the fields of `TrainerConfig`, in order, type and default.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.callback import Callback
from offloop.engine.config import SWITCH_INTERVAL, Precision, RemoteDirectory, TrainerConfig
from offloop.engine.data.batch_size import BatchSize
from offloop.engine.monitor import Mode

Loss = Callable[[Any, Any], torch.Tensor]


def trainer_arguments(
    self: object,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
    config: TrainerConfig | None = None,
    *,
    loss: Loss | None = None,
    scheduler: LRScheduler | None = None,
    batch_size: BatchSize | None = None,
    callbacks: Sequence[Callback] = (),
    epochs: int | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    device: str | torch.device = "auto",
    precision: Precision = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: Literal["norm", "value"] = "norm",
    on_nonfinite: Literal["raise", "warn", "skip_step"] = "raise",
    val_every_n_epochs: int | None = None,
    val_every_n_steps: int | None = None,
    validate_at_start: bool = False,
    limit_train_batches: int | float | None = None,
    limit_val_batches: int | float | None = None,
    scheduler_interval: Literal["epoch", "step"] = "epoch",
    monitor: str | None = None,
    mode: Mode = "auto",
    seed: int | None = None,
    sampling: Literal["loader", "seeded"] = "loader",
    deterministic: bool = False,
    tf32: bool | None = None,
    compile: bool | dict[str, Any] = False,
    activation_checkpointing: str | type | Sequence[str | type] | None = None,
    freeze: str | Sequence[str] | None = None,
    channels_last: bool = False,
    strategy: Literal["auto", "none", "ddp"] = "auto",
    rank_batches: Literal["split", "whole", "own"] = "split",
    sync_batchnorm: bool = False,
    find_unused_parameters: bool = False,
    rank_timeout: float = 20.0,
    run_dir: str | os.PathLike[str] | None = None,
    run_name: str | None = None,
    tags: Sequence[str] = (),
    note: str = "",
    hyperparameters: Mapping[str, Any] | None = None,
    remote_dir: str | RemoteDirectory | None = None,
    switch_interval: float | None = SWITCH_INTERVAL,
    flush_interval: float = 0.05,
    drain_timeout: float = 30.0,
) -> None:
    """Describe how to train. Nothing is moved to a device, seeded or started before a run.

    Args:
        model: The model, trained in place. It is moved to the device when a run starts.
        optimizer: An optimizer of the model's parameters, or several by name for manual optimization.
        config: The knobs, as one object. Knobs given as keywords take precedence over it.
        loss: A function `loss(outputs, targets)` for batches `(inputs, targets)`.
        scheduler: A torch schedule of the (first) optimizer, stepped after each `scheduler_interval`.
        batch_size: A function that returns the number of samples in a batch, if their shapes do not show it. Called in
            the training thread, before the step.
        callbacks: Callbacks of every run, before those given to `train()`.
        epochs: Default of `train(epochs=...)`: epochs in total, at least 1.
        max_steps: Default of `train(max_steps=...)`: optimizer steps in total, at least 1.
        max_time: Default of `train(max_time=...)`: seconds of training in total, above 0.
        device: `"auto"` (CUDA, else Apple's MPS, else the CPU) or what `torch.device` takes.
        precision: `"32-true"`, `"bf16-mixed"` (autocast) or `"16-mixed"` (autocast with dynamic loss scaling).
        accumulate_grad_batches: Batches per optimizer step, at least 1.
        gradient_clip_val: Clip gradients to this, above 0, before each optimizer step. None does not clip.
        gradient_clip_algorithm: Clip the total `"norm"` or each `"value"`.
        on_nonfinite: What a loss of NaN or infinity does: `"raise"`, `"warn"`, or `"skip_step"`, which skips updates
            with a non-finite loss or gradient. It reads both before each step, and so synchronises a CUDA device.
        val_every_n_epochs: Validate after every n-th epoch, at least 1. None means 1, or never with
            `val_every_n_steps`.
        val_every_n_steps: Validate after every n-th optimizer step, at least 1.
        validate_at_start: Also validate before the first step of a new run, as a baseline that belongs to no epoch.
        limit_train_batches: Batches per epoch: a number (int, at least 1) or a share of the loader's length (float,
            above 0.0, up to 1.0).
        limit_val_batches: Batches per validation, likewise.
        scheduler_interval: Step `scheduler` after each `"epoch"` or each optimizer `"step"`.
        monitor: Key of the metric by which the best moment of a run is chosen. None: that of the first callback that
            names one, else `val_loss`, or `train_loss` without a validation.
        mode: Whether less (`"min"`) or more (`"max"`) of `monitor` is better. `"auto"` takes it from the metric.
        seed: Seed of torch's generators, from `-2**63` to `2**64 - 1`, set once before `TrainStart`. None touches no
            generator.
        sampling: `"loader"`: the data set draws from the generators of the process that loads it. `"seeded"`: what a
            sample draws from the global generators of torch, Python and NumPy is derived from `seed`, the epoch and
            the position in the epoch, so random augmentation in loader workers is exact after a resume. Costs about
            20 us per sample.
        deterministic: Use torch's deterministic algorithms during the run. Process-wide.
        tf32: Allow (True) or forbid (False) TensorFloat-32 for float32 matrix products and convolutions on CUDA during
            the run. None keeps torch's settings. Process-wide.
        compile: Compile the model, in the training thread. A mapping is passed to `torch.compile`.
        activation_checkpointing: Modules whose activations are recomputed in the backward pass instead of stored:
            `"auto"` (repeated blocks), or names (`"encoder.layer.*"`) and classes of modules. Same bits, less memory,
            more time.
        freeze: Parameters that do not train during the run: names of modules or parameters, with `*` for any text.
            Neither weight decay nor momentum moves them; normalization layers among them keep their running
            statistics.
        channels_last: Store images and convolution weights with the channels innermost, which suits tensor cores.
        strategy: How several processes train together, where `torchrun` or the host application has started them:
            `"ddp"` (torch's `DistributedDataParallel`), `"none"` (each trains alone), or `"auto"`: `"ddp"` with more
            than one process.
        rank_batches: What a process takes of the training batches: `"split"`, its share of each batch, so that a step
            means the same on any number of processes; `"whole"`, whole batches in turn; `"own"`, what its own loader
            gives.
        sync_batchnorm: Batch normalization over the samples of all processes (`SyncBatchNorm`). CUDA only.
        find_unused_parameters: Let steps use some of the parameters only, at the cost of a search in each step; as of
            `DistributedDataParallel`.
        rank_timeout: Seconds, above 0, after which a process that gives no sign of life, or that the others wait for,
            has failed.
        run_dir: Directory of all runs; each run uses `run_dir/<run_id>/`. None: `runs`, only if a callback writes.
        run_name: The run's id, at most 200 bytes without slashes and invisible characters. None: time and random
            letters.
        tags: Words by which lists of runs can be filtered, at most 50 of 1 to 100 characters. Like the note they are
            labels of each new run, which the live page, `offloop label` and `edit_labels` change later.
        note: A text about each new run, at most 16,384 characters.
        hyperparameters: Your own facts about the run, by name: numbers, strings, booleans, None, lists and mappings of
            them. They appear in `run.hyperparameters`, `run.json`,
            `TrainStart.hyperparameters` and tracking loggers, as they are: give no secrets.
        remote_dir: URL to which runs are copied and from which they are resumed: `s3://bucket/runs`. Needs fsspec.
        switch_interval: Python's thread switch interval during the run, in seconds, above 0. At Python's own 5 ms
            training nearly stops while a callback computes. None keeps it; so does a process that has set its own.
            Process-wide.
        flush_interval: Seconds between deliveries of events to the event loop, above 0.
        drain_timeout: Seconds, above 0, that callbacks have for the remaining events after training, and again for
            `TrainEnd`.

    Raises:
        ConfigError: A knob is unknown (the text names the nearest) or out of range, or the optimizer has parameters
            that belong neither to the model nor to the loss.
        TypeError: Model, optimizer, loss or scheduler has the wrong type.
    """
