"""What the layers attend to: whole rows, a prompt whose keys fill a cache, or a cache and one new token.

Each function here gives a layer's `Attention`: it turns queries and keys to their positions, and attends.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models import rotary
from rlhf_jax.models.attention import NEGATIVE, self_attention
from rlhf_jax.models.config import TransformerConfig

Array = jax.Array
# (q, k, v), each (B, T, its heads, head_dim) before rotary positions -> (B, T, heads, head_dim)
Attention = Callable[[Array, Array, Array], Array]


class Cache(struct.PyTreeNode):
    """Keys and values of past tokens, a tuple entry a layer, and which of the slots a row may attend to.

    The next token goes to slot `index` of every row, whatever the rows' positions: a row of a right-padded batch has a
    hole between its prompt and its answer, which `valid` masks. Keys are kept transposed, so that in a step of one
    token both of attention's products run along contiguous memory.
    """

    keys: tuple[Array, ...]  # (B, kv_heads, head_dim, S) each
    values: tuple[Array, ...]  # (B, kv_heads, S, head_dim) each
    valid: Array  # (B, S) bool
    positions: Array  # (B, S) int32: a slot's position in its row; read for sliding windows
    index: Array  # () int32
    past: "Cache | None" = None  # what came before, which is read and not written; its `valid` says all


def empty_cache(config: TransformerConfig, valid: Array, positions: Array) -> Cache:
    """A cache in the config's dtype with nothing written yet; valid and positions (B, S) say what its slots will be."""
    rows, slots = valid.shape
    keys = tuple(jnp.zeros((rows, config.kv_heads, config.head_dim, slots), config.dtype) for _ in range(config.layers))
    values = tuple(jnp.zeros((rows, config.kv_heads, slots, config.head_dim), config.dtype) for _ in keys)
    return Cache(keys, values, valid, positions, jnp.zeros((), jnp.int32))


def _attend_whole(
    config: TransformerConfig, q: Array, k: Array, v: Array, segment_ids: Array | None, window: int
) -> Array:
    """Attention of all tokens of a row to those before them; queries and keys are at their positions."""
    return self_attention(
        q,
        k,
        v,
        scale=config.scale,
        softcap=config.attention_softcap,
        window=window,
        segment_ids=segment_ids,
        implementation=config.attention,
    )


def whole_attention(config: TransformerConfig, positions: Array, segment_ids: Array | None, window: int) -> Attention:
    """Attention of whole rows, in a layer with `window`."""
    turn = rotary.table(config, positions, windowed=window > 0)

    def attention(q: Array, k: Array, v: Array) -> Array:
        return _attend_whole(config, rotary.rotate(q, turn), rotary.rotate(k, turn), v, segment_ids, window)

    return attention


def _written(
    config: TransformerConfig, cache: Cache, layer: int, k: Array, v: Array, at: Array | int
) -> tuple[Array, Array]:
    """A layer's keys and values with those of new tokens, (B, T, kv_heads, head_dim), in the slots from `at` on."""
    keys, values = jnp.moveaxis(k, 1, 3).astype(config.dtype), jnp.moveaxis(v, 1, 2).astype(config.dtype)
    return (
        jax.lax.dynamic_update_slice(cache.keys[layer], keys, (0, 0, 0, at)),
        jax.lax.dynamic_update_slice(cache.values[layer], values, (0, 0, at, 0)),
    )


class View(NamedTuple):
    """How the newest token of each row looks at the cache in the layers of one window."""

    turn: rotary.Table | None
    seen: Array  # (B, S) bool; of a cache with a past, the past's slots and then its own


def step_views(config: TransformerConfig, positions: Array, cache: Cache) -> dict[int, View]:
    """The view of every window, of the cache's past before its own slots. Positions are below S (the past's, if any).

    Cosines are looked up in a table of all S positions, which the compiler makes once, before the token loop. Taken of
    `positions` they would be fused into every layer, and computed there once for every query head.
    """
    slots = jnp.arange(cache.valid.shape[1])
    written = cache.valid & (slots <= cache.index)
    held = cache.positions
    if cache.past is not None:
        slots = jnp.arange(cache.past.valid.shape[1])
        written = jnp.concatenate([cache.past.valid, written], axis=1)
        held = jnp.concatenate([cache.past.positions, held], axis=1)
    views = {}
    for window in {config.window(i) for i in range(config.layers)}:
        whole = rotary.table(config, slots[None], windowed=window > 0)
        turn = jax.tree.map(lambda x: jnp.take(x[0], positions, axis=0), whole)
        seen = written & (positions - held < window) if window else written
        views[window] = View(turn, seen)
    return views


def step_attention(
    config: TransformerConfig, view: View, cache: Cache, layer: int, written: list[tuple[Array, Array]]
) -> Attention:
    """Attention of one new token to the cache, which gets its key and value; they are appended to `written`."""
    turn, seen = view

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k = rotary.rotate(q, turn), rotary.rotate(k, turn)
        keys, values = _written(config, cache, layer, k, v, cache.index)
        written.append((keys, values))
        batch, _, heads, head_dim = q.shape
        grouped = (q * config.scale).reshape(batch, config.kv_heads, heads // config.kv_heads, head_dim)
        scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32)
        if cache.past is not None:
            before = cache.past.keys[layer]
            past = jnp.einsum("bkgd,bkds->bkgs", grouped, before, preferred_element_type=jnp.float32)
            scores = jnp.concatenate([past, scores], axis=-1)
        if config.attention_softcap:
            scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        probs = jax.nn.softmax(jnp.where(seen[:, None, None], scores, NEGATIVE), axis=-1).astype(q.dtype)
        own = probs if cache.past is None else probs[..., -values.shape[2] :]
        out = jnp.einsum("bkgs,bksd->bkgd", own, values, preferred_element_type=jnp.float32)
        if cache.past is not None:
            before = cache.past.values[layer]
            past = probs[..., : before.shape[2]]
            out = out + jnp.einsum("bkgs,bksd->bkgd", past, before, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(batch, 1, heads, head_dim)

    return attention


def prefill_attention(
    config: TransformerConfig, positions: Array, cache: Cache, layer: int, written: list[tuple[Array, Array]]
) -> Attention:
    """Attention of a prompt to itself; its keys and values fill the first slots of the empty cache."""
    window = config.window(layer)
    turn = rotary.table(config, positions, windowed=window > 0)

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k = rotary.rotate(q, turn), rotary.rotate(k, turn)
        written.append(_written(config, cache, layer, k, v, 0))
        return _attend_whole(config, q, k, v, None, window)

    return attention
