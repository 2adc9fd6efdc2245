"""The dense product with its backward pass written out, and low-rank adapters beside it.

One primitive carries every projection of the decoder. Writing its backward pass out has two uses: XLA's CPU back end
fuses the automatic transpose of ``x @ w`` into a scalar transposing copy (a whole training step takes 1.6 times as
long), and this is the one place where a projection's input and output gradient meet.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.models.quantized import is_quantized, plain
from rlhf_jax.objectives.taps import KernelTap, Moments, MomentTap, Tapped, finite, kernel_tap, per_row, second_moment

Array = jax.Array


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """`x @ w` for x (..., d_in) and w (d_in, d_out), accumulated in float32, returned in x's dtype."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w), (x, w)


def _matmul_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    dx = matmul(g, w.T)
    product = partial(lax.dot_general, dimension_numbers=((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    # The left side is copied transposed on a CPU: the narrower one. Without the barrier XLA turns the product back.
    dw = product(x, g) if w.shape[0] <= w.shape[1] else lax.optimization_barrier(product(g, x)).T
    return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def frozen_matmul(x: Array, kernel: Any) -> Array:
    """`x @ w` for a quantized kernel (d_in, d_out), which gets no gradient: `matmul` with its numbers in x's dtype.

    The backward pass computes them again: were they saved, a scan over layers would hold them for the whole stack.
    """
    return matmul(x, plain(kernel, x.dtype))


def _frozen_forward(x: Array, kernel: Any) -> tuple[Array, Any]:
    return frozen_matmul(x, kernel), kernel


def _frozen_backward(kernel: Any, g: Array) -> tuple[Array, None]:
    return matmul(g, plain(kernel, g.dtype).T), None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def tapped_matmul(x: Array, kernel: Tapped) -> Array:
    """`x @ kernel.weight`; the backward pass also gives the kernel's tap what it shows of each unit's gradient."""
    kernel.used("kernel", x.shape, x.dtype)
    if kernel.tap is None:
        return matmul(x, kernel.weight.astype(x.dtype))
    return _tapped_matmul(kernel.tap.squares.shape[0], kernel.tap.kept is not None, x, kernel.weight, kernel.tap)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tapped_matmul(units: int, keep: bool, x: Array, w: Array, tap: KernelTap) -> Array:
    return matmul(x, w.astype(x.dtype))


def _tapped_forward(units: int, keep: bool, x: Array, w: Array, tap: KernelTap) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w.astype(x.dtype)), (x, w)


def _tapped_backward(
    units: int, keep: bool, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array, KernelTap]:
    x, w = residuals
    dx = matmul(g, w.astype(g.dtype).T)
    _, dw = _matmul_backward((finite(x), w), finite(g))
    return dx, dw, kernel_tap(x, g, units, keep)


_tapped_matmul.defvjp(_tapped_forward, _tapped_backward)


def _groups(x: Array, count: int) -> Array:
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


@jax.custom_vjp
def grouped_matmul(x: Array, w: Array) -> Array:
    """`matmul` of x (B, T, d_in) with a matrix for each equal group of rows, w (R, d_in, d_out).

    Its backward pass saves x itself: projections that read the same x save it once, as those without groups do.
    """
    y = jnp.einsum("gbti,gio->gbto", _groups(x, w.shape[0]), w, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[-1])


def _grouped_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return grouped_matmul(x, w), (x, w)


def _grouped_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    dx = grouped_matmul(g, jnp.swapaxes(w, 1, 2))
    rows, grads = _groups(x, w.shape[0]), _groups(g, w.shape[0])
    dw = jnp.einsum("gbti,gbto->gio", rows, grads, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
def _tapped_low_rank(x: Array, a: Array, b: Array, plan: tuple[Any, ...], moments: Moments) -> Array:
    return matmul(matmul(x, a), b)


def _tapped_low_rank_forward(
    x: Array, a: Array, b: Array, plan: tuple[Any, ...], moments: Moments
) -> tuple[Array, tuple[Any, ...]]:
    return matmul(matmul(x, a), b), (x, a, b, plan)


def _tapped_low_rank_backward(
    residuals: tuple[Any, ...], g: Array
) -> tuple[Array, Array, Array, tuple[None, None, None], Moments]:
    x, a, b, (mask, input_sketch, output_sketch) = residuals
    inner = matmul(x, a)
    d_inner, db = _matmul_backward((inner, b), g)
    dx, da = _matmul_backward((x, a), d_inner)
    moments = Moments(
        second_moment(x, mask, input_sketch),
        second_moment(inner, mask),
        second_moment(d_inner, mask),
        second_moment(g, mask, output_sketch),
    )
    return dx, da, db, (None, None, None), moments


_tapped_low_rank.defvjp(_tapped_low_rank_forward, _tapped_low_rank_backward)


def low_rank(x: Array, a: Array, b: Array, tap: MomentTap | None = None) -> Array:
    """`x @ a @ b` for x (B, T, d_in), with one adapter for all rows or one for each equal group of rows.

    Args:
      x: (B, T, d_in).
      a: (d_in, rank), or (R, d_in, rank) where R divides B: rows i * B / R ... (i + 1) * B / R - 1 use adapter i.
        R = B is one adapter a record, R = number of roles or ensemble members stacks those along the rows.
      b: (rank, d_out) or (R, rank, d_out).
      tap: of one adapter for all rows: the backward pass also gives it the second moments of what it sees.

    Returns:
      (B, T, d_out) in x's dtype.
    """
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    if tap is not None:
        return _tapped_low_rank(x, a, b, (tap.mask, tap.input_sketch, tap.output_sketch), tap.moments)
    if a.ndim == 2:
        return matmul(matmul(x, a), b)
    return grouped_matmul(grouped_matmul(x, a), b)


def project(x: Array, kernel: Any, bias: Array | None = None, adapter: dict[str, Any] | None = None) -> Array:
    """One projection of the decoder: `x @ kernel (+ bias) (+ x @ a @ b)`.

    Args:
      x: (B, T, d_in).
      kernel: (d_in, d_out), cast to x's dtype; or a quantized one (`models.quantized`), which is frozen; or `Tapped`.
      bias: (d_out,) or None.
      adapter: {"a", "b"} and perhaps "tap" as `low_rank` takes them, b already scaled, or None.
    """
    if is_quantized(kernel):
        y = frozen_matmul(x, kernel)
    else:
        y = tapped_matmul(x, kernel) if isinstance(kernel, Tapped) else matmul(x, kernel.astype(x.dtype))
    if bias is not None:
        y = y + per_row(bias, y).astype(x.dtype)
    if adapter is not None:
        y = y + low_rank(x, adapter["a"], adapter["b"], adapter.get("tap"))
    return y
