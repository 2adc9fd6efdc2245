"""`configs/sentiment.py` shrunk to one layer and two iterations, on reviews of a few words; and its plan for GPT-2."""

import dataclasses
import gzip
import json
import os
import random
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ROOT, Command, metrics, result, run_main

from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.models.family_json import from_json
from rlhf_jax.models.pretrained import save_pretrained
from rlhf_jax.models.roles import init_base
from rlhf_jax.pipeline import plan

CONFIG = ROOT / "configs" / "sentiment.py"
DATA = Path(os.environ.get("RLHF_JAX_DATA", ROOT.parent / "shared" / "data")) / "imdb"
FIXTURES = ROOT / "tests"
RUNS = ("ppo_1", "ppo_2")
SMALL = f"""
import runpy

def get_config(folder):
    config = runpy.run_path({str(CONFIG)!r})["get_config"](folder)
    config.logging.update(every=1, tensorboard=False)
    stages = config.stages
    stages.tokenizer.vocab_size = 320
    stages.base.model.update(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, ffn=64)
    stages.base.update(epochs=0.2)
    stages.base.evaluation.update(records=4, samples=0)
    stages.classifier.update(epochs=4.0)
    stages.classifier.evaluation.records = 32
    del stages["ppo_3"]
    for name in {RUNS!r}:
        stages[name].update(iterations=2, batch_size=8)
        stages[name].evaluation.update(records=8, every=2)
    return config
"""


def review(draw, positive):
    """Some forty words, one in three of them telling."""
    telling = ("great", "superb", "lovely") if positive else ("awful", "dull", "bad")
    plain = ("film", "the", "plot", "was", "and", "cast", "scene", "it")
    return " ".join(draw.choice(telling if draw.random() < 1 / 3 else plain) for _ in range(40)) + "."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reviews sorted by label, as the data set has them."""
    folder = tmp_path_factory.mktemp("imdb")
    for part, count in (("train", 128), ("test", 64)):
        draw = random.Random(part)
        rows = [{"id": f"{part} {i}", "label": int(i < count // 2)} for i in range(count)]
        lines = [json.dumps(row | {"text": review(draw, row["label"])}) + "\n" for row in rows]
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(lines)
    return folder


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("sentiment") / "work"
    config = work.with_name("small.py")
    config.write_text(SMALL)
    done = run_main(f"{config}:{folder}", work)
    assert done.status == 0, done
    return work


def rollouts(work, name):
    """The logged rows of a ppo stage's iterations."""
    return [row for row in metrics(work, name) if "objective/kl" in row]


def test_the_classifier_learns_the_labels_and_is_not_calibrated(work):
    figures = result(work, "classifier")["figures"]
    assert figures["texts"] == 128 and figures["texts_eval"] == 32
    assert figures["loss/eval"] < figures["loss/eval_start"] and figures["accuracy_low"] > 0.5
    assert "calibration" not in figures


def test_the_seeds_start_at_one_base_and_differ_in_every_draw(work):
    first = [rollouts(work, name)[0] for name in RUNS]
    assert all(abs(row["objective/kl"]) < 1e-4 for row in first)
    for name in ("objective/scores", "objective/entropy", "val/error"):
        assert len({row[name] for row in first}) == len(RUNS)
    texts = [sample["completion"] for name in RUNS for sample in result(work, name)["samples"]]
    assert len(set(texts)) > len(texts) // 2


@pytest.mark.parametrize("name", RUNS)
def test_the_kl_coefficient_follows_the_paper(work, name):
    """b <- b (1 + clip(KL / 6 - 1, -0.2, 0.2) n / horizon): the first KL is 0."""
    before, after = rollouts(work, name)
    stage = json.loads((work / "config.json").read_text())["stages"][name]
    assert before["objective/kl_coef"] == pytest.approx(stage["kl_coef"])
    moved = stage["kl_coef"] * (1 - 0.2 * 8 / stage["kl_horizon"])
    assert after["objective/kl_coef"] == pytest.approx(moved, rel=1e-5)


def test_the_report_shows_the_seeds_together(work):
    page = (work / "report.html").read_text()
    assert "Policy optimization, run by run" in page and "KL target 6" in page


def test_the_same_file_is_the_paper_s_run_on_a_gpt2_folder(folder, tmp_path):
    tokenizer = load_tokenizer(FIXTURES / "data" / "fixtures" / "gpt2")
    stored = json.loads((FIXTURES / "models" / "fixtures" / "gpt2" / "config.json").read_text())
    shape = dataclasses.replace(from_json(stored, "gpt2"), vocab_size=tokenizer.vocab_size, context=128)
    save_pretrained(tmp_path / "gpt2", shape, init_base(shape, key=jax.random.key(0)), tokenizer)
    config = runpy.run_path(str(CONFIG))["get_config"](f"{folder},gpt2={tmp_path / 'gpt2'}")
    shown = plan(config, tmp_path / "work")
    assert "[4/4] ppo_3 (ppo): to run" in shown and shown.count("gpt2 decoder") == 4
    assert shown.count("batch 512 in microbatches of 512 rows") == 3
    ppo = config.stages.ppo_1
    assert (ppo.init, ppo.prefix_tokens) == (str(tmp_path / "gpt2"), (64, 64))
    assert abs(ppo.iterations * ppo.batch_size / 1e6 - 1) < 1e-3


@pytest.mark.skipif(not DATA.is_dir(), reason="RLHF_JAX_DATA names no folder with imdb")
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_score_rises_and_the_kl_settles_within_a_tenth_of_its_target(tmp_path):
    work = tmp_path / "work"
    assert Command(f"{CONFIG}:{DATA}", work).wait(7000).status == 0
    assert result(work, "classifier")["figures"]["accuracy_low"] > 0.6
    for name in (*RUNS, "ppo_3"):
        assert result(work, name)["figures"]["score_gain_low"] > 0
        kl = [row["objective/kl"] for row in rollouts(work, name)]
        target = json.loads((work / "config.json").read_text())["stages"][name]["kl_target"]
        assert abs(np.mean(kl[-(len(kl) // 4) :]) / target - 1) < 0.1
