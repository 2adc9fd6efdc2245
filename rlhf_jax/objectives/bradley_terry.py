"""The Bradley-Terry model of pairwise preference."""

import jax


def bradley_terry_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(chosen - rejected) for rewards (B,) and (B,); ln 2 where they are equal. Returns (B,) nats."""
    return jax.nn.softplus(rejected - chosen)
