"""Answers decoded in slots that are refilled are those of `generate`, whoever waits and whichever slot is free."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_topology import COLLECTIVES, GIBIBYTE, LLAMA_7B, computations, operations, split_at_loops

from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.sharding import place_batch, replicated, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.leaves import base_leaves, shapes
from rlhf_jax.models.lora import init_adapters, scaled
from rlhf_jax.models.roles import base_axes, init_base
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.generate import dead_steps
from rlhf_jax.rollout.refill import generate_refilled, static_steps
from rlhf_jax.rollout.sampling import BLOCK

CONFIG = TransformerConfig(
    vocab_size=19, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=32, tie_embeddings=False
)
WINDOWED = dataclasses.replace(CONFIG, windows=(3, 0), local_rope_theta=50.0, attention_softcap=5.0)
ROWS, WIDTH, COUNT = 8, 6, 20
LENGTHS = np.array([6, 1, 4, 3, 2, 5, 1, 6], np.int32)
IDS = np.array([70, 3, 1_000_003, 8, 0, 12, 5, 44], np.int32)
PROMPTS = np.random.default_rng(0).integers(1, 19, (ROWS, WIDTH))
PROMPTS = np.where(np.arange(WIDTH) < LENGTHS[:, None], PROMPTS, 0).astype(np.int32)
STOPS = Sampling(max_new_tokens=COUNT, stop_ids=(3, 5))
FREE = Sampling(max_new_tokens=COUNT, stop_ids=())
FIELDS = ("prompts", "prompt_lengths", "tokens", "lengths", "ended")
TABLE = np.zeros((3, 19), np.int16)  # ends an answer with the second of two tokens of 6 ... 12 in a row
TABLE[0, 6:13], TABLE[1, 6:13], TABLE[2] = 1, 2, 2


@pytest.fixture(scope="module")
def params():
    """A decoder with opinions: the untied head's logits have a deviation of about 2."""
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    return {**params, "embedding": 30 * params["embedding"], "head": 2 * params["head"]}


def both(params, config=CONFIG, sampling=STOPS, slots=4, **fields):
    """What `generate` gives, and `generate_refilled`."""
    refill = {name: fields.pop(name) for name in ("admit",) if name in fields}
    settings = dict(key=jax.random.key(1), sampling=sampling, row_ids=IDS, **fields)
    static = generate(config, params, PROMPTS, LENGTHS, **settings)
    return static, generate_refilled(config, params, PROMPTS, LENGTHS, slots=slots, **settings, **refill)


