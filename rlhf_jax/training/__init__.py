"""Train state, gradient functions, the loop, checkpoints and metrics."""
