"""Workload W: Llama architecture, 6 layers, width 384, 6 heads, 2 key-value heads of 64, feed-forward 1024, vocabulary
4096, float32. Every workload is the library's own step on random tokens; nothing stops early.
"""

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
from rlhf_jax.stages.sft import sft_objective
from rlhf_jax.training.gradient import plain_gradient
from rlhf_jax.training.ppo import PPOConfig, make_experience, make_update, score_logprobs, score_values
from rlhf_jax.training.state import TrainState, apply_gradient

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


def sft(repeats: int) -> dict[str, Any]:
    """One AdamW step on 8 x 256 tokens, in microbatches of 4 rows."""
    batch_size, length, config = 8, 256, workload_w()
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

    return {"seconds_all": _timed(once, repeats), "tokens": batch_size * length}


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
    config = PPOConfig(epochs=1, minibatches=1, accumulation=2, value_coef=0.5)
    reference = {"base": init_base(spec.config, key=jax.random.key(0))}
    head = init_head(spec.config.width, 0.0, key=jax.random.key(1))
    params = jax.tree.map(jnp.copy, {"policy": reference, "value": {**reference, "head": head}})
    optimizer = optax.adamw(1e-5)
    update = make_update(config, spec, spec, 1.0, optimizer)
    box = [TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))]
    frozen: dict[str, Any] = {"policy": {}, "value": {}}
    sampling = Sampling(64, stop_ids=NEVER)
    lengths = jnp.full((16,), 64, jnp.int32)

    def answers(i: int) -> Rollout:
        prompts = rng.integers(3, 4096, (16, 64)).astype(np.int32)
        base = box[0].params["policy"]["base"]
        return generate(spec.config, base, prompts, lengths, key=jax.random.key(i), sampling=sampling)

    def score(rollout: Rollout) -> tuple[Any, ...]:
        acting = box[0].params
        logprobs, entropy = score_logprobs(spec, acting["policy"], rollout, config.accumulation)
        ref_logprobs, _ = score_logprobs(spec, reference, rollout, config.accumulation)
        return logprobs, ref_logprobs, entropy, score_values(spec, acting["value"], rollout, config.accumulation)

    def once(i: int) -> Any:
        rollout = answers(i)
        logprobs, ref_logprobs, entropy, values = score(rollout)
        scores = (rollout.lengths % 7).astype(jnp.float32)
        experience, metrics = make_experience(config, rollout, logprobs, ref_logprobs, entropy, values, scores)
        box[0], updates = update(box[0], frozen, experience, jax.random.key(i))
        return metrics | updates

    seconds = _timed(once, repeats)
    rollout = answers(0)
    parts = {"rollout": _timed(answers, 3), "scoring": _timed(lambda i: score(rollout), 3)}
    return {"seconds_all": seconds, "tokens": 16 * 128, "parts": {k: statistics.median(v) for k, v in parts.items()}}


WORKLOADS: dict[str, Callable[[int], dict[str, Any]]] = {"sft": sft, "generate": generation, "ppo": ppo}
