"""Argument hints: how other libraries spell our arguments, and errors that name ours.

There are no aliases. `explains_arguments` decorates a function, or a class's `__init__`: a call that does not fit then
raises a one-line error with what to write instead. A call that fits has next to no overhead.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar, cast

from offloop.engine.errors import ConfigError, nearest

__all__ = ["explains_arguments"]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

PEER_SPELLINGS: Final = {
    # how long, and on what
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "num_steps": "max_steps",
    "total_steps": "max_steps",
    "max_iters": "max_steps",
    "max_duration": "max_time",
    "max_minutes": "max_time",
    "train_dataloader": "train_loader",
    "train_dataloaders": "train_loader",
    "train_dataset": "train_loader",
    "dataloader": "train_loader",
    "dataloaders": "train_loader",
    "data": "train_loader",
    "dataset": "train_loader",
    "x": "train_loader",
    "val_dataloader": "val_loader",
    "val_dataloaders": "val_loader",
    "eval_dataset": "val_loader",
    "validation_data": "val_loader",
    "compute_metrics": "metrics",
    "ckpt_path": "resume init_from",
    "resume_from_checkpoint": "resume",
    "init_weights": "init_from",
    "initial_weights": "init_from",
    "load_from": "init_from",
    "pretrained": "init_from",
    # how to train
    "max_grad_norm": "gradient_clip_val",
    "grad_clip": "gradient_clip_val",
    "clip_grad_norm": "gradient_clip_val",
    "gradient_clip": "gradient_clip_val",
    "gradient_clip_norm": "gradient_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "accumulation_steps": "accumulate_grad_batches",
    "grad_accum_steps": "accumulate_grad_batches",
    "check_val_every_n_epoch": "val_every_n_epochs",
    "validation_freq": "val_every_n_epochs",
    "eval_strategy": "val_every_n_epochs",
    "evaluation_strategy": "val_every_n_epochs",
    "val_check_interval": "val_every_n_steps",
    "eval_steps": "val_every_n_steps",
    "eval_on_start": "validate_at_start",
    "overfit_batches": "limit_train_batches",
    "steps_per_epoch": "limit_train_batches",
    "validation_steps": "limit_val_batches",
    "limit_test_batches": "limit_val_batches",
    "accelerator": "device",
    "ddp_find_unused_parameters": "find_unused_parameters",
    "use_distributed_sampler": "rank_batches",
    "split_batches": "rank_batches",
    "ddp_timeout": "rank_timeout",
    "mixed_precision": "precision",
    "amp": "precision",
    "use_amp": "precision",
    "autocast": "precision",
    "dtype": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "torch_compile": "compile",
    "gradient_checkpointing": "activation_checkpointing",
    "use_gradient_checkpointing": "activation_checkpointing",
    "memory_format": "channels_last",
    "allow_tf32": "tf32",
    "float32_matmul_precision": "tf32",
    "frozen": "freeze",
    "freeze_layers": "freeze",
    "loss_fn": "loss",
    "loss_func": "loss",
    "criterion": "loss",
    "lr_scheduler": "scheduler",
    "optim": "optimizer",
    "optimizers": "optimizer",
    "lr": "optimizer",
    "learning_rate": "optimizer",
    "weight_decay": "optimizer",
    "random_state": "seed",
    "random_seed": "seed",
    "default_root_dir": "run_dir",
    "output_dir": "run_dir",
    "args": "config",
    "notes": "note",
    "comment": "note",
    "description": "note",
    "run_tags": "tags",
    "group": "tags",
    "job_type": "tags",
    "hparams": "hyperparameters",
    "hyper_parameters": "hyperparameters",
    "params": "hyperparameters",
    # callbacks
    "dirpath": "save_dir log_dir run_dir file",
    "directory": "save_dir log_dir run_dir",
    "root_dir": "save_dir log_dir run_dir",
    "save_dir": "log_dir run_dir",
    "log_dir": "run_dir",
    "logdir": "log_dir run_dir",
    "filepath": "save_dir file",
    "output": "file",
    "metric": "monitor metrics",
    "metric_for_best_model": "monitor",
    "score_function": "monitor",
    "greater_is_better": "mode",
    "direction": "mode",
    "restore_best_weights": "restore_best",
    "early_stopping_patience": "patience",
    "early_stopping_threshold": "min_delta",
    "baseline": "stopping_threshold",
    "threshold": "factor limit min_delta",
    "every_n_train_steps": "every_n_steps",
    "log_every_n_steps": "every_n_steps",
    "log_freq": "every_n_steps",
    "save_steps": "every_n_steps",
    "logging_steps": "every_n_steps",
    "update_freq": "every_n_steps",
    "histogram_freq": "every_n_steps",
    "save_freq": "every_n_epochs",
    "period": "every_n_epochs",
    "save_strategy": "every_n_epochs",
    "train_time_interval": "every_seconds",
    "interval": "every_seconds",
    "every_n_seconds": "every_seconds",
    "save_total_limit": "keep_last",
    "max_to_keep": "keep_last",
    "n_saved": "save_top_k",
    "ema_decay": "decay",
    "momentum": "decay",
    "swa_epoch_start": "start_epoch",
    "warmup_steps": "warmup",
    "num_warmup_steps": "warmup",
    "tracking_url": "tracking_uri",
    "experiment": "experiment_name project",
    "run_name": "name",
    "offline": "mode",
    "schedule": "scheduler",
    "address": "host",
    "open_browser": "open",
}
"""Other libraries' spelling -> ours, in order: the first one that the call takes is meant."""

