"""Fitting the posterior's curvature to the training data: passes on the device, then float64 on the host."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.uncertainty import curvature as sums
from rlhf_jax.uncertainty.dual import check_size, dual
from rlhf_jax.uncertainty.jacobians import HEAD, Blocks, uncertain
from rlhf_jax.uncertainty.kronecker import factorize
from rlhf_jax.uncertainty.posterior import Diagonal, Dual, Kronecker
from rlhf_jax.uncertainty.prior import Group, merged

OVERSAMPLING = 10  # columns of a sketch beyond the rank that is kept
Batches = Callable[[], Iterable[dict[str, jax.Array]]]  # every call goes over the training data once


class Curvature(NamedTuple):
    """What the training data say of the weights at their mean.

    Attributes:
      factors: as `Posterior.factors`.
      eigenvalues: of H, float64: {block: (layers, n, r)}, of a `Dual` (n,).
      norms: {block: (layers,)}, |theta|^2 of the uncertain weights.
      log_likelihood: nats.
      slope: {block: (layers, d, r)}, the log-likelihood's gradient.
      mean: {block: (layers, d, r)}, the uncertain weights.
      notes: what had to be mended.
    """

    factors: Any
    eigenvalues: Any
    norms: dict[str, np.ndarray]
    log_likelihood: float
    slope: Blocks
    mean: Blocks
    notes: list[str]


def fit(
    spec: RoleSpec,
    weights: Weights,
    batches: Batches,
    *,
    records: int,
    scope: str,
    structure: str,
    factors: str,
    corrected: bool,
    rank: int,
    scale: float,
    key: jax.Array,
) -> Curvature:
    """The curvature of the log-likelihood at `weights`.

    Args:
      batches: of the training data, as `curvature` reads them, all of one shape; last ones filled up with weight 0.
      records: how many they hold.
      scope: "all" or "head"; structure: "kronecker", "diagonal" or "dual"; factors: "tokens" or "records".
      corrected: a second pass fits the Kronecker factors' eigenvalues.
      rank: of the large factors; 0: all of it.
      scale: what the head's kernel was divided by after training.
      key: of the sketches.

    Raises:
      UserError: sums that are not finite, or a dual that is too large.
    """
    mean = fetch(uncertain(weights, scope, scale))
    notes: list[str] = []
    found: Any
    eigenvalues: Any
    if structure == "dual":
        found, eigenvalues, totals = _dual(spec, weights, batches, records, scope, scale, mean)
    elif structure == "diagonal":
        totals = _total(partial(sums.squares, spec, scope, scale, weights), batches)
        found = {name: Diagonal(jnp.asarray(x)) for name, x in totals["squares"].items()}
        eigenvalues = _float64(totals["squares"])
    else:
        sketches = make_sketches(mean, rank, key=key)
        by_tokens = factors == "tokens" and scope == "all"
        step: Any = partial(sums.record_moments, spec, scope)
        if by_tokens:
            step = partial(sums.token_moments, spec)
        totals = _total(partial(step, scale, sketches, weights), batches)
        found, eigenvalues = _kronecker(totals, sketches, rank, by_tokens, notes)
        if corrected:
            fitted = _total(partial(sums.corrected_squares, spec, scope, scale, found, weights), batches)
            eigenvalues = _float64(fitted)
            found = {name: factor._replace(curvature=jnp.asarray(fitted[name])) for name, factor in found.items()}
    norms = {name: np.square(x.astype(np.float64)).sum((1, 2)) for name, x in mean.items()}
    return Curvature(found, eigenvalues, norms, float(totals["log_likelihood"]), totals["slope"], mean, notes)


def _float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _total(step: Callable[..., Any], batches: Batches) -> Any:
    """The sum of what `step` makes of every batch, on the host."""
    add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
    total = None
    for batch in batches():
        added = step(batch)
        total = added if total is None else add(total, added)
    return fetch(total)


def make_sketches(blocks: Blocks, rank: int, *, key: jax.Array) -> sums.Sketches:
    """Random orthonormal columns (d, rank + OVERSAMPLING) for the blocks whose large side is wider; None for others."""
    out: sums.Sketches = {}
    for number, (name, block) in enumerate(sorted(blocks.items())):
        d, columns = block.shape[1], rank + OVERSAMPLING
        if not rank or d <= columns:
            out[name] = None
            continue
        normal = np.asarray(jax.random.normal(jax.random.fold_in(key, number), (d, columns)), np.float64)
        out[name] = jnp.asarray(np.linalg.qr(normal)[0], jnp.float32)
    return out


def _kronecker(
    totals: dict[str, Any], sketches: sums.Sketches, rank: int, by_tokens: bool, notes: list[str]
) -> tuple[dict[str, Kronecker], dict[str, np.ndarray]]:
    """Factors and eigenvalues of every block."""
    found, eigenvalues = {}, {}
    for name, (large, small) in totals["moments"].items():
        if by_tokens and name != HEAD:
            divisor = np.full(len(large), float(totals["tokens"]))
        else:  # large (x) small has the trace of H times that
            divisor = np.trace(np.asarray(small, np.float64), axis1=1, axis2=2)
        *sides, values = factorize((large, small), divisor, sketches[name], rank, name, notes)
        found[name] = Kronecker(*(jnp.asarray(x, jnp.float32) for x in (*sides, values)))
        eigenvalues[name] = values
    return found, eigenvalues


def _dual(
    spec: RoleSpec, weights: Weights, batches: Batches, records: int, scope: str, scale: float, mean: Blocks
) -> tuple[Dual, np.ndarray, dict[str, Any]]:
    """The exact factors and eigenvalues."""
    sizes = {name: x.size for name, x in mean.items()}
    rows: list[np.ndarray] = []
    curvatures: list[np.ndarray] = []
    totals: dict[str, Any] = {}
    for batch in batches():
        seen = fetch(sums.term_gradients(spec, scope, scale, weights, batch))
        here, terms = seen["present"] > 0, seen["present"].shape[1]
        check_size(records * terms, sum(sizes.values()))
        rows.append(np.concatenate([seen["gradients"][name][here].reshape(here.sum(), -1) for name in mean], axis=1))
        curvatures.append(seen["curvatures"][here])
        common = {name: seen[name] for name in ("log_likelihood", "slope")}
        totals = jax.tree.map(np.add, totals, common) if totals else common
    basis, eigenvalues = dual(np.concatenate(rows), np.concatenate(curvatures))
    parts = np.split(basis, np.cumsum(list(sizes.values()))[:-1], axis=1)
    named = {name: jnp.asarray(part.reshape(-1, *x.shape)) for (name, x), part in zip(mean.items(), parts, strict=True)}
    return Dual(named, jnp.asarray(eigenvalues, jnp.float32)), eigenvalues, totals


def groups(curvature: Curvature, per_layer: bool) -> dict[Any, Group]:
    """What the evidence reads: of all weights {"all": ...}, or one for each layer's matrices together and the head."""
    if isinstance(curvature.factors, Dual):
        return {"all": Group(curvature.eigenvalues, float(sum(x.sum() for x in curvature.norms.values())))}
    each: dict[Any, dict[str, Group]] = {}
    for name, values in curvature.eigenvalues.items():
        for layer, part in enumerate(values):
            where = HEAD if name == HEAD else layer
            each.setdefault(where, {})[name] = Group(part.ravel(), float(curvature.norms[name][layer]))
    found = {where: merged(parts) for where, parts in each.items()}
    return found if per_layer else {"all": merged(found)}


def joint_gradient(curvature: Curvature, precision: Any) -> dict[str, float]:
    """Norms of the log joint's gradient at the mean, and of its two parts: 0 in all were it the posterior's mode.

    What training pulls the weights by, such as AdamW's decay, is not this prior, so they are no mode of its posterior.

    Args:
      precision: {block: (layers,)}, or () for all.
    """

    def pull(name: str, x: np.ndarray) -> np.ndarray:
        each = np.asarray(precision[name] if isinstance(precision, dict) else precision, np.float64)
        return -x.astype(np.float64) * each.reshape(-1, 1, 1)

    prior = {name: pull(name, x) for name, x in curvature.mean.items()}

    def norm(parts: Iterable[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in parts)))

    return {
        "joint_gradient": norm(np.asarray(curvature.slope[name]) + x for name, x in prior.items()),
        "likelihood_gradient": norm(curvature.slope.values()),
        "prior_gradient": norm(prior.values()),
    }
