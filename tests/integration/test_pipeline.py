"""The whole tiny job by the real command: what it leaves, and what a second command does with that."""

import json
import math
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import STAGES, TRAINED, copy_stages, files, model_info, read_rows, result, run_main, write_config

from rlhf_jax.data import load_tokenizer
from rlhf_jax.distributed import make_mesh
from rlhf_jax.training.artifacts import load_role


def numbers(value):
    """Every number of a JSON value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_every_file_of_the_contract_is_there(finished):
    workdir, _ = finished
    assert json.loads((workdir / "config.json").read_text())["stages"]["sft"]["init"] == "pretrain"
    assert set(json.loads((workdir / "summary.json").read_text())["stages"]) == set(STAGES)
    for stage in STAGES:
        assert result(workdir, stage)["stage"] == stage
    for stage in TRAINED:
        assert (workdir / stage / "model").is_dir()
        assert (workdir / stage / "checkpoints").is_dir()
        assert (workdir / stage / "model.json").exists()
    page = (workdir / "report.html").read_text()
    assert all(stage in page for stage in STAGES)


def test_the_report_needs_no_network(finished):
    page = (finished[0] / "report.html").read_text()
    assert "<script src" not in page and "<link" not in page and 'src="http' not in page


def test_metrics_are_rows_of_numbers_with_the_step_first(finished):
    for stage in TRAINED:
        rows = read_rows(finished[0] / stage / "metrics.jsonl")
        assert all(next(iter(row)) == "step" for row in rows)
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_the_summary_holds_finite_figures_of_every_trained_stage(finished):
    stages = json.loads((finished[0] / "summary.json").read_text())["stages"]
    for stage in TRAINED:
        values = list(numbers(stages[stage]))
        assert values and all(math.isfinite(value) for value in values), stage


def test_training_lowers_the_held_out_loss(finished):
    for stage in ("pretrain", "sft"):
        figures = result(finished[0], stage)["figures"]
        assert figures["loss/eval"] < figures["loss/eval_start"]


def test_the_policy_starts_at_its_reference(finished):
    rows = read_rows(finished[0] / "ppo" / "metrics.jsonl")
    first = next(row for row in rows if "objective/kl" in row)
    assert rows[0]["step"] == 0 and rows[0]["eval/kl"] == 0.0
    assert first["objective/kl"] == 0.0
    assert first["val/first_ratio_error"] == pytest.approx(0.0, abs=1e-6)


def test_the_same_command_again_skips_what_is_finished_and_changes_no_model(finished, config_file, tmp_path):
    workdir = copy_stages(finished[0], tmp_path / "work", STAGES)
    before = {stage: files(workdir / stage) for stage in STAGES}
    written = {path: path.stat().st_mtime_ns for path in workdir.glob("*/model/**/*")}
    done = run_main(config_file, workdir)
    assert done.status == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == len(STAGES)
    assert {stage: files(workdir / stage) for stage in STAGES} == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (workdir / "report.html").exists() and (workdir / "summary.json").exists()


@pytest.fixture(scope="module")
def with_adapters(finished, source, tmp_path_factory):
    """(work directory, console) of the job with adapters in every stage after pretraining."""
    folder = tmp_path_factory.mktemp("adapters")
    config = write_config(
        folder / "adapters.py",
        source,
        stages=("prepare", "pretrain", "sft", "reward", "ppo"),
        lora_rank=2,
        extra='config.stages.audit = stage("memorization", subjects=("sft", "ppo"), batch_size=8)',
    )
    workdir = copy_stages(finished[0], folder / "work", ("prepare", "pretrain"))
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_roles_with_adapters_share_one_base_and_store_it_once(with_adapters):
    workdir, console = with_adapters
    base = model_info(workdir, "pretrain")["fingerprints"]["base"]
    with ocp.StandardCheckpointer() as checkpointer:
        for stage, parts in (("sft", ["adapters"]), ("reward", ["adapters", "head"]), ("ppo", ["adapters"])):
            info = model_info(workdir, stage)
            assert info["base_stage"] == "pretrain"
            assert info["fingerprints"]["base"] == base
            assert info["parts"] == parts
            assert sorted(checkpointer.metadata((workdir / stage / "model").absolute()).item_metadata) == parts
    assert all(f"{role}: base of policy" in console for role in ("reference", "value", "reward"))
    figures = result(workdir, "ppo")["figures"]
    assert figures["scored_in_one_pass"] and figures["memory"]["policy"]["base"] > 0
    assert all(figures["memory"][role]["base"] == 0 for role in ("reference", "value", "reward"))


def test_adapters_train_in_every_stage(with_adapters):
    workdir, _ = with_adapters
    prints = [model_info(workdir, stage)["fingerprints"]["adapters"] for stage in ("sft", "reward", "ppo")]
    assert len(set(prints)) == 3
    assert result(workdir, "sft")["figures"]["loss/eval"] < result(workdir, "sft")["figures"]["loss/eval_start"]


def test_a_reward_stage_leaves_its_sampled_pairs_as_texts(finished):
    folder = finished[0] / "reward"
    tokenizer = load_tokenizer(finished[0] / "prepare" / "tokenizer.model")
    with np.load(folder / "data" / "pairs_train.npz") as saved:
        pairs = dict(saved)
    expected = []
    for tokens, lengths, answers in zip(pairs["tokens"], pairs["lengths"], pairs["answer_lengths"], strict=True):
        rows = [row[n - m : n].tolist() for row, n, m in zip(tokens, lengths, answers, strict=True)]
        texts = [tokenizer.decode([token for token in row if token not in tokenizer.stop_ids]) for row in rows]
        if all(texts) and texts[0] != texts[1]:
            expected.append(texts)
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [[r["chosen"], r["rejected"]] for r in records] == expected and len(records) > 20
    assert len({r["id"] for r in records}) == len(records)


def test_a_stage_appended_to_the_config_runs_on_what_is_there(finished, source, tmp_path):
    config = write_config(
        tmp_path / "longer.py",
        source,
        stages=("prepare", "pretrain", "sft"),
        extra='config.stages.audit = stage("memorization", subjects=("sft",), batch_size=8)',
    )
    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare", "pretrain", "sft"))
    before = {stage: files(workdir / stage) for stage in ("prepare", "pretrain", "sft")}
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 3
    assert result(workdir, "audit")["figures"]["secrets"] == 8
    assert {stage: files(workdir / stage) for stage in before} == before


def test_a_work_directory_that_was_moved_still_loads(finished, tmp_path):
    copy_stages(finished[0], tmp_path / "old", ("prepare", "pretrain"))
    info = json.loads((tmp_path / "old" / "pretrain" / "model.json").read_text())
    text = json.dumps(info).replace(str(finished[0]), str(tmp_path / "old"))  # as if the stages had been made there
    (tmp_path / "old" / "pretrain" / "model.json").write_text(text)
    os.rename(tmp_path / "old", tmp_path / "new")
    role = load_role(tmp_path / "new", "pretrain", make_mesh(devices=jax.devices()[:1]), {})
    assert role.tokenizer.identity == info["tokenizer"]["identity"]


def test_a_base_that_was_loaded_for_another_mesh_lies_on_the_one_asked_for(finished):
    workdir, bases = finished[0], {}
    for shape in ((8, 1, 1), (2, 4, 1)):
        mesh = make_mesh(*shape)
        base = load_role(workdir, "sft", mesh, bases).weights["base"]
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(base)), shape
        assert base["embedding"].addressable_shards[0].data.shape == (400, 32 // shape[1])


def test_roles_of_one_base_on_one_mesh_get_the_same_arrays(with_adapters):
    bases, mesh = {}, make_mesh()
    loaded = [load_role(with_adapters[0], stage, mesh, bases) for stage in ("pretrain", "sft", "reward", "ppo")]
    first, *others = [role.weights["base"] for role in loaded]
    assert all(base is first for base in others)


def test_a_dry_run_says_what_would_run_and_writes_nothing(config_file, tmp_path):
    environment = {"JAX_COMPILATION_CACHE_DIR": ""}
    done = run_main(config_file, tmp_path / "work", "--dry_run", environment=environment)
    assert done.status == 0, done.stderr
    assert all(f"{stage} (" in done.stdout for stage in STAGES)
    assert not (tmp_path / "work").exists()


def test_a_dry_run_over_a_finished_job_changes_nothing(finished, config_file, tmp_path):
    workdir = copy_stages(finished[0], tmp_path / "work", STAGES)
    before = files(workdir)
    done = run_main(config_file, workdir, "--dry_run")
    assert done.status == 0, done.stderr
    assert done.stdout.count(": finished") == len(STAGES)
    assert files(workdir) == before