ADVICE: Final = {
    "batch_size": "give it to the DataLoader",
    "per_device_train_batch_size": "give batch_size to the DataLoader",
    "shuffle": "give it to the DataLoader",
    "num_workers": "give it to the DataLoader",
    "dataloader_num_workers": "give num_workers to the DataLoader",
    "data_collator": "give collate_fn to the DataLoader",
    "validation_split": "split with torch.utils.data.random_split, and give the second part as val_loader",
    "test_loader": "trainer.evaluate(test_loader) after train() tests the model",
    "datamodule": "give DataLoaders to train(train_loader, val_loader)",
    "verbose": "add ProgressBar() to callbacks to show progress",
    "progress_bar": "add ProgressBar() to callbacks",
    "enable_progress_bar": "add ProgressBar() to callbacks",
    "logger": "add MetricLogger(), TensorBoardLogger(), MLflowLogger() or WandbLogger() to callbacks",
    "report_to": "add TensorBoardLogger(), MLflowLogger() or WandbLogger() to callbacks",
    "log_every_n_steps": "give every_n_steps to the logger among the callbacks: MetricLogger(every_n_steps=...)",
    "logging_steps": "give every_n_steps to the logger among the callbacks: MetricLogger(every_n_steps=...)",
    "enable_checkpointing": "add ModelCheckpoint() to callbacks",
    "save_steps": "add ModelCheckpoint(every_n_steps=...) to callbacks",
    "save_strategy": "add ModelCheckpoint() to callbacks",
    "save_total_limit": "add ModelCheckpoint(keep_last=...) to callbacks",
    "load_best_model_at_end": "add EarlyStopping(restore_best=True) to callbacks",
    "save_weights_only": "a checkpoint contains the whole run, with the weights in model.safetensors",
    "early_stopping_patience": "add EarlyStopping(patience=...) to callbacks",
    "lr_scheduler_type": 'add LearningRateScheduler("cosine") to callbacks',
    "warmup_steps": 'add LearningRateScheduler("cosine", warmup=...) to callbacks',
    "warmup_ratio": 'add LearningRateScheduler("cosine", warmup=...) to callbacks; warmup is a number of steps',
    "num_training_steps": "the length of the run follows from its limits",
    "profiler": "add Profiler() to callbacks",
    "fast_dev_run": "train(..., max_steps=1), with Trainer(limit_val_batches=1), tries everything once",
    "num_sanity_val_steps": "Trainer(validate_at_start=True) validates before the first step",
    "devices": "torchrun --nproc-per-node starts a process for each device; device names one",
    "gpus": "torchrun --nproc-per-node starts a process for each GPU; device names one",
    "num_nodes": "start the script with torchrun --nnodes on each machine",
    "num_processes": "torchrun --nproc-per-node starts a process for each device",
    "on_step": "StepEnd.metrics has the value, and train_name or val_name its mean over the epoch",
    "on_epoch": "StepEnd.metrics has the value, and train_name or val_name its mean over the epoch",
    "prog_bar": "ProgressBar(metrics=[...]) shows it",
    "sync_dist": "logged values are those of all ranks already",
    "replace_sampler_ddp": "use rank_batches; a DistributedSampler stays in charge",
    "process_group_backend": "NCCL on CUDA, gloo on the CPU; a group that you have made is used",
    "detect_anomaly": "call torch.autograd.set_detect_anomaly(True)",
    "benchmark": "set torch.backends.cudnn.benchmark = True",
    "initial_epoch": 'train(..., resume="auto") continues a run',
    "ckpt_path": "load_model(path, into=model) loads weights",
    "dirpath": "files are in the run's directory: Trainer(run_dir=...)",
    "save_dir": "files are in the run's directory: Trainer(run_dir=...)",
    "log_dir": "files are in the run's directory: Trainer(run_dir=...)",
    "run_name": "Trainer(run_name=...) names a run",
    "hyperparameters": "loggers take those of the run: Trainer(hyperparameters=...)",
    "hparams": "loggers take those of the run: Trainer(hyperparameters=...)",
    "name": "Trainer(run_name=...) names a run",
}
"""What to do instead, if the call has no argument with that meaning."""

