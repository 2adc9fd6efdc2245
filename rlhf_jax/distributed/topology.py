"""TPU slices that are not here: their devices, for programs that are compiled ahead of time on this CPU."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from rlhf_jax.errors import UserError

# Generation -> libtpu's name of it, and how many dimensions its torus has.
GENERATIONS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5", 3), "v6e": ("v6e", 2)}


def use_cpu_and_libtpu() -> None:
    """Before JAX makes its first array: this process's own device is its CPU, and libtpu looks for no chips.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--topology compiles with libtpu, which is not installed: pip install "rlhf_jax[tpu]"')
    os.environ.pop("XLA_FLAGS", None)  # libtpu refuses those of other platforms
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what it holds has no text: see `topology_plan`


def topology_devices(name: str) -> list[Any]:
    """The devices of "v5e:4x4", "v5p:4x4x4", or of several slices, "2*v5e:16x16".

    Raises:
      UserError: no such topology.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(v\w+):(\d+(?:x\d+){1,2})", name)
    generation = match.group(2) if match else ""
    if match is None or generation not in GENERATIONS or match.group(3).count("x") + 1 != GENERATIONS[generation][1]:
        raise UserError(
            f'--topology={name}: give GENERATION:AxB (of v4 and v5p AxBxC), as "v5e:4x4", "v5p:4x4x4" or, of two '
            f'slices, "2*v6e:16x16"; generations are {", ".join(GENERATIONS)}'
        )
    slices = {"num_slices": int(match.group(1))} if match.group(1) else {}
    try:
        found = topologies.get_topology_desc(f"{GENERATIONS[generation][0]}:{match.group(3)}", "tpu", **slices)
    except Exception as error:  # whatever libtpu makes of a shape it does not have
        raise UserError(f"--topology={name}: libtpu has no such slice ({str(error).splitlines()[0][:120]})") from error
    return list(found.devices)
