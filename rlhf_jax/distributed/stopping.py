"""Asking a run to save and stop: by a signal, or by a notice that the machine is about to be taken away."""

import contextlib
import os
import signal
import sys
import threading
import time
import urllib.request
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

POLL, PATIENCE = 5.0, 5.0  # seconds between two looks for a notice, and of waiting for an answer
METADATA = {"instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "instance/preempted": "TRUE"}
_asked = {"why": ""}


def ask(why: str) -> None:
    """Asks this process, and through it all others, to save and stop."""
    _asked["why"] = _asked["why"] or why


def catch_signals() -> None:
    """From here on SIGTERM and SIGINT ask to save and stop; a second one ends the process at once."""

    def caught(number: int, _frame: Any) -> None:
        ask(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, caught)


def _notice(host: str) -> str:
    """What the metadata server of a Google machine says of its end; "" for nothing, or no server."""
    for path, bad in METADATA.items():
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/{path}", headers={"Metadata-Flavor": "Google"}
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            if answer.read().decode().strip() == bad:
                return f"{path} is {bad}"
    return ""


def watch_machine(cluster: str) -> None:
    """Follows the metadata server of a Cloud TPU machine (or of `GCE_METADATA_HOST`): its notice asks to stop."""
    host = os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if cluster == "tpu" else "")
    if not host:
        return

    def follow() -> None:
        while not _asked["why"]:
            found = _notice(host)
            if found:
                print(f"{found}: saving, to stop", file=sys.stderr, flush=True)
                ask(found)
            time.sleep(POLL)

    threading.Thread(target=follow, name="maintenance", daemon=True).start()


def stop_requested() -> bool:
    """True once any process was asked to stop. All have to call it together: it is a collective."""
    if jax.process_count() == 1:
        return bool(_asked["why"])
    return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(_asked["why"])))))


def stops_after(loop: str, iteration: int, ahead: int) -> bool:
    """Whether a loop ends after this iteration: the same one in every process, soon after any was asked.

    No collective, so the device never waits for it: the first one asked writes the iteration to the coordinator's
    store. A process that has been through `iteration` with at most `ahead` unfinished ones behind it knows that every
    other has begun `iteration - ahead`, and thus has been here after the one before that: what is written after
    iteration i is read by all after iteration i + ahead + 1.

    Args:
      loop: a name that no other loop of the run has.
      iteration: the one that has been asked of the device last.
      ahead: iterations that may be unfinished on the device.
    """
    if jax.process_count() == 1:
        return bool(_asked["why"])
    from jax._src import distributed  # as in `processes`

    store: Any = distributed.global_state.client
    key = f"rlhf_jax/stop/{loop}/"
    found = store.key_value_dir_get(key)
    if not found and _asked["why"]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was faster
            store.key_value_set(f"{key}iteration", str(iteration + ahead + 1))
        found = store.key_value_dir_get(key)
    return bool(found) and iteration >= int(found[0][1])
