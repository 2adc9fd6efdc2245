"""One PPO iteration after its rollout: score once, estimate advantages, update in one jitted program.

Old, reference and new log-probabilities come from `rollout.scoring.answer_logprobs` at one minibatch shape: before the
first update every ratio is 1 and the KL to an equal reference is 0.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.objectives import gae, kl_penalized_rewards, ppo_policy_loss, ppo_value_loss, whiten
from rlhf_jax.rollout.generate import Rollout
from rlhf_jax.rollout.scoring import (
    RoleScores,
    answer_logprobs,
    answer_scores,
    answer_values,
    scores_together,
    with_end_token,
)
from rlhf_jax.training.gradient import Objective, RecordLosses, microbatches, plain_gradient
from rlhf_jax.training.state import TrainState, apply_gradient

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The numbers of PPO; hashable, so the jitted functions take it as static."""

    epochs: int = 2
    minibatches: int = 2
    accumulation: int = 1
    kl_coef: float = 0.05
    missing_end_penalty: float = -1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip_ratio: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    whiten_advantages: bool = True


class Experience(struct.PyTreeNode):
    """A scored rollout: what the update reads. (B, ...) leaves; entries beyond a length are 0."""

    prompts: Array  # (B, P)
    prompt_lengths: Array  # (B,)
    tokens: Array  # (B, N)
    lengths: Array  # (B,)
    logprobs: Array  # (B, N) of the policy that sampled, by scoring
    values: Array  # (B, N)
    advantages: Array  # (B, N)
    returns: Array  # (B, N)


def _row_fields(rollout: Rollout | Experience) -> tuple[Array, Array, Array, Array]:
    return rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths


