"""Callbacks at work on the event loop: their tasks, their costs, and the event log on the disk."""
