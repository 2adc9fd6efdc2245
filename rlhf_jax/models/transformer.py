"""The decoder every role shares, scanned over layers: one definition that samples, scores and trains, for every family.

What a family switches on (biases, learned positions, sliding windows, soft caps, norms after the blocks, ...) is in its
`TransformerConfig`, and the parameters that go with it in `leaves.base_leaves`, with logical axis names that
`distributed/sharding.py` maps to a mesh. In decoding the same block runs unrolled over layers, on weights that were
prepared once a rollout (`rollout.generate.prepare_weights`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.models.attention import RESIDUALS, current_platform
from rlhf_jax.models.cache import Attention, Cache, prefill_attention, step_attention, step_views, whole_attention
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.dense import project
from rlhf_jax.models.leaves import Leaf, base_leaves
from rlhf_jax.objectives.taps import Tapped, look_up, per_row

Array = jax.Array
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
REMAT: dict[str, Any] = {  # what the backward pass finds saved
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}


# For cheap work between products: the backward pass finds its inputs saved and nothing of what it holds on its way.
recomputed = partial(jax.checkpoint, prevent_cse=False)


def normalize(config: TransformerConfig, x: Array, scale: Array, bias: Array | None = None) -> Array:
    """RMS norm, or layer norm with a bias, over the last axis; statistics in float32."""

    @recomputed
    def normalized(x: Array, scale: Array, bias: Array | None) -> Array:
        x32 = x.astype(jnp.float32)
        if config.norm == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_eps)
        out = normed * (scale if config.norm_offset == 0.0 else scale.astype(jnp.float32) + config.norm_offset)
        return (out if bias is None else out + bias).astype(x.dtype)

    return normalized(x, per_row(scale, x), per_row(bias, x))


def block(
    config: TransformerConfig,
    params: dict[str, Array],
    adapters: dict[str, Any] | None,
    x: Array,
    attention: Attention,
    keep: Array | None = None,
) -> Array:
    """One decoder layer.

    Args:
      params: one layer's leaves by their names in `leaves.layer_leaves`; or with the fused `qkv` and `gate_up` of
        `prepare_weights`.
      adapters: {projection: {"a", "b"}} of this layer, or None.
      x: (B, T, width).
      attention: turns queries and keys to their positions and attends.
      keep: (B, N) int32 positions, or None for all: what comes after attention is computed at these alone.

    Returns:
      x (B, T, width), or (B, N, width) at `keep`.
    """
    adapters = adapters or {}
    batch, length, _ = x.shape
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

    def projection(name: str, inputs: Array) -> Array:
        return project(inputs, params[name], params.get(f"{name}_bias"), adapters.get(name))

    def norm(name: str, inputs: Array) -> Array:
        return normalize(config, inputs, params[name], params.get(f"{name}_bias"))

    def head_norm(name: str, inputs: Array) -> Array:
        return normalize(config, inputs, params[name]) if config.qk_norm else inputs

    def attended(h: Array) -> Array:
        if "qkv" in params:
            widths = (heads * head_dim, kv_heads * head_dim)
            q, k, v = jnp.split(projection("qkv", h), [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            q, k, v = (projection(name, h) for name in ("q", "k", "v"))
        q = constrain(q.reshape(batch, length, heads, head_dim), "batch", None, "heads", None)
        k = constrain(k.reshape(batch, length, kv_heads, head_dim), "batch", None, "kv_heads", None)
        v = constrain(v.reshape(batch, length, kv_heads, head_dim), "batch", None, "kv_heads", None)
        out = attention(head_norm("q_norm", q), head_norm("k_norm", k), v)
        out = projection("o", at_positions(out.reshape(batch, length, heads * head_dim), keep))
        return norm("post_attention_norm", out) if config.post_norms else out

    def fed_forward(h: Array) -> Array:
        act = ACTIVATIONS[config.activation]
        if not config.gated:
            out = recomputed(lambda up: projection("down", act(up)))(projection("up", h))
        else:
            if "gate_up" in params:
                gate, up = jnp.split(projection("gate_up", h), 2, axis=-1)
            else:
                gate, up = projection("gate", h), projection("up", h)
            out = recomputed(lambda gate, up: projection("down", act(gate) * up))(gate, up)
        return norm("post_ffn_norm", out) if config.post_norms else out

    seen = attended(norm("attention_norm", x))
    x = at_positions(x, keep)
    if config.parallel:
        return constrain(x + seen + fed_forward(norm("ffn_norm", x)), "batch", None, None)
    x = constrain(x + seen, "batch", None, None)
    return constrain(x + fed_forward(norm("ffn_norm", x)), "batch", None, None)


def at_positions(x: Array, keep: Array | None) -> Array:
    """x (B, T, D) at the positions `keep` (B, N) of each row: (B, N, D); all of x without `keep`."""
    return x if keep is None else jnp.take_along_axis(x, keep[:, :, None], axis=1)


def _parameter(module: nn.Module, name: str, leaf: Leaf, dtype: str) -> Array:
    """A parameter with logical axes: N(0, scale), or its constant."""
    if leaf.scale is None:
        init: Any = nn.initializers.constant(leaf.constant)
    else:
        init = nn.initializers.normal(leaf.scale)
    value: Any = module.param(name, nn.with_logical_partitioning(init, leaf.axes), leaf.shape, jnp.dtype(dtype))
    return value


class Layers(nn.Module):
    """The weights of all layers, stacked along a leading axis."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        leaves = base_leaves(self.config)["layers"]
        return {name: _parameter(self, name, leaf, self.config.param_dtype) for name, leaf in leaves.items()}


