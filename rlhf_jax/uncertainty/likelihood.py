"""The likelihood of a record's scores as logistic terms: what was observed, and how curved its logarithm is.

A term looks at the scores s (A,) of a record's answers along a direction u: its log-likelihood is log sigmoid(y u.s),
with y = 1 or -1 what was observed. Its curvature is p (1 - p) along u with p = sigmoid(u.s), whatever y is, so the
generalized Gauss-Newton matrix of all records is the sum of p (1 - p) (sum_a u_a J_a)' (sum_a u_a J_a).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Terms(NamedTuple):
    """The K terms of B records at their scores; all (B, K) float32.

    Attributes:
      log_likelihood: nats; 0 where a term is absent.
      slopes: derivatives of the log-likelihood along the direction.
      curvatures: p (1 - p); 0 where absent.
      present: 1 or 0.
    """

    log_likelihood: Array
    slopes: Array
    curvatures: Array
    present: Array


def directions(answers: int, signs: bool) -> np.ndarray:
    """(K, A) directions: of two answers their difference first; then, with `signs`, each answer alone.

    Raises:
      ValueError: single answers without signs say nothing.
    """
    if answers == 1 and not signs:
        raise ValueError("single answers without safety labels have no likelihood")
    pair = [[1.0, -1.0]] if answers == 2 else []
    alone = np.eye(answers).tolist() if signs else []
    return np.asarray([*pair, *alone], np.float32)


def terms(scores: Array, batch: dict[str, Array]) -> Terms:
    """The terms of records along `directions(A, "unsafe" in batch)`.

    Args:
      scores: (B, A); of two the preferred (or more harmful) answer first.
      batch: "weight" (B,), 0 of padding; where signs are terms "unsafe" (B, A) and "labelled" (B,) bool.
    """
    along = scores @ directions(scores.shape[1], "unsafe" in batch).T
    signs, present = jnp.ones_like(along), jnp.ones_like(along)
    if "unsafe" in batch:
        first = along.shape[1] - scores.shape[1]
        signs = signs.at[:, first:].set(jnp.where(batch["unsafe"], 1.0, -1.0))
        present = present.at[:, first:].set(jnp.broadcast_to(batch["labelled"][:, None], scores.shape))
    present = present * (batch["weight"][:, None] > 0)
    probability = jax.nn.sigmoid(along)
    return Terms(
        present * jax.nn.log_sigmoid(signs * along),
        present * signs * jax.nn.sigmoid(-signs * along),
        present * probability * jax.nn.sigmoid(-along),
        present,
    )
