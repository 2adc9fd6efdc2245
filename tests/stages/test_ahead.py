"""Programs without arrays are those of the stages: the same shapes, the same sharing, for the devices that are here."""

import copy
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.chips import V5E, Chip
from rlhf_jax.distributed.program import collectives, memory_of
from rlhf_jax.distributed.sharding import batch_sharding
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.leaves import base_leaves, count
from rlhf_jax.stages.abstract import Abstract
from rlhf_jax.stages.ahead import bytes_on_device, programs_of
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.footprint import of_stage, roofline
from rlhf_jax.stages.topology_plan import against, facts_of, program_text

SHAPE = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, context=64)
LORA = dict(rank=4)


def contexts(devices, **stages):
    config = experiment(seed=0)
    config.stages.tokenizer = stage("tokenizer", data="texts.jsonl", vocab_size=64)
    config.stages.base = stage(
        "sft", init="scratch", tokenizer="tokenizer/tokenizer.model", model=SHAPE, data="texts.jsonl",
        sequence_length=64, batch_size=8, mesh=dict(fsdp=2),
    )  # fmt: skip
    for name, fields in stages.items():
        fields = {"mesh": dict(fsdp=2), "batch_size": 8, **fields}
        config.stages[name] = stage(fields.pop("kind"), **fields)
    names = [name for name in config.stages if name != "tokenizer"]
    return {name: Context(name, config, Path("nowhere"), "", devices=devices) for name in names}


def planned(name, **stages):
    """(what is kept, {program: Program}, mesh) of a stage on four CPU devices."""
    devices = jax.devices()[:4]
    found = contexts(devices, **stages)
    mesh = found[name].mesh()
    programs = programs_of(found[name], Abstract(found, mesh), mesh)
    return programs.kept, {program.name: program for program in programs.programs}, mesh


def every_byte(arguments):
    """What a call's arguments take on a device, one that is given twice counted twice."""
    return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(arguments))


REWARD = dict(kind="reward", init="base", schema="preference", data="pairs.jsonl", sequence_length=64, lora=LORA)
PPO = dict(
    kind="ppo", init="base", reward="reward", data="prompts.jsonl", max_new_tokens=16, minibatches=2, lora=LORA,
    iterations=2,
)  # fmt: skip


def test_a_full_step_keeps_weights_and_two_moments_and_takes_a_batch():
    kept, programs, mesh = planned("base")
    shape = programs["step"].arguments[0].params["base"]["embedding"].shape
    assert shape == (64, 32)
    weights = bytes_on_device(kept["weights"])
    norms = 4 * 32 * (2 * 2 + 1)  # whole on every device, where 32 does not divide they would be too
    decoder = TransformerConfig(vocab_size=64, **SHAPE)
    numbers = count(base_leaves(decoder))
    assert 4 * numbers / 2 <= weights <= 4 * numbers / 2 + norms
    assert 2 * weights <= bytes_on_device(kept["optimizer"]) <= 2 * weights + 64
    memory = memory_of(programs["step"].lower().compile())
    assert memory.arguments == bytes_on_device(programs["step"].arguments)
    assert programs["step"].flops == programs["step"].useful == 3 * 8 * 64 * decoder.forward_flops(64)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}


def test_roles_of_a_policy_stage_share_one_base():
    kept, programs, _ = planned("ppo", reward=REWARD, ppo=PPO)
    bases = {id(kept[name]["base"]) for name in ("policy", "value", "reference")}
    bases |= {id(model["base"]) for model in kept["reward model"]}
    assert len(bases) == 1
    own = sum(bytes_on_device(kept[name]["adapters"]) for name in ("policy", "value", "reference"))
    own += bytes_on_device([kept["value"]["head"], kept["reward model"][0]["head"]])
    own += bytes_on_device(kept["reward model"][0]["adapters"]) + bytes_on_device(kept["optimizer"])
    assert bytes_on_device(kept) == bytes_on_device(kept["policy"]["base"]) + own
    assert set(programs) == {"rollout", "scores", "rewards", "update"}
    for program in programs.values():
        memory = memory_of(program.lower().compile())
        assert memory.arguments <= every_byte(program.arguments) and memory.temporary > 0


def test_a_policy_trained_in_full_has_four_bases():
    full = dict(rank=0)
    kept, programs, _ = planned("ppo", reward={**REWARD, "lora": full}, ppo={**PPO, "lora": full})
    bases = {id(kept[name]["base"]) for name in ("policy", "value", "reference")}
    assert len(bases | {id(kept["reward model"][0]["base"])}) == 4
    assert {"log-probabilities", "values (value)", "rewards"} < set(programs)