class Transformer(nn.Module):
    """The decoder. `Transformer(config).apply({"params": params}, tokens)` gives logits (B, T, V) in float32."""

    config: TransformerConfig

    def setup(self) -> None:
        self.layers = Layers(self.config)
        for name, leaf in base_leaves(self.config).items():
            if name != "layers":
                setattr(self, name, _parameter(self, name, leaf, self.config.param_dtype))

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        adapters: dict[str, Any] | None = None,
        cache: Cache | None = None,
        prepared: dict[str, Any] | None = None,
        keep: Array | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Runs the decoder.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32; by default 0 ... T - 1 (a packed row gives each document its own).
          segment_ids: (B, T) int32, 0 on padding: a token sees only its own segment. Without them every token sees
            all before it, which is right for right-padded rows: padding comes after all that is read.
          adapters: {projection: {"a": ([R,] layers, d_in, rank), "b": ([R,] layers, rank, d_out)}}, b scaled.
          cache: a `Cache`: an empty one takes a right-padded prompt (T > 1), then it takes a token at a time (T = 1).
          prepared: the weights of `rollout.generate.prepare_weights`, used in place of the stacked ones.
          keep: (B, N) int32 positions: the result is of these alone, (B, N, ...), and so is most of the last layer.
          return_hidden: give the final hidden states (B, T, width) in the config's dtype instead of logits.

        Returns:
          logits (B, T, V) float32, or hidden states; with a cache a pair of that and the written cache.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        outer = prepared if prepared is not None else self._outer()
        x = look_up(outer["embedding"], tokens).astype(c.dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.positions == "learned":
            x = x + look_up(outer["positions"], positions).astype(c.dtype)
        x = constrain(x, "batch", None, None)
        if cache is None and prepared is None:
            x = self._scanned(x, positions, segment_ids, adapters, keep)
        else:
            x, cache = self._unrolled(x, positions, segment_ids, adapters, cache, prepared, keep)
        x = normalize(c, x, outer["final_norm"], outer.get("final_norm_bias"))
        out = x if return_hidden else self._logits(x, prepared)
        return out if cache is None else (out, cache)

    def _outer(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in base_leaves(self.config) if name != "layers"}

    def _scanned(
        self,
        x: Array,
        positions: Array,
        segment_ids: Array | None,
        adapters: dict[str, Any] | None,
        keep: Array | None,
    ) -> Array:
        """All layers over whole rows, as one scan.

        On a CPU the last layer comes after the scan, to be computed at `keep` alone. That copies the weights of all
        others, for which an accelerator has no memory to spare.
        """
        c = self.config
        windows = sorted({c.window(i) for i in range(c.layers)})
        kinds = [whole_attention(c, positions, segment_ids, window) for window in windows]
        kind_of = jnp.asarray([windows.index(c.window(i)) for i in range(c.layers)], jnp.int32)

        def layer(x: Array, leaves: Any) -> tuple[Array, None]:
            params, here, kind = leaves
            attention = kinds[0] if len(kinds) == 1 else lambda q, k, v: jax.lax.switch(kind, kinds, q, k, v)
            return block(c, params, here, x, attention), None

        def remat(f: Any) -> Any:
            return f if c.remat == "none" else jax.checkpoint(f, policy=REMAT[c.remat])

        leaves = (self.layers(), _layers_first(adapters), kind_of)
        tapped = any(isinstance(leaf, Tapped) for leaf in leaves[0].values())  # a tap has one shape for all layers
        tapped = tapped or any("tap" in leaf for leaf in (adapters or {}).values())
        if keep is None or tapped or current_platform() != "cpu":
            x, _ = jax.lax.scan(remat(layer), x, leaves)
            return at_positions(x, keep)
        first, last = _last_apart(leaves)
        x, _ = jax.lax.scan(remat(layer), x, first)
        ending = partial(block, c, attention=kinds[windows.index(c.window(c.layers - 1))], keep=keep)
        return remat(lambda x, leaves: ending(leaves[0], leaves[1], x))(x, last)

    def _unrolled(
        self,
        x: Array,
        positions: Array,
        segment_ids: Array | None,
        adapters: dict[str, Any] | None,
        cache: Cache | None,
        prepared: dict[str, Any] | None,
        keep: Array | None,
    ) -> tuple[Array, Cache | None]:
        """The layers one after another, with a cache or on prepared weights."""
        c, length = self.config, x.shape[1]
        stacked = {} if prepared is not None else self.layers()
        written: list[tuple[Array, Array]] = []
        views = step_views(c, positions, cache) if cache is not None and length == 1 else {}
        for i in range(c.layers):
            params = prepared["layers"][i] if prepared is not None else {k: v[i] for k, v in stacked.items()}
            here = None if adapters is None else jax.tree.map(lambda leaf, i=i: leaf[i], _layers_first(adapters))
            if cache is None:
                attention = whole_attention(c, positions, segment_ids, c.window(i))
            elif length > 1:
                attention = prefill_attention(c, positions, cache, i, written)
            else:
                attention = step_attention(c, views[c.window(i)], cache, i, written)
            x = block(c, params, here, x, attention, keep if i == c.layers - 1 else None)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            cache = cache.replace(keys=keys, values=values, index=cache.index + length)
        return x, cache

    def _logits(self, x: Array, prepared: dict[str, Any] | None) -> Array:
        if prepared is not None:
            kernel = prepared["head"]
        else:
            kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return constrain(output_logits(self.config, x, kernel), "batch", None, "vocab")


def output_logits(config: TransformerConfig, hidden: Array, kernel: Array) -> Array:
    """Logits (..., V) float32 of final hidden states (..., width)."""
    contract = (((hidden.ndim - 1,), (0,)), ((), ()))
    logits = jax.lax.dot_general(
        hidden, kernel.astype(hidden.dtype), contract, preferred_element_type=jnp.float32
    )  # never rounded to the dtype of the states: what draws a token is what scores it
    return capped(config, logits)


def capped(config: TransformerConfig, logits: Array) -> Array:
    """Logits after the config's soft cap."""
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def _layers_first(adapters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Moves the layer axis of each adapter leaf in front of an optional leading (record, role or member) axis."""
    if adapters is None:
        return None
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 3 else jnp.moveaxis(leaf, 1, 0), adapters)


def _last_apart(stacked: Any) -> tuple[Any, Any]:
    """A tree of leaves stacked over layers -> (all layers but the last, still stacked; the last)."""
    leaves, tree = jax.tree.flatten(stacked)
    parts = [jax.lax.split(leaf, (leaf.shape[0] - 1, 1)) for leaf in leaves]  # its gradient is one concatenation
    first, last = [part[0] for part in parts], [part[1][0] for part in parts]
    return jax.tree.unflatten(tree, first), jax.tree.unflatten(tree, last)


def output_kernel(config: TransformerConfig, params: dict[str, Any]) -> Any:
    """The (width, V) kernel that turns hidden states into logits; `Tapped` where its leaf is."""
    leaf = params["embedding" if config.tie_embeddings else "head"]
    if not config.tie_embeddings:
        return leaf
    return Tapped(leaf.weight.T, leaf.tap, leaf.uses) if isinstance(leaf, Tapped) else leaf.T
