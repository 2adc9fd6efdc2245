"""How a token is drawn: settings that travel with the rollout, and one uniform number a row and position."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import generation_settings

Array = jax.Array
BLOCK = 64  # tokens a block of the two-level inverse-CDF draw
LAST_ID = (1 << 31) - 1  # sample numbers count down from here, token positions up from 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings; hashable, part of every `Rollout`.

    temperature 0 is greedy (its log-probabilities are reported at temperature 1). top_k = 0 and top_p = 1 keep the full
    support; otherwise log-probabilities are renormalized over the kept tokens.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                f"{self}: temperature and top_k must be at least 0, top_p in (0, 1], max_new_tokens above 0"
            )


def checkpoint_sampling(folder: str | Path, max_new_tokens: int = 64) -> Sampling:
    """The sampling a Hugging Face folder asks for in its generation_config.json: stop ids, temperature, top_k, top_p.

    A folder that asks for no sampling is greedy.
    """
    settings = generation_settings(folder)
    sampled = settings.get("do_sample", False)
    return Sampling(
        max_new_tokens,
        temperature=settings.get("temperature", 1.0) if sampled else 0.0,
        top_k=settings.get("top_k", 0) if sampled else 0,
        top_p=settings.get("top_p", 1.0) if sampled else 1.0,
        stop_ids=tuple(settings["stop_ids"]),
    )


def row_keys(key: Array, row_ids: Array) -> Array:
    """One key a row: a function of the row's identity alone. row_ids (B,) int32."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)


def sample_keys(keys: Array, samples: int) -> Array:
    """Keys of `samples` answers to each prompt, (B,) -> (B * samples,): the first answer's are the row's own."""
    others = [jax.vmap(lambda key, j=j: jax.random.fold_in(key, LAST_ID - j))(keys) for j in range(1, samples)]
    return jnp.stack([keys, *others], axis=1).reshape(-1)


def support_logits(logits: Array, sampling: Sampling) -> Array:
    """Tempered logits (B, V) with -inf outside the kept tokens (ties at the border are kept)."""
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.temperature == 0.0:
        return logits
    if sampling.top_k:
        border = _border(logits, jnp.ones_like(logits), float(min(sampling.top_k, logits.shape[-1])))
        logits = jnp.where(logits < border, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        border = _border(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)
        logits = jnp.where(logits < border, -jnp.inf, logits)
    return logits


def _border(logits: Array, weights: Array, target: float) -> Array:
    """The largest logit so that those at or above it weigh at least `target`: (B, V) -> (B, 1), no sort.

    Bisects the 32 bits of the logits' ordered representation: 32 masked sums, exact.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)  # orders as the floats do

    def halve(i: Array, found: Array) -> Array:
        candidate = found | (sign >> i.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(ordered >= candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(weight >= target, candidate, found)

    found = jax.lax.fori_loop(0, 32, halve, jnp.zeros((logits.shape[0], 1), jnp.uint32))
    kept = jnp.where(ordered >= found, logits, jnp.inf)
    return jnp.min(kept, axis=-1, keepdims=True)


def inverse_cdf(probs: Array, uniform: Array) -> Array:
    """The token at which the cumulative probability passes `uniform`.

    Two levels (blocks, then tokens of a block), so one uniform number replaces a vocabulary of Gumbel draws, and the
    float32 sums stay short. A token of probability 0 is never chosen.

    Args:
      probs: (B, V), rows sum to about 1.
      uniform: (B,) in [0, 1).

    Returns:
      (B,) int32.
    """
    batch, vocab = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % BLOCK))).reshape(batch, -1, BLOCK)
    mass = jnp.sum(blocks, axis=-1)  # (B, n)
    cumulative = jnp.cumsum(mass, axis=-1)
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, mass, target)
    row = jnp.arange(batch)
    before = cumulative[row, block] - mass[row, block]
    inside = blocks[row, block]  # (B, BLOCK)
    token = _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)
    return (block * BLOCK + token).astype(jnp.int32)


def _first_above(cumulative: Array, mass: Array, target: Array) -> Array:
    """First index whose cumulative sum exceeds target and whose mass is positive, else the last with positive mass."""
    index = jnp.arange(mass.shape[-1])
    positive = mass > 0
    passed = positive & (cumulative > target[:, None])
    last = jnp.max(jnp.where(positive, index, 0), axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


def draw(logits: Array, sampling: Sampling, keys: Array, position: Array | int) -> tuple[Array, Array]:
    """Draws one token a row.

    Args:
      logits: (B, V) float32.
      keys: (B,) row keys; folded with `position`, the index of the new token in its answer, of all rows or (B,).

    Returns:
      tokens (B,) int32 and their log-probabilities (B,) float32 under the kept, tempered distribution.
    """
    kept = support_logits(logits, sampling)
    top = jnp.max(kept, axis=-1, keepdims=True)
    exp = jnp.exp(kept - top)
    total = jnp.sum(exp, axis=-1)
    if sampling.temperature == 0.0:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        axes = (0, 0 if jnp.ndim(position) else None)
        uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)), axes)(keys, position)
        tokens = inverse_cdf(exp / total[:, None], uniform)
    chosen = jnp.take_along_axis(kept, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - top[:, 0] - jnp.log(total)
