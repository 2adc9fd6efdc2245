"""Processes that share one program: start, who writes, waiting for each other, and how all of them end."""

import contextlib
import glob
import hashlib
import os
import socket
import sys
import traceback
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.distributed.heartbeat import LOST, Heartbeat, Patience, Verdict
from rlhf_jax.errors import UserError

_heartbeat: Heartbeat | None = None


def _number(environment: dict[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def cluster(environment: dict[str, str]) -> str:
    """Which environment names this process's peers, as `jax.distributed` can read it: "slurm", "ompi", "tpu" or "".

    A Slurm step or an MPI run of one task has no peers, and a TPU machine has none where JAX runs on its CPU.
    """
    if _number(environment, "SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
        return "slurm"
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    platforms = environment.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" if chips and platforms in ("", "tpu", "tpu,cpu") and "TPU_SKIP_MDS_QUERY" not in environment else ""


def initialize(
    coordinator: str = "", processes: int = 0, process_id: int = -1, patience: Patience | None = None
) -> None:
    """Joins the other processes, if there are any, and starts the heartbeat; before any other use of JAX.

    Given are the three (or `RLHF_JAX_COORDINATOR`, host:port of process 0, `RLHF_JAX_PROCESSES` and
    `RLHF_JAX_PROCESS_ID` in the environment), or none: then the environment of Slurm, Open MPI, Cloud TPU or GKE
    tells, and without one this process is alone. On CPU the processes' collectives go through gloo.

    Raises:
      UserError: only a part is given, it is no address, or no coordinator answers there.
    """
    global _heartbeat
    coordinator = coordinator or os.environ.get("RLHF_JAX_COORDINATOR", "")
    processes = processes or _number(dict(os.environ), "RLHF_JAX_PROCESSES")
    if process_id < 0:
        process_id = int(os.environ.get("RLHF_JAX_PROCESS_ID", -1))
    given: dict[str, Any] = {}
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 <= process_id < processes:
            raise UserError(
                f'coordinator "{coordinator}", processes {processes}, process_id {process_id}: give HOST:PORT of '
                "process 0, how many processes there are, and this one's number from 0 on"
            )
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    elif processes == 1 or not cluster(dict(os.environ)):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        where = coordinator or cluster(dict(os.environ))
        raise UserError(f"the processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    if jax.process_count() > 1:
        from jax._src import distributed  # the store has no public name; Orbax reads it from here too

        store = distributed.global_state.client
        _heartbeat = Heartbeat(store, jax.process_index(), jax.process_count(), patience or Patience())


def finish() -> None:
    """Leaves the others, when the work is done or stopped."""
    if _heartbeat is not None:
        _heartbeat.close()


def fail(error: BaseException) -> int:
    """Says why this process fails, and ends all others with it; the exit status of a process alone.

    What a lost connection raised here is the doing of another process: that one is named, as soon as it is known.
    """
    mine = f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    status = 2 if isinstance(error, UserError) else LOST
    if _heartbeat is None:
        print(mine, file=sys.stderr, flush=True)
        return status
    lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    of_another = _heartbeat.verdict() if lost else None
    if of_another is not None:
        print(f"error: {of_another.message}", file=sys.stderr, flush=True)
        status = of_another.status
    else:
        print(mine, file=sys.stderr, flush=True)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        first_line = next(iter(what.splitlines()), "")
        _heartbeat.fail(Verdict(f"process {jax.process_index()} ({socket.gethostname()}): {first_line}", status))
    sys.stdout.flush()
    os._exit(status)  # at exit JAX would wait for processes that do not come


def mark(place: str) -> None:
    """Notes for the heartbeat that this process has come to `place`, an iteration or a barrier."""
    if _heartbeat is not None:
        _heartbeat.mark(place)


def alone(place: str) -> contextlib.AbstractContextManager[None]:
    """Around work that one process does while the others wait: it may take as long as it does."""
    return contextlib.nullcontext() if _heartbeat is None else _heartbeat.alone(place)


def is_main_process() -> bool:
    """True in the one process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        mark(f"barrier: {name}")
        multihost_utils.sync_global_devices(name)


def same_everywhere(what: str, content: str) -> None:
    """Raises a UserError in every process unless `content` is the same in all; `what` names it."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [i for i, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if others:
        raise UserError(
            f"{what} of process {', '.join(map(str, others[:8]))} is not that of process 0: start every process with "
            "the same files, flags and versions"
        )
