"""Closed forms over chips and sizes: what must hold of them, and how they are checked against compiled plans."""

import json

import pytest

from rlhf_jax.bench.plans import pod_configs
from rlhf_jax.bench.scaling import CHIPS, SHAPES, checks, draw, predict, sizes_of
from rlhf_jax.distributed.chips import V5P


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
