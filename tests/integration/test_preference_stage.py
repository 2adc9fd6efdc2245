"""Preference learning after sft by the real command: from its reference on, with the reference known before or not."""

import json
import math
import signal

import pytest
from tiny import Command, copy_stages, metrics, model_info, reached, result, run_main, tiny_config, write_config

from rlhf_jax.config import stage
from rlhf_jax.errors import UserError
from rlhf_jax.validation import validate

BEFORE = ("prepare", "pretrain", "sft")
SHARED = "batch_size=8, epochs=2.0, optimizer=dict(learning_rate=3e-3), checkpoint=dict(every=2)"
DPO = f"""
evaluation = dict(data={{pairs!r}}, every=4, records=8, metric="")
config.stages.dpo = stage("preference", init="sft", data={{pairs!r}}, evaluation=evaluation, {SHARED})
"""
OTHERS = f"""
evaluation["data"] = {{single!r}}
config.stages.kto = stage(
    "preference", init="sft", reference="pretrain", data={{single!r}}, schema="unpaired", loss="kto",
    lora=dict(rank=2), precompute_reference=False, evaluation=evaluation, {SHARED},
)
config.stages.audit = stage("memorization", subjects=("dpo",), batch_size=8)
config.stages.export = stage("export", subject="kto")
"""


@pytest.fixture(scope="module")
def job(finished, source, tmp_path_factory):
    """(config file of the dpo stage alone, work directory) of a job whose rejected answers are turned around."""
    folder = tmp_path_factory.mktemp("preference")
    lines = (finished[0] / "prepare" / "preference.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines[:40]]
    pairs = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": t["completion"][::-1]} for t in tasks]
    single = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("single", single)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: str(folder / f"{name}.jsonl") for name in ("pairs", "single")}
    whole = write_config(folder / "job.py", source, stages=BEFORE, extra=(DPO + OTHERS).format(**data))
    alone = write_config(folder / "dpo.py", source, stages=BEFORE, extra=DPO.format(**data))
    workdir = copy_stages(finished[0], folder / "work", BEFORE)
    done = run_main(whole, workdir)
    assert done.status == 0, done.stderr[-3000:]
    return alone, workdir


def test_training_starts_at_the_reference_and_learns_the_preference(job):
    start, first, *_ = metrics(job[1], "dpo")
    assert start["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval/rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    figures = result(job[1], "dpo")["figures"]
    assert figures["margin"] > 0.5 and figures["loss/eval"] < figures["loss/eval_start"]
    assert figures["accuracy"] > 0.7


@pytest.mark.slow
def test_a_reference_scored_in_each_step_gives_the_metrics_of_one_scored_before(job, tmp_path):
    config, before = job
    workdir = copy_stages(before, tmp_path / "work", BEFORE)
    done = run_main(config, workdir, "--config.stages.dpo.precompute_reference=False")
    assert done.status == 0, done.stderr[-3000:]
    assert (before / "dpo" / "data" / "reference_train.npz").exists()
    assert not (workdir / "dpo" / "data" / "reference_train.npz").exists()
    for one, other in zip(metrics(before, "dpo"), metrics(workdir, "dpo"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_kto_learns_single_answers_beside_another_models_reference(job):
    _, workdir = job
    info, figures = model_info(workdir, "kto"), result(workdir, "kto")["figures"]
    assert info["parts"] == ["adapters"] and info["base_stage"] == "sft"
    assert figures["answers"] == 80 and figures["margin"] > figures["margin_start"] + 0.1
    assert all(row["objective/kl"] >= 0 for row in metrics(workdir, "kto") if "objective/kl" in row)


def test_what_reads_a_model_reads_a_preference_stage(job):
    _, workdir = job
    table = result(workdir, "audit")["figures"]["table"]
    assert {row["subject"] for row in table} == {"dpo"}
    assert (workdir / "export" / "checkpoint" / "config.json").exists()
    page = (workdir / "report.html").read_text()
    assert "dpo: held-out preference accuracy" in page and "reward margin" in page


def test_a_cut_stage_ends_as_an_uncut_one_and_scores_no_reference_again(job, tmp_path):
    config, uncut = job
    workdir = copy_stages(uncut, tmp_path / "work", BEFORE)
    kept = workdir / "dpo" / "data" / "reference_train.npz"
    Command(config, workdir).signal_when(reached(workdir, "dpo", 3), signal.SIGKILL)
    assert not (workdir / "dpo" / "result.json").exists()
    written = kept.stat().st_mtime_ns
    done = run_main(config, workdir)
    assert done.status == 0, done.stderr[-3000:]
    assert kept.stat().st_mtime_ns == written
    assert model_info(workdir, "dpo")["fingerprints"] == model_info(uncut, "dpo")["fingerprints"]
    assert metrics(workdir, "dpo") == metrics(uncut, "dpo")


def test_a_record_without_a_label_is_refused_before_anything_runs(job, finished, source, tmp_path):
    (tmp_path / "single.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    extra = f'config.stages.kto = stage("preference", init="sft", data={str(tmp_path / "single.jsonl")!r}, '
    config = write_config(tmp_path / "bad.py", source, stages=BEFORE, extra=extra + 'loss="kto", schema="unpaired")')
    done = run_main(config, tmp_path / "work")
    assert done.status == 2 and len(done.stderr.splitlines()) == 1
    assert 'single.jsonl:1: field "label" is missing: expected {prompt, completion, label}' in done.stderr


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(loss="kto"), 'loss "kto" does not fit schema "preference"'),
        (dict(loss="dpo", schema="unpaired"), 'loss "dpo" does not fit schema "unpaired"'),
        (dict(loss="rrhf"), 'loss is "rrhf": it must be "dpo"'),
        (dict(loss="simpo", reference="sft"), 'reference is "sft", but simpo has none'),
        (dict(loss="ipo", label_smoothing=0.1), "label_smoothing is for dpo"),
        (dict(label_smoothing=0.5), r"label_smoothing is 0.5: it must be in \[0, 0.5\)"),
        (dict(beta=0.0), "beta is 0.0: it must be above 0"),
        (dict(batch_size=6, accumulation=4), "batch_size 6 does not divide into 4 microbatches"),
    ],
)
def test_fields_that_do_not_fit_are_refused(source, fields, message):
    config = tiny_config(str(source), stages=BEFORE)
    config.stages.pref = stage("preference", init="sft", data="prepare/preference.jsonl", **fields)
    with pytest.raises(UserError, match=f"stages.pref.*{message}"):
        validate(config)
