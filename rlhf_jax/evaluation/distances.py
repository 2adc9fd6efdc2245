"""Edit distances between batches of token sequences, computed on the device."""

import jax
import jax.numpy as jnp


@jax.jit
def edit_distance(a: jax.Array, a_lengths: jax.Array, b: jax.Array, b_lengths: jax.Array) -> jax.Array:
    """Levenshtein distance of each pair of sequences: the fewest insertions, deletions and substitutions.

    One `lax.scan` over the tokens of `a` carries a row of the dynamic program. The dependence along the row, a
    running cost of one per insertion, is a running minimum, so a row has no inner loop:

        t_0 = i,  t_j = min(D[i-1, j] + 1, D[i-1, j-1] + [a_i != b_j]),  D[i, j] = j + min_{k <= j} (t_k - k)

    Only the lengths say where a sequence ends; what stands after them, whatever its id, has no influence.

    Args:
        a: (B, T) int32 tokens, right-padded.
        a_lengths: (B,) int32, tokens of each row of `a` that count, 0 to T.
        b: (B, S) int32 tokens, right-padded.
        b_lengths: (B,) int32, tokens of each row of `b` that count, 0 to S.

    Returns:
        (B,) int32 distances, in tokens.

    Reference: Wagner and Fischer (1974), "The string-to-string correction problem".
    """
    batch, b_width = b.shape
    columns = jnp.arange(b_width + 1, dtype=jnp.int32)
    first_row = jnp.broadcast_to(columns, (batch, b_width + 1))

    def next_row(row, inputs):
        i, a_tokens = inputs  # (), (B,)
        mismatch = (a_tokens[:, None] != b).astype(jnp.int32)  # (B, S)
        without_insertion = jnp.minimum(row[:, 1:] + 1, row[:, :-1] + mismatch)  # (B, S)
        costs = jnp.concatenate([jnp.full((batch, 1), i), without_insertion], axis=1)  # (B, S + 1)
        new_row = columns + jax.lax.cummin(costs - columns, axis=1)
        return jnp.where((i <= a_lengths)[:, None], new_row, row), None

    rows = jnp.arange(1, a.shape[1] + 1, dtype=jnp.int32)
    last_row, _ = jax.lax.scan(next_row, first_row, (rows, a.T))
    return jnp.take_along_axis(last_row, b_lengths[:, None], axis=1)[:, 0]


@jax.jit
def normalized_edit_distance(a: jax.Array, a_lengths: jax.Array, b: jax.Array, b_lengths: jax.Array) -> jax.Array:
    """Edit distance divided by the longer of the two lengths: 0 for equal sequences (two empty ones too), at most 1.

    Args:
        a, a_lengths, b, b_lengths: as for `edit_distance`.

    Returns:
        (B,) float32.
    """
    longest = jnp.maximum(a_lengths, b_lengths)
    distance = edit_distance(a, a_lengths, b, b_lengths).astype(jnp.float32)
    return distance / jnp.maximum(longest, 1).astype(jnp.float32)
