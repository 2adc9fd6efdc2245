"""Decoding answers of unequal length: static batches one after the other, against as many slots that are refilled.

Workload W's decoder at random weights never ends an answer by itself, so each row is given its length as its limit.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.bench.workloads import NEVER, workload_w
from rlhf_jax.models.roles import init_base
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.generate import dead_steps
from rlhf_jax.rollout.refill import Refilled, generate_refilled, static_steps

# Percentiles 0 ... 99 of the lengths of 4,664 answers, the stop token counted: the last turn of the chosen dialogues of
# HH-RLHF (harmless-base and helpful-base, test splits, arXiv 2204.05862), in tokens of a SentencePiece unigram
# vocabulary of 4,096 trained on the same dialogues. Their mean is 56.
# fmt: off
PERCENTILES = (
    1, 4, 6, 6, 7, 8, 8, 9, 10, 10, 11, 12, 12, 12, 13, 14, 14, 15, 15, 16, 17, 17, 18, 18, 19, 19, 20, 21, 22, 22, 23,
    23, 24, 25, 26, 26, 27, 28, 29, 29, 30, 31, 31, 32, 33, 34, 35, 36, 36, 37, 39, 39, 40, 41, 42, 43, 45, 46, 47, 49,
    50, 51, 53, 55, 56, 57, 59, 61, 62, 63, 65, 67, 68, 69, 71, 73, 75, 78, 80, 82, 85, 88, 91, 94, 98, 101, 105, 109,
    113, 117, 122, 129, 137, 144, 154, 164, 178, 198, 227, 267,
)
# fmt: on
PROMPTS, SLOTS, PROMPT, NEW = 128, 16, 64, 256


def refill(repeats: int) -> dict[str, Any]:
    """128 prompts x 64, answers of drawn lengths up to 256, 16 rows at a time; the two ways take turns.

    Returns:
      {"seconds_all", "tokens_per_second", "dead_steps", "steps": {"static", "refilled"} each, "ratio": the median of
      the paired ratios of seconds, "prefill_share": of a refilled run's seconds, "equal_rows": the share of answers
      that are the same tokens}.
    """
    config, rng = workload_w(tie_embeddings=False), np.random.default_rng(0)
    params = jax.jit(lambda key: init_base(config, key=key))(jax.random.key(0))
    sampling, key = Sampling(NEW, stop_ids=NEVER), jax.random.key(1)
    prompts = rng.integers(3, config.vocab_size, (PROMPTS, PROMPT)).astype(np.int32)
    full, ids = np.full(PROMPTS, PROMPT, np.int32), np.arange(PROMPTS, dtype=np.int32)
    limits = np.minimum(rng.choice(PERCENTILES, PROMPTS), NEW).astype(np.int32)

    def static() -> list[jax.Array]:
        batches = (slice(start, start + SLOTS) for start in range(0, PROMPTS, SLOTS))
        fields: dict[str, Any] = dict(key=key, sampling=sampling)
        return [
            generate(config, params, prompts[b], full[b], row_ids=ids[b], limits=limits[b], **fields).tokens
            for b in batches
        ]

    def refilled(limits: np.ndarray = limits) -> Refilled:
        return generate_refilled(
            config, params, prompts, full, key=key, sampling=sampling, slots=SLOTS, row_ids=ids, limits=limits
        )

    def prefills() -> Refilled:
        return refilled(np.ones_like(limits))

    ways: dict[str, Callable[[], Any]] = {"static": static, "refilled": refilled, "prefills": prefills}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(1 + repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            if i:  # the first round compiles
                seconds[name].append(time.perf_counter() - start)
    rollout, steps, _ = refilled()
    ran = {"static": int(sum(static_steps(limits[at : at + SLOTS]) for at in range(0, PROMPTS, SLOTS)))}
    ran["refilled"] = int(steps)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    equal = np.asarray(jnp.concatenate(static()) == rollout.tokens).all(axis=1)
    return {
        "seconds_all": {name: seconds[name] for name in ran},
        "tokens_per_second": {name: int(limits.sum()) / middle[name] for name in ran},
        "dead_steps": {name: float(dead_steps(limits, SLOTS, ran[name])) for name in ran},
        "steps": ran,
        "ratio": statistics.median(a / b for a, b in zip(seconds["static"], seconds["refilled"], strict=True)),
        "prefill_share": middle["prefills"] / middle["refilled"],
        "equal_rows": float(equal.mean()),
    }
