"""Sampling answers: prefill and decode in one jitted program, which stops when every row has ended."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.distributed.sharding import ROLLOUT, constrain, replicated, tree_shardings
from rlhf_jax.models import lora
from rlhf_jax.models.cache import Cache, empty_cache
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.quantized import dequantized
from rlhf_jax.models.roles import base_axes
from rlhf_jax.models.transformer import Transformer, output_kernel, output_logits
from rlhf_jax.rollout.sampling import Sampling, draw, row_keys, sample_keys

Array = jax.Array
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class Rollout(struct.PyTreeNode):
    """Answers to a batch of prompts. What lies beyond a length is 0 and means nothing."""

    prompts: Array  # (B, P) int32, right-padded
    prompt_lengths: Array  # (B,) int32
    tokens: Array  # (B, N) int32
    lengths: Array  # (B,) int32, the stop token counted
    ended: Array  # (B,) bool: a stop token came (or a `Watch` ended it)
    logprobs: Array  # (B, N) float32, of decoding; training recomputes them by scoring
    sampling: Sampling = struct.field(pytree_node=False)
    watch: Any = None  # the decoding's `Watch` at its end, where it had one
    dead: Any = None  # (B,) float32, one number repeated: `dead_steps` of the decoding


def dead_steps(lengths: Array, rows: int, steps: Array | int) -> Array:
    """The share of decoding spent on rows that had ended: 1 - sum(lengths - 1) / (rows * steps), () float32.

    Args:
      lengths: (B,) int32 of all answers; the first token of each comes of its prefill.
      rows: rows decoded at once.
      steps: decode steps run. Without any the share is 0.
    """
    taken = jnp.sum(lengths - 1) / jnp.maximum(rows * steps, 1)
    return jnp.where(steps > 0, 1.0 - taken, 0.0).astype(jnp.float32)


class Watch(Protocol):
    """What looks on while answers are decoded, and may end a row. A pytree of leaves (B, ...)."""

    def observe(self, token: Array, counted: Array) -> tuple[Any, Array]:
        """The watch after one more token (B,) of the rows `counted` (B,), and the rows (B,) that it ends."""


def prepare_weights(
    config: TransformerConfig, params: dict[str, Any], adapters: dict[str, Any] | None, fuse: bool = True
) -> Any:
    """Weights as decoding reads them: adapters merged, cast, resharded by the rollout table, layers unstacked.

    Done once a rollout, outside the token loop. Query, key and value (and gate and up) are fused where no tensor axis
    shards them (never with `fuse=False`, for adapters that stay apart); the output kernel is laid out (width, V).
    """
    params = dequantized(params, config.dtype) if adapters is None else lora.merge(params, adapters)
    # Cast before resharding: half the bytes cross the network.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" in path[-1].key else leaf.astype(config.dtype), params
    )
    outer = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = [{name: leaf[i] for name, leaf in params["layers"].items()} for i in range(config.layers)]
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    if fuse and tensor == 1:
        layers = [_fused(layer) for layer in layers]
    if not mesh.empty and mesh.size > 1:
        at = replicated(mesh)
        if tensor > 1:
            axes = base_axes(config)
            layer_axes = {name: names[1:] for name, names in axes.pop("layers").items()}
            at = tree_shardings((outer, layers), (axes, [layer_axes] * config.layers), mesh, ROLLOUT)
        # Layer by layer, and fused before: gathered as stacks or piece by piece, weights would be there twice.
        outer, layers = jax.lax.with_sharding_constraint((outer, layers), at)
    return outer | {"layers": layers, "head": output_kernel(config, outer)}


def _fused(layer: dict[str, Array]) -> dict[str, Array]:
    """One layer's leaves, those of `FUSED` side by side."""
    layer = dict(layer)
    for fused, parts in FUSED.items():
        for suffix in ("", "_bias"):
            if all(f"{part}{suffix}" in layer for part in parts):
                layer[f"{fused}{suffix}"] = jnp.concatenate([layer.pop(f"{part}{suffix}") for part in parts], axis=-1)
    return layer


