"""Processes that share no disk, on a work directory in a bucket: killed, then gone on from empty machines."""

import importlib.util
import json
import signal
import time

import fsspec
import pytest
from pod import ends, free_port, start, told
from tiny import ROOT, run_main, write_config

URL = "gs://bucket/run"
# The command, for which a shared disk settles in a second.
PROMPT = """
import sys
from rlhf_jax.distributed import processes
from rlhf_jax.main import main
processes.SETTLES = 1.0
sys.exit(main(sys.argv))
"""
NEEDED = ("gcsfs", "gcp_storage_emulator")


class Folder:
    """A bucket that stands in a folder; Orbax and fsspec write files."""

    environment, done = {}, ""

    def __init__(self, folder):
        self.program = (str(ROOT / "tests" / "integration" / "bucket_main.py"), str(folder))
        self.files, self.root = fsspec.filesystem("file", auto_mkdir=True), f"{folder}/bucket/run"

    def leave_a_cut_save(self, latest, saved):
        """Nothing: what Orbax leaves where it can rename is in `test_resume`."""


class Emulator:
    """Google's protocol, as gcsfs, TensorStore and Google's own client speak it, answered by a server on loopback."""

    program, root, done = ("-m", "rlhf_jax.main"), "bucket/run", "/commit_success.txt"

    def __init__(self, port):
        url = f"http://127.0.0.1:{port}"
        self.environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "NO_GCE_CHECK": "true"}
        self.environment["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anyone"
        from gcsfs.core import GCSFileSystem

        self.files = GCSFileSystem(token="anon", endpoint_url=url, use_listings_cache=False)

    def leave_a_cut_save(self, latest, saved):
        """A later checkpoint that is whole but for the file that says so."""
        for name in self.files.find(f"{latest}/{saved}"):
            if name != f"{latest}/{saved}{self.done}":
                self.files.pipe_file(name.replace(f"{latest}/{saved}", f"{latest}/99"), self.files.cat_file(name))


@pytest.fixture(params=["folder", "emulator"])
def bucket(request, tmp_path):
    if request.param == "folder":
        yield Folder(tmp_path / "storage")
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"pip install gcsfs gcp-storage-emulator: {', '.join(missing)} is missing")
    from gcs import create_server  # needs the emulator

    port = free_port()
    server = create_server(port, "bucket")
    server.start()
    yield Emulator(port)
    server.stop()


def complete(bucket):
    """Steps of the pretrain stage whose checkpoints are complete in the bucket."""
    latest = f"{bucket.root}/pretrain/checkpoints/latest"
    names = (
        [name.rstrip("/").split("/")[-1] for name in bucket.files.ls(latest, detail=False)]
        if (bucket.files.exists(latest))
        else []
    )
    return [int(name) for name in names if name.isdigit() and bucket.files.exists(f"{latest}/{name}{bucket.done}")]


def rows(text):
    return {row["step"]: row for row in map(json.loads, text[: text.rfind("\n") + 1].splitlines())}


def without_clock(row):
    return {name: value for name, value in row.items() if not name.startswith("perf/")}


def test_killed_machines_are_replaced_by_others_that_have_nothing(bucket, source, tmp_path, monkeypatch):
    extra = "config.stages.pretrain.update(epochs=0.5)\nconfig.stages.pretrain.checkpoint.every = 1"
    config = write_config(tmp_path / "job.py", source, stages=("prepare", "pretrain"), extra=extra)

    def run(*local):
        flags = [(f"--workdir={URL}", f"--local_dir={tmp_path / name}", "--silent_seconds=30") for name in local]
        return start(config, tmp_path / "work", 2, 1, flags, program=bucket.program)

    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    commands = run("a", "b")
    while max(complete(bucket), default=0) < 2 and all(command.process.poll() is None for command in commands):
        time.sleep(0.05)
    for command in commands:
        command.process.send_signal(signal.SIGKILL)  # none where it has ended
    killed = ends(commands)
    assert [end.status for end in killed] == [-signal.SIGKILL] * 2, told(killed)
    saved = max(complete(bucket))
    before = rows(bucket.files.cat_file(f"{bucket.root}/pretrain/metrics.jsonl").decode())
    assert saved >= 2 and max(before) >= saved  # the metrics are there with the checkpoint

    bucket.leave_a_cut_save(f"{bucket.root}/pretrain/checkpoints/latest", saved)

    done = ends(run("c", "d"))
    assert [end.status for end in done] == [0, 0], told(done)
    assert "prepare (prepare): finished before, skipped" in done[0].stdout
    after = rows(bucket.files.cat_file(f"{bucket.root}/pretrain/metrics.jsonl").decode())
    assert [after[step] for step in range(saved + 1)] == [before[step] for step in range(saved + 1)]

    uncut = tmp_path / "uncut"
    assert run_main(config, uncut, environment={"JAX_NUM_CPU_DEVICES": "2"}).status == 0
    expected = rows((uncut / "pretrain" / "metrics.jsonl").read_text())
    assert after.keys() == expected.keys() and len(after) > saved + 2
    for step in after:
        assert without_clock(after[step]) == pytest.approx(without_clock(expected[step]), rel=1e-5, abs=1e-6), step

    names = {name.split(f"{bucket.root}/")[-1] for name in bucket.files.find(bucket.root)}
    assert {"report.html", "summary.json", "pretrain/result.json", "prepare/tokenizer.model"} <= names
    assert not any(name.startswith("compiled") for name in names)
    for folder in ("c", "d"):
        here = {str(p.relative_to(tmp_path / folder)) for p in (tmp_path / folder).rglob("*") if p.is_file()}
        mine = {name for name in here if not name.startswith(("compiled/", ".mirror"))}
        assert mine == {n for n in names if "/checkpoints/" not in n and "/model/" not in n} - {"mirror.json"}, folder


def test_a_bucket_that_is_not_there_is_one_line_before_anything_runs(bucket, source, tmp_path):
    if not bucket.done:
        pytest.skip("a folder is made where it is missing")
    config = write_config(tmp_path / "job.py", source, stages=("prepare",))
    flags = ("--workdir=gs://nowhere/run", f"--local_dir={tmp_path / 'here'}")
    done = run_main(config, tmp_path / "work", *flags, environment=bucket.environment)
    last = done.stderr.splitlines()[-1]
    assert done.status == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: --workdir=gs://nowhere/run: bucket nowhere cannot be used (NotFound: 404")
    assert not (tmp_path / "here" / "prepare").exists()


def test_processes_with_folders_of_their_own_and_no_bucket_are_told(source, tmp_path):
    config = write_config(tmp_path / "job.py", source, stages=("prepare", "pretrain"))
    flags = [(f"--workdir={tmp_path / name}",) for name in ("a", "b")]
    (tmp_path / "prompt.py").write_text(PROMPT)
    done = ends(start(config, tmp_path / "work", 2, 1, flags, program=(str(tmp_path / "prompt.py"),)))
    assert [end.status for end in done] == [2, 2], told(done)
    for end in done:
        assert end.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in end.stderr
        assert "is not one folder that all processes see (process 1 does not see what process 0 writes)" in end.stderr
    assert not (tmp_path / "a" / "prepare").exists() and not (tmp_path / "b").exists()
