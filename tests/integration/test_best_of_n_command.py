"""Best-of-n by the real command: a reward function in a file, the best answers trained on, and what it refuses."""

import json
import runpy

import pytest
from tiny import copy_stages, result, run_main, write_config

from rlhf_jax import pipeline
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import best_of_n_kl

REWARD = """
def brevity(prompts, completions, records):
    assert len(prompts) == len(completions) == len(records) == 16
    assert all(record["prompt"] == prompt for record, prompt in zip(records, prompts))
    return [-len(text) for text in completions]

def spaces(prompts, completions):
    return [text.count(" ") for text in completions]
"""
BON = """
config.stages.bon = stage(
    "best_of_n", subject="pretrain", reward="rewards.py:brevity, rewards.py:spaces", reward_weights=(1.0, 0.5),
    data="prepare/prompts.jsonl", samples=4, batch_size=16, max_new_tokens=8, missing_end="add",
    missing_end_penalty=-0.25)
"""
DISTILLED = """
config.stages.distilled = stage(
    "sft", init="pretrain", data="bon/best.jsonl", sequence_length=112, batch_size=4)
"""
BAD = """
def nan(prompts, completions):
    return [float("nan")] * len(prompts)

def words(prompts, completions):
    return ["good"] * len(prompts)

def few(prompts, completions):
    return [1.0] * (len(prompts) - 1)
"""


@pytest.fixture(scope="module")
def job(source, tmp_path_factory):
    """(folder, work directory, command) of a job that trains on the best of four answers by two functions."""
    folder = tmp_path_factory.mktemp("best_of_n")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "bad.py").write_text(BAD)
    write_config(folder / "short.py", source, extra=BON, stages=("prepare", "pretrain"))
    config = write_config(folder / "job.py", source, extra=BON + DISTILLED, stages=("prepare", "pretrain"))
    done = run_main(config, folder / "work")
    assert done.status == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, folder / "work"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_answers_are_found_and_trained_on(job):
    workdir = job[1]
    prompts = read(workdir / "prepare" / "prompts.jsonl")
    answers = sorted(read(workdir / "bon" / "answers.jsonl"), key=lambda row: row["prompt"])
    assert [row["prompt"] for row in answers] == list(range(len(prompts)))
    best, pairs = ({row["id"]: row for row in read(workdir / "bon" / name)} for name in ("best.jsonl", "pairs.jsonl"))
    scores = []
    for prompt, row in zip(prompts, answers, strict=True):
        ends = zip(row["completions"], row["ended"], strict=True)
        by_hand = [-len(text) + 0.5 * text.count(" ") - 0.25 * (not ended) for text, ended in ends]
        assert row["scores"] == by_hand  # halves and quarters are exact
        scores.append(by_hand)
        if prompt["id"] in best:
            found = best[prompt["id"]]
            assert found["prompt"] == prompt["prompt"] and found["score"] == max(by_hand)
            assert found["completion"] in row["completions"]
        if prompt["id"] in pairs:
            pair = pairs[prompt["id"]]
            assert (pair["chosen_score"], pair["rejected_score"]) == (max(by_hand), min(by_hand))
            assert pair["chosen"] == best[prompt["id"]]["completion"]
    figures = result(workdir, "bon")["figures"]
    assert figures["best_written"] == len(best) > 0 and figures["pairs_written"] == len(pairs) > 0
    assert [point["n"] for point in figures["curve"]] == [1, 2, 4]
    assert [point["kl_bound"] for point in figures["curve"]] == [best_of_n_kl(n) for n in (1, 2, 4)]
    assert figures["score"] == pytest.approx(sum(map(sum, scores)) / (4 * len(scores)))
    assert figures["best_score"] == pytest.approx(sum(map(max, scores)) / len(scores))
    assert figures["score"] < figures["curve"][1]["score"] < figures["best_score"]
    assert result(workdir, "distilled")["figures"]["records"] == len(best)
    assert "score of the best of n" in (workdir / "report.html").read_text()


def test_a_cut_run_goes_on_behind_the_last_whole_batch(job):
    """Nine rows and a half are left of six batches of four: two whole batches stay, the rest comes out as before."""
    folder, workdir = job
    again = copy_stages(workdir, folder / "again", ("prepare", "pretrain", "bon"))
    answers = again / "bon" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:9]) + lines[9][:20])
    for name in ("result.json", "best.jsonl"):
        (again / "bon" / name).unlink()
    done = run_main(folder / "short.py", again)
    assert done.status == 0, done.stderr[-2000:]
    assert "2/6" in done.stdout and "0/6" not in done.stdout
    for name in ("answers.jsonl", "best.jsonl", "pairs.jsonl"):
        assert (again / "bon" / name).read_text() == (workdir / "bon" / name).read_text()
    assert result(again, "bon")["figures"] == result(workdir, "bon")["figures"]


@pytest.mark.parametrize(
    "reward, told",
    [
        ("bad.py:nan", "returned nan for answer 1 ("),
        ("bad.py:words", "returned 'good', a str, for answer 1 ("),
        ("bad.py:few", "returned 15 scores for 16 answers"),
        ("none.py:score", "there is no file"),
    ],
)
def test_a_function_that_can_be_mended_is_told_in_one_line(job, reward, told):
    folder, workdir = job
    here = copy_stages(workdir, folder / reward.replace(":", "_"), ("prepare", "pretrain"))
    flags = [f"reward={reward}", "reward_weights=()"]
    done = run_main(folder / "short.py", here, *(f"--config.stages.bon.{flag}" for flag in flags))
    lines = done.stderr.splitlines()
    assert done.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-2000:]
    assert told in lines[0]
    assert not (here / "bon" / "result.json").exists()


def test_one_sample_and_a_changed_function_are_refused_at_once(job, monkeypatch):
    folder, workdir = job
    monkeypatch.chdir(folder)
    config = runpy.run_path("short.py")["get_config"]()
    (folder / "rewards.py").write_text(REWARD + "# changed\n")
    with pytest.raises(UserError, match='stage bon .*reward was "function brevity .* and is now "function brevity'):
        pipeline.run(config, workdir)
    config.stages.bon.samples = 1
    with pytest.raises(UserError, match="bon.samples is 1: best-of-n ranks the answers"):
        pipeline.run(config, workdir)