HANDLERS: Final = {
    "on_train_begin": "on_train_start",
    "on_fit_start": "on_train_start",
    "on_fit_end": "on_train_end",
    "on_exception": "on_train_end",
    "on_epoch_begin": "on_epoch_start",
    "on_train_epoch_start": "on_epoch_start",
    "on_train_epoch_end": "on_epoch_end",
    "on_batch_end": "on_step_end",
    "on_train_batch_end": "on_step_end",
    "on_log": "on_step_end",
    "on_validation_begin": "on_validation_start",
    "on_validation_epoch_start": "on_validation_start",
    "on_validation_epoch_end": "on_validation_end",
    "on_test_begin": "on_validation_start",
    "on_test_end": "on_validation_end",
    "on_evaluate": "on_validation_end",
    "on_save": "on_checkpoint_saved",
    "on_save_checkpoint": "on_checkpoint_saved",
    "on_load_checkpoint": "on_resumed",
    "on_batch_begin": "before_batch, with @in_step above it",
    "on_train_batch_start": "before_batch, with @in_step above it",
    "on_step_begin": "before_batch, with @in_step above it",
    "on_before_backward": "before_backward, with @in_step above it",
    "on_after_backward": "after_backward, with @in_step above it",
    "on_before_optimizer_step": "before_optimizer_step, with @in_step above it",
    "on_pre_optimizer_step": "before_optimizer_step, with @in_step above it",
    "on_before_zero_grad": "after_step, with @in_step above it",
}
"""Other libraries' names of handlers -> ours."""

PRECISIONS: Final = {
    "16": "16-mixed",
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "half": "16-mixed",
    "bf16": "bf16-mixed",
    "bfloat16": "bf16-mixed",
    "32": "32-true",
    "fp32": "32-true",
    "float32": "32-true",
    "no": "32-true",
}
"""Other libraries' spelling of precisions -> ours."""

