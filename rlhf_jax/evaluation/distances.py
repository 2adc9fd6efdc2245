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
    first_row = jnp.broadcast_to(jnp.arange(b.shape[1] + 1, dtype=jnp.int32), (len(b), b.shape[1] + 1))

    def advance(row, inputs):
        i, a_tokens = inputs  # (), (B,)
        return jnp.where((i < a_lengths)[:, None], next_row(row, a_tokens, b), row), None

    last_row, _ = jax.lax.scan(advance, first_row, (jnp.arange(a.shape[1]), a.T))
    return jnp.take_along_axis(last_row, b_lengths[:, None], axis=1)[:, 0]


def next_row(row: jax.Array, token: jax.Array, b: jax.Array) -> jax.Array:
    """The next row of `edit_distance`'s program: D[i, :] (B, S + 1) from D[i - 1, :], token a_i (B,) and b (B, S)."""
    columns = jnp.arange(row.shape[1], dtype=jnp.int32)
    mismatch = (token[:, None] != b).astype(jnp.int32)
    without_insertion = jnp.minimum(row[:, 1:] + 1, row[:, :-1] + mismatch)
    costs = jnp.concatenate([row[:, :1] + 1, without_insertion], axis=1)
    return columns + jax.lax.cummin(costs - columns, axis=1)


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


@jax.jit
def longest_common_run(a: jax.Array, a_lengths: jax.Array, b: jax.Array, b_lengths: jax.Array) -> jax.Array:
    """Length of the longest run of tokens that stands in both sequences, (B,) int32.

    One scan over the tokens of `a`: the run that ends at a_i and b_j is one longer than that of a_{i-1} and b_{j-1}.

    Args:
        a, a_lengths, b, b_lengths: as for `edit_distance`.
    """
    inside = jnp.arange(b.shape[1]) < b_lengths[:, None]

    def advance(carry, inputs):
        runs, longest = carry  # (B, S), (B,)
        i, token = inputs
        same = (token[:, None] == b) & inside & (i < a_lengths)[:, None]
        runs = jnp.where(same, jnp.pad(runs[:, :-1], ((0, 0), (1, 0))) + 1, 0)
        return (runs, jnp.maximum(longest, runs.max(axis=1))), None

    start = (jnp.zeros(b.shape, jnp.int32), jnp.zeros(len(b), jnp.int32))
    (_, longest), _ = jax.lax.scan(advance, start, (jnp.arange(a.shape[1]), a.T))
    return longest


@jax.jit
def matching_share(a: jax.Array, a_lengths: jax.Array, b: jax.Array, b_lengths: jax.Array) -> jax.Array:
    """The share of the tokens of `b` that `a` has at the same place, (B,) float32; 1 is verbatim.

    Args:
        a, a_lengths, b, b_lengths: as for `edit_distance`.

    Reference: Biderman et al. (2023), "Emergent and predictable memorization", arXiv 2304.11158.
    """
    width = max(a.shape[1], b.shape[1])
    a, b = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))
    same = (a == b) & (jnp.arange(width) < jnp.minimum(a_lengths, b_lengths)[:, None])
    return same.sum(axis=1) / jnp.maximum(b_lengths, 1).astype(jnp.float32)
