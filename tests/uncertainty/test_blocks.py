"""Blocks of the posterior against dense algebra in float64."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.uncertainty.dual import check_size, dual
from rlhf_jax.uncertainty.kronecker import eigenbasis, factorize, nystrom
from rlhf_jax.uncertainty.posterior import Diagonal, Dual, Kronecker, Posterior, variance
from rlhf_jax.uncertainty.prior import Group, log_evidence, maximize, share

RNG = np.random.default_rng(0)
D, R = 7, 3


def semidefinite(d, rank):
    x = RNG.normal(size=(d, rank))
    return x @ x.T


LARGE, SMALL = semidefinite(D, D), semidefinite(R, R)
GRADIENT = RNG.normal(size=(5, 1, D, R))
PRECISION = 0.7


def block(large, small, rank=0, sketch=None):
    moment = large if sketch is None else large @ sketch
    parts = factorize((moment[None], small[None]), np.ones(1), sketch, rank, "q_a", [])
    return Kronecker(*(jnp.asarray(x, jnp.float32) for x in parts)), parts


def dense_variance(hessian, gradients, precision=PRECISION):
    covariance = np.linalg.inv(hessian + precision * np.eye(len(hessian)))
    return np.asarray([g.ravel() @ covariance @ g.ravel() for g in gradients])


def told(factors, gradients=GRADIENT, precision=PRECISION):
    at = {"q_a": jnp.full((1,), precision)} if isinstance(factors, Kronecker | Diagonal) else jnp.float32(precision)
    named = {"q_a": factors} if isinstance(factors, Kronecker | Diagonal) else factors
    return np.asarray(variance(named, at, {"q_a": jnp.asarray(gradients, jnp.float32)}))


def test_a_whole_block_is_the_kronecker_product():
    factor, _ = block(LARGE, SMALL)
    np.testing.assert_allclose(told(factor), dense_variance(np.kron(LARGE, SMALL), GRADIENT), rtol=1e-5)


def test_a_part_of_the_large_factor_is_woodburys_formula():
    """s2 g.g - s2^2 v' M^-1 v with M = I + s2 kron(B'B, L'L), v = vec(B' G L), large = B B', small = L L'."""
    values, vectors = np.linalg.eigh(LARGE)
    b, l = vectors[:, -2:] * np.sqrt(values[-2:]), np.linalg.cholesky(SMALL)
    s2 = 1 / PRECISION
    m = np.eye(2 * R) + s2 * np.kron(b.T @ b, l.T @ l)
    expected = []
    for g in GRADIENT[:, 0]:
        v = (b.T @ g @ l).ravel()
        expected.append(s2 * np.sum(g * g) - s2**2 * v @ np.linalg.solve(m, v))
    factor, parts = block(LARGE, SMALL, rank=2)
    np.testing.assert_allclose(told(factor), expected, rtol=1e-5)
    dense = np.linalg.slogdet(np.kron(b @ b.T, SMALL) + PRECISION * np.eye(D * R))[1] - D * R * np.log(PRECISION)
    group = Group(parts[2].ravel(), 0.0)
    assert -2 * share(group, PRECISION) == pytest.approx(dense, rel=1e-9)
    assert dense == pytest.approx(np.linalg.slogdet(m)[1], rel=1e-9)


def test_nystroem_of_low_rank_is_exact_and_of_full_rank_near():
    sketch = np.linalg.qr(RNG.normal(size=(40, 14)))[0]
    low = semidefinite(40, 4)
    values, vectors = nystrom(low @ sketch, sketch, 4, "q_a")
    np.testing.assert_allclose((vectors * values) @ vectors.T, low, atol=1e-4 * np.linalg.norm(low, 2))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-8)
    decaying = np.diag(2.0 ** -np.arange(40))
    np.testing.assert_allclose(nystrom(decaying @ sketch, sketch, 3, "q_a")[0], [1, 0.5, 0.25], rtol=1e-2)
    assert nystrom(np.zeros((40, 14)), sketch, 4, "q_a")[0].tolist() == [0.0] * 4


def test_a_sketched_block_of_low_rank_is_the_whole_one():
    low = semidefinite(40, 3)
    sketch = np.linalg.qr(RNG.normal(size=(40, 13)))[0]
    gradients = RNG.normal(size=(4, 1, 40, R))
    sketched, whole = block(low, SMALL, 3, sketch)[0], block(low, SMALL)[0]
    np.testing.assert_allclose(told(sketched, gradients), told(whole, gradients), rtol=1e-4)


def test_a_factor_that_is_not_semidefinite_is_damped_and_said():
    notes = []
    values, _ = eigenbasis(np.diag([1.0, -0.1]), "q_a, layer 0", notes)
    assert values.tolist() == pytest.approx([1.1, 0.0]) and "q_a, layer 0" in notes[0] and "-0.1" in notes[0]
    quiet = []
    assert eigenbasis(np.diag([1.0, -1e-7]), "q_a", quiet)[0].min() == 0.0 and not quiet
    with pytest.raises(UserError, match="not finite"):
        eigenbasis(np.full((2, 2), np.nan), "q_a", [])


def test_the_dual_is_the_primal():
    jacobian, weights = RNG.normal(size=(6, D * R)).astype(np.float32), RNG.uniform(0.05, 0.25, 6)
    weights[2] = 0.0
    basis, curvature = dual(jacobian, weights)
    hessian = (jacobian.T * weights) @ jacobian.astype(np.float64)
    factors = Dual({"q_a": jnp.asarray(basis.reshape(6, 1, D, R))}, jnp.asarray(curvature, jnp.float32))
    np.testing.assert_allclose(told(factors), dense_variance(hessian, GRADIENT), rtol=1e-5)
    k = jacobian.astype(np.float64) @ GRADIENT.reshape(5, -1).T  # Woodbury's form
    some = weights > 0
    gram = jacobian[some].astype(np.float64) @ jacobian[some].T
    inner = np.diag(1 / weights[some]) + gram / PRECISION
    woodbury = np.sum(GRADIENT**2, (1, 2, 3)) / PRECISION
    woodbury -= np.sum(k[some] * np.linalg.solve(inner, k[some]), 0) / PRECISION**2
    np.testing.assert_allclose(told(factors), woodbury, rtol=1e-5)
    dense = np.linalg.slogdet(hessian + PRECISION * np.eye(D * R))[1] - D * R * np.log(PRECISION)
    assert -2 * share(Group(curvature, 0.0), PRECISION) == pytest.approx(dense, rel=1e-5)
    with pytest.raises(UserError, match="2000 gradients of 200000 weights, 1.5 GiB"):
        check_size(2000, 200_000)


def test_a_diagonal_block_is_its_own_inverse():
    curvature = RNG.uniform(size=(1, D, R))
    expected = dense_variance(np.diag(curvature.ravel()), GRADIENT)
    np.testing.assert_allclose(told(Diagonal(jnp.asarray(curvature, jnp.float32))), expected, rtol=1e-5)


def test_the_evidence_is_the_dense_determinants():
    hessian, theta = semidefinite(5, 3), RNG.normal(size=5)
    groups = {"all": Group(np.linalg.eigvalsh(hessian).clip(0), float(theta @ theta))}
    for precision in (0.1, 3.0):
        dense = np.linalg.slogdet(hessian + precision * np.eye(5))[1] - 5 * np.log(precision)
        expected = -12.0 - 0.5 * (dense + precision * theta @ theta)
        assert log_evidence(-12.0, groups, {"all": precision}) == pytest.approx(expected, rel=1e-9)


def test_the_evidence_rises_to_its_only_maximum():
    group = Group(RNG.uniform(0, 20, 30), 2.5)
    best = maximize(group)
    assert all(share(group, best) >= share(group, x) for x in np.logspace(-6, 8, 500))
    step = 1e-4  # where the evidence is flat
    assert abs(share(group, best * (1 + step)) - share(group, best * (1 - step))) < 1e-6
    # stationary: |theta|^2 precision = sum c / (c + precision), MacKay's count of well-determined weights
    counted = np.sum(group.curvature / (group.curvature + best))
    assert best * group.norm == pytest.approx(counted, rel=1e-3)


def test_a_posterior_goes_through_jit_and_vmap():
    factor, _ = block(LARGE, SMALL)
    one = jnp.ones(())
    posterior = Posterior({"q_a": factor}, {"q_a": jnp.ones(1)}, one, one, one, "all")
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), posterior, dataclasses.replace(posterior, precision={"q_a": 2 * jnp.ones(1)})
    )
    gradient = {"q_a": jnp.asarray(GRADIENT, jnp.float32)}
    both = jax.jit(jax.vmap(lambda p: variance(p.factors, p.precision, gradient)))(stacked)
    np.testing.assert_allclose(both[0], told(factor, precision=1.0), rtol=1e-5)
    np.testing.assert_allclose(both[1], told(factor, precision=2.0), rtol=1e-5)


def test_laplace_torch_says_the_same_of_a_linear_model_of_pairs():
    """`fixtures/make_laplace_torch.py` made it: exact, and with one block of factors over one token a record."""
    with np.load(Path(__file__).parent / "fixtures" / "laplace_torch.npz") as saved:
        peer = dict(saved)
    d, precision = peer["d"], float(peer["precision"])
    p = 1 / (1 + np.exp(-d @ peer["w"]))
    likelihood, norm = float(np.log(p).sum()), float(np.sum(peer["w"] ** 2))
    gradients = d[:, None, :, None]

    def evidence(curvature):
        return log_evidence(likelihood, {"all": Group(curvature, norm)}, {"all": precision})

    basis, curvature = dual(d.astype(np.float32), p * (1 - p))
    factors = Dual({"q_a": jnp.asarray(basis[:, None, :, None])}, jnp.asarray(curvature, jnp.float32))
    np.testing.assert_allclose(told(factors, gradients, precision), peer["full_variance"], rtol=1e-4)
    assert evidence(curvature) == pytest.approx(float(peer["full_evidence"]), rel=1e-5)
    moments = (d.T @ d)[None], np.sum(p * (1 - p)).reshape(1, 1, 1)
    parts = factorize(moments, np.asarray([len(d)]), None, 0, "q_a", [])
    kron = Kronecker(*(jnp.asarray(x, jnp.float32) for x in parts))
    np.testing.assert_allclose(told(kron, gradients, precision), peer["kron_variance"], rtol=1e-4)
    assert evidence(parts[2].ravel()) == pytest.approx(float(peer["kron_evidence"]), rel=1e-6)
