"""The Gaussian over a scorer's weights, and the variance it gives to a gradient.

The posterior is N(weights, (H + precision)^-1), H the curvature of the log-likelihood. In every structure H is zero
outside the span of some orthonormal directions and diagonal in them, which gives one formula (`variance`).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.uncertainty.jacobians import Blocks

Array = jax.Array
exact = jax.lax.Precision.HIGHEST


class Kronecker(NamedTuple):
    """H of one block: diagonal in the directions u_i v_j' of each layer.

    Attributes:
      large: (layers, d, n), orthonormal columns u_i, n <= d.
      small: (layers, r, r), orthonormal columns v_j.
      curvature: (layers, n, r).
    """

    large: Array
    small: Array
    curvature: Array


class Diagonal(NamedTuple):
    """H of one block as its diagonal: curvature (layers, d, r)."""

    curvature: Array


class Dual(NamedTuple):
    """H of all blocks together, exact: one direction for each term of the training data.

    Attributes:
      basis: {block: (n, layers, d, r)}, the orthonormal directions' parts; a row of zeros is none.
      curvature: (n,).
    """

    basis: Blocks
    curvature: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("factors", "precision", "scale", "temperature", "variance_scale"),
    meta_fields=("scope",),
)
@dataclasses.dataclass(frozen=True)
class Posterior:
    """The posterior of one scorer.

    Attributes:
      factors: {block: `Kronecker` or `Diagonal`}, or a `Dual`.
      precision: of the prior: {block: (layers,)}, or () of a `Dual`.
      scale: (), what the head's kernel was divided by after training: H and precision are of the undivided one.
      temperature: (), what scores are divided by in a probability.
      variance_scale: (), what variances are multiplied with.
      scope: "all" or "head".
    """

    factors: Any
    precision: Any
    scale: Array
    temperature: Array
    variance_scale: Array
    scope: str


def precisions(factors: Any, precision: Any) -> Any:
    """One precision, or {layer number or "head": precision}, in the form of `Posterior.precision`."""
    if isinstance(factors, Dual):
        return jnp.asarray(precision, jnp.float32)
    out = {}
    for name, factor in factors.items():
        layers = factor.curvature.shape[0]
        keys = ["head"] if name == "head" else list(range(layers))
        each = [precision[key] if isinstance(precision, dict) else precision for key in keys]
        out[name] = jnp.asarray(each, jnp.float32)
    return out


def coordinates(factor: Kronecker, gradient: Array) -> Array:
    """A gradient (..., layers, d, r) in the block's directions: (..., layers, n, r)."""
    half = jnp.einsum("...ldr,ldn->...lnr", gradient, factor.large, precision=exact)
    return jnp.einsum("...lnr,lrs->...lns", half, factor.small, precision=exact)


def variance(factors: Any, precision: Any, gradient: Blocks) -> Array:
    """The variance of a linear function of the weights: g' (H + precision)^-1 g.

    With C the coordinates of the gradient G in a block's directions, c their curvature and s2 = 1 / precision:

        s2 (|G|^2 - |C|^2) + sum_ij C_ij^2 / (c_ij + 1 / s2)

    Args:
      factors, precision: of a `Posterior`.
      gradient: {block: (..., layers, d, r)}.

    Returns:
      (...) float32.
    """
    if isinstance(factors, Dual):
        pairs = [(factors.basis[name], g) for name, g in gradient.items()]
        along = sum(jnp.einsum("nldr,...ldr->...n", q, g, precision=exact) for q, g in pairs)
        squares = sum(jnp.sum(jnp.square(g), axis=(-3, -2, -1)) for g in gradient.values())
        outside = jnp.maximum(squares - jnp.sum(jnp.square(along), axis=-1), 0.0)
        return outside / precision + jnp.sum(jnp.square(along) / (factors.curvature + precision), axis=-1)
    parts = [_block_variance(factor, precision[name], gradient[name]) for name, factor in factors.items()]
    return sum(parts[1:], parts[0])


def _block_variance(factor: Any, precision: Array, gradient: Array) -> Array:
    shared = precision[:, None, None]
    if isinstance(factor, Diagonal):
        return jnp.sum(jnp.square(gradient) / (factor.curvature + shared), axis=(-3, -2, -1))
    squares = jnp.square(coordinates(factor, gradient))
    inside = jnp.sum(squares / (factor.curvature + shared), axis=(-3, -2, -1))
    if factor.large.shape[-1] == factor.large.shape[-2]:
        return inside
    outside = jnp.sum(jnp.square(gradient), axis=(-2, -1)) - jnp.sum(squares, axis=(-2, -1))
    return inside + jnp.sum(jnp.maximum(outside, 0.0) / precision, axis=-1)