@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="sft", data="texts.jsonl"),
        dict(kind="cost", data="safety.jsonl"),
        dict(kind="reward", data="pairs.jsonl", schema="preference", members=2),
        dict(kind="preference", data="pairs.jsonl"),
        dict(kind="sft", data="texts.jsonl", privacy=dict(epsilon=8.0, delta=1e-5)),
    ],
    ids=["sft", "cost", "ensemble", "preference", "private sft"],
)
def test_every_kind_of_step_compiles(fields):
    kept, programs, _ = planned("it", it=dict(init="base", sequence_length=64, lora=LORA, **fields))
    memory = memory_of(programs["step"].lower().compile())
    assert bytes_on_device(kept["weights"]) < memory.arguments <= every_byte(programs["step"].arguments)


def test_what_a_program_needs_counts_what_the_stage_keeps_beside_it(tmp_path):
    kept, programs, mesh = planned("ppo", reward=REWARD, ppo=PPO)
    facts = facts_of(programs["rewards"], mesh.size, "cpu", tmp_path)
    one = against(programs["rewards"], facts, kept, V5E, mesh.size)
    assert one.fits and one.memory >= bytes_on_device(kept) + one.temporary
    assert not against(programs["rewards"], facts, kept, Chip(1000.0, 1e12, 1e9), mesh.size).fits


def test_a_program_that_is_not_handed_over_is_read_from_the_compiler_s_file(tmp_path):
    class Kept:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    sharded = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=batch_sharding(make_mesh(fsdp=2)))
    fresh = int.from_bytes(os.urandom(3))  # no compilation cache has this program: from there no file is written
    lowered = jax.jit(lambda x: jnp.sum(x * fresh)).lower(sharded)
    compiled = lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    (exchange,) = collectives(program_text(compiled, tmp_path), 2)
    assert exchange.kind == "all-reduce"
    assert collectives(program_text(Kept(), tmp_path), 2) == [exchange]


def test_what_was_compiled_once_is_read_from_its_note(tmp_path):
    _, programs, mesh = planned("ppo", reward=REWARD, ppo=PPO)
    first = facts_of(programs["rewards"], mesh.size, "cpu", tmp_path)
    assert facts_of(programs["rewards"], mesh.size, "cpu", tmp_path) == first  # its seconds too
    assert len(list(tmp_path.iterdir())) == 1
    facts_of(programs["rewards"], mesh.size, "other chips", tmp_path)
    facts_of(programs["scores"], mesh.size, "cpu", tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("base", {}),
        ("sft", {"sft": dict(kind="sft", init="base", data="texts.jsonl", sequence_length=64, lora=LORA)}),
        ("ppo", {"reward": REWARD, "ppo": PPO}),
        ("ppo", {"reward": {**REWARD, "lora": dict(rank=0)}, "ppo": {**PPO, "lora": dict(rank=0)}}),
    ],
    ids=["all weights", "adapters", "ppo on one base", "ppo in full"],
)
def test_closed_forms_keep_what_the_stages_keep(name, stages):
    kept, programs, mesh = planned(name, **stages)
    found = contexts(jax.devices()[:4], **stages)[name]
    config = copy.deepcopy(found.config)
    if name == "ppo":
        config.prompt_buckets = (SHAPE["context"] - config.max_new_tokens,)
    decoder = TransformerConfig(vocab_size=64, **SHAPE)
    closed = of_stage(config, decoder, dict(mesh.shape), found.lora())
    heads = 8 * 4 * SHAPE["width"]  # of values and rewards with their moments, which closed forms leave out
    assert 0 <= bytes_on_device(kept) - sum(closed.kept.values()) <= heads + 64
    assert {p.name for p in closed.programs} <= {*programs, "scores", "judges"}
    for program in closed.programs:
        if program.name in programs:
            assert program.useful == programs[program.name].useful


def test_a_roofline_by_hand():
    seconds = roofline(flops=8e12, read=819e9, sent=4.5e10, chip=V5E, devices=4)
    assert seconds == {"compute": 8e12 / (4 * 197e12), "memory": 1.0, "network": 0.5}


def test_bytes_on_a_device_count_an_object_once():
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaf = jax.ShapeDtypeStruct((6, 5), "float32", sharding=at)
    assert bytes_on_device({"a": leaf, "b": [leaf]}) == math.prod((3, 5)) * 4
