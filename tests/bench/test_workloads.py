"""The accelerator workloads at a size that a CPU runs: what they count, not how fast they are."""

import dataclasses
from functools import partial

import jax

from rlhf_jax.bench.workloads import LLAMA_1B, decode_1b, sft_1b
from rlhf_jax.models.roles import init_base

SMALL = dataclasses.replace(LLAMA_1B, vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48)


def test_the_1b_llama_has_its_parameters():
    shapes = jax.eval_shape(partial(init_base, LLAMA_1B), key=jax.random.key(0))
    assert LLAMA_1B.parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_235_814_400


def test_a_training_step_is_counted_by_hand():
    out = sft_1b(2, SMALL, batch_size=2, length=16)
    matrices = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 64 * 32
    attention = 4 * 32 * 8 * 2  # 4 x heads x head_dim x half the length, each layer
    assert out["roofline"]["flops"] == 3 * 2 * 16 * (2 * matrices + attention)
    assert len(out["seconds_all"]) == 2 and out["tokens"] == 32


def test_a_decode_step_moves_weights_and_cache():
    out = decode_1b(1, SMALL, batch_size=2, prompt=4, new=8)
    assert out["roofline"]["bytes"] == 2 * SMALL.parameters + 2 * (2 * 2 * 2 * 8 * 2) * (4 + 6)
    assert out["roofline"]["bandwidth_share"] is None  # no data sheet lists a CPU
