"""Engines outside PyTorch's eager mode: a model written as a file, proven against eager, and run."""
