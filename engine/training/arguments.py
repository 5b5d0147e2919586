"""The arguments of a trainer and of a run: what they mean, and what can be wrong with them before a run starts.

Wrong ones raise `ConfigError` or `TypeError` with the argument, what it got, what is legal and how to fix it.
"""

import contextlib
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from offloop.engine import checks
from offloop.engine.argument_hints import HANDLERS, UNCALLED
from offloop.engine.callback import Callback
from offloop.engine.checkpoint import RemoteRun
from offloop.engine.config import RemoteDirectory, TrainerConfig
from offloop.engine.data.batches import length_of, why_empty
from offloop.engine.data.val_loaders import check_names
from offloop.engine.errors import ConfigError, EmptyLoaderError
from offloop.engine.events import known_events
from offloop.engine.lazy_imports import first_use
from offloop.engine.training.activation_checkpointing import select_modules
from offloop.engine.training.freezing import check_freeze
from offloop.engine.training.optimizer_state import parameters_by_name


def named_optimizers(
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by name; a single one is called `optimizer`."""
    named = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    if not named:
        raise ConfigError("optimizer is an empty mapping: give at least one")
    for name, each in named.items():
        checks.instance("optimizer", each, "model.parameters(), lr=...")
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer, like torch.optim.AdamW(model.parameters(), lr=1e-3), or a "
                f"mapping of names to several; got {type(each).__name__}"
            )
    return named


def resolve_device(name: str | torch.device, *, strategy: str = "none") -> torch.device:
    """Return the device that a name means here: `"auto"` is CUDA, else MPS, else the CPU.

    Of several processes on a machine, each gets the CUDA device of its number there, unless one is named.

    Args:
        name: The knob.
        strategy: Likewise.
    """
    local_rank = os.environ.get("LOCAL_RANK", "")
    if (
        name in ("auto", "cuda")
        and strategy != "none"
        and local_rank.isdecimal()
        and torch.cuda.is_available()
    ):
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f'device={name!r} is none that torch knows: give "auto", "cpu", "cuda", "cuda:1", "mps", ...'
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no MPS device here")
    return device


def check_callbacks(callbacks: Iterable[Callback]) -> Iterable[Callback]:
    """Return the callbacks if they are a collection."""
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of Callbacks, got {type(callbacks).__name__}")
    return callbacks


def check_methods(trainer: object, base: type) -> None:
    """Check the methods of a trainer's subclass.

    A step with an extra argument, as other libraries' trainers pass one, would fail at its first batch. A handler of
    events, or another library's name for a step, would silently never be called.

    Args:
        trainer: The instance.
        base: The class whose own methods are not checked.

    Raises:
        TypeError: A step is an `async def`.
        ConfigError: A step has the wrong arguments, or a method is never called.
    """
    owner = type(trainer).__name__
    for name in ("training_step", "validation_step", "predict_step", "train_epoch", "validate_epoch"):
        method = getattr(trainer, name)
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise TypeError(
                f"{owner}.{name} is an async def; it runs in the training thread, where nothing can be awaited: make "
                "it a plain def"
            )
        argument = "loader" if name.endswith("epoch") else "batch"
        try:
            inspect.signature(method).bind(None)
        except TypeError:
            raise ConfigError(
                f"{owner}.{name} must take (self, {argument}) and nothing else; self.step and self.epoch count; its "
                f"signature is {name}{inspect.signature(method)}"
            ) from None
    handlers = {each.handler_name: each.handler_name for each in known_events()} | HANDLERS
    for name in dir(type(trainer)):
        if hasattr(base, name):
            continue
        if name in handlers:
            raise ConfigError(
                f"{owner}.{name} is never called: a trainer handles no events; subclass Callback and define "
                f"{handlers[name]}"
            )
        if name in UNCALLED:
            raise ConfigError(f"{owner}.{name} is never called: use {UNCALLED[name]}")


def check_val_loader(loader: Any, name: str) -> None:
    """Check one loader, or each of several by name, see `check_loader`."""
    if not isinstance(loader, Mapping) and _is_several(loader):
        raise TypeError(
            f"{name} must be one loader, or several by name, like "
            f'{{"first": loader_1, "second": loader_2}}; got a {type(loader).__name__} of {len(loader)} loaders'
        )
    if not isinstance(loader, Mapping):
        check_loader(loader, name)
        return
    check_names(loader)
    for key, each in loader.items():
        check_loader(each, f"{name}[{key!r}]")


def check_loader(loader: Any, name: str) -> None:
    """Check that a loader gives batches. Asks it for its length only.

    Raises:
        TypeError: It is no loader.
        EmptyLoaderError: It has no batches.
    """
    checks.instance(name, loader)
    if isinstance(loader, torch.Tensor) or hasattr(loader, "__array__"):
        raise TypeError(
            f"{name} must give batches, got a {type(loader).__name__}: DataLoader(TensorDataset(inputs, targets), "
            "batch_size=32) makes them"
        )
    if isinstance(loader, tuple) and loader and all(_is_whole(each) for each in loader):
        raise TypeError(
            f"{name} must give batches, got a tuple of {len(loader)} tensors or arrays: "
            "DataLoader(TensorDataset(inputs, targets), batch_size=32) makes them; if each is a batch, give list(...)"
        )
    if _is_several(loader):
        advice = ": an epoch over several is a train_epoch(self, loader) of your own, with self.batches(...) for each"
        raise TypeError(
            f"{name} must be one loader, got a {type(loader).__name__} of {len(loader)} loaders"
            f"{advice if name == 'train_loader' else ''}"
        )
    # Data sets of Hugging Face's datasets have both.
    if hasattr(loader, "column_names") and hasattr(loader, "__getitem__"):
        raise TypeError(
            f"{name} must give batches, got a data set of single samples: "
            'DataLoader(dataset.with_format("torch"), batch_size=32) makes them'
        )
    if isinstance(loader, str | bytes | Mapping) or not hasattr(loader, "__iter__"):
        is_indexed = hasattr(loader, "__getitem__") and not isinstance(loader, str | bytes | Mapping)
        indexable = " (a Dataset? wrap it in a DataLoader)" if is_indexed else ""
        raise TypeError(f"{name} must be iterable over batches, got {type(loader).__name__}{indexable}")
    if length_of(loader) == 0:
        raise EmptyLoaderError(f"{name} is empty: {why_empty(loader)}")


def _is_several(loader: Any) -> bool:
    """Tell whether this is a collection of loaders. Lists count in a mapping only: they may be lists of batches."""
    if isinstance(loader, Mapping):
        return bool(loader) and all(isinstance(each, DataLoader | list) for each in loader.values())
    return (
        isinstance(loader, list | tuple) and bool(loader) and all(isinstance(x, DataLoader) for x in loader)
    )


def _is_whole(part: Any) -> bool:
    return isinstance(part, torch.Tensor) or hasattr(part, "__array__")


def check_parts(model: object, config: object, loss: object, batch_size: object) -> None:
    """Check the types of what a trainer is made from.

    Raises:
        TypeError, ConfigError: One is not what its name says.
    """
    if config is not None and not isinstance(config, TrainerConfig):
        raise TypeError(f"config must be a TrainerConfig, got {type(config).__name__}")
    checks.instance("model", model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.instance("loss", loss)
    if loss is not None and not callable(loss):
        raise TypeError(
            "loss must be a function of outputs and targets, like torch.nn.functional.cross_entropy, got "
            f"{type(loss).__name__}"
        )
    if batch_size is not None and not callable(batch_size):
        raise ConfigError(
            "batch_size is a function that counts the samples of a batch, like lambda batch: len(batch[0]); got "
            f"{batch_size!r}. The size of batches is the DataLoader's"
        )


def check_model_knobs(model: torch.nn.Module, config: TrainerConfig) -> None:
    """Check the knobs that name parts of the model.

    Raises:
        ConfigError: One names a part that the model does not have.
    """
    check_freeze(model, config.freeze)
    select_modules(model, config.activation_checkpointing)


def check_model(model: torch.nn.Module) -> None:
    """Raise `ConfigError` for a model whose parameters have no values yet."""
    without = [name for name, each in model.named_parameters() if each.is_meta and not is_lazy(each)]
    if without:
        raise ConfigError(
            f"{len(without)} parameters of the model, {without[0]!r} first, are on the device meta and have no values: "
            "make the model outside of torch.device('meta'), or give it values, model.to_empty(device=...) and an "
            "initialization, before the optimizer is made"
        )


def check_optimizers(
    model: torch.nn.Module,
    loss: object,
    optimizers: Mapping[str, torch.optim.Optimizer],
    scheduler: LRScheduler | None,
    config: TrainerConfig,
) -> None:
    """Check that the optimizers belong to the model or the loss, and the scheduler to one of the optimizers.

    Raises:
        ConfigError: One of them belongs to something else.
        TypeError: The scheduler is none of torch's.
    """
    own = {id(parameter) for parameter in parameters_by_name(model, loss).values()}
    for name, optimizer in optimizers.items():
        strange = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
        if strange:
            which = f"optimizer {name!r}" if len(optimizers) > 1 else "the optimizer"
            raise ConfigError(
                f"{which} holds {strange} parameters that are not the model's: was the model copied or moved "
                "after the optimizer was made, or is a part of it missing from `model`? A loss module with parameters "
                "is given as loss="
            )
    if scheduler is not None:
        checks.instance("scheduler", scheduler, "optimizer, ...")
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"scheduler must be one of torch.optim.lr_scheduler, got {type(scheduler).__name__}; by name, with "
                'a warm-up, or several: LearningRateScheduler("cosine") among the callbacks'
            )
        if scheduler.optimizer not in optimizers.values():
            raise ConfigError("the scheduler belongs to another optimizer than the one given")
        if isinstance(scheduler, ReduceLROnPlateau) and config.scheduler_interval == "step":
            raise ConfigError(
                'ReduceLROnPlateau looks at a metric of an epoch: leave scheduler_interval at "epoch"'
            )


def check_resume_lr(lr: object, resume: object, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Raise `ConfigError` for a `resume_lr` that is no learning rate, or that does not apply to this run."""
    if lr is None:
        return
    checks.number("resume_lr", lr, above=0)
    if resume is None or resume == "never":
        raise ConfigError(
            'resume_lr is for a run that is resumed: give resume="auto" too, or make the optimizer so'
        )
    if len(optimizers) > 1:
        raise ConfigError(
            "resume_lr is for one optimizer: with several, run.set_lr_nowait(lr, optimizer=...) in a decider of "
            "TrainStart"
        )


# Schemes of URLs whose packages are loaded. Any thread that makes a trainer adds to it.
_loaded_schemes: set[str] = set()


def remote_run(remote: RemoteDirectory, run_id: str) -> RemoteRun:
    """Return a run's remote directory.

    The first call for a kind of store blocks for its imports: it is made with the trainer. Later calls may come from
    an event loop.

    Raises:
        ConfigError: fsspec or the store's package is missing, or the URL is none of its.
    """
    scheme = remote.url.partition("://")[0]
    try:
        # The store's package is imported when the store is made, so this happens inside the block.
        with contextlib.nullcontext() if scheme in _loaded_schemes else first_use("fsspec"):
            run = RemoteRun(remote.url, run_id, remote.storage_options)
    except (ImportError, ValueError) as error:
        is_missing = isinstance(error, ImportError) and error.name == "fsspec"
        why = "fsspec is missing: pip install 'offloop[remote]'" if is_missing else error
        raise ConfigError(f"remote_dir={remote.url!r} cannot be used: {why}") from error
    _loaded_schemes.add(scheme)
    return run
