"""Which environment names a process's peers, and what is refused at the start."""

import pytest

from rlhf_jax.distributed import processes
from rlhf_jax.distributed.processes import cluster, initialize
from rlhf_jax.errors import UserError

SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}


@pytest.mark.parametrize(
    ("environment", "chips", "found"),
    [
        ({}, [], ""),
        (SLURM, [], "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, [], ""),
        ({"SLURM_NTASKS": "4"}, [], ""),  # a batch script outside of any step: one process
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [], "ompi"),
        ({}, ["/dev/accel0"], "tpu"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, ["/dev/vfio/0"], "tpu"),
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/accel0"], ""),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ["/dev/accel0"], ""),
    ],
)
def test_the_cluster_is_read_from_the_environment(environment, chips, found, monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [c for c in chips if c.startswith(pattern[:9])])
    assert cluster(environment) == found


@pytest.mark.parametrize(
    "given",
    [("host", 2, 0), ("host:80", 2, 2), ("host:80", 0, 0), (":80", 2, 0), ("host:80", 2, -1)],
    ids=["no port", "no such process", "no count", "no host", "no number"],
)
def test_half_an_address_is_refused(given, monkeypatch):
    for name in ("COORDINATOR", "PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"RLHF_JAX_{name}", raising=False)
    with pytest.raises(UserError, match="give HOST:PORT of process 0"):
        initialize(*given)


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.delenv("RLHF_JAX_COORDINATOR", raising=False)
    joined = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **given: joined.append(given))
    monkeypatch.setattr(processes.jax.config, "update", lambda *option: None)
    initialize()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    initialize(processes=1)
    assert joined == []
    initialize()
    assert joined == [{}]  # Slurm's peers, which JAX reads by itself
