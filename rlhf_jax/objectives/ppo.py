"""PPO's mathematics (Schulman et al., arXiv 1707.06347 and 1506.02438; Ziegler et al., arXiv 1909.08593)."""

import jax
import jax.numpy as jnp

Array = jax.Array
LARGEST_LOG_RATIO = 20.0


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


def sequence_logprobs(logprobs: Array, mask: Array) -> Array:
    """Each answer's mean log-probability over its tokens, repeated on them; 0 where masked.

    The difference of new and old ones is the log of the sequence's ratio to the power 1 / length, so through
    `ppo_policy_loss` they give GSPO (Zheng et al., arXiv 2507.18071), which clips whole answers.

    Args:
      logprobs: (B, T) of the sampled tokens.
      mask: (B, T), true on real tokens.

    Returns:
      (B, T).
    """
    keep = mask.astype(bool)
    total = jnp.sum(jnp.where(keep, logprobs, 0.0), axis=1, keepdims=True)
    count = jnp.maximum(jnp.sum(keep, axis=1, keepdims=True), 1)
    return jnp.where(keep, total / count, 0.0)


def ppo_policy_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, clip_ratio: float = 0.2, dual_clip: float = 0.0
) -> Array:
    """max(-A ratio, -A clip(ratio, 1 - clip_ratio, 1 + clip_ratio)) for each token.

    Args:
      logprobs, old_logprobs: (B, T) of the sampled tokens; the ratio is exp(logprobs - old_logprobs), at most exp(20).
      advantages: (B, T).
      clip_ratio: how far from 1 a ratio may go before it earns no more.
      dual_clip: where A < 0 the loss is at most -A dual_clip, so a token that has become far likelier costs no more
        (Ye et al., arXiv 1912.09729); above 1, or 0 for none.

    Returns:
      (B, T).
    """
    # float32's exp overflows at 88.7, and 0 times its infinity is NaN in the gradient
    ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, LARGEST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    if not dual_clip:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)


def ppo_value_loss(values: Array, old_values: Array, returns: Array, clip_range: float = 0.2) -> Array:
    """1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2) for each token, all (B, T)."""
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
