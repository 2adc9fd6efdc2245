"""launch.sh, logs.sh, stop.sh and pull.sh, through the ssh command's string to the real worker.sh and back."""

import json
import subprocess
from pathlib import Path

import pytest
from test_worker import ODD, wait_for

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"

TPU = ["gcloud", "compute", "tpus", "tpu-vm"]
NODES = [*TPU, "list", "--zone=z", "--filter=queuedResource~/queuedResources/run$", "--sort-by=name"]
NODES += ["--format=value(name.basename(),state,networkEndpoints.len())"]
ONE = ("tpu-vm list", "run\tREADY\t1")
TWO_SLICES = ("tpu-vm list", "run-0\tREADY\t4\nrun-1\tREADY\t4")
RUN = ("--", "--config=c.py", "--workdir=gs://b/first")
ON_WORKER = "--command=bash ~/rlhf_jax/tpu_scripts/on_worker.sh"


def ssh(node, command, worker="all"):
    return [*TPU, "ssh", node, "--zone=z", "--quiet", f"--worker={worker}", f"{ON_WORKER} {command}"]


@pytest.fixture
def worker(machine):
    machine.install()
    machine.rules(ONE)
    return machine


def test_the_program_gets_what_the_user_wrote(worker, left):
    done = worker.run("launch.sh", "run", "--wait", "--every=0", *RUN, *ODD)
    assert done.returncode == 0, done.stderr
    ((flags, _, _, folder),) = worker.programs()
    assert flags == ["-m", "rlhf_jax.main", *RUN[1:], *ODD]
    assert folder == str(worker.home / "rlhf_jax")
    calls = worker.calls()
    assert calls[0] == NODES
    assert calls[1][:-1] == ssh("run", "")[:-1]
    assert calls[1][-1].startswith(f"{ON_WORKER} start first 0 gs://b/first -- --config=c.py --workdir=gs://b/first ")
    assert set(map(tuple, calls[2:])) == {tuple(ssh("run", "state first"))}
    assert left() == []


def test_a_run_outlives_the_launch_and_is_not_started_twice(worker, left):
    worker.program("print('loss 1.5', flush=True)\nuntil_stopped(75)")
    assert worker.run("launch.sh", "run", *RUN).returncode == 0
    wait_for(worker.folder / "ready0")
    again = worker.run("launch.sh", "run", *RUN)
    assert (again.returncode, again.stderr) == (0, "run first is going on: left as it is\n")
    assert len(worker.programs()) == 1
    assert worker.run("logs.sh", "run").stdout == "loss 1.5\n"

    stopped = worker.run("stop.sh", "run")
    assert (stopped.returncode, stopped.stderr, left()) == (0, "run first ended with status 75\n", [])
    assert worker.run("stop.sh", "run").stderr == "no run is going on\n"
    (worker.folder / "ready0").unlink()
    assert worker.run("launch.sh", "run", *RUN).returncode == 0
    wait_for(worker.folder / "ready0")
    assert worker.run("stop.sh", "run", "--run=first").returncode == 0
    assert (len(worker.programs()), left()) == (2, [])


@pytest.mark.parametrize("status", [1, 2, 75])
def test_wait_ends_with_the_runs_status(worker, status):
    worker.program(f"time.sleep(0.3); sys.exit({status})")
    done = worker.run("launch.sh", "run", "--wait", "--every=0", *RUN)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == f"first: {status}"


def test_a_run_that_ends_while_its_state_is_asked_is_not_lost(worker):
    until_ended = "while [[ ! -e ~/rlhf_jax_runs/first/status ]]; do sleep 0.05; done"
    slow = f'[[ ${{!#}} != true ]] || {until_ended}\nsleep 0.2; exec /usr/bin/flock "$@"'
    worker.command("flock", f"#!/bin/bash\n{slow}\n")
    worker.program("time.sleep(0.5); sys.exit(3)")
    done = worker.run("launch.sh", "run", "--wait", "--every=0", *RUN)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (3, "first: 3")


@pytest.mark.parametrize(
    ("states", "status"),
    [(["0", "0"], 0), (["1", "75"], 75), (["75", "2"], 2), (["0", "134"], 134), (["0", "lost"], 1)],
)
def test_wait_joins_the_statuses_of_two_slices(machine, states, status):
    first = [f"state {state}" for state in ("running", states[0])]
    machine.rules(
        ("tpu-vm list", "run-0 READY 1\nrun-1 READY 1"),
        ("ssh run-0", "", *first),
        ("ssh run-1", "", f"state {states[1]}"),
    )
    done = machine.run("launch.sh", "run", "--wait", "--every=0", *RUN)
    assert done.returncode == status, done.stderr


def test_every_slice_is_started_on_all_its_workers(machine):
    machine.rules(TWO_SLICES, ("ssh", ""))
    assert machine.run("launch.sh", "run", "--restarts=3", "--run=mine", *RUN).returncode == 0
    start = "start mine 3 gs://b/first -- --config=c.py --workdir=gs://b/first"
    nodes, *started = machine.calls()
    assert (nodes, sorted(started)) == (NODES, [ssh("run-0", start), ssh("run-1", start)])


