"""From the arguments of a run to its session: everything that is decided, and can be wrong, before the run starts."""

import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from offloop.engine.callback import Callback, Handlers, lookup
from offloop.engine.checkpoint import RemoteRun
from offloop.engine.config import TrainerConfig, check_limits
from offloop.engine.data.batches import limited_length
from offloop.engine.data.seeded_sampling import check_seedable
from offloop.engine.data.val_loaders import LIVE, PREFIX, by_prefix, live_prefix
from offloop.engine.errors import ConfigError
from offloop.engine.metrics.names import check_metrics, metrics_for
from offloop.engine.observers.event_log import EventLog
from offloop.engine.observers.worker import Worker
from offloop.engine.recovery.fetch import fetch_run, remote_to_fetch
from offloop.engine.recovery.resume_plan import Resume, plan_resume
from offloop.engine.run import Run
from offloop.engine.run_dir import base_dir_of, new_run_id
from offloop.engine.session.monitors import Monitors
from offloop.engine.session.ranks import check_alike, decided_resume, may_have_ranks, meeting
from offloop.engine.session.run_arguments import RunArguments
from offloop.engine.session.run_plan import RunPlan
from offloop.engine.session.session import Session
from offloop.engine.session.thread_state import caller_state, check_caller
from offloop.engine.training.arguments import (
    check_callbacks,
    check_loader,
    check_model_knobs,
    check_optimizers,
    check_resume_lr,
    check_val_loader,
    remote_run,
)
from offloop.engine.training.averages import check_averages
from offloop.engine.training.default_steps import DefaultSteps, check_optimization, check_validation
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.program_setup import make_setup
from offloop.engine.training.setup import Limits
from offloop.engine.weights.loading import plan_init

if TYPE_CHECKING:
    from offloop.engine.distributed.plan import Decision
    from offloop.engine.distributed.rank_run import RankRun


OVERRIDABLE: Final = (
    "training_step",
    "validation_step",
    "train_epoch",
    "validate_epoch",
    "batches",
    "train_batch",
    "validate_batch",
)
"""Methods of a trainer in which a subclass may log."""


def prepare(
    program: TrainingProgram,
    arguments: RunArguments,
    ranks: "RankRun | None" = None,
    decision: "Decision | None" = None,
) -> Session:
    """Check everything that can be checked before a run, and return its session. Nothing has started then.

    Args:
        program: The trainer.
        arguments: Of the run.
        ranks: The run as one rank of several sees it.
        decision: What rank 0 has decided, on the other ranks.

    Raises:
        ConfigError, TypeError, ValueError: An argument cannot work.
        WeightsError, ModelNotFoundError, CheckpointError: `init_from` or `resume` cannot be read.
        TrainerBusyError: The trainer is in use.
    """
    config = program.config
    program._occupancy.check_free()
    check_caller(config.precision, program.device)
    limits = _check_arguments(program, arguments)
    callbacks = [*program.callbacks, *check_callbacks(arguments.callbacks)]
    given = lookup(callbacks)
    monitors = Monitors(
        config, callbacks, arguments.metrics, arguments.val_loader, may_log=_may_log(program, given)
    )
    if program.scheduler is not None:
        monitors.check_schedule(program.scheduler, None)

    resume_plan = None
    if decision is not None:
        resume_plan = decided_resume(decision)
    elif arguments.resume is not None:
        resume_plan = plan_resume(arguments.resume, base_dir_of(config), config.run_name)
    will_resume = resume_plan is not None and resume_plan.which is not None
    check_resume_lr(arguments.resume_lr, arguments.resume, program.optimizers)
    initial_weights = plan_init(arguments.init_from, arguments.init_strict, will_resume=will_resume)
    if decision is not None:
        base_dir = None if decision.directory is None else Path(decision.directory).parent
    elif resume_plan is not None:
        base_dir = resume_plan.directory.parent
    elif _needs_run_dir(config, callbacks):
        base_dir = base_dir_of(config)
    else:
        base_dir = None
    if (
        base_dir is not None
        and decision is None
        and not any(isinstance(each, EventLog) for each in callbacks)
    ):
        callbacks.insert(0, EventLog())
    handlers = lookup(callbacks)
    if decision is not None:
        handlers = [each for each in handlers if each.runs_on_other_ranks()]
    validates_live = any(each.validates_live for each in callbacks)
    _check_averages(callbacks, arguments, validates_live=validates_live)
    if decision is not None:
        run_id = decision.run_id
    else:
        run_id = config.run_name or new_run_id() if resume_plan is None else resume_plan.directory.name
    setup = make_setup(
        program,
        limits,
        train_loader=arguments.train_loader,
        val_loader=arguments.val_loader,
        metrics=arguments.metrics,
        schedules=()
        if program.scheduler is None
        else [Schedule(program.scheduler, config.scheduler_interval)],
        monitor=monitors.default,
        validates_live=validates_live,
        is_resumable=base_dir is not None,
    )

    plan = RunPlan(
        program=program,
        setup=setup,
        run_id=run_id,
        directory=None if base_dir is None else base_dir / run_id,
        handlers=handlers,
        longest_drain=max([config.drain_timeout, *(each.drain_timeout or 0.0 for each in callbacks)]),
        monitors=monitors,
        remote=None if config.remote is None or decision is not None else remote_run(config.remote, run_id),
        resume=resume_plan,
        resume_lr=arguments.resume_lr if will_resume else None,
        initial_weights=initial_weights,
        ranks=ranks,
    )
    if ranks is not None:
        check_alike(ranks, plan, given, decision)
    return Session(plan)


