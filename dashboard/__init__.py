"""The live page: what a run shows in a browser, and how it is steered from there."""

from offloop.dashboard.callback import Dashboard

__all__ = ["Dashboard"]
