"""From losses per record to a gradient: the one function that privacy would exchange."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Tree = Any


class RecordLosses(struct.PyTreeNode):
    """What an objective returns: one loss a record and that record's share of the global denominator.

    Attributes:
      losses: one entry a record, any shape; summed over the record's tokens, not averaged.
      weights: same shape; the record's tokens (or 1), 0 for padding records.
      metrics: {name: (sum, count)}, both () float32; a metric is its global sum over its global count.
    """

    losses: Array
    weights: Array
    metrics: dict[str, tuple[Array, Array]]


# (trainable, frozen, batch) -> RecordLosses
Objective = Callable[[Tree, Tree, Tree], RecordLosses]
# (trainable, frozen, batch) -> (gradient shaped like trainable, float32 or wider; metrics)
GradientFunction = Callable[[Tree, Tree, Tree], tuple[Tree, dict[str, Array]]]


def microbatches(batch: Tree, count: int) -> Tree:
    """Splits the rows of a batch: (B, ...) -> (count, B / count, ...), row i to microbatch i mod count.

    Strided, so that rows sharded in contiguous blocks stay on their devices.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch)


def plain_gradient(objective: Objective, accumulation: int = 1) -> GradientFunction:
    """The gradient of sum(losses) / sum(weights) over the whole batch.

    Numerator and denominator are summed over microbatches apart and divided once, so the result does not depend on
    `accumulation` beyond rounding. Sums and result are float32 also where parameters, and so a microbatch's gradient,
    are bfloat16: a sum in bfloat16 would stop growing at some 256 microbatches.
    """

    def total(trainable: Tree, frozen: Tree, batch: Tree) -> tuple[Array, tuple[Array, Any]]:
        out = objective(trainable, frozen, batch)
        return jnp.sum(out.losses), (jnp.sum(out.weights), out.metrics)

    differentiate = jax.grad(total, has_aux=True)

    def gradient(trainable: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, dict[str, Array]]:
        def part_sums(part: Tree) -> Tree:
            return widened(differentiate(trainable, frozen, part))

        if accumulation == 1:
            summed = part_sums(batch)
        else:
            parts = microbatches(batch, accumulation)
            shapes = jax.eval_shape(part_sums, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(carry: Tree, part: Tree) -> tuple[Tree, None]:
                return jax.tree.map(jnp.add, carry, part_sums(part)), None

            summed, _ = jax.lax.scan(add, zero, parts)
        grads, (weight, metrics) = summed
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
        return grads, mean_metrics(metrics)

    return gradient


def widened(tree: Tree) -> Tree:
    """Leaves of a shorter floating-point dtype as float32."""

    def widen(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def mean_metrics(metrics: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
    """Each metric's sum over its count."""
    return {name: value / jnp.maximum(count, 1.0) for name, (value, count) in metrics.items()}
