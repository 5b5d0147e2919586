"""The callbacks that come with offloop, built on the engine's public names."""

from offloop.callbacks.alerts import Above, Alert, Alerts, Below, Failed, NonFinite, Rule, Spike, Stalled
from offloop.callbacks.early_stopping import EarlyStopping
from offloop.callbacks.gradient_monitor import GradientMonitor, GradientStatistics
from offloop.callbacks.layer_statistics import LayersMeasured, LayerStatistics
from offloop.callbacks.learning_curves import LearningCurves
from offloop.callbacks.learning_rate import LearningRateScheduler
from offloop.callbacks.metric_logger import MetricLogger
from offloop.callbacks.mlflow_logger import MLflowLogger
from offloop.callbacks.model_checkpoint import ModelCheckpoint
from offloop.callbacks.profiler import Profiler, ProfileWritten
from offloop.callbacks.progress_bar import ProgressBar
from offloop.callbacks.resource_monitor import GpuUsage, ResourceMonitor, ResourceUsage
from offloop.callbacks.tensorboard_logger import TensorBoardLogger
from offloop.callbacks.wandb_logger import WandbLogger
from offloop.callbacks.weight_average import WeightAverage

__all__ = [
    "Above",
    "Alert",
    "Alerts",
    "Below",
    "EarlyStopping",
    "Failed",
    "GpuUsage",
    "GradientMonitor",
    "GradientStatistics",
    "LayerStatistics",
    "LayersMeasured",
    "LearningCurves",
    "LearningRateScheduler",
    "MLflowLogger",
    "MetricLogger",
    "ModelCheckpoint",
    "NonFinite",
    "ProfileWritten",
    "Profiler",
    "ProgressBar",
    "ResourceMonitor",
    "ResourceUsage",
    "Rule",
    "Spike",
    "Stalled",
    "TensorBoardLogger",
    "WandbLogger",
    "WeightAverage",
]
