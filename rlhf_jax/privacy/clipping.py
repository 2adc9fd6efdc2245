"""The sum of clipped gradients, one a privacy unit: what differential privacy adds its noise to.

A unit is what privacy hides: a record, or several rows that belong together. All trainable weights of all roles are one
vector, so one norm bounds what a unit can change anywhere. An objective may read nothing across units.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.objectives.records import Objective, RecordLosses, microbatches
from rlhf_jax.privacy.bookkeeping import (
    computed_in_float32,
    leaf_kind,
    leaves_of,
    over_units,
    squares_of,
    sum_of,
    tap_of,
    tapped,
)

Array = jax.Array
Tree = Any

Bounds = float | Mapping[str, float]  # one for the whole vector, or one for each top-level part of the trainable tree

ROUNDING_MARGIN = 1e-6  # relative, of the clip norm: above what float32 does to a norm and to a scaled gradient
COARSE_MARGIN = 2.0**-7  # where gradients are made a second time from numbers of 8 to 11 bits


class Clipped(NamedTuple):
    """What a batch's units add up to.

    Attributes:
      total: float32, shaped like trainable; no more than `sensitivity` of it comes from any unit.
      norms: (units,) float32, each unit's norm before the clip: 0 where absent, infinite where it was not finite.
      losses: (units,) float32, each unit's own loss; 0 where absent.
    """

    total: Tree
    norms: Array
    losses: Array


# (trainable, frozen, batch, present (units,) bool) -> Clipped
ClippedSum = Callable[[Tree, Tree, Tree, Array], Clipped]


def sensitivity(clip_norm: Bounds) -> float:
    """How far one unit can move a clipped sum: the bound, or the root of the parts' squared bounds."""
    return math.sqrt(sum(bound**2 for bound in clip_norm.values())) if isinstance(clip_norm, Mapping) else clip_norm


def clipped_sum(
    objective: Objective, clip_norm: Bounds, *, backend: str = "vmap", accumulation: int = 1, units_rows: int = 1
) -> ClippedSum:
    """The sum over units of min(1, clip_norm / |g|) g, with g the gradient of a unit's own loss (Abadi et al., 2016).

    A unit's loss is the sum of its rows' losses over the sum of its rows' weights: no other unit is in it. A unit that
    is absent counts zero, and so does one whose loss or gradient is not finite. Microbatches run one after the other,
    unit i in microbatch i mod `accumulation`, and one without any present unit is skipped.

    Args:
      objective: of `units_rows` * units rows; rows i * units_rows ... (i + 1) * units_rows - 1 are unit i.
      clip_norm: C above 0; infinity clips nothing. Of several parts, such as a policy and its critic, each part of g is
        clipped to its own.
      backend: a name of `BACKENDS`.
      accumulation: how many microbatches; a divisor of the number of units. With "bookkeeping" a microbatch runs in
        parts (`book_parts`).

    Returns:
      The function (trainable, frozen, batch, present) -> `Clipped`.

    Raises:
      UserError: a clip norm that is not above 0.
      ValueError: an unknown back end, or units that do not divide over the microbatches (when called).
    """
    for bound in clip_norm.values() if isinstance(clip_norm, Mapping) else (clip_norm,):
        if not bound > 0:
            raise UserError(f"clip_norm is {bound:g}: give a norm above 0")
    if backend not in BACKENDS:
        raise ValueError(f'unknown back end "{backend}" of clipped gradients: one of {", ".join(BACKENDS)}')
    part_sum = BACKENDS[backend](objective, clip_norm, units_rows)

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> Clipped:
        units = present.shape[0]
        if units % accumulation:
            raise ValueError(f"{units} units do not divide over {accumulation} microbatches")
        count = accumulation * (book_parts(units // accumulation) if backend == "bookkeeping" else 1)
        zero = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), trainable)

        def add(total: Tree, inputs: tuple[Tree, Array]) -> tuple[Tree, tuple[Array, Array]]:
            part, here = inputs

            def added() -> tuple[Tree, tuple[Array, Array]]:
                more = part_sum(trainable, frozen, part, here)
                return jax.tree.map(jnp.add, total, more.total), (more.norms, more.losses)

            nothing = jnp.zeros(here.shape, jnp.float32)
            return jax.lax.cond(jnp.any(here), added, lambda: (total, (nothing, nothing)))

        parts = microbatches(jax.tree.map(lambda x: _by_unit(x, units_rows), batch), count)
        parts = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), parts)  # rows again
        total, figures = jax.lax.scan(add, zero, (parts, microbatches(present, count)))
        return Clipped(total, *(x.T.reshape(-1) for x in figures))

    return summed


