"""Scoring answers: the one place where log-probabilities, values and scores of a rollout are computed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.models.roles import RoleSpec, Weights, hidden_states, over_members
from rlhf_jax.models.transformer import output_kernel
from rlhf_jax.objectives.language_model import token_logprobs

Array = jax.Array


def join(prompts: Array, prompt_lengths: Array, answers: Array) -> Array:
    """Right-padded rows with each answer directly after its prompt.

    Args:
      prompts: (B, P) int32; prompt_lengths: (B,) int32; answers: (B, N) int32.

    Returns:
      (B, P + N) int32: what follows prompt_lengths + answer length is padding.
    """
    width = prompts.shape[1] + answers.shape[1]
    at = jnp.arange(width)[None]
    padded = jnp.pad(prompts, ((0, 0), (0, answers.shape[1])))
    from_answer = jnp.clip(at - prompt_lengths[:, None], 0, answers.shape[1] - 1)
    inside = (at >= prompt_lengths[:, None]) & (at - prompt_lengths[:, None] < answers.shape[1])
    later = jnp.where(inside, jnp.take_along_axis(answers, from_answer, axis=1), 0)
    return jnp.where(at < prompt_lengths[:, None], padded, later)


def _before_answers(tokens: Array, prompt_lengths: Array, count: int) -> Array:
    """Position before each answer token in rows (B, T): (B, count) int32; beyond the row it is its last."""
    return jnp.minimum((prompt_lengths - 1)[:, None] + jnp.arange(count), tokens.shape[1] - 1)


def answer_states(spec: RoleSpec, weights: Weights, tokens: Array, prompt_lengths: Array, answers: Array) -> Array:
    """Hidden states before each answer token of rows (B, T): (B, N, width)."""
    return hidden_states(spec, weights, tokens, keep=_before_answers(tokens, prompt_lengths, answers.shape[1]))


def answer_logprobs(
    spec: RoleSpec,
    weights: Weights,
    prompts: Array,
    prompt_lengths: Array,
    answers: Array,
    lengths: Array,
    temperature: float,
) -> tuple[Array, Array]:
    """Log-probabilities of the answers' tokens and the entropies of their distributions.

    Behaviour, new and reference log-probabilities are all this function, at the temperature of the rollout's sampling.

    Args:
      prompts (B, P), prompt_lengths (B,), answers (B, N), lengths (B,): fields of a `Rollout`.

    Returns:
      logprobs (B, N) and entropy (B, N), float32 nats, 0 beyond each length.
    """
    rows = join(prompts, prompt_lengths, answers)
    return row_logprobs(spec, weights, rows, prompt_lengths, answers, lengths, temperature)


def row_logprobs(
    spec: RoleSpec,
    weights: Weights,
    tokens: Array,
    prompt_lengths: Array,
    answers: Array,
    lengths: Array,
    temperature: float,
) -> tuple[Array, Array]:
    """`answer_logprobs` of rows (B, T) in which each answer stands behind its prompt already."""
    before = answer_states(spec, weights, tokens, prompt_lengths, answers)
    kernel = output_kernel(spec.config, weights["base"])
    logprobs, entropy = token_logprobs(before, kernel, answers, temperature, spec.config.logit_softcap)
    inside = jnp.arange(answers.shape[1]) < lengths[:, None]
    return jnp.where(inside, logprobs, 0.0), jnp.where(inside, entropy, 0.0)


def answer_values(
    spec: RoleSpec, weights: Weights, prompts: Array, prompt_lengths: Array, answers: Array, lengths: Array
) -> Array:
    """The value head's estimate of the state before each answer token: (B, N) float32, 0 beyond each length."""
    tokens = join(prompts, prompt_lengths, answers)
    before = answer_states(spec, weights, tokens, prompt_lengths, answers)
    values = heads.apply_head(weights["head"], before)
    return jnp.where(jnp.arange(answers.shape[1]) < lengths[:, None], values, 0.0)


def answer_logprobs_and_values(
    spec: RoleSpec,
    weights: Weights,
    prompts: Array,
    prompt_lengths: Array,
    answers: Array,
    lengths: Array,
    temperature: float,
) -> tuple[Array, Array, Array, Array | None]:
    """`answer_logprobs` and `answer_values` of one role with a head, in one pass.

    Returns:
      logprobs, entropy, values and, of a role with a "cost_head", cost values (else None), (B, N) each.
    """
    tokens = join(prompts, prompt_lengths, answers)
    before = answer_states(spec, weights, tokens, prompt_lengths, answers)
    kernel = output_kernel(spec.config, weights["base"])
    logprobs, entropy = token_logprobs(before, kernel, answers, temperature, spec.config.logit_softcap)
    inside = jnp.arange(answers.shape[1]) < lengths[:, None]
    columns = logprobs, entropy, heads.apply_head(weights["head"], before)
    logprobs, entropy, values = (jnp.where(inside, x, 0.0) for x in columns)
    if "cost_head" not in weights:
        return logprobs, entropy, values, None
    return logprobs, entropy, values, jnp.where(inside, heads.apply_head(weights["cost_head"], before), 0.0)


