"""How long it takes to ask a model for secrets: decoding every one to its end, and reading first (`evaluation.drafts`).

Workload W's decoder with secrets of a prompt of 50 tokens and 50 or 450 more: half are its own greedy answers, so it
gives them back word for word; half are random.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.bench.workloads import NEVER, workload_w
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.evaluation.distances import normalized_edit_distance
from rlhf_jax.evaluation.drafts import SLACK, complete
from rlhf_jax.evaluation.extraction import first_divergence
from rlhf_jax.evaluation.memorization import MEMORIZED_DISTANCE
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, read_all

PROMPT, BATCH = 50, 64
SETTINGS = {50: 256, 450: 64}  # tokens of a target -> secrets


def memorization(repeats: int) -> dict[str, Any]:
    """{"50 + N": `_setting`} of each length N."""
    return {f"{PROMPT} + {length}": _setting(length, count, repeats) for length, count in SETTINGS.items()}


def _setting(length: int, secrets: int, repeats: int) -> dict[str, Any]:
    """{"seconds_all": {"everything", "reading", "behind drafts"}, "ratio_decoding", "ratio_whole", "same_verdicts",
    "memorized" of "secrets"}, ratios of medians.

    `ratio_decoding` is of decoding alone: everything over what is left behind the drafts. The reading that finds the
    drafts also gives log-probabilities, ranks and extraction curves, which decoding does not; `ratio_whole` is what
    verdicts alone gain, everything over reading and decoding together.
    """
    config = workload_w(tie_embeddings=False)
    spec = RoleSpec(config)
    rng = np.random.default_rng(0)
    weights = {"base": jax.jit(lambda key: init_base(config, key=key))(jax.random.key(0))}
    prompts = rng.integers(1, config.vocab_size, (secrets, PROMPT)).tolist()
    mesh = make_mesh()
    fields: dict[str, Any] = dict(batch_size=BATCH, mesh=mesh, name="secrets")

    def decode_all() -> tuple[np.ndarray, np.ndarray]:
        greedy, ids = Sampling(length, temperature=0.0, stop_ids=NEVER), np.arange(secrets, dtype=np.int32)
        tokens, lengths, _ = answer_all(spec, weights, prompts, ids, key=jax.random.key(1), sampling=greedy, **fields)
        return tokens, lengths

    with jax.set_mesh(mesh):
        own, _ = decode_all()
        targets = np.where(np.arange(secrets)[:, None] % 2 == 0, own, rng.integers(1, config.vocab_size, own.shape))
        targets, full = targets.astype(np.int32), np.full(secrets, length, np.int32)
        asked = targets.tolist()

        def everything() -> np.ndarray:
            return np.asarray(normalized_edit_distance(*decode_all(), targets, full))

        def read() -> np.ndarray:
            reading = read_all(spec, weights, prompts, asked, scheme=Sampling(1), **fields)
            return first_divergence(np.asarray(reading.greedy), full)

        def behind(agreed: np.ndarray) -> np.ndarray:
            return complete(
                spec, weights, prompts, asked, agreed, near=MEMORIZED_DISTANCE, stop_ids=NEVER, **fields
            ).distance

        rounds = [_round(everything, read, behind) for _ in range(1 + repeats)][1:]  # the first one compiles
    seconds = {name: [each[0][name] for each in rounds] for name in rounds[0][0]}
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    plain, drafted = rounds[-1][1:]
    return {
        "seconds_all": seconds,
        "ratio_decoding": middle["everything"] / middle["behind drafts"],
        "ratio_whole": middle["everything"] / (middle["reading"] + middle["behind drafts"]),
        "same_verdicts": bool(((plain <= MEMORIZED_DISTANCE + SLACK) == (drafted <= MEMORIZED_DISTANCE + SLACK)).all()),
        "memorized": int((drafted <= MEMORIZED_DISTANCE + SLACK).sum()),
        "secrets": secrets,
    }


def _round(
    everything: Callable[[], np.ndarray], read: Callable[[], np.ndarray], behind: Callable[[np.ndarray], np.ndarray]
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Seconds of each, and the distances of both ways."""
    start = time.perf_counter()
    plain = everything()
    decoded = time.perf_counter()
    agreed = read()
    known = time.perf_counter()
    drafted = behind(agreed)
    end = time.perf_counter()
    return {"everything": decoded - start, "reading": known - decoded, "behind drafts": end - known}, plain, drafted