def test_several_workers_need_a_shared_workdir(machine):
    machine.rules(TWO_SLICES, ("ssh", ""))
    local = ("--", "--config=c.py", "--workdir=runs/a")
    done = machine.run("launch.sh", "run", *local)
    assert (done.returncode, machine.calls()) == (2, [NODES])
    assert done.stderr.startswith("error: 8 workers do not share the disk of --workdir=runs/a: give a gs:// one")
    assert machine.run("launch.sh", "run", "--local-workdir", *local).returncode == 0
    assert len(machine.calls()) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--", "--config=c.py"), "--workdir=DIR is needed after --"),
        (("--", "--workdir=gs://b/a b"), 'run "a b" is not letters, digits'),
        (("--run=../x", *RUN), 'run "../x" is not letters, digits'),
        (("--restarts=-1", *RUN), "--restarts=-1: a whole number of at least 0 is needed"),
    ],
)
def test_mistakes_are_one_line(machine, flags, says):
    done = machine.run("launch.sh", "run", *flags)
    assert (done.returncode, done.stderr.count("\n"), machine.calls()) == (2, 1, [])
    assert done.stderr.startswith(f"error: {says}")


@pytest.mark.parametrize("script", ["setup.sh", "launch.sh", "logs.sh", "stop.sh"])
def test_nothing_follows_a_failing_gcloud_or_a_missing_node(machine, script, tmp_path):
    path = checkout(machine, tmp_path) / "tpu_scripts" / script
    for reply, status, says in [
        (4, 4, "error: status 4 from gcloud"),
        ("", 2, "error: run has no TPU VM: run create.sh run first"),
        ("run PREEMPTED 4", 2, "error: TPU VM run is PREEMPTED"),
    ]:
        machine.rules(("tpu-vm list", reply))
        done = machine.run(path, "run", *(RUN if script == "launch.sh" else ()))
        assert (done.returncode, machine.calls()) == (status, [NODES])
        assert done.stderr.startswith(says)


def test_a_failing_ssh_gives_its_status(machine):
    machine.rules(TWO_SLICES, ("ssh run-1", 9), ("ssh", ""))
    for script, flags in [("launch.sh", ("--wait", *RUN)), ("stop.sh", ())]:
        assert machine.run(script, "run", *flags).returncode == 9
        assert len(machine.calls()) == 3


def test_logs_of_one_worker(machine):
    machine.rules(TWO_SLICES, ("ssh", "step 1"))
    done = machine.run("logs.sh", "run", "--slice=1", "--worker=3", "--run=mine", "--lines=7", "--follow")
    assert done.stdout == "step 1\n"
    assert machine.calls() == [NODES, ssh("run-1", "log mine 7 follow", worker=3)]
    assert machine.run("logs.sh", "run", "--slice=2").returncode == 2


def test_stop_asks_every_slice(machine):
    machine.rules(TWO_SLICES, ("ssh", ""))
    assert machine.run("stop.sh", "run", "--timeout=5").returncode == 0
    nodes, *asked = machine.calls()
    assert (nodes, sorted(asked)) == (NODES, [ssh("run-0", "stop '' 5"), ssh("run-1", "stop '' 5")])


def test_stop_tells_of_a_run_that_does_not_end_or_ends_badly(worker, left):
    worker.program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(stub + '/ready0', 'w').close()\ntime.sleep(3)")
    assert worker.run("launch.sh", "run", *RUN).returncode == 0
    wait_for(worker.folder / "ready0")
    done = worker.run("stop.sh", "run", "--timeout=0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: run first has not ended after 0 s")
    assert worker.run("stop.sh", "run").returncode == 0  # it was done, with status 0
    assert left() == []


@pytest.mark.parametrize(("flags", "leave"), [((), "compiled|checkpoints"), (("--checkpoints",), "compiled")])
def test_pull_from_a_bucket(machine, flags, leave):
    done = machine.run("pull.sh", "gs://b/a run", "my results", *flags)
    assert (done.returncode, (machine.folder / "my results").is_dir()) == (0, True)
    exclude = f"--exclude=^(.*/)?({leave})/.*"
    assert machine.calls() == [["gcloud", "storage", "rsync", "gs://b/a run", "my results", "--recursive", exclude]]


@pytest.mark.parametrize("flags", [(), ("--checkpoints",)])
def test_pull_from_a_worker(worker, flags):
    assert worker.run("launch.sh", "run", "--wait", "--every=0", "--", "--workdir=runs/mine").returncode == 0
    for name in ("report.html", "sft/metrics.jsonl", "sft/checkpoints/1/state", "compiled/x"):
        path = worker.home / "rlhf_jax/runs/mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    done = worker.run("pull.sh", "run", "my results", "--run=mine", *flags)
    assert done.returncode == 0, done.stderr
    found = {
        str(p.relative_to(worker.folder / "my results")) for p in worker.folder.glob("my results/**/*") if p.is_file()
    }
    assert found == {"report.html", "sft/metrics.jsonl"} | ({"sft/checkpoints/1/state"} if flags else set())


