"""Fixed workloads, one JSON line each: `python -m rlhf_jax.bench NAME`."""
