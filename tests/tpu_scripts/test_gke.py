"""gke.sh: the job set as YAML reads it, and what kubectl is called with."""

import re

import pytest

yaml = pytest.importorskip("yaml")
FLAGS = ("--image=r/i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
RUN = ("--config=c.py", "--workdir=gs://b/run")
ODD = ["two  words", "it's", 'a "quote"', "back\\slash\\n", "$HOME", "$(HOME)", "$$x$$", "a;b & c | d", "@NAME@ @ARGS@"]
ODD += ["a\nb\tc\r", "", "- x: {y}", "# no", "yes", "é ∇", "&", "*", "%s"]


def as_kubernetes(text):
    """What a container gets of an argument: $$ is one $; $(NAME), which must not be left, a variable's value."""
    assert not re.search(r"\$\(", text.replace("$$", ""))
    return text.replace("$$", "$")


def test_the_job_set(machine):
    done = machine.run("gke.sh", "render", "run", *FLAGS, "--slices=3", "--restarts=5", "--", *RUN)
    assert done.returncode == 0, done.stderr
    assert "@" not in re.sub(r"#.*", "", done.stdout)
    job_set = yaml.safe_load(done.stdout)
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["metadata"]["name"] == "run"
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (slices,) = job_set["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (3, 4, 4, 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 600)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1].endswith("/tpu_scripts/worker.sh")
    assert container["args"] == ["--", *RUN]


def test_arguments_arrive_unharmed(machine):
    done = machine.run("gke.sh", "render", "run", *FLAGS, "--", *RUN, *ODD)
    (slices,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert [as_kubernetes(arg) for arg in container["args"]] == ["--", *RUN, *ODD]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--topology=4x4x",), "--topology=4x4x: as 4x4 or 2x2x4"),
        (("--topology=2x3",), "--topology=2x3 is 6 chips, not a multiple of --chips=4 a host"),
        (("--slices=0",), "--slices=0: a whole number of at least 1 is needed"),
        (("--image=",), "--image is needed: see gke.sh --help"),
        (("--", "\x1b"), "an argument holds a control character: $'\\E'"),
    ],
)
@pytest.mark.parametrize("action", ["render", "apply"])
def test_mistakes_are_one_line(machine, flags, says, action):
    done = machine.run("gke.sh", action, "run", *FLAGS, *flags)
    assert (done.returncode, done.stderr, done.stdout, machine.calls()) == (2, f"error: {says}\n", "", [])


def test_apply_gives_kubectl_what_render_prints(machine):
    done = machine.run("gke.sh", "apply", "run", *FLAGS, "--namespace=team", "--", *RUN)
    assert done.returncode == 0
    rendered = machine.run("gke.sh", "render", "run", *FLAGS, "--namespace=team", "--", *RUN).stdout
    assert machine.applied() == [rendered]
    assert machine.calls() == [["kubectl", "apply", "--namespace=team", "--filename=-"]]


def test_logs_and_delete(machine):
    assert machine.run("gke.sh", "logs", "run", "--slice=1", "--worker=2", "--follow").returncode == 0
    assert machine.run("gke.sh", "delete", "run").returncode == 0
    labels = (
        "jobset.sigs.k8s.io/jobset-name=run,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=2"
    )
    assert machine.calls() == [
        ["kubectl", "logs", "--namespace=default", f"--selector={labels}", "--tail=-1", "--follow"],
        ["kubectl", "delete", "jobset", "run", "--namespace=default", "--ignore-not-found"],
    ]


def test_a_failing_kubectl_ends_it_with_its_status(machine):
    machine.rules(("delete", 3))
    assert machine.run("gke.sh", "delete", "run").returncode == 3
