"""What `generate` compiles to: in the token loop no weight crosses the network and no cache is copied."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from math import prod

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.leaves import base_leaves, shapes
from rlhf_jax.rollout import Sampling, generate

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GIBIBYTE = 1 << 30


# Reading a compiled program.


def computations(text):
    """{name: its instruction lines} of an HLO module, the entry's too."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head.group(1)
            found[name] = []
        elif name and line.startswith(" "):
            found[name].append(line)
    return found


def split_at_loops(text):
    """(lines inside the token loop, lines outside of it): a while's body and all that it calls."""
    found = computations(text)
    waiting = {body for lines in found.values() for line in lines for body in re.findall(r" body=%?([\w.\-]+)", line)}
    assert waiting
    inside = set()
    while waiting:
        name = waiting.pop()
        inside.add(name)
        called = {word for line in found[name] for word in re.findall(r"%?([\w.\-]+)", line.partition("(")[2])}
        waiting |= (called & found.keys()) - inside
    return tuple(
        [line for n, lines in found.items() if (n in inside) == there for line in lines] for there in (True, False)
    )


def operations(lines, kinds):
    """(kind, dtype, dimensions, channel) of every operation of these kinds; a tuple's largest array stands for it."""
    out = []
    for line in lines:
        match = re.search(rf"= (.*?) ({'|'.join(kinds)})(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match.group(1))
            arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays]
            channel = re.search(r"channel_id=(\d+)", line)
            out.append((match.group(2), *max(arrays, key=lambda a: prod(a[1])), channel and int(channel.group(1))))
    return out


# A TPU slice.

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
from rlhf_jax.rollout import Sampling, generate

fields, folder = json.loads(sys.argv[1]), sys.argv[2]
config = TransformerConfig(**fields)
mesh = make_mesh(1, 4, 4, devices=topologies.get_topology_desc("v5e:4x4", "tpu").devices)

def on(sharding, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

weights = shapes(base_leaves(config), config.param_dtype)
weights = jax.tree.map(on, tree_shardings(weights, base_axes(config), mesh), weights)
rows = batch_sharding(mesh)
prompts = jax.ShapeDtypeStruct((64, 128), jnp.int32, sharding=rows)
lengths = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=rows)
key = on(NamedSharding(mesh, PartitionSpec()), jax.eval_shape(lambda: jax.random.key(0)))
with jax.set_mesh(mesh):
    program = generate.lower(config, weights, prompts, lengths, key=key, sampling=Sampling(128)).compile()
with open(f"{folder}/program.txt", "w") as file:
    file.write(program.as_text())
memory = program.memory_analysis()
print(json.dumps([memory.argument_size_in_bytes, memory.temp_size_in_bytes]))
"""
LLAMA_7B = dict(
    vocab_size=32000,
    layers=32,
    width=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    ffn=11008,
    context=4096,
    tie_embeddings=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("layers", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_a_7b_decodes_on_a_tpu_slice_without_gathering_a_weight(layers, tmp_path):
    """v5e:4x4 as (data 1, fsdp 4, tensor 4), weights as training shards them, 64 prompts of 128 and 128 new tokens."""
    fields = {**LLAMA_7B, "layers": layers}
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # libtpu refuses the CPU's
    environment = {**given, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), json.dumps(fields), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    inside, outside = split_at_loops((tmp_path / "program.txt").read_text())
    config = TransformerConfig(**fields)
    leaves = shapes(base_leaves(config), "bfloat16")

    # --- outside the loop: each matrix is gathered once along fsdp, in bfloat16 ---------------------------------
    gathered = {(kind, dtype, dims, channel) for kind, dtype, dims, channel in operations(outside, ["all-gather"])}
    large = sorted((dtype, prod(dims)) for _, dtype, dims, _ in gathered if prod(dims) >= 4096 * 1024)
    matrices = [leaf for name, leaf in leaves["layers"].items() if "norm" not in name]
    each = [prod(leaf.shape[1:]) for leaf in matrices] * layers  # layer by layer, so that no stack is there twice
    sizes = [size // 4 for size in (*each, prod(leaves["embedding"].shape), prod(leaves["head"].shape))]  # tensor stays
    assert large == sorted(("bf16", size) for size in sizes)

    # --- inside: partial sums of the residual stream, and what a draw exchanges ---------------------------------
    rows, shard = 64 // 4, 4096 * 4096 // 16  # of the batch on a device; entries of the smallest matrix on one
    moved = operations(inside, COLLECTIVES)
    assert sum(kind == "all-reduce" and prod(dims) == rows * 4096 for kind, _, dims, _ in moved) == 2 * layers + 1
    assert max(prod(dims) for _, _, dims, _ in moved) <= rows * 4096 < shard
    assert max(prod(dims) for kind, _, dims, _ in moved if kind == "all-gather") <= rows * 4  # never logits
    assert len(moved) <= 2 * layers + 17

    # --- the cache: a slice is written, nothing is copied -------------------------------------------------------
    cache = rows * 8 * 128 * (128 + 129)  # a layer's keys or values on a device
    written = [dims for _, _, dims, _ in operations(inside, ["dynamic-update-slice"]) if prod(dims) == cache]
    assert len(written) == 2 * layers
    # What moves between HBM and VMEM, space S(1), is the compiler's prefetching.
    still = [line for line in inside if not (" copy-start(" in line and "S(1)" in line)]
    assert not [dims for _, _, dims, _ in operations(still, ["copy", "transpose"]) if prod(dims) >= cache // 2]

    # --- memory: the weights by tensor, the caches, and room for the prefill; 16 GiB a chip ----------------------
    arguments, temporary = json.loads(done.stdout.splitlines()[-1])
    parameters = sum(prod(leaf.shape) for leaf in jax.tree.leaves(leaves))
    assert arguments < 1.02 * 2 * parameters / 16
    assert temporary < 2 * parameters / 4 + 2 * layers * 2 * cache + 1.5 * GIBIBYTE


# A CPU.


def test_a_cpus_token_loop_copies_no_cache():
    config = TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48)
    weights = shapes(base_leaves(config))
    prompts, lengths = jax.ShapeDtypeStruct((8, 40), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    program = generate.lower(config, weights, prompts, lengths, key=jax.random.key(0), sampling=Sampling(25)).compile()
    inside, _ = split_at_loops(program.as_text())
    cache = 8 * 2 * 8 * (40 + 25)
    written = [dims for _, _, dims, _ in operations(inside, ["dynamic-update-slice"]) if prod(dims) == cache]
    assert len(written) == 2 * config.layers
    assert not [dims for _, _, dims, _ in operations(inside, ["copy", "transpose"]) if prod(dims) >= cache // 2]
