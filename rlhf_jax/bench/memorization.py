"""How long it takes to ask a model for secrets: decoding every one to its end, and reading first (`evaluation.drafts`).

Workload W's decoder with 256 secrets of 50 + 50 tokens: half are its own greedy answers, so it gives them back word for
word; half are random.
"""

import statistics
import time
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

SECRETS, LENGTH, BATCH = 256, 50, 64


def memorization(repeats: int, secrets: int = SECRETS) -> dict[str, Any]:
    """{"seconds_all": {"everything", "drafts"}, "ratio" of medians, "same_verdicts", "memorized" of "secrets"}."""
    config = workload_w(tie_embeddings=False)
    spec = RoleSpec(config)
    rng = np.random.default_rng(0)
    weights = {"base": jax.jit(lambda key: init_base(config, key=key))(jax.random.key(0))}
    prompts = rng.integers(1, config.vocab_size, (secrets, LENGTH)).tolist()
    mesh = make_mesh()
    fields: dict[str, Any] = dict(batch_size=BATCH, mesh=mesh, name="secrets")

    def decode_all() -> tuple[np.ndarray, np.ndarray]:
        greedy, ids = Sampling(LENGTH, temperature=0.0, stop_ids=NEVER), np.arange(secrets, dtype=np.int32)
        tokens, lengths, _ = answer_all(spec, weights, prompts, ids, key=jax.random.key(1), sampling=greedy, **fields)
        return tokens, lengths

    with jax.set_mesh(mesh):
        own, _ = decode_all()
        targets = np.where(np.arange(secrets)[:, None] % 2 == 0, own, rng.integers(1, config.vocab_size, own.shape))
        targets, full = targets.astype(np.int32), np.full(secrets, LENGTH, np.int32)

        def everything() -> np.ndarray:
            return np.asarray(normalized_edit_distance(*decode_all(), targets, full))

        def drafts() -> np.ndarray:
            asked = targets.tolist()
            reading = read_all(spec, weights, prompts, asked, scheme=Sampling(1), **fields)
            agreed = first_divergence(np.asarray(reading.greedy), full)
            return complete(
                spec, weights, prompts, asked, agreed, near=MEMORIZED_DISTANCE, stop_ids=NEVER, **fields
            ).distance

        ways = {"everything": everything, "drafts": drafts}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        near: dict[str, np.ndarray] = {}
        for round_ in range(1 + repeats):  # the first one compiles
            for name, ask in ways.items():
                start = time.perf_counter()
                near[name] = ask() <= MEMORIZED_DISTANCE + SLACK
                if round_:
                    seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "seconds_all": seconds,
        "ratio": middle["everything"] / middle["drafts"],
        "same_verdicts": bool((near["everything"] == near["drafts"]).all()),
        "memorized": int(near["drafts"].sum()),
        "secrets": secrets,
    }
