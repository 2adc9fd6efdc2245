"""Closed forms over chips and sizes: what must hold of them, and how they are checked against compiled plans."""

import json

import pytest

from rlhf_jax.bench.plans import pod_configs, predict
from rlhf_jax.bench.scaling import CHIPS, SHAPES, checks, draw, sizes_of
from rlhf_jax.distributed.chips import V5P
from rlhf_jax.distributed.sharding import ROLLOUT
from rlhf_jax.stages.footprint import Decoder, cache_bytes
from rlhf_jax.training.artifacts import computed


@pytest.fixture(scope="module")
def configs():
    return pod_configs()


def test_published_sizes():
    numbers = {name: shape.parameters / 1e9 for name, shape in SHAPES.items()}
    assert numbers == pytest.approx({"1B": 1.236, "3B": 3.213, "8B": 8.030, "70B": 70.55, "405B": 405.9}, rel=1e-3)


@pytest.mark.parametrize("job", ["sft", "private_sft", "ppo_lora", "ppo_full", "safe_rlhf"])
def test_more_chips_of_one_copy_need_less_each_and_no_less_time(configs, job):
    shape = SHAPES["8B"]
    found = [predict(configs, job, shape, sizes_of(shape, job, chips)) for chips in CHIPS]
    memory = [one.memory for one in found]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[-1]
    times = [sum(p.seconds(V5P, chips) for p in one.programs) for chips, one in zip(CHIPS, found, strict=True)]
    assert times == sorted(times)  # as many rows a chip, and more to gather
    assert times[-1] < 2 * times[0]


def test_a_mesh_fills_its_chips():
    for chips in CHIPS:
        for shape in SHAPES.values():
            sizes = sizes_of(shape, "ppo_full", chips)
            assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == chips and sizes["fsdp"] * sizes["tensor"] <= 512


def test_a_plan_is_checked_by_its_compiled_memory(configs, tmp_path):
    mesh = {"data": 1, "fsdp": 16, "tensor": 1}
    predicted = predict(configs, "sft", SHAPES["8B"], mesh).memory
    plan = dict(model="llama-3.1-8b", job="sft", topology="v5p:2x2x4", mesh=mesh, memory=predicted / 1.1)
    (tmp_path / "llama-3.1-8b,sft,v5p-2x2x4.plan.json").write_text(json.dumps(plan))
    (check,) = checks(configs, tmp_path)
    assert check["off"] == pytest.approx(0.1)
    draw(configs, [check], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_tied_output_kernel_is_there_once_more_and_read_once(configs):
    stage, sizes = configs.get_config("a model,ppo_full,8,1").stages.ppo, {"data": 1, "fsdp": 8, "tensor": 1}
    shape = computed(SHAPES["1B"], stage.compute)
    on, rollout = Decoder(shape, sizes), predict(configs, "ppo_full", SHAPES["1B"], sizes).programs[0]
    weights = on.base(shape.dtype, ROLLOUT)
    assert on.prepared() - weights == 128256 * 2048 * 2  # bfloat16
    cache = cache_bytes(shape, stage.batch_size // 8, max(stage.prompt_buckets) + stage.max_new_tokens, 1)
    assert rollout.read == stage.max_new_tokens * (weights + cache)
