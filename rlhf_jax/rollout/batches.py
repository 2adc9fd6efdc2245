"""Answers to a whole set of prompts, batch by batch at one shape."""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rlhf_jax.data.table import pad_prompts
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec, Weights, merged_base
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.reading import Reading, read_answers
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.rollout.scoring import answer_scores


def check_lengths(prompts: Sequence[Sequence[int]], new_tokens: int, context: int, where: str) -> None:
    """Raises a UserError naming the first prompt that leaves no room for `new_tokens` in the context."""
    for number, ids in enumerate(prompts, 1):
        if len(ids) + new_tokens > context:
            raise UserError(
                f"{where}: prompt {number} has {len(ids)} tokens; with {new_tokens} new ones it is longer than the "
                f"context {context}: shorten the prompt or lower max_new_tokens"
            )


def bucket_widths(buckets: Sequence[int], longest: int) -> list[int]:
    """Widths that prompts are padded to, narrowest first: the buckets below `longest`, and `longest` itself."""
    return [*(width for width in sorted(buckets) if width < longest), longest]


def narrowest(widths: Sequence[int], length: int) -> int:
    """The narrowest of the `bucket_widths` that holds `length` tokens."""
    return next(width for width in widths if width >= length)


def on_all_shards(rows: int, mesh: Mesh) -> int:
    """A number of rows, rounded up to what divides over the mesh's batch axes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // shards) * shards


def by_width(
    texts: Sequence[Sequence[int]], numbers: Iterable[int], widths: Sequence[int], size: int
) -> list[tuple[int, list[int]]]:
    """(width, at most `size` row numbers) of each batch: rows of one of the `bucket_widths` together, in order."""
    groups: dict[int, list[int]] = {width: [] for width in widths}
    for number in numbers:
        groups[narrowest(widths, len(texts[number]))].append(number)
    return [
        (width, members[start : start + size])
        for width, members in groups.items()
        for start in range(0, len(members), size)
    ]


def take_rows(rows: dict[str, np.ndarray], mine: np.ndarray) -> dict[str, np.ndarray]:
    """The rows that a process places, of columns (n, ...)."""
    return {name: field[mine] for name, field in rows.items()}


merged = jax.jit(merged_base, static_argnums=0)  # (spec, weights) -> the base with its adapters in it


def answer_all(
    spec: RoleSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    row_ids: np.ndarray,
    *,
    key: jax.Array,
    sampling: Sampling,
    batch_size: int,
    mesh: Mesh,
    name: str,
    buckets: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples an answer to every prompt; adapters are merged once.

    Args:
      prompts: token ids of each prompt.
      row_ids: (n,) int32 identities that key the draws.
      batch_size: rows at a time; rounded up to the mesh.
      name: shown on the progress bar.
      buckets: widths prompts are padded to; those of one width run together, each width compiles once. What none
        holds goes to the longest prompt's width, as everything does without buckets.

    Returns:
      tokens (n, N) int32, lengths (n,) int32 and ended (n,) bool, in the prompts' order, on the host of every process.
    """
    size = on_all_shards(min(batch_size, len(prompts)), mesh)
    widths = bucket_widths(buckets, max(len(ids) for ids in prompts))
    batches = by_width(prompts, range(len(prompts)), widths, size)
    base = merged(spec, weights)
    tokens = np.zeros((len(prompts), sampling.max_new_tokens), np.int32)
    lengths, ended = np.zeros(len(prompts), np.int32), np.zeros(len(prompts), bool)
    for width, numbers in tqdm(batches, desc=name, disable=not is_main_process(), mininterval=1.0, file=sys.stdout):
        rows = pad_prompts([prompts[i] for i in numbers], width, size)
        rows["row_ids"] = np.concatenate([row_ids[numbers], np.zeros(size - len(numbers), np.int32)])
        batch = place_batch(size, partial(take_rows, rows), mesh)
        rollout = generate(
            spec.config,
            base,
            batch["prompts"],
            batch["lengths"],
            key=key,
            sampling=sampling,
            row_ids=batch["row_ids"],
        )
        fields = fetch((rollout.tokens, rollout.lengths, rollout.ended))
        tokens[numbers], lengths[numbers], ended[numbers] = (x[: len(numbers)] for x in fields)
    return tokens, lengths, ended


def read_all(
    spec: RoleSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    scheme: Sampling,
    batch_size: int,
    mesh: Mesh,
    name: str,
) -> Reading:
    """Reads given answers behind their prompts (`reading.read_answers`), batch by batch at one shape.

    Args:
      prompts, answers: token ids, n of each.
      scheme, batch_size, mesh, name: as for `read_answers` and `answer_all`; without a name no progress is shown.

    Returns:
      A `Reading` of (n, N) arrays, N being the longest answer, on the host of every process.
    """
    read = partial(read_answers, spec, weights, scheme=scheme)
    return _over_batches(read, prompts, answers, batch_size, mesh, name)


def score_all(
    spec: RoleSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
    mesh: Mesh,
    name: str,
) -> np.ndarray:
    """A reward model's scores (n,) of given answers as they stand (`answer_scores`); arguments as for `read_all`."""
    score = partial(_jitted_scores, spec, weights)
    return _over_batches(score, prompts, answers, batch_size, mesh, name)


_jitted_scores = jax.jit(answer_scores, static_argnums=0)


def _over_batches(
    function: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
    mesh: Mesh,
    name: str,
) -> Any:
    """What `function` (prompts, lengths, answers, lengths) makes of all rows, on the host: its tree of (n, ...)."""
    size = on_all_shards(min(batch_size, len(prompts)), mesh)
    asked, given = (pad_prompts(rows, max(map(len, rows))) for rows in (prompts, answers))
    columns = {**asked, "answers": given["prompts"], "answer_lengths": given["lengths"]}
    parts = []
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc=name, disable=not name or not is_main_process(), mininterval=1.0, file=sys.stdout):
        filled = np.minimum(np.arange(start, start + size), len(prompts) - 1)
        rows = take_rows(columns, filled)
        parts.append(fetch(function(*place_batch(size, partial(take_rows, rows), mesh).values())))
    return jax.tree.map(lambda *each: np.concatenate(each)[: len(prompts)], *parts)
