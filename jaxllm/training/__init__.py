"""State, optimiser, step, loop, checkpoints, logs and configs."""
