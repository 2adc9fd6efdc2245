"""Data order as a function of (seed, step): no cursor, no seek, nothing to save."""

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
