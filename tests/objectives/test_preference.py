"""Preference losses against naive float64 formulas, their gradients against central differences of those."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import dpo_loss, hinge_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def odds(logprob):
    return math.exp(logprob) / (1.0 - math.exp(logprob))


def conservative(c, r):
    return -0.8 * log_sigmoid(0.3 * (c - r)) - 0.2 * log_sigmoid(-0.3 * (c - r))


def simpo_with_gamma(c, r):
    return -log_sigmoid(2.0 * c - 2.0 * r - 1.4)  # as the paper: beta (c - r) - gamma, gamma = beta margin


def orpo_with_nll(c, r):
    return 1.5 - 0.25 * log_sigmoid(math.log(odds(c) / odds(r)))


# ours, the formula of two numbers, and where they are drawn from
RATIOS, MEANS = ("normal", 12.0), ("below 0", 1.5)
PAIRS = {
    "dpo": (dpo_loss, lambda c, r: -log_sigmoid(0.1 * (c - r)), RATIOS),
    "cdpo": (lambda c, r: dpo_loss(c, r, 0.3, 0.2), conservative, RATIOS),
    "hinge": (hinge_loss, lambda c, r: max(0.0, 1.0 - 0.1 * (c - r)), RATIOS),
    "ipo": (lambda c, r: ipo_loss(c, r, 0.25), lambda c, r: (c - r - 2.0) ** 2, RATIOS),
    "orpo": (lambda c, r: orpo_loss(c, r, jnp.float32(1.5), 0.25), orpo_with_nll, MEANS),
    "simpo": (lambda c, r: simpo_loss(c, r, 2.0, 0.7), simpo_with_gamma, MEANS),
}


def draw(kind, scale, size=40):
    chosen, rejected = np.random.default_rng(5).normal(0.0, scale, (2, size)).astype(np.float32)
    return (chosen, rejected) if kind == "normal" else (-np.abs(chosen) - 0.02, -np.abs(rejected) - 0.02)


def slope(function, x, h=1e-5):
    return (function(x + h) - function(x - h)) / (2 * h)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_equal_their_formula_in_value_and_gradient(name):
    ours, formula, (kind, scale) = PAIRS[name]
    chosen, rejected = draw(kind, scale)
    rows = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
    result = jax.jit(ours)(chosen, rejected)
    assert result.shape == (40,) and result.dtype == jnp.float32
    np.testing.assert_allclose(result, [formula(c, r) for c, r in rows], rtol=1e-5, atol=1e-6)
    by_chosen, by_rejected = jax.grad(lambda *args: ours(*args).sum(), argnums=(0, 1))(chosen, rejected)
    for (c, r), *slopes in zip(rows, by_chosen.tolist(), by_rejected.tolist(), strict=True):
        expected = slope(lambda x, r=r: formula(x, r), c), slope(lambda x, c=c: formula(c, x), r)
        np.testing.assert_allclose(slopes, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 3.0])
def test_kto_equals_its_formula_in_value_and_gradient(kl):
    logratio, _ = draw("normal", 12.0)
    desirable = np.arange(40) % 3 > 0

    def formula(x, good):
        return 1.5 * (1.0 - sigmoid(0.2 * (x - kl))) if good else 0.75 * (1.0 - sigmoid(0.2 * (kl - x)))

    def ours(x):
        return kto_loss(x, desirable, kl, beta=0.2, desirable_weight=1.5, undesirable_weight=0.75)

    rows = list(zip(logratio.tolist(), desirable.tolist(), strict=True))
    np.testing.assert_allclose(ours(logratio), [formula(x, good) for x, good in rows], rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: ours(x).sum())(logratio)
    expected = [slope(lambda x, good=good: formula(x, good), x) for x, good in rows]
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


def test_kto_takes_no_gradient_through_its_reference_point():
    logratio, desirable = jnp.array([1.0, -2.0]), jnp.array([True, False])
    assert jax.grad(lambda kl: kto_loss(logratio, desirable, kl).sum())(0.5) == 0.0


def test_where_policy_and_reference_agree():
    zero = jnp.zeros(1)
    np.testing.assert_allclose(dpo_loss(zero, zero), [math.log(2.0)], rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(zero, zero, 0.1, 0.3), [math.log(2.0)], rtol=1e-6)
    np.testing.assert_allclose(hinge_loss(zero, zero), [1.0])
    np.testing.assert_allclose(ipo_loss(zero, zero, beta=0.1), [25.0])
    np.testing.assert_allclose(kto_loss(zero, jnp.array([True]), 0.0), [0.5])
    np.testing.assert_allclose(jax.grad(lambda x: dpo_loss(x, zero)[0])(zero), [-0.05], rtol=1e-6)


def test_smoothing_has_its_least_loss_at_the_odds_of_a_right_label():
    # sigmoid(beta delta) = 1 - label_smoothing, so delta = log(0.8 / 0.2) / 0.1
    least = jnp.array([math.log(4.0) / 0.1])
    gradient = jax.grad(lambda x: dpo_loss(x, jnp.zeros(1), 0.1, 0.2)[0])(least)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-8)


def test_ipo_is_least_at_the_margin_of_its_paper():
    np.testing.assert_allclose(ipo_loss(jnp.array([5.0]), jnp.zeros(1), beta=0.1), 0.0, atol=1e-10)


def test_hinge_stops_at_its_margin():
    gradient = jax.grad(lambda x: hinge_loss(x, jnp.zeros(3)).sum())(jnp.array([9.0, 11.0, 1e6]))
    np.testing.assert_allclose(gradient, [-0.1, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "hinge", "simpo"])
@pytest.mark.parametrize("margin", [-1e6, 1e6])
def test_extreme_ratios(name, margin):
    ours = PAIRS[name][0]
    value, gradient = jax.value_and_grad(lambda x: ours(x, jnp.zeros(1)).sum())(jnp.array([margin], jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if name != "cdpo":
        assert (gradient == 0).all() if margin > 0 else (gradient < 0).all()


@pytest.mark.parametrize("logratio", [-1e6, 1e6])
def test_kto_saturates(logratio):
    x = jnp.full(2, logratio)
    loss = kto_loss(x, jnp.array([True, False]), 1.0)
    np.testing.assert_allclose(loss, [0.0, 1.0] if logratio > 0 else [1.0, 0.0], atol=1e-7)
    gradient = jax.grad(lambda x: kto_loss(x, jnp.array([True, False]), 1.0).sum())(x)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -1e-3, -1.0, -30.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-9, -1e-3, -1.0, -30.0, -1e4])
def test_orpo_of_certain_and_of_impossible_answers_is_finite(chosen, rejected):
    c, r = jnp.array([chosen]), jnp.array([rejected])
    loss = orpo_loss(c, r, -c, 0.1)
    # log odds in float64, of what counts as -1e-6 at most
    at = [min(x, -1e-6) for x in (float(c[0]), float(r[0]))]
    difference = at[0] - math.log(-math.expm1(at[0])) - at[1] + math.log(-math.expm1(at[1]))
    np.testing.assert_allclose(loss, [-float(c[0]) - 0.1 * log_sigmoid(difference)], rtol=1e-5, atol=1e-7)
    gradients = jax.grad(lambda c, r: orpo_loss(c, r, -c, 0.1).sum(), argnums=(0, 1))(c, r)
    assert all(np.isfinite(g).all() for g in gradients)
