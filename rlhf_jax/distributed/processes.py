"""Processes that share one program: start, who writes, waiting for each other, and how all of them end."""

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.distributed import storage
from rlhf_jax.distributed.heartbeat import LOST, Heartbeat, Patience, Verdict
from rlhf_jax.errors import UserError

SETTLES = 10.0  # seconds in which what one machine writes to a shared disk is seen by the others

_heartbeat: Heartbeat | None = None


def _number(environment: Mapping[str, str], name: str, without: int = 0) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else without


def cluster(environment: Mapping[str, str]) -> str:
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
    processes = processes or _number(os.environ, "RLHF_JAX_PROCESSES")
    if process_id < 0:
        process_id = _number(os.environ, "RLHF_JAX_PROCESS_ID", without=-1)
    given: dict[str, Any] = {}
    where = coordinator or cluster(os.environ)
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 <= process_id < processes:
            raise UserError(
                f'coordinator "{coordinator}", processes {processes}, process_id {process_id}: give HOST:PORT of '
                "process 0, how many processes there are, and this one's number from 0 on"
            )
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    elif processes == 1 or not where:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    if jax.process_count() > 1:
        from jax._src import distributed  # the store has no public name; Orbax reads it from here too

        store = distributed.global_state.client
        _heartbeat = Heartbeat(store, jax.process_index(), jax.process_count(), patience or Patience())


def finish() -> None:
    """Leaves the others, when the work is done or stopped; what process 0 wrote is then in the bucket."""
    if is_main_process():
        storage.push()
    if _heartbeat is not None:
        _heartbeat.close()


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room to write: of Python, or of TensorStore, which has only words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os_error_code='{errno.ENOSPC}'" in str(
        error
    )


def fail(error: BaseException) -> int:
    """Says why this process fails, and ends all others with it; the exit status of a process alone.

    What a lost connection raised here is the doing of another process: that one is named, as soon as it is known.
    """
    if disk_full(error):
        where = getattr(error, "filename", None) or "the disk"
        error = UserError(f"no space is left to write {where}: make room, and run the same command again to go on")
    mine = f"error: {error}" if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    status = 2 if isinstance(error, UserError) else LOST
    mirror = storage.mirror()
    if mirror is not None and not mirror.lost and is_main_process():
        with contextlib.suppress(UserError):
            mirror.push()
    if _heartbeat is None:
        _complain(mine)
        return status
    lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    of_another = _heartbeat.verdict() if lost else None
    if of_another is not None:
        _complain(f"error: {of_another.message}")
        status = of_another.status
    else:
        _complain(mine)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        first_line = next(iter(what.splitlines()), "")
        _heartbeat.fail(Verdict(f"process {jax.process_index()} ({socket.gethostname()}): {first_line}", status))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # at exit JAX would wait for processes that do not come


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full: the process ends all the same
        print(text, file=sys.stderr, flush=True)


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
    """Waits until every process has come to the barrier of this name; all then see what process 0 wrote before it."""
    mirror = storage.mirror()
    if mirror is not None:
        name = name.replace(str(mirror.folder), "")  # which is another one on every machine
        with alone(f"copies for barrier: {name}"):
            if is_main_process():
                mirror.push()
    if jax.process_count() > 1:
        mark(f"barrier: {name}")
        multihost_utils.sync_global_devices(name)
    if mirror is not None and not is_main_process():
        mirror.pull()


def as_process_0(found: bool) -> bool:
    """What process 0 found, in every process: a file that it may write at once is there for all of them or for none."""
    if jax.process_count() == 1:
        return found
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))


def begin_storage(workdir: str, folder: Path, writes: bool) -> None:
    """Takes up a work directory: one in a bucket is mirrored in `folder` from here on, by every process.

    Raises:
      UserError: the bucket cannot be reached, read or written.
    """
    storage.connect(workdir, folder, writes)
    mirror = storage.mirror()
    if mirror is not None and is_main_process():
        with alone("copies the work directory"):
            mirror.begin()
        mirror.keep_pushing()
    barrier("work directory")


def one_folder(workdir: Path) -> None:
    """Raises a UserError in every process unless all of them see one and the same work directory."""
    if jax.process_count() == 1:
        return
    token, written = workdir / ".one_folder", secrets.token_hex(16)
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        token.write_text(written)
    barrier("token written")
    words = np.frombuffer(bytes.fromhex(written), np.uint8)
    expected = np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes().hex()
    end = time.monotonic() + SETTLES
    while not (seen := token.exists() and token.read_text() == expected) and time.monotonic() < end:
        time.sleep(0.1)
    all_see = np.asarray(multihost_utils.process_allgather(np.asarray(seen)))
    if is_main_process():
        token.unlink()
    blind = [str(i) for i, sees in enumerate(all_see) if not sees]
    if blind:
        raise UserError(
            f"--workdir={workdir} is not one folder that all processes see (process {', '.join(blind[:8])} does not "
            "see what process 0 writes): give a folder on a shared disk, or gs://BUCKET/FOLDER"
        )


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
