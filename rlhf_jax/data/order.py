"""Data order as a function of (seed, step): no cursor, no seek, nothing to save; and all records once, in batches."""

import grain
import numpy as np


class DataOrder:
    """An endless order of records, a fresh keyed permutation every epoch (grain's index shuffle)."""

    def __init__(self, records: int, seed: int):
        self.records = records
        self._order = grain.MapDataset.range(records).shuffle(seed=seed).repeat()

    def batch(self, step: int, size: int) -> np.ndarray:
        """Record numbers (size,) int64 of batch `step`."""
        return np.asarray([self._order[i] for i in range(step * size, (step + 1) * size)])

    def epochs(self, step: int, size: int) -> np.ndarray:
        """The epoch (size,) int64 each of those records is read in."""
        return np.arange(step * size, (step + 1) * size) // self.records


def in_batches(records: int, size: int, fill: int = -1) -> np.ndarray:
    """Record numbers (batches, size) int64 of all records once, in order; the last batch is filled up with `fill`."""
    return np.concatenate([np.arange(records), np.full(-records % size, fill)]).reshape(-1, size)


def without_padding(batch: dict[str, np.ndarray], rows: np.ndarray, **empty: int) -> dict[str, np.ndarray]:
    """A batch's columns (n, ...) with nothing of any record in its padding, the rows numbered -1 in `rows` (n,).

    Of an ensemble `rows` and columns have one more axis behind n: each member's own rows.

    `empty`: what a column holds there if not 0. Dtypes stay.
    """

    def column(name: str, x: np.ndarray) -> np.ndarray:
        here = (rows >= 0).reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))
        return np.where(here, x, empty.get(name, 0)).astype(x.dtype)

    return {name: column(name, x) for name, x in batch.items()}
