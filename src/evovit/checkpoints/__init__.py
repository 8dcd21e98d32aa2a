"""Reduced models on disk, and checkpoints of the official implementations."""