def stacked_hidden_states(spec: RoleSpec, base: Any, adapters: Sequence[Any], tokens: Array, **kwargs: Any) -> Array:
    """Final hidden states of several roles on the same tokens, in one pass over one base.

    The roles' rows run together, each with its own adapters: every base weight is read once for all of them.

    Args:
      adapters: one unscaled adapter tree a role, R of them.
      tokens: (B, T) int32.

    Returns:
      (R, B, T, width), what `hidden_states` gives for each role within float32 rounding.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    return jax.vmap(lambda own: hidden_states(spec, {"base": base, "adapters": own}, tokens, **kwargs))(stacked)


class RoleScores(NamedTuple):
    """What PPO reads of a rollout's tokens; (B, N) float32 each, 0 beyond each length."""

    logprobs: Array  # of the policy
    ref_logprobs: Array
    entropy: Array
    values: Array
    cost_values: Array | None = None  # of the cost critic, under a constraint


def scores_together(
    spec: RoleSpec,
    base: Any,
    adapters: dict[str, Any],
    value_head: dict[str, Array],
    prompts: Array,
    prompt_lengths: Array,
    answers: Array,
    lengths: Array,
    temperature: float,
    cost_head: dict[str, Array] | None = None,
) -> RoleScores:
    """`answer_logprobs` of policy and reference and `answer_values` of the value roles, in one pass.

    Args:
      adapters: {"policy", "reference", "value": unscaled adapter tree} on the one `base`; with a `cost_head`
        "cost_value" too.
      prompts (B, P), prompt_lengths (B,), answers (B, N), lengths (B,): fields of a `Rollout`.
    """
    roles = ("policy", "reference", "value", "cost_value")[: 4 if cost_head else 3]
    tokens = join(prompts, prompt_lengths, answers)
    keep = _before_answers(tokens, prompt_lengths, answers.shape[1])
    before = stacked_hidden_states(spec, base, [adapters[role] for role in roles], tokens, keep=keep)
    policy, reference, value, *cost_value = before
    kernel, cap = output_kernel(spec.config, base), spec.config.logit_softcap
    logprobs, entropy = token_logprobs(policy, kernel, answers, temperature, cap)
    ref_logprobs, _ = token_logprobs(reference, kernel, answers, temperature, cap)
    inside = jnp.arange(answers.shape[1]) < lengths[:, None]
    columns = [logprobs, ref_logprobs, entropy, heads.apply_head(value_head, value)]
    if cost_head is not None:
        columns.append(heads.apply_head(cost_head, cost_value[0]))
    return RoleScores(*(jnp.where(inside, x, 0.0) for x in columns))


def last_scores(spec: RoleSpec, weights: Weights, tokens: Array, lengths: Array) -> Array:
    """The head's score at each row's last real token: tokens (B, T), lengths (B,) -> (B,) float32."""
    last = hidden_states(spec, weights, tokens, keep=(lengths - 1)[:, None])
    return heads.apply_head(weights["head"], last)[:, 0]


def member_scores(spec: RoleSpec, weights: Weights, tokens: Array, lengths: Array) -> Array:
    """`last_scores` of every member of an ensemble, in one pass over the base: (members, B), (1, B) of a role alone."""
    if spec.members == 1:
        return last_scores(spec, weights, tokens, lengths)[None]
    return over_members(lambda one, mine: last_scores(one, mine, tokens, lengths), spec, weights)


def with_end_token(tokens: Array, lengths: Array, ended: Array, stop_ids: tuple[int, ...]) -> tuple[Array, Array]:
    """Answers with the first stop id after those that a stop string ended: reward models read it behind every answer.

    Args:
      tokens (B, N), lengths (B,), ended (B,): fields of a `Rollout`.

    Returns:
      tokens (B, N + 1) and lengths (B,).
    """
    last = jnp.take_along_axis(tokens, (lengths - 1)[:, None], axis=1)
    missing = ended & ~jnp.any(last == jnp.asarray(stop_ids, tokens.dtype), axis=-1)
    wider = jnp.pad(tokens, ((0, 0), (0, 1)))
    here = (jnp.arange(wider.shape[1]) == lengths[:, None]) & missing[:, None]
    return jnp.where(here, stop_ids[0], wider), lengths + missing


def answer_rows(
    spec: RoleSpec, prompts: Array, prompt_lengths: Array, answers: Array, lengths: Array
) -> tuple[Array, Array]:
    """Rows (B, T) of prompts with their answers as a reward role reads them, and their lengths (B,).

    A role with an answer mark reads it at the end of the prompt: without it nothing tells where the answer begins.
    """
    if spec.answer_mark is not None:
        mark = jnp.full((prompts.shape[0], 1), spec.answer_mark, prompts.dtype)
        prompts, prompt_lengths = join(prompts, prompt_lengths, mark), prompt_lengths + 1
    return join(prompts, prompt_lengths, answers), prompt_lengths + lengths


def answer_scores(
    spec: RoleSpec, weights: Weights, prompts: Array, prompt_lengths: Array, answers: Array, lengths: Array
) -> Array:
    """The reward head's score at each row's last real token (`answer_rows`): (B,) float32."""
    return last_scores(spec, weights, *answer_rows(spec, prompts, prompt_lengths, answers, lengths))
