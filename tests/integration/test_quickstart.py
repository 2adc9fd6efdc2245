"""The published quickstart at full size, three seeds: the shapes that must show in summary.json (about 8 minutes each).

python -m pytest -m slow tests/integration/test_quickstart.py
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=[0, 1, 2])
def summary(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(f"seed{request.param}")
    command = [sys.executable, "-m", "rlhf_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    subprocess.run([*command, f"--config.seed={request.param}"], check=True)
    return json.loads((workdir / "summary.json").read_text())["stages"]


def test_fine_tuning_improves_on_held_out_data(summary):
    for stage in ("pretrain", "sft", "sft_control"):
        assert summary[stage]["loss/eval"] < summary[stage]["loss/eval_start"]


def test_the_reward_model_beats_its_start_chance_and_the_baseline(summary):
    reward = summary["reward"]
    assert reward["loss/eval"] < reward["loss/eval_start"]
    assert reward["accuracy_low"] > 0.5
    assert reward["accuracy"] > reward["accuracy_length_and_end_baseline"]
    assert abs(reward["calibration"]["mean"]) < 1e-3 and abs(reward["calibration"]["std"] - 1) < 1e-3


def test_ppo_raises_the_held_out_reward_below_its_kl_limit(summary):
    assert summary["ppo"]["score_gain_low"] > 0
    assert summary["ppo"]["kl_below_limit"]


def test_secrets_planted_16_times_are_memorized_and_held_out_ones_are_not(summary):
    rows = summary["memorization"]["table"]
    (row,) = [r for r in rows if (r["subject"], r["group"], r["duplicates"]) == ("sft", "all", 16)]
    assert row["difference_low"] > 0.3
    kept = [r for r in summary["memorization"]["persistence"] if (r["group"], r["duplicates"]) == ("all", 16)]
    assert kept and all(0 <= r["low"] <= r["rate"] <= r["high"] <= 1 for r in kept)
