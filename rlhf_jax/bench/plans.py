"""The jobs of `configs/pod.py` on the smallest slice that each fits: a table, every program compiled with libtpu.

    python -m rlhf_jax.bench plans runs/plans [MODEL[,JOB]] ...

compiles here, without a TPU, and keeps what it finds in the folder: the next call reads it from there. A slice on which
a job would need `HOPELESS` times what a chip has, by `stages.footprint`, is passed by.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_jax.distributed.chips import GIB, chip_of
from rlhf_jax.distributed.topology import topology_devices, use_cpu_and_libtpu
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.stages.abstract import Abstract
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.footprint import Footprint, of_stage
from rlhf_jax.stages.topology_plan import StagePlan, plan_stage
from rlhf_jax.training.artifacts import checkpoint_config, computed

V5E = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
V5P = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4")
# Model -> (slices to try, smallest first; over how many chips a policy's decoding shards its weights).
SLICES: dict[str, tuple[tuple[str, ...], int]] = {
    "gemma-2-2b": (V5E, 1),
    "qwen-2.5-7b": (V5E, 4),
    "llama-3.1-8b": (V5E, 4),
    "gemma-2-9b": (V5E, 4),
    "llama-3.1-70b": (V5P, 8),
}
HOPELESS = 1.25  # closed forms were within 15 % of every compiled plan
LAST = {"sft": "sft", "private_sft": "private_sft", "ppo_lora": "ppo", "ppo_full": "ppo", "safe_rlhf": "ppo"}


def pod_configs() -> ModuleType:
    path = Path(__file__).parents[2] / "configs" / "pod.py"
    spec = importlib.util.spec_from_file_location("pod_configs", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"{path}: not there; run this from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predict(configs: ModuleType, job: str, shape: TransformerConfig, sizes: dict[str, int]) -> Footprint:
    """The closed forms of a job of `configs/pod.py` on a mesh of these sizes."""
    config = configs.get_config(f"a model,{job},{sizes['data'] * sizes['fsdp']},{sizes['tensor']}")
    stage = config.stages[LAST[job]]
    return of_stage(stage, computed(shape, stage.compute), sizes, LoraConfig.of(stage.lora))


def mesh_of(model: str, job: str, devices: int) -> dict[str, int]:
    """The sizes of the mesh that a job has on so many chips."""
    tensor = min(SLICES[model][1], devices) if LAST[job] == "ppo" else 1
    return {"data": 1, "fsdp": devices // tensor, "tensor": tensor}


def plan_job(configs: ModuleType, model: str, job: str, topology: str, folder: Path) -> tuple[StagePlan, Any]:
    """(the plan of a job's last stage on a slice, its mesh); what was found is written to the folder."""
    devices = topology_devices(topology)
    sizes = mesh_of(model, job, len(devices))
    config = configs.get_config(f"{model},{job},{sizes['fsdp']},{sizes['tensor']}")
    contexts = {name: Context(name, config, folder, "", devices=devices) for name in config.stages}
    context = contexts[LAST[job]]
    plan = plan_stage(context, Abstract(contexts, context.mesh()), folder, every=False)
    assert plan is not None
    mesh = context.mesh()
    if len(plan.compiled) == len(plan.programs.programs) and all(one.facts.memory for one in plan.compiled):
        found: dict[str, Any] = {"model": model, "job": job, "topology": topology, "mesh": dict(mesh.shape)}
        found |= {"memory": plan.worst.memory, "program": plan.worst.program.name}
        found["programs"] = {one.program.name: [one.memory, one.seconds] for one in plan.compiled}
        (folder / f"{model},{job},{topology.replace(':', '-')}.plan.json").write_text(json.dumps(found))
    return plan, mesh


def _expected(configs: ModuleType, model: str, job: str, topology: str) -> tuple[float, bool]:
    """Bytes of a chip that a job takes by the closed forms, and whether compiling it can be spared."""
    devices = topology_devices(topology)
    chip, shape = chip_of(devices[0].device_kind), checkpoint_config(configs.MODELS / model)
    expected = predict(configs, job, shape, mesh_of(model, job, len(devices))).memory
    return expected, chip is not None and expected > HOPELESS * chip.memory


def _row(model: str, job: str, topology: str, plan: StagePlan, mesh: Any) -> str:
    worst, chip, least = plan.worst, plan.chip, plan.time
    updates = [one for one in plan.compiled if one.program.name in ("step", "update")][0]
    axes = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1) or "1 chip"
    parts = ", ".join(f"{one.program.name} {one.time:.2g} {one.bound}" for one in plan.compiled)
    return (
        f"| {model} | {job} | {topology} ({axes}) | {worst.memory / GIB:.1f} of {chip.memory / GIB:.1f} "
        f"({worst.program.name}; kept {plan.resident / GIB:.1f}) | {least:.3g} s ({parts}) | {updates.mfu:.0%} |"
    )


def _wanted(models: Sequence[str], jobs: Sequence[str], filters: Sequence[str]) -> Iterator[tuple[str, str]]:
    for entry in filters or models:
        model, _, job = entry.partition(",")
        if model not in models or (job and job not in jobs):
            raise UserError(
                f'"{entry}" is no MODEL or MODEL,JOB: models are {", ".join(models)}, jobs {", ".join(jobs)}'
            )
        yield from ((model, name) for name in ([job] if job else jobs))


def main(arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    try:
        use_cpu_and_libtpu()
        configs = pod_configs()
        folder = Path(arguments[0] if arguments else "runs/plans")
        wanted = list(_wanted(list(SLICES), configs.JOBS, arguments[1:]))
        print("| model | job | smallest slice (mesh) | GiB a chip | at least, by program and bound | MFU at most |")
        print("|---|---|---|---|---|---|", flush=True)
        for model, job in wanted:
            for topology in SLICES[model][0]:
                expected, hopeless = _expected(configs, model, job, topology)
                if hopeless:
                    print(f"{model} {job} {topology}: about {expected / GIB:.0f} GiB", file=sys.stderr, flush=True)
                    continue
                plan, mesh = plan_job(configs, model, job, topology, folder)
                if plan.fits:
                    print(_row(model, job, topology, plan, mesh), flush=True)
                    break
                most = plan.worst.memory if plan.compiled else plan.resident
                print(f"{model} {job} {topology}: {most / GIB:.1f} GiB do not fit", file=sys.stderr, flush=True)
            else:
                print(f"| {model} | {job} | none of these | | | |", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
