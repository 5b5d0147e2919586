"""The state of a run: captured at a step boundary, restored before the first event of a resumed run.

    model, optimizers, schedulers, scaler       tensors and plain values, as in torch's state dicts
    parameters, made                            names of the optimizers' parameters; the script's settings at the start
    position, means, metrics                    progress of the run, sums of the epoch
    loader, random                              position in the data, states of the global generators
    callbacks                                   state of deciders and step hooks
    trainer, loss, buffers, unsaved             state of the user's code; see `user_state.py`

Random states are restored last, because starting the loader's epoch draws from the generators.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from offloop.engine.callback import Handlers
from offloop.engine.data.batches import length_of
from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.errors import ConfigError
from offloop.engine.metrics.merging import merged
from offloop.engine.position.exactness import Doubt, ResumeReport
from offloop.engine.recovery.rank_states import doubts_about_environment
from offloop.engine.recovery.saved_state import check_kinds, check_optimizer, check_schedule, restoring
from offloop.engine.training.averages import MEASURED, captured, measured_key
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.model_modes import capture_modes, restore_modes
from offloop.engine.training.optimizer_state import (
    WEIGHTS_ALONE,
    parameter_names,
    parameters_by_name,
    restore_optimizer,
)
from offloop.engine.training.progress import ResumePoint
from offloop.engine.training.schedule_state import follow_length, restore_schedule
from offloop.engine.training.wrappers import names_in
from offloop.engine.weights.loading import load_weights


def capture(loop: TrainingLoop, handlers: Sequence[Handlers], monitor: str) -> dict[str, Any]:
    """Return the state of a run at this boundary. Training thread only; tensors are live, not copied.

    Args:
        loop: The loop of the run.
        handlers: Those of the run's callbacks.
        monitor: Key of the metric that decides the run's best.
    """
    progress, optimizers, schedules = loop.progress, loop.setup.optimizers, loop.schedules.all
    named = parameters_by_name(loop.program.model, loop.program.loss)
    state: dict[str, Any] = {
        "model": dict(loop.program.model.state_dict()),
        **captured([each.callback for each in handlers], loop.program.model),
        MEASURED: measured_key([each.callback for each in handlers], monitor),
        "optimizers": {name: each.state_dict() for name, each in optimizers.items()},
        "parameters": {name: parameter_names(each, named) for name, each in optimizers.items()},
        "schedulers": [each.scheduler.state_dict() for each in schedules],
        "made": {"optimizers": loop.made_options, "schedulers": [each.made for each in schedules]},
        **progress.state_dict(),
        "taken": loop.reporter.now(),
        "seconds": loop.seconds(),
        "means": loop.reporter.train_means.state_dict(),
        "loss_scale": loop.reporter.loss_scale,
        "frozen": loop.frozen.names,
        "modes": capture_modes(loop.program.model),
        "random": capture_random_state(),
        "environment": environment(loop),
        "callbacks": capture_callbacks(handlers),
    }
    if loop.mixed.scaler is not None:
        state["scaler"] = loop.mixed.scaler.state_dict()
    if loop.train_metrics:
        state["metrics"] = loop.train_metrics.state_dict()
    if loop.resumed is not None:
        # Loaders and random generators are not restored yet: the new checkpoint gets the state of the old one
        state |= {"random": loop.resumed.random, "loader": loop.resumed.loaders}
    else:
        state["loader"] = loop.source.position.capture(
            in_epoch=progress.phase == "in_epoch", batches=progress.epoch_batches
        )
    if loop.at_limit and progress.ending != "stopped":
        before = dict(loop.at_limit)
        state["position"]["validated_step"] = before.pop("validated_step")
        state["callbacks"] |= before.pop("callbacks", {})
        state |= before
    return state


def capture_callbacks(handlers: Sequence[Handlers], *, steering: bool = False) -> dict[str, Any]:
    """Return the states of deciders and step hooks by the name of their callback.

    Args:
        handlers: Those of the run's callbacks.
        steering: True: only of callbacks that may change the training, in copied containers.
    """
    return {
        each.name: _copied(each.callback.state_dict()) if steering else dict(each.callback.state_dict())
        for each in handlers
        if each.has_state and (each.callback.steers or not steering)
    }


def _copied(value: Any) -> Any:
    """Return a value with copies of its containers; tensors are shared."""
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def environment(loop: TrainingLoop) -> dict[str, Any]:
    """Return the settings that a bitwise resume needs to be the same."""
    setup = loop.setup
    device, config = setup.device, setup.config
    return {
        # A subclass of str, which a checkpoint would refuse
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "optimizer": ", ".join(type(each).__name__ for each in setup.optimizers.values()),
        **describe_loader(setup.train_loader),
        "limit_train_batches": config.limit_train_batches,
        "accumulate_grad_batches": config.accumulate_grad_batches,
        "gradient_clip_val": config.gradient_clip_val,
        "gradient_clip_algorithm": config.gradient_clip_algorithm,
        "precision": config.precision,
        "tf32": config.tf32,
        "channels_last": config.channels_last,
        "sampling": config.sampling,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ranks": loop.strategy.world_size,
        "strategy": loop.strategy.name,
        "rank_batches": config.rank_batches,
    }


def describe_loader(loader: Iterable[Any]) -> dict[str, int | None]:
    """Return the sizes of a loader that decide its order; None for those unknown."""
    batch_size = getattr(loader, "batch_size", None)
    return {
        "samples": length_of(getattr(loader, "dataset", None)),
        "batches": length_of(loader),
        "batch_size": batch_size if isinstance(batch_size, int) else None,
    }


class Continuation:
    """Restores a loaded checkpoint into a run. Training thread only."""

    def __init__(
        self,
        state: Mapping[str, Any],
        report: ResumeReport,
        attempt: int,
        metrics: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Prepare to restore a state.

        Args:
            state: From `capture`, loaded from the checkpoint.
            report: Collects how exact the resume is.
            attempt: Number of the attempt that took the checkpoint.
            metrics: States of the training metrics, of all ranks that saved them; see `RankState`.
        """
        self._metrics_of_ranks = metrics
        self.attempt = attempt
        self.path = report.checkpoint
        self.report = report
        self.taken: float = state["taken"]
        self.state = state
        # Schedules whose length has changed
        self._adjusted: list[LRScheduler] = []

    @property
    def point(self) -> ResumePoint:
        """The part that the loop restores itself."""
        return ResumePoint(self.path, self.attempt, self.taken, self.state["loader"], self.state["random"])

    def restore(self, loop: TrainingLoop, handlers: Sequence[Handlers]) -> None:
        """Restore the state, except loaders and random generators. Call before the first event.

        Raises:
            WeightsMismatchError: The checkpoint is of a different model.
            ConfigError: The checkpoint is of different optimizers.
        """
        state = self.state
        with restoring(self.path, "model"):
            load_weights(loop.program.model, state["model"], self.path)
        self._restore_optimizers(loop)
        for index, schedule in enumerate(loop.schedules.all[: len(state["schedulers"])]):
            self._load_schedule(schedule, index)
        for scheduler in self._adjusted:
            follow_length(scheduler)
        if loop.mixed.scaler is not None and "scaler" in state:
            with restoring(self.path, "scaler"):
                check_kinds(state["scaler"], loop.mixed.scaler.state_dict())
                loop.mixed.scaler.load_state_dict(state["scaler"])
        loop.progress.load_state_dict(state)
        loop.progress.earlier_seconds = state["seconds"]
        loop.reporter.train_means.load_state_dict(state["means"])
        loop.reporter.loss_scale = state["loss_scale"]
        # Frozen is what was frozen at the checkpoint, not at the start of the run
        loop.frozen.thaw_all()
        own = [name for name, _ in loop.program.model.named_parameters()]
        loop.frozen.freeze(names_in(own, state["frozen"]).values())
        if "modes" in state:
            with restoring(self.path, "modes"):
                restore_modes(loop.program.model, state["modes"], self.report)
        self._restore_metrics(loop)
        self._restore_callbacks(handlers)
        for doubt in doubts_about_environment(state["environment"], environment(loop)):
            self.report.lower(*doubt)

    def _restore_optimizers(self, loop: TrainingLoop) -> None:
        state, optimizers = self.state, loop.setup.optimizers
        made = state.get("made", {}).get("optimizers", {})
        if state["optimizers"].keys() != optimizers.keys():
            raise ConfigError(
                f"the checkpoint has the optimizers {', '.join(state['optimizers'])}, the script has "
                f"{', '.join(optimizers)}: give them the same names; or {WEIGHTS_ALONE}"
            )
        named = parameters_by_name(loop.program.model, loop.program.loss)
        for name, optimizer in optimizers.items():
            with restoring(self.path, f"optimizers.{name}"):
                check_optimizer(state["optimizers"][name], optimizer)
                restore_optimizer(
                    optimizer,
                    state["optimizers"][name],
                    label="the optimizer" if len(optimizers) == 1 else f"optimizer {name!r}",
                    names=state.get("parameters", {}).get(name),
                    made=made.get(name),
                    named=named,
                    report=self.report,
                )

    def _restore_metrics(self, loop: TrainingLoop) -> None:
        """Restore the metrics of the epoch in progress; new metrics start here."""
        saved, metrics, of_ranks = self.state.get("metrics"), loop.train_metrics, self._metrics_of_ranks
        if of_ranks == []:
            # Rank 0 has those of all ranks
            return
        if of_ranks is not None and len(of_ranks) > 1 and metrics is not None:
            with restoring(self.path, "metrics"):
                # Other metrics cannot be merged, so all of them start here
                is_same = all(each["metrics"] == metrics.state_dict()["metrics"] for each in of_ranks)
                saved = merged(metrics, of_ranks).state_dict() if is_same else None
        with restoring(self.path, "metrics"):
            names = [] if saved is None else [each.partition(":")[0] for each in saved["metrics"]]
        own = [] if metrics is None else list(metrics.names)
        for name in names:
            if name not in own:
                self.report.take(f"metric {name} is no longer computed")
        new = [name for name in own if name not in names]
        if metrics is not None and saved is not None:
            with restoring(self.path, "metrics"):
                new = metrics.load_state_dict(saved)
        for name in new:
            self.report.take(f"metric {name} is new")
            if loop.progress.phase == "in_epoch":
                self.report.lower("approximate", f"metric {name} lacks the first batches of this epoch")

    def _restore_callbacks(self, handlers: Sequence[Handlers]) -> None:
        saved, own = self.state["callbacks"], {each.name: each for each in handlers if each.has_state}
        for name, each in own.items():
            if name in saved:
                with restoring(self.path, f"callbacks.{name}"):
                    if type(each.callback).__module__.startswith("offloop."):
                        check_kinds(saved[name], each.callback.state_dict())
                    each.callback.load_state_dict(saved[name])
            else:
                self.report.take(f"callback {name} is new")
        for name in saved.keys() - own.keys():
            self.report.take(f"callback {name} is missing")

    def restore_schedule(self, loop: TrainingLoop) -> None:
        """Restore the state of the schedule attached last, and the rates that its construction changed."""
        schedules = loop.schedules.all
        index = len(schedules) - 1
        if index < len(self.state["schedulers"]):
            self._load_schedule(schedules[index], index)
        else:
            name = type(schedules[index].scheduler).__name__
            self.report.take(f"schedule {name} is new")
            self.report.lower("approximate", f"schedule {name} is new")
        for name, optimizer in loop.setup.optimizers.items():
            groups = self.state["optimizers"][name]["param_groups"]
            for group, kept in zip(optimizer.param_groups, groups, strict=False):
                group.update({key: value for key, value in kept.items() if key != "params"})
        for scheduler in self._adjusted:
            follow_length(scheduler)

    def _load_schedule(self, schedule: Schedule, index: int) -> None:
        made = self.state.get("made", {}).get("schedulers")
        saved = self.state["schedulers"][index]
        with restoring(self.path, f"schedulers.{index}"):
            check_schedule(saved, schedule.scheduler)
            then = None if made is None else made[index]
            if restore_schedule(schedule.scheduler, saved, then, self.report):
                self._adjusted.append(schedule.scheduler)

    def restore_random(self, loop: TrainingLoop, doubts: Iterable[Doubt]) -> None:
        """Restore the random states, last before training continues. The report is complete then.

        Args:
            loop: The loop of the run, with all schedules attached.
            doubts: Doubts about the loaders.
        """
        for doubt in doubts:
            self.report.lower(*doubt)
        for saved in self.state["schedulers"][len(loop.schedules.all) :]:
            text = f"a schedule of the checkpoint, at its step {saved.get('last_epoch')}, is missing"
            self.report.take(text)
            self.report.lower("approximate", text)
        for missed in restore_random_state(self.state["random"]):
            self.report.lower("approximate", missed)
