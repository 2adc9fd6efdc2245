"""Directions and curvatures of Kronecker-factored blocks from their second moments: on the host, in float64."""

from typing import Any

import numpy as np
import scipy.linalg

from rlhf_jax.errors import UserError

# float32 sums of outer products have eigenvalues below 0 by rounding; more than this of the largest is no rounding.
ROUNDING = 1e-4
Notes = list[str]


def eigenbasis(moment: np.ndarray, where: str, notes: Notes) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (d,), descending, none negative, and orthonormal eigenvectors (d, d) of a second moment (d, d).

    One that is not positive semidefinite beyond rounding is shifted until it is, and `notes` say so.

    Raises:
      UserError: it is not finite.
    """
    moment = np.asarray(moment, np.float64)
    if not np.isfinite(moment).all():
        raise UserError(f"the curvature of {where} is not finite: look at the subject's scores, or compute in float32")
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    if values[0] < -ROUNDING * max(values[-1], 0.0):
        notes.append(f"{where}: a factor had the eigenvalue {values[0]:.2g} beside {values[-1]:.2g}: damped by as much")
        values = values - values[0]
    return np.maximum(values, 0.0)[::-1], vectors[:, ::-1]


def nystrom(product: np.ndarray, sketch: np.ndarray, rank: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The best rank-`rank` part of the Nystroem approximation of a positive semidefinite C (d, d).

    Algorithm 3 of Tropp et al., arXiv 1706.05736, with a shift of the size of float32's rounding.

    Args:
      product: C times the sketch (d, m); sketch: (d, m), orthonormal columns.

    Returns:
      Eigenvalues (rank,), descending, and orthonormal eigenvectors (d, rank).
    """
    product, sketch = np.asarray(product, np.float64), np.asarray(sketch, np.float64)
    if not np.isfinite(product).all():
        raise UserError(f"the curvature of {where} is not finite: look at the subject's scores, or compute in float32")
    size = np.linalg.norm(product, 2)
    if size == 0.0:
        return np.zeros(rank), sketch[:, :rank]
    shift = np.sqrt(len(product)) * np.finfo(np.float32).eps * size
    shifted = product + shift * sketch
    core = sketch.T @ shifted
    while True:  # float32 sums may be further from semidefinite than their rounding: then the shift grows
        try:
            upper = np.linalg.cholesky((core + core.T) / 2).T
            break
        except np.linalg.LinAlgError:
            shifted, shift = shifted + 9 * shift * sketch, 10 * shift
            core = sketch.T @ shifted
    vectors, roots, _ = np.linalg.svd(scipy.linalg.solve_triangular(upper, shifted.T, trans="T").T, full_matrices=False)
    return np.maximum(np.square(roots[:rank]) - shift, 0.0), vectors[:, :rank]


def factorize(
    moments: tuple[np.ndarray, np.ndarray], divisor: np.ndarray, sketch: Any, rank: int, name: str, notes: Notes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions and curvatures of a block whose H is large (x) small / divisor in each layer.

    Args:
      moments: large (layers, d, d), or with a sketch (layers, d, m), and small (layers, r, r).
      divisor: (layers,).

    Returns:
      large (layers, d, n), small (layers, r, r) and curvature (layers, n, r), float64.
    """
    found = []
    for layer, (large, small) in enumerate(zip(*moments, strict=True)):
        where = f"{name}, layer {layer}"
        if sketch is None:
            large_values, large_vectors = eigenbasis(large, where, notes)
            kept = min(rank or len(large), len(large))
            large_values, large_vectors = large_values[:kept], large_vectors[:, :kept]
        else:
            large_values, large_vectors = nystrom(large, sketch, rank, where)
        small_values, small_vectors = eigenbasis(small, where, notes)
        share = 1.0 / divisor[layer] if divisor[layer] > 0 else 0.0
        found.append((large_vectors, small_vectors, np.outer(large_values, small_values) * share))
    large, small, curvature = (np.stack(parts) for parts in zip(*found, strict=True))
    return large, small, curvature
