"""Answers from a policy: sampling them and scoring them."""

from rlhf_jax.rollout.generate import Rollout, generate
from rlhf_jax.rollout.refill import generate_refilled
from rlhf_jax.rollout.sampling import Sampling, checkpoint_sampling

__all__ = ["Rollout", "Sampling", "checkpoint_sampling", "generate", "generate_refilled"]
