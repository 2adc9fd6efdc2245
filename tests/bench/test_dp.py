"""The cost of clipping: what is counted, and on workload W the bounds that private steps keep."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.bench.dp import CASES, PAPER, Case, dp, flops_limit, plain_flops, unrolled
from rlhf_jax.bench.workloads import workload_w

SMALL = dataclasses.replace(workload_w(), layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=64)
MATRICES = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48  # of a layer


def test_every_iteration_of_a_loop_is_counted():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    with unrolled():
        whole = jax.jit(layers).lower(*shapes).compile().cost_analysis()["flops"]
    looped = jax.jit(layers).lower(*shapes).compile().cost_analysis()["flops"]
    assert whole == pytest.approx(5 * 2 * 64**3, rel=0.01)
    assert looped < 2 * 2 * 64**3


def test_plain_flops_are_counted_by_hand():
    attention = 4 * 2 * 32 * 16
    full = 3 * (2 * 2 * MATRICES + attention + 2 * 64 * 32)
    assert plain_flops(SMALL, Case("vmap", 3, 16)) == 3 * 16 * full
    again = 2 * 2 * (MATRICES - 32 * 48) + attention
    assert plain_flops(SMALL, Case("ghost", 1, 16, "full")) == 16 * (full + again)
    adapters = 2 * 3 * 2 * 4 * (32 + 32 + 32 + 16)
    lora = 2 * 2 * 2 * MATRICES + 3 * attention + 2 * 2 * 64 * 32 + adapters
    assert plain_flops(SMALL, Case("adapters", 1, 16, lora=PAPER)) == 16 * lora


def test_the_limit_of_exact_clipping():
    assert flops_limit(workload_w(), CASES["full_128"]) == pytest.approx(1.16, abs=0.005)
    assert flops_limit(workload_w(), CASES["full_512"]) == pytest.approx(1.27, abs=0.005)
    assert flops_limit(workload_w(), CASES["lora_128"]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_private_steps_keep_to_their_bounds(name):
    out, case = dp(1, {name: CASES[name]})[name], CASES[name]
    assert out["plain_flops"] == pytest.approx(1.0, abs=0.05)
    flops = {"adapters": 1.03, "bookkeeping": out["flops_limit"] + 0.03, "ghost": 1.8}[case.backend]
    memory = {"adapters": 1.05, "bookkeeping": 1.15, "ghost": 1.3}[case.backend]
    assert out["flops"] <= flops and out["memory"] <= memory