def make_decoder(
    config: TransformerConfig, params: dict[str, Any], adapters: dict[str, Any] | None
) -> tuple[Any, Callable[[Array], Array]]:
    """(the decoder on prepared weights, tokens (B, T) -> hidden states; hidden states (B, width) -> logits (B, V))."""
    stacked = adapters is not None and jax.tree.leaves(adapters)[0].ndim == 4
    prepared = prepare_weights(config, params, None if stacked else adapters, fuse=not stacked)
    run = partial(
        Transformer(config).apply,
        {"params": params},
        prepared=prepared,
        adapters=adapters if stacked else None,
        return_hidden=True,
    )
    return run, lambda hidden: output_logits(config, hidden, prepared["head"])


def stop_test(sampling: Sampling, stop_table: Array | None) -> Callable[[Array, Array], tuple[Array, Array]]:
    """The function (tokens (B,), the automaton's states of their rows (B,)) -> (which end their rows, new states)."""
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)

    def test(token: Array, matched: Array) -> tuple[Array, Array]:
        stopped = jnp.any(token[:, None] == stops, axis=-1)
        if stop_table is not None:
            matched = stop_table[matched, token].astype(jnp.int32)
            stopped = stopped | (matched == stop_table.shape[0] - 1)
        return stopped, matched

    return test


class _Decoding(struct.PyTreeNode):
    step: Array  # () int32: tokens drawn so far
    token: Array  # (B,) int32: the newest
    cache: Any
    tokens: Array  # (B, N or more)
    logprobs: Array  # (B, N or more)
    lengths: Array  # (B,)
    ended: Array  # (B,) bool
    matched: Array  # (B,) int32: state of the stop strings' automaton
    watch: Any


def _decoding_cache(prefilled: Cache, samples: int, valid: Array, positions: Array) -> Cache:
    """The cache of a prefill with each row `samples` times and free slots up to `valid`'s (B * samples, S)."""
    more = valid.shape[1] - prefilled.valid.shape[1]

    def grow(x: Array, axis: int) -> Array:
        x = jnp.repeat(x, samples, axis=0) if samples > 1 else x
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    return Cache(
        keys=tuple(constrain(grow(x, 3), "batch", "kv_heads", None, None) for x in prefilled.keys),
        values=tuple(constrain(grow(x, 2), "batch", "kv_heads", None, None) for x in prefilled.values),
        valid=valid,
        positions=positions,
        index=prefilled.index,
    )


