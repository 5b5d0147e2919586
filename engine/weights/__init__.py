"""Weights in and out: files, checkpoints, the registry of models, and comparing them."""
