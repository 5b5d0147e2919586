"""Samples that people look at: texts, pictures and tables that a run publishes, and the files that hold them."""
