"""The sum of clipped gradients, one a privacy unit: what differential privacy adds its noise to.

A unit is what privacy hides: a record, or several rows that belong together. All trainable weights of all roles are one
vector, so one norm bounds what a unit can change anywhere. An objective may read nothing across units.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError

Array = jax.Array
Tree = Any

# (trainable, frozen, batch) -> losses and weights with the batch's rows in front (`training.gradient.RecordLosses`)
Objective = Callable[[Tree, Tree, Tree], Any]
# (trainable, frozen, batch, present (units,) bool) -> (sum shaped like trainable, float32; norms (units,) float32)
ClippedSum = Callable[[Tree, Tree, Tree, Array], tuple[Tree, Array]]

ROUNDING_MARGIN = 1e-6  # relative, of the clip norm: above what float32 does to a norm and to a scaled gradient


def clipped_sum(
    objective: Objective, clip_norm: float, *, backend: str = "vmap", microbatches: int = 1, units_rows: int = 1
) -> ClippedSum:
    """The sum over units of min(1, clip_norm / |g|) g, with g the gradient of a unit's own loss (Abadi et al., 2016).

    A unit's loss is the sum of its rows' losses over the sum of its rows' weights: no other unit is in it. A unit that
    is absent counts zero, and so does one whose loss or gradient is not finite. Microbatches run one after the other,
    unit i in microbatch i mod `microbatches`, and one without any present unit is skipped.

    Args:
      objective: of `units_rows` * units rows; rows i * units_rows ... (i + 1) * units_rows - 1 are unit i.
      clip_norm: C above 0; infinity clips nothing.
      backend: a name of `BACKENDS`.
      microbatches: a divisor of the number of units.

    Returns:
      A function (trainable, frozen, batch, present) -> (sum, norms): a float32 tree shaped like trainable, of no more
      than C for each unit, and each unit's norm before the clip: 0 where absent, infinite where it was not finite.

    Raises:
      UserError: a clip norm that is not above 0.
      ValueError: an unknown back end, or units that do not divide over the microbatches (when called).
    """
    if not clip_norm > 0:
        raise UserError(f"clip_norm is {clip_norm:g}: give a norm above 0")
    if backend not in BACKENDS:
        raise ValueError(f'unknown back end "{backend}" of clipped gradients: one of {", ".join(BACKENDS)}')
    part_sum = BACKENDS[backend](objective, clip_norm, units_rows)

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> tuple[Tree, Array]:
        units = present.shape[0]
        if units % microbatches:
            raise ValueError(f"{units} units do not divide over {microbatches} microbatches")
        zero = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), trainable)

        def add(total: Tree, inputs: tuple[Tree, Array]) -> tuple[Tree, Array]:
            part, here = inputs

            def added() -> tuple[Tree, Array]:
                more, norms = part_sum(trainable, frozen, part, here)
                return jax.tree.map(jnp.add, total, more), norms

            return jax.lax.cond(jnp.any(here), added, lambda: (total, jnp.zeros(here.shape, jnp.float32)))

        parts = jax.tree.map(lambda x: _split(_by_unit(x, units_rows), microbatches), batch)
        parts = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), parts)  # rows again
        total, norms = jax.lax.scan(add, zero, (parts, _split(present, microbatches)))
        return total, norms.T.reshape(-1)

    return summed


def _by_unit(x: Array, rows: int) -> Array:
    """(units * rows, ...) -> (units, rows, ...)."""
    return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])


def _split(x: Array, count: int) -> Array:
    """(units, ...) -> (count, units / count, ...), unit i to part i mod count: units stay on their devices."""
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def _unit_losses(out: Any, units: int) -> Array:
    """(units,) losses, each over the unit's own weight; 0 for a unit of weight 0."""
    losses, weights = (x.reshape(units, -1).sum(-1) for x in (out.losses, out.weights))
    return losses / jnp.where(weights == 0, 1.0, weights)


def _over(factor: Array, leaf: Array) -> Array:
    """A factor (units,) with the number of axes of a leaf (units, ...)."""
    return factor.reshape(-1, *[1] * (leaf.ndim - 1))


def clip_factors(losses: Array, norms: Array, present: Array, clip_norm: float) -> tuple[Array, Array]:
    """What each unit's gradient is multiplied with, and norms as they are reported, both (units,) float32.

    A unit that counts zero has the factor 0; as its gradient may be infinite, it must be masked by that and not only
    multiplied.
    """
    finite = jnp.isfinite(losses) & jnp.isfinite(norms)
    bound = clip_norm * (1.0 - ROUNDING_MARGIN)
    factors = jnp.where(norms <= bound, 1.0, bound / norms)  # an infinite bound is above every finite norm
    return jnp.where(finite & present, factors, 0.0), jnp.where(present, jnp.where(finite, norms, jnp.inf), 0.0)


def _clip_and_sum(losses: Array, grads: Tree, present: Array, clip_norm: float) -> tuple[Tree, Array]:
    """The clipped sum of gradients that stand in leaves (units, ...).

    Products and sums are elementwise: a matrix product would round to bfloat16 or TF32 on an accelerator, and a norm
    could end above the clip.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    squares = [jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
    factors, norms = clip_factors(losses, jnp.sqrt(sum(squares)), present, clip_norm)

    def total(g: Array) -> Array:
        factor = _over(factors, g)
        return jnp.sum(jnp.where(factor > 0, g, 0.0) * factor, axis=0)

    return jax.tree.map(total, grads), norms


def _vmap_sum(objective: Objective, clip_norm: float, rows: int) -> ClippedSum:
    """One gradient a unit, from batches of that unit alone: for any trainable tree, units times its size in memory."""

    def loss(trainable: Tree, frozen: Tree, unit: Tree) -> tuple[Array, Array]:
        losses = _unit_losses(objective(trainable, frozen, unit), 1)
        return losses[0], losses[0]

    gradients = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, None, 0))

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> tuple[Tree, Array]:
        grads, losses = gradients(trainable, frozen, jax.tree.map(lambda x: _by_unit(x, rows), batch))
        return _clip_and_sum(losses, grads, present, clip_norm)

    return summed


def _adapters_sum(objective: Objective, clip_norm: float, rows: int) -> ClippedSum:
    """One pass over the whole microbatch, with a copy of the adapters and heads for each unit.

    The model reads them with a leading axis, so the gradient of the summed loss with respect to the copies is each
    unit's own. It costs what a plain gradient costs, whatever the layers save or compute again.
    """

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> tuple[Tree, Array]:
        _check_adapters(trainable)
        units = present.shape[0]

        def loss(copies: Tree) -> tuple[Array, Array]:
            losses = _unit_losses(objective(copies, frozen, batch), units)
            return losses.sum(), losses

        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (units, *jnp.shape(leaf))), trainable)
        grads, losses = jax.grad(loss, has_aux=True)(copies)
        return _clip_and_sum(losses, grads, present, clip_norm)

    return summed


def _check_adapters(trainable: Tree) -> None:
    """Refuses leaves that take no leading axis: anything but adapters and heads."""
    for path, _ in jax.tree_util.tree_leaves_with_path(trainable):
        if not {"adapters", "head"} & {getattr(entry, "key", None) for entry in path}:
            name = jax.tree_util.keystr(path)
            raise ValueError(f'the back end "adapters" clips gradients of adapters and heads alone, not of {name}')


# name -> (objective, clip norm, rows a unit) -> the clipped sum of one microbatch
BACKENDS: dict[str, Callable[[Objective, float, int], ClippedSum]] = {"vmap": _vmap_sum, "adapters": _adapters_sum}
