"""Viewers: what each connection has received and is due, and what it asks for."""
