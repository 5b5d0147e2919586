"""Batches: sample counts, transfer to the device, seeded sampling, random states, loader workers."""
