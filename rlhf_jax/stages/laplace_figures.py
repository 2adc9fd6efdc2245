"""What a posterior says of held-out records, beside what its subject says alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.order import in_batches
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.evaluation.uncertainty import (
    distance_figures,
    fit_temperature,
    nearest_distances,
    uncertainty_figures,
)
from rlhf_jax.models.roles import member
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.scorer import Rows, place_answers
from rlhf_jax.training.artifacts import Role
from rlhf_jax.uncertainty.jacobians import last_states
from rlhf_jax.uncertainty.posterior import Posterior
from rlhf_jax.uncertainty.predictive import moments_by_precision, score_moments

LARGEST_TRAINING = 4096  # records, spread over all, whose answers distances are measured to


def columns_of(rows: Rows) -> tuple[str, ...]:
    """The columns that the likelihood of rows reads."""
    signs = "labelled" in rows and bool(rows["labelled"].any())
    return ("tokens", "lengths", *(("unsafe", "labelled") if signs else ()))


def tuning(count: int) -> np.ndarray:
    """(count,) bool: the held-out records by which something is chosen; the others are reported."""
    return np.arange(count) % 2 == 0


def _over(rows: Rows, size: int, mesh: Mesh, step: Any) -> list[np.ndarray]:
    """What `step` (batch -> arrays whose last axis is of records) makes of all rows."""
    count, parts = len(rows["lengths"]), []
    for part in in_batches(count, size):
        batch = place_answers(("tokens", "lengths"), rows, part, np.zeros(size, int), mesh)
        parts.append(fetch(step(batch)))
    return [np.concatenate(column, axis=-1)[..., :count].astype(np.float64) for column in zip(*parts, strict=True)]


@partial(jax.jit, static_argnums=0)
def _by_precision(spec: Any, weights: Any, posterior: Posterior, grid: Any, batch: Any) -> Any:
    return moments_by_precision(spec, weights, posterior, grid, batch["tokens"], batch["lengths"])


def moments(
    role: Role, posterior: Posterior, rows: Rows, size: int, mesh: Mesh, grid: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a role that is no ensemble: mean (n,) and, of each of G priors, variance (G, n) of what decides every record,
    in the units of the likelihood; and whether its positive side is true (n,).

    A pair is decided by the difference of its scores, whose positive side is always true, a single answer by its cost.
    """
    step = partial(_by_precision, role.spec, role.weights, posterior, grid)
    mean, variance = _over(rows, size, mesh, step)
    scale = float(posterior.scale)
    single = rows["lengths"].shape[1] == 1
    outcomes = rows["unsafe"][:, 0] if single else np.ones(len(mean), bool)
    return mean * scale, variance * scale**2, outcomes


@partial(jax.jit, static_argnums=0)
def _of_answers(spec: Any, weights: Any, posterior: Posterior, batch: Any) -> Any:
    tokens, lengths = batch["tokens"], batch["lengths"]
    rows = tokens.reshape(-1, tokens.shape[-1])
    _, variance = score_moments(spec, weights, posterior, rows, lengths.reshape(-1))
    states = last_states(spec, weights, tokens, lengths).astype(jnp.float32)
    return jnp.moveaxis(states, 0, -1), variance.reshape(lengths.shape).T


@partial(jax.jit, static_argnums=0)
def _states(spec: Any, weights: Any, batch: Any) -> Any:
    return (jnp.moveaxis(last_states(spec, weights, batch["tokens"], batch["lengths"]).astype(jnp.float32), 0, -1),)


def _points(states: np.ndarray) -> np.ndarray:
    """(A, width, n) -> (n * A, width)."""
    return np.moveaxis(states, -1, 0).reshape(-1, states.shape[1])


def figures(
    context: Context, role: Role, posteriors: Sequence[Posterior], training: Rows, parts: dict[str, Rows], mesh: Mesh
) -> dict[str, Any]:
    """Figures of the held-out records "evaluation" and "shifted": `uncertainty_figures`, and "distance".

    Of an ensemble mean and variance are those of the mixture of its members; distances are between the first member's
    states. A temperature is fitted to every second record of "evaluation", whose others are reported.
    """
    size = context.config.batch_size
    spread = np.linspace(0, len(training["lengths"]) - 1, min(len(training["lengths"]), LARGEST_TRAINING)).astype(int)
    seen = {name: training[name][spread] for name in ("tokens", "lengths")}
    spec, first = member(role.spec, role.weights, 0)
    (known,) = _over(seen, size, mesh, partial(_states, spec, first))
    out: dict[str, Any] = {}
    temperature = 1.0
    laplace_temperature = float(np.mean([float(posterior.temperature) for posterior in posteriors]))
    for part, rows in parts.items():
        means, variances = [], []
        for number, posterior in enumerate(posteriors):
            one = _member_role(role, number)
            single = jax.tree.map(lambda x: x[None], posterior.precision)
            mean, variance, outcomes = moments(one, posterior, rows, size, mesh, single)
            means.append(mean)
            variances.append(variance[0])
        mean, variance = np.mean(means, 0), np.mean(variances, 0) + np.var(means, 0)
        reported = np.ones(len(mean), bool)
        if part == "evaluation" and len(mean) > 1:
            temperature = fit_temperature(mean[tuning(len(mean))], outcomes[tuning(len(mean))])
            reported = ~tuning(len(mean))
        told = uncertainty_figures(
            mean[reported], variance[reported], outcomes[reported], temperature, laplace_temperature
        )
        states, each = _over(rows, size, mesh, partial(_of_answers, spec, first, posteriors[0]))
        distances = nearest_distances(_points(states), _points(known))
        out[part] = {
            **told,
            "map_temperature": temperature,
            "variance_difference": float(variance.mean()),
            "variance_score": float(each.mean()),
            "distance": distance_figures(distances, each.T.reshape(-1)),
        }
    return out


def _member_role(role: Role, number: int) -> Role:
    spec, weights = member(role.spec, role.weights, number)
    return Role(spec, weights, role.tokenizer)
