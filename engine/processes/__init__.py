"""Callbacks in processes: a child process for each callback with `runs_in = "process"`, and both ends of its socket."""
