"""Checkpoints of a run as a whole: taking, naming, uploading, finding and loading them."""
