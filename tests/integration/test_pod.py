"""A job on several processes that is stopped, killed, and goes on with fewer of them; what ends one ends all."""

import os
import signal
import time

import pytest
from pod import ends, start, told
from tiny import copy_stages, metrics, reached, run_main, write_config

STOPPED, KILLED = 2, 9  # steps of the sft stage


@pytest.fixture(scope="module")
def job(finished, source, tmp_path_factory):
    """(work directory of four devices uncut, of 4 then 2 then 1 processes, how those ended, seconds until they had)."""
    folder = tmp_path_factory.mktemp("pod")
    extra = "config.stages.sft.update(batch_size=8, epochs=2.0)\nconfig.stages.sft.checkpoint.every = 1"
    extra += "\nconfig.stages.sft.evaluation.data = ''"
    config = write_config(folder / "job.py", source, stages=("prepare", "pretrain", "sft"), extra=extra)
    uncut = copy_stages(finished[0], folder / "uncut", ("prepare", "pretrain"))
    assert run_main(config, uncut, environment={"JAX_NUM_CPU_DEVICES": "4"}).status == 0
    cut = copy_stages(finished[0], folder / "cut", ("prepare", "pretrain"))
    done, seconds = {}, {}
    for processes, step, number in ((4, STOPPED, signal.SIGTERM), (2, KILLED, signal.SIGKILL)):
        commands = start(config, cut, processes, 4 // processes, flags=("--silent_seconds=8",))
        arrived = reached(cut, "sft", step)
        while commands[1].process.poll() is None and not arrived():
            time.sleep(0.001)
        os.kill(commands[1].process.pid, number)
        began = time.monotonic()
        done[processes] = ends(commands)
        seconds[processes] = time.monotonic() - began
    done[1] = [run_main(config, cut, environment={"JAX_NUM_CPU_DEVICES": "4"})]
    return uncut, cut, done, seconds


def test_a_signal_to_one_process_stops_all_after_the_same_step(job):
    *_, done, _ = job
    assert [end.status for end in done[4]] == [75] * 4, told(done[4])
    assert len({end.stderr.splitlines()[-1] for end in done[4]}) == 1
    assert "saved: run the same command to go on" in done[4][0].stderr


def test_a_killed_process_ends_the_other_within_a_minute_and_is_named(job):
    *_, done, seconds = job
    survivor, killed = done[2]
    assert killed.status == -signal.SIGKILL
    assert survivor.status == 1 and seconds[2] < 60, told(done[2])
    last = survivor.stderr.splitlines()[-1]
    assert last.startswith("error: process 1 (") and "is gone" in last and "sft, iteration" in last
    assert "Traceback" not in survivor.stderr


def test_fewer_processes_go_on_as_if_nothing_had_been(job):
    uncut, cut, done, _ = job
    assert done[1][0].status == 0, told(done[1])
    here, there = metrics(cut, "sft"), metrics(uncut, "sft")
    assert [row["step"] for row in here] == [row["step"] for row in there] and len(here) > KILLED + 2
    for mine, other in zip(here, there, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6), mine["step"]


def test_processes_of_slurm_with_other_configs_are_refused(finished, source, tmp_path):
    config = write_config(tmp_path / "job.py", source, stages=("prepare", "pretrain"))
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    ranks = [{**slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)]
    flags = [(f"--config.seed={seed}",) for seed in (0, 1)]
    done = ends(start(config, tmp_path / "work", 2, devices=1, flags=flags, environments=ranks))
    assert [end.status for end in done] == [2, 2], told(done)
    for end in done:
        (line,) = end.stderr.splitlines()
        assert line.startswith("error: the config") and "of process 1 is not that of process 0" in line
    assert not (tmp_path / "work").exists()


def test_what_only_process_0_can_find_wrong_ends_all(tmp_path, source):
    few = tmp_path / "few"
    few.mkdir()
    (few / "one.py").write_text("x = 1\n")
    config = write_config(tmp_path / "job.py", few, stages=("prepare", "pretrain"))
    done = ends(start(config, tmp_path / "work", 2, devices=1))
    assert [end.status for end in done] == [2, 2], told(done)
    first, second = (end.stderr.splitlines()[-1] for end in done)
    assert first.startswith("error: ") and second.endswith(first.removeprefix("error: "))
    assert second.startswith("error: process 0 (")
