"""The lifetime of one run: its thread, its process-wide settings, its outcome."""
