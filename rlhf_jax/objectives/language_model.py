"""Log-probabilities of given tokens, without ever holding logits of size batch x length x vocabulary."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rlhf_jax.objectives.taps import (
    OutputTap,
    Tapped,
    by_unit,
    exact,
    factors_are_smaller,
    finite,
    gram,
    gram_squares,
    squared,
    unit_products,
)

Array = jax.Array
LOGITS_AT_ONCE = 1 << 21  # elements of the logits held at a time on a device (8 MiB in float32)
LOGITS_AT_ONCE_SPREAD = 1 << 24  # the same where they are made of chunks of the vocabulary


class Chunks(NamedTuple):
    """How logits are made piece by piece: so many positions at a time, or so many chunks of the vocabulary.

    One device takes positions. Over several a chunk of positions would gather the whole kernel, and sum its whole
    gradient over the devices, each time; of a chunk of the vocabulary each part of the kernel is gathered once.
    """

    positions: int
    vocabulary: int = 0


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


def in_chunks(read: Callable[[Array, Array], Any], hidden: Array, targets: Array, vocab: int) -> Any:
    """What `read` makes of hidden states and targets, over chunks of positions: about LOGITS_AT_ONCE logits at a time.

    Args:
      read: (B, C, D), (B, C) -> a tree of (B, C).
      hidden: (B, T, D); targets: (B, T).
      vocab: logits of a position.

    Returns:
      The tree of (B, T).
    """
    batch, length = targets.shape
    chunk = _chunk_length(batch, length, vocab, _shards())
    read_chunks = lax.map(lambda inputs: read(*inputs), (_to_chunks(hidden, chunk), _to_chunks(targets, chunk)))
    return jax.tree.map(lambda x: _from_chunks(x, length), read_chunks)


def _logits(hidden: Array, kernel: Array, temperature: float, softcap: float) -> Array:
    rank = hidden.ndim
    logits = lax.dot_general(hidden, kernel, (((rank - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return _capped(logits, temperature, softcap)


def _capped(logits: Array, temperature: float, softcap: float) -> Array:
    """Raw logits after soft cap and temperature."""
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logprobs(
    hidden: Array, kernel: Array, targets: Array, temperature: float, softcap: float, chunks: Chunks
) -> tuple[Array, Array]:
    return _forward(hidden, kernel, targets, temperature, softcap, chunks)[0]


def _forward(hidden: Array, kernel: Array, targets: Array, temperature: float, softcap: float, chunks: Chunks):
    if chunks.vocabulary:
        return _forward_by_vocabulary(hidden, kernel, targets, temperature, softcap, chunks.vocabulary)
    compute, chunk = kernel.astype(hidden.dtype), chunks.positions

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

    inputs = (_to_chunks(hidden, chunk), _to_chunks(targets, chunk))
    logprobs, entropy, log_total = (_from_chunks(x, targets.shape[1]) for x in lax.map(one, inputs))
    return (logprobs, entropy), (hidden, kernel, targets, log_total, entropy)


def _forward_by_vocabulary(
    hidden: Array, kernel: Array, targets: Array, temperature: float, softcap: float, count: int
):
    """`_forward` in chunks of the vocabulary: the softmax's sums are kept over the largest logit so far."""
    columns, ids = _vocabulary_chunks(kernel.astype(hidden.dtype), count)

    def one(carry: tuple[Array, ...], inputs: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        top, total, moment, chosen = carry
        compute, numbers = inputs
        there = numbers < kernel.shape[1]
        logits = _logits(hidden, compute, temperature, softcap)  # (B, T, C)
        highest = jnp.maximum(top, jnp.max(jnp.where(there, logits, -jnp.inf), axis=-1))
        exp = jnp.where(there, jnp.exp(logits - highest[..., None]), 0.0)
        before = jnp.exp(top - highest)
        total = total * before + jnp.sum(exp, axis=-1)
        moment = moment * before + jnp.sum(exp * logits, axis=-1)
        chosen = chosen + jnp.sum(jnp.where(targets[..., None] == numbers, logits, 0.0), axis=-1)
        return (highest, total, moment, chosen), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    start: tuple[Array, ...] = (zero - jnp.inf, zero, zero, zero)
    (top, total, moment, chosen), _ = lax.scan(one, start, (columns, ids))
    log_total = jnp.log(total) + top
    entropy = log_total - moment / total
    return (chosen - log_total, entropy), (hidden, kernel, targets, log_total, entropy)


def _logit_gradients(
    logits: Array,
    onehot: Array,
    log_total: Array,
    entropy: Array,
    gradients: Sequence[Array],
    temperature: float,
    softcap: float,
) -> Array:
    """The gradient (..., V), before soft cap and temperature, of logits (..., V), any part of the vocabulary.

    Args:
      onehot: (..., V), which of these logits is the target's.
      log_total, entropy: (...,), of the whole vocabulary.
      gradients: two, of log-probability and of entropy (...,).
    """
    g_logprob, g_entropy = (g[..., None] for g in gradients)
    logp = logits - log_total[..., None]
    # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
    out = jnp.where(onehot, g_logprob, 0.0)
    out -= jnp.exp(logp) * (g_logprob + g_entropy * (logp + entropy[..., None]))
    if softcap:  # d tanh(x) = 1 - tanh(x)^2
        out = out * (1.0 - jnp.square(logits * (temperature / softcap)))
    return out / temperature


def _backward(temperature: float, softcap: float, chunks: Chunks, residuals, gradients):
    if chunks.vocabulary:
        return _backward_by_vocabulary(temperature, softcap, chunks.vocabulary, residuals, gradients)
    hidden, kernel, targets, log_total, entropy = residuals
    compute, chunk = kernel.astype(hidden.dtype), chunks.positions

    def one(dkernel: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        h, target, log_z, ent, *grads = inputs
        logits = _logits(h, compute, temperature, softcap)
        onehot = target[..., None] == jnp.arange(logits.shape[-1])
        dlogits = _logit_gradients(logits, onehot, log_z, ent, grads, temperature, softcap).astype(h.dtype)
        dkernel += lax.dot_general(h, dlogits, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
        dh = lax.dot_general(dlogits, compute, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return dkernel, dh.astype(h.dtype)

    fields = (hidden, targets, log_total, entropy, *gradients)
    zero = jnp.zeros(kernel.shape, jnp.float32)
    dkernel, dhidden = lax.scan(one, zero, tuple(_to_chunks(x, chunk) for x in fields))
    # Tied embeddings transpose dkernel next; folded into its product, that is a bfloat16 dot the CPU back end lacks.
    dkernel = lax.optimization_barrier(dkernel)
    return _from_chunks(dhidden, targets.shape[1]), dkernel.astype(kernel.dtype), None


def _backward_by_vocabulary(temperature: float, softcap: float, count: int, residuals, gradients):
    hidden, kernel, targets, log_total, entropy = residuals
    columns, ids = _vocabulary_chunks(kernel.astype(hidden.dtype), count)

    def one(dhidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        compute, numbers = inputs
        logits = _logits(hidden, compute, temperature, softcap)
        onehot = targets[..., None] == numbers
        dlogits = _logit_gradients(logits, onehot, log_total, entropy, gradients, temperature, softcap)
        dlogits = jnp.where(numbers < kernel.shape[1], dlogits, 0.0).astype(hidden.dtype)
        dhidden += lax.dot_general(dlogits, compute, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        part = lax.dot_general(hidden, dlogits, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
        return dhidden, _placed_as_kernel(part)

    dhidden, parts = lax.scan(one, jnp.zeros(hidden.shape, jnp.float32), (columns, ids))
    dkernel = lax.optimization_barrier(_from_vocabulary_chunks(parts, kernel.shape[1]))  # as in `_backward`
    return dhidden.astype(hidden.dtype), dkernel.astype(kernel.dtype), None


_token_logprobs.defvjp(_forward, _backward)


# The mesh's axes as `distributed.sharding` names them: of an output kernel `fsdp` shards the width, `tensor` the
# vocabulary.


def _axis(name: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(name, 1)


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _parts(vocab: int) -> int:
    """Devices that a vocabulary is spread over."""
    return _axis("tensor") if vocab % _axis("tensor") == 0 else 1


def _vocabulary_chunks(kernel: Array, count: int) -> tuple[Array, Array]:
    """A kernel (D, V) as chunks of columns (n, D, C), and whose they are (n, C): V where there is none.

    A chunk has columns of each device that the vocabulary is spread over.
    """
    (width, vocab), parts = kernel.shape, _parts(kernel.shape[1])
    each = vocab // parts
    size = -(-each // count)
    own = jnp.arange(count)[:, None, None] * size + jnp.arange(size)  # (n, 1, size): places in a device's part
    ids = jnp.where(own < each, jnp.arange(parts)[:, None] * each + own, vocab)  # (n, parts, size)
    padded = jnp.pad(kernel.reshape(width, parts, each), ((0, 0), (0, 0), (0, count * size - each)))
    chunks = jnp.moveaxis(padded.reshape(width, parts, count, size), 2, 0)
    return chunks.reshape(count, width, parts * size), ids.reshape(count, parts * size)


def _from_vocabulary_chunks(chunks: Array, vocab: int) -> Array:
    """Chunks of columns (n, D, C) as one (D, V)."""
    (count, width, columns), parts = chunks.shape, _parts(vocab)
    apart = jnp.moveaxis(chunks.reshape(count, width, parts, columns // parts), 0, 2)
    return apart.reshape(width, parts, -1)[:, :, : vocab // parts].reshape(width, vocab)


def _placed_as_kernel(x: Array) -> Array:
    """A chunk (D, C) where the kernel's own would be, so that a sum over the batch's devices goes there at once."""
    fsdp = "fsdp" if _axis("fsdp") > 1 and x.shape[0] % _axis("fsdp") == 0 else None
    tensor = "tensor" if _axis("tensor") > 1 and x.shape[1] % _axis("tensor") == 0 else None
    return lax.with_sharding_constraint(x, PartitionSpec(fsdp, tensor)) if fsdp or tensor else x


def _chunks(batch: int, length: int, vocab: int) -> Chunks:
    """The chunks of (B, T, V) logits on the mesh, or on one device."""
    shards = _shards()
    positions = _chunk_length(batch, length, vocab, shards)
    if shards == 1:
        return Chunks(positions)
    return Chunks(positions, -(-batch * length * vocab // (LOGITS_AT_ONCE_SPREAD * shards)))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _tapped_logprobs(
    hidden: Array,
    kernel: Array,
    targets: Array,
    tap: OutputTap,
    temperature: float,
    softcap: float,
    chunks: Chunks,
    units: int,
) -> tuple[Array, Array]:
    return _forward(hidden, kernel, targets, temperature, softcap, chunks)[0]


def _tapped_forward(hidden, kernel, targets, tap, temperature: float, softcap: float, chunks: Chunks, units: int):
    return _forward(hidden, kernel, targets, temperature, softcap, chunks)


def _tapped_backward(temperature: float, softcap: float, chunks: Chunks, units: int, residuals, gradients):
    """`_backward` in chunks of the vocabulary: of a Gram matrix over positions each chunk gives one term."""
    hidden, kernel, targets, log_total, entropy = residuals
    positions, (width, vocab) = by_unit(hidden, units).shape[1], kernel.shape
    count = -(-targets.size * vocab // (LOGITS_AT_ONCE * _shards()))
    size = -(-vocab // count)
    kernels = jnp.pad(kernel.astype(hidden.dtype), ((0, 0), (0, count * size - vocab)))
    kernels = jnp.moveaxis(kernels.reshape(width, count, size), 1, 0)  # (n, D, size)
    as_gram = factors_are_smaller(positions, width, vocab)

    def one(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        dhidden, sums = carry
        compute, start = inputs
        ids = start + jnp.arange(size)
        logits = _logits(hidden, compute, temperature, softcap)
        onehot = targets[..., None] == ids
        dlogits = _logit_gradients(logits, onehot, log_total, entropy, gradients, temperature, softcap)
        dlogits = jnp.where(ids < vocab, dlogits, 0.0).astype(hidden.dtype)
        dhidden += lax.dot_general(dlogits, compute, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if as_gram:
            sums += gram(by_unit(dlogits, units))
        else:
            sums += squared(unit_products(by_unit(hidden, units), by_unit(dlogits, units)))
        contract = (((0, 1), (0, 1)), ((), ()))
        dkernel = lax.dot_general(finite(hidden), finite(dlogits), contract, preferred_element_type=jnp.float32)
        return (dhidden, sums), dkernel

    sums = jnp.zeros((units, positions, positions) if as_gram else (units,), jnp.float32)
    zeros = (jnp.zeros(hidden.shape, jnp.float32), sums)
    (dhidden, sums), dkernels = lax.scan(one, zeros, (kernels, size * jnp.arange(count)))
    squares = gram_squares(gram(by_unit(hidden, units)), sums) if as_gram else sums
    dkernel = jnp.moveaxis(dkernels, 0, 1).reshape(width, -1)[:, :vocab]
    shown = OutputTap(squares, hidden, targets.astype(jnp.float32), log_total, entropy, *gradients)
    return dhidden.astype(hidden.dtype), dkernel.astype(kernel.dtype), None, shown


_tapped_logprobs.defvjp(_tapped_forward, _tapped_backward)


def output_gradient(kernel: Array, tap: OutputTap, factors: Array, temperature: float, softcap: float) -> Array:
    """The sum (D, V) float32 of the units' gradients of an output kernel times their factors (units,); 0 leaves out."""
    rows = tap.hidden.shape[0]
    each = jnp.repeat(factors, rows // factors.shape[0])

    def counted(x: Array, factor: Array) -> Array:
        factor = factor.reshape(rows, *[1] * (x.ndim - 1))
        return jnp.where(factor == 0, 0, x * factor).astype(x.dtype)

    hidden, *rest = (counted(x, each != 0) for x in tap[1:])
    targets, log_total, entropy = rest[:3]
    gradients = tuple(counted(g, each) for g in tap[-2:])
    batch, length = targets.shape
    chunks = _chunks(batch, length, kernel.shape[1])
    residuals = (hidden, kernel.astype(jnp.float32), targets, log_total, entropy)
    return _backward(temperature, softcap, chunks, residuals, gradients)[1]


def tied_products(
    table: Array, ids: Array, gradients: Array, tap: OutputTap, temperature: float, softcap: float
) -> Array:
    """(units,) inner products of both gradients of a tied embedding: as the table of ids, and as the output kernel.

    Of the second only the columns that ids name matter: sum over positions s, t of d logits[s, ids[t]] <hidden[s],
    gradients[t]>.

    Args:
      table: (V, D); ids (rows, T) int32; gradients (rows, T, D) of the rows that ids looked up.
    """
    units = tap.squares.shape[0]
    hidden, grads = by_unit(tap.hidden, units), by_unit(gradients, units)
    ids = ids.reshape(units, 1, -1)
    named = jnp.take(table, ids[:, 0], axis=0).astype(hidden.dtype)  # (units, Q, D)
    across = (((2,), (2,)), ((0,), (0,)))
    logits = lax.dot_general(hidden, named, across, preferred_element_type=jnp.float32)  # (units, P, Q)
    logits = _capped(logits, temperature, softcap)
    targets, log_total, entropy, *rest = (x.reshape(units, -1) for x in tap[2:])
    onehot = targets[..., None] == ids
    dlogits = _logit_gradients(logits, onehot, log_total, entropy, rest, temperature, softcap)
    return jnp.sum(dlogits.astype(hidden.dtype) * exact(hidden, grads, across), axis=(1, 2))


def token_logprobs(
    hidden: Array, kernel: Any, targets: Array, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Array, Array]:
    """Log-probability of each target token and entropy of its distribution, in chunks (`Chunks`).

    The one function that scores: behaviour, new and reference log-probabilities all come from here, at one temperature.
    The backward pass recomputes each chunk's logits.

    Args:
      hidden: (B, T, D) final hidden states; position t predicts targets[:, t].
      kernel: (D, V) output kernel, or `Tapped`.
      targets: (B, T) int32.
      temperature: logits are divided by it; static, above 0.
      softcap: logits become softcap * tanh(logits / softcap) before that; static, 0 leaves them.

    Returns:
      logprobs (B, T) and entropy (B, T), float32, nats.
    """
    batch, length = targets.shape
    tap = kernel.tap["output"] if isinstance(kernel, Tapped) and kernel.tap else None
    if isinstance(kernel, Tapped):
        kernel.used("output", hidden.shape, hidden.dtype, temperature, softcap)
        kernel = kernel.weight
    chunks = _chunks(batch, length, kernel.shape[1])
    if tap is None:
        return _token_logprobs(hidden, kernel, targets, temperature, softcap, chunks)
    return _tapped_logprobs(hidden, kernel, targets, tap, temperature, softcap, chunks, tap.squares.shape[0])


def segment_totals(values: Array, segment_ids: Array, segments: int) -> Array:
    """Sums values (B, T) over each segment 1 ... `segments` of a packed row: (B, segments), one entry a record."""
    member = segment_ids[:, None, :] == jnp.arange(1, segments + 1)[None, :, None]  # (B, segments, T)
    return jnp.sum(jnp.where(member, values[:, None, :], 0.0), axis=-1)
