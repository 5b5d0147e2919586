"""Scenarios: callbacks, and metrics of the user's, on several ranks."""

import os
from pathlib import Path
from typing import Any

import torch
from rank_scripts.parts import Classifier, adam, classifier, loader, net, samples, train
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.wrappers import ClasswiseWrapper

from offloop.callbacks import (
    CheckpointEvaluator,
    EarlyStopping,
    GradientMonitor,
    LayerStatistics,
    LearningCurves,
    LearningRateScheduler,
    MetricLogger,
    ModelCheckpoint,
    Profiler,
    ResourceMonitor,
    WeightAverage,
)
from offloop.callbacks.gradient_monitor import GradientStatistics
from offloop.callbacks.layer_statistics import LayersMeasured
from offloop.engine import Callback, CheckpointReader, ConfigError, RunNameTakenError, decides, in_step
from offloop.engine.testing import Recorder


def run_dir() -> Path:
    """A directory that all ranks share."""
    return Path(os.environ["OFFLOOP_TEST_RUNS"])


def steering() -> Any:
    """An average, a schedule, and the best weights restored after a stop."""
    model = net()
    average = WeightAverage(decay=0.8, validate="both")
    stopping = EarlyStopping("val_live_loss", patience=2, min_delta=0.3, restore_best=True)
    schedule = LearningRateScheduler("cosine", warmup=4)
    trainer = classifier(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    found = train(
        trainer,
        loader(samples(53)),
        loader(samples(21, seed=1)),
        epochs=12,
        metrics=["accuracy"],
        callbacks=[average, stopping, schedule],
    )
    averaged = [each for each in average.averaged_weights().values() if each.is_floating_point()]
    return {
        **found,
        "average": torch.cat([each.flatten() for each in averaged]).tolist(),
        "best_step": stopping.best_step,
        "misses": stopping.misses,
    }


def plateau() -> Any:
    """A plateau reduces the rate on all ranks."""
    model = net()
    schedule = LearningRateScheduler("reduce_on_plateau", patience=0, threshold=0.9, factor=0.5)
    trainer = classifier(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = train(trainer, loader(samples(53)), loader(samples(21, seed=1)), epochs=4, callbacks=[schedule])
    return {**found, "lr": next(iter(trainer.optimizers.values())).param_groups[0]["lr"]}


def batch_norm() -> Any:
    """A validation has the buffers of rank 0, which the ranks' last steps have left different."""
    model = net(batch_norm=True)
    data = loader(samples(21, seed=1))
    found = train(classifier(model), loader(samples(53)), data, epochs=2)
    alone = Classifier(model, adam(model), device="cpu", strategy="none").evaluate(data)
    return {**found, "alone": dict(alone)}


def monitors() -> Any:
    """What rank 0 measures is true of all."""
    recorder = Recorder()
    found = train(
        classifier(),
        loader(samples(53)),
        epochs=2,
        callbacks=[GradientMonitor(every_n_steps=2), LayerStatistics(every_n_steps=3), recorder],
    )
    return {
        **found,
        "gradients": [[each.step, each.norm, each.update_ratio] for each in recorder.of(GradientStatistics)],
        "layers": [[each.step, each.kind] for each in recorder.of(LayersMeasured)],
    }


class Longest(Metric):
    """Keeps a list, a maximum and a mean."""

    norms: list[Tensor]
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("norms", [], dist_reduce_fx="cat")
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.norms.append(outputs.norm(dim=1))
        self.largest = torch.maximum(self.largest, outputs.abs().max())

    def compute(self) -> dict[str, Tensor]:
        norms = torch.cat(self.norms) if isinstance(self.norms, list) else self.norms
        return {"mean": norms.mean(), "count": torch.tensor(float(len(norms))), "largest": self.largest}


class Unmergeable(Metric):
    """Does not say how its state is merged."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total = self.total + outputs.sum()

    def compute(self) -> Tensor:
        return self.total


def users_metrics() -> Any:
    """Metrics of torchmetrics and of the user's; one validation has a batch on rank 0 alone."""
    own = {
        "auroc": MulticlassAUROC(3),
        "by_class": ClasswiseWrapper(MulticlassAUROC(3, average=None)),
        "longest": Longest(),
    }
    refused = []
    for use in (
        lambda own: classifier().train(loader(samples(53)), epochs=1, metrics=own),
        lambda own: classifier().evaluate(loader(samples(53)), metrics=own),
    ):
        try:
            use({"own": Unmergeable()})
        except ConfigError as error:
            refused.append(str(error))
    found = train(
        classifier(),
        loader(samples(53)),
        {"short": loader(samples(8, seed=1)), "long": loader(samples(43, seed=2))},
        epochs=2,
        metrics=own,
    )
    return {**found, "refused": refused}


# Callbacks with files ----------------------------------------------------------------------------------


class WaitForDisk(Callback):
    """Lets training go on only when every save so far has ended: a busy disk would leave some out."""

    @in_step
    def before_batch(self, point: Any) -> None:
        point.run._session.storage.checkpoints.flush()

    @decides
    def on_epoch_end(self, event: Any, run: Any) -> None:
        run._session.storage.checkpoints.flush()


def checkpoints() -> Any:
    """Saves come at the very steps that one process would save at, and the logs are written once."""
    name = "checkpoints"
    trainer = classifier(run_dir=run_dir(), run_name=name)
    found = train(
        trainer,
        loader(samples(53)),
        loader(samples(21, seed=1)),
        epochs=3,
        metrics=["accuracy"],
        callbacks=[
            ModelCheckpoint("val_loss", every_n_steps=3, keep_last=None),
            MetricLogger(),
            LearningCurves(),
            ResourceMonitor(),
            WaitForDisk(),
        ],
    )
    refused = ""
    try:
        classifier(run_dir=run_dir(), run_name=name).train(loader(samples(53)), epochs=1)
    except (ConfigError, RunNameTakenError) as error:
        refused = str(error)
    reader = CheckpointReader(run_dir() / name)
    return {
        **found,
        "saved": sorted({each.manifest.step for each in reader.checkpoints()}),
        "files": sorted(each.name for each in (run_dir() / name).iterdir()),
        "refused": refused,
        "lines": len((run_dir() / name / "metrics.csv").read_text().splitlines()),
    }


def evaluate(model: torch.nn.Module) -> dict[str, float]:
    """The sum of the weights, by the process that computes it."""
    return {"weights": sum(float(each.detach().sum()) for each in model.parameters()), "pid": os.getpid()}


def evaluations() -> Any:
    """Rank 0 has the checkpoints evaluated, and both have the figures."""
    name = "evaluations"
    trainer = classifier(run_dir=run_dir(), run_name=name)
    found = train(
        trainer,
        loader(samples(53)),
        epochs=2,
        callbacks=[
            ModelCheckpoint("eval_weights", mode="max"),
            CheckpointEvaluator(evaluate),
            WaitForDisk(),
        ],
    )
    return {**found, "sum": sum(float(each.detach().sum()) for each in trainer.model.parameters())}


def profile() -> Any:
    """The profile is that of rank 0."""
    name = "profile"
    trainer = classifier(run_dir=run_dir(), run_name=name)
    found = train(trainer, loader(samples(53)), epochs=1, callbacks=[Profiler(wait=0, warmup=1, active=2)])
    return {**found, "files": sorted(each.name for each in (run_dir() / name).iterdir())}
