"""The training loop, its optimiser and schedule, and the checkpoints of a run."""
