"""Log-probabilities of given tokens, without ever holding logits of size batch x length x vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
LOGITS_AT_ONCE = 1 << 21  # elements of the logits held at a time (8 MiB in float32)


def _chunk_length(batch: int, length: int, vocab: int, shards: int) -> int:
    """Positions a chunk holds: about LOGITS_AT_ONCE logits on each of `shards` devices, at least 8, evenly spread."""
    chunks = max(1, round(batch * length * vocab / (LOGITS_AT_ONCE * shards)))
    chunk = max(8, -(-length // chunks))
    return min(chunk, length)


def _to_chunks(x: Array, chunk: int) -> Array:
    """(B, T, ...) -> (n, B, chunk, ...), the length padded with zeros."""
    batch, length = x.shape[:2]
    count = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)


def _from_chunks(x: Array, length: int) -> Array:
    """(n, B, chunk, ...) -> (B, length, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(hidden: Array, kernel: Array, temperature: float, softcap: float) -> Array:
    rank = hidden.ndim
    logits = lax.dot_general(hidden, kernel, (((rank - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logprobs(
    hidden: Array, kernel: Array, targets: Array, temperature: float, softcap: float, chunk: int
) -> tuple[Array, Array]:
    return _forward(hidden, kernel, targets, temperature, softcap, chunk)[0]


def _forward(hidden: Array, kernel: Array, targets: Array, temperature: float, softcap: float, chunk: int):
    compute = kernel.astype(hidden.dtype)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        h, target = inputs
        logits = _logits(h, compute, temperature, softcap)  # (B, chunk, V)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = jnp.sum(exp, axis=-1)
        log_total = jnp.log(total) + top[..., 0]
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        mean_logit = jnp.sum(exp * (logits - top), axis=-1) / total + top[..., 0]
        return chosen - log_total, log_total - mean_logit, log_total

    chunks = (_to_chunks(hidden, chunk), _to_chunks(targets, chunk))
    logprobs, entropy, log_total = (_from_chunks(x, targets.shape[1]) for x in lax.map(one, chunks))
    return (logprobs, entropy), (hidden, kernel, targets, log_total, entropy)


def _backward(temperature: float, softcap: float, chunk: int, residuals, gradients):
    hidden, kernel, targets, log_total, entropy = residuals
    compute = kernel.astype(hidden.dtype)

    def one(dkernel: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        h, target, log_z, ent, g_logprob, g_entropy = inputs
        logits = _logits(h, compute, temperature, softcap)
        logp = logits - log_z[..., None]
        probs = jnp.exp(logp)
        # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
        onehot = target[..., None] == jnp.arange(logp.shape[-1])
        dlogits = jnp.where(onehot, g_logprob[..., None], 0.0)
        dlogits -= probs * (g_logprob[..., None] + g_entropy[..., None] * (logp + ent[..., None]))
        if softcap:  # d tanh(x) = 1 - tanh(x)^2
            dlogits = dlogits * (1.0 - jnp.square(logits * (temperature / softcap)))
        dlogits = (dlogits / temperature).astype(h.dtype)
        dkernel += lax.dot_general(h, dlogits, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
        dh = lax.dot_general(dlogits, compute, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return dkernel, dh.astype(h.dtype)

    fields = (hidden, targets, log_total, entropy, *gradients)
    zero = jnp.zeros(kernel.shape, jnp.float32)
    dkernel, dhidden = lax.scan(one, zero, tuple(_to_chunks(x, chunk) for x in fields))
    # Tied embeddings transpose dkernel next; folded into its product, that is a bfloat16 dot the CPU back end lacks.
    dkernel = lax.optimization_barrier(dkernel)
    return _from_chunks(dhidden, targets.shape[1]), dkernel.astype(kernel.dtype), None


_token_logprobs.defvjp(_forward, _backward)


def token_logprobs(
    hidden: Array, kernel: Array, targets: Array, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Array, Array]:
    """Log-probability of each target token and entropy of its distribution, in chunks of positions.

    The one function that scores: behaviour, new and reference log-probabilities all come from here, at one temperature.
    The backward pass recomputes each chunk's logits.

    Args:
      hidden: (B, T, D) final hidden states; position t predicts targets[:, t].
      kernel: (D, V) output kernel.
      targets: (B, T) int32.
      temperature: logits are divided by it; static, above 0.
      softcap: logits become softcap * tanh(logits / softcap) before that; static, 0 leaves them.

    Returns:
      logprobs (B, T) and entropy (B, T), float32, nats.
    """
    batch, length = targets.shape
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.size
    chunk = _chunk_length(batch, length, kernel.shape[1], shards)
    return _token_logprobs(hidden, kernel, targets, temperature, softcap, chunk)


def segment_totals(values: Array, segment_ids: Array, segments: int) -> Array:
    """Sums values (B, T) over each segment 1 ... `segments` of a packed row: (B, segments), one entry a record."""
    member = segment_ids[:, None, :] == jnp.arange(1, segments + 1)[None, :, None]  # (B, segments, T)
    return jnp.sum(jnp.where(member, values[:, None, :], 0.0), axis=-1)
