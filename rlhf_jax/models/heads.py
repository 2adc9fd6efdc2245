"""Scalar heads: one number a token from the final hidden state, for value, reward (and later cost)."""

import jax
import jax.numpy as jnp

Array = jax.Array
AXES = {"kernel": (None, None), "bias": (None,)}


def init_head(width: int, scale: float, *, key: Array) -> dict[str, Array]:
    """A head {"kernel": (width, 1), "bias": (1,)} with kernel N(0, scale^2) and zero bias, float32.

    A reward head takes scale 1/sqrt(width + 1) (Stiennon et al., arXiv 2009.01325), a value head beside it 0.
    """
    return {"kernel": scale * jax.random.normal(key, (width, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def apply_head(head: dict[str, Array], hidden: Array) -> Array:
    """hidden (B, T, width) -> (B, T) float32.

    The head's leaves take one more leading axis (R, ...) where R divides B, as those of `dense.low_rank` do: rows
    i * B / R ... (i + 1) * B / R - 1 use head i.
    """
    kernel, hidden = head["kernel"], hidden.astype(jnp.float32)
    if kernel.ndim == 2:
        return jnp.dot(hidden, kernel)[..., 0] + head["bias"][0]
    groups = hidden.reshape(kernel.shape[0], -1, hidden.shape[-1])  # (R, B/R * T, width)
    return (jnp.einsum("gtd,gdo->gto", groups, kernel) + head["bias"][:, None])[..., 0].reshape(hidden.shape[:-1])
