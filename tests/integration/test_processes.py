"""Two processes of two devices run the job that one process of four runs: one writes, each loads its own rows."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from pod import ends, start, told
from tiny import copy_stages, metrics, read_rows, result, run_main, write_config

from rlhf_jax.distributed import make_mesh, place_batch

AUDITED = str(Path(__file__).with_name("audited_main.py"))
STAGES = ("sft", "reward", "ppo")
# Saves that every process takes part in.
SHARED = ("/checkpoints", "/model")


def run_two(config, workdir, devices):
    """Runs the command in two processes; returns how they finished and each one's notes of `audited_main`."""
    notes = [workdir.with_name(f"{workdir.name}.{process}.notes") for process in (0, 1)]
    done = ends(start(config, workdir, 2, devices, program=[(AUDITED, str(path)) for path in notes]))
    return done, [[json.loads(line) for line in path.read_text().splitlines()] for path in notes]


def writes(notes, workdir):
    """What Python wrote into the work directory, saves that all processes share aside."""
    paths = [note["write"] for note in notes if "write" in note]
    inside = [path.removeprefix(str(workdir)) for path in paths if path.startswith(f"{workdir}/")]
    return [path for path in inside if not any(shared in path for shared in SHARED)]


@pytest.fixture(scope="module")
def jobs(finished, source, tmp_path_factory):
    """(work directory of one process of four devices, of two of two, their ends, their notes)."""
    folder = tmp_path_factory.mktemp("processes")
    extra = "config.stages.ppo.update(batch_size=16, iterations=2)\nconfig.stages.ppo.evaluation.data = ''"
    config = write_config(folder / "job.py", source, stages=("prepare", "pretrain", *STAGES), extra=extra)
    one = copy_stages(finished[0], folder / "one", ("prepare", "pretrain"))
    done = run_main(config, one, environment={"JAX_NUM_CPU_DEVICES": "4"})
    assert done.status == 0, done.stderr[-3000:]
    two = copy_stages(finished[0], folder / "two", ("prepare", "pretrain"))
    ends, notes = run_two(config, two, devices=2)
    assert [end.status for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
    return one, two, ends, notes


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_take_the_steps_of_one(jobs, stage):
    one, two, *_ = jobs
    rows = list(zip(metrics(two, stage), metrics(one, stage), strict=True))[:4]
    assert [row["step"] for row, _ in rows] == [0, 1, 2, 3]
    for here, there in rows:
        assert here.keys() == there.keys()
        for name in here:
            assert here[name] == pytest.approx(there[name], rel=1e-5, abs=1e-6), f"{name} of step {here['step']}"


def test_two_processes_roll_out_and_score_as_one(jobs):
    one, two, *_ = jobs
    here, there = (next(row for row in metrics(workdir, "ppo") if row["step"] > 0) for workdir in (two, one))
    # The policies differ by rounding, so one of some hundred draws may fall differently; here none does.
    assert here["response_length"] == there["response_length"]
    for name in here:
        assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-4), name


def test_only_process_0_writes_and_prints(jobs):
    _, two, ends, notes = jobs
    assert writes(notes[1], two) == []
    assert any(path.endswith("metrics.jsonl") for path in writes(notes[0], two))
    # Gloo itself says in every process to whom it is connected; its threads may tear the line before its number.
    lines = [line for line in ends[0].stdout.splitlines() if line.strip(" 0123456789")]
    said = [line for line in lines if "peer ranks" not in line]
    assert [line for line in said if line in ends[1].stdout] == []
    assert "report: " in ends[0].stdout


def test_the_files_hold_one_row_a_step(jobs):
    one, two, *_ = jobs
    for stage in STAGES:
        here, there = ([row["step"] for row in read_rows(w / stage / "metrics.jsonl")] for w in (two, one))
        assert here == there
        assert result(two, stage)["figures"].keys() == result(one, stage)["figures"].keys()
    assert (two / "report.html").exists()


def test_each_process_loads_its_half_of_every_batch(jobs):
    notes = [[note for note in process if "rows" in note] for process in jobs[3]]
    assert len(notes[0]) == len(notes[1]) > 20
    for first, second in zip(*notes, strict=True):
        rows = first["rows"]
        assert first["loaded"] == list(range(rows // 2))
        assert second["loaded"] == list(range(rows // 2, rows))


def test_the_corpus_is_prepared_once(source, finished, tmp_path):
    config = write_config(tmp_path / "prepare.py", source, stages=("prepare",))
    ends, notes = run_two(config, tmp_path / "work", devices=1)
    assert [end.status for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
    assert writes(notes[1], tmp_path / "work") == []
    for name in ("tokenizer.model", "sft.jsonl", "secrets.jsonl"):
        assert (tmp_path / "work/prepare" / name).read_bytes() == (finished[0] / "prepare" / name).read_bytes()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_is_loaded_once_and_each_device_holds_its_rows(shape):
    mesh = make_mesh(*shape)
    calls = []

    def load(mine):
        calls.append(mine)
        return {"row": mine.astype(np.int32), "square": (mine[:, None] * np.arange(3)).astype(np.float32)}

    batch = place_batch(16, load, mesh)
    assert len(calls) == 1 and calls[0].tolist() == list(range(16))
    np.testing.assert_array_equal(jax.device_get(batch["row"]), np.arange(16))
    np.testing.assert_array_equal(jax.device_get(batch["square"]), np.arange(16)[:, None] * np.arange(3))
    shards = shape[0] * shape[1]
    starts = set()
    for shard in batch["row"].addressable_shards:
        held = np.asarray(shard.data)
        np.testing.assert_array_equal(held, np.arange(held[0], held[0] + 16 // shards))
        starts.add(int(held[0]))
    assert starts == set(range(0, 16, 16 // shards))


MADE_ONCE = """
import time
from pathlib import Path
from rlhf_jax.distributed.processes import as_process_0, barrier, initialize, is_main_process

initialize()
file = Path("made_once")
if not is_main_process():
    time.sleep(2.0)
if not as_process_0(file.exists()):
    if is_main_process():
        file.write_text("made")
        time.sleep(2.0)
    barrier("made")
barrier("read")
print(file.read_text())
"""


def test_a_process_that_looks_late_does_as_the_others(tmp_path):
    """Process 0 writes a file as soon as it has seen that none is there; all make it, or all read it."""
    done = ends(start("none", tmp_path / "work", 2, devices=1, program=("-c", MADE_ONCE)), timeout=60)
    assert [(end.status, end.stdout.split()[-1:]) for end in done] == [(0, ["made"])] * 2, told(done)
