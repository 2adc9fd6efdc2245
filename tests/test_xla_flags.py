"""Flags for the compilers: set once, never over the user's own, and known to the compilers that are here."""

import os
import subprocess
import sys

import pytest

from rlhf_jax import xla_flags


def on_gpu(monkeypatch, there):
    monkeypatch.setattr(xla_flags.glob, "glob", lambda pattern: ["/dev/nvidia0"] if there else [])


def test_a_flag_of_the_users_stays(monkeypatch):
    on_gpu(monkeypatch, True)
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=there"}
    xla_flags.prepare(environment)
    words = environment["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=there"]
    assert len([word for word in words if "latency_hiding" in word]) == 1
    assert len(words) == 1 + len(xla_flags.GPU)
    before = dict(environment)
    xla_flags.prepare(environment)
    assert environment == before


@pytest.mark.parametrize(("there", "platforms"), [(False, ""), (True, "cpu"), (True, "tpu")])
def test_other_platforms_get_no_flag_of_a_gpu(monkeypatch, there, platforms):
    on_gpu(monkeypatch, there)
    environment = {"JAX_PLATFORMS": platforms}
    xla_flags.prepare(environment, deterministic=True)
    assert "XLA_FLAGS" not in environment and "latency_hiding" in environment["LIBTPU_INIT_ARGS"]


def test_what_a_user_asks_of_a_gpu(monkeypatch):
    on_gpu(monkeypatch, True)
    environment = {"JAX_PLATFORMS": "cuda"}
    xla_flags.prepare(environment, deterministic=True, memory_fraction=0.9)
    assert "--xla_gpu_deterministic_ops=true" in environment["XLA_FLAGS"].split()
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def test_xla_knows_the_flags_of_a_gpu():
    """XLA reads one list of flags for all platforms, and ends a process that gives it another."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    xla_flags.add(environment, "XLA_FLAGS", xla_flags.GPU | xla_flags.DETERMINISTIC_GPU)
    program = [sys.executable, "-c", "import jax; jax.numpy.ones(1)"]
    assert subprocess.run(program, env=environment, capture_output=True, timeout=120).returncode == 0
    xla_flags.add(environment, "XLA_FLAGS", {"xla_gpu_no_such_flag": "true"})
    assert subprocess.run(program, env=environment, capture_output=True, timeout=120).returncode != 0


MANY_PROGRAMS = """
import os
from rlhf_jax import xla_flags
xla_flags.prepare(os.environ)
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("x",))
x, w = (jax.device_put(jnp.ones((256, 256)) / 256, NamedSharding(mesh, PartitionSpec("x"))) for _ in range(2))

@jax.jit
def program(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return {i: (x.sum() + i, x.mean()) for i in range(6)}

for _ in range(40):
    sums = jax.tree.map(lambda *parts: sum(parts), *(program(x, w) for _ in range(40)))
print(float(sums[0][0]))
"""


def test_many_programs_under_way_on_virtual_devices_come_to_an_end():
    """With a thread for each of two cores this waits for ever: sums over devices wait for a part that has no thread."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run([sys.executable, "-c", MANY_PROGRAMS], env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_device_keeps_the_threads_that_it_has():
    for environment in ({}, {"JAX_NUM_CPU_DEVICES": "1"}):
        xla_flags.prepare(environment)
        assert "PJRT_NPROC" not in environment
    environment = {"JAX_NUM_CPU_DEVICES": "4", "PJRT_NPROC": "3"}
    xla_flags.prepare(environment)
    assert environment["PJRT_NPROC"] == "3"  # the user's own
