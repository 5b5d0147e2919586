"""Callbacks: what most runs want beside the training itself, built on the engine's public names."""

from offloop.callbacks.early_stopping import EarlyStopping
from offloop.callbacks.learning_rate import LearningRateScheduler
from offloop.callbacks.metric_logger import MetricLogger
from offloop.callbacks.model_checkpoint import ModelCheckpoint
from offloop.callbacks.progress_bar import ProgressBar

__all__ = ["EarlyStopping", "LearningRateScheduler", "MetricLogger", "ModelCheckpoint", "ProgressBar"]
