"""Validation: the model over the validation loaders, in eval mode, at a step boundary of a training."""

import time
from collections.abc import Callable, Mapping

import torch

from offloop.engine.data.batches import describe_empty, limited_length
from offloop.engine.data.val_loaders import PREFIX, by_prefix, live_prefix, name_of
from offloop.engine.errors import EmptyLoaderError
from offloop.engine.events import Event, Metrics, ValidationEnd, ValidationStart
from offloop.engine.metrics.logged_names import add_computed
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.position.epoch_source import EpochSource
from offloop.engine.training.kept_state import KeptBuffers
from offloop.engine.training.precision import MixedPrecision
from offloop.engine.training.progress import Progress
from offloop.engine.training.reporter import Reporter
from offloop.engine.training.setup import Batch, Program, Setup
from offloop.engine.training.step_hooks import StepHooks
from offloop.engine.training.step_output import read_output
from offloop.engine.training.strategy import Strategy, ValidationSums
from offloop.engine.training.training_mode import eval_mode
from offloop.engine.training.window import Logged, checked_value, settled


class Validator:
    """Runs the validations of a training. Training thread only."""

    def __init__(
        self,
        program: Program,
        setup: Setup,
        *,
        progress: Progress,
        reporter: Reporter,
        hooks: StepHooks,
        mixed: MixedPrecision,
        source: EpochSource,
        strategy: Strategy,
    ) -> None:
        self.loaders = by_prefix(setup.val_loader)
        """By the prefix of the keys of their metrics."""
        self.metrics: Mapping[str, MetricSet] = setup.val_metrics
        """By the same prefixes."""
        self.prefix = PREFIX
        """Of the loader that is validated on, or was last."""
        self.seconds = 0.0
        """Seconds spent in validations of this attempt."""
        self._program = program
        self._setup = setup
        self._progress = progress
        self._reporter = reporter
        self._hooks = hooks
        self._mixed = mixed
        self._source = source
        self._strategy = strategy
        self._samples = 0
        # By the batch in work
        self._logged: list[Logged] = []
        # Names that were checked already
        self._logged_names: set[str] = set()

    def is_due(self) -> bool:
        """Return True if this epoch ends with a validation that has not run yet."""
        progress = self._progress
        if not self.loaders or progress.validated_step == progress.step:
            return False
        # The run ends here: its last metrics should include a validation
        if progress.ending == "limit":
            return True
        # So should those of a run that was never validated
        is_last = progress.epoch + 1 == self._setup.limits.epochs
        return (is_last and progress.validated_step <= 0) or self.is_regular()

    def is_regular(self) -> bool:
        """Return True if this epoch ends with a validation even if the run continues."""
        config = self._setup.config
        every = config.val_every_n_epochs
        if every is None:
            every = 1 if config.val_every_n_steps is None else None
        return every is not None and (self._progress.epoch + 1) % every == 0

    def is_due_after_step(self) -> bool:
        """Return True if a validation is due after the latest step."""
        every = self._setup.config.val_every_n_steps
        return every is not None and self._progress.step % every == 0

    def validate(
        self,
        announce: Callable[[Event], None],
        process_commands: Callable[[], None],
        *,
        is_extra: bool = False,
    ) -> dict[str, float] | None:
        """Run a validation at a step boundary; returns its metrics, None if it was stopped.

        Each module gets its own train/eval flag back, so that frozen parts stay frozen. During a validation only a
        pause or a stop is applied; other commands wait for its end.

        Args:
            announce: Publishes an event at which commands are processed, see `Boundary.announce`.
            process_commands: Processes them without an event.
            is_extra: True for a validation that runs only because the run ends here. A run that is resumed from here
                must draw the same random numbers as without it.
        """
        if not self.loaders:
            return {}
        progress, reporter = self._progress, self._reporter
        started = time.perf_counter()
        progress.val_batches = 0
        # Left by a validation that was stopped
        self._logged.clear()
        progress.is_validating = True
        announce(ValidationStart(batches=self._length(), **reporter.position()))
        if progress.is_interrupted:
            progress.is_validating = False
            return None
        is_resumable = self._setup.is_resumable
        before = self._source.position.before_validation() if is_resumable else None
        buffers = KeptBuffers(
            (self._program.model, getattr(self._program, "loss", None)) if is_resumable else ()
        )
        try:
            metrics = self._run(process_commands)
        finally:
            progress.is_validating = False
            self.seconds += time.perf_counter() - started
        if before is not None and (is_extra or progress.is_interrupted):
            # A resumed run repeats a validation that was stopped
            self._source.position.rewind_validation(before)
            buffers.put_back()
        if progress.is_interrupted:
            return None
        progress.validated_step = progress.step
        if self._logged:
            # By hooks, after the passes
            self._gather(0, self._samples)
        metrics |= self._take(PREFIX)
        progress.epoch_metrics.update(metrics)
        progress.latest.update(metrics)
        seconds = time.perf_counter() - started
        announce(
            ValidationEnd(
                metrics=Metrics(metrics), samples=self._samples, seconds=seconds, **reporter.position()
            )
        )
        return metrics

    def _run(self, process_commands: Callable[[], None]) -> dict[str, float]:
        """Run the model over all loaders: if asked for, first with the weights in training, then with an average."""
        metrics: dict[str, float] = {}
        try:
            if self._setup.validates_live:
                with eval_mode(self._program.model):
                    metrics |= self._run_pass(process_commands, is_live=True)
            self._hooks.run_all("before_validation")
            with eval_mode(self._program.model):
                metrics |= self._run_pass(process_commands, is_live=False)
        finally:
            # Always: it may restore what was swapped before
            self._hooks.run_all("after_validation")
        return metrics

    def _run_pass(self, process_commands: Callable[[], None], *, is_live: bool) -> dict[str, float]:
        """Run the model over each loader; return the metrics of the named ones."""
        progress = self._progress
        self._samples = 0
        metrics: dict[str, float] = {}
        for name, loader in self.loaders.items():
            if progress.is_interrupted:
                break
            prefix = live_prefix(name) if is_live else name
            self.prefix, before, samples = prefix, progress.val_batches, self._samples
            if prefix in self.metrics:
                self.metrics[prefix].reset()
            with torch.no_grad():
                self._program.validate_epoch(loader)
            # Commands that have reached only some of the processes so far reach all
            if self._strategy.end_pass():
                process_commands()
            if progress.is_interrupted:
                break
            if not self._gather(progress.val_batches - before, samples):
                what = f"val_loader {name_of(prefix)}".rstrip()
                raise EmptyLoaderError(describe_empty(what, loader, was_read=progress.validated_step >= 0))
            if prefix != PREFIX:
                metrics |= self._take(prefix)
        return metrics

    def _gather(self, batches: int, samples_before: int) -> bool:
        """Add the numbers of the other processes to those of the pass that is over; False if it had no batch.

        Args:
            batches: Of the pass, in this process.
            samples_before: Samples of the passes before.
        """
        if self._logged:
            # Logged outside of batches: no loss to be weighed by
            self._add_logged(1.0)
        # Waits for the device
        self._reporter.readback.flush()
        means = self._reporter.val_means
        own = ValidationSums(means.sums, means.weights, self._samples - samples_before, batches)
        gathered = self._strategy.gather_validation(own)
        means.sums, means.weights = gathered.sums, gathered.weights
        self._samples = samples_before + gathered.samples
        return gathered.batches > 0

    def _take(self, prefix: str) -> dict[str, float]:
        """Return the metrics under a prefix, and reset them."""
        metrics = self._reporter.val_means.take(prefix)
        if prefix in self.metrics:
            add_computed(metrics, self._strategy.gather_metrics(self.metrics[prefix]).compute())
        return metrics

    def _length(self) -> int | None:
        """Return how many batches a validation has after limits; None where a loader has no length."""
        limit = self._setup.config.limit_val_batches
        lengths = [limited_length(each, limit, "limit_val_batches") for each in self.loaders.values()]
        known = [each for each in lengths if each is not None]
        passes = 2 if self._setup.validates_live else 1
        return passes * sum(known) if len(known) == len(lengths) else None

    def validate_batch(self, batch: Batch) -> None:
        """Run one batch of a validation."""
        samples = self._setup.count_samples(batch)
        with self._mixed.autocast():
            output = self._program.validation_step(batch)
        loss, outputs, targets, weight, own_samples = read_output(output, "validation_step")
        if own_samples is not None:
            samples = own_samples
        loss_weight = float(samples) if weight is None else weight
        self._samples += samples
        if self.prefix in self.metrics:
            self.metrics[self.prefix].add(outputs, targets, "validation_step")
        if loss is not None:
            self._reporter.add_to_validation("loss", loss, loss_weight)
        if self._logged:
            self._add_logged(loss_weight)

    def log(self, name: str, value: "torch.Tensor | float", weight: "torch.Tensor | float | None") -> None:
        """Log a value with the batch in work."""
        metrics = self.metrics.get(self.prefix)
        self._logged.append(checked_value(name, value, weight, metrics, self._logged_names))

    def _add_logged(self, weight: float) -> None:
        """Add the values logged since the last call to the means, with the weight of the loss they belong to."""
        for each in settled(self._logged, weight):
            self._reporter.add_to_validation(each.name, each.value, each.in_epoch())
        self._logged.clear()

    def close(self) -> None:
        """Release the metrics: some keep all outputs of a pass."""
        self.metrics = {}
