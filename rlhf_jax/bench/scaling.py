"""Step time and memory from 8 to 8,192 chips and from 1B to 405B, by `stages.footprint`, against compiled programs.

    python -m rlhf_jax.bench scaling runs/plans scaling.png

draws the jobs of `configs/pod.py` with as many rows a chip at any number of chips, and checks the formulas against
every plan that `bench plans` has compiled into the folder.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rlhf_jax.bench.plans import LAST, pod_configs, predict
from rlhf_jax.distributed.chips import GIB, V5P
from rlhf_jax.distributed.topology import use_cpu_and_libtpu
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.reporting.plots import PALETTE, STYLE
from rlhf_jax.training.artifacts import checkpoint_config

CHIPS = tuple(2**n for n in range(3, 14))
TICKS = (8, 64, 512, 4096)
SHARDED = 512  # chips that share one copy of the weights; more of them are `data`, whose network is taken as fast
# Llama 3.1 and 3.2 by their published config.json.
LLAMA = partial(TransformerConfig, vocab_size=128256, head_dim=128, kv_heads=8, rope_theta=500000.0)
SHAPES = {
    "1B": LLAMA(head_dim=64, layers=16, width=2048, heads=32, ffn=8192, tie_embeddings=True),
    "3B": LLAMA(layers=28, width=3072, heads=24, ffn=8192, tie_embeddings=True),
    "8B": LLAMA(layers=32, width=4096, heads=32, ffn=14336, tie_embeddings=False),
    "70B": LLAMA(layers=80, width=8192, heads=64, ffn=28672, tie_embeddings=False),
    "405B": LLAMA(layers=126, width=16384, heads=128, ffn=53248, tie_embeddings=False),
}


def sizes_of(shape: TransformerConfig, job: str, chips: int) -> dict[str, int]:
    """The mesh: a policy's decoding shards its weights until they take a quarter of a chip, at most 8 ways."""
    tensor = 1
    while LAST[job] == "ppo" and tensor < 8 and 2 * shape.parameters / tensor > V5P.memory / 4:
        tensor *= 2
    fsdp = min(chips // tensor, SHARDED // tensor)
    return {"data": chips // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def checks(configs: ModuleType, folder: Path) -> Iterator[dict[str, Any]]:
    """Predicted against compiled memory of every plan in the folder."""
    for path in sorted(folder.glob("*,*,*.plan.json")):
        found = json.loads(path.read_text())
        shape = checkpoint_config(configs.MODELS / found["model"])
        predicted = predict(configs, found["job"], shape, found["mesh"])
        yield found | {"predicted": predicted.memory, "off": predicted.memory / found["memory"] - 1}


def draw(configs: ModuleType, compiled: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory above, step time below, a column a job; filled points are compiled programs of that chip."""
    jobs = configs.JOBS
    with rc_context(STYLE | {"figure.facecolor": "white"}):
        figure = Figure(figsize=(3.0 * len(jobs), 5.6))
        rows = figure.subplots(2, len(jobs), sharex=True, sharey="row")
        for column, job in enumerate(jobs):
            memory, seconds = rows[0][column], rows[1][column]
            for color, (name, shape) in zip(PALETTE, SHAPES.items(), strict=False):
                found = [(n, predict(configs, job, shape, sizes_of(shape, job, n))) for n in CHIPS]
                memory.plot(CHIPS, [one.memory / GIB for _, one in found], color=color, label=name)
                fitting = [(n, one) for n, one in found if one.memory <= V5P.memory]
                times = [sum(p.seconds(V5P, n) for p in one.programs) for n, one in fitting]
                seconds.plot([n for n, _ in fitting], times, color=color)
            memory.axhline(V5P.memory / GIB, color="black", linewidth=0.9, linestyle="--")
            memory.set_title(job)
            seconds.set_xlabel("v5p chips")
            for axes in (memory, seconds):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(TICKS, [f"{n:,}" for n in TICKS])
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for one in compiled:
            if one["topology"].startswith("v5p"):
                axes = rows[0][jobs.index(one["job"])]
                axes.plot(math.prod(one["mesh"].values()), one["memory"] / GIB, "o", color="black")
        rows[0][0].set_ylabel("GiB a chip; dashed: it has")
        rows[1][0].set_ylabel("seconds a step, at least")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), title="same rows a chip")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    """Prints the checks and draws the plot; returns the exit status."""
    use_cpu_and_libtpu()
    configs = pod_configs()
    folder = Path(arguments[0] if arguments else "runs/plans")
    path = Path(arguments[1] if len(arguments) > 1 else folder / "scaling.png")
    compiled = list(checks(configs, folder))
    for one in compiled:
        print(
            f"{one['model']} {one['job']} {one['topology']}: predicted {one['predicted'] / GIB:.2f} GiB, compiled "
            f"{one['memory'] / GIB:.2f}: {one['off']:+.1%}"
        )
    if compiled:
        within = sum(abs(one["off"]) <= 0.15 for one in compiled)
        print(f"{within} of {len(compiled)} within 15 %")
    draw(configs, compiled, path)
    print(path)
    return 0
