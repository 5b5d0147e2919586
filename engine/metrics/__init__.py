"""Metrics over one pass of a data set, and names for logged values."""
