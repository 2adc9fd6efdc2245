"""Completions of known targets, greedy or sampled, decoded only as far as their verdict needs it.

A reading of the target (`rollout.reading`) tells how far greedy decoding follows it: so much is a draft that needs no
decoding. From there, or of a sample from its beginning, a row is decoded until it is as long as the target, or until it
can no longer come near enough.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from tqdm import tqdm

from rlhf_jax.data.table import pad_prompts
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.evaluation.distances import next_row
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.rollout.batches import bucket_widths, by_width, merged, on_all_shards, take_rows

Array = jax.Array
ROUNDED = 8  # tokens
SLACK = 1e-6  # of a normalized distance: one edit in ten tokens is near at a threshold of 0.1


class NearTarget(struct.PyTreeNode):
    """Watches decoded rows and ends those that are as long as their target, or too far from it to come near again.

    Attributes:
      targets: (B, N) int32; lengths: (B,).
      written: (B,) int32, tokens of the completion so far.
      row: (B, N + 1) int32, edit distances of what is written to every beginning of the target.
      limit: (B,) int32, the most edits that count as near.
      whole: (B,) bool: a row that is not given up.
    """

    targets: Array
    lengths: Array
    written: Array
    row: Array
    limit: Array
    whole: Array

    @property
    def least(self) -> Array:
        """The least edits (B,) that a completion can end with.

        It has at most the target's length N. What is written, i tokens, stands against the target's first j at D[i, j]
        edits; the rest can be equal, but where j < i the target has i - j tokens more left than the completion may get.
        """
        places = jnp.arange(self.row.shape[1])
        behind = jnp.maximum(self.written[:, None] - places, 0)
        return jnp.min(jnp.where(places <= self.lengths[:, None], self.row + behind, jnp.iinfo(jnp.int32).max), axis=1)

    def observe(self, token: Array, counted: Array) -> tuple["NearTarget", Array]:
        """As `generate.Watch`."""
        row = jnp.where(counted[:, None], next_row(self.row, token, self.targets), self.row)
        after = self.replace(row=row, written=self.written + counted)
        left = self.lengths - after.written
        return after, (left <= 0) | ((after.least > self.limit) & ~self.whole)


class Completions(NamedTuple):
    """Greedy completions of n targets, each cut to its target's length.

    Attributes:
      tokens: (n, N) int32; lengths: (n,) int32, without a stop token.
      distance: (n,) float32, normalized edit distance to the target; of a censored row the least it could become.
      censored: (n,) bool: given up, as it could come near no more.
      decoded: (n,) float32, log-probability of what was decoded behind the draft.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    distance: np.ndarray
    censored: np.ndarray
    decoded: np.ndarray


def complete(
    spec: RoleSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    agreed: np.ndarray,
    *,
    near: float,
    whole: np.ndarray | None = None,
    stop_ids: tuple[int, ...],
    batch_size: int,
    mesh: Mesh,
    name: str,
    buckets: Sequence[int] = (),
) -> Completions:
    """Completes every prompt greedily, as far as its verdict needs it.

    Args:
      targets: what each prompt's completion is compared to; none holds a stop token.
      agreed: (n,) tokens of each target that greedy decoding gives, as a reading found; those rows in which it gives
        all of them are not decoded.
      near: the largest normalized edit distance whose exact value is asked; 1 gives up no row.
      whole: (n,) bool: rows that are decoded to the end, near or not, as more than their distance is asked.
      batch_size: rows at a time, rounded up to the mesh; buckets: widths that prompts with their drafts are padded to.
    """
    columns, agreed = _columns(targets, near), np.asarray(agreed, np.int32)
    columns |= {"agreed": agreed} | ({} if whole is None else {"whole": whole})
    wanted, lengths = columns["targets"], columns["target_lengths"]
    drafted = [[*prompt, *target[:n]] for prompt, target, n in zip(prompts, targets, agreed, strict=True)]
    tokens = np.where(np.arange(wanted.shape[1]) < agreed[:, None], wanted, 0)
    written, edits, censored = agreed.copy(), np.zeros(len(targets), np.int32), np.zeros(len(targets), bool)
    decoded = np.zeros(len(targets), np.float32)

    base = merged(spec, weights)
    decoding = Sampling(wanted.shape[1], temperature=0.0, stop_ids=stop_ids)
    batches = _batches(drafted, lengths - agreed, batch_size, mesh, buckets)
    for numbers, rows in _rows(drafted, columns, batches, mesh, name):
        found = fetch(_continue(spec, base, rows, decoding))
        for i, row, length, row_edits, given_up, logprob in zip(numbers, *found, strict=False):
            tokens[i, agreed[i] : length] = row[: length - agreed[i]]
            written[i], edits[i], censored[i], decoded[i] = length, row_edits, given_up, logprob
    return Completions(tokens, written, edits / np.maximum(lengths, 1).astype(np.float32), censored, decoded)


def _columns(targets: Sequence[Sequence[int]], near: float) -> dict[str, np.ndarray]:
    """What a watch of n rows starts from: none has a draft, all may be given up."""
    lengths = np.asarray([len(target) for target in targets], np.int32)
    return {
        "targets": pad_prompts(targets, int(lengths.max()))["prompts"],
        "target_lengths": lengths,
        "agreed": np.zeros_like(lengths),
        "limit": np.floor((near + SLACK) * lengths).astype(np.int32),
        "whole": np.zeros(len(targets), bool),
    }


