"""Every program of a training loop is compiled once: no step, evaluation or rollout compiles again."""

import re

import pytest
from tiny import TRAINED

from rlhf_jax.data import load_tokenizer, read_records

TITLE = re.compile(r"^\[\d+/\d+\] (\w+) \(\w+\)", re.MULTILINE)


@pytest.fixture(scope="module")
def compiled(finished):
    """{stage: names of the jitted functions it compiled, in order} of the uncut job."""
    parts = TITLE.split(finished[1].stdout)
    logs = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {stage: re.findall(r"Compiling jit\((\w+)\) with", log) for stage, log in logs.items()}


def prompt_widths(workdir, *parts):
    """How many different widths the longest prompts of these (file, records) have: a width is a shape of a program."""
    tokenizer = load_tokenizer(workdir / "prepare" / "tokenizer.model")
    widths = set()
    for name, count in parts:
        records, _ = read_records(workdir / "prepare" / name, "prompt")
        widths.add(max(len(tokenizer.encode(record["prompt"])) for record in records[:count]))
    return len(widths)


@pytest.mark.parametrize("stage", [stage for stage in TRAINED if stage != "ppo"])
def test_a_stage_compiles_its_step_and_its_evaluation_once(compiled, stage):
    assert compiled[stage].count("step") == 1
    assert compiled[stage].count("totals") == 1
    assert compiled[stage].count("create") == 1


def test_ppo_compiles_its_update_once(compiled):
    for program in ("update", "make_experience", "score_values", "create"):
        assert compiled["ppo"].count(program) == 1, program


def test_ppo_compiles_rollout_and_scoring_once_a_width_of_prompts(compiled, finished):
    widths = prompt_widths(finished[0], ("prompts.jsonl", None), ("heldout.jsonl", 8))
    for program in ("generate", "score_logprobs", "score_rewards"):
        assert compiled["ppo"].count(program) == widths, program


def test_a_stage_of_a_shape_seen_before_compiles_no_sampler(compiled):
    assert compiled["sft"].count("generate") == 1
    assert compiled["sft_control"].count("generate") == 0
