"""Runs: what the page knows of each run, whether this process trains it or a run directory tells of it."""
