"""Every parameter of the decoder: its name, shape, logical axes and initial scale, in one table.

What a config switches off is not in the table. Matrices are (d_in, d_out); the leaves of layers are stacked along a
leading axis. Initialization, shardings, adapters and checkpoint formats all read this table.
"""

import math
from typing import Any, NamedTuple

import jax

from rlhf_jax.models.config import TransformerConfig


class Leaf(NamedTuple):
    """One parameter: `axes` are logical axis names, `scale` the standard deviation it starts with.

    A scale of None starts the leaf at its neutral constant, `constant`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None
    constant: float = 0.0


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def layer_leaves(config: TransformerConfig) -> dict[str, Leaf]:
    """The leaves of one layer, without the layers axis."""
    c = config
    query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    residual = (2 * c.layers) ** -0.5  # GPT-2's scaling: the residual stream's variance stays put over depth
    out: dict[str, Leaf] = {}

    def matrix(name: str, d_in: int, d_out: int, axes: tuple[str, str], scale: float, bias: bool) -> None:
        out[name] = Leaf((d_in, d_out), axes, scale)
        if bias:
            out[f"{name}_bias"] = Leaf((d_out,), (axes[1] if axes[1] != "embed" else None,), None)

    def norm(name: str, size: int) -> None:
        out[name] = Leaf((size,), (None,), None, 1.0 - c.norm_offset)
        if c.norm == "layer":
            out[f"{name}_bias"] = Leaf((size,), (None,), None)

    norm("attention_norm", c.width)
    matrix("q", c.width, query, ("embed", "heads"), c.width**-0.5, c.qkv_bias)
    matrix("k", c.width, kv, ("embed", "kv_heads"), c.width**-0.5, c.qkv_bias)
    matrix("v", c.width, kv, ("embed", "kv_heads"), c.width**-0.5, c.qkv_bias)
    if c.qk_norm:
        out["q_norm"] = Leaf((c.head_dim,), (None,), None, 1.0 - c.norm_offset)
        out["k_norm"] = Leaf((c.head_dim,), (None,), None, 1.0 - c.norm_offset)
    matrix("o", query, c.width, ("heads", "embed"), query**-0.5 * residual, c.o_bias)
    if c.post_norms:
        norm("post_attention_norm", c.width)
    norm("ffn_norm", c.width)
    if c.gated:
        matrix("gate", c.width, c.ffn, ("embed", "mlp"), c.width**-0.5, c.ffn_bias)
    matrix("up", c.width, c.ffn, ("embed", "mlp"), c.width**-0.5, c.ffn_bias)
    matrix("down", c.ffn, c.width, ("mlp", "embed"), c.ffn**-0.5 * residual, c.ffn_bias)
    if c.post_norms:
        norm("post_ffn_norm", c.width)
    return out


def base_leaves(config: TransformerConfig) -> dict[str, Any]:
    """The whole decoder: {"embedding", "layers": {...}, "final_norm", ...}, leaves of layers stacked."""
    c = config
    out: dict[str, Any] = {"embedding": Leaf((c.vocab_size, c.width), ("vocab", "embed"), 0.02)}
    if c.positions == "learned":
        out["positions"] = Leaf((c.context, c.width), (None, "embed"), 0.02)
    out["layers"] = {
        name: leaf._replace(shape=(c.layers, *leaf.shape), axes=("layers", *leaf.axes))
        for name, leaf in layer_leaves(c).items()
    }
    out["final_norm"] = Leaf((c.width,), (None,), None, 1.0 - c.norm_offset)
    if c.norm == "layer":
        out["final_norm_bias"] = Leaf((c.width,), (None,), None)
    if not c.tie_embeddings:
        out["head"] = Leaf((c.width, c.vocab_size), ("embed", "vocab"), c.width**-0.5)
    return out


def count(leaves: dict[str, Any]) -> int:
    """Number of scalars in a table of leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf))


def axes(leaves: dict[str, Any]) -> dict[str, Any]:
    """The table with a tuple of logical axis names in place of each leaf."""
    return jax.tree.map(lambda leaf: leaf.axes, leaves, is_leaf=is_leaf)


def shapes(leaves: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The table with a `ShapeDtypeStruct` in place of each leaf."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), leaves, is_leaf=is_leaf)
