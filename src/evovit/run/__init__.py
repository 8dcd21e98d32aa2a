"""Recipe -> numbers: training, evaluation, checkpoints, benchmarks, reports."""