def _batches(
    drafted: Sequence[Sequence[int]], left: np.ndarray, size: int, mesh: Mesh, buckets: Sequence[int]
) -> list[tuple[int, int, list[int]]]:
    """(width, rows, row numbers) of each batch; rows that have about as many tokens left (n,) run together.

    How many rows wait, and how long their drafts are, differs from model to model: rows are rounded up to a power of
    two and the longest width to a multiple of `ROUNDED`, so that a program serves many models.
    """
    waiting = [int(i) for i in np.argsort(-left, kind="stable") if left[i]]
    if not waiting:
        return []
    size = on_all_shards(min(size, 1 << (len(waiting) - 1).bit_length()), mesh)
    longest = -(-max(len(drafted[i]) for i in waiting) // ROUNDED) * ROUNDED
    widths = bucket_widths(buckets, longest)
    return [(width, size, numbers) for width, numbers in by_width(drafted, waiting, widths, size)]


def near_draws(
    spec: RoleSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    draws: int,
    sampling: Sampling,
    near: float,
    key: Array,
    row_ids: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    name: str,
    buckets: Sequence[int] = (),
) -> np.ndarray:
    """How many of so many sampled completions of each prompt come near its target: (n,) int32.

    Args:
      draws: samples of each prompt; they share its prefill.
      sampling: temperature, top-k, top-p and stop ids; its number of tokens is not read, a target's is.
      near: the largest normalized edit distance of a completion, cut to the target's length, that counts.
      row_ids: (n,) int32 identities that key the draws.
      batch_size: rows at a time, samples counted, rounded up to the mesh; buckets: widths that prompts are padded to.

    Reference: (epsilon, n, p)-discoverable extraction, Hayes et al. (2024), arXiv 2410.19482.
    """
    columns = _columns(targets, near) | {"row_ids": row_ids}
    base, hits = merged(spec, weights), np.zeros(len(targets), np.int32)
    decoding = dataclasses.replace(sampling, max_new_tokens=columns["targets"].shape[1])
    batches = _batches(prompts, columns["target_lengths"], max(1, batch_size // draws), mesh, buckets)
    for numbers, rows in _rows(prompts, columns, batches, mesh, name):
        hits[numbers] = fetch(_near(spec, base, rows, key, decoding, draws))[: len(numbers)]
    return hits


def _rows(
    texts: Sequence[Sequence[int]],
    columns: dict[str, np.ndarray],
    batches: Sequence[tuple[int, int, list[int]]],
    mesh: Mesh,
    name: str,
) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """(row numbers, their texts and columns on the mesh) of each batch, filled up with its first row."""
    quiet = not is_main_process() or not batches
    for width, size, numbers in tqdm(batches, desc=name, disable=quiet, mininterval=1.0, file=sys.stdout):
        filled = [*numbers, *[numbers[0]] * (size - len(numbers))]
        rows = pad_prompts([texts[i] for i in filled], width)
        rows |= {column: values[filled] for column, values in columns.items()}
        yield numbers, place_batch(size, partial(take_rows, rows), mesh)


def _watch(batch: dict[str, Array]) -> NearTarget:
    """The watch of rows whose first `agreed` tokens are the target's."""
    places = jnp.arange(batch["targets"].shape[1] + 1, dtype=jnp.int32)
    return NearTarget(
        targets=batch["targets"],
        lengths=batch["target_lengths"],
        written=batch["agreed"],
        row=jnp.abs(places - batch["agreed"][:, None]),
        limit=batch["limit"],
        whole=batch["whole"],
    )


def _edits(rollout: Rollout, before: NearTarget) -> tuple[Array, Array]:
    """Edits (B,) of completions that were begun `before`, the least possible of those given up; and which (B,) were."""
    watch = rollout.watch
    stopped = watch.written < before.written + rollout.lengths  # its last token was a stop token, which is not shown
    censored = ~stopped & (watch.written < watch.lengths)
    final = jnp.take_along_axis(watch.row, watch.lengths[:, None], axis=1)[:, 0]
    return jnp.where(censored, watch.least, final), censored


@partial(jax.jit, static_argnames=("spec", "decoding"))
def _continue(
    spec: RoleSpec, base: Weights, batch: dict[str, Array], decoding: Sampling
) -> tuple[Array, Array, Array, Array, Array]:
    """Tokens (B, N) behind the drafts; of whole completions lengths (B,), edits (B,), who was given up (B,); and the
    log-probability (B,) of those tokens."""
    watch = _watch(batch)
    rollout = generate(
        spec.config,
        base,
        batch["prompts"],
        batch["lengths"],
        key=jax.random.key(0),  # greedy: not used
        sampling=decoding,
        watch=watch,
    )
    written = rollout.watch.written
    own = jnp.arange(rollout.tokens.shape[1]) < (written - batch["agreed"])[:, None]
    logprob = jnp.sum(jnp.where(own, rollout.logprobs, 0.0), axis=1)
    return rollout.tokens, written, *_edits(rollout, watch), logprob


@partial(jax.jit, static_argnames=("spec", "decoding", "draws"))
def _near(spec: RoleSpec, base: Weights, batch: dict[str, Array], key: Array, decoding: Sampling, draws: int) -> Array:
    """How many of each row's draws come near: (B,) int32."""
    watch = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), _watch(batch))
    rollout = generate(
        spec.config,
        base,
        batch["prompts"],
        batch["lengths"],
        key=key,
        sampling=decoding,
        row_ids=batch["row_ids"],
        samples=draws,
        watch=watch,
    )
    edits, censored = _edits(rollout, watch)
    return jnp.sum((~censored & (edits <= watch.limit)).reshape(-1, draws), axis=1)
