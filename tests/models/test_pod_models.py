"""The shapes in `configs/pod` are those of the published models, and every job on them is a valid experiment."""

import runpy
from pathlib import Path

import pytest

from rlhf_jax.models.pretrained import read_config
from rlhf_jax.validation import validate

CONFIGS = Path(__file__).parents[2] / "configs"
PARAMETERS = {  # as the model cards' safetensors count them
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen-2.5-7b": 7_615_616_512,
}
POD = runpy.run_path(str(CONFIGS / "pod.py"))


@pytest.mark.parametrize("model", PARAMETERS)
def test_a_published_model_has_its_parameters(model):
    assert read_config(CONFIGS / "pod" / model).parameters == PARAMETERS[model]


@pytest.mark.parametrize("job", POD["JOBS"])
def test_every_job_is_a_valid_experiment(job):
    config = POD["get_config"](f"llama-3.1-8b,{job},16")
    assert validate(config)[-1] in (job, "ppo")
    assert all(fields.mesh.fsdp == 16 for fields in config.stages.values())
