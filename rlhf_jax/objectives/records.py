"""What an objective returns: one loss a record; plain and private gradients are made of nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


class RecordLosses(NamedTuple):
    """One loss a record and that record's share of the global denominator.

    Attributes:
      losses: one entry a record, any shape with the batch's rows in front; summed over the record's tokens, not
        averaged.
      weights: same shape; the record's tokens (or 1), 0 for padding records.
      metrics: {name: (sum, count)}, both () float32; a metric is its global sum over its global count.
    """

    losses: Array
    weights: Array
    metrics: dict[str, tuple[Array, Array]]


# (trainable, frozen, batch) -> RecordLosses
Objective = Callable[[Tree, Tree, Tree], RecordLosses]


def microbatches(batch: Tree, count: int) -> Tree:
    """Splits the rows of a batch: (B, ...) -> (count, B / count, ...), row i to microbatch i mod count.

    Strided, so that rows sharded in contiguous blocks stay on their devices.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch)
