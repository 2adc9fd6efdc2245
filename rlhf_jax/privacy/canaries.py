"""Canaries of a privacy audit: units of the batch whose gradient is one coordinate, far above the clip norm.

They go through the real back end, clip and noise as every unit does; an audit reads the noisy sum along their
coordinates.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives.records import Objective, RecordLosses
from rlhf_jax.objectives.taps import Tapped
from rlhf_jax.privacy.bookkeeping import leaf_kind

Array = jax.Array
Tree = Any

MATRICES = ("kernel", "table")  # kinds of leaves


class Coordinates(NamedTuple):
    """Entries of a tree: `leaf` (n,) is the number among its leaves, `offset` (n,) the place in the flattened leaf."""

    leaf: np.ndarray
    offset: np.ndarray


def choose_coordinates(tree: Tree, count: int, rng: np.random.Generator, backend: str = "vmap") -> Coordinates:
    """`count` distinct entries of a tree of arrays or shapes, each set as likely as any other.

    Args:
      backend: of the clipped sum. "bookkeeping" and "ghost" know the gradients of a decoder's matrices by the uses that
        the model makes of them: for these the entries are of other leaves alone.

    Raises:
      ValueError: there are fewer entries.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    barred = [backend in ("bookkeeping", "ghost") and leaf_kind(path, leaf) in MATRICES for path, leaf in leaves]
    ends = np.cumsum([0 if bar else math.prod(leaf.shape) for bar, (_, leaf) in zip(barred, leaves, strict=True)])
    chosen = rng.choice(ends[-1], count, replace=False)
    number = np.searchsorted(ends, chosen, side="right")
    return Coordinates(number, chosen - np.concatenate([[0], ends])[number])


def projections(tree: Tree, coordinates: Coordinates) -> Array:
    """The entries of a tree of arrays, (n,) float32, in the order of the coordinates."""
    return _entries(tree, coordinates, [leaf.shape for leaf in jax.tree.leaves(tree)])


def _entries(tree: Tree, coordinates: Coordinates, shapes: list[tuple[int, ...]]) -> Array:
    """(n,) entries; (units, n) where the leaves are copies for every unit, of one axis more than their shape has."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Tapped))
    parts, places = [], []
    for number in np.unique(coordinates.leaf):
        here = np.flatnonzero(coordinates.leaf == number)
        shape = shapes[number] or (1,)
        entry = np.unravel_index(coordinates.offset[here], shape)
        leaf = _copies(*leaves[number])
        leaf = leaf.reshape(*leaf.shape[: leaf.ndim - len(shapes[number])], *shape)
        parts.append(leaf[(..., *entry)].astype(jnp.float32))
        places.append(here)
    return jnp.concatenate(parts, axis=-1)[..., np.argsort(np.concatenate(places))]


def _copies(path: Any, leaf: Any) -> Array:
    """A leaf; where it is tapped, each unit's copy of it (units, ...)."""
    if not isinstance(leaf, Tapped):
        return leaf
    kind = leaf_kind(path, leaf.weight)
    if kind in MATRICES:
        raise ValueError(f"this back end takes no canary in {jax.tree_util.keystr(path)}: choose coordinates for it")
    leaf.used("small")
    if leaf.tap is None:
        return leaf.weight
    axis = 1 if kind == "layers" else 0
    return jnp.moveaxis(jnp.expand_dims(leaf.weight, axis) + leaf.tap, axis, 0)


def with_canaries(objective: Objective, trainable: Tree, coordinates: Coordinates, scale: float) -> Objective:
    """The objective with batches of {"rows": the objective's own, "canary": (rows,) int32, -1 for a real row}.

    The loss of a canary's row is `scale` times its coordinate of the trainable tree, with weight 1 for every entry: the
    gradient is `scale` along the coordinate. Metrics are the objective's, so its rows at canaries should be padding.

    Args:
      objective: its losses at a canary's rows must have finite derivatives, as padding has.
      trainable: arrays or shapes, to tell leaves that are a copy for each unit.
      scale: far above the clip norm.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(trainable)]

    def extended(weights: Tree, frozen: Tree, batch: Tree) -> RecordLosses:
        losses, counts, metrics = objective(weights, frozen, batch["rows"])
        canary = batch["canary"]
        values = _entries(weights, coordinates, shapes)
        if values.ndim == 1:
            own = values[canary]
        else:
            unit = jnp.arange(len(canary)) // (len(canary) // len(values))
            own = values[unit, canary]
        axes = (-1, *[1] * (losses.ndim - 1))
        is_canary = (canary >= 0).reshape(axes)
        return RecordLosses(
            jnp.where(is_canary, scale * own.reshape(axes), losses), jnp.where(is_canary, 1.0, counts), metrics
        )

    return extended
