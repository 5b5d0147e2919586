"""Evaluations, and training loops outside of a run."""

import contextlib
from collections.abc import Iterator

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.data.val_loaders import ValLoader
from offloop.engine.errors import ConfigError
from offloop.engine.events import Metrics
from offloop.engine.metrics.names import MetricSpec, check_metrics
from offloop.engine.observers.worker import Worker
from offloop.engine.session.thread_state import caller_state
from offloop.engine.tools.ranks import with_other_ranks
from offloop.engine.training.arguments import check_val_loader
from offloop.engine.training.default_steps import check_validation
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.placement import prepare_model
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.program_setup import make_loop, make_setup
from offloop.engine.training.setup import Host, Limits, Setup, SilentHost
from offloop.engine.training.strategy import Strategy


@contextlib.contextmanager
def silent_loop(
    program: TrainingProgram,
    setup: Setup,
    host: Host | None = None,
    *,
    mailbox: Mailbox | None = None,
    strategy: Strategy | None = None,
) -> Iterator[TrainingLoop]:
    """Attach a loop to a trainer for a block. The caller must occupy the trainer."""
    program._loop = loop = make_loop(program, setup, host or SilentHost(), mailbox=mailbox, strategy=strategy)
    try:
        yield loop
    finally:
        program._loop = None
        loop.close()


def evaluate(program: TrainingProgram, loader: ValLoader, metrics: MetricSpec, prefix: str) -> Metrics:
    """Validate a model. Blocks; see `BaseTrainer.evaluate`."""

    def prepare() -> Setup:
        check_val_loader(loader, "loader")
        check_validation(program)
        if not isinstance(prefix, str):
            raise TypeError(f'prefix must be a string like "test_", got {prefix!r}')
        if prefix[-1:].isalnum():
            raise ConfigError(f'prefix={prefix!r} makes keys like "{prefix}loss": write prefix="{prefix}_"')
        check_metrics(metrics)
        return make_setup(program, Limits(epochs=1), val_loader=loader, metrics={"val": metrics})

    with (
        program._occupancy.use("evaluating", in_a_run="await run.validate() asks it to validate"),
        with_other_ranks(program, "evaluate", prepare) as (setup, together),
        silent_loop(program, setup, strategy=None if together is None else together.strategy) as loop,
    ):
        prepare_model(program)
        if together is not None:
            together.strategy.share_weights()
        computed = loop.validate() or {}
    return Metrics({prefix + key.removeprefix("val_"): value for key, value in computed.items()})


async def evaluate_async(
    program: TrainingProgram, loader: ValLoader, metrics: MetricSpec, prefix: str
) -> Metrics:
    """Validate a model in a separate thread; see `BaseTrainer.evaluate_async`."""
    caller = caller_state(with_autocast=True, used=program.device)

    def work() -> Metrics:
        with caller:
            return evaluate(program, loader, metrics, prefix)

    worker = Worker("offloop-evaluate")
    try:
        return await worker.run(work)
    finally:
        worker.close()
