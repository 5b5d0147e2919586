"""Client: a run on another machine or in another process, watched and steered by a program. Imports no torch."""
