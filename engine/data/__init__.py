"""Batches and where they come from: counting samples, seeded sampling, random states, loader workers."""
