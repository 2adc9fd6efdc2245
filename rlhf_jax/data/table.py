"""Tokenized records on disk, and the fixed-shape rows made of them.

Process 0 tokenizes once; every process maps the files and reads only the rows it needs.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One record's tokens; the loss counts tokens from `loss_start` on."""

    tokens: list[int]
    loss_start: int


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Records' tokens end to end: record i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64
    loss_starts: np.ndarray  # (n,) int32

    def __len__(self) -> int:
        return len(self.loss_starts)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) positions a record takes: its tokens less the last, which is only predicted."""
        return np.diff(self.offsets) - 1


def save_table(folder: Path, examples: Sequence[Example]) -> None:
    """Writes a table; the folder appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate([np.asarray(e.tokens, np.int32) for e in examples])
    np.save(temporary / "tokens.npy", tokens)
    np.save(temporary / "offsets.npy", np.cumsum([0] + [len(e.tokens) for e in examples]))
    np.save(temporary / "loss_starts.npy", np.asarray([e.loss_start for e in examples], np.int32))
    os.replace(temporary, folder)


def load_table(folder: Path) -> TokenTable:
    """Maps a table that `save_table` wrote."""
    names = ("tokens", "offsets", "loss_starts")
    return TokenTable(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def text_examples(tokenizer: Tokenizer, text: str, sequence_length: int) -> list[Example]:
    """A document as [bos] tokens [eos], cut into pieces of at most `sequence_length` positions; all tokens count."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    starts = range(0, len(ids) - 1, sequence_length)
    return [Example(ids[start : start + sequence_length + 1], 1) for start in starts]


def completion_example(tokenizer: Tokenizer, prompt: str, completion: str, loss_on: str) -> Example:
    """[bos] prompt completion [eos]; prompt and completion are tokenized apart, as generation sees them."""
    head = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return Example(
        [*head, *tokenizer.encode(completion), tokenizer.eos_id], len(head) if loss_on == "completion" else 1
    )


def fim_example(tokenizer: Tokenizer, prompt: str, completion: str, cut: float, loss_on: str) -> Example:
    """Fill-in-the-middle, prefix-suffix-middle order: the completion's share `cut` is the middle, its rest the suffix.

    Raises:
      UserError: the tokenizer has no fill-in-the-middle tokens.
    """
    marks = (tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id)
    if None in marks:
        raise UserError("fim_rate is above 0 but the tokenizer has no fill-in-the-middle tokens: set fim_rate=0")
    prefix_id, suffix_id, middle_id = (int(mark) for mark in marks if mark is not None)
    at = max(1, round(cut * len(completion)))
    head = [
        tokenizer.bos_id,
        prefix_id,
        *tokenizer.encode(prompt),
        suffix_id,
        *tokenizer.encode(completion[at:]),
        middle_id,
    ]
    middle = [*tokenizer.encode(completion[:at]), tokenizer.eos_id]
    return Example(head + middle, len(head) if loss_on == "completion" else 1)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: rows of record numbers whose lengths sum to at most `capacity`; equal in all processes."""
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> row numbers
    rows: list[list[int]] = []
    for record in np.argsort(-lengths, kind="stable"):
        length = int(lengths[record])
        space = next((s for s in range(length, capacity + 1) if open_rows[s]), None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, capacity
        else:
            row = open_rows[space].pop()
        rows[row].append(int(record))
        open_rows[space - length].append(row)
    return rows


def make_rows(table: TokenTable, rows: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
    """Fixed-shape training rows.

    Args:
      rows: for each row the records packed into it (none: an all-padding row).
      width: T.

    Returns:
      {"tokens", "targets", "segment_ids", "positions"} int32 (n, T) and "loss_mask" float32 (n, T): position t predicts
      targets[:, t], which counts where loss_mask is 1. Segments are 1, 2, ...; padding is segment 0.
    """
    out = {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    out["loss_mask"] = np.zeros((len(rows), width), np.float32)
    for i, records in enumerate(rows):
        at = 0
        for segment, record in enumerate(records, 1):
            ids = table.tokens[table.offsets[record] : table.offsets[record + 1]]
            here = slice(at, at + len(ids) - 1)
            out["tokens"][i, here] = ids[:-1]
            out["targets"][i, here] = ids[1:]
            out["segment_ids"][i, here] = segment
            out["positions"][i, here] = np.arange(len(ids) - 1)
            out["loss_mask"][i, here] = np.arange(1, len(ids)) >= table.loss_starts[record]
            at += len(ids) - 1
    return out


def pad_prompts(prompts: Sequence[Sequence[int]], width: int, rows: int | None = None) -> dict[str, np.ndarray]:
    """Right-padded prompts {"prompts": (rows, width) int32, "lengths": (rows,) int32}.

    Rows beyond the given prompts are copies of the first one, to be dropped by the caller.
    """
    rows = len(prompts) if rows is None else rows
    filled = [prompts[i] if i < len(prompts) else prompts[0] for i in range(rows)]
    out = np.zeros((rows, width), np.int32)
    for i, ids in enumerate(filled):
        out[i, : len(ids)] = ids
    return {"prompts": out, "lengths": np.asarray([len(ids) for ids in filled], np.int32)}
