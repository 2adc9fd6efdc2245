"""Processes that share one program: start, who writes, and waiting for each other."""

import os

import jax
from jax.experimental import multihost_utils


def initialize() -> None:
    """Joins `jax.distributed` when the environment names a coordinator; otherwise this process is alone.

    Reads `RLHF_JAX_COORDINATOR` (host:port), `RLHF_JAX_PROCESSES` and `RLHF_JAX_PROCESS_ID`. On CPU the processes'
    collectives go through gloo.
    """
    coordinator = os.environ.get("RLHF_JAX_COORDINATOR")
    if coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, int(os.environ["RLHF_JAX_PROCESSES"]), int(os.environ["RLHF_JAX_PROCESS_ID"])
    )


def is_main_process() -> bool:
    """True in the one process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
