"""The KL penalty that holds a policy to its reference: estimates at sampled tokens, rewards, and the controller."""

import jax
import jax.numpy as jnp

Array = jax.Array
# float32's exp overflows at 88.7, and a squared gradient norm at half of that
LARGEST_EXPONENT = 20.0


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str) -> Array:
    """Estimates of KL(pi || pi_ref) from tokens sampled by pi (J. Schulman, "Approximating KL divergence", 2020).

    With d = log pi - log pi_ref:

    - "k1": d, unbiased, of either sign;
    - "k2": d^2 / 2, never negative, biased;
    - "k3": exp(-d) - 1 + d, unbiased and never negative. Where d < -20 the exponential goes on as its tangent, so
      values and gradients stay finite and keep their direction.

    These are statements about values. What a gradient through an estimate follows is told by `kl_gradient`.

    Args:
      logprobs, ref_logprobs: (B, T) of the sampled tokens, float.
      estimator: "k1" | "k2" | "k3".

    Returns:
      (B, T) nats.

    Raises:
      ValueError: another estimator.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    if estimator == "k3":
        exponent = jnp.minimum(-d, LARGEST_EXPONENT)
        tangent = jnp.exp(exponent) * (-d - exponent)
        return jnp.expm1(exponent) + tangent + d
    raise ValueError(f'the estimators are "k1", "k2" and "k3", not "{estimator}"')


def kl_gradient(estimator: str, place: str) -> str:
    """What the expected gradient of an estimate is the gradient of, for samples of pi itself.

    An estimate in the reward is a constant r there, and the policy gradient is E[r grad log pi]. An estimate in the
    loss is differentiated, E[grad k]. Neither is the gradient of E[k], which is their sum:

    - k1 in the reward: E[d grad log pi], the gradient of the reverse KL(pi || pi_ref);
    - k2 in the loss: d grad log pi again, so the same expectation;
    - k3 in the loss: E[(1 - pi_ref / pi) grad log pi], the gradient of the forward KL(pi_ref || pi);
    - k1 in the loss: E[grad log pi] = 0;
    - k3 in the reward: the reverse KL's gradient less the forward KL's, so no KL's; nor is k2's in the reward.

    In the reward a token's estimate also credits the tokens before it, so with returns to go k1 has the gradient of
    the whole answer's KL. In the loss each token's estimate moves its own distribution alone, at the prefixes that pi
    has reached: the KLs of next tokens, summed.

    Args:
      estimator: "k1" | "k2" | "k3".
      place: "reward" | "loss".

    Returns:
      "reverse KL", "forward KL", or "no KL: another regularizer".

    Raises:
      ValueError: k1 in the loss, or an unknown name.
    """
    if estimator not in ("k1", "k2", "k3") or place not in ("reward", "loss"):
        raise ValueError(f'"{estimator}" in the "{place}": estimators are k1, k2 and k3, places reward and loss')
    if (estimator, place) == ("k1", "loss"):
        raise ValueError("k1 in the loss has an expected gradient of 0: put it in the reward, or take k2 or k3")
    if (estimator, place) in (("k1", "reward"), ("k2", "loss")):
        return "reverse KL"
    return "forward KL" if place == "loss" else "no KL: another regularizer"


def kl_penalized_rewards(
    scores: Array, logprobs: Array, ref_logprobs: Array, lengths: Array, kl_coef: Array | float, estimator: str = "k1"
) -> Array:
    """Per-token rewards: -kl_coef times the KL estimate, and the score on the last real token.

    With k1 the policy gradient of the penalty is that of the reverse KL (`kl_gradient`).

    Args:
      scores: (B,), float or integer.
      logprobs, ref_logprobs: (B, T) of the sampled tokens.
      lengths: (B,) tokens of each answer, its stop token included.
      kl_coef: () or a number, at least 0.
      estimator: "k1" | "k2" | "k3".

    Returns:
      (B, T) float32, 0 beyond each length.
    """
    steps = jnp.arange(logprobs.shape[1])
    inside = steps < lengths[:, None]
    last = steps == lengths[:, None] - 1
    penalty = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator).astype(jnp.float32)
    # cast before it is placed: peers have cut scores to integers here
    return jnp.where(inside, penalty, 0.0) + jnp.where(last, scores.astype(jnp.float32)[:, None], 0.0)


def adaptive_kl_step(
    kl_coef: Array | float, kl: Array | float, target: float, horizon: float, samples: int, clip: float = 0.2
) -> Array:
    """The proportional controller of the KL coefficient (Ziegler et al., arXiv 1909.08593, section 2.2).

    kl_coef (1 + clip(kl / target - 1, -clip, clip) samples / horizon).

    Args:
      kl_coef: () now.
      kl: () measured, nats an answer: summed over tokens, the mean over answers.
      target: nats an answer.
      horizon: answers in which an error held at 1 would double the coefficient, were it not clipped.
      samples: answers that kl was measured on.
      clip: largest relative error that is acted on.

    Returns:
      () the next kl_coef.
    """
    error = jnp.clip(kl / target - 1.0, -clip, clip)
    return kl_coef * (1.0 + error * samples / horizon)