def prepare_blocking(
    program: TrainingProgram, arguments: RunArguments, *, is_given_up: Callable[[], bool] = lambda: False
) -> Session:
    """Fetch the run that is to be continued if it is elsewhere, and prepare. Blocks, for network and other ranks.

    Args:
        program: The trainer.
        arguments: Of the run.
        is_given_up: True once nobody waits for the session any more: then no rank starts the run.
    """
    _check_made(program)
    if not may_have_ranks(program.config):
        _fetch(program, arguments.resume)
        return prepare(program, arguments)
    with meeting(program) as ranks:
        if ranks is None or ranks.is_first:
            _fetch(program, arguments.resume)
        decision = None if ranks is None or ranks.is_first else ranks.plan.learn()
        session = prepare(program, arguments, ranks, decision)
        if ranks is not None:
            if is_given_up():
                raise ConfigError("the task that started the run was cancelled")
            ranks.plan.ready()
    return session


async def fetch_async(program: TrainingProgram, resume: Resume) -> None:
    """Fetch the run that is to be continued in a thread. Cancellation: the thread ends by itself."""
    if _remote_of(program, resume) is not None:
        worker = Worker("offloop-fetch")
        try:
            await worker.run(functools.partial(_fetch, program, resume))
        finally:
            worker.close()


async def prepare_async(program: TrainingProgram, arguments: RunArguments) -> Session:
    """Fetch the run that is to be continued in a thread, and prepare; with other ranks, all of it in a thread."""
    _check_made(program)
    if not may_have_ranks(program.config):
        await fetch_async(program, arguments.resume)
        return prepare(program, arguments)
    caller = caller_state(with_autocast=True, used=program.device)
    # Set on the event loop, read by the thread, which goes on by itself after a cancellation
    given_up = threading.Event()
    made: list[Session] = []

    def work() -> Session:
        with caller:
            session = prepare_blocking(program, arguments, is_given_up=given_up.is_set)
        made.append(session)
        if given_up.is_set():
            _give_up(session)
        return session

    worker = Worker("offloop-prepare")
    try:
        return await worker.run(work)
    except BaseException:
        given_up.set()
        for each in made:
            _give_up(each)
        raise
    finally:
        worker.close()


def _give_up(session: Session) -> None:
    """Give up a run that nobody starts any more: all ranks may start another one then. Any thread."""
    if session.ranks is not None:
        session.ranks.refuse(ConfigError("the task that started the run was cancelled"))


def run_block(
    program: TrainingProgram, arguments: RunArguments
) -> contextlib.AbstractAsyncContextManager[Run]:
    """Return the block of `BaseTrainer.start`. Arguments are checked at once, unless a run must be fetched first."""
    if _remote_of(program, arguments.resume) is None and not may_have_ranks(program.config):
        return prepare(program, arguments).run_block()
    return _fetch_and_run_block(program, arguments)


