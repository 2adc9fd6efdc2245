"""Randomness without state: every draw is a function of what it is for."""

import hashlib

import jax
import numpy as np


def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def stage_key(seed: int, stage: str, purpose: str) -> jax.Array:
    """The key of one purpose of one stage; fold step, record id, draw and token position into it."""
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, _word(stage)), _word(purpose))


def order_seed(seed: int, stage: str) -> int:
    """The seed of a stage's data order."""
    return _word(f"{seed}/{stage}/order")


def record_ids(ids: list[str]) -> np.ndarray:
    """Stable 31-bit numbers (n,) int32 for records' string ids, to key their draws with."""
    return np.asarray([_word(text) for text in ids], np.int32)
