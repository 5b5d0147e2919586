"""Saved copies: runs in one HTML file, which shows them without a server."""
