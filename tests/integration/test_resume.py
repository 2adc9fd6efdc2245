"""A job cut at any moment and run again gives, bit for bit, what it gives without a cut."""

import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import (
    Command,
    copy_stages,
    metrics,
    model_info,
    reached,
    result,
    run_main,
    status_name,
    tiny_config,
    unfinished_saves,
    write_config,
)

from rlhf_jax.data import load_tokenizer
from rlhf_jax.stages import packed
from rlhf_jax.stages.context import Context

CHAIN = ("prepare", "pretrain", "sft", "reward", "ppo")
CUT = CHAIN[1:]
TORN = '{"step": 6, "loss/tr'


def weights(workdir, stage):
    """A finished model's arrays by path."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((workdir / stage / "model").absolute())
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(workdir, uncut, stage):
    """The stage's parameters, logged metrics, samples and final figures are those of the run without a cut."""
    assert model_info(workdir, stage)["fingerprints"] == model_info(uncut, stage)["fingerprints"]
    here, there = weights(workdir, stage), weights(uncut, stage)
    assert here.keys() == there.keys() and len(here) > 5
    for name in here:
        np.testing.assert_array_equal(here[name], there[name], err_msg=f"{stage} {name}")
    assert metrics(workdir, stage) == metrics(uncut, stage)
    assert result(workdir, stage)["figures"] == result(uncut, stage)["figures"]
    assert result(workdir, stage)["samples"] == result(uncut, stage)["samples"]
    for name in ("samples.jsonl", "evaluation.json"):
        if (uncut / stage / name).exists():
            assert (workdir / stage / name).read_text() == (uncut / stage / name).read_text()


def cut_at_step(config, workdir, stage, step, number=signal.SIGKILL):
    """Runs until the stage has logged `step` and sends the signal."""
    done = Command(config, workdir).signal_when(reached(workdir, stage, step), number)
    assert not (workdir / stage / "result.json").exists(), f"the cut came too late: status {done.status}"
    return done


def cut_in_a_save(config, workdir, stage):
    """Kills the command while a checkpoint's folder is being written; a save that was faster is passed by."""
    for _ in range(6):
        done = Command(config, workdir).signal_when(lambda: bool(unfinished_saves(workdir, stage)), signal.SIGKILL)
        assert status_name(done.status) == "SIGKILL", done.stderr[-2000:]
        if unfinished_saves(workdir, stage):
            return done
    raise AssertionError("every save was complete before the command was killed")


@pytest.fixture(scope="module")
def chain_config(source, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("chain") / "chain.py", source, stages=CHAIN)


@pytest.fixture(scope="module")
def cut_job(finished, chain_config, tmp_path_factory):
    """(work directory, the exits) of one job cut once in every stage, each time by something else, then run to its end.

    Killed between saves, stopped by a signal, killed in a save, killed in the middle of a line of metrics.jsonl.
    """
    workdir = copy_stages(finished[0], tmp_path_factory.mktemp("cut") / "work", ("prepare",))
    exits = {
        "pretrain": cut_at_step(chain_config, workdir, "pretrain", 3),
        "sft": cut_at_step(chain_config, workdir, "sft", 2, signal.SIGTERM),
        "reward": cut_in_a_save(chain_config, workdir, "reward"),
        "ppo": cut_at_step(chain_config, workdir, "ppo", 4),
    }
    with (workdir / "ppo" / "metrics.jsonl").open("a") as file:
        file.write(TORN)
    exits["end"] = run_main(chain_config, workdir)
    return workdir, exits


def test_a_killed_command_says_so_and_a_stopped_one_exits_with_75(cut_job):
    _, exits = cut_job
    assert {stage: status_name(done.status) for stage, done in exits.items()} == {
        "pretrain": "SIGKILL",
        "sft": "75",
        "reward": "SIGKILL",
        "ppo": "SIGKILL",
        "end": "0",
    }
    assert "Traceback" not in exits["sft"].stderr
    assert exits["sft"].stderr.splitlines()[-1].endswith("run the same command to go on")


@pytest.mark.parametrize("stage", CUT)
def test_a_cut_stage_ends_as_an_uncut_one(cut_job, finished, stage):
    assert_same(cut_job[0], finished[0], stage)


def test_a_stage_that_only_lacks_its_result_is_finished_without_another_step(finished, chain_config, tmp_path):
    workdir = copy_stages(finished[0], tmp_path / "work", CHAIN)
    (workdir / "reward" / "result.json").unlink()
    shutil.rmtree(workdir / "reward" / "model")
    (workdir / "ppo" / "result.json").unlink()
    done = run_main(chain_config, workdir)
    assert done.status == 0, done.stderr
    assert_same(workdir, finished[0], "reward")
    assert_same(workdir, finished[0], "ppo")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_cut_around_the_writing_of_tokenized_data_leaves_nothing_half_made(
    finished, source, tmp_path, monkeypatch, moment
):
    class Cut(BaseException):
        pass

    def cut(folder, examples, **kwargs):
        if moment == "after":
            build_table(folder, examples, **kwargs)
        raise Cut

    workdir = copy_stages(finished[0], tmp_path / "work", ("prepare",))
    (workdir / "sft").mkdir()
    tokenizer = load_tokenizer(workdir / "prepare" / "tokenizer.model")
    context = Context("sft", tiny_config(str(source)), workdir, "identity")
    build_table = packed.build_table
    monkeypatch.setattr(packed, "build_table", cut)
    with pytest.raises(Cut):
        packed.PackedData(context, tokenizer, "prepare/sft.jsonl", "train", context.config)
    monkeypatch.undo()
    data = packed.PackedData(context, tokenizer, "prepare/sft.jsonl", "train", context.config)
    figures = result(finished[0], "sft")["figures"]
    assert (len(data.table), len(data.plan), data.skipped) == (figures["records"], figures["rows"], figures["skipped"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("stage", CUT)
def test_every_stage_cut_at_every_step_ends_as_an_uncut_one(finished, chain_config, tmp_path, stage, number, step):
    for attempt in range(4):
        workdir = copy_stages(finished[0], tmp_path / f"work{attempt}", CHAIN[: CHAIN.index(stage)])
        Command(chain_config, workdir).signal_when(reached(workdir, stage, step), number)
        if not (workdir / stage / "result.json").exists():
            break
    else:
        raise AssertionError("every cut came after the last step")
    with (workdir / stage / "metrics.jsonl").open("a") as file:
        file.write(TORN)
    done = run_main(chain_config, workdir)
    assert done.status == 0, done.stderr
    assert_same(workdir, finished[0], stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", CUT)
def test_every_stage_cut_in_a_save_ends_as_an_uncut_one(finished, chain_config, tmp_path, stage):
    workdir = copy_stages(finished[0], tmp_path / "work", CHAIN[: CHAIN.index(stage)])
    cut_in_a_save(chain_config, workdir, stage)
    done = run_main(chain_config, workdir)
    assert done.status == 0, done.stderr
    assert_same(workdir, finished[0], stage)
