"""What a score's variance costs: `score_moments` over `last_scores` of workload W with adapters of rank 8."""

import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.bench.dp import in_turns
from rlhf_jax.bench.workloads import workload_w
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.uncertainty.jacobians import uncertain
from rlhf_jax.uncertainty.posterior import Kronecker, Posterior
from rlhf_jax.uncertainty.predictive import score_moments

ROWS, LENGTH = 8, 128


def laplace(repeats: int, config: TransformerConfig | None = None) -> dict[str, Any]:
    """Seconds over those of the scores alone, 8 rows of 128 tokens: whole factors, of rank 32, the head alone."""
    spec = RoleSpec(config or workload_w(), LoraConfig(8))
    weights = {"base": jax.jit(partial(init_base, spec.config))(key=jax.random.key(0))}
    weights["adapters"] = init_adapters(spec.config, LoraConfig(8), key=jax.random.key(1))
    weights["head"] = init_head(spec.config.width, 0.05, key=jax.random.key(2))
    ids = np.random.default_rng(0).integers(3, spec.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    rows = jnp.asarray(ids), jnp.full((ROWS,), LENGTH, jnp.int32)
    plain = jax.jit(partial(last_scores, spec)).lower(weights, *rows).compile()
    whole = posterior_like(weights, 0)
    cases = {"whole": whole, "rank_32": posterior_like(weights, 32), "head": posterior_like(weights, 0, "head")}
    out = {}
    for name, posterior in cases.items():
        program = jax.jit(partial(score_moments, spec)).lower(weights, posterior, *rows).compile()
        calls = [partial(plain, weights, *rows), partial(program, weights, posterior, *rows)]
        seconds = in_turns(calls, (), repeats)
        ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
        out[name] = {"seconds": ratio, "seconds_all": seconds}
    return out


def posterior_like(weights: Any, rank: int, scope: str = "all") -> Posterior:
    """A posterior of the weights' shapes with nothing in it."""
    factors = {}
    for name, block in uncertain(weights, scope, 1.0).items():
        layers, d, r = block.shape
        n = min(rank or d, d)
        large, small = jnp.broadcast_to(jnp.eye(d, n), (layers, d, n)), jnp.broadcast_to(jnp.eye(r), (layers, r, r))
        factors[name] = Kronecker(large, small, jnp.ones((layers, n, r)))
    precision = {name: jnp.ones(factor.curvature.shape[0]) for name, factor in factors.items()}
    one = jnp.ones(())
    return Posterior(factors, precision, one, one, one, scope)
