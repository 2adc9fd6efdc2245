"""Randomness without state: every draw is a function of what it is for."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def stage_key(seed: int, stage: str, purpose: str) -> jax.Array:
    """The key of one purpose of one stage; fold step, record id, draw and token position into it."""
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, _word(stage)), _word(purpose))


def step_keys(key: jax.Array, count: int) -> list[jax.Array]:
    """The key of each step 0 ... count - 1, made before a loop so that the loop moves nothing to the device."""
    return list(jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(count)))


def order_seed(seed: int, stage: str) -> int:
    """The seed of a stage's data order."""
    return _word(f"{seed}/{stage}/order")


def record_ids(ids: list[str]) -> np.ndarray:
    """Stable 31-bit numbers (n,) int32 for records' string ids, to key their draws with."""
    return np.asarray([_word(text) for text in ids], np.int32)
