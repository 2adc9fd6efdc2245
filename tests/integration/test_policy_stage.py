"""A ppo stage with many of its options on, by the real command: it learns from two sources, and resumes to the bit."""

import signal

import numpy as np
import pytest
from tiny import Command, copy_stages, metrics, model_info, reached, result, run_main, write_config

READY = ("prepare", "pretrain", "sft", "reward")
REWARDS = """
def brevity(prompts, completions):
    return [-len(text) / 40 for text in completions]


def breaks(prompts, completions, calls=[]):
    calls.append(1)
    return [float("nan") if len(calls) == 3 and i == 1 else 0.5 * i for i, _ in enumerate(completions)]
"""
OPTIONS = """
config.stages.ppo.update(
    estimator="rloo", samples=2, batch_size=16, rollout_parts=2, reward_normalization="running", reward_clip=2.0,
    missing_end="add", kl_controller="adaptive", kl_target=0.5, kl_horizon=200, entropy_coef=0.01,
    reward="reward,{rewards}:brevity", reward_weights=(1.0, 0.5))
config.stages.ppo.ptx.update(coef=0.5, data="prepare/pretrain.jsonl", sequence_length=64)
config.stages.ppo.optimizer.update(tf_epsilon=True)
config.stages.ppo.checkpoint.every = 1
"""
BREAKING = """
config.stages.ppo.update(reward="{rewards}:breaks", estimator="reinforce++", missing_end="add")
config.stages.ppo.evaluation.data = ""
"""


def job(source, folder, extra):
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)
    options = dict(stages=(*READY, "ppo"))
    return write_config(folder / "job.py", source, extra=extra.strip().format(rewards=rewards), **options)


@pytest.fixture(scope="module")
def uncut(finished, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    config = job(source, folder, OPTIONS)
    workdir = copy_stages(finished[0], folder / "work", READY)
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return config, workdir, done


def test_both_sources_count_and_the_controllers_move(uncut):
    _, workdir, done = uncut
    rows = [row for row in metrics(workdir, "ppo") if "objective/kl" in row]
    assert len(rows) == 4
    for row in rows:
        expected = row["rewards/reward"] + 0.5 * row["rewards/brevity"]
        np.testing.assert_allclose(row["objective/raw_scores"], expected, rtol=1e-4, atol=1e-5)
        assert row["loss/ptx"] > 1 and row["loss/entropy"] > 0 and "val/error" not in row
    assert rows[0]["objective/kl"] == 0 and rows[0]["objective/kl_coef"] == np.float32(0.05)
    step = 1 - 0.2 * 16 / 200  # the first KL is 0, as far below its target as the clip allows
    np.testing.assert_allclose(rows[1]["objective/kl_coef"], 0.05 * step, rtol=1e-6)
    figures = result(workdir, "ppo")["figures"]
    assert figures["kl_gradient"] == "reverse KL" and figures["kl_target"] == 0.5
    assert set(figures["frozen"]) == {"reference", "reward model reward"}
    assert "KL in the reward by k1: reverse KL" in done.stdout


def test_a_killed_run_ends_as_an_uncut_one(uncut, finished, tmp_path):
    """KL coefficient, reward statistics, order of prompts and mixed rows all go on where they were."""
    config, whole, _ = uncut
    workdir = copy_stages(finished[0], tmp_path / "work", READY)
    Command(config, workdir).signal_when(reached(workdir, "ppo", 4), signal.SIGKILL)
    assert not (workdir / "ppo" / "result.json").exists()
    assert run_main(config, workdir).status == 0
    assert model_info(workdir, "ppo")["fingerprints"] == model_info(whole, "ppo")["fingerprints"]
    assert metrics(workdir, "ppo") == metrics(whole, "ppo")


def test_rows_that_are_refilled_give_the_same_training(uncut, finished, tmp_path):
    """Two at a time of each part's eight: the same answers, and fewer dead steps."""
    config, whole, _ = uncut
    workdir = copy_stages(finished[0], tmp_path / "work", READY)
    done = run_main(config, workdir, "--config.stages.ppo.decode_rows=2", "--config.stages.ppo.iterations=4")
    assert done.status == 0, done.stderr[-3000:]
    here, there = ([row for row in metrics(w, "ppo") if "objective/kl" in row] for w in (workdir, whole))
    assert [row["response_length"] for row in here] == [row["response_length"] for row in there]
    for mine, other in zip(here, there, strict=True):
        dead = mine.pop("rollout/dead_steps"), other.pop("rollout/dead_steps")
        assert 0 <= dead[0] <= dead[1] < 1
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_a_function_that_breaks_names_the_answer_and_loses_nothing(finished, source, tmp_path):
    config = job(source, tmp_path, BREAKING)
    workdir = copy_stages(finished[0], tmp_path / "work", READY)
    done = run_main(config, workdir)
    lines = done.stderr.splitlines()
    assert done.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-2000:]
    assert "breaks" in lines[0] and "nan for answer 2" in lines[0] and "2 iterations are saved" in lines[0]
    assert (workdir / "ppo" / "checkpoints" / "latest" / "2").is_dir()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("estimator=grpo",), "samples is 1"),
        (("early_stop.metric=objective/lk",), 'did you mean "objective/kl"?'),
        (("kl_in=loss",), "expected gradient is 0"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_one_line(config_file, tmp_path, flags, words):
    done = run_main(config_file, tmp_path / "work", *(f"--config.stages.ppo.{flag}" for flag in flags))
    lines = done.stderr.splitlines()
    assert done.status == 2 and len(lines) == 1 and words in lines[0], done.stderr[-2000:]
    assert not (tmp_path / "work").exists()
