"""Workload W: Llama architecture, 6 layers, width 384, 6 heads, 2 key-value heads of 64, feed-forward 1024, vocabulary
4096, float32. Two workloads for accelerators are a 1B Llama in bfloat16, with their share of the roofline. Every
workload is the library's own step on random tokens; nothing stops early.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.training.experience import PPOConfig, init_controllers
from rlhf_jax.training.gradient import plain_gradient
from rlhf_jax.training.language_model import sft_objective
from rlhf_jax.training.ppo import make_single_update, score_logprobs
from rlhf_jax.training.state import TrainState, apply_gradient
from rlhf_jax.training.throughput import peak_bandwidth, peak_flops

NEVER = (4096,)  # a stop id outside the vocabulary


def workload_w(tie_embeddings: bool = True) -> TransformerConfig:
    """The decoder of workload W."""
    return TransformerConfig(
        vocab_size=4096,
        layers=6,
        width=384,
        heads=6,
        kv_heads=2,
        head_dim=64,
        ffn=1024,
        context=512,
        rope_theta=500_000.0,
        tie_embeddings=tie_embeddings,
    )


def _timed(once: Callable[[int], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of `repeats` calls, each ended by waiting for its result."""
    seconds = []
    for i in range(warm_up + repeats):
        start = time.perf_counter()
        jax.block_until_ready(once(i))
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


SFT_ROWS, SFT_LENGTH = 8, 256


def sft_steps() -> tuple[list[TrainState], Callable[[int], Any]]:
    """([the state], the function that takes its next step) of AdamW on 8 x 256 tokens, in microbatches of 4 rows."""
    batch_size, length, config = SFT_ROWS, SFT_LENGTH, workload_w()
    rng = np.random.default_rng(0)
    optimizer = optax.adamw(1e-4)
    gradient = plain_gradient(sft_objective(RoleSpec(config), 1), accumulation=2)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
        grads, metrics = gradient(state.params, {}, batch)
        state, norms = apply_gradient(state, grads, optimizer)
        return state, metrics | norms

    jitted = jax.jit(step, donate_argnums=0)
    params = {"base": init_base(config, key=jax.random.key(0))}
    box = [TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))]

    def once(i: int) -> Any:
        ids = rng.integers(3, 4096, (batch_size, length + 1)).astype(np.int32)
        ones = np.ones((batch_size, length), np.int32)
        batch = {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "segment_ids": ones,
            "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
            "loss_mask": ones.astype(np.float32),
        }
        box[0], metrics = jitted(box[0], batch)
        return metrics

    return box, once


def sft(repeats: int) -> dict[str, Any]:
    """One step of `sft_steps`."""
    _, once = sft_steps()
    return {"seconds_all": _timed(once, repeats), "tokens": SFT_ROWS * SFT_LENGTH}


def generation(repeats: int) -> dict[str, Any]:
    """16 prompts x 64 tokens, 128 new tokens each, temperature 1."""
    config, rng = workload_w(), np.random.default_rng(0)
    params = init_base(config, key=jax.random.key(0))
    sampling = Sampling(128, stop_ids=NEVER)
    lengths = jnp.full((16,), 64, jnp.int32)

    def once(i: int) -> Any:
        prompts = rng.integers(3, 4096, (16, 64)).astype(np.int32)
        return generate(config, params, prompts, lengths, key=jax.random.key(i), sampling=sampling).tokens

    return {"seconds_all": _timed(once, repeats), "tokens": 16 * 128}


def ppo(repeats: int) -> dict[str, Any]:
    """One PPO iteration: 16 prompts x 64, 64 new tokens, KL in the reward, one epoch, one minibatch, full-parameter
    critic and reference apart; embeddings untied as in the peer's script. The score is the answer's length modulo 7.
    """
    spec, rng = RoleSpec(workload_w(tie_embeddings=False)), np.random.default_rng(0)
    config = PPOConfig(epochs=1, minibatches=1, value_coef=0.5)
    reference = {"base": init_base(spec.config, key=jax.random.key(0))}
    head = init_head(spec.config.width, 0.0, key=jax.random.key(1))
    params = jax.tree.map(jnp.copy, {"policy": reference, "value": {**reference, "head": head}})
    optimizer = optax.adamw(1e-5)
    update = make_single_update(config, spec, spec, optimizer)
    box = [TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_controllers(config))]
    frozen: dict[str, Any] = {"policy": {}, "value": {}}
    sampling = Sampling(64, stop_ids=NEVER)
    lengths = jnp.full((16,), 64, jnp.int32)

    def answers(i: int) -> Rollout:
        prompts = rng.integers(3, 4096, (16, 64)).astype(np.int32)
        base = box[0].params["policy"]["base"]
        return generate(spec.config, base, prompts, lengths, key=jax.random.key(i), sampling=sampling)

    def reference_logprobs(rollout: Rollout) -> Any:
        return score_logprobs(spec, reference, rollout, 1)[0]

    def once(i: int) -> Any:
        rollout = answers(i)
        scores = (rollout.lengths % 7).astype(jnp.float32)
        box[0], _, metrics = update(box[0], frozen, rollout, reference_logprobs(rollout), scores, {})
        return metrics

    seconds = _timed(once, repeats)
    rollout = answers(0)
    parts = {"rollout": _timed(answers, 3), "reference": _timed(lambda i: reference_logprobs(rollout), 3)}
    return {"seconds_all": seconds, "tokens": 16 * 128, "parts": {k: statistics.median(v) for k, v in parts.items()}}


