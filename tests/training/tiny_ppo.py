"""Tiny roles in process: a policy, a critic and a reward model, their rollout, its experience, and one update."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base, split
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.training.experience import PPOConfig, init_controllers, make_experience
from rlhf_jax.training.ppo import make_update, score_logprobs, score_rewards, score_values
from rlhf_jax.training.state import TrainState

CONFIG = TransformerConfig(
    vocab_size=13, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32, tie_embeddings=False
)
ROWS, WIDTH, COUNT = 8, 5, 6
LENGTHS = np.array([5, 2, 3, 1, 4, 5, 2, 3], np.int32)
PROMPTS = np.where(np.arange(WIDTH) < LENGTHS[:, None], np.arange(1, 41).reshape(8, 5) % 13, 0).astype(np.int32)
ONCE = PPOConfig(epochs=1, minibatches=1)
OPTIMIZER = optax.sgd(0.1)  # moves in proportion to the gradient, so an error in it shows in the parameters


def base(seed):
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(seed))
    return {**params, "embedding": 30 * params["embedding"]}


def make_roles(lora):
    """Policy, value and reward with their own bases; under LoRA policy and value have adapters."""
    adapted, plain = RoleSpec(CONFIG, LoraConfig(rank=2, alpha=4.0) if lora else None), RoleSpec(CONFIG)
    weights = {
        "policy": {"base": base(0)},
        "value": {"base": base(1), "head": init_head(16, 0.3, key=jax.random.key(2))},
        "reward": {"base": base(3), "head": init_head(16, 1.0, key=jax.random.key(4))},
    }
    if lora:
        for i, role in enumerate(("policy", "value")):
            weights[role]["adapters"] = init_adapters(CONFIG, adapted.lora, key=jax.random.key(5 + i))
    return SimpleNamespace(spec=adapted, reward=plain, weights=weights)


def roll(roles, temperature=1.0, key=0):
    sampling = Sampling(max_new_tokens=COUNT, temperature=temperature, stop_ids=(8, 12))
    params = roles.weights["policy"]["base"]  # fresh adapters change nothing
    rollout = generate(CONFIG, params, PROMPTS, LENGTHS, key=jax.random.key(key), sampling=sampling)
    assert len(np.unique(rollout.lengths)) > 2 and 0 < rollout.ended.sum() < ROWS
    return rollout


def experience_of(roles, rollout, config=ONCE, reference=None):
    parts = config.minibatches * config.accumulation
    logprobs, entropy = score_logprobs(roles.spec, roles.weights["policy"], rollout, parts)
    ref_logprobs, _ = score_logprobs(roles.spec, reference or roles.weights["policy"], rollout, parts)
    values = score_values(roles.spec, roles.weights["value"], rollout, parts)
    scores = score_rewards(roles.reward, roles.weights["reward"], rollout, parts)
    return experienced(config, rollout, logprobs, ref_logprobs, entropy, values, scores)


def experienced(config, rollout, logprobs, ref_logprobs, entropy, values, scores):
    """(experience, metrics) with fresh controllers."""
    read = RoleScores(logprobs, ref_logprobs, entropy, values)
    return make_experience(config, rollout, read, scores, init_controllers(config))[:2]


def trainable_and_frozen(roles):
    parts = {role: split(roles.spec, roles.weights[role]) for role in ("policy", "value")}
    return {role: part[0] for role, part in parts.items()}, {role: part[1] for role, part in parts.items()}


@cache
def shared_update(config, spec, optimizer):
    """One program for all tests that run it."""
    return make_update(config, spec, spec, optimizer)


def run(roles, experience, config, key=0, optimizer=OPTIMIZER):
    """(new trainable weights, metrics) of one update from the roles' weights."""
    params, frozen = trainable_and_frozen(roles)
    params = jax.tree.map(jnp.copy, params)  # donated
    update = shared_update(config, roles.spec, optimizer)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    state, metrics = update(state, frozen, experience, config.kl_coef, jax.random.key(key))
    assert int(state.step) == int(metrics["policy/updates"])
    assert config.stops_updates or int(state.step) == config.epochs * config.minibatches
    return state.params, metrics


def largest(a, b):
    """Largest difference of two trees."""
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def synthetic(seed=0):
    """A rollout and its scores from random numbers: no model."""
    rng = np.random.default_rng(seed)
    lengths = np.array([6, 1, 3, 2, 6, 4, 5, 2], np.int32)
    mask = np.arange(COUNT) < lengths[:, None]
    logprobs, ref_logprobs, values = (np.where(mask, rng.normal(size=mask.shape), 0.0) for _ in range(3))
    ended = np.array([0, 1, 1, 0, 1, 1, 0, 1], bool)
    tokens = np.where(mask, rng.integers(1, 13, mask.shape), 0)
    arrays = [np.float32(x) for x in (logprobs, ref_logprobs, np.abs(logprobs), values, rng.normal(size=ROWS))]
    rollout = Rollout(PROMPTS, LENGTHS, tokens, lengths, ended, np.float32(logprobs), Sampling(max_new_tokens=COUNT))
    return rollout, mask, arrays
