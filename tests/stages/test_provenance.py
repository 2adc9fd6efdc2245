"""What private stages may be fed with, and what their runs add up to."""

import copy
import json
import math
import shutil

import pytest

from rlhf_jax.config import experiment
from rlhf_jax.config import stage as configured
from rlhf_jax.data.units import group_units
from rlhf_jax.errors import UserError
from rlhf_jax.pipeline import checked_order
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.ledger import Ledger
from rlhf_jax.stages.private import Private, Shape

CLAIM = {"epsilon": 50.0, "delta": 0.01, "noise_multiplier": 2.0, "physical_batch": 20}


def chain(**ppo):
    config = experiment()
    config.stages.sft = configured("sft", init="scratch", tokenizer="tokenizer.model", data="sft.jsonl")
    config.stages.reward = configured("reward", init="sft", data="pairs.jsonl")
    config.stages.ppo = configured("ppo", init="sft", reward="reward", data="prompts.jsonl", whiten_advantages=False)
    config.stages.ppo.update(**ppo)
    config.stages.ppo.privacy.update(CLAIM)
    config.privacy.public = ("sft.jsonl", "pairs.jsonl", "tokenizer.model")
    return config


def test_answers_written_by_a_raw_model_are_no_private_stage_s_data():
    """Each answer tells of all records that its writer was trained on: no unit of this stage hides them."""
    config = chain()
    config.privacy.public = ("prompts.jsonl", "pairs.jsonl", "tokenizer.model")  # and not sft.jsonl
    del config.stages.ppo
    config.stages.best = configured("best_of_n", subject="sft", reward="reward", data="prompts.jsonl")
    config.stages.student = configured("sft", init="scratch", tokenizer="tokenizer.model", data="best/best.jsonl")
    config.stages.student.update(packing=False, schema="completion")
    config.stages.student.privacy.update(CLAIM)
    with pytest.raises(UserError, match="stages.student.data"):
        checked_order(config)


def test_a_public_file_of_a_stage_may_feed_a_private_one():
    """The other files that the stage writes stay private."""
    config = experiment()
    config.stages.prepare = configured("prepare")
    config.stages.base = configured("sft", init="scratch", tokenizer="prepare/tokenizer.model", data="texts.jsonl")
    config.stages.sft = configured("sft", init="base", data="prepare/sft.jsonl", packing=False)
    config.stages.sft.privacy.update(CLAIM)
    config.privacy.public = ("texts.jsonl", "prepare/tokenizer.model")
    checked_order(config)
    config.privacy.public = ("texts.jsonl", "prepare/pretrain.jsonl", "prepare/sft.jsonl")
    with pytest.raises(UserError, match=r'privacy.public names "prepare/pretrain.jsonl", which no stage reads'):
        checked_order(config)
    config.privacy.public = ("texts.jsonl",)
    with pytest.raises(UserError, match='stages.sft.init is "base", trained from private data'):
        checked_order(config)


def test_a_private_stage_that_cannot_mix_in_public_text_says_so():
    config = chain()
    config.stages.ppo.ptx.update(coef=0.1, data="texts.jsonl")
    config.privacy.public = (*config.privacy.public, "texts.jsonl")
    with pytest.raises(UserError, match="stages.ppo.ptx"):
        checked_order(config)


def test_without_noise_no_delta_is_needed(tmp_path):
    config = chain()
    config.stages.ppo.privacy.update(epsilon=math.inf, delta=0.0, noise_multiplier=0.0)
    checked_order(config)
    context = Context("ppo", config, tmp_path, "identity")
    context.folder.mkdir()
    Private(context, group_units([str(i) for i in range(20)], 1), "digest", Shape(3, 5, 1))


def ledger_with(folder, name, data, later=""):
    """The ledger that a stage of this name leaves before its first draw; the stages before it are gone.

    `later`: a stage after it that reads the same data.
    """
    config = chain()
    ppo = config.stages.ppo
    del config.stages.ppo
    config.stages[name] = ppo
    config.stages[name].data = str(data)
    if later:
        config.stages[later] = copy.deepcopy(config.stages[name])
        config.privacy.overlap = "compose"
    contexts = {stage: Context(stage, config, folder, "identity") for stage in config.stages}
    contexts[name].folder.mkdir()
    contexts[name].on_claim = Ledger(folder, config, contexts).write
    Private(contexts[name], group_units([str(i) for i in range(20)], 1), "digest", Shape(6, 5, 1))
    return json.loads((folder / "privacy.json").read_text())


def test_a_deleted_stage_s_run_composes_with_another_stage_on_its_data(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Thing {i}?"}) + "\n" for i in range(20)))
    once = ledger_with(tmp_path, "ppo", data)
    shutil.rmtree(tmp_path / "ppo")
    ledger = ledger_with(tmp_path, "again", data)
    assert len(ledger["runs"]) == 2
    assert ledger["claim"]["epsilon"] > 1.2 * once["claim"]["epsilon"]


def test_a_stage_that_has_not_begun_has_spent_nothing(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Thing {i}?"}) + "\n" for i in range(20)))
    alone = ledger_with(tmp_path, "ppo", data)
    shutil.rmtree(tmp_path / "ppo")
    (tmp_path / "privacy.json").unlink()
    sweep = ledger_with(tmp_path, "ppo", data, later="later")
    assert sweep["claim"] == alone["claim"] and sweep["overlaps"] == []