@partial(jax.jit, static_argnames=("config", "sampling", "samples", "check_every"))
def generate(
    config: TransformerConfig,
    params: dict[str, Any],
    prompts: Array,
    lengths: Array,
    *,
    key: Array,
    sampling: Sampling,
    row_ids: Array | None = None,
    adapters: dict[str, Any] | None = None,
    samples: int = 1,
    stop_table: Array | None = None,
    watch: Any = None,
    limits: Array | None = None,
    check_every: int = 8,
) -> Rollout:
    """Samples answers to each prompt.

    A row's draws are a function of (key, its row id, sample, token position) alone; at a fixed batch shape its answer
    is bitwise independent of the other rows.

    Args:
      config: the decoder's shape (static).
      params: its parameters.
      prompts: (B, P) int32, right-padded.
      lengths: (B,) int32, at least 1.
      key: the rollout's key.
      sampling: settings (static); `max_new_tokens` is N.
      row_ids: (B,) int32 identities that key the rows' draws; 0 ... B - 1 by default.
      adapters: scaled adapters as `Transformer` takes them; merged here unless they have a leading axis.
      samples: answers to each prompt (static), which share its prefill. The rollout has B * samples rows, those of
        prompt i from i * samples on; the first of them is what `samples=1` gives.
      stop_table: (states, V) int16 automaton of stop strings (`data.stops.stop_table`), or None.
      watch: a `Watch` of B * samples rows, or None; stop tokens are not shown to it, and none of a row that has ended.
      limits: (B * samples,) int32, at least 1: the most tokens of each row, where that is less than N; or None. A row
        that comes to its limit has not ended.
      check_every: steps between two checks whether every row has ended (static).

    Returns:
      A `Rollout`.
    """
    batch, width = prompts.shape
    count = sampling.max_new_tokens
    blocks = -(-(count - 1) // check_every)
    drawn = 1 + blocks * check_every  # token places: whole blocks, cut to N at the end
    keys = sample_keys(row_keys(key, jnp.arange(batch) if row_ids is None else row_ids), samples)
    run, logits_of = make_decoder(config, params, adapters)
    room: Any = count if limits is None else jnp.minimum(limits, count)
    stops = stop_test(sampling, stop_table)

    def record(state: _Decoding, logits: Array) -> _Decoding:
        """Draws token `state.step`, for the rows that still run."""
        token, logprob = draw(logits, sampling, keys, state.step)
        running = ~state.ended & (state.step < room)
        at = (0, state.step)
        stopped, matched = stops(token, state.matched)
        watch, given_up = state.watch, jnp.zeros_like(stopped)
        if watch is not None:
            watch, given_up = watch.observe(token, running & ~stopped)
        return state.replace(
            step=state.step + 1,
            token=jnp.where(running, token, 0),
            tokens=jax.lax.dynamic_update_slice(state.tokens, jnp.where(running, token, 0)[:, None], at),
            logprobs=jax.lax.dynamic_update_slice(state.logprobs, jnp.where(running, logprob, 0.0)[:, None], at),
            lengths=state.lengths + running,
            ended=state.ended | (running & (stopped | given_up)),
            matched=matched,
            watch=watch,
        )

    # --- prefill: slots 0 ... P - 1 hold the prompts -------------------------------------------------------------
    valid = jnp.arange(width) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    hidden, cache = run(prompts, cache=empty_cache(config, valid, positions), keep=(lengths - 1)[:, None])
    logits = logits_of(hidden[:, 0])

    # --- each prompt's rows; the answers' slots start at P for every row ------------------------------------------
    if samples > 1:
        prompts, lengths, logits = (
            constrain(jnp.repeat(x, samples, axis=0), "batch", *[None] * (x.ndim - 1))
            for x in (prompts, lengths, logits)
        )
    slots = jnp.arange(width + drawn)
    rows = batch * samples
    cache = _decoding_cache(
        cache,
        samples,
        valid=(slots < lengths[:, None]) | (slots >= width),
        positions=jnp.where(slots < width, slots, lengths[:, None] + slots - width),
    )
    state = _Decoding(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((rows,), jnp.int32),
        cache=cache,
        tokens=jnp.zeros((rows, drawn), jnp.int32),
        logprobs=jnp.zeros((rows, drawn), jnp.float32),
        lengths=jnp.zeros((rows,), jnp.int32),
        ended=jnp.zeros((rows,), bool),
        matched=jnp.zeros((rows,), jnp.int32),
        watch=watch,
    )
    state = record(state, logits)

    # --- decode -----------------------------------------------------------------------------------------------------
    def unfinished(state: _Decoding) -> Array:
        if limits is None:
            return (state.step < count) & ~jnp.all(state.ended)
        return jnp.any(~state.ended & (state.step < room))

    def advance(_: Array, state: _Decoding) -> _Decoding:
        at = (lengths + state.step - 1)[:, None]
        hidden, cache = run(state.token[:, None], positions=at, cache=state.cache)
        return record(state.replace(cache=cache), logits_of(hidden[:, 0]))

    def steps(state: _Decoding) -> _Decoding:
        return jax.lax.fori_loop(0, check_every, advance, state)

    state = jax.lax.while_loop(unfinished, steps, state)
    tokens, logprobs = state.tokens[:, :count], state.logprobs[:, :count]
    dead = jnp.broadcast_to(dead_steps(state.lengths, rows, state.step - 1), state.lengths.shape)
    return Rollout(prompts, lengths, tokens, state.lengths, state.ended, logprobs, sampling, state.watch, dead)