def test_pull_of_a_run_that_wrote_to_a_bucket_says_which(worker):
    assert worker.run("launch.sh", "run", "--wait", "--every=0", *RUN).returncode == 0
    done = worker.run("pull.sh", "run", "results", "--run=first")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: run first is in a bucket: pull.sh gs://b/first DEST",
    )


def git(folder, *args):
    who = ("-c", "user.name=n", "-c", "user.email=e")
    subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True)


def checkout(machine, folder):
    """A small repository with these scripts."""
    folder = folder / "my checkout"
    (folder / "tpu_scripts").mkdir(parents=True)
    for path in SCRIPTS.glob("*.sh"):
        (folder / "tpu_scripts" / path.name).write_bytes(path.read_bytes())
    (folder / "pyproject.toml").write_text("one\n")
    (folder / "old name.py").write_text("old\n")
    (folder / ".gitignore").write_text("build/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def test_setup(machine, tmp_path):
    folder = checkout(machine, tmp_path)
    setup, code = folder / "tpu_scripts/setup.sh", machine.home / "rlhf_jax"
    machine.rules(("tpu-vm list", "run READY 4"))
    done = machine.run(setup, "run")
    assert done.returncode == 0, done.stderr
    calls = machine.calls()
    archive = str(folder / "build/rlhf_jax.tgz")
    copy = [*TPU, "scp", archive, "run:rlhf_jax.tgz", "--zone=z", "--quiet", "--worker=all"]
    assert calls[:2] == [NODES, copy]
    assert calls[2][:-1] == ssh("run", "")[:-1]
    assert (code / "old name.py").read_text() == "old\n"
    venv, install = (machine.folder / "uv").read_text().splitlines()
    assert venv == f"venv --python 3.12 {machine.home}/rlhf_jax_env "
    assert install == f"pip install --python {machine.home}/rlhf_jax_env/bin/python --editable .\\[tpu\\] "

    # A run's own folder stays, a file that is gone goes, and nothing is installed anew.
    (code / "runs").mkdir()
    (folder / "old name.py").unlink()
    done = machine.run(setup, "run")
    assert (done.returncode, machine.calls()) == (2, [])
    assert done.stderr.startswith("error: there are changes that are in no commit")
    (folder / "new name.py").write_text("new\n")
    assert machine.run(setup, "run", "--dirty").returncode == 0
    assert (code / "new name.py").exists() and (code / "runs").exists() and not (code / "old name.py").exists()
    assert not (code / ".git").exists()
    assert len((machine.folder / "uv").read_text().splitlines()) == 2
    staged = subprocess.run(["git", "-C", folder, "diff", "--cached", "--name-only"], capture_output=True, text=True)
    assert staged.stdout == ""

    (folder / "pyproject.toml").write_text("two\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=second")
    assert machine.run(setup, "run").returncode == 0
    assert len((machine.folder / "uv").read_text().splitlines()) == 4


def test_setup_leaves_a_worker_with_a_run_going_on(worker, tmp_path):
    worker.program("until_stopped(75)")
    assert worker.run("launch.sh", "run", *RUN).returncode == 0
    wait_for(worker.folder / "ready0")
    before = json.dumps(sorted(map(str, (worker.home / "rlhf_jax").iterdir())))
    done = worker.run(checkout(worker, tmp_path) / "tpu_scripts/setup.sh", "run")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: run first is going on: stop.sh ends it")
    assert json.dumps(sorted(map(str, (worker.home / "rlhf_jax").iterdir()))) == before
    assert worker.run("stop.sh", "run").returncode == 0


def test_setup_reaches_every_slice(machine, tmp_path):
    machine.rules(TWO_SLICES, ("scp", ""), ("ssh", ""))
    setup = checkout(machine, tmp_path) / "tpu_scripts/setup.sh"
    assert machine.run(setup, "run").returncode == 0
    calls = machine.calls()
    assert [call[5] for call in calls[1:3]] == [f"{tmp_path}/my checkout/build/rlhf_jax.tgz"] * 2
    assert [call[6] for call in calls[1:3]] == ["run-0:rlhf_jax.tgz", "run-1:rlhf_jax.tgz"]
    assert sorted(call[5] for call in calls[3:]) == ["run-0", "run-1"]


@pytest.mark.parametrize("flags", [(), ("--dirty",)])
def test_a_dry_run_of_setup(machine, tmp_path, flags):
    folder = checkout(machine, tmp_path)
    machine.rules(("tpu-vm list", "run READY 1"), ("scp", ""), ("ssh", ""))
    dry = machine.run(folder / "tpu_scripts/setup.sh", "run", "--dry-run", *flags)
    assert (dry.returncode, machine.calls(), (folder / "build").exists()) == (0, [], False)
    machine.paste(dry.stdout)
    assert (folder / "build/rlhf_jax.tgz").exists()
    pasted = machine.calls()
    assert machine.run(folder / "tpu_scripts/setup.sh", "run", *flags).returncode == 0
    assert pasted == machine.calls()
