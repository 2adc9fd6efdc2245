"""The saves bench on a small state: every part is timed, and the stall is what they add up to."""

import jax
import jax.numpy as jnp

from rlhf_jax.bench import saves as bench


def test_every_part_is_timed(monkeypatch):
    box = [{"weights": jnp.ones((1024, 256))}]
    taken = []

    def step(i):
        taken.append(i)
        box[0] = jax.tree.map(lambda leaf: leaf + 1, box[0])
        return box[0]

    monkeypatch.setattr(bench.workloads, "sft_steps", lambda: (box, step))
    found = bench.saves(2)
    assert len(taken) == 2 * (2 + bench.WARM_UP)
    assert found["mib"] == 1.0
    timed = found["seconds_all"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timed.values())
    stalls = [timed["save"][i] + timed["step_beside"][i] - timed["step"][i] for i in (0, 1)]
    assert found["stall"] == sum(stalls) / 2
