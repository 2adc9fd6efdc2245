"""The compilers' flags that matter, of every platform in one place; set before JAX starts, where the user has not.

A TPU's go to LIBTPU_INIT_ARGS, which other platforms do not read, a GPU's to XLA_FLAGS, which libtpu would refuse.
"""

import glob
import os
from collections.abc import MutableMapping

Environment = MutableMapping[str, str]

# Collectives run beside matrix products: what fsdp gathers for the next layer hides behind this one's.
TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Gradients that only `data` replicates are reduced between slices while the backward pass goes on.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_highest_priority_async_stream": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_all_gather_combine_threshold_bytes": "134217728",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "134217728",
}
# Sums in one order, kernels chosen without timing them: the same bits in every run, at some cost in speed. A TPU's
# programs are deterministic as they are.
DETERMINISTIC_GPU = {"xla_gpu_deterministic_ops": "true"}

THREADS_A_DEVICE = 4  # of a CPU that stands for several devices


def add(environment: Environment, variable: str, flags: dict[str, str]) -> None:
    """Puts flags into a variable, those that it has already left as they are."""
    given = environment.get(variable, "")
    names = {word.lstrip("-").partition("=")[0] for word in given.split()}
    new = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    environment[variable] = " ".join([*given.split(), *new])


def has_gpu(environment: Environment) -> bool:
    """Whether JAX will run on NVIDIA GPUs, as far as can be told without it."""
    wanted = environment.get("JAX_PLATFORMS", "")
    return bool(glob.glob("/dev/nvidia[0-9]*")) and (not wanted or "cuda" in wanted or "gpu" in wanted)


def prepare(environment: Environment, *, deterministic: bool = False, memory_fraction: float = 0.0) -> None:
    """Sets what the platforms take from the environment.

    Args:
      deterministic: the same bits in every run on a GPU.
      memory_fraction: of a GPU's memory that is taken at the start; 0 leaves JAX's own 0.75.
    """
    add(environment, "LIBTPU_INIT_ARGS", TPU)
    if has_gpu(environment):
        add(environment, "XLA_FLAGS", GPU | (DETERMINISTIC_GPU if deterministic else {}))
    devices = environment.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdigit() and int(devices) > 1:
        # Of many programs under way one waits to be launched on a thread and one for another device's part in a sum;
        # with a thread for each core alone none may be left for that part, and all wait for ever.
        environment.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_A_DEVICE * int(devices))))
    if memory_fraction:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory_fraction)
