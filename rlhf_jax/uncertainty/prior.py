"""The prior's precision by the evidence: how well the model explains its data, less what its complexity costs.

    log p(data) = log-likelihood - 1/2 [log det(H + precision) - log det(precision) + precision |theta|^2]

as Laplace's approximation has it (MacKay 1992), theta the uncertain weights. With c the eigenvalues of H the difference
of the determinants is sum log(1 + c / precision). Each group of blocks has a sum of its own, so its precision is found
alone; in the logarithm of the precision every group's share is concave.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts load where they are first used

GRID = np.logspace(-6, 8, 57)  # precisions


class Group(NamedTuple):
    """What of a group of weights the evidence reads: curvatures of H in float64, and |theta|^2."""

    curvature: np.ndarray
    norm: float


def share(group: Group, precision: float) -> float:
    """The group's part of the log evidence: what the likelihood adds is left out."""
    determinant = np.log1p(group.curvature / precision).sum()
    return float(-0.5 * (determinant + precision * group.norm))


def log_evidence(log_likelihood: float, groups: Mapping[Any, Group], precision: Mapping[Any, float]) -> float:
    """The log evidence, in nats, of a precision for each group."""
    return log_likelihood + sum(share(group, precision[name]) for name, group in groups.items())


def maximize(group: Group) -> float:
    """The precision of the most evidence: the best of `GRID`, then Brent's method between its neighbours."""
    values = np.asarray([share(group, precision) for precision in GRID])
    best = int(values.argmax())
    bounds = np.log(GRID[max(best - 1, 0)]), np.log(GRID[min(best + 1, len(GRID) - 1)])
    found = scipy.optimize.minimize_scalar(lambda x: -share(group, float(np.exp(x))), bounds=bounds, method="bounded")
    precision = float(np.exp(found.x))
    return precision if share(group, precision) > values[best] else float(GRID[best])


def merged(groups: Mapping[Any, Group]) -> Group:
    """All groups as one."""
    curvature = np.concatenate([group.curvature.ravel() for group in groups.values()])
    return Group(curvature, sum(group.norm for group in groups.values()))


def curve(log_likelihood: float, group: Group) -> list[dict[str, float]]:
    """Log evidence over one precision for all: [{"precision", "evidence"}]."""
    return [{"precision": float(x), "evidence": log_likelihood + share(group, x)} for x in GRID]
