"""`configs/stories.py` on the real pretrained model it was written for."""

import os
from pathlib import Path

import pytest
from tiny import ROOT, result, run_main

FOLDER = Path(os.environ.get("RLHF_JAX_DATA", ROOT.parent / "shared" / "data")) / "stories260k"
needs_model = pytest.mark.skipif(not FOLDER.is_dir(), reason="RLHF_JAX_DATA names no folder with stories260k")
SHORT = (
    "--config.stages.sft.epochs=0.1",
    "--config.stages.reward.epochs=0.2",
    "--config.stages.reward.evaluation.records=16",
    "--config.stages.reward.calibration_prompts=16",
    "--config.stages.ppo.iterations=2",
    "--config.stages.ppo.evaluation.records=32",
    "--config.logging.tensorboard=False",
)


@needs_model
def test_it_runs_end_to_end_on_one_shared_base(tmp_path):
    config = f"{ROOT / 'configs' / 'stories.py'}:{FOLDER}"
    done = run_main(config, tmp_path / "work", *SHORT)
    assert done.status == 0, done
    ppo = result(tmp_path / "work", "ppo")["figures"]
    assert ppo["scored_in_one_pass"]
    assert [ppo["memory"][role]["base_of"] for role in ("policy", "reference", "value", "reward")] == ["policy"] * 4
    texts = [sample["completion"] for sample in result(tmp_path / "work", "ppo")["samples"]]
    assert all(text.find(".") in (-1, len(text) - 1) for text in texts) and any("." in text for text in texts)
    assert (tmp_path / "work" / "export" / "checkpoint" / "model.safetensors").exists()


@needs_model
@pytest.mark.slow
def test_it_learns_to_write_happy_endings(tmp_path):
    done = run_main(f"{ROOT / 'configs' / 'stories.py'}:{FOLDER}", tmp_path / "work")
    assert done.status == 0, done
    ppo = result(tmp_path / "work", "ppo")["figures"]
    assert ppo["score_gain_low"] > 1.0 and ppo["kl_below_limit"]
