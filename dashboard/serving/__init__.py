"""Serving: the port, the built page, and who may use it."""