ATTRIBUTES: Final = {
    "global_rank": "use rank",
    "process_index": "use rank",
    "is_global_zero": "use rank == 0",
    "is_main_process": "use rank == 0",
    "is_world_process_zero": "use rank == 0",
    "num_processes": "use world_size",
    "num_devices": "use world_size",
    # what starts something
    "fit": "use train(train_loader, val_loader, epochs=...)",
    "run": "use train(train_loader, val_loader, epochs=...); last_run is the latest run",
    "fit_async": "use train_async(train_loader, val_loader, epochs=...)",
    "test": 'use evaluate(test_loader, prefix="test_")',
    "validate": "use evaluate(val_loader); in a run, await run.validate()",
    "score": "use evaluate(loader, metrics=[...])",
    "compile": "loss, optimizer and metrics are arguments of Trainer() and train(); Trainer(compile=True) compiles",
    "lr_find": "use find_learning_rate(train_loader)",
    "scale_batch_size": "use find_batch_size(train_loader)",
    "tune": "use find_learning_rate(train_loader) or find_batch_size(train_loader)",
    "train_on_batch": "use train_batch(batch) in a train_epoch of your own",
    # in a step
    "log_dict": "use log(name, value) for each",
    "log_metrics": "use log(name, value) for each",
    "manual_backward": "use backward(loss)",
    "clip_gradients": "use Trainer(gradient_clip_val=...)",
    "zero_grad": "use optimizer_step(), which also zeroes the gradients",
    "toggle_optimizer": "use freeze(...) and unfreeze(...)",
    "untoggle_optimizer": "use freeze(...) and unfreeze(...)",
    "lr_schedulers": "use scheduler",
    "current_epoch": "use epoch",
    "global_step": "use step",
    "trainer": "self is the trainer",
    "terminate": 'use stop("why")',
    # what is known of runs
    "callback_metrics": "use last_run.metrics",
    "logged_metrics": "use last_run.metrics",
    "metrics": "use last_run.metrics",
    "state": "use last_run.state",
    "status": "use last_run.state",
    "history": "the result of train() has it: trainer.train(...).history",
    "best_model_path": "the result of train() has it: trainer.train(...).best.path",
    "checkpoint_callback": "the result of train() has the best checkpoint: trainer.train(...).best.path",
    "max_epochs": "use config.epochs",
    "epochs": "use config.epochs",
    "lr": 'use optimizer.param_groups[0]["lr"]; in a run, await run.set_lr(...)',
    "learning_rate": 'use optimizer.param_groups[0]["lr"]; in a run, await run.set_lr(...)',
    "hparams": "use config.hyperparameters",
    "args": "use config",
    # callbacks, loggers, files
    "callback": "use callbacks",
    "add_callback": "use Trainer(callbacks=[...]) or train(callbacks=[...])",
    "add_event_handler": "use Trainer(callbacks=[...]) or train(callbacks=[...])",
    "on": "use Trainer(callbacks=[...]) or train(callbacks=[...])",
    "logger": "use log(name, value) in a step; loggers are callbacks: train(callbacks=[MetricLogger()])",
    "loggers": "use log(name, value) in a step; loggers are callbacks: train(callbacks=[MetricLogger()])",
    "save_hyperparameters": "use Trainer(hyperparameters={...})",
    "save_checkpoint": "ModelCheckpoint() among the callbacks saves checkpoints; in a run, await run.checkpoint()",
    "save": "ModelCheckpoint() among the callbacks saves checkpoints; export_model(source, file) writes plain weights",
    "save_model": "export_model(source, file) writes weights; torch.save(trainer.model.state_dict(), file), too",
    "save_pretrained": "export_model(source, file) writes weights; torch.save(trainer.model.state_dict(), file), too",
    "push_to_hub": "export_model(source, file) writes weights that other tools read",
    "load": "load_model(source, into=trainer.model) loads weights; train(resume=...) continues a run",
    "load_checkpoint": "load_model(source, into=trainer.model) loads weights; train(resume=...) continues a run",
    "load_from_checkpoint": "load_model(source, into=trainer.model) loads weights; train(resume=...) continues a run",
    "load_weights": "load_model(source, into=trainer.model) loads weights",
    "train_dataloader": "loaders are arguments: train(train_loader, val_loader)",
    "train_loader": "loaders are arguments: train(train_loader, val_loader)",
    "val_dataloaders": "loaders are arguments: train(train_loader, val_loader)",
    "val_loader": "loaders are arguments: train(train_loader, val_loader)",
}
"""Other libraries' names of a trainer's attributes and methods -> what to write instead."""

FIXED: Final = {
    "callbacks": "give them to Trainer(callbacks=[...]), or those of one run to train(callbacks=[...])",
    "optimizer": "give it to Trainer(model, optimizer), together with the model",
}
"""Attributes of a trainer that cannot be set -> what to do instead."""

LIKE: Final = {
    "optimizer": ", like torch.optim.AdamW(model.parameters(), lr=1e-3)",
    "train_loader": ", like DataLoader(TensorDataset(inputs, targets), batch_size=32)",
}
"""An example of a required argument, appended to the error."""

UNCALLED: Final = {
    "compute_loss": "training_step(self, batch), which returns the loss",
    "prediction_step": "predict_step(self, batch)",
    "training_epoch_end": "on_epoch_end of a Callback",
    "validation_epoch_end": "on_validation_end of a Callback",
    "configure_callbacks": "Trainer(callbacks=[...])",
}
"""Methods that subclasses of other libraries' trainers define, and that are never called here."""


def hint(name: str, legal: Iterable[str]) -> str:
    """Return what to write instead of `name`: the legal name that is probably meant, else all legal names."""
    legal = list(legal)
    for meant in PEER_SPELLINGS.get(name, "").split():
        if meant in legal:
            return f"use {meant}"
    if name in ADVICE:
        return ADVICE[name]
    near = nearest(name, legal)
    if near is not None:
        return f"did you mean {near}?"
    return f"legal are {', '.join(legal)}" if legal else "it takes no arguments"


def strategy_hint(strategy: object) -> str:
    """Return what to write instead of another library's strategy, to append to an error; empty if it is none."""
    text = str(strategy).lower()
    if "find_unused" in text:
        return ': use strategy="auto" with find_unused_parameters=True'
    if any(each in text for each in ("fsdp", "deepspeed", "sharded")):
        return ": there are no sharded parameters here, the model must fit on one device"
    if "spawn" in text or "fork" in text or "notebook" in text or text == "dp":
        return ": start the script with torchrun --nproc-per-node"
    if "ddp" in text or "data_parallel" in text:
        return ': "auto" is DDP under torchrun'
    return ""


