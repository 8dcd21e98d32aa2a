"""Files, processes, seeds and environment of a run."""
