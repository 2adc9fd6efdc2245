"""Sampling answers: prefill and decode in one jitted program, which stops when every row has ended."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.distributed.sharding import ROLLOUT, tree_shardings
from rlhf_jax.models import lora
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.dense import matmul
from rlhf_jax.models.roles import base_axes
from rlhf_jax.models.transformer import Transformer, empty_cache, output_kernel
from rlhf_jax.rollout.sampling import Sampling, draw, row_keys

Array = jax.Array


class Rollout(struct.PyTreeNode):
    """Answers to a batch of prompts. What lies beyond a length is 0 and means nothing."""

    prompts: Array  # (B, P) int32, right-padded
    prompt_lengths: Array  # (B,) int32
    tokens: Array  # (B, N) int32
    lengths: Array  # (B,) int32, the stop token counted
    ended: Array  # (B,) bool: a stop token came
    logprobs: Array  # (B, N) float32, of decoding; training recomputes them by scoring
    sampling: Sampling = struct.field(pytree_node=False)


def prepare_weights(
    config: TransformerConfig, params: dict[str, Any], adapters: dict[str, Any] | None, fuse: bool = True
) -> Any:
    """Weights as decoding reads them: adapters merged, cast, resharded by the rollout table, layers unstacked.

    Done once a rollout, outside the token loop. Query, key and value (and gate and up) are fused where no tensor axis
    shards them (never with `fuse=False`, for adapters that stay apart); the output kernel is laid out (width, V).
    """
    if adapters is not None:
        params = lora.merge(params, adapters)
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    if not mesh.empty and mesh.size > 1:
        params = jax.lax.with_sharding_constraint(params, tree_shardings(params, base_axes(config), mesh, ROLLOUT))
    cast = {name: leaf if "norm" in name else leaf.astype(config.dtype) for name, leaf in params["layers"].items()}
    if fuse and tensor == 1:
        cast["qkv"] = jnp.concatenate([cast.pop("q"), cast.pop("k"), cast.pop("v")], axis=-1)
        cast["gate_up"] = jnp.concatenate([cast.pop("gate"), cast.pop("up")], axis=-1)
    return {
        "layers": [{name: leaf[i] for name, leaf in cast.items()} for i in range(config.layers)],
        "embedding": params["embedding"].astype(config.dtype),
        "final_norm": params["final_norm"],
        "head": output_kernel(config, params).astype(config.dtype),
    }


class _Decoding(struct.PyTreeNode):
    step: Array  # () int32: tokens drawn so far
    token: Array  # (B,) int32: the newest
    cache: Any
    tokens: Array  # (B, N)
    logprobs: Array  # (B, N)
    lengths: Array  # (B,)
    ended: Array  # (B,) bool


@partial(jax.jit, static_argnames=("config", "sampling"))
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
) -> Rollout:
    """Samples an answer to each prompt.

    A row's draws are a function of (key, its row id, token position) alone; at a fixed batch shape its answer is
    bitwise independent of the other rows.

    Args:
      config: the decoder's shape (static).
      params: its parameters.
      prompts: (B, P) int32, right-padded.
      lengths: (B,) int32, at least 1.
      key: the rollout's key.
      sampling: settings (static); `max_new_tokens` is N.
      row_ids: (B,) int32 identities that key the rows' draws; 0 ... B - 1 by default.
      adapters: scaled adapters as `Transformer` takes them; merged here unless they have a leading axis.

    Returns:
      A `Rollout`.
    """
    batch, width = prompts.shape
    count = sampling.max_new_tokens
    keys = row_keys(key, jnp.arange(batch) if row_ids is None else row_ids)
    stacked = adapters is not None and jax.tree.leaves(adapters)[0].ndim == 4
    prepared = prepare_weights(config, params, None if stacked else adapters, fuse=not stacked)
    run: Any = partial(
        Transformer(config).apply,
        {"params": params},
        prepared=prepared,
        adapters=adapters if stacked else None,
        return_hidden=True,
    )
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)

    def logits_of(hidden: Array) -> Array:  # (B, width) -> (B, V)
        return matmul(hidden, prepared["head"]).astype(jnp.float32)

    def record(state: _Decoding, logits: Array) -> _Decoding:
        """Draws token `state.step`, for the rows that still run."""
        token, logprob = draw(logits, sampling, keys, state.step)
        running = ~state.ended
        at = (0, state.step)
        return state.replace(
            step=state.step + 1,
            token=jnp.where(running, token, 0),
            tokens=jax.lax.dynamic_update_slice(state.tokens, jnp.where(running, token, 0)[:, None], at),
            logprobs=jax.lax.dynamic_update_slice(state.logprobs, jnp.where(running, logprob, 0.0)[:, None], at),
            lengths=state.lengths + running,
            ended=state.ended | jnp.any(token[:, None] == stops, axis=-1),
        )

    # Prefill: slots 0 ... P - 1 hold the prompts; the answers' slots start at P for every row.
    cache = empty_cache(config, batch, width + count)
    slots = jnp.arange(width + count)
    cache = cache.replace(valid=slots < lengths[:, None])
    hidden, cache = run(prompts, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = _Decoding(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
        cache=cache.replace(valid=cache.valid | (slots >= width)),
        tokens=jnp.zeros((batch, count), jnp.int32),
        logprobs=jnp.zeros((batch, count), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
        ended=jnp.zeros((batch,), bool),
    )
    state = record(state, logits_of(last))

    def unfinished(state: _Decoding) -> Array:
        return (state.step < count) & ~jnp.all(state.ended)

    def advance(state: _Decoding) -> _Decoding:
        positions = (lengths + state.step - 1)[:, None]
        hidden, cache = run(state.token[:, None], positions=positions, cache=state.cache)
        return record(state.replace(cache=cache), logits_of(hidden[:, 0]))

    state = jax.lax.while_loop(unfinished, advance, state)
    return Rollout(prompts, lengths, state.tokens, state.lengths, state.ended, state.logprobs, sampling)