LLAMA_1B = TransformerConfig(
    vocab_size=128_256,
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    ffn=8192,
    context=4096,
    rope_theta=500_000.0,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


def sft_1b(
    repeats: int, config: TransformerConfig = LLAMA_1B, batch_size: int = 8, length: int = 2048
) -> dict[str, Any]:
    """One AdamW step of a 1B Llama, float32 parameters and bfloat16 products, on 8 x 2048 packed tokens.

    MFU = 3 x tokens x forward FLOPs a token (`TransformerConfig.forward_flops`) / seconds / the data sheet's peak.
    """
    config = dataclasses.replace(config, param_dtype="float32", remat="dots")
    optimizer = optax.adamw(1e-5)
    gradient = plain_gradient(sft_objective(RoleSpec(config), 1))

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Any]:
        grads, metrics = gradient(state.params, {}, batch)
        state, norms = apply_gradient(state, grads, optimizer)
        return state, metrics | norms

    jitted = jax.jit(step, donate_argnums=0)

    @jax.jit
    def create(key: jax.Array) -> TrainState:
        params = {"base": init_base(config, key=key)}
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    box = [create(jax.random.key(0))]
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (batch_size, length + 1)).astype(np.int32)
    ones = np.ones((batch_size, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    fields = dict(tokens=ids[:, :-1], targets=ids[:, 1:], segment_ids=ones, positions=positions)
    batch = jax.device_put({**fields, "loss_mask": ones.astype(np.float32)})

    def once(i: int) -> Any:
        box[0], metrics = jitted(box[0], batch)
        return metrics

    seconds, tokens = _timed(once, repeats), batch_size * length
    flops = 3 * tokens * config.forward_flops(length)
    share = flops / statistics.median(seconds) / peak_flops()
    return {"seconds_all": seconds, "tokens": tokens, "roofline": {"flops": flops, "mfu": share}}


def decode_1b(
    repeats: int, config: TransformerConfig = LLAMA_1B, batch_size: int = 64, prompt: int = 128, new: int = 256
):
    """Decoding of a 1B Llama in bfloat16, batch 64, prompt 128: a step's seconds, from 256 new tokens less 128.

    Bytes a step = every weight once (the embedding once, as output kernel) + the cache up to its mean length.
    """
    params = jax.jit(lambda key: init_base(config, key=key))(jax.random.key(0))
    lengths = jnp.full((batch_size,), prompt, jnp.int32)
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (batch_size, prompt)).astype(np.int32)

    def run(count: int) -> Callable[[int], Any]:
        sampling = Sampling(count, stop_ids=(config.vocab_size,))
        return lambda i: generate(config, params, prompts, lengths, key=jax.random.key(i), sampling=sampling).tokens

    long, short = (_timed(run(count), repeats) for count in (new, new // 2))
    step = (statistics.median(long) - statistics.median(short)) / (new - new // 2)
    width = jnp.dtype(config.dtype).itemsize
    row = 2 * config.layers * config.kv_heads * config.head_dim * width  # keys and values of a token
    moved = width * config.parameters + batch_size * row * (prompt + 3 * new // 4)
    bandwidth = peak_bandwidth()
    share = None if bandwidth is None else moved / step / bandwidth
    roofline = {"step_seconds": step, "bytes": moved, "bytes_per_second": moved / step, "bandwidth_share": share}
    return {"seconds_all": long, "tokens": batch_size * new, "roofline": roofline}


WORKLOADS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sft": sft,
    "generate": generation,
    "ppo": ppo,
    "sft_1b": sft_1b,
    "decode_1b": decode_1b,
}
