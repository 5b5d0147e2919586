"""What a session asks of `engine/distributed/`. Only a process that may train with others loads that package."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed

from offloop.engine.callback import Handlers
from offloop.engine.config import TrainerConfig
from offloop.engine.data.batches import length_of
from offloop.engine.errors import ConfigError, RunNameTakenError
from offloop.engine.recovery.resume_plan import Over, ResumePlan
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.training.program import TrainingProgram

if TYPE_CHECKING:
    from offloop.engine.distributed.plan import Decision
    from offloop.engine.distributed.rank_run import RankRun

_VARIABLES = ("RANK", "WORLD_SIZE")
"""What torchrun and others set for a process that belongs to a group."""


def may_have_ranks(config: TrainerConfig) -> bool:
    """Return whether a process may train with others: it was asked for, or others were started with it."""
    if config.strategy == "none":
        return False
    is_grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return config.strategy == "ddp" or is_grouped or any(each in os.environ for each in _VARIABLES)


def launched(config: TrainerConfig) -> tuple[int, int]:
    """Return the rank of this process and the number of ranks.

    Raises:
        ConfigError: `strategy` fits no group.
    """
    if not may_have_ranks(config):
        return 0, 1
    from offloop.engine.distributed.launch import find_launch

    launch = find_launch(config.strategy)
    return (0, 1) if launch is None else (launch.rank, launch.world_size)


@contextlib.contextmanager
def meeting(program: TrainingProgram) -> Iterator["RankRun | None"]:
    """Meet the other ranks before a run; None if there are none. What the block raises, they learn. Blocks."""
    from offloop.engine.distributed.rank_run import join_run

    ranks = join_run(program.config)
    try:
        yield ranks
    except BaseException as error:
        if ranks is not None:
            ranks.plan.refuse(error)
            ranks.close()
        raise


def decided_resume(decision: "Decision") -> ResumePlan | None:
    """Return what rank 0 continues; None for a new run."""
    if not decision.is_resumed:
        return None
    assert decision.directory is not None
    which: str | int | Path | None = decision.which
    if decision.which_is_path:
        which = Path(str(which))
    over = None if decision.over is None else Over(*decision.over)
    return ResumePlan(Path(decision.directory), which, decision.attempt, over)


def check_alike(
    ranks: "RankRun", plan: RunPlan, given: Sequence[Handlers], decision: "Decision | None"
) -> None:
    """Tell the others what rank 0 has decided, or make sure that this rank was started as rank 0 was.

    Args:
        ranks: The run.
        plan: Of this rank.
        given: The handlers of all callbacks, also those that run on rank 0 alone.
        decision: What rank 0 has decided; None on rank 0.

    Raises:
        ConfigError: The ranks were started differently, or data or metrics cannot be shared.
        RunNameTakenError: On rank 0, for a new run: its directory exists already.
    """
    from offloop.engine.data.val_loaders import by_prefix
    from offloop.engine.distributed.plan import Decision, fingerprint
    from offloop.engine.distributed.shares import check_shareable
    from offloop.engine.distributed.splits import chosen_samples, follow_splits
    from offloop.engine.metrics.merging import check_mergeable

    setup = plan.setup
    if isinstance(plan.program.model, torch.nn.parallel.DistributedDataParallel):
        raise ConfigError(
            "model is a DistributedDataParallel already, and the trainer makes one: give it the module inside, "
            'model.module, or Trainer(strategy="none")'
        )
    if setup.config.sync_batchnorm and setup.device.type != "cuda":
        raise ConfigError(
            f"sync_batchnorm=True needs CUDA devices, and this run trains on {setup.device}: torch has no "
            "SyncBatchNorm for it"
        )
    for metrics in (setup.train_metrics, *setup.val_metrics.values()):
        if metrics is not None:
            check_mergeable(metrics)
    check_shareable(
        setup.train_loader,
        setup.config.rank_batches,
        ranks.world_size,
        "train_loader",
        count_samples=setup.count_samples,
        warns=ranks.is_first,
    )
    shared = {
        "val_loader" if prefix == "val_" else f"val_loader {prefix}": loader
        for prefix, loader in by_prefix(setup.val_loader).items()
    }
    if setup.config.rank_batches != "own":
        shared["train_loader"] = setup.train_loader
    lengths = {f"length of {name}": length_of(loader) for name, loader in shared.items()}
    own = fingerprint(plan.program.model, setup.optimizers, setup.config, list(given), setup.limits, lengths)
    follow_splits(ranks.plan, ranks.is_first, shared)
    for name, loader in shared.items():
        own |= chosen_samples(loader, name)
    if decision is not None:
        ranks.deciders = frozenset(decision.deciders)
        ranks.plan.check(own)
        return
    resume = plan.resume
    if resume is None and plan.directory is not None and plan.directory.exists():
        # Now, while the others can be told
        raise RunNameTakenError(str(plan.directory))
    which, over = (None, None) if resume is None else (resume.which, resume.over)
    deciders = sorted({name for each in plan.handlers for name in each.deciders})
    ranks.deciders = frozenset(deciders)
    ranks.plan.announce(
        Decision(
            run_id=plan.run_id,
            directory=None if plan.directory is None else str(plan.directory),
            which=str(which) if isinstance(which, Path) else which,
            which_is_path=isinstance(which, Path),
            is_resumed=resume is not None,
            attempt=0 if resume is None else resume.attempt,
            over=None if over is None else (over.stopped_by, over.reason),
            fingerprint=own,
            deciders=deciders,
        )
    )
