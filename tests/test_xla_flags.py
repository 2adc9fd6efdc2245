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
