"""rlhf_jax: RLHF in JAX, end to end: private, safe, calibrated and audited."""

__version__ = "0.1.0"
