"""Small problems of clipping, one of every objective, and the loop over units that every clipped sum must equal."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base, split
from rlhf_jax.privacy.clipping import ROUNDING_MARGIN, clipped_sum
from rlhf_jax.rollout import Sampling
from rlhf_jax.stages.reward import reward_objective
from rlhf_jax.stages.reward_labels import label_objective
from rlhf_jax.training.experience import Experience, PPOConfig
from rlhf_jax.training.language_model import sft_objective
from rlhf_jax.training.ppo import ppo_objective
from rlhf_jax.training.preference import PreferenceConfig, preference_objective

SHAPE = TransformerConfig(vocab_size=13, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=24, context=32)
WIDE = TransformerConfig(vocab_size=61, layers=2, width=48, heads=4, kv_heads=2, head_dim=8, ffn=64, context=32)
SWITCHES = dataclasses.replace(
    WIDE,
    positions="learned",
    windows=(3, 0),
    attention_softcap=5.0,
    qk_norm=True,
    qkv_bias=True,
    o_bias=True,
    norm="layer",
    post_norms=True,
    gated=False,
    activation="gelu",
    ffn_bias=True,
    embedding_scale=2.0,
    tie_embeddings=False,
    logit_softcap=4.0,
)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
ROWS, WIDTH, SEGMENTS = 16, 12, 2
OUTSIDE = 10**6  # a token that is none: its embedding is NaN
PRESENT = np.arange(ROWS) % 5 != 2
PROBLEMS = (
    *("sft", "sft_full", "reward", "dpo"),
    *("switches_full", "reward_full", "dpo_full", "ppo_full", "label_full"),
)


@cache
def base(config, seed):
    """Random weights; norms and biases are not constants."""
    params = jax.jit(partial(init_base, config))(key=jax.random.key(seed))
    params = {**params, "embedding": 10 * params["embedding"]}
    if config == SHAPE:
        return params
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.05) * rng.normal(size=leaf.shape).astype(np.float32), params)


def adapted(seed):
    adapters = init_adapters(SHAPE, LORA, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for leaf in adapters.values():
        leaf["b"] = jnp.asarray(0.1 * rng.normal(size=leaf["b"].shape), jnp.float32)
    return adapters


def packed_rows(rng):
    """Two records of unequal lengths a row, padding after them; some tokens are not learned."""
    tokens, at = rng.integers(0, 13, (ROWS, WIDTH)), np.arange(WIDTH)
    ends = np.cumsum(rng.integers(1, 7, (ROWS, SEGMENTS)), 1)
    segments = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0))
    positions = np.where(segments == 2, at - ends[:, :1], at)
    mask = ((segments > 0) & (rng.random(segments.shape) < 0.8)).astype(np.float32)
    whole = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in whole.items()} | {"loss_mask": mask}


def answer_pairs(rng):
    """A prompt of 1 to 4 tokens with two answers of 1 to 6."""
    prompts, lengths = rng.integers(1, 5, ROWS), rng.integers(1, 7, (ROWS, 2))
    tokens = rng.integers(0, 13, (ROWS, 2, WIDTH))
    at_prompt = np.arange(WIDTH) < prompts[:, None]
    tokens[:, 1] = np.where(at_prompt, tokens[:, 0], tokens[:, 1])
    tokens[np.arange(ROWS), 1, prompts] = (tokens[np.arange(ROWS), 0, prompts] + 1) % 13  # answers differ at once
    answers = np.stack([tokens[i][:, prompts[i] : prompts[i] + 6] for i in range(ROWS)])
    whole = {"tokens": tokens, "answers": answers, "lengths": lengths, "prompt_lengths": prompts}
    return {name: x.astype(np.int32) for name, x in whole.items()} | {"weight": np.ones(ROWS, np.float32)}


def answers(rng):
    """Prompts of 1 to 5 tokens, answers of 1 to 6 and what an update reads of them, as of another policy."""
    lengths, shape = rng.integers(1, 7, ROWS), (ROWS, 6)
    fields = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
    mask = np.arange(6) < lengths[:, None]
    whole = {name: np.where(mask, rng.normal(size=shape), 0).astype(np.float32) for name in fields}
    whole["logprobs"] -= 4 * mask
    ids = {"prompts": rng.integers(0, 13, (ROWS, 5)), "prompt_lengths": rng.integers(1, 6, ROWS), "lengths": lengths}
    ids["tokens"] = np.where(mask, rng.integers(0, 13, shape), 0)
    return whole | {name: x.astype(np.int32) for name, x in ids.items()}


def spec_of(name):
    """With layers computed again in the backward pass for some problems."""
    if not name.endswith("full"):
        return RoleSpec(dataclasses.replace(SHAPE, remat="full" if name == "reward" else "none"), LORA)
    if name == "sft_full":
        return RoleSpec(SHAPE)
    remat = {"switches_full": "full", "reward_full": "dots"}.get(name, "none")
    return RoleSpec(dataclasses.replace(SWITCHES if name == "switches_full" else WIDE, remat=remat))


@cache
def problem(name):
    """(objective, trainable, frozen, batch); absent rows of the batch hold tokens that give NaN."""
    rng = np.random.default_rng(PROBLEMS.index(name))
    spec, kind = spec_of(name), name.split("_")[0]
    weights = {"base": base(spec.config, 0)}
    if spec.lora:
        weights["adapters"] = adapted(1)
    if kind in ("reward", "label"):
        weights["head"] = init_head(spec.config.width, 0.1, key=jax.random.key(2))
    trainable, frozen = split(spec, weights)
    if kind in ("sft", "switches"):
        return sft_objective(spec, SEGMENTS), trainable, frozen, packed_rows(rng)
    if kind == "ppo":
        value = {"base": base(spec.config, 3), "head": init_head(spec.config.width, 0.3, key=jax.random.key(4))}
        config = PPOConfig(value_coef=0.5, entropy_coef=0.1, kl_in="loss")
        both = {"policy": trainable, "value": value}
        frozen = {"policy": {}, "value": {}, "kl_coef": np.float32(0.2)}
        return _on_fields(ppo_objective(config, spec, spec)), both, frozen, answers(rng)
    pairs = answer_pairs(rng)
    ends = pairs["prompt_lengths"][:, None] + pairs["lengths"]
    if kind == "reward":
        batch = {"tokens": pairs["tokens"], "lengths": ends, "weight": pairs["weight"]}
        return reward_objective(spec), trainable, frozen, batch
    if kind == "label":
        batch = {"tokens": pairs["tokens"][:, 0], "lengths": ends[:, 0], "weight": pairs["weight"]}
        return label_objective(spec), trainable, frozen, batch | {"positive": rng.random(ROWS) < 0.5}
    pairs["reference"] = rng.normal(-10, 2, (ROWS, 2)).astype(np.float32)  # log-probabilities
    config = PreferenceConfig(beta=0.5)
    frozen = {"policy": frozen, "coefficients": config.coefficients}
    return preference_objective(config, spec, None), trainable, frozen, pairs


def _on_fields(objective):
    """The objective of an `Experience`, on a dict of its fields."""
    sampling = Sampling(max_new_tokens=6, temperature=0.7)
    return lambda trainable, frozen, batch: objective(trainable, frozen, Experience(**batch, sampling=sampling))


def spoilt(batch, units, rows=1):
    """The batch with NaN in the forward pass of some units."""
    tokens = np.array(batch["tokens"])
    tokens.reshape(-1, rows, *tokens.shape[1:])[units] = OUTSIDE
    return {**batch, "tokens": tokens}


@cache
def unit_gradients(name, rows=1):
    """The gradient of each unit's loss, by jax.grad on its rows alone: a list of trees in float64."""
    objective, trainable, frozen, batch = problem(name)

    @jax.jit
    @jax.grad
    def gradient(trainable, unit):
        out = objective(trainable, frozen, unit)
        return out.losses.sum() / jnp.maximum(out.weights.sum(), 1.0)

    units = [{field: x[i : i + rows] for field, x in batch.items()} for i in range(0, ROWS, rows)]
    return [jax.tree.map(lambda g: np.asarray(g, np.float64), gradient(trainable, unit)) for unit in units]


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


