"""Each unit's gradient norm from one backward pass over the whole batch, for full training (Bu et al., 2210.00038).

The gradient of a kernel is, of each unit, the product of what went in and of the gradient of what came out. Its norm
needs no gradient a unit: the weights are `Tapped`, and the pass itself tells the norms. What clipping needs besides are
either the two sides of every product, kept until the norms are known, or a second backward pass.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import current_platform
from rlhf_jax.objectives.language_model import output_gradient, tied_products
from rlhf_jax.objectives.records import Objective
from rlhf_jax.objectives.taps import (
    Factors,
    KernelTap,
    LookupTap,
    OutputTap,
    Tapped,
    Uses,
    exact,
    factors_are_smaller,
    floored,
    lookup_squares,
    scattered,
    squared,
)

Array = jax.Array
Tree = Any

LARGEST_ID = 1 << 24  # ids travel in float32


class Leaf(NamedTuple):
    """A trainable leaf and how the objective uses it.

    Attributes:
      kind: "kernel" (layers, d_in, d_out), "table" (looked up, or an output kernel, or both), "small" (a norm, a bias:
        each unit has its copy), "layers" (small, stacked), or "copies" (adapters and heads, which take a leading axis).
      weight: the leaf.
      uses: what a trace saw of it.
    """

    kind: str
    weight: Array
    uses: Uses

    def used(self, how: str) -> tuple[Any, ...]:
        """The facts of its one use of that kind; () where there is none."""
        return next((tuple(facts) for name, *facts in self.uses.seen if name == how), ())

    @property
    def big(self) -> bool:
        return self.kind in ("kernel", "table")


def leaves_of(objective: Objective, trainable: Tree, frozen: Tree, batch: Tree) -> list[Leaf]:
    """The trainable leaves in their order in the tree, with what a trace of the objective saw of each.

    Raises:
      ValueError: a leaf of an unknown kind, or one that is used twice in the same way: norms of parts of its gradient
        would not add up.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(trainable)
    leaves = [Leaf(leaf_kind(path, weight), weight, Uses()) for path, weight in paths]
    seen = [leaf.weight if leaf.kind == "copies" else Tapped(leaf.weight, None, leaf.uses) for leaf in leaves]
    jax.eval_shape(objective, jax.tree.unflatten(tree, seen), frozen, batch)
    for (path, _), leaf in zip(paths, leaves, strict=True):
        names = [name for name, *_ in leaf.uses.seen]
        if leaf.big and len(set(names)) < len(names):
            raise ValueError(f"{jax.tree_util.keystr(path)} is used more than once: use another back end")
        if leaf.used("lookup") and leaf.weight.shape[0] > LARGEST_ID:
            raise ValueError(f"{jax.tree_util.keystr(path)} has more than {LARGEST_ID} entries: use another back end")
    return leaves


def leaf_kind(path: tuple[Any, ...], weight: Any) -> str:
    """The kind of a trainable leaf, as `Leaf` tells them.

    Raises:
      ValueError: it is no leaf of a decoder, of adapters or of a head.
    """
    keys = [getattr(entry, "key", None) for entry in path]
    if "base" in keys:
        if "layers" in keys:
            return "kernel" if weight.ndim == 3 else "layers"
        return "table" if weight.ndim == 2 else "small"
    if {"adapters", "head"} & set(keys):
        return "copies"
    raise ValueError(
        f"gradients of decoders, adapters and heads can be kept apart, not of {jax.tree_util.keystr(path)}"
    )


def computed_in_float32(leaves: list[Leaf]) -> bool:
    """Whether products are float32's own: not of bfloat16 numbers, nor rounded to such by an accelerator."""
    dtypes = [facts[2] for leaf in leaves if leaf.kind == "kernel" for facts in leaf.uses.seen]
    return current_platform() == "cpu" and all(dtype == jnp.float32 for dtype in dtypes)


def tap_of(leaf: Leaf, units: int, keep: bool) -> Any:
    """Zeros for the leaf's tap; with `keep` it holds the gradients themselves."""
    shape, zeros = leaf.weight.shape, partial(jnp.zeros, dtype=jnp.float32)
    if leaf.kind == "layers":
        return zeros((shape[0], units, *shape[1:]))
    if not leaf.big:
        return zeros((units, *shape))
    if leaf.kind == "kernel":
        return _kernel_tap(leaf, units, keep) if leaf.uses.seen else None
    tap: dict[str, Any] = {}
    if found := leaf.used("lookup"):
        tap["lookup"] = LookupTap(zeros(found), zeros((*found, shape[1])))
    if found := leaf.used("output"):
        hidden, dtype, *_ = found
        tap["output"] = OutputTap(zeros(units), jnp.zeros(hidden, dtype), *[zeros(hidden[:2])] * 5)
    return tap


