"""What a training reports about itself as a whole: its start, and an epoch that waited for its data."""

import logging
import math
import time

from torch.nn.parameter import is_lazy

from offloop.engine.data.batches import limited_length
from offloop.engine.data.data_wait import DataWait
from offloop.engine.events import DataBottleneck, Settings, TrainStart
from offloop.engine.training.progress import Progress, ResumePoint
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.setup import Program, Setup
from offloop.engine.training.strategy import Strategy

logger = logging.getLogger("offloop")


def train_start(
    program: Program,
    setup: Setup,
    progress: Progress,
    resumed: ResumePoint | None,
    reporter: Reporter,
    strategy: Strategy,
) -> TrainStart:
    """Return the first event of a run.

    Args:
        program: Its model is described.
        setup: Of the run.
        progress: Where it starts.
        resumed: The checkpoint that it continues, if any.
        reporter: Knows the position.
        strategy: Knows of other processes.
    """
    config, limits = setup.config, setup.limits
    length = limited_length(setup.train_loader, config.limit_train_batches, "limit_train_batches")
    (length,) = strategy.batches_of(setup.train_loader, length, is_training=True)
    steps = None
    if length is not None and program.automatic_optimization:
        steps = math.ceil(length / config.accumulate_grad_batches)
    return TrainStart(
        attempt=progress.attempt,
        resumed_from=None if resumed is None else resumed.path,
        resumed_at=None if resumed is None else resumed.taken,
        resumed_attempt=None if resumed is None else resumed.attempt,
        init_from=progress.init_from,
        config=Settings(config.as_settings()),
        hyperparameters=Settings(setup.hyperparameters),
        device=str(setup.device),
        parameters=sum(
            parameter.numel()
            for parameter in program.model.parameters()
            if parameter.requires_grad and not is_lazy(parameter)
        ),
        batches_per_epoch=length,
        steps_per_epoch=steps,
        epochs=limits.epochs,
        max_steps=limits.max_steps,
        max_time=limits.max_time,
        world_size=strategy.world_size,
        **reporter.position(),
    )


def report_data_wait(
    data_wait: DataWait, setup: Setup, progress: Progress, reporter: Reporter, *, aside: float
) -> None:
    """Report what to change about the loader if the epoch that is over waited for its data.

    Args:
        data_wait: What it waited.
        setup: Of the run.
        progress: Of the run.
        reporter: Publishes the event.
        aside: Seconds of the run so far that were pauses and validations.
    """
    if not data_wait.since or progress.ending == "cancelled":
        return
    found = data_wait.judge(
        setup.train_loader,
        now=time.perf_counter(),
        set_aside=aside,
        on_cuda=setup.device.type == "cuda",
        is_last=progress.ending is not None or setup.limits.epochs == progress.epoch + 1,
    )
    if found is None:
        return
    logger.warning(
        "the run waits for its data %.0f %% of the time, %.1f ms for each batch; what may help: %s",
        100 * found.share,
        1e3 * found.wait,
        "; ".join(found.advice),
    )
    advice = tuple(found.advice)
    reporter.publish_in_turn(
        DataBottleneck(share=found.share, wait=found.wait, advice=advice, **reporter.position())
    )