def assert_same(found, expected):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def simulated(lengths, slots, admit, samples=1, every=8, shards=1):
    """(decode steps, prefills) by a loop over a schedule: `lengths` (B * samples,) in the order of the queue."""
    queues = [list(part.reshape(-1, samples)) for part in np.split(np.asarray(lengths), shards)]
    left = [[0] * (slots // shards) for _ in queues]
    steps = prefills = 0
    while any(queues) or any(map(any, left)):
        while any(
            q and s.count(0) // samples >= min(admit // shards, len(q)) for q, s in zip(queues, left, strict=True)
        ):
            for queue, rows in zip(queues, left, strict=True):
                for _ in range(min(admit // shards, len(queue), rows.count(0) // samples)):
                    for length in queue.pop(0):
                        rows[rows.index(0)] = -1 if length == 1 else length - 1  # a slot is free after this prefill
            left = [[max(n, 0) for n in rows] for rows in left]
            prefills += 1
        if any(map(any, left)):
            steps, left = steps + every, [[max(0, n - every) for n in rows] for rows in left]
    return steps, prefills


# The answers are those of `generate`.


@pytest.mark.parametrize("slots", [2, 4, ROWS, 12])
def test_every_number_of_slots_gives_the_same_answers(params, slots):
    static, (rollout, steps, prefills) = both(params, slots=slots)
    assert 1 < rollout.lengths.min() + 1 < rollout.lengths.max() and rollout.ended.any()
    assert_same(rollout, static)
    assert (int(steps), int(prefills)) == simulated(rollout.lengths, slots, max(1, slots // 4))


def adapters():
    lora = LoraConfig(rank=2, alpha=4.0)
    leaves = jax.jit(partial(init_adapters, CONFIG, lora))(key=jax.random.key(2))
    rng = np.random.default_rng(2)
    for leaf in leaves.values():
        leaf["b"] = (0.3 * rng.normal(size=leaf["b"].shape)).astype(np.float32)
    return scaled(leaves, lora)


LIMITS = np.array([9, 1, 25, 2, 10, 17, 8, 1], np.int32)
CASES = {
    "greedy": dict(sampling=Sampling(COUNT, temperature=0.0, stop_ids=(3, 7, 11))),
    "truncated, with stop strings": dict(
        sampling=Sampling(COUNT, temperature=0.7, top_k=7, top_p=0.8, stop_ids=(3,)), stop_table=TABLE
    ),
    "windows and adapters": dict(config=WINDOWED, adapters=adapters),
    "limits": dict(sampling=FREE, limits=LIMITS, check_every=3),
    "samples": dict(samples=2, limits=np.tile(np.array([20, 1, 7, 4], np.int32), 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_setting_gives_the_answers_of_generate(params, case):
    fields = dict(CASES[case])
    if "adapters" in fields:
        fields["adapters"] = fields["adapters"]()
    static, (rollout, steps, prefills) = both(params, **fields)
    assert_same(rollout, static)
    assert len(np.unique(rollout.lengths)) > 2
    schedule = dict(samples=fields.get("samples", 1), every=fields.get("check_every", 8))
    assert (int(steps), int(prefills)) == simulated(rollout.lengths, 4, 1, **schedule)


@pytest.mark.parametrize("way", [0, 1], ids=["static", "refilled"])
def test_a_limit_cuts_an_answer_and_ends_none(params, way):
    whole, cut = (
        both(params, sampling=FREE, limits=limits, check_every=3)[way] for limits in (np.full_like(LIMITS, 99), LIMITS)
    )
    whole, cut = (found.rollout if way else found for found in (whole, cut))
    np.testing.assert_array_equal(whole.lengths, COUNT)
    np.testing.assert_array_equal(cut.lengths, np.minimum(LIMITS, COUNT))
    assert not cut.ended.any()
    kept = np.arange(COUNT) < np.asarray(cut.lengths)[:, None]
    np.testing.assert_array_equal(cut.tokens, np.where(kept, whole.tokens, 0))
    np.testing.assert_array_equal(cut.logprobs, np.where(kept, whole.logprobs, 0))


def test_a_stop_token_at_the_limit_has_ended(params):
    free, _ = both(params, admit=2, limits=np.full(ROWS, COUNT, np.int32))
    assert free.ended.sum() >= 2 and (np.asarray(free.lengths) > 1).any()
    for short in (0, 1):
        limits = np.maximum(free.lengths - short, 1)
        for rollout in (
            found if i == 0 else found.rollout for i, found in enumerate(both(params, admit=2, limits=limits))
        ):
            np.testing.assert_array_equal(rollout.lengths, limits)
            np.testing.assert_array_equal(rollout.ended, free.ended & (free.lengths == limits))


def test_answers_of_one_token_take_no_step(params):
    ones = dict(sampling=FREE, limits=np.ones(ROWS, np.int32), check_every=3)
    for fields in (ones, dict(sampling=Sampling(1, stop_ids=()))):
        static, (rollout, steps, prefills) = both(params, **fields)
        assert_same(rollout, static)
        assert (int(steps), int(prefills), float(dead_steps(rollout.lengths, 4, steps))) == (0, ROWS, 0.0)


# Order, slots and neighbours.


def test_the_order_of_the_queue_changes_no_bit(params):
    fields = dict(key=jax.random.key(3), sampling=STOPS, slots=4, admit=2)
    limits = np.array([20, 12, 7, 20, 1, 9, 20, 3], np.int32)
    before = generate_refilled(CONFIG, params, PROMPTS, LENGTHS, row_ids=IDS, limits=limits, **fields).rollout
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(ROWS)
        moved = PROMPTS[order], LENGTHS[order]
        after = generate_refilled(CONFIG, params, *moved, row_ids=IDS[order], limits=limits[order], **fields).rollout
        for field in (*FIELDS, "logprobs"):
            np.testing.assert_array_equal(getattr(after, field), np.asarray(getattr(before, field))[order])


def test_other_rows_change_no_bit(params):
    fields = dict(key=jax.random.key(3), sampling=STOPS, slots=4, admit=2)
    limits = np.array([3, 20, 7, 1, 12, 9, 20, 2], np.int32)
    before = generate_refilled(CONFIG, params, PROMPTS, LENGTHS, row_ids=IDS, limits=limits, **fields).rollout
    row = 6
    prompts, lengths, ids, others = (PROMPTS + 1) % 19, np.roll(LENGTHS, 1), IDS + 1, np.roll(limits, 3)
    prompts[row], lengths[row], ids[row], others[row] = PROMPTS[row], LENGTHS[row], IDS[row], limits[row]
    after = generate_refilled(CONFIG, params, prompts, lengths, row_ids=ids, limits=others, **fields).rollout
    for field in (*FIELDS, "logprobs"):
        np.testing.assert_array_equal(getattr(after, field)[row], getattr(before, field)[row])
    assert (np.asarray(after.tokens[0]) != np.asarray(before.tokens[0])).any()


# Steps.


def test_dead_steps_by_hand(params):
    """Two slots and answers of 5, 2, 2 and 2 tokens, of which the first comes with the prefill.

    One batch after the other runs 4 steps and then 1, of two rows each: 10, of which 4 + 1 + 1 + 1 = 7 are alive.
    Refilled, the long answer's neighbours come one after another in the 4 steps it takes: 7 of 8.
    """
    limits = np.array([5, 2, 2, 2], np.int32)
    fields = dict(key=jax.random.key(1), sampling=FREE, limits=limits, slots=2, check_every=1)
    rollout, steps, prefills = generate_refilled(CONFIG, params, PROMPTS[:4], LENGTHS[:4], **fields)
    np.testing.assert_array_equal(rollout.lengths, limits)
    assert (int(steps), int(prefills)) == (4, 4)
    assert float(dead_steps(rollout.lengths, 2, steps)) == 1 / 8
    static = static_steps(rollout.lengths[:2], 1) + static_steps(rollout.lengths[2:], 1)
    assert int(static) == 5
    np.testing.assert_allclose(dead_steps(rollout.lengths, 2, static), 3 / 10, rtol=1e-6)
    assert [int(static_steps(np.array([1, n]), 8)) for n in (1, 2, 9, 10)] == [0, 8, 8, 16]


def test_the_schedule_is_that_of_a_plain_loop(params):
    rng = np.random.default_rng(5)
    prompts, lengths = np.tile(PROMPTS, (4, 1)), np.tile(LENGTHS, 4)
    fields = dict(key=jax.random.key(1), sampling=FREE, slots=5, admit=3, check_every=4)
    for _ in range(4):
        limits = rng.integers(1, COUNT + 1, 32).astype(np.int32)
        found = generate_refilled(CONFIG, params, prompts, lengths, limits=limits, **fields)
        assert (int(found.steps), int(found.prefills)) == simulated(limits, 5, 3, every=4)
        np.testing.assert_array_equal(found.rollout.lengths, limits)


def test_new_keys_prompts_and_limits_compile_nothing(params):
    fields = dict(sampling=STOPS, slots=4, admit=2, row_ids=IDS, limits=np.full(ROWS, 5, np.int32))
    generate_refilled(CONFIG, params, PROMPTS, LENGTHS, key=jax.random.key(0), **fields)
    programs = generate_refilled._cache_size()
    fields |= dict(limits=np.arange(1, 9, dtype=np.int32), row_ids=IDS + 1)
    generate_refilled(CONFIG, params, (PROMPTS + 1) % 19, LENGTHS[::-1].copy(), key=jax.random.key(4), **fields)
    assert generate_refilled._cache_size() == programs


# Devices.


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2)], ids=str)
def test_a_mesh_gives_one_devices_answers_and_moves_no_cache(params, shape):
    shards, samples, slots = shape[0] * shape[1], 2, 8
    limits = np.random.default_rng(1).integers(1, COUNT + 1, samples * ROWS).astype(np.int32)
    alone, _ = both(params, samples=samples, limits=limits)
    mesh = make_mesh(*shape, devices=jax.devices()[: prod(shape)])
    columns = dict(prompts=PROMPTS, lengths=LENGTHS, row_ids=IDS)
    placed = place_batch(ROWS, lambda mine: {name: x[mine] for name, x in columns.items()}, mesh)
    placed |= place_batch(len(limits), lambda mine: {"limits": limits[mine]}, mesh)
    weights = jax.device_put(params, tree_shardings(params, base_axes(CONFIG), mesh))
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    arguments = weights, placed.pop("prompts"), placed.pop("lengths")
    with jax.set_mesh(mesh):
        settings = dict(sampling=STOPS, slots=slots, samples=samples)
        program = generate_refilled.lower(CONFIG, *arguments, key=key, **placed, **settings).compile()
        rollout, steps, prefills = program(*arguments, key=key, **placed)
    assert_same(rollout, alone)
    expected = simulated(rollout.lengths, slots, shards, samples=samples, shards=shards)
    assert (int(steps), int(prefills)) == expected
    moved = [dims for _, _, dims, _ in operations(split_at_loops(program.as_text())[0], COLLECTIVES)]
    assert moved and max(map(len, moved)) < 4  # keys and values have four dimensions
    assert max(map(prod, moved)) < slots // shards * CONFIG.kv_heads * CONFIG.head_dim * (WIDTH + 24) // shape[2]
    if shape[2] == 1:  # but for a draw's blocks of probabilities, less than the keys of one prompt
        assert max(prod(dims) for dims in moved if dims[-1:] != (BLOCK,)) < CONFIG.kv_heads * CONFIG.head_dim * WIDTH


def test_what_does_not_divide_is_refused(params):
    fields = dict(key=jax.random.key(1), sampling=FREE)
    with pytest.raises(UserError, match="4 prompts with 2 samples each does not fit in 6 slots: raise slots to 8"):
        generate_refilled(CONFIG, params, PROMPTS, LENGTHS, slots=6, samples=2, admit=4, **fields)
    with pytest.raises(UserError, match="leading axis"):
        stacked = jax.tree.map(lambda x: np.stack([x, x]), adapters())
        generate_refilled(CONFIG, params, PROMPTS, LENGTHS, slots=2, adapters=stacked, **fields)
    with jax.set_mesh(make_mesh(4, 1, 1, devices=jax.devices()[:4])):
        for wrong in (dict(slots=6), dict(slots=8, admit=2)):
            name, number = list(wrong.items())[-1]
            with pytest.raises(UserError, match=f"{number} {name} do not divide over 4 devices"):
                generate_refilled(CONFIG, params, PROMPTS, LENGTHS, **wrong, **fields)


# Programs.


def test_a_cpus_loops_copy_no_cache():
    config = TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48)
    weights = shapes(base_leaves(config))
    prompts, lengths = jax.ShapeDtypeStruct((24, 16), jnp.int32), jax.ShapeDtypeStruct((24,), jnp.int32)
    fields = dict(key=jax.random.key(0), sampling=Sampling(201), slots=8)
    program = generate_refilled.lower(config, weights, prompts, lengths, **fields).compile()
    inside, _ = split_at_loops(program.as_text())
    cache = 8 * 2 * 8 * (16 + 200)
    written = [dims for _, _, dims, _ in operations(inside, ["dynamic-update-slice"]) if prod(dims) == cache]
    assert len(written) == 2 * 2 * config.layers  # newcomers' prompts, and blocks
    assert not [dims for _, _, dims, _ in operations(inside, ["copy", "transpose"]) if prod(dims) >= cache // 2]


def innermost_with_collectives(text):
    """The lines of each loop that holds no other and in which something crosses devices."""
    found, loops = computations(text), []
    for body in {x for lines in found.values() for line in lines for x in re.findall(r" body=%?([\w.\-]+)", line)}:
        waiting, reached = {body}, set()
        while waiting:
            name = waiting.pop()
            reached.add(name)
            words = {word for line in found[name] for word in re.findall(r"%?([\w.\-]+)", line.partition("(")[2])}
            waiting |= (words & found.keys()) - reached
        lines = [line for name in reached for line in found[name]]
        if not any(" while(" in line for line in lines) and operations(lines, COLLECTIVES):
            loops.append(lines)
    return loops


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.sharding import batch_sharding, tree_shardings
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.leaves import base_leaves, shapes
from rlhf_jax.models.roles import base_axes
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.refill import generate_refilled

config = TransformerConfig(**json.loads(sys.argv[1]))
mesh = make_mesh(1, 4, 4, devices=topologies.get_topology_desc("v5e:4x4", "tpu").devices)

def on(sharding, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

weights = shapes(base_leaves(config), config.param_dtype)
weights = jax.tree.map(on, tree_shardings(weights, base_axes(config), mesh), weights)
prompts = jax.ShapeDtypeStruct((256, 128), jnp.int32, sharding=batch_sharding(mesh))
lengths = jax.ShapeDtypeStruct((256,), jnp.int32, sharding=batch_sharding(mesh))
key = on(NamedSharding(mesh, PartitionSpec()), jax.eval_shape(lambda: jax.random.key(0)))
settings = dict(key=key, sampling=Sampling(128), slots=64, admit=8)
with jax.set_mesh(mesh):
    program = generate_refilled.lower(config, weights, prompts, lengths, **settings).compile()
with open(sys.argv[2], "w") as file:
    file.write(program.as_text())
memory = program.memory_analysis()
print(json.dumps([memory.argument_size_in_bytes, memory.temp_size_in_bytes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_7b_is_refilled_on_a_tpu_slice_without_gathering_a_weight(tmp_path):
    """v5e:4x4 as (data 1, fsdp 4, tensor 4): 256 prompts of 128 in 64 slots, 8 a prefill, 128 new tokens."""
    fields = {**LLAMA_7B, "layers": 2}
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # libtpu refuses the CPU's
    environment = {**given, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMPILE, json.dumps(fields), str(tmp_path / "program.txt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "program.txt").read_text()
    inside, _ = split_at_loops(text)

    # --- what crosses devices: partial sums of the residual stream, of a prefill's tokens at most ------------------
    moved = operations(inside, COLLECTIVES)
    assert max(prod(dims) for _, _, dims, _ in moved) == 8 // 4 * 128 * 4096  # two prompts a device
    assert max(prod(dims) for kind, _, dims, _ in moved if kind != "all-reduce") <= 16 * 9  # never weights or logits

    # --- the caches: newcomers' prompts and blocks of tokens are written in place ----------------------------------
    cache = {(16, 8, 128, 256), (16, 8, 256, 128)}  # a layer's keys and values on a device
    written = [dims for _, _, dims, _ in operations(inside, ["dynamic-update-slice"]) if dims in cache]
    assert len(written) == 2 * 2 * 2
    assert not [dims for _, _, dims, _ in operations(inside, ["copy", "transpose"]) if dims in cache]

    # --- the token loop reads weights and caches where they are -----------------------------------------------------
    [lines] = innermost_with_collectives(text)
    still = [line for line in lines if not (" copy-start(" in line and "S(1)" in line)]  # HBM to VMEM: prefetching
    assert (
        sum(kind == "all-reduce" and prod(dims) == 16 * 4096 for kind, _, dims, _ in operations(lines, COLLECTIVES))
        == 5
    )
    assert not [dims for _, _, dims, _ in operations(still, ["copy", "transpose"]) if prod(dims) >= 1 << 20]

    # --- memory: weights by tensor, the caches, and room for a prefill ----------------------------------------------
    arguments, temporary = json.loads(done.stdout.splitlines()[-1])
    config = TransformerConfig(**fields)
    parameters = sum(prod(leaf.shape) for leaf in jax.tree.leaves(shapes(base_leaves(config), "bfloat16")))
    assert arguments < 1.02 * 2 * parameters / 16
    assert temporary < 2 * parameters / 4 + 2 * 2 * 2 * prod((16, 8, 256, 128)) + GIBIBYTE // 4
