"""Differential privacy: what a noisy run spends, and how much noise a budget asks for."""

from rlhf_jax.privacy.accounting import epsilon, noise_multiplier

__all__ = ["epsilon", "noise_multiplier"]
