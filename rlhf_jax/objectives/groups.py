"""Advantages without a critic: an answer against the other answers to its prompt, or against the batch."""

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.ppo import gae

Array = jax.Array
GRPO_EPSILON = 1e-4


def _from_the_first(rewards: Array) -> Array:
    """Rewards less their group's first one: no advantage changes, and equal rewards are 0 without rounding."""
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 answers to compare, got {rewards.shape[1]}")
    rewards = rewards.astype(jnp.float32)
    return rewards - rewards[:, :1]


def rloo_advantages(rewards: Array) -> Array:
    """Each reward less the mean of the other n - 1 of its group (Ahmadian et al., arXiv 2402.14740).

    Args:
      rewards: (P, n), the n answers to each of P prompts.

    Returns:
      (P, n) float32; a group of equal rewards gives exactly 0.

    Raises:
      ValueError: n is 1.
    """
    rewards = _from_the_first(rewards)
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def grpo_advantages(rewards: Array, scale: bool = True) -> Array:
    """Each reward less its group's mean, over its group's deviation (Shao et al., arXiv 2402.03300, section 4.1.2).

    The deviation is the unbiased one (n - 1) plus 1e-4, as TRL has it. The paper writes "std" and leaves the divisor
    open; verl and OpenRLHF take n - 1 as well and add 1e-6 and 1e-9. With theirs, published learning rates carry over.

    Args:
      rewards: (P, n), the n answers to each of P prompts.
      scale: divide by the deviation. False is Dr. GRPO (Liu et al., arXiv 2503.20783), which does not favour prompts
        whose answers score nearly alike.

    Returns:
      (P, n) float32; a group of equal rewards gives exactly 0.

    Raises:
      ValueError: n is 1.
    """
    rewards = _from_the_first(rewards)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + GRPO_EPSILON) if scale else centred


def reinforce_returns(rewards: Array, mask: Array, gamma: float = 1.0) -> Array:
    """Discounted returns to go, G_t = r_t + gamma G_{t+1}, where t + 1 is the next step inside the mask.

    Whitened over the global batch with `whiten` they are REINFORCE++'s advantages (Hu et al., arXiv 2501.03262).

    Args:
      rewards: (B, T) per token, the KL penalty included.
      mask: (B, T), true on real steps.
      gamma: discount.

    Returns:
      (B, T) float32, 0 where masked.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, lam=1.0)[0]