def choose_backend(trainable: Tree, config: TransformerConfig, positions: int) -> str:
    """The cheapest back end: a name of `BACKENDS`.

    "adapters" where nothing else trains. Else "vmap" where a gradient for each unit adds less than 15 % to what a plain
    step saves of it, as its FLOPs are those of a plain step; or where a leaf is not a decoder's. Else "bookkeeping", or
    with remat "ghost", which saves no more than a plain step does.

    Args:
      trainable: arrays or shapes.
      config: of the decoder that trains.
      positions: of a unit: its rows, times those the objective makes of each (2 for a pair), times their length.
    """
    try:
        kinds = {leaf_kind(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
    except ValueError:
        return "vmap"
    if kinds == {"copies"}:
        return "adapters"
    c = config
    layer = 5 * c.width + 2 * (c.heads + c.kv_heads) * c.head_dim + (2 if c.gated else 1) * c.ffn
    layer += c.heads * positions  # attention's weights
    saved = c.layers * layer if c.remat == "none" else c.layers * c.width + layer  # floats a position
    if sum(leaf.size for leaf in jax.tree.leaves(trainable)) < 0.15 * saved * positions:
        return "vmap"
    return "bookkeeping" if c.remat == "none" else "ghost"


def book_parts(units: int) -> int:
    """In how many parts "bookkeeping" runs a microbatch: the least divisor of a device's units from 3 on, else of all.

    What is kept until the norms are known is as large as what a plain step saves: all at once a microbatch of workload
    W took 1.3 to 1.9 times the memory of a plain step, in four parts less than it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    here = units // shards if units % shards == 0 else 1
    return next((parts for parts in range(3, here + 1) if here % parts == 0), here)


def _by_unit(x: Array, rows: int) -> Array:
    """(units * rows, ...) -> (units, rows, ...)."""
    return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])


def _unit_losses(out: RecordLosses, units: int) -> Array:
    """(units,) losses, each over the unit's own weight; 0 for a unit of weight 0."""
    losses, weights = (x.reshape(units, -1).sum(-1) for x in (out.losses, out.weights))
    return losses / jnp.where(weights == 0, 1.0, weights)


def by_part(clip_norm: Bounds, tree: Tree) -> list[tuple[float, Tree]]:
    """(bound, the part of the tree that it clips) for every bound."""
    if not isinstance(clip_norm, Mapping):
        return [(clip_norm, tree)]
    return [(bound, tree[name]) for name, bound in clip_norm.items()]


def clip_factors(norms: Array, counts: Array, clip_norm: float, margin: float = ROUNDING_MARGIN) -> Array:
    """What gradients of the given norms are multiplied with: (units,), 0 where a unit does not count.

    As the gradient of a unit that does not count may be infinite, it must be masked and not only multiplied.
    """
    bound = clip_norm * (1.0 - margin)
    factors = jnp.where(norms <= bound, 1.0, bound / norms)  # an infinite bound is above every finite norm
    return jnp.where(counts, factors, 0.0)


def whole_norms(squares: Sequence[Array], losses: Array, present: Array) -> tuple[Array, Array]:
    """From each part's squared norms: whether a unit counts, and its norm as it is reported, both (units,)."""
    norms = jnp.sqrt(sum(squares))
    finite = jnp.isfinite(losses) & jnp.isfinite(norms)
    return finite & present, jnp.where(present, jnp.where(finite, norms, jnp.inf), 0.0)


def _clip_and_sum(losses: Array, grads: Tree, present: Array, clip_norm: Bounds) -> Clipped:
    """The clipped sum of gradients that stand in leaves (units, ...).

    Products and sums are elementwise: a matrix product would round to bfloat16 or TF32 on an accelerator, and a norm
    could end above the clip.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def square(part: Tree) -> Array:
        each = [jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(part)]
        return sum(each[1:], each[0])

    squares = [square(part) for _, part in by_part(clip_norm, grads)]
    counts, norms = whole_norms(squares, losses, present)

    def total(part: Tree, squared: Array, bound: float) -> Tree:
        factors = clip_factors(jnp.sqrt(squared), counts, bound)
        return jax.tree.map(
            lambda g: jnp.sum(jnp.where(over_units(counts, g), g, 0.0) * over_units(factors, g), axis=0), part
        )

    totals = [
        total(part, squared, bound) for (bound, part), squared in zip(by_part(clip_norm, grads), squares, strict=True)
    ]
    whole = dict(zip(clip_norm, totals, strict=True)) if isinstance(clip_norm, Mapping) else totals[0]
    return Clipped(whole, norms, jnp.where(present, losses, 0.0))


def _vmap_sum(objective: Objective, clip_norm: Bounds, rows: int) -> ClippedSum:
    """One gradient a unit, from batches of that unit alone: for any trainable tree, units times its size in memory."""

    def loss(trainable: Tree, frozen: Tree, unit: Tree) -> tuple[Array, Array]:
        losses = _unit_losses(objective(trainable, frozen, unit), 1)
        return losses[0], losses[0]

    gradients = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, None, 0))

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> Clipped:
        grads, losses = gradients(trainable, frozen, jax.tree.map(lambda x: _by_unit(x, rows), batch))
        return _clip_and_sum(losses, grads, present, clip_norm)

    return summed


def _adapters_sum(objective: Objective, clip_norm: Bounds, rows: int) -> ClippedSum:
    """One pass over the whole microbatch, with a copy of the adapters and heads for each unit.

    The model reads them with a leading axis, so the gradient of the summed loss with respect to the copies is each
    unit's own. It costs what a plain gradient costs, whatever the layers save or compute again.
    """

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> Clipped:
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


def _tapped_sum(objective: Objective, clip_norm: Bounds, rows: int, *, keep: bool) -> ClippedSum:
    """One pass over the whole microbatch that gives each unit's norm; then the sum of what it kept, or a second pass.

    The second pass goes backward only, from what the forward pass saved: a unit's loss times its factor has the clipped
    gradient.
    """

    def summed(trainable: Tree, frozen: Tree, batch: Tree, present: Array) -> Clipped:
        units, tree = present.shape[0], jax.tree.structure(trainable)
        leaves = leaves_of(objective, trainable, frozen, batch)
        weights = [leaf.weight.astype(jnp.float32) for leaf in leaves]
        taps = [tap_of(leaf, units, keep) for leaf in leaves]

        def unit_losses(weights: list[Array], taps: list[Any]) -> Array:
            whole = [tapped(*parts) for parts in zip(leaves, weights, taps, strict=True)]
            return _unit_losses(objective(jax.tree.unflatten(tree, whole), frozen, batch), units)

        margin = ROUNDING_MARGIN if computed_in_float32(leaves) else COARSE_MARGIN
        losses, backward = jax.vjp(unit_losses, weights, taps)
        _, shown = backward(jnp.ones_like(losses))
        squares = [squares_of(leaf, show, units) for leaf, show in zip(leaves, shown, strict=True)]
        parts = by_part(clip_norm, jax.tree.unflatten(tree, squares))
        part_squares: list[Array] = [sum(jax.tree.leaves(part), jnp.zeros(units)) for _, part in parts]
        counts, norms = whole_norms(part_squares, losses, present)

        def total(bound: float, squared: Array) -> Tree:
            factors = clip_factors(jnp.sqrt(squared), counts, bound, margin)
            second = [None] * len(leaves) if keep else backward(factors)[0]
            summed = [
                sum_of(leaf, show, factors) if keep or not leaf.big else again
                for leaf, show, again in zip(leaves, shown, second, strict=True)
            ]
            return jax.tree.unflatten(tree, summed)

        totals = [total(bound, squared) for (bound, _), squared in zip(parts, part_squares, strict=True)]
        if isinstance(clip_norm, Mapping):
            whole: Tree = {name: each[name] for name, each in zip(clip_norm, totals, strict=True)}
        else:
            whole = totals[0]
        return Clipped(whole, norms, jnp.where(present, losses, 0.0))

    return summed


# name -> (objective, clip norm, rows a unit) -> the clipped sum of one microbatch
BACKENDS: dict[str, Callable[[Objective, Bounds, int], ClippedSum]] = {
    "vmap": _vmap_sum,
    "adapters": _adapters_sum,
    "bookkeeping": partial(_tapped_sum, keep=True),
    "ghost": partial(_tapped_sum, keep=False),
}
