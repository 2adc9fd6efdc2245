"""Completions that fine-tuning shows: of the newest tokens of a prompt that is longer than the context has room for."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest
from test_memorization_stage import CONFIG, TOKENIZER

from rlhf_jax.config import stage
from rlhf_jax.distributed import make_mesh
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages.sft import SAMPLE_TOKENS, _sampler
from rlhf_jax.training.artifacts import Role


@pytest.mark.parametrize("room", [SAMPLE_TOKENS // 2, SAMPLE_TOKENS + 8])
def test_a_short_context_is_shared_by_prompt_and_completion(tmp_path, room):
    spec = RoleSpec(dataclasses.replace(CONFIG, context=room))
    prompt = "a prompt of more words than there is room for " * 8
    records = [{"prompt": prompt, "completion": "the end"}]
    config = stage("sft", init="scratch", data="d", evaluation=dict(data="d", samples=1))
    context = SimpleNamespace(
        config=config, folder=tmp_path, records=lambda *_: (records, 0), key=lambda _: jax.random.key(0)
    )
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = {"base": init_base(spec.config, key=jax.random.key(0))}
        _sampler(context, Role(spec, weights, TOKENIZER), mesh)(weights, 0)
    (row,) = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert row["prompt"] and prompt.endswith(row["prompt"]) and row["completion"]
    assert len(TOKENIZER.encode(row["prompt"])) <= room - min(SAMPLE_TOKENS, room // 2)
