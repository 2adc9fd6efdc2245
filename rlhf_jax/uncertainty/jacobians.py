"""Gradients of each record's scores by the weights that are uncertain: adapters and the head's kernel.

A block is one matrix of every layer, its large side first: {"q_a": (layers, d_in, rank), "q_b": (layers, d_out, rank),
..., "head": (1, width, 1)}. The head's bias is left out: it cancels in every difference of scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.roles import RoleSpec, Weights, hidden_states

Array = jax.Array
Blocks = dict[str, Any]  # block -> array
HEAD = "head"


def blocks_of(adapters: dict[str, Any] | None, kernel: Array) -> Blocks:
    """Adapters (unscaled, or their gradients) and a head's kernel as blocks; leaves may have leading axes."""
    out: Blocks = {}
    for target, leaf in (adapters or {}).items():
        out[f"{target}_a"], out[f"{target}_b"] = leaf["a"], jnp.swapaxes(leaf["b"], -1, -2)
    return {**out, HEAD: jnp.expand_dims(kernel, -3)}


def uncertain(weights: Weights, scope: str, scale: Array | float) -> Blocks:
    """The weights of the blocks, with the head that was trained: `scale` times the calibrated one's kernel."""
    return blocks_of(weights.get("adapters") if scope == "all" else None, weights["head"]["kernel"] * scale)


def last_states(spec: RoleSpec, weights: Weights, tokens: Array, lengths: Array) -> Array:
    """The final hidden state of each answer's last token: tokens (B, A, T), lengths (B, A) -> (B, A, width)."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    hidden = hidden_states(spec, weights, rows, keep=lengths.reshape(-1, 1) - 1)
    return hidden.reshape(*lengths.shape, -1)


def scores_of(weights: Weights, states: Array) -> Array:
    """The head's scores of states (B, A, width): (B, A) float32."""
    kernel, bias = weights["head"]["kernel"], weights["head"]["bias"]
    return jnp.dot(states.astype(jnp.float32), kernel)[..., 0] + bias[0]


def gradients(
    spec: RoleSpec,
    weights: Weights,
    tokens: Array,
    lengths: Array,
    directions: np.ndarray,
    *,
    scope: str,
    scale: Array | float,
) -> tuple[Array, Blocks]:
    """Scores, and gradients of their combinations by the uncertain weights: one pass back for each direction.

    The model reads a copy of the adapters for each record, so the gradient of the sum over records with respect to the
    copies is each record's own. Of scope "head" no pass goes back through the layers.

    Args:
      tokens (B, A, T), lengths (B, A): each record's answers.
      directions: (K, A).
      scale: what the head's kernel was divided by after training; gradients are those of the undivided scores.

    Returns:
      scores (B, A) of the head as it is, and {block: (B, K, layers, large, small)}, all float32.
    """
    records = tokens.shape[0]
    if scope == "head":
        states = last_states(spec, weights, tokens, lengths)
        pulled = None
    else:
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (records, *leaf.shape)), weights["adapters"])
        states, back = jax.vjp(
            lambda adapters: last_states(spec, {**weights, "adapters": adapters}, tokens, lengths), copies
        )
        kernel = weights["head"]["kernel"][:, 0] * scale
        each = [back(jnp.broadcast_to(u[:, None] * kernel, states.shape).astype(states.dtype))[0] for u in directions]
        pulled = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).astype(jnp.float32), *each)
    along = jnp.einsum("ka,baw->bkw", directions, states.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return scores_of(weights, states), blocks_of(pulled, along[..., None])
