"""State: everything that a resumed run needs, taken at a step boundary and put back before the first event.

    model, optimizers, schedulers, loss scaler      tensors and plain values, as torch gives them
    position, means, metric accumulators            where the run stands, and what the epoch has summed up
    loader, random                                  the order of the epoch, and every generator
    callbacks                                       what deciders and step hooks remember

Random states are put back last, after the loader has begun its epoch: beginning it draws from them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from offloop.engine.callback import Handlers
from offloop.engine.data import length_of
from offloop.engine.errors import ConfigError
from offloop.engine.events import Resumed
from offloop.engine.exactness import Doubt
from offloop.engine.loader_position import begin_epoch, capture_in_epoch, continue_epoch
from offloop.engine.random_state import capture_random_state, restore_random_state
from offloop.engine.resume_report import ResumeReport

if TYPE_CHECKING:
    from offloop.engine.loop import TrainingLoop

COUNTERS = (
    "epoch",
    "step",
    "batch",
    "epoch_batches",
    "epoch_samples",
    "epoch_first_step",
    "validated_step",
    "last_lr",
)


def capture(loop: "TrainingLoop", handlers: Sequence[Handlers]) -> dict[str, Any]:
    """Return the state of a run as of this boundary. Training thread; tensors are live, not copied."""
    state: dict[str, Any] = {
        "model": dict(loop.program.model.state_dict()),
        "optimizers": {name: each.state_dict() for name, each in loop.optimizers.items()},
        "schedulers": [each.scheduler.state_dict() for each in loop.schedules],
        "position": {name: getattr(loop, name) for name in COUNTERS},
        "phase": loop.phase,
        "taken": loop.reporter.clock_offset + time.perf_counter(),
        "seconds": loop.seconds(),
        "means": loop.reporter.train_means.state_dict(),
        "epoch_metrics": dict(loop.epoch_metrics),
        "latest": dict(loop.latest),
        "loss_scale": loop.reporter.loss_scale,
        "frozen": loop.frozen.names,
        "random": capture_random_state(),
        "environment": environment(loop),
        "callbacks": {each.name: dict(each.callback.state_dict()) for each in handlers if each.has_state},
    }
    if loop.mixed.scaler is not None:
        state["scaler"] = loop.mixed.scaler.state_dict()
    if loop.train_metrics:
        state["metrics"] = loop.train_metrics.state_dict()
    state["loader"] = {"before": loop.before_epoch, "now": capture_in_epoch(loop.loader_in_use)}
    return state


def restore(loop: "TrainingLoop", state: Mapping[str, Any], report: ResumeReport) -> None:
    """Put a state back, all but callbacks, loader and random states. Training thread, before the first event.

    Args:
        loop: Of the run that goes on.
        state: What `capture` returned, from disk.
        report: Is told what could not be put back exactly.

    Raises:
        RuntimeError, ValueError: The state is of another model or optimizer; torch's text says what differs.
    """
    loop.program.model.load_state_dict(state["model"])
    for name, optimizer in loop.optimizers.items():
        load_optimizer(optimizer, state["optimizers"][name])
        # torch's own mark; without it, a schedule that steps before this process has stepped the optimizer warns
        optimizer._opt_called = bool(state["position"]["step"])  # type: ignore[attr-defined]
    for schedule, saved in zip(loop.schedules, state["schedulers"], strict=False):
        schedule.scheduler.load_state_dict(saved)
    if loop.mixed.scaler is not None and "scaler" in state:
        loop.mixed.scaler.load_state_dict(state["scaler"])
    for name in COUNTERS:
        setattr(loop, name, state["position"][name])
    loop.phase = state["phase"]
    if loop.phase == "after_epoch":
        loop.epoch += 1
        loop.phase = "before_epoch"
    loop.seconds_before = state["seconds"]
    loop.reporter.train_means.load_state_dict(state["means"])
    loop.reporter.loss_scale = state["loss_scale"]
    loop.frozen.thaw_all()  # what the run had frozen at its checkpoint, not what it began with
    loop.frozen.freeze(state["frozen"])
    loop.epoch_metrics = dict(state["epoch_metrics"])
    loop.latest = dict(state["latest"])
    if loop.train_metrics and "metrics" in state:
        loop.train_metrics.load_state_dict(state["metrics"])
    here = environment(loop)
    for name, saved in state["environment"].items():
        if here.get(name) != saved:
            report.lower("approximate", f"{name} was {saved}, now it is {here.get(name)}")


def environment(loop: "TrainingLoop") -> dict[str, Any]:
    """Return what decides about bits beside the state: if it differs, a resumed run is not bitwise."""
    device = loop.device
    return {
        "torch": str(torch.__version__),  # a str subclass, which a checkpoint would refuse
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "optimizer": ", ".join(type(each).__name__ for each in loop.optimizers.values()),
        **describe_loader(loop.train_loader),
        "limit_train_batches": loop.config.limit_train_batches,
        "accumulate_grad_batches": loop.config.accumulate_grad_batches,
        "gradient_clip_val": loop.config.gradient_clip_val,
        "gradient_clip_algorithm": loop.config.gradient_clip_algorithm,
        "precision": loop.config.precision,
        "tf32": loop.config.tf32,
        "channels_last": loop.config.channels_last,
        "sampling": loop.config.sampling,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def describe_loader(loader: Iterable[Any]) -> dict[str, int | None]:
    """Return what tells a loader from another, in whose order a run cannot go on; None for what is not known."""
    batch_size = getattr(loader, "batch_size", None)
    return {
        "samples": length_of(getattr(loader, "dataset", None)),
        "batches": length_of(loader),
        "batch_size": batch_size if isinstance(batch_size, int) else None,
    }


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's state with its exact dtypes: torch casts it to those of the parameters.

    Raises:
        ConfigError: It is the state of another kind of optimizer, which torch takes, to fail in the first step.
        ValueError: The groups have other numbers of parameters.
    """
    defaults = getattr(optimizer, "defaults", {})  # a wrapper may have none
    settings = [set(defaults) & set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    missing = {
        name
        for known, group in zip(settings, optimizer.param_groups, strict=True)
        for name in known - set(group)
    }
    if missing:
        raise ConfigError(
            f"the state is of another optimizer: {type(optimizer).__name__} needs {', '.join(sorted(missing))}. "
            "Make the optimizer that it was saved with, or begin a new run with the weights alone: init_from=..."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        live = optimizer.state[parameters[int(index)]]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device).clone()


class Continuation:
    """A loaded checkpoint on its way back into a run: what is left to do after `restore`."""

    def __init__(self, state: Mapping[str, Any], report: ResumeReport) -> None:
        """Keep what the loop needs when it comes to its schedules and its loader.

        Args:
            state: What `capture` returned, from disk.
            report: On the checkpoint, with what `restore` has put into it.
        """
        self.path = report.checkpoint
        self.report = report
        self.taken: float = state["taken"]
        self._state = state
        self.before_epoch: dict[str, Any] | None = state["loader"]["before"]  # None: no loader was asked yet
        self._now: Mapping[str, Any] = state["loader"]["now"]

    def restore_schedule(self, loop: "TrainingLoop") -> None:
        """Put back the state of the schedule attached last, and the rates that making it has changed."""
        index = len(loop.schedules) - 1
        saved = self._state["schedulers"]
        if index < len(saved):
            loop.schedules[index].scheduler.load_state_dict(saved[index])
        else:
            self.report.lower("approximate", f"schedule {index} is new")
        for name, optimizer in loop.optimizers.items():
            groups = self._state["optimizers"][name]["param_groups"]
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: value for key, value in kept.items() if key != "params"})

    def begin_epoch(self, loader: Iterable[Any]) -> list[Doubt]:
        """Put back what the loader's next epoch begins with; returns what is not known to be exact."""
        return begin_epoch(loader, self._now)

    def continue_epoch(self, loader: Iterable[Any], done: int) -> tuple[Iterator[Any], list[Doubt]]:
        """Return an iterator over the rest of the epoch, and what is not known to be exact about it."""
        assert self.before_epoch is not None
        return continue_epoch(loader, done, self.before_epoch, self._now)

    def finish(self, doubts: Iterable[Doubt], position: dict[str, Any]) -> Resumed:
        """Put the random states back and return what to say. The last thing before training goes on.

        Args:
            doubts: About the loaders.
            position: Of the event.
        """
        for doubt in doubts:
            self.report.lower(*doubt)
        for missed in restore_random_state(self._state["random"]):
            self.report.lower("approximate", missed)
        return self.report.event(position)
