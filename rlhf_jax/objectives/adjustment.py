"""What a score that knows its uncertainty is worth to a policy that is chosen or trained by it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
KINDS = ("none", "std", "variance", "worst")


class Moments(NamedTuple):
    """What a scorer says of answers; (B,) float32 each, None where it does not know.

    Of an ensemble `variance` is that of the equal mixture of its members: the mean of their variances and the
    (population) variance of their means.
    """

    mean: Array
    variance: Array | None = None
    lowest: Array | None = None  # of an ensemble's means
    highest: Array | None = None


def mixture(means: Array, variances: Array | None = None, offsets: Array | None = None) -> Moments:
    """The moments of an ensemble whose members say `means` (M, B), and `variances` (M, B) where they know their own.

    Args:
      offsets: (M, B), what the members say of a reference answer; then only the differences to it are uncertain, and
        the lowest and highest differences stand on the mean of the offsets.
    """
    level = 0.0 if offsets is None else jnp.mean(offsets, axis=0)
    differing = means if offsets is None else means - offsets + level
    spread = jnp.var(differing, axis=0)
    variance = spread if variances is None else spread + jnp.mean(variances, axis=0)
    return Moments(jnp.mean(means, axis=0), variance, jnp.min(differing, axis=0), jnp.max(differing, axis=0))


def adjusted(moments: Moments, kind: str, k: Array | float, sign: Array | float = 1.0) -> Array:
    """The score (B,) to select or train by; one that does not know its uncertainty stays its mean.

        none: mean    std: mean - s k sqrt(variance)    variance: mean - s k variance    worst: least of s times means

    For a Gaussian score the variance form is its certainty equivalent: -(1 / (2 k)) log E exp(-2 k score).

    Args:
      kind: one of `KINDS`.
      k: at least 0; without a part in "worst".
      sign: s, 1 of what is sought (a reward) and -1 of what is avoided (a cost): uncertainty counts against both.

    Reference: Coste et al., arXiv 2310.02743 (worst, variance); Yang et al., arXiv 2402.13210 (std, variance).
    """
    if kind == "worst" and moments.lowest is not None and moments.highest is not None:
        return jnp.where(jnp.asarray(sign) >= 0, moments.lowest, moments.highest)
    if kind in ("none", "worst") or moments.variance is None:
        return moments.mean
    penalty = jnp.sqrt(moments.variance) if kind == "std" else moments.variance
    return moments.mean - sign * k * penalty
