"""Weights whose use shows each unit's own gradient: what per-unit clipping of full training reads of a backward pass.

A leaf of the weights may be a `Tapped`: the weight with a tap beside it, zeros that change no result. Where the weight
is used, the tap's cotangent becomes what that use tells about each unit's gradient. Units are equal groups of
consecutive rows. A use hidden from the tap would be missing in a norm, so uses are counted (`Tapped.uses`) beforehand.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Uses:
    """What a trace saw of a weight: one entry for every use."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "tap"), meta_fields=("uses",))
class Tapped:
    """A weight and its tap.

    Attributes:
      weight: the leaf itself, in float32 where its own gradient is asked for.
      tap: copies (units, ...) of a small leaf's zeros, or by the kind of use `KernelTap`, {"lookup": LookupTap},
        {"output": OutputTap}; None: nothing is shown.
      uses: where uses are counted.
    """

    def __init__(self, weight: Array, tap: Any = None, uses: Uses | None = None) -> None:
        self.weight, self.tap, self.uses = weight, tap, uses

    def used(self, *facts: Any) -> None:
        if self.uses is not None:
            self.uses.seen.append(facts)


class Factors(NamedTuple):
    """The gradient of a kernel as the two sides of its product: of unit i sum over its positions of input x gradient.

    Attributes:
      inputs: (rows, ..., d_in); gradients: (rows, ..., d_out).
    """

    inputs: Array
    gradients: Array


class KernelTap(NamedTuple):
    """Of a kernel (d_in, d_out).

    Attributes:
      squares: (units,) float32, squared norms of each unit's gradient.
      kept: the gradients themselves: None, `Factors`, or (units, d_in, d_out) float32.
    """

    squares: Array
    kept: Any = None


class LookupTap(NamedTuple):
    """Of a table (entries, width) that ids look up: ids (rows, T) as float32, gradients (rows, T, width) float32."""

    ids: Array
    gradients: Array


class OutputTap(NamedTuple):
    """Of an output kernel (width, vocabulary), whose gradient is sum over positions of hidden x d logits.

    Attributes:
      squares: (units,) float32, squared norms of each unit's gradient.
      hidden: (rows, N, width).
      targets, log_total, entropy, logprob_gradients, entropy_gradients: (rows, N) float32: all that d logits needs.
    """

    squares: Array
    hidden: Array
    targets: Array
    log_total: Array
    entropy: Array
    logprob_gradients: Array
    entropy_gradients: Array


class Moments(NamedTuple):
    """Second moments of an adapter x @ a @ b, sums over positions; m is a side's own width, or a sketch's.

    Attributes:
      inputs: (d_in, m), of x.
      inner: (rank, rank), of x @ a.
      inner_gradients: (rank, rank), of the gradient of x @ a.
      gradients: (d_out, m), of the output's gradient.
    """

    inputs: Array
    inner: Array
    inner_gradients: Array
    gradients: Array


class MomentTap(NamedTuple):
    """What an adapter's backward pass is asked for besides gradients.

    Attributes:
      mask: (rows, T) float32, which positions count.
      input_sketch, output_sketch: (d_in, m) and (d_out, m), what moments of the large sides are multiplied with; None:
        they are kept whole.
      moments: zeros, whose cotangent becomes the moments.
    """

    mask: Array
    input_sketch: Array | None
    output_sketch: Array | None
    moments: Moments


# Gradients in all directions add up to 1 / positions of that, and Gram matrices serve for some thousands of them.
LEAST_SQUARE = 1e-4


def factors_are_smaller(positions: int, d_in: int, d_out: int) -> bool:
    """Whether a unit's gradient of a kernel is smaller as `Factors` than as a matrix.

    The same inequality says whether its norm costs fewer FLOPs as a product of Gram matrices, 2 positions^2 (d_in +
    d_out), than by making the matrix, 2 positions d_in d_out.
    """
    return positions * (d_in + d_out) < d_in * d_out


exact = partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def by_unit(x: Array, units: int) -> Array:
    """(rows, ..., d) -> (units, positions of a unit, d)."""
    return x.reshape(units, -1, x.shape[-1])


def gram(x: Array) -> Array:
    """(units, P, d) -> (units, P, P) float32, products of all pairs of positions."""
    return exact(x, x, (((2,), (2,)), ((0,), (0,))))


def gram_squares(x: Array, g: Array) -> Array:
    """(units,) squared norms of each unit's sum over positions of x_t g_t', from the `gram` matrices of both.

    Where the positions' gradients cancel, what is left of their sum is rounding: the least that is told is
    `LEAST_SQUARE` of what it were if they added up. A unit so may be clipped more than needed, never much less.
    """
    each = jnp.sqrt(jnp.maximum(_diagonal(x) * _diagonal(g), 0.0))
    return floored(jnp.sum(x * g, axis=(1, 2)), jnp.sum(each, axis=1))


