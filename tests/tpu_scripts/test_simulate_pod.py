"""simulate_pod.sh: each process's environment, one status of several, and no process left behind."""

import os
import signal
from pathlib import Path

import pytest
from test_worker import ODD, wait_for

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"


def simulate(machine, *flags, start=False):
    command = ("simulate_pod.sh", *flags, f"--folder={machine.folder}/logs", "--", *ODD)
    return machine.start(*command) if start else machine.run(*command)


def ended(process):
    process.communicate(timeout=30)
    return process.returncode


def test_four_processes_know_each_other(machine, left):
    machine.program("print('here', process, flush=True)")
    done = simulate(machine, "4", "--devices=2")
    assert (done.returncode, left()) == (0, [])
    ports = set()
    for i, (flags, seen, _, folder) in enumerate(sorted(machine.programs(), key=lambda p: p[1]["RLHF_JAX_PROCESS_ID"])):
        assert (flags, folder) == (["-m", "rlhf_jax.main", *ODD], str(machine.folder))
        host, port = seen.pop("RLHF_JAX_COORDINATOR").split(":")
        ports.add(int(port))
        assert host == "127.0.0.1"
        numbers = {"RLHF_JAX_PROCESSES": "4", "RLHF_JAX_PROCESS_ID": str(i)}
        assert seen == numbers | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    assert len(machine.programs()) == 4 and len(ports) == 1 and 20000 <= min(ports) < 32768
    assert sorted(done.stdout.splitlines()) == [f"[{i}] here {i}" for i in range(4)]
    assert [(machine.folder / f"logs/{i}/log").read_text() for i in range(4)] == [f"here {i}\n" for i in range(4)]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [("0,0", 0), ("0,3", 3), ("1,75", 75), ("75,2", 2), ("1,2", 2), ("9,0", 9)],
)
def test_one_status_of_several(machine, statuses, status):
    machine.program(f"sys.exit(({statuses})[int(process)])")
    assert simulate(machine, "2").returncode == status


def test_one_that_fails_ends_the_others(machine, left):
    """Those that were told to end do so with 75, which is not why the job failed."""
    machine.program(
        "if process == '2':\n"
        "    while not all(os.path.exists(f'{stub}/ready{i}') for i in '013'): time.sleep(0.05)\n"
        "    sys.exit(5)\n"
        "until_stopped(75)"
    )
    done = simulate(machine, "4")
    assert (done.returncode, left()) == (5, [])
    assert [(machine.folder / f"logs/{i}/status").read_text() for i in range(4)] == ["75\n", "75\n", "5\n", "75\n"]
    assert f"process 2 ended with status 5: {machine.folder}/logs/2/log" in done.stderr.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_after_saving(machine, left, number):
    machine.program("until_stopped(75)")
    process = simulate(machine, "4", start=True)
    for i in range(4):
        wait_for(machine.folder / f"ready{i}")
    process.send_signal(number)
    assert (ended(process), left()) == (75, [])


def test_what_ignores_the_signal_is_killed(machine, left):
    """Its children are too. The minute's wait is cut short here."""
    script = (machine.folder / "simulate_pod.sh", machine.folder / "common.sh", machine.folder / "worker.sh")
    for path in script:
        path.write_text((SCRIPTS / path.name).read_text().replace("failed_at + 50", "failed_at + 3"))
    machine.program(
        "if process == '1':\n"
        "    while not os.path.exists(stub + '/ready0'): time.sleep(0.05)\n"
        "    sys.exit(6)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork(): os.setpgid(0, 0)\n"
        "open(stub + '/ready0', 'w').close()\n"
        "time.sleep(100)"
    )
    done = machine.run(script[0], "2", f"--folder={machine.folder}/logs", "--", "--x")
    assert (done.returncode, left()) == (6, [])


def test_a_dry_run_prints_what_would_run(machine):
    machine.program("print('here')")
    done = machine.run("simulate_pod.sh", "2", "--dry-run", f"--folder={machine.folder}/logs", "--", *ODD)
    assert (done.returncode, machine.programs(), (machine.folder / "logs").exists()) == (0, [], False)
    machine.paste(done.stdout)
    assert [flags for flags, *_ in machine.programs()] == [["-m", "rlhf_jax.main", *ODD]] * 2
    assert {seen["RLHF_JAX_PROCESS_ID"] for _, seen, *_ in machine.programs()} == {"0", "1"}


@pytest.mark.parametrize("count", ["0", "x", "-1", "1.5"])
def test_a_wrong_number_of_processes_is_one_line(machine, count):
    done = machine.run("simulate_pod.sh", count)
    assert (done.returncode, done.stderr.count("\n"), machine.programs()) == (2, 1, [])


def test_killing_the_terminal_leaves_nothing(machine, left):
    """A hang-up of the whole group, as of a terminal that is closed."""
    machine.program("until_stopped(75)")
    process = machine.start("simulate_pod.sh", "2", f"--folder={machine.folder}/logs", "--", start_new_session=True)
    for i in range(2):
        wait_for(machine.folder / f"ready{i}")
    os.killpg(process.pid, signal.SIGHUP)
    assert (ended(process), left()) == (75, [])
