"""The callbacks that come with offloop, built on the engine's public names.

Names are loaded when first used, so the process of a callback imports what that callback needs, and no more.
"""

from typing import TYPE_CHECKING

from offloop.engine.lazy_facade import lazy_facade

if TYPE_CHECKING:
    from offloop.callbacks.alerts import Above as Above
    from offloop.callbacks.alerts import Alert as Alert
    from offloop.callbacks.alerts import Alerts as Alerts
    from offloop.callbacks.alerts import Below as Below
    from offloop.callbacks.alerts import Failed as Failed
    from offloop.callbacks.alerts import NonFinite as NonFinite
    from offloop.callbacks.alerts import Rule as Rule
    from offloop.callbacks.alerts import Spike as Spike
    from offloop.callbacks.alerts import Stalled as Stalled
    from offloop.callbacks.checkpoint_evaluator import CheckpointEvaluator as CheckpointEvaluator
    from offloop.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from offloop.callbacks.gradient_monitor import GradientMonitor as GradientMonitor
    from offloop.callbacks.gradient_monitor import GradientStatistics as GradientStatistics
    from offloop.callbacks.layer_statistics import LayersMeasured as LayersMeasured
    from offloop.callbacks.layer_statistics import LayerStatistics as LayerStatistics
    from offloop.callbacks.learning_curves import LearningCurves as LearningCurves
    from offloop.callbacks.learning_rate import LearningRateScheduler as LearningRateScheduler
    from offloop.callbacks.metric_logger import MetricLogger as MetricLogger
    from offloop.callbacks.mlflow_logger import MLflowLogger as MLflowLogger
    from offloop.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from offloop.callbacks.profiler import Profiler as Profiler
    from offloop.callbacks.profiler import ProfileWritten as ProfileWritten
    from offloop.callbacks.progress_bar import ProgressBar as ProgressBar
    from offloop.callbacks.resource_monitor import GpuUsage as GpuUsage
    from offloop.callbacks.resource_monitor import ResourceMonitor as ResourceMonitor
    from offloop.callbacks.resource_monitor import ResourceUsage as ResourceUsage
    from offloop.callbacks.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
    from offloop.callbacks.wandb_logger import WandbLogger as WandbLogger
    from offloop.callbacks.weight_average import WeightAverage as WeightAverage

_NAMES = {
    "alerts": "Above Alert Alerts Below Failed NonFinite Rule Spike Stalled",
    "checkpoint_evaluator": "CheckpointEvaluator",
    "early_stopping": "EarlyStopping",
    "gradient_monitor": "GradientMonitor GradientStatistics",
    "layer_statistics": "LayerStatistics LayersMeasured",
    "learning_curves": "LearningCurves",
    "learning_rate": "LearningRateScheduler",
    "metric_logger": "MetricLogger",
    "mlflow_logger": "MLflowLogger",
    "model_checkpoint": "ModelCheckpoint",
    "profiler": "ProfileWritten Profiler",
    "progress_bar": "ProgressBar",
    "resource_monitor": "GpuUsage ResourceMonitor ResourceUsage",
    "tensorboard_logger": "TensorBoardLogger",
    "wandb_logger": "WandbLogger",
    "weight_average": "WeightAverage",
}

_EVENTS = "Alert GradientStatistics LayersMeasured ProfileWritten ResourceUsage"

__all__, __getattr__, __dir__ = lazy_facade(__name__, _NAMES, events=_EVENTS)
