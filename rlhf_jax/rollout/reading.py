"""What a model says of text that is given, token by token: one pass that decodes nothing and keeps no logits."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.models.transformer import output_kernel, output_logits
from rlhf_jax.objectives.language_model import in_chunks
from rlhf_jax.rollout.sampling import Sampling, support_logits
from rlhf_jax.rollout.scoring import answer_states, join

Array = jax.Array


class Reading(NamedTuple):
    """Of each given token, before the model has read it: (B, N), 0 beyond each length.

    Attributes:
      logprobs: float32, the model's log-probability of the token, at temperature 1.
      sampled: float32, the same under a sampling scheme, tempered and renormalized over the kept tokens; -inf for a
        token that is not kept.
      gap: float32, its logit above the most likely other one; greedy: bool, whether greedy decoding chooses it.
      rank: int32, how many tokens are more likely.
      mean, deviation: float32, of the log-probability of a token that the model draws itself; mean is minus entropy.
    """

    logprobs: Array
    sampled: Array
    gap: Array
    greedy: Array
    rank: Array
    mean: Array
    deviation: Array


@partial(jax.jit, static_argnames=("spec", "scheme"))
def read_answers(
    spec: RoleSpec,
    weights: Weights,
    prompts: Array,
    prompt_lengths: Array,
    answers: Array,
    lengths: Array,
    scheme: Sampling,
) -> Reading:
    """Reads answers that stand behind their prompts, in one forward pass.

    Args:
      prompts: (B, P) int32, right-padded; prompt_lengths: (B,), at least 1.
      answers: (B, N) int32, right-padded; lengths: (B,).
      scheme: the sampling that `sampled` is of; with temperature 0 it is 0 of the greedy token, -inf of the others.
    """
    tokens = join(prompts, prompt_lengths, answers)
    before = answer_states(spec, weights, tokens, prompt_lengths, answers)
    kernel = output_kernel(spec.config, weights["base"])

    def read(hidden: Array, targets: Array) -> Reading:
        return _facts(output_logits(spec.config, hidden, kernel), targets, scheme)

    facts = in_chunks(read, before, answers, spec.config.vocab_size)
    inside = jnp.arange(answers.shape[1]) < lengths[:, None]
    return Reading(*(jnp.where(inside, x, jnp.zeros((), x.dtype)) for x in facts))


def _facts(logits: Array, targets: Array, scheme: Sampling) -> Reading:
    """The facts of targets (B, C), from logits (B, C, V) in float32."""
    vocab = logits.shape[-1]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = logits - log_total
    weight = jnp.exp(logprobs)
    mean = jnp.sum(weight * logprobs, axis=-1, keepdims=True)
    variance = jnp.sum(weight * jnp.square(logprobs - mean), axis=-1)
    others = jnp.where(jnp.arange(vocab) == targets[..., None], -jnp.inf, logits)
    greedy = jnp.argmax(logits, axis=-1) == targets
    sampled = jnp.where(greedy, 0.0, -jnp.inf)
    if scheme.temperature:
        kept = support_logits(logits.reshape(-1, vocab), scheme).reshape(logits.shape)
        sampled = _taken(kept, targets) - jax.nn.logsumexp(kept, axis=-1)
    return Reading(
        logprobs=(chosen - log_total)[..., 0],
        sampled=sampled,
        gap=(chosen - jnp.max(others, axis=-1, keepdims=True))[..., 0],
        greedy=greedy,
        rank=jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
        mean=mean[..., 0],
        deviation=jnp.sqrt(variance),
    )


def _taken(values: Array, ids: Array) -> Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]
