"""worker.sh: the program's flags, its statuses, signals passed on, and when it runs again."""

import json
import os
import signal
import time

import pytest

ODD = ["--config=configs/a b.py", "it's", 'a "quote"', "$HOME", "`id`", "a;b", "back\\slash", "*", "", "new\nline", "~"]


def wait_for(path, seconds=10):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_flags_arrive_and_the_status_comes_back(machine, status):
    machine.program(f"sys.exit({status})")
    folder = machine.folder / "a folder"
    assert machine.run("worker.sh", f"--folder={folder}", "--", *ODD).returncode == status
    ((flags, _, _, _),) = machine.programs()
    assert flags == ["-m", "rlhf_jax.main", *ODD]
    assert (folder / "status").read_text() == f"{status}\n"
    assert (folder / "pid").read_text().strip().isdigit()


def test_the_installed_environment_is_used(machine):
    machine.install()
    (machine.bin / "python").unlink()
    assert machine.run("worker.sh", "--", "--x").returncode == 0
    assert [flags for flags, *_ in machine.programs()] == [["-m", "rlhf_jax.main", "--x"]]


@pytest.mark.parametrize(("status", "times"), [(0, 1), (2, 1), (75, 3), (1, 3), (139, 3)])
def test_restarts_after_a_crash_and_after_75_only(machine, status, times):
    machine.program(f"sys.exit({status})")
    done = machine.run("worker.sh", "--restarts=2", "--pause=0", "--", "--x")
    assert (done.returncode, len(machine.programs())) == (status, times)


def test_a_restart_that_goes_well(machine):
    machine.program("sys.exit(75 if open(stub + '/programs').read().count('\\n') < 2 else 0)")
    done = machine.run("worker.sh", "--restarts=5", "--pause=0", "--", "--x")
    assert (done.returncode, len(machine.programs())) == (0, 2)
    assert done.stderr == "worker.sh: status 75, run again 1 of 5 in 0 s\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_program_and_is_no_reason_to_run_again(machine, left, number):
    machine.program("until_stopped(75)")
    process = machine.start("worker.sh", "--restarts=5", "--pause=0", f"--folder={machine.folder}/f", "--", "--x")
    wait_for(machine.folder / "ready0")
    process.send_signal(number)
    assert process.wait(timeout=10) == 75
    assert (machine.folder / "f/status").read_text() == "75\n"
    assert (process.stderr.read(), len(machine.programs()), left()) == ("", 1, [])


def test_ctrl_c_at_a_terminal_reaches_the_program_once(machine):
    """A terminal signals its whole foreground process group."""
    machine.program(
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *_: count.append(1))\n"
        "open(stub + '/ready0', 'w').close()\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: time.sleep(0.05)\n"
        "sys.exit(70 + len(count))"
    )
    process = machine.start("worker.sh", "--", "--x", start_new_session=True)
    wait_for(machine.folder / "ready0")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 71


def test_a_signal_in_the_pause_ends_it(machine, left):
    machine.program("sys.exit(9)")
    process = machine.start("worker.sh", "--restarts=5", "--pause=60", "--", "--x")
    assert process.stderr.readline() == "worker.sh: status 9, run again 1 of 5 in 60 s\n"
    process.send_signal(signal.SIGTERM)
    assert (process.wait(timeout=10), left()) == (9, [])


def test_a_dry_run(machine):
    done = machine.run("worker.sh", "--dry-run", "--", *ODD)
    assert (done.returncode, machine.programs()) == (0, [])
    machine.paste(done.stdout)
    assert json.dumps(machine.programs()[0][0]) == json.dumps(["-m", "rlhf_jax.main", *ODD])
