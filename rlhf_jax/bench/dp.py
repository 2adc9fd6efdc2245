"""What clipping each unit's gradient costs: private steps of workload W over plain ones of the same physical batch.

FLOPs and memory are the compiler's own figures. XLA counts a loop's body once, so FLOPs are counted with all loops
unrolled; they are those of the gradient, and so are memory and seconds: noise and optimizer are left out on both sides.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.bench.workloads import workload_w
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import layer_leaves
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base, split
from rlhf_jax.objectives import language_model
from rlhf_jax.privacy.clipping import clipped_sum
from rlhf_jax.training.gradient import plain_gradient
from rlhf_jax.training.language_model import sft_objective


class Case(NamedTuple):
    """A setting: what trains, how, and on how many rows of how many tokens."""

    backend: str
    rows: int
    length: int
    remat: str = "none"
    lora: LoraConfig | None = None


PAPER = LoraConfig(rank=4, targets=("q", "v"))  # Wu et al., 2310.16960
CASES = {
    "lora_128": Case("adapters", 8, 128, lora=PAPER),
    "full_128": Case("bookkeeping", 8, 128),
    "full_512": Case("bookkeeping", 4, 512),
    "remat_128": Case("ghost", 8, 128, remat="full"),
    "remat_512": Case("ghost", 4, 512, remat="full"),
}


def dp(repeats: int, cases: dict[str, Case] | None = None, config: TransformerConfig | None = None) -> dict[str, Any]:
    """Ratios private / plain of every case.

    `flops` beside its exact `flops_limit` (`flops_limit`) and, of the plain gradient, the counted over the analytic
    FLOPs (`plain_flops`); `memory`: temporary memory; `seconds`: the medians of `repeats` calls, taken in turns.
    """
    config = config or workload_w()
    return {
        name: _ratios(dataclasses.replace(config, remat=case.remat), case, repeats)
        for name, case in (cases or CASES).items()
    }


def _ratios(config: TransformerConfig, case: Case, repeats: int) -> dict[str, Any]:
    steps, inputs = (plain_step(config, case), private_step(config, case)), _inputs(config, case)
    with unrolled():
        plain, private = (_compiled(step, inputs).cost_analysis()["flops"] for step in steps)
    compiled = [_compiled(step, inputs) for step in steps]
    memory = [program.memory_analysis().temp_size_in_bytes for program in compiled]
    seconds = in_turns(compiled, inputs, repeats)
    return {
        "flops": private / plain,
        "flops_limit": flops_limit(config, case),
        "plain_flops": plain / plain_flops(config, case),
        "memory": memory[1] / memory[0],
        "plain_memory_mib": memory[0] / 2**20,
        "seconds": statistics.median(seconds[1]) / statistics.median(seconds[0]),
        "seconds_all": seconds,
    }


def _compiled(step: Callable[..., Any], inputs: Any) -> Any:
    return jax.jit(step).lower(*inputs).compile()


def _objective(config: TransformerConfig, case: Case) -> Any:
    return sft_objective(RoleSpec(config, case.lora), 1)


def plain_step(config: TransformerConfig, case: Case) -> Callable[..., Any]:
    """(trainable, frozen, batch) -> the plain gradient."""
    gradient = plain_gradient(_objective(config, case))
    return lambda trainable, frozen, batch: gradient(trainable, frozen, batch)[0]


def private_step(config: TransformerConfig, case: Case) -> Callable[..., Any]:
    """(trainable, frozen, batch) -> the clipped sum; each row is a unit, all are present."""
    summed = clipped_sum(_objective(config, case), 1.0, backend=case.backend)
    return lambda trainable, frozen, batch: summed(trainable, frozen, batch, jnp.ones(case.rows, bool)).total


def _inputs(config: TransformerConfig, case: Case) -> tuple[Any, Any, dict[str, jax.Array]]:
    weights = {"base": jax.jit(partial(init_base, config))(key=jax.random.key(0))}
    if case.lora:
        weights["adapters"] = init_adapters(config, case.lora, key=jax.random.key(1))
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (case.rows, case.length + 1)).astype(np.int32)
    ones = np.ones((case.rows, case.length), np.int32)
    positions = np.tile(np.arange(case.length, dtype=np.int32), (case.rows, 1))
    batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], segment_ids=ones, positions=positions)
    batch["loss_mask"] = ones.astype(np.float32)
    return *split(RoleSpec(config, case.lora), weights), jax.device_put(batch)


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """While it lasts, loops are traced unrolled and logits at once: XLA then counts every iteration.

    It also merges the logits that a backward pass makes again with those of the forward pass, which a loop does not.
    """
    scan = jax.lax.scan

    def whole(f: Any, init: Any, xs: Any = None, length: int | None = None, **_: Any) -> Any:
        return scan(f, init, xs, length, unroll=True)

    with mock.patch.object(jax.lax, "scan", whole), mock.patch.object(language_model, "LOGITS_AT_ONCE", 1 << 60):
        yield
    jax.clear_caches()  # a trace made here would serve the same function later


def in_turns(compiled: list[Any], inputs: Any, repeats: int) -> list[list[float]]:
    """Seconds of each program's calls; the programs alternate, so that what else runs meets all alike."""
    seconds: list[list[float]] = [[] for _ in compiled]
    for turn in range(1 + repeats):
        for times, program in zip(seconds, compiled, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


def _products(config: TransformerConfig) -> list[tuple[int, int]]:
    """(d_in, d_out) of every product of a token with a kernel, the output's last."""
    layer = [leaf.shape for leaf in layer_leaves(config).values() if len(leaf.shape) == 2]
    return [(d_in, d_out) for d_in, d_out in layer * config.layers] + [(config.width, config.vocab_size)]


def _attention(config: TransformerConfig, length: int) -> int:
    """FLOPs a token of attention's two products, masked scores included."""
    return 4 * config.layers * config.heads * config.head_dim * length


def plain_flops(config: TransformerConfig, case: Case) -> float:
    """Analytic FLOPs of the plain gradient: products alone.

    Each is forward one product and backward two, or one for a frozen kernel; with remat all of a layer up to its last
    product is made again.
    """
    *layers, (width, vocab) = _products(config)
    attention, output = _attention(config, case.length), 2 * width * vocab
    inner = sum(2 * d_in * d_out for d_in, d_out in layers)
    again = inner - 2 * config.layers * config.ffn * width + attention if case.remat == "full" else 0
    passes = 2 if case.lora else 3
    total = passes * inner + 3 * attention + passes * output + again
    if case.lora:
        shapes = [leaf.shape for name, leaf in layer_leaves(config).items() if name in case.lora.targets]
        total += config.layers * sum(3 * 2 * case.lora.rank * (d_in + d_out) for d_in, d_out in shapes)
    return case.rows * case.length * total


def flops_limit(config: TransformerConfig, case: Case) -> float:
    """The least that exact clipping of whole gradients costs in one pass, over a plain step of three products a kernel.

    With adapters 1. In full training each kernel's norms cost the lesser of Gram matrices and of the gradients' own
    product: 1 + sum min(1, T (d_in + d_out) / (d_in d_out)) d_in d_out / (3 (sum d_in d_out + attention)).
    """
    if case.lora:
        return 1.0
    products = _products(config)
    norms = sum(min(d_in * d_out, case.length * (d_in + d_out)) for d_in, d_out in products)
    plain = sum(d_in * d_out for d_in, d_out in products) + _attention(config, case.length) / 2
    return 1.0 + norms / (3 * plain)
