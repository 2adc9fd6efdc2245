"""`--topology` by the real command: one plan of every kind of stage, compiled for a TPU slice with libtpu."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest

from rlhf_jax.models import TransformerConfig

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='libtpu is not installed (pip install "rlhf_jax[tpu]"): plans are compiled for CPU devices only',
    ),
    pytest.mark.timeout(900),
]

CONFIG = """
from rlhf_jax.config import experiment, stage

SHAPE = dict(layers=1, width=256, heads=4, kv_heads=4, head_dim=64, ffn=256, context=256)
MESH = dict(mesh=dict(fsdp=2, tensor=2), batch_size=8)
ADAPTED = dict(init="base", lora=dict(rank=4), **MESH)


def get_config(argument=""):
    config = experiment(seed=0)
    config.privacy.public = ("texts.jsonl", "pairs.jsonl", "prompts.jsonl")
    stages = config.stages
    stages.tokenizer = stage("tokenizer", data="texts.jsonl", vocab_size=512)
    stages.base = stage(
        "sft", init="scratch", tokenizer="tokenizer/tokenizer.model", model=SHAPE, data="texts.jsonl",
        sequence_length=128, **MESH,
    )
    if argument == "sharded":
        stages.base.model.layers = 3
        stages.base.update(mesh=dict(fsdp=4, tensor=1), accumulation=2)
        stages.base.compute.update(dtype="bfloat16", param_dtype="bfloat16", remat="full")
        return config
    pairs = dict(data="pairs.jsonl", sequence_length=128, **ADAPTED)
    stages.private = stage("sft", data="own.jsonl", sequence_length=128, packing=False, **ADAPTED)
    stages.private.privacy.update(epsilon=8.0, delta=1e-5)
    stages.reward = stage("reward", schema="preference", **pairs)
    stages.cost = stage("cost", **pairs)
    stages.preference = stage("preference", **pairs)
    stages.ppo = stage(
        "ppo", reward="reward", data="prompts.jsonl", prompt_buckets=(64,), max_new_tokens=32, minibatches=2,
        constraint=dict(cost="cost"), **ADAPTED,
    )
    stages.answers = stage(
        "annotate", data="prompts.jsonl", subject="ppo", reward="reward", prompt_buckets=(64,), max_new_tokens=32,
        mesh=dict(fsdp=2, tensor=2), batch_size=8,
    )
    return config
"""
PROGRAMS = {
    "base": {"step"},
    "private": {"step"},
    "reward": {"step"},
    "cost": {"step"},
    "preference": {"step"},
    "ppo": {"rollout", "scores", "rewards", "costs", "update"},
    "answers": {"rollout"},
}


def plan(folder, argument=""):
    """Runs the command in the folder: its words are in `said`, what it compiled in plans/topology."""
    (folder / "config.py").write_text(CONFIG)
    flags = [f"--config=config.py:{argument}" if argument else "--config=config.py", "--workdir=plans"]
    command = [sys.executable, "-m", "rlhf_jax.main", *flags, "--topology=v5e:2x2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "said").write_text(done.stdout)


def compiled(folder):
    """The exchanges of each program that was compiled there."""
    return [json.loads(note.read_text())["exchanges"] for note in (folder / "plans" / "topology").glob("*.json")]


def numbers(shape):
    """How many an array like "bf16[4,256]" has."""
    return math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topology")
    plan(folder)
    return folder


@pytest.mark.parametrize("stage", PROGRAMS)
def test_every_program_of_a_stage_compiles_for_the_slice(folder, stage):
    parts = re.split(r"^\[\d+/\d+\] (\w+) \(\w+\)$", (folder / "said").read_text(), flags=re.MULTILINE)
    assert "4 TPU v5 lite chips" in parts[0]
    said = dict(zip(parts[1::2], parts[2::2], strict=True))[stage]
    found = re.findall(r"^ {6}([\w ]+): ([\d.]+) MiB of 15\.75 GiB .* bound by (\w+)", said, flags=re.MULTILINE)
    assert {name for name, _, _ in found} == PROGRAMS[stage]
    assert all(0 < float(used) < 100 for _, used, _ in found)
    assert "DOES NOT FIT" not in said


def test_no_loop_of_decoding_gathers_weights(folder):
    decoding = [
        one for program in compiled(folder) for one in program if "generate" in one["where"] and one["times"] > 30
    ]
    assert [one for one in decoding if one["kind"] == "all-reduce"]  # the loops are there
    gathered = [numbers(one["shape"]) for one in decoding if one["kind"] == "all-gather"]
    smallest = 256 * 256 / 2  # numbers of a layer's matrix on one of two chips
    assert max(gathered, default=0) < smallest


def test_a_step_gathers_each_weight_once_forward_and_once_backward(tmp_path):
    plan(tmp_path, "sharded")
    (step,) = compiled(tmp_path)
    shape = TransformerConfig(vocab_size=512, layers=3, width=256, heads=4, kv_heads=4, head_dim=64, ffn=256)
    whole = 2 * shape.parameters  # bytes; gradients travel in float32 and are summed, not gathered
    sent = sum(e["sent"] for e in step if e["kind"] in ("all-gather", "collective-permute") and "bf16" in e["shape"])
    once = 2 * whole * 3 / 4  # two microbatches, each to four devices
    assert 1.8 * once < sent < 2.1 * once
