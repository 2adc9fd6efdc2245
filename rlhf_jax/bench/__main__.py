"""`python -m rlhf_jax.bench NAME [repeats]`: one JSON line. Names are those of `WORKLOADS` and `COMPARED`.

Names of `PRINTED` compute for chips that are not here, and take arguments of their own.
"""

import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rlhf_jax.bench import plans, scaling
from rlhf_jax.bench.dp import dp
from rlhf_jax.bench.laplace import laplace
from rlhf_jax.bench.memorization import memorization
from rlhf_jax.bench.refill import refill
from rlhf_jax.bench.saves import saves
from rlhf_jax.bench.workloads import WORKLOADS

# Two ways of one thing, in the same run.
COMPARED: dict[str, Callable[[int], dict[str, Any]]] = {
    "dp": dp,
    "laplace": laplace,
    "memorization": memorization,
    "refill": refill,
    "saves": saves,
}
# Arguments -> the exit status.
PRINTED: dict[str, Callable[[Sequence[str]], int]] = {"plans": plans.main, "scaling": scaling.main}


def main(argv: list[str]) -> int:
    """Runs one workload; returns the exit status."""
    if len(argv) < 2 or argv[1] not in (*WORKLOADS, *COMPARED, *PRINTED):
        print(f"error: name a workload: {', '.join((*WORKLOADS, *COMPARED, *PRINTED))}", file=sys.stderr)
        return 2
    if argv[1] in PRINTED:
        return PRINTED[argv[1]](argv[2:])
    repeats = int(argv[2]) if len(argv) > 2 else 8
    if argv[1] in COMPARED:
        found = COMPARED[argv[1]](repeats)
        print(json.dumps({"workload": argv[1], "device": jax.devices()[0].device_kind, **found}))
        return 0
    out = WORKLOADS[argv[1]](repeats)
    seconds = statistics.median(out["seconds_all"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:  # accelerators report their own memory
        peak = stats["peak_bytes_in_use"] / 2**20
    line = {
        "workload": argv[1],
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "seconds_all": out["seconds_all"],
        "tokens_per_second": out["tokens"] / seconds,
        "peak_memory_mib": peak,
    } | {name: out[name] for name in ("parts", "roofline") if name in out}
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
