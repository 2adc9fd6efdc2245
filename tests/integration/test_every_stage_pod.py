"""The first steps of every kind of trained stage on 1, 2 and 4 processes of two devices each: the same losses."""

import shutil

import pytest
from pod import ends, start, told
from tiny import ROOT, copy_stages, metrics, read_rows, result, run_main

from rlhf_jax.stages.private import CLAIM_FILE, ROOT_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

CONFIG = """
import runpy
from rlhf_jax.config import stage

MESH = dict(fsdp=2)


def get_config():
    world = runpy.run_path({path!r})
    config = world["get_config"]("small")
    stages = config.stages
    for name in [name for name in stages if name not in {given!r}]:
        del stages[name]
    config.logging.update(every=1, tensorboard=False)
    config.privacy.public = ("task/sft.jsonl", "task/text.jsonl", "task/prompts.jsonl", "task/heldout.jsonl")
    stages.task.update(held_out=64, answers=1)
    stages.sft.update(batch_size=8, epochs=0.2)
    for name in ("pairs", "heldout_pairs"):
        stages[name].update(data="task/heldout.jsonl", batch_size=64)
    if not {all_stages!r}:
        return config
    adapters, short = dict(rank=4), dict(batch_size=16, epochs=1.0)
    stages.full = stage(
        "sft", init="sft", data="task/sft.jsonl", sequence_length=64, batch_size=16, epochs=0.1, mesh=MESH
    )
    for name, kind in (("reward", "reward"), ("cost", "cost"), ("private", "reward")):
        stages[name] = world["scored"](kind, "pairs", lora=adapters, mesh=MESH)
        stages[name].update(**short)
    stages.reward.update(calibration_prompts=16, rollout_batch_size=16)
    stages.private.update(calibration_prompts=16, rollout_batch_size=16)
    stages.private.privacy.update(epsilon=8.0, delta=1e-3)
    stages.laplace = stage("laplace", subject="reward", evaluation=dict(data="heldout_pairs/pairs.jsonl"), mesh=MESH)
    stages.preference = stage(
        "preference", init="sft", data="pairs/pairs.jsonl", schema="safety", sequence_length=64, mesh=MESH, **short
    )
    stages.lagrangian = world["policy"](2, constraint=dict(cost="cost", **world["LAMBDA"]), lora=adapters, mesh=MESH)
    stages.grpo = world["policy"](2, estimator="grpo", samples=4, mesh=MESH)
    for name, rows in (("lagrangian", 16), ("grpo", 32)):
        stages[name].update(batch_size=rows)
        stages[name].evaluation.update(every=2, records=16)
    return config
"""
GIVEN = ("task", "tokenizer", "sft", "pairs", "heldout_pairs")
TRAINED = ("full", "reward", "cost", "private", "preference", "lagrangian", "grpo")
PROCESSES = (1, 2, 4)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """{number of processes: its work directory}; prompts, tokenizer, first policy and labels are those of one."""
    folder = tmp_path_factory.mktemp("pods")
    configs = {}
    for name, every in (("given", False), ("all", True)):
        configs[name] = folder / f"{name}.py"
        path = str(ROOT / "configs" / "safe_rlhf.py")
        configs[name].write_text(CONFIG.format(path=path, given=GIVEN, all_stages=every))
    plain = {"XLA_FLAGS": ""}
    done = run_main(configs["given"], folder / "given", environment=plain)
    assert done.status == 0, done.stderr[-3000:]
    found = {}
    for count in PROCESSES:
        found[count] = copy_stages(folder / "given", folder / f"on_{count}", GIVEN)
        if count > 1:  # noise is of a secret root and of the run's own number, which are no function of the seed
            (found[count] / "private").mkdir()
            for name in (ROOT_FILE, f"private/{CLAIM_FILE}"):
                shutil.copy2(found[1] / name, found[count] / name)
        finished = ends(start(configs["all"], found[count], count, devices=2), timeout=1500)
        assert [end.status for end in finished] == [0] * count, told(finished)
    return found


@pytest.mark.parametrize("count", PROCESSES[1:])
@pytest.mark.parametrize("stage", TRAINED)
def test_the_first_steps_are_those_of_one_process(workdirs, stage, count):
    one, more = (metrics(workdirs[n], stage) for n in (1, count))
    compared = 0
    for here, there in zip(more[:3], one[:3], strict=True):
        assert here.keys() == there.keys()
        for name in here:
            if "loss" in name or name == "optimizer/gradient_norm":  # a private stage tells no loss of its own records
                rel = 1e-5 if "loss" in name else 1e-3
                assert here[name] == pytest.approx(there[name], rel=rel, abs=1e-6), f"{name} of step {here['step']}"
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize("count", PROCESSES[1:])
def test_the_posterior_is_that_of_one_process(workdirs, count):
    one, more = (result(workdirs[n], "laplace")["figures"] for n in (1, count))
    numbers = {name for name, value in one.items() if isinstance(value, float)}
    assert numbers and one.keys() == more.keys()
    for name in numbers - {"seconds"}:
        assert more[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("count", PROCESSES[1:])
def test_as_many_rows_are_logged(workdirs, count):
    for stage in TRAINED:
        one, more = ([row["step"] for row in read_rows(workdirs[n] / stage / "metrics.jsonl")] for n in (1, count))
        assert one == more
