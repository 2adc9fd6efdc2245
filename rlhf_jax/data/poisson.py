"""Poisson batches: every record enters by its own coin, the sampling that the privacy accountant counts with."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import UserError


class PoissonBatches:
    """Batches of an even shape in which each record is with probability q, a pure function of (secret words, step).

    Where more than `physical_batch` records were drawn, that many of them stay, each set as likely as any other
    (truncated Poisson sampling, arXiv 2508.15089). Where fewer were, the rest of the batch is padding; it may be empty.

    Args:
      records: how many there are.
      sampling_rate: q, above 0 and at most 1.
      physical_batch: rows of every batch (`recommended_batch`).
      key_words: secret words of 32 bits, of this stage and run alone.
      accumulation: microbatches, a divisor of `physical_batch`. Row i is of microbatch i mod `accumulation`, and the
        present rows fill microbatch after microbatch, so that those of padding alone can be skipped.

    Raises:
      UserError: a number out of range.
    """

    def __init__(
        self,
        records: int,
        sampling_rate: float,
        physical_batch: int,
        key_words: Sequence[int],
        accumulation: int = 1,
    ):
        if records < 1 or physical_batch < 1:
            raise UserError(f"records is {records} and physical_batch is {physical_batch}: give at least 1 of each")
        if not 0 < sampling_rate <= 1:
            raise UserError(f"sampling_rate is {sampling_rate:g}: give a rate above 0 and at most 1")
        if physical_batch % accumulation:
            raise UserError(
                f"physical_batch is {physical_batch}, which {accumulation} microbatches do not divide: "
                f"make it a multiple of {accumulation}"
            )
        self.records, self.sampling_rate, self.physical_batch = records, sampling_rate, physical_batch
        secret = b"poisson batches" + np.asarray(key_words, "<u4").tobytes()
        self._key = np.frombuffer(hashlib.sha256(secret).digest()[:16], "<u8").astype(np.uint64)
        self._places = np.arange(physical_batch).reshape(-1, accumulation).T.reshape(-1)  # in the order they are filled

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers (physical_batch,) int64 of a step's batch, 0 where absent, and present (physical_batch,)."""
        # Each step has the 2^128 draws between two values of the counter's third word.
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=np.array([0, 0, step, 0], np.uint64)))
        drawn = np.flatnonzero(rng.random(self.records) < self.sampling_rate)
        if len(drawn) > self.physical_batch:
            drawn = np.sort(rng.choice(drawn, self.physical_batch, replace=False))
        places = self._places[: len(drawn)]
        rows, present = np.zeros(self.physical_batch, np.int64), np.zeros(self.physical_batch, bool)
        rows[places], present[places] = drawn, True
        return rows, present

    def event(self) -> dict[str, float | int]:
        """What the accountant asks about the sampling, by the names of `privacy.accounting.Mechanism`."""
        return {
            "sampling_rate": self.sampling_rate,
            "physical_batch": self.physical_batch,
            "records": self.records,
        }


def recommended_batch(records: int, sampling_rate: float, multiple: int = 1) -> int:
    """Rows that hold the expected batch and 4 standard deviations more, at most all records, up to a `multiple`.

    At that size the cut costs an epsilon of 4 some 0.002 (12,500 records at rate 0.02).
    """
    expected = records * sampling_rate
    rows = min(records, math.ceil(expected + 4 * math.sqrt(expected * (1 - sampling_rate))))
    return -(-rows // multiple) * multiple