def _over_parts(score: Any, fields: tuple[Array, ...], parts: int) -> Any:
    """Maps `score` over `parts` strided parts of the rows; the result is in the rows' order again."""
    if parts == 1:
        return score(*fields)
    out = jax.lax.map(lambda rows: score(*rows), microbatches(fields, parts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_logprobs(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int) -> tuple[Array, Array]:
    """Log-probabilities and entropies (B, N) of a rollout, `parts` pieces of the update's minibatch shape at a time.

    Policy and reference go through this one compiled program.
    """
    score = partial(answer_logprobs, spec, weights, temperature=rollout.sampling.temperature)
    return _over_parts(score, _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_values(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int) -> Array:
    """Values (B, N) of a rollout."""
    return _over_parts(partial(answer_values, spec, weights), _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_together(
    spec: RoleSpec, base: Any, adapters: dict[str, Any], value_head: dict[str, Array], rollout: Rollout, parts: int
) -> RoleScores:
    """`score_logprobs` of policy and reference and `score_values`, for roles that share a base, in one pass."""
    score = partial(scores_together, spec, base, adapters, value_head, temperature=rollout.sampling.temperature)
    return _over_parts(score, _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts", "stop_strings"))
def score_rewards(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int, stop_strings: bool = False) -> Array:
    """The reward model's scores (B,) of a rollout, before any penalty.

    `stop_strings`: answers may have ended without a stop token; they are read `with_end_token`.
    """
    prompts, prompt_lengths, tokens, lengths = _row_fields(rollout)
    if stop_strings:
        tokens, lengths = with_end_token(tokens, lengths, rollout.ended, rollout.sampling.stop_ids)
    return _over_parts(partial(answer_scores, spec, weights), (prompts, prompt_lengths, tokens, lengths), parts)


def end_penalized(scores: Array, ended: Array, penalty: float) -> Array:
    """Scores with `penalty` put in the place of the score of every answer that has no stop token."""
    return jnp.where(ended, scores, penalty)


@partial(jax.jit, static_argnames="config")
def make_experience(
    config: PPOConfig,
    rollout: Rollout,
    logprobs: Array,
    ref_logprobs: Array,
    entropy: Array,
    values: Array,
    scores: Array,
) -> tuple[Experience, Metrics]:
    """Rewards, advantages and returns of a scored rollout, and its metrics.

    Statistics (whitening, metrics) are over the global batch. Metrics, each a mean over answers unless said:
    `objective/kl` sum over tokens of log pi - log pi_ref; `objective/entropy` sum of -log pi; `objective/scores` after
    the missing-end penalty; `objective/rlhf_reward` = scores - kl_coef * kl; `policy/entropy` exact, mean over tokens;
    `rollout/logprob_gap` mean over tokens of |decode - score|; `val/num_eos_tokens` a count.
    """
    mask = jnp.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    count = jnp.sum(mask)
    scores = end_penalized(scores, rollout.ended, config.missing_end_penalty)
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, rollout.lengths, config.kl_coef)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    kl = jnp.sum(jnp.where(mask, logprobs - ref_logprobs, 0.0), axis=-1)
    metrics = {
        "objective/kl": kl.mean(),
        "objective/entropy": -jnp.sum(logprobs, axis=-1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/rlhf_reward": (scores - config.kl_coef * kl).mean(),
        "objective/kl_coef": jnp.float32(config.kl_coef),
        "policy/entropy": entropy.sum() / count,
        "rollout/logprob_gap": jnp.sum(jnp.abs(rollout.logprobs - logprobs)) / count,
        "val/num_eos_tokens": rollout.ended.sum(),
        "response_length": rollout.lengths.mean(dtype=jnp.float32),
        "returns/mean": returns.sum() / count,
        "val/error": jnp.sum(jnp.where(mask, jnp.square(values - returns), 0.0)) / count,
    }
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    fields = (rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths)
    return Experience(*fields, logprobs, values, advantages, returns), metrics


def ppo_objective(config: PPOConfig, policy: RoleSpec, value: RoleSpec, temperature: float) -> Objective:
    """Clipped policy loss + value_coef * clipped value loss, one loss an answer; weights are its tokens.

    trainable and frozen: {"policy": parts of the weights, "value": parts}; batch: `Experience`.
    """

    def objective(trainable: Any, frozen: Any, batch: Experience) -> RecordLosses:
        fields = _row_fields(batch)
        weights = {role: {**frozen[role], **trainable[role]} for role in ("policy", "value")}
        logprobs, _ = answer_logprobs(policy, weights["policy"], *fields, temperature)
        values = answer_values(value, weights["value"], *fields)
        mask = jnp.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        count = jnp.sum(mask, dtype=jnp.float32)

        def masked(x: Array) -> Array:
            return jnp.where(mask, x, 0.0)

        pg = masked(ppo_policy_loss(logprobs, batch.logprobs, batch.advantages, config.clip_ratio))
        vf = masked(ppo_value_loss(values, batch.values, batch.returns, config.value_clip))
        log_ratio = masked(logprobs - batch.logprobs)
        ratio = jnp.exp(log_ratio)
        metrics = {
            "loss/policy": pg,
            "loss/value": vf,
            "policy/approxkl": 0.5 * jnp.square(log_ratio),
            "policy/clipfrac": masked(jnp.abs(ratio - 1.0) > config.clip_ratio),
            "val/clipfrac": masked(jnp.abs(values - batch.values) > config.value_clip),
            "val/ratio": masked(ratio),
            "val/ratio_error": masked(jnp.abs(ratio - 1.0)),
        }
        losses = jnp.sum(pg + config.value_coef * vf, axis=-1)
        sums = {name: (jnp.sum(x, dtype=jnp.float32), count) for name, x in metrics.items()}
        return RecordLosses(losses, batch.lengths.astype(jnp.float32), sums)

    return objective


def minibatch_rows(key: Array, rows: int, epochs: int, minibatches: int) -> Array:
    """Row numbers (epochs * minibatches, rows / minibatches): a fresh keyed permutation for every epoch."""
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return orders.reshape(epochs * minibatches, rows // minibatches)


def make_update(
    config: PPOConfig,
    policy: RoleSpec,
    value: RoleSpec,
    temperature: float,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
):
    """The jitted `(state, frozen, experience, key) -> (state, metrics)`: all epochs and minibatches in one program.

    The state is donated. Metrics are means over the updates; `val/first_ratio_error` is of the first minibatch, where
    nothing has been updated yet: the mean of |ratio - 1|, 0 up to rounding.
    """
    gradient = plain_gradient(ppo_objective(config, policy, value, temperature), config.accumulation)

    def update(state: TrainState, frozen: Any, experience: Experience, key: Array) -> tuple[TrainState, Metrics]:
        def one(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
            batch = jax.tree.map(lambda x: constrain(x[rows], "batch", *[None] * (x.ndim - 1)), experience)
            grads, metrics = gradient(state.params, frozen, batch)
            state, norms = apply_gradient(state, grads, optimizer)
            return state, metrics | norms

        rows = minibatch_rows(key, experience.lengths.shape[0], config.epochs, config.minibatches)
        state, stacked = jax.lax.scan(one, state, rows)
        metrics = {name: x.mean() for name, x in stacked.items()}
        metrics["val/first_ratio_error"] = stacked["val/ratio_error"][0]
        metrics["val/ratio_var"] = stacked["val/ratio"].var()
        return state, metrics

    return jax.jit(update, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
