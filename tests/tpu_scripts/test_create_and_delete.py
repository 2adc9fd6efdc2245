"""create.sh and delete.sh: which commands they give, for each state a queued resource can be in."""

import pytest

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
LIST = [*QUEUED, "list", "--zone=z", "--filter=name~/queuedResources/run$", "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", "run", "--zone=z", "--force", "--quiet"]
CREATE = [*QUEUED, "create", "run", "--zone=z", "--accelerator-type=v5litepod-16"]
CREATE += ["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=run"]


def create(machine, *flags):
    return machine.run("create.sh", "run", "--type=v5litepod-16", "--every=0", *flags)


def test_a_new_one_is_asked_for_and_waited_for(machine):
    machine.rules(("list", "", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"))
    done = create(machine)
    assert (done.returncode, machine.calls()) == (0, [LIST, CREATE, LIST, LIST, LIST, LIST])
    assert done.stderr.splitlines() == [f"run: {s}" for s in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")]


def test_spot_slices_until_a_time(machine):
    machine.rules(("list", "", "ACTIVE"))
    done = create(machine, "--spot", "--slices=3", "--valid-until=6h", "--version=mine", "--zone=a", "--project=p q")
    assert done.returncode == 0
    expected = [*QUEUED, "create", "run", "--zone=a", "--project=p q", "--accelerator-type=v5litepod-16"]
    expected += ["--runtime-version=mine", "--node-count=3", "--node-prefix=run", "--spot", "--valid-until-duration=6h"]
    assert machine.calls()[1] == expected


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_is_the_types(machine, kind, version):
    machine.rules(("list", ""))
    assert machine.run("create.sh", "run", f"--type={kind}", "--no-wait").returncode == 0
    assert f"--runtime-version={version}" in machine.calls()[1]


def test_an_unknown_type_needs_a_version(machine):
    done = machine.run("create.sh", "run", "--type=v99-4")
    assert (done.returncode, done.stderr, machine.calls()) == (
        2,
        "error: no runtime version is known for --type=v99-4: give --version=V\n",
        [],
    )


def test_an_active_one_is_left(machine):
    machine.rules(("list", "ACTIVE"))
    done = create(machine)
    assert (done.returncode, done.stderr, machine.calls()) == (0, "run: ACTIVE\n", [LIST])


def test_a_pending_one_is_waited_for_and_not_asked_for_again(machine):
    machine.rules(("list", "WAITING_FOR_RESOURCES", "ACTIVE"))
    assert (create(machine).returncode, machine.calls()) == (0, [LIST, LIST])


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_preempted_one_is_made_anew(machine, state):
    machine.rules(("list", state, "DELETING", "", "ACTIVE"))
    assert (create(machine).returncode, machine.calls()) == (0, [LIST, DELETE, LIST, LIST, CREATE, LIST])


def test_one_that_is_being_suspended_is_made_anew_without_wait(machine):
    machine.rules(("list", "SUSPENDING", "SUSPENDED", ""))
    assert (create(machine, "--no-wait").returncode, machine.calls()) == (0, [LIST, LIST, DELETE, LIST, CREATE])


def test_a_request_that_fails_is_not_repeated_for_ever(machine):
    machine.rules(("list", "", "FAILED"))
    done = create(machine)
    assert (done.returncode, machine.calls()) == (1, [LIST, CREATE, LIST])
    assert done.stderr.splitlines()[-1].startswith(
        "error: run is FAILED: gcloud compute tpus queued-resources describe"
    )


@pytest.mark.parametrize("fails", ["list", "create"])
def test_a_failing_gcloud_ends_it_with_its_status(machine, fails):
    machine.rules((fails, 7), ("list", ""))
    done = create(machine)
    assert (done.returncode, machine.calls()) == (7, [LIST] if fails == "list" else [LIST, CREATE])
    assert done.stderr.splitlines()[-1].startswith("error: status 7 from gcloud compute tpus queued-resources")


def test_delete_needs_yes(machine):
    done = machine.run("delete.sh", "run")
    assert (done.returncode, machine.calls()) == (2, [])
    assert done.stderr == "error: this deletes run with all that is on the disks: add --yes\n"


def test_delete(machine):
    machine.rules(("list", "ACTIVE", ""))
    done = machine.run("delete.sh", "run", "run", "--yes")
    assert (done.returncode, done.stderr) == (0, "run is gone already\n")
    assert machine.calls() == [LIST, DELETE, LIST]


def test_delete_ends_at_the_first_failure(machine):
    machine.rules(("list", "ACTIVE"), ("delete", 5))
    assert (machine.run("delete.sh", "run", "run", "--yes").returncode, machine.calls()) == (5, [LIST, DELETE])
