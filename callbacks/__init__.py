"""Callbacks: what most runs want beside the training itself, built on the engine's public names."""

from offloop.callbacks.metric_logger import MetricLogger
from offloop.callbacks.progress_bar import ProgressBar

__all__ = ["MetricLogger", "ProgressBar"]
