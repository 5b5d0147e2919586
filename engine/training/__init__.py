"""The training loop and what it does within a step, in the training thread."""
