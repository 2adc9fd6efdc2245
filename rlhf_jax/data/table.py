"""Tokenized records on disk, and the fixed-shape rows made of them.

Process 0 tokenizes once, as a stream; every process maps the files and reads only the rows it needs.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_jax.data.examples import Example
from rlhf_jax.distributed.processes import is_main_process

COLUMNS = {"tokens": "<i4", "offsets": "<i8", "counted": "|u1"}


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Records' tokens end to end: record i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64
    counted: np.ndarray  # (total,) uint8, 1 where the loss counts the token

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) positions a record takes: its tokens less the last, which is only predicted."""
        return np.diff(self.offsets) - 1


class _ArrayFile:
    """A one-dimensional .npy file that grows; `close` writes its length into the header."""

    def __init__(self, path: Path, dtype: str):
        self._file, self._dtype, self._count = open(path, "wb", buffering=1 << 20), dtype, 0  # noqa: SIM115
        self._write_header()

    def append(self, values: Any) -> None:
        array = np.asarray(values, self._dtype)
        self._file.write(array.tobytes())
        self._count += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        """As long for any count: numpy's header leaves room for one to grow."""
        header = {"descr": self._dtype, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # type: ignore[arg-type]


class TableWriter:
    """Writes a table record by record in constant memory.

    A context manager: the folder appears whole when the block ends, and not at all when it raises.
    """

    def __init__(self, folder: Path):
        self._folder, self._temporary = folder, folder.with_name(folder.name + ".tmp")
        self._total = 0

    def __enter__(self) -> "TableWriter":
        shutil.rmtree(self._temporary, ignore_errors=True)  # what a cut run left
        self._temporary.mkdir(parents=True)
        self._files = {name: _ArrayFile(self._temporary / f"{name}.npy", dtype) for name, dtype in COLUMNS.items()}
        self._files["offsets"].append([0])
        return self

    def append(self, example: Example) -> None:
        """Adds one record.

        Raises:
            ValueError: fewer than two tokens (nothing to predict), or not one count for each.
        """
        if len(example.tokens) < 2 or len(example.tokens) != len(example.counted):
            raise ValueError(f"an example of {len(example.tokens)} tokens and {len(example.counted)} counts")
        self._total += len(example.tokens)
        self._files["tokens"].append(example.tokens)
        self._files["counted"].append(example.counted)
        self._files["offsets"].append([self._total])

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for file in self._files.values():
            file.close()
        if kind is None and self._total:
            os.replace(self._temporary, self._folder)
            return
        shutil.rmtree(self._temporary)
        if kind is None:
            raise ValueError(f"{self._folder}: a table without examples")


def build_table(
    folder: Path, examples: Iterable[Example], *, name: str | None = None, total: int | None = None
) -> None:
    """Writes a table of a stream of examples in constant memory, with a progress bar in process 0.

    Args:
        name: the bar's label, the folder's name by default.
        total: the number of examples, if known, for the bar.

    Raises:
        ValueError: there is no example. Whatever `examples` raises passes through. Either leaves no folder.
    """
    bar = tqdm(examples, name or folder.name, total, disable=not is_main_process(), mininterval=1.0, file=sys.stdout)
    with bar, TableWriter(folder) as writer:
        for example in bar:
            writer.append(example)


def load_table(folder: Path) -> TokenTable:
    """Maps a table that `build_table` wrote; its arrays are read from disk as they are indexed."""
    return TokenTable(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS))


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
            span = slice(table.offsets[record], table.offsets[record + 1])
            ids = table.tokens[span]
            here = slice(at, at + len(ids) - 1)
            out["tokens"][i, here] = ids[:-1]
            out["targets"][i, here] = ids[1:]
            out["segment_ids"][i, here] = segment
            out["positions"][i, here] = np.arange(len(ids) - 1)
            out["loss_mask"][i, here] = table.counted[span][1:]
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