def _kernel_tap(leaf: Leaf, units: int, keep: bool) -> KernelTap:
    layers, d_in, d_out = leaf.weight.shape
    inputs, dtype = leaf.used("kernel")
    kept: Any = None
    if keep and factors_are_smaller(math.prod(inputs[:-1]) // units, d_in, d_out):
        kept = Factors(jnp.zeros((layers, *inputs), dtype), jnp.zeros((layers, *inputs[:-1], d_out), dtype))
    elif keep:
        kept = jnp.zeros((layers, units, d_in, d_out), jnp.float32)
    return KernelTap(jnp.zeros((layers, units), jnp.float32), kept)


def tapped(leaf: Leaf, weight: Array, tap: Any) -> Any:
    """The leaf as the objective takes it."""
    return weight + tap if leaf.kind == "copies" else Tapped(weight, tap)


def squares_of(leaf: Leaf, shown: Any, units: int) -> Array:
    """(units,) squared norms of each unit's gradient of the leaf, from what its tap shows."""
    if leaf.kind == "layers":
        return jnp.sum(jnp.square(shown), axis=(0, *range(2, shown.ndim)))
    if not leaf.big:
        return squared(shown)
    if leaf.kind == "kernel":
        return jnp.sum(shown.squares, axis=0) if shown else jnp.zeros(units, jnp.float32)
    parts = []
    if "lookup" in shown:
        parts.append(lookup_squares(shown["lookup"], units))
    if "output" in shown:
        parts.append(shown["output"].squares)
    total = sum(parts, jnp.zeros(units, jnp.float32))
    if len(parts) == 2:
        temperature, softcap = leaf.used("output")[2:]
        ids = shown["lookup"].ids.astype(jnp.int32)
        both = (ids, shown["lookup"].gradients, shown["output"])
        total += 2 * tied_products(leaf.weight, *both, temperature, softcap)
        total = floored(total, jnp.sqrt(parts[0]) + jnp.sqrt(parts[1]))
    return total


def sum_of(leaf: Leaf, shown: Any, factors: Array) -> Array:
    """The sum of the units' gradients times their factors, float32, from what a tap has kept.

    Args:
      factors: (units,); a unit whose factor is 0 is left out, whatever its gradient is.
    """
    units = factors.shape[0]
    if leaf.kind == "layers":
        shown = jnp.moveaxis(shown, 1, 0)
    if not leaf.big:
        return jnp.sum(_scaled(shown, factors), axis=0)
    if leaf.kind == "kernel":
        return _kernel_sum(shown.kept, factors) if shown else jnp.zeros(leaf.weight.shape, jnp.float32)
    total = jnp.zeros(leaf.weight.shape, jnp.float32)
    if "lookup" in shown:
        ids, gradients = shown["lookup"]
        each = jnp.repeat(factors, ids.shape[0] // units)
        total += scattered(total.shape, ids.astype(jnp.int32), _scaled(gradients, each))
    if "output" in shown:
        tied = "lookup" in shown
        kernel = leaf.weight.T if tied else leaf.weight
        added = output_gradient(kernel, shown["output"], factors, *leaf.used("output")[2:])
        total += added.T if tied else added
    return total


def over_units(factor: Array, leaf: Array) -> Array:
    """A factor (units,) with the number of axes of a leaf (units, ...)."""
    return factor.reshape(-1, *[1] * (leaf.ndim - 1))


def _scaled(x: Array, factors: Array) -> Array:
    """x (n, ...) times factors (n,), in float32; 0 where the factor is, whatever x is."""
    factors = over_units(factors, x)
    return jnp.where(factors == 0, 0.0, x.astype(jnp.float32) * factors)


def _kernel_sum(kept: Any, factors: Array) -> Array:
    """(layers, d_in, d_out), one layer after the other."""

    def layer(_: None, kept: Any) -> tuple[None, Array]:
        if not isinstance(kept, Factors):
            return None, jnp.sum(_scaled(kept, factors), axis=0)
        each = jnp.repeat(factors, kept.inputs.shape[0] // factors.shape[0])
        rows = tuple(range(kept.inputs.ndim - 1))
        inputs = _scaled(kept.inputs, each != 0)
        return None, exact(inputs, _scaled(kept.gradients, each), ((rows, rows), ((), ())))

    return jax.lax.scan(layer, None, kept)[1]
