"""Curves: columns of numbers, what viewers see of them at any zoom, and files that keep them."""
