"""From losses per record to a gradient: the one function that `privacy.gradient` exchanges."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.objectives.records import Objective, microbatches

Array = jax.Array
Tree = Any


# (trainable, frozen, batch) -> (gradient shaped like trainable, float32 or wider; metrics)
GradientFunction = Callable[[Tree, Tree, Tree], tuple[Tree, dict[str, Array]]]


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


def member_gradients(gradient: GradientFunction) -> GradientFunction:
    """Each member's own gradient on its own rows, in one pass over what they share.

    Trainable leaves and gradients have the members in front, a batch's columns (B, members, ...) have them behind the
    rows. Metrics are means over the members.
    """

    def gradients(trainable: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, dict[str, Array]]:
        each, metrics = jax.vmap(gradient, in_axes=(0, None, 1))(trainable, frozen, batch)
        return each, jax.tree.map(partial(jnp.mean, axis=0), metrics)

    return gradients


def widened(tree: Tree) -> Tree:
    """Leaves of a shorter floating-point dtype as float32."""

    def widen(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def mean_metrics(metrics: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
    """Each metric's sum over its count."""
    return {name: value / jnp.maximum(count, 1.0) for name, (value, count) in metrics.items()}
