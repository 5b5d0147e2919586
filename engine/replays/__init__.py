"""Replays: the recorded events of a run, fed to callbacks without training."""
