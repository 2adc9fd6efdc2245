"""The decoder every role shares: RMSNorm, rotary positions, grouped-query attention, SwiGLU, scanned over layers.

`Transformer` samples, scores and trains: it is the only definition of the model. Parameters carry logical axis names
(`distributed/sharding.py` maps them to a mesh). In decoding the same block runs unrolled over layers, on weights that
were prepared once a rollout (`rollout.generate.prepare_weights`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.dense import matmul, project

Array = jax.Array
NEGATIVE = -1e30  # finite: a fully masked row must stay free of NaN


class Cache(struct.PyTreeNode):
    """Keys and values of past tokens, a tuple entry a layer, and which of the slots a row may attend to.

    The next tokens go to slots `index`, `index` + 1, ... of every row, whatever the rows' positions: a row of a
    right-padded batch has a hole between its prompt and its answer, which `valid` masks.
    """

    keys: tuple[Array, ...]  # (B, S, kv_heads, head_dim) each
    values: tuple[Array, ...]  # (B, S, kv_heads, head_dim) each
    valid: Array  # (B, S) bool
    index: Array  # () int32


def empty_cache(config: TransformerConfig, rows: int, slots: int) -> Cache:
    """A cache of `slots` free slots for `rows` rows, in the config's dtype."""
    shape = (rows, slots, config.kv_heads, config.head_dim)
    blank = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
    return Cache(blank, blank, jnp.zeros((rows, slots), bool), jnp.zeros((), jnp.int32))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def rotary(x: Array, positions: Array, theta: float) -> Array:
    """Rotary positions, halves convention. x (B, T, heads, head_dim), positions (B, T) int32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # (B, T, half)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Grouped-query attention, softmax in float32.

    Args:
      q: (B, T, heads, head_dim); head h reads key-value head h // (heads / kv_heads).
      k, v: (B, S, kv_heads, head_dim).
      mask: (B, T, S) bool, True where a query may look. A query that may look nowhere gets a finite, meaningless row.

    Returns:
      (B, T, heads, head_dim) in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim) * head_dim**-0.5
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEGATIVE), axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", probs, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, head_dim)


def block(
    config: TransformerConfig,
    params: dict[str, Array],
    adapters: dict[str, Any] | None,
    x: Array,
    positions: Array,
    mask: Array,
    past: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """One decoder layer.

    Args:
      params: one layer's leaves: `attention_norm`, `ffn_norm`, and `q`, `k`, `v`, `o`, `gate`, `up`, `down`; or the
        fused `qkv` and `gate_up` of `prepare_weights`.
      adapters: {projection: {"a", "b"}} of this layer, or None.
      x: (B, T, width).
      mask: (B, T, S) bool, S = T without a cache, else the cache's slots.
      past: (keys, values, index): the layer's cache, written at slots index ... index + T - 1.

    Returns:
      x (B, T, width), and the written (keys, values) when a cache was given.
    """
    adapters = adapters or {}
    batch, length, _ = x.shape
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

    def projection(name: str, inputs: Array) -> Array:
        return project(inputs, params[name], adapter=adapters.get(name))

    h = rms_norm(x, params["attention_norm"], config.norm_eps)
    if "qkv" in params:
        widths = (heads * head_dim, kv_heads * head_dim)
        q, k, v = jnp.split(projection("qkv", h), [widths[0], widths[0] + widths[1]], axis=-1)
    else:
        q, k, v = (projection(name, h) for name in ("q", "k", "v"))
    q = constrain(q.reshape(batch, length, heads, head_dim), "batch", None, "heads", None)
    k = constrain(k.reshape(batch, length, kv_heads, head_dim), "batch", None, "kv_heads", None)
    v = constrain(v.reshape(batch, length, kv_heads, head_dim), "batch", None, "kv_heads", None)
    q, k = rotary(q, positions, config.rope_theta), rotary(k, positions, config.rope_theta)
    written = None
    if past is not None:
        keys, values, index = past
        k = jax.lax.dynamic_update_slice(keys, k, (0, index, 0, 0))
        v = jax.lax.dynamic_update_slice(values, v, (0, index, 0, 0))
        written = (k, v)
    out = attend(q, k, v, mask).reshape(batch, length, heads * head_dim)
    x = constrain(x + projection("o", out), "batch", None, None)

    h = rms_norm(x, params["ffn_norm"], config.norm_eps)
    if "gate_up" in params:
        gate, up = jnp.split(projection("gate_up", h), 2, axis=-1)
    else:
        gate, up = projection("gate", h), projection("up", h)
    x = constrain(x + projection("down", jax.nn.silu(gate) * up), "batch", None, None)
    return x, written


def _mask(length: int, segment_ids: Array | None, cache: Cache | None) -> Array:
    """(B or 1, T, S) bool: causal, inside a segment, and only on valid slots of a cache."""
    if cache is None:
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        if segment_ids is None:
            return causal
        return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    slots = jnp.arange(cache.valid.shape[1])
    own = cache.index + jnp.arange(length)
    return cache.valid[:, None, :] & (slots[None, None, :] <= own[None, :, None])


def _leaf(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float) -> Array:
    """A float32 parameter N(0, scale) with logical axes; scale 0 makes a norm's ones."""
    init = nn.initializers.normal(scale) if scale else nn.initializers.ones
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


