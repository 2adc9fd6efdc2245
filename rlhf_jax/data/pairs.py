"""Records with two answers, or one, as rows of tokens: each answer stands directly behind its prompt."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.examples import answer_ids
from rlhf_jax.data.schemas import Record, Text
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

Rows = dict[str, np.ndarray]


def answers_of(schema: str, record: Record) -> tuple[Text, ...]:
    """The answers a record holds: (better, worse), or the one answer of schema "unpaired"."""
    if schema == "unpaired":
        return (record["completion"],)
    if schema == "safety":
        return record["responses"][record["better"]], record["responses"][1 - record["better"]]
    return record["chosen"], record["rejected"]


def tokenize_answers(
    tokenizer: Tokenizer,
    records: Sequence[Record],
    prompts: Sequence[list[int]],
    schema: str,
    longest: int,
    on_error: str,
    data: str,
) -> tuple[list[int], list[list[list[int]]]]:
    """Token ids of the answers of those records that can be used.

    Left out are records whose two answers are the same tokens, and (with on_error "skip") those longer than `longest`.

    Args:
      prompts: the prompt's token ids, one a record.
      longest: most tokens of a prompt with its answer.
      data: where the records are from, for messages.

    Returns:
      The numbers (from 0) of the records kept, and of each its answers' ids.

    Raises:
      UserError: a record is too long and on_error is "raise".
    """
    kept, answers = [], []
    for number, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        ids = [answer_ids(tokenizer, record["prompt"], answer) for answer in answers_of(schema, record)]
        length = len(prompt) + max(len(x) for x in ids)
        if length > longest and on_error == "raise":
            raise UserError(
                f"{data}: record {number + 1} has {length} tokens, above {longest}: shorten it, raise sequence_length, "
                'or set on_error="skip"'
            )
        if length <= longest and (len(ids) == 1 or ids[0] != ids[1]):
            kept.append(number)
            answers.append(ids)
    return kept, answers


def pad_answers(prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]]) -> Rows:
    """Right-padded rows of each prompt with each of its A answers.

    Returns:
      {"tokens": (n, A, T) int32, "lengths": (n, A) int32 in all, "answer_lengths": (n, A) int32}.
    """
    counts = np.asarray([[len(x) for x in ids] for ids in answers], np.int32)
    lengths = counts + np.asarray([[len(prompt)] for prompt in prompts], np.int32)
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for row, prompt, ids in zip(tokens, prompts, answers, strict=True):
        for line, answer in zip(row, ids, strict=True):
            line[: len(prompt) + len(answer)] = prompt + answer
    return {"tokens": tokens, "lengths": lengths, "answer_lengths": counts}


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes a .npz file; it appears whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as out:
        np.savez(out, **arrays)
    os.replace(partial, path)
