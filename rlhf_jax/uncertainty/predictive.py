"""What the posterior says of scores: mean and variance of the linearized model (Yang et al., arXiv 2402.13210).

The mean is the model's own score. The variance is that of the score's first-order expansion in the uncertain weights,
J (H + precision)^-1 J', with the Jacobian contracted where it is made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.uncertainty.jacobians import Blocks, gradients
from rlhf_jax.uncertainty.posterior import Posterior, variance

Array = jax.Array
Rows = tuple[Array, Array]  # tokens (B, T) int32 and lengths (B,)
ALONE, DIFFERENCE = np.ones((1, 1), np.float32), np.asarray([[1.0, -1.0]], np.float32)


def score_moments(
    spec: RoleSpec, weights: Weights, posterior: Posterior, tokens: Array, lengths: Array
) -> tuple[Array, Array]:
    """Mean and variance of each row's score.

    Preferences do not say where a prompt's scores lie, only their differences: this variance holds that offset's too.

    Args:
      weights: of the role; `posterior` is of it.
      tokens: (B, T) int32; lengths: (B,).

    Returns:
      mean (B,), what `rollout.scoring.last_scores` gives, and variance (B,), both float32.
    """
    scores, gradient = _along(spec, weights, posterior, tokens[:, None], lengths[:, None], ALONE)
    return scores[:, 0], _scaled(posterior, gradient)


def relative_moments(
    spec: RoleSpec, weights: Weights, posterior: Posterior, tokens: Array, lengths: Array, reference: Rows
) -> tuple[Array, Array]:
    """Mean of each answer's score, and the variance of its difference to a reference answer of the same prompt.

    What preferences leave open, where a prompt's scores lie, is not in this variance.

    Args:
      tokens: (B, T) int32, the answers' rows; lengths: (B,).
      reference: tokens (B, T) and lengths (B,) of the reference answers' rows, or one row, which is then all answers'.

    Returns:
      mean (B,) of the answers' scores and variance (B,), float32.
    """
    scores, gradient = _along(spec, weights, posterior, tokens[:, None], lengths[:, None], ALONE)
    others, other_lengths = reference
    _, theirs = _along(spec, weights, posterior, others[:, None], other_lengths[:, None], ALONE)
    difference = {name: g - theirs[name] for name, g in gradient.items()}
    return scores[:, 0], _scaled(posterior, difference)


def difference_moments(
    spec: RoleSpec, weights: Weights, posterior: Posterior, tokens: Array, lengths: Array
) -> tuple[Array, Array]:
    """Mean and variance of the first answer's score less the second's: a pair, or an answer and its reference.

    Args:
      tokens: (B, 2, T) int32; lengths: (B, 2).

    Returns:
      mean (B,) and variance (B,), float32.
    """
    scores, gradient = _along(spec, weights, posterior, tokens, lengths, DIFFERENCE)
    return scores[:, 0] - scores[:, 1], _scaled(posterior, gradient)


def moments_by_precision(
    spec: RoleSpec, weights: Weights, posterior: Posterior, precisions: Any, tokens: Array, lengths: Array
) -> tuple[Array, Array]:
    """What the posterior of each of several priors says of records, from one pass over them.

    Args:
      precisions: `Posterior.precision` with a leading axis of G.
      tokens: (B, A, T) int32; lengths: (B, A). Of two answers it is their difference.

    Returns:
      mean (B,) and variance (G, B), float32.
    """
    direction = DIFFERENCE if lengths.shape[1] == 2 else ALONE
    scores, gradient = _along(spec, weights, posterior, tokens, lengths, direction)

    def of(precision: Any) -> Array:
        return _scaled(dataclasses.replace(posterior, precision=precision), gradient)

    return scores @ direction[0], jax.vmap(of)(precisions)


def _along(
    spec: RoleSpec, weights: Weights, posterior: Posterior, tokens: Array, lengths: Array, directions: np.ndarray
) -> tuple[Array, Blocks]:
    scores, gradient = gradients(
        spec, weights, tokens, lengths, directions, scope=posterior.scope, scale=posterior.scale
    )
    return scores, {name: g[:, 0] for name, g in gradient.items()}


def _scaled(posterior: Posterior, gradient: Blocks) -> Array:
    found = variance(posterior.factors, posterior.precision, gradient)
    return found * posterior.variance_scale / jnp.square(posterior.scale)
