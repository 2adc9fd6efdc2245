"""The exact posterior of a small model, in the span of its N terms' gradients: the reference for every approximation.

With J (N, P) the gradients and w their curvatures, H = J' W J has the eigenvalues of W^1/2 J J' W^1/2, an N x N matrix.
So logdet(H + I / s2) + P log s2 = logdet(I + s2 W^1/2 K W^1/2), and by Woodbury's identity the variance of g is
s2 g'g - s2^2 k' (diag(1/w) + s2 K)^-1 k, with K = J J' and k = J g.
"""

import numpy as np

from rlhf_jax.errors import UserError

LARGEST_BYTES = 1 << 30  # of J in float32


def check_size(terms: int, parameters: int) -> None:
    """Raises a UserError where the gradients of all terms are too many to keep."""
    if 4 * terms * parameters > LARGEST_BYTES:
        raise UserError(
            f'structure "dual" keeps {terms} gradients of {parameters} weights, {4 * terms * parameters / 2**30:.1f} '
            f'GiB and above 1 GiB: use structure "kronecker", or scope "head"'
        )


def dual(jacobian: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions and their curvatures, of H = J' W J.

    Args:
      jacobian: (N, P) float32; weights: (N,), at least 0.

    Returns:
      basis (N, P) float32, whose rows of no curvature are zeros, and curvature (N,) float64, descending.
    """
    rows = np.sqrt(np.asarray(weights, np.float64))[:, None] * jacobian.astype(np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    some = values > len(values) * np.finfo(np.float32).eps * values[0]
    basis = np.zeros(jacobian.shape, np.float32)
    basis[some] = (vectors[:, some].T @ rows) / np.sqrt(values[some])[:, None]
    return basis, np.where(some, values, 0.0)
