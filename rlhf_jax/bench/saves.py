"""What a checkpoint costs the loop: the state of workload `sft`, saved in the background of its steps."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.bench import workloads
from rlhf_jax.training.checkpoints import Checkpoints

WARM_UP = 2


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def saves(repeats: int) -> dict[str, Any]:
    """Saves of weights and AdamW's moments to the temporary folder's disk; steps donate what is being saved.

    Returns:
      {"mib": of a checkpoint, "seconds": {"save": until the call returns, "step": a step alone, "step_beside": the step
      right after that call, "whole": a save that is waited for} (medians), "stall": what a save adds to the loop, the
      median of save + step_beside - step, "seconds_all"}.
    """
    box, step = workloads.sft_steps()
    found: dict[str, list[float]] = {name: [] for name in ("step", "save", "step_beside", "whole")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "sft" / "checkpoints", keep=1, identity="bench")

        def save_and_wait(index: int) -> None:
            checkpoints.save(index, box[0], {})
            checkpoints.wait()

        for i in range(repeats + WARM_UP):
            found["step"].append(_seconds(step, i))
            found["save"].append(_seconds(checkpoints.save, 2 * i, box[0], {}))
            found["step_beside"].append(_seconds(step, i))
            checkpoints.wait()
            found["whole"].append(_seconds(save_and_wait, 2 * i + 1))
        checkpoints.close()
    timed = {name: seconds[WARM_UP:] for name, seconds in found.items()}
    stalls = [save + beside - alone for alone, save, beside, _ in zip(*timed.values(), strict=True)]
    return {
        "mib": sum(leaf.nbytes for leaf in jax.tree.leaves(box[0])) / 2**20,
        "seconds": {name: statistics.median(seconds) for name, seconds in timed.items()},
        "stall": statistics.median(stalls),
        "seconds_all": timed,
    }
