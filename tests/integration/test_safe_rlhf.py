"""Safe RLHF by the real command on the known world made small: from the first policy to the judges; a cut run."""

import json
import runpy
import signal

import numpy as np
import pytest
from tiny import ROOT, Command, copy_stages, metrics, model_info, reached, result, run_main

from rlhf_jax.errors import UserError
from rlhf_jax.pipeline import run

CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]("small")
    stages = config.stages
    for name in [name for name in stages if name.startswith(("mixed", "unconstrained", "shaped"))]:
        del stages[name]
    stages.task.update(held_out=64, answers=1)
    stages.sft.update(batch_size=8, epochs=0.2)
    for name in ("pairs", "heldout_pairs"):
        stages[name].update(data="task/heldout.jsonl", batch_size=64)
    for name in ("reward", "cost"):
        stages[name].update(batch_size=16, epochs=1.0)
    stages.reward.update(calibration_prompts=16, rollout_batch_size=16)
    for name in ("lagrangian_1", "pid_1"):
        stages[name].update(iterations=4, batch_size=16)
        stages[name].checkpoint.every = 1
        stages[name].evaluation.update(every=4, records=16)
        stages[name].constraint.update(window=24, delay=1, lambda_init=1.0)
        stages[name].optimizer.learning_rate = 1e-4
    stages.pid_1.update(critic="shared", epochs=2)
    stages.pid_1.constraint.update(lambda_max=1.0, threshold=-50.0)
    subjects = ("sft", "lagrangian_1", "pid_1")
    stages.safety.update(subjects=subjects, conditions=(), frontier=(), batch_size=64)
    config.logging.update(every=1, tensorboard=False)
    return config
"""
MODELS = ("task", "tokenizer", "sft", "pairs", "heldout_pairs", "reward", "cost")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "job.py"
    path.write_text(CONFIG.format(path=str(ROOT / "configs" / "safe_rlhf.py")))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("safe") / "work"
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return workdir, done


def test_the_cost_model_says_what_its_threshold_means(whole):
    workdir, done = whole
    cost = result(workdir, "cost")["figures"]
    assert 0 <= cost["sign_accuracy"] <= 1 and cost["sign_labels"] > 0
    figures = result(workdir, "lagrangian_1")["figures"]
    share = (0 - cost["cost_safe"]) / (cost["cost_unsafe"] - cost["cost_safe"])
    assert figures["threshold_unsafe_share"] == pytest.approx(share)
    assert f"mean cost at most 0: it binds where {share:.0%} of answers are unsafe" in done.stdout


def test_lambda_is_what_the_window_says(whole):
    workdir, _ = whole
    rows = [row for row in metrics(workdir, "lagrangian_1") if "safety/lambda" in row]
    assert len(rows) == 4
    costs, log_lambda = [], 0.0
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row["safety/lambda"], np.exp(log_lambda), rtol=1e-5)
        costs = [*costs, row["safety/cost"]]
        # a window of 24 answers is the newest 16 and half of those before: only the first two means are known from rows
        if number == 0:
            np.testing.assert_allclose(row["safety/window_cost"], costs[0], rtol=1e-4, atol=1e-6)
        if number >= 1:  # delay
            log_lambda += 0.1 * np.exp(log_lambda) * row["safety/window_cost"]
    figures = result(workdir, "lagrangian_1")["figures"]
    np.testing.assert_allclose(figures["lambda"], np.exp(log_lambda), rtol=1e-5)
    assert figures["lowest_cost"] == pytest.approx(min(costs), rel=1e-5)
    assert set(figures["frozen"]) == {"reference", "reward model reward", "cost model cost"}
    assert {"sft_cost", "ppo_cost", "sft_unsafe", "ppo_unsafe", "threshold_unsafe_share_now"} <= set(figures)


def test_a_bound_that_is_reached_and_a_threshold_that_is_not_are_said(whole):
    workdir, done = whole
    figures = result(workdir, "pid_1")["figures"]
    assert figures["lambda"] == figures["lambda_max_reached"] == figures["violated_share"] == 1.0
    said = " ".join(figures["warnings"])
    assert "lambda is at its bound lambda_max 1" in said
    assert f"-50 was out of reach: the lowest mean cost of an iteration was {figures['lowest_cost']:.4g}" in said
    assert "warning: pid_1: threshold: -50 was out of reach" in done.stdout
    report = (workdir / "report.html").read_text()
    assert "lambda" in report and "lagrangian_1" in report


def test_a_killed_run_goes_on_with_its_lambda_and_window(whole, config, tmp_path):
    uncut, _ = whole
    workdir = copy_stages(uncut, tmp_path / "work", MODELS)
    alone = tmp_path / "alone.py"  # the same stages but for those behind the one that is killed
    alone.write_text(
        config.read_text().replace("    return config", '    del stages["pid_1"], stages["safety"]\n    return config')
    )
    Command(alone, workdir).signal_when(reached(workdir, "lagrangian_1", 4), signal.SIGKILL)
    assert not (workdir / "lagrangian_1" / "result.json").exists()
    assert run_main(alone, workdir).status == 0
    assert model_info(workdir, "lagrangian_1")["fingerprints"] == model_info(uncut, "lagrangian_1")["fingerprints"]
    assert metrics(workdir, "lagrangian_1") == metrics(uncut, "lagrangian_1")


def test_the_safety_stage_judges_all_by_the_known_world(whole):
    workdir, _ = whole
    figures = json.dumps(result(workdir, "safety")["figures"])
    assert all(name in figures for name in ("sft", "lagrangian_1", "pid_1", "risky", "harmless"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lagrangian_1.constraint.cost": "nowhere"}, 'constraint.cost is "nowhere", which is no stage'),
        ({"lagrangian_1.constraint.unsafe_share": 0.2, "lagrangian_1.constraint.threshold": 1.0}, "give one"),
        (
            {"lagrangian_1.constraint.unsafe_share": 0.2, "cost.evaluation.data": ""},
            "give stages.cost.evaluation.data",
        ),
        ({"lagrangian_1.constraint.lambda_init": 30.0}, "is above lambda_max"),
        ({"lagrangian_1.whiten_rewards": True}, "lambda would weigh them by the batch"),
        ({"lagrangian_1.reward": "reward,cost"}, "rewarded for harm"),
        ({"lagrangian_1.privacy.epsilon": 1.0, "lagrangian_1.privacy.delta": 1e-4}, "private"),
    ],
)
def test_a_constraint_that_cannot_work_is_refused_in_one_line(config, tmp_path, changes, words):
    """What a command prints of a `UserError` is seen in test_errors.py."""
    changed = runpy.run_path(str(config))["get_config"]()
    changed.stages.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
        run(changed, tmp_path / "work")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()