def unknown_argument(callee: str, name: str, legal: Iterable[str]) -> Exception:
    """Return the error for an argument that a call does not take."""
    return ConfigError(f"{callee}() takes no {name!r}: {hint(name, legal)}")


def explains_arguments(
    unknown: Callable[[str, str, Iterable[str]], Exception] = unknown_argument,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that the error of a call that does not fit shows what to write instead.

    Args:
        unknown: Returns the error for an unknown argument; the default is `unknown_argument`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.iscoroutinefunction(function):

            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                try:
                    return await function(*args, **kwargs)
                except TypeError as error:
                    if _was_entered(error):
                        raise
                    raise _misfit(function, args, kwargs, unknown) or error from None

            return cast(Callable[P, R], functools.wraps(function)(call_async))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if _was_entered(error):
                    raise
                raise _misfit(function, args, kwargs, unknown) or error from None

        return call

    return decorate


def declared_as(declaration: F) -> Callable[[Callable[..., Any]], F]:
    """Decorate a function to have the signature and the docstring of another, in editors and in `help()`.

    The function gets only the arguments of the call, so it knows which defaults were not given.
    """

    def decorate(function: Callable[..., Any]) -> F:
        return cast(F, functools.wraps(declaration, assigned=("__doc__",))(function))

    return decorate


class FixedCallbacks(tuple[Any, ...]):
    """The callbacks of a trainer. To append one raises an error with what to do instead."""

    # Type checkers report these without help.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            advice = f": {FIXED['callbacks']}" if hasattr(list, name) else ""
            raise AttributeError(f"{text}{advice}", name=name, obj=self)


def refused_setter(name: str) -> Callable[[object, object], NoReturn]:
    """Return a setter of a property that says what to do instead of setting it."""

    def refuse(owner: object, value: object) -> NoReturn:
        raise AttributeError(f"{name} of a trainer cannot be set: {FIXED[name]}", name=name, obj=owner)

    return refuse


class AsyncBlock(AbstractAsyncContextManager[R]):
    """An async context manager. To await it, iterate over it or enter it with `with` raises an error with its usage."""

    def __init__(self, block: AbstractAsyncContextManager[R], usage: str) -> None:
        """Wrap `block`; `usage` is the line to write instead."""
        self._block = block
        self._usage = usage

    async def __aenter__(self) -> R:
        return await self._block.__aenter__()

    async def __aexit__(self, *failure: Any) -> bool | None:
        return await self._block.__aexit__(*failure)

    # Type checkers report these without help.
    if not TYPE_CHECKING:

        def _refuse(self, *_: object) -> NoReturn:
            raise TypeError(f"this is a block to enter: {self._usage} ...")

        __await__ = __aiter__ = __enter__ = __exit__ = _refuse

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"there is no {name!r} before the block is entered: {self._usage} ...")


def _was_entered(error: TypeError) -> bool:
    """Return whether the error comes from inside the function, not from its call."""
    return error.__traceback__ is None or error.__traceback__.tb_next is not None


def _misfit(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    unknown: Callable[[str, str, Iterable[str]], Exception],
) -> Exception | None:
    """Return the error for a call of a method that does not fit, None if Python's own is good enough."""
    # Without self
    _, *parameters = inspect.signature(function).parameters.values()
    callee = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    legal = [each.name for each in named]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        for name in kwargs:
            if name not in legal:
                return unknown(callee, name, legal)
    in_place = [each.name for each in named if each.kind is each.POSITIONAL_OR_KEYWORD]
    given = len(args) - 1
    if given > len(in_place) and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        by_name = ", ".join(f"{name}=" for name in legal[len(in_place) :])
        at_most = f"only {', '.join(in_place)}" if in_place else "nothing"
        by_name = f"; by name: {by_name}" if by_name else ""
        return TypeError(f"{callee}() takes {at_most} by position, got {given}{by_name}")
    missing = [
        each.name
        for position, each in enumerate(named)
        if each.default is each.empty
        and each.name not in kwargs
        and not (each.name in in_place and position < given)
    ]
    wanted = " and ".join(f"{name}{LIKE.get(name, '')}" for name in missing)
    return TypeError(f"{callee}() needs {wanted}") if missing else None
