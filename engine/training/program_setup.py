"""From a trainer to the setup of a training loop: for runs, evaluations and searches alike."""

from collections.abc import Iterable, Sequence

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.callback import StepHook
from offloop.engine.config import TrainerConfig
from offloop.engine.data.batch_size import checked_batch_size, guess_batch_size
from offloop.engine.data.val_loaders import ValLoader, by_prefix, live_prefix
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.metrics.names import MetricSpec, RunMetrics, metrics_for
from offloop.engine.metrics.problem import rows_of
from offloop.engine.training.hyperparameters import hyperparameters_of
from offloop.engine.training.learning_rate import Schedule
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.own_loss import NextTokens
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Batch, Host, Limits, Setup
from offloop.engine.training.strategy import Strategy


def make_setup(
    program: TrainingProgram,
    limits: Limits,
    *,
    config: TrainerConfig | None = None,
    train_loader: Iterable[Batch] = (),
    val_loader: ValLoader | None = None,
    metrics: RunMetrics = (),
    schedules: Sequence[Schedule] = (),
    monitor: str | None = None,
    validates_live: bool = False,
    is_resumable: bool = False,
) -> Setup:
    """Return the setup of one training.

    Args:
        program: The trainer.
        limits: When the training is complete.
        config: The knobs, if they differ from the trainer's.
        train_loader: Training batches.
        val_loader: Validation batches, from one loader or several by name.
        metrics: As `train` takes them.
        schedules: Those that step from the beginning.
        monitor: Key of the metric that plateau schedules watch by default; None for the loss.
        validates_live: Whether validations also run with the weights in training, besides those with an average.
        is_resumable: Whether checkpoints may be taken.
    """
    prefixes = list(by_prefix(val_loader))
    if validates_live:
        prefixes += [live_prefix(each) for each in prefixes]
    count = program.batch_size

    def metric_sets(prefixes: Iterable[str], wanted: MetricSpec) -> dict[str, MetricSet]:
        rows = rows_of(program.loss)
        return {
            each: MetricSet(wanted, prefix=each, device=program.device, rows=rows)
            for each in (prefixes if wanted else ())
        }

    config = config or program.config
    return Setup(
        config=config,
        limits=limits,
        device=program.device,
        optimizers=program.optimizers,
        schedules=tuple(schedules),
        train_loader=train_loader,
        val_loader=val_loader,
        train_metrics=metric_sets(["train_"], metrics_for("train", metrics)).get("train_"),
        val_metrics=metric_sets(prefixes, metrics_for("val", metrics)),
        monitor=monitor or ("train_loss" if val_loader is None else "val_loss"),
        count_samples=guess_batch_size if count is None else checked_batch_size(count),
        validates_live=validates_live,
        is_resumable=is_resumable,
        hyperparameters=hyperparameters_of(
            program,
            config,
            limits,
            optimizers=program.optimizers,
            schedules=schedules,
            train_loader=train_loader,
        ),
    )


def make_loop(
    program: TrainingProgram,
    setup: Setup,
    host: Host,
    *,
    mailbox: Mailbox | None = None,
    hooks: Sequence[StepHook] = (),
    strategy: Strategy | None = None,
) -> TrainingLoop:
    """Return the loop of one training."""
    program._next_tokens = NextTokens()
    return program._loop_class(program, setup, host, mailbox=mailbox, hooks=hooks, strategy=strategy)


def make_run_loop(
    program: TrainingProgram,
    setup: Setup,
    host: Host,
    *,
    mailbox: Mailbox,
    hooks: Sequence[StepHook],
    strategy: Strategy | None = None,
) -> TrainingLoop:
    """Return the loop of a run, which continues with what the trainer's latest run has left."""
    if program._given_rates is not None:
        program._given_rates.put_back()
    loop = make_loop(program, setup, host, mailbox=mailbox, hooks=hooks, strategy=strategy)
    program._given_rates = loop.schedules.given_rates
    scaler, previous = loop.mixed.scaler, program._mixed
    if scaler is not None and previous is not None and previous.scaler is not None:
        # The loss scale continues, as model and optimizer do.
        scaler.load_state_dict(previous.scaler.state_dict())
        loop.reporter.loss_scale = scaler.get_scale()
    return loop