class Layers(nn.Module):
    """The weights of all layers, stacked along a leading axis."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        c = self.config
        query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        residual = (2 * c.layers) ** -0.5  # GPT-2's scaling: the residual stream's variance stays put over depth
        shapes: dict[str, tuple[tuple[int, ...], tuple[str | None, ...], float]] = {
            "attention_norm": ((c.width,), (None,), 0.0),
            "q": ((c.width, query), ("embed", "heads"), c.width**-0.5),
            "k": ((c.width, kv), ("embed", "kv_heads"), c.width**-0.5),
            "v": ((c.width, kv), ("embed", "kv_heads"), c.width**-0.5),
            "o": ((query, c.width), ("heads", "embed"), query**-0.5 * residual),
            "ffn_norm": ((c.width,), (None,), 0.0),
            "gate": ((c.width, c.ffn), ("embed", "mlp"), c.width**-0.5),
            "up": ((c.width, c.ffn), ("embed", "mlp"), c.width**-0.5),
            "down": ((c.ffn, c.width), ("mlp", "embed"), c.ffn**-0.5 * residual),
        }
        return {
            name: _leaf(self, name, (c.layers, *shape), ("layers", *axes), scale)
            for name, (shape, axes, scale) in shapes.items()
        }


class Transformer(nn.Module):
    """The decoder. `Transformer(config).apply({"params": params}, tokens)` gives logits (B, T, V) in float32."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = _leaf(self, "embedding", (c.vocab_size, c.width), ("vocab", "embed"), 0.02)
        self.layers = Layers(c)
        self.final_norm = _leaf(self, "final_norm", (c.width,), (None,), 0.0)
        if not c.tie_embeddings:
            self.head = _leaf(self, "head", (c.width, c.vocab_size), ("embed", "vocab"), c.width**-0.5)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        adapters: dict[str, Any] | None = None,
        cache: Cache | None = None,
        prepared: dict[str, Any] | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Runs the decoder.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32; by default 0 ... T - 1 (a packed row gives each document its own).
          segment_ids: (B, T) int32, 0 on padding: a token sees only its own segment. Without them every token sees
            all before it, which is right for right-padded rows: padding comes after all that is read.
          adapters: {projection: {"a": ([R,] layers, d_in, rank), "b": ([R,] layers, rank, d_out)}}, b scaled.
          cache: a `Cache` to continue from; the new tokens' slots must already be marked valid.
          prepared: the weights of `rollout.generate.prepare_weights`, used in place of the stacked ones.
          return_hidden: give the final hidden states (B, T, width) in the config's dtype instead of logits.

        Returns:
          logits (B, T, V) float32, or hidden states; with a cache a pair of that and the written cache.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embedding = self.embedding if prepared is None else prepared["embedding"]
        x = constrain(jnp.take(embedding, tokens, axis=0).astype(c.dtype), "batch", None, None)
        mask = _mask(tokens.shape[1], segment_ids, cache)
        stacked = {} if prepared is not None else self.layers()

        if prepared is None and cache is None:

            def layer(x: Array, leaves: Any) -> tuple[Array, None]:
                return block(c, leaves[0], leaves[1], x, positions, mask)[0], None

            per_layer = _layers_first(adapters)
            x, _ = jax.lax.scan(jax.checkpoint(layer) if c.remat else layer, x, (stacked, per_layer))
        else:
            keys, values = [], []
            for i in range(c.layers):
                params = prepared["layers"][i] if prepared is not None else {k: v[i] for k, v in stacked.items()}
                here = None if adapters is None else jax.tree.map(lambda leaf, i=i: leaf[i], _layers_first(adapters))
                past = None if cache is None else (cache.keys[i], cache.values[i], cache.index)
                x, written = block(c, params, here, x, positions, mask, past)
                if written is not None:
                    keys.append(written[0])
                    values.append(written[1])
            if cache is not None:
                cache = cache.replace(keys=tuple(keys), values=tuple(values), index=cache.index + tokens.shape[1])

        x = rms_norm(x, self.final_norm if prepared is None else prepared["final_norm"], c.norm_eps)
        out = x if return_hidden else self._logits(x, prepared)
        return out if cache is None else (out, cache)

    def _logits(self, x: Array, prepared: dict[str, Any] | None) -> Array:
        if prepared is not None:
            kernel = prepared["head"]
        else:
            kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return constrain(matmul(x, kernel.astype(x.dtype)).astype(jnp.float32), "batch", None, "vocab")


def _layers_first(adapters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Moves the layer axis of each adapter leaf in front of an optional leading (record, role or member) axis."""
    if adapters is None:
        return None
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 3 else jnp.moveaxis(leaf, 1, 0), adapters)


def output_kernel(config: TransformerConfig, params: dict[str, Any]) -> Array:
    """The (width, V) kernel that turns hidden states into logits."""
    return params["embedding"].T if config.tie_embeddings else params["head"]