@contextlib.asynccontextmanager
async def _fetch_and_run_block(program: TrainingProgram, arguments: RunArguments) -> AsyncIterator[Run]:
    session = await prepare_async(program, arguments)
    async with session.run_block() as run:
        yield run


def _check_made(program: TrainingProgram) -> None:
    """Check that a trainer was made at all. Every start of a run looks at the trainer here first.

    Raises:
        ConfigError: The trainer's class does not call our `__init__`.
    """
    if "config" not in vars(program):
        raise ConfigError(
            f"{type(program).__name__}.__init__ must call super().__init__(model, optimizer, ...)"
        )


def _remote_of(program: TrainingProgram, resume: Resume) -> RemoteRun | None:
    """Return the remote directory of the run that `resume` names.

    Raises:
        ConfigError: The trainer's class does not call our `__init__`, or `remote_to_fetch` refuses.
    """
    _check_made(program)
    return remote_to_fetch(program.config, resume)


def _fetch(program: TrainingProgram, resume: Resume) -> None:
    remote = _remote_of(program, resume)
    if remote is not None:
        name = program.config.run_name
        assert name is not None and isinstance(resume, str | int)
        program._occupancy.check_free()
        fetch_run(remote, base_dir_of(program.config) / name, resume)


def _check_arguments(program: TrainingProgram, arguments: RunArguments) -> Limits:
    """Check what needs no look at the disk, and return the limits of the run."""
    config, val_loader = program.config, arguments.val_loader
    check_loader(arguments.train_loader, "train_loader")
    if val_loader is not None:
        check_val_loader(val_loader, "val_loader")
    elif config.validate_at_start:
        raise ConfigError("validate_at_start=True needs a validation: give train() a val_loader")
    limits = Limits(
        epochs=config.epochs if arguments.epochs is None else arguments.epochs,
        max_steps=config.max_steps if arguments.max_steps is None else arguments.max_steps,
        max_time=config.max_time if arguments.max_time is None else arguments.max_time,
    )
    check_limits(limits.epochs, limits.max_steps, limits.max_time)
    limited_length(arguments.train_loader, config.limit_train_batches, "limit_train_batches")
    if config.sampling == "seeded":
        check_seedable(arguments.train_loader)
    if val_loader is not None:
        check_validation(program)
        for each in by_prefix(val_loader).values():
            limited_length(each, config.limit_val_batches, "limit_val_batches")
    check_metrics(metrics_for("train", arguments.metrics))
    check_metrics(metrics_for("val", arguments.metrics))
    check_model_knobs(program.model, config)
    # The model may have been replaced since
    check_optimizers(program.model, program.loss, program.optimizers, program.scheduler, config)
    check_optimization(program)
    return limits


def _may_log(program: TrainingProgram, callbacks: Iterable[Handlers]) -> bool:
    """Tell whether code of the user's may log values: in steps and epochs, or in step hooks."""
    own = type(program)
    if not all(getattr(own, name) is getattr(DefaultSteps, name) for name in OVERRIDABLE):
        return True
    return any(
        each.hooks and type(each.callback).__module__.partition(".")[0] != "offloop" for each in callbacks
    )


def _needs_run_dir(config: TrainerConfig, callbacks: list[Callback]) -> bool:
    """Tell whether a new run has something to write, or was told where."""
    has_labels = bool(config.tags or config.note)
    is_named = config.run_dir is not None or config.remote is not None
    return is_named or has_labels or any(getattr(each, "needs_run_dir", False) for each in callbacks)


def _check_averages(callbacks: list[Callback], arguments: RunArguments, *, validates_live: bool) -> None:
    """Check that no validation loader has the name of the weights in training, and no two averages collide."""
    prefixes = by_prefix(arguments.val_loader)
    if validates_live and any(each.startswith(live_prefix(PREFIX)) for each in prefixes):
        raise ConfigError(
            f"val_loader has the name {LIVE!r}, which is that of the weights in training with validate='both': "
            "rename the loader"
        )
    check_averages(callbacks)
