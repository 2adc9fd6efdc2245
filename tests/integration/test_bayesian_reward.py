"""Reward models that know their uncertainty, by the real command on the known world made small."""

import json

import numpy as np
import pytest
from tiny import ROOT, Command, metrics, result, run_main

CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]("small")
    stages = config.stages
    kept = ("task", "tokenizer", "lm_medium", "pairs_noisy", "heldout_noisy", "ensemble_medium_noisy_1")
    kept += ("both_medium_noisy_1", "choice_medium_noisy", "ensemble_variance_medium_noisy_ppo_1", "best_medium_noisy")
    for name in [name for name in stages if name not in kept]:
        del stages[name]
    stages.task.update(answers=1)
    stages.lm_medium.update(epochs=0.1)
    true = {true!r}
    for name in ("pairs_noisy", "heldout_noisy"):
        stages[name].update(reward=true, records=64, batch_size=64)
    stages.ensemble_medium_noisy_1.update(members=2, batch_size=16, calibration_prompts=16, rollout_batch_size=16)
    stages.ensemble_medium_noisy_1.lora.update(rank=2, targets=("v", "down"))
    stages.both_medium_noisy_1.evaluation.update(records=32)
    for name in ("choice_medium_noisy", "best_medium_noisy"):
        stages[name].update(gold=true, records=8, pool=16, batch_size=16)
        stages[name].proxies = dict(both="both_medium_noisy_1", ensemble="ensemble_medium_noisy_1")
    ppo = stages.ensemble_variance_medium_noisy_ppo_1
    ppo.update(reward="both_medium_noisy_1," + true, iterations=3, batch_size=16)
    stages.best_medium_noisy.policies = dict(ppo="ensemble_variance_medium_noisy_ppo_1")
    config.logging.update(every=1, tensorboard=False)
    return config
"""
ENSEMBLE, BOTH, PPO = "ensemble_medium_noisy_1", "both_medium_noisy_1", "ensemble_variance_medium_noisy_ppo_1"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "job.py"
    true = f"{ROOT / 'rlhf_jax' / 'data' / 'safety_task.py'}:gold_reward"
    path.write_text(CONFIG.format(path=str(ROOT / "configs" / "bayesian_reward.py"), true=true))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bayesian") / "work"
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return workdir


def test_every_member_has_a_posterior_at_its_own_most_evidence(whole):
    figures = result(whole, BOTH)["figures"]
    assert len(figures["members"]) == result(whole, ENSEMBLE)["figures"]["members"] == 2
    for member in figures["members"]:
        curve = {row["precision"]: row["evidence"] for row in member["curve"]}
        assert member["log_evidence"] >= max(curve.values()) - 1e-6
        assert min(curve) < member["precision"] < max(curve)
    assert {"map", "temperature", "laplace"} <= set(figures["evaluation"])
    assert figures["evaluation"]["variance_difference"] > 0


def test_k_that_gold_prefers_is_what_the_policy_is_trained_with(whole):
    chosen = json.loads((whole / "choice_medium_noisy" / "chosen.json").read_text())
    assert set(chosen[BOTH]) == {"std", "variance", "worst"}
    k = chosen[BOTH]["variance"]
    rows = [row for row in metrics(whole, PPO) if "objective/kl" in row]
    assert len(rows) == 3
    for row in rows:
        assert row[f"variance/{BOTH}"] > 0 and row[f"lowest/{BOTH}"] <= row[f"rewards/{BOTH}"] <= row[f"highest/{BOTH}"]
        taken_off = row[f"rewards/{BOTH}"] - row["objective/raw_scores"]
        np.testing.assert_allclose(taken_off, k * row[f"variance/{BOTH}"], rtol=1e-3, atol=1e-4)
    frozen = result(whole, PPO)["figures"]["frozen"]
    assert f"reward posterior {BOTH}" in frozen


def test_the_laboratory_shows_every_method_and_the_policy_on_one_scale(whole):
    figures = result(whole, "best_medium_noisy")["figures"]
    methods = {(row["proxy"], row["adjustment"]) for row in figures["conditions"]}
    kinds = {"none", "std", "variance", "worst"}
    assert methods == {(proxy, kind) for proxy in ("both", "ensemble") for kind in kinds} | {("gold", "oracle")}
    ends = {(row["proxy"], row["adjustment"]): row["end"] for row in figures["conditions"]}
    assert all(ends["gold", "oracle"] >= end - 1e-9 for end in ends.values())
    assert ends["both", "none"] == pytest.approx(ends["ensemble", "none"], abs=1e-4)  # one mean, two variances
    (policy,) = figures["policies"]
    assert policy["policy"] == "ppo" and len(policy["points"]) == 3
    page = (whole / "report.html").read_text()
    assert "both_medium_noisy_1" in page and "best_medium_noisy" in page


@pytest.mark.slow
@pytest.mark.timeout(3600)  # six minutes on 2 cores
def test_the_small_world_shows_what_uncertainty_does_against_over_optimization(tmp_path):
    config = tmp_path / "small.py"
    path = str(ROOT / "configs" / "bayesian_reward.py")
    config.write_text(f"import runpy\ndef get_config():\n    return runpy.run_path({path!r})['get_config']('small')\n")
    # With the compiler as users have it: it computes for minutes.
    done = Command(config, tmp_path / "work", environment={"XLA_FLAGS": ""}).wait(timeout=3600)
    assert done.status == 0, done.stderr[-3000:]
    rows = result(tmp_path / "work", "best_medium_noisy")["figures"]["conditions"]
    found = {(row["proxy"], row["adjustment"]): row for row in rows}
    # Whether MAP peaks before 128 is noise here (16 prompts, one seed); the full config shows its fall.
    assert found["MAP", "none"]["end"] < found["Laplace", "std"]["end"] < found["gold", "oracle"]["end"]
    assert found["Laplace", "std"]["gain_low"] > 0 and found["Laplace", "variance"]["gain_low"] > 0
    assert found["ensemble", "worst"]["first_gain_low"] > 0