def floored(squares: Array, added_up: Array) -> Array:
    """Squares (units,) of norms that came of a sum, at least a share of `added_up` (units,) squared."""
    return jnp.maximum(squares, LEAST_SQUARE * jnp.square(added_up))


def _diagonal(x: Array) -> Array:
    return jnp.diagonal(x, axis1=1, axis2=2)


def unit_products(x: Array, g: Array) -> Array:
    """(units, P, d_in) and (units, P, d_out) -> (units, d_in, d_out) float32."""
    return exact(x, g, (((1,), (1,)), ((0,), (0,))))


def squared(x: Array) -> Array:
    """(units, ...) -> (units,), sums of squares in float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def finite(x: Array) -> Array:
    """x with 0 for what is not finite.

    Where a clipped sum is a second backward pass, the cotangent of a unit that does not count is 0; the pass makes of
    it 0, or NaN where the unit's numbers are not finite.
    """
    return jnp.where(jnp.isfinite(x), x, 0)


def kernel_tap(x: Array, g: Array, units: int, keep: bool) -> KernelTap:
    """What the use of a kernel on x (rows, ..., d_in), with output gradient g (rows, ..., d_out), shows."""
    rows, grads = by_unit(x, units), by_unit(g, units)
    if factors_are_smaller(rows.shape[1], x.shape[-1], g.shape[-1]):
        return KernelTap(gram_squares(gram(rows), gram(grads)), Factors(x, g) if keep else None)
    matrices = unit_products(rows, grads)
    return KernelTap(squared(matrices), matrices if keep else None)


def second_moment(x: Array, mask: Array, sketch: Array | None = None) -> Array:
    """The sum over the positions that count of x_t x_t' (d, d) of x (rows, T, d), or that times a sketch (d, m)."""
    x = jnp.where(mask[..., None] > 0, x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    right = x if sketch is None else exact(x, sketch, (((1,), (0,)), ((), ())))
    return exact(x, right, (((0,), (0,)), ((), ())))


def per_row(leaf: Any, x: Array) -> Any:
    """A small leaf (d,) as it meets x (rows, ..., d): itself, or with a tap (rows, 1, ..., d), each unit its copy."""
    if not isinstance(leaf, Tapped):
        return leaf
    leaf.used("small")
    if leaf.tap is None:
        return leaf.weight
    copies = jnp.repeat(leaf.weight + leaf.tap, x.shape[0] // leaf.tap.shape[0], axis=0)
    return copies.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)


def look_up(table: Any, ids: Array) -> Array:
    """Rows `ids` (rows, T) of a table (entries, width): (rows, T, width), NaN for an id that is none."""
    if not isinstance(table, Tapped):
        return jnp.take(table, ids, axis=0)
    table.used("lookup", *ids.shape)
    return (
        jnp.take(table.weight, ids, axis=0) if table.tap is None else _look_up(table.weight, ids, table.tap["lookup"])
    )


@jax.custom_vjp
def _look_up(table: Array, ids: Array, tap: LookupTap) -> Array:
    return jnp.take(table, ids, axis=0)


def _look_up_forward(table: Array, ids: Array, tap: LookupTap) -> tuple[Array, tuple[Array, Array]]:
    return _look_up(table, ids, tap), (table, ids)


def _look_up_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None, LookupTap]:
    table, ids = residuals
    dtable = scattered(table.shape, ids, finite(g)).astype(table.dtype)
    return dtable, None, LookupTap(ids.astype(jnp.float32), g.astype(jnp.float32))


_look_up.defvjp(_look_up_forward, _look_up_backward)


def scattered(shape: tuple[int, ...], ids: Array, gradients: Array) -> Array:
    """The gradient of a table of that shape, float32, from the gradients of the rows that ids looked up."""
    return jnp.zeros(shape, jnp.float32).at[ids].add(gradients.astype(jnp.float32), mode="drop")


def lookup_squares(tap: LookupTap, units: int) -> Array:
    """(units,) squared norms of each unit's gradient of a table: gradients of equal ids are added first."""

    def one(ids: Array, gradients: Array) -> Array:
        first = jnp.argmax(ids[:, None] == ids[None, :], axis=1)
        return jnp.sum(jnp.square(jax.ops.segment_sum(gradients, first, ids.shape[0])))

    return jax.vmap(one)(tap.ids.reshape(units, -1), by_unit(tap.gradients, units))
