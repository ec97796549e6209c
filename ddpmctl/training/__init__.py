"""Training runs: the plan, the training loop, the log and resuming."""
