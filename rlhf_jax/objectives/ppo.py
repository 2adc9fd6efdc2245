"""PPO's mathematics (Schulman et al., arXiv 1707.06347 and 1506.02438; Ziegler et al., arXiv 1909.08593)."""

import jax
import jax.numpy as jnp

Array = jax.Array


def gae(rewards: Array, values: Array, mask: Array, gamma: float = 1.0, lam: float = 0.95) -> tuple[Array, Array]:
    """Generalized advantage estimates.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next step *inside the
    mask*: masked steps are skipped, not zeroed, so a hole does not cut the bootstrap. After a row's last step V is 0.

    Args:
      rewards, values: (B, T); values are of the state before each token.
      mask: (B, T), true on real steps.
      gamma, lam: discount and the estimator's decay.

    Returns:
      advantages (B, T) and returns = advantages + values (B, T), float32, 0 where masked.
    """
    keep = mask.astype(bool)

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]):
        next_value, next_advantage = carry
        reward, value, here = inputs
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(here, value, next_value), jnp.where(here, advantage, next_advantage))
        return carry, jnp.where(here, advantage, 0.0)

    zero = jnp.zeros(rewards.shape[0], jnp.float32)
    inputs = (rewards.astype(jnp.float32).T, values.astype(jnp.float32).T, keep.T)
    _, advantages = jax.lax.scan(step, (zero, zero), inputs, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(keep, advantages + values, 0.0)


def whiten(x: Array, mask: Array, shift_mean: bool = True) -> Array:
    """Scales x to variance 1 over all masked entries of the global batch (biased variance, as the 2019 code).

    Args:
      x, mask: (B, T).
      shift_mean: also shift to mean 0; rewards keep their mean.

    Returns:
      (B, T), 0 where masked.
    """
    keep = mask.astype(bool)
    x, weight = jnp.where(keep, x, 0.0), keep.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight), 1.0)
    mean = jnp.sum(x * weight) / total
    variance = jnp.sum(jnp.square(x - mean) * weight) / total
    whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(keep, whitened if shift_mean else whitened + mean, 0.0)


def kl_penalized_rewards(
    scores: Array, logprobs: Array, ref_logprobs: Array, lengths: Array, kl_coef: Array | float
) -> Array:
    """Per-token rewards: -kl_coef (log pi - log pi_ref), and the score on the last real token.

    This is the k1 estimate of KL(pi || pi_ref) in the reward, whose policy gradient is that of the reverse KL.

    Args:
      scores: (B,) float.
      logprobs, ref_logprobs: (B, T) of the sampled tokens.
      lengths: (B,) tokens of each answer, its stop token included.

    Returns:
      (B, T) float32, 0 beyond each length.
    """
    steps = jnp.arange(logprobs.shape[1])
    inside = steps < lengths[:, None]
    last = steps == lengths[:, None] - 1
    penalty = -kl_coef * (logprobs - ref_logprobs)
    return jnp.where(inside, penalty, 0.0) + jnp.where(last, scores.astype(jnp.float32)[:, None], 0.0)


def ppo_policy_loss(logprobs: Array, old_logprobs: Array, advantages: Array, clip_ratio: float = 0.2) -> Array:
    """max(-A ratio, -A clip(ratio, 1 - clip_ratio, 1 + clip_ratio)) for each token, all (B, T)."""
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    return jnp.maximum(-advantages * ratio, -advantages * clipped)


def ppo_value_loss(values: Array, old_values: Array, returns: Array, clip_range: float = 0.2) -> Array:
    """1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) for each token, all (B, T)."""
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
