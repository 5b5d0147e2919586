"""The steps of `Trainer`: what a batch must be where a subclass defines no step of its own."""

from collections.abc import Mapping
from typing import Any

import torch

from offloop.engine.errors import BatchError, ConfigError
from offloop.engine.training.own_loss import own_loss
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Batch
from offloop.engine.training.step_failures import describe, explain_loss, explain_model
from offloop.engine.training.step_output import StepOutput


class DefaultSteps(TrainingProgram):
    """Steps for batches that follow a convention, see `Trainer`."""

    def training_step(self, batch: Batch) -> StepOutput:
        """Compute the loss by the convention that the batch follows."""
        if self.loss is not None:
            inputs, targets = inputs_and_targets(batch)
            try:
                outputs = self.model(inputs)
            except Exception as error:
                explain_model(error, inputs)
                raise
            try:
                loss = self.loss(outputs, targets)
            except Exception as error:
                explain_loss(error, outputs, targets)
                raise
            return {"loss": loss, "outputs": outputs, "targets": targets}
        loop = self._loop
        has_metrics = loop is not None and (
            loop.validator.metrics if loop.progress.is_validating else loop.train_metrics
        )
        return own_loss(self.model, batch, self._next_tokens if has_metrics else None)

    def validation_step(self, batch: Batch) -> StepOutput:
        """Compute the loss as `training_step` does."""
        if not self.automatic_optimization:
            raise NotImplementedError(
                f"{type(self).__name__} steps manually: define validation_step(self, batch)"
            )
        return self.training_step(batch)

    def predict_step(self, batch: Batch) -> Any:
        """Return the model's outputs; with `loss=` a batch may be `(inputs, targets)`, as in training, or inputs."""
        if isinstance(batch, Mapping):
            if self.loss is not None and "inputs" in batch:
                return self.model(batch["inputs"])
            return self.model(**batch)
        if isinstance(batch, tuple | list):
            if self.loss is not None and len(batch) == 2:
                return self.model(batch[0])
            return self.model(*batch)
        return self.model(batch)


def inputs_and_targets(batch: Batch) -> tuple[Any, Any]:
    """Return the two parts of a batch: for the model and for the loss function.

    Raises:
        BatchError: The batch has other parts.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "inputs" in batch and "targets" in batch:
        return batch["inputs"], batch["targets"]
    whole = (
        "; if the loader is a list of whole tensors or arrays: "
        "DataLoader(TensorDataset(inputs, targets), batch_size=32)"
        if hasattr(batch, "__array__")
        else ""
    )
    raise BatchError(
        f"with loss= a batch must be (inputs, targets) or a mapping with those keys, got {describe(batch)}: "
        f"override training_step(self, batch){whole}"
    )


def check_optimization(program: TrainingProgram) -> None:
    """Check that the way of stepping fits the optimizers and the steps that are defined.

    Raises:
        ConfigError: It does not.
    """
    if program.automatic_optimization:
        if len(program.optimizers) > 1:
            raise ConfigError(
                f"there are {len(program.optimizers)} optimizers ({', '.join(program.optimizers)}): say when each "
                "steps with automatic_optimization = False and self.optimizer_step(name)"
            )
        if isinstance(program.optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times in a step: use automatic_optimization = False and "
                "self.optimizer_step(closure=...)"
            )
    elif type(program).training_step in (TrainingProgram.training_step, DefaultSteps.training_step):
        raise ConfigError(
            "automatic_optimization = False leaves the steps to you: define training_step(self, batch) "
            "with self.backward(loss) and self.optimizer_step()"
        )
    elif program.config.accumulate_grad_batches > 1:
        raise ConfigError(
            f"accumulate_grad_batches={program.config.accumulate_grad_batches} needs automatic_optimization: "
            "in a manual step, call self.optimizer_step() every so many batches"
        )


def check_validation(program: TrainingProgram) -> None:
    """Check that there is a step for validation batches.

    Raises:
        ConfigError: There is none, or it would step the optimizer.
    """
    own = type(program)
    if own.validate_epoch is not TrainingProgram.validate_epoch:
        return
    if own.validation_step is TrainingProgram.validation_step:
        raise ConfigError(f"{own.__name__} must define validation_step(self, batch) to validate")
    if not program.automatic_optimization and own.validation_step is DefaultSteps.validation_step:
        raise ConfigError(
            f"{own.__name__} steps manually, and a validation must not step: define validation_step(self, batch), "
            "or train without a val_loader"
        )