@cache
def median_norm(name, rows=1):
    return float(np.median([norm(g) for g in unit_gradients(name, rows)]))


def expected(name, present, clip_norm, rows=1):
    """(sum, norms) of a loop over the units, in float64."""
    grads = unit_gradients(name, rows)
    norms = np.array([norm(g) for g in grads]) * present
    factors = present * np.minimum(1.0, clip_norm * (1 - ROUNDING_MARGIN) / np.maximum(norms, 1e-30))
    return jax.tree.map(lambda *g: sum(f * x for f, x in zip(factors, g, strict=True)), *grads), norms


@cache
def program(name, backend, accumulation=1, rows=1, clip_norm=None):
    """Clipped at the median norm, unless said."""
    clip_norm = clip_norm or median_norm(name, rows)
    objective = problem(name)[0]
    return jax.jit(clipped_sum(objective, clip_norm, backend=backend, accumulation=accumulation, units_rows=rows))


def run(name, batch, present, backend, **options):
    _, trainable, frozen, _ = problem(name)
    total, norms, _ = program(name, backend, **options)(trainable, frozen, batch, present)
    assert jax.tree.structure(total) == jax.tree.structure(trainable)
    return jax.device_get(total), np.asarray(norms)


def difference(a, b):
    """Largest difference over the largest entry."""
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(np.abs(x - y).max() for x, y in leaves) / max(np.abs(y).max() for _, y in leaves)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
