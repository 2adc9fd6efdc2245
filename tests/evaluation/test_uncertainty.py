"""Figures of stated uncertainty: hand-worked numbers and what must hold of any."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from rlhf_jax.evaluation import uncertainty as u

RNG = np.random.default_rng(0)


def test_probabilities_go_to_a_half_with_variance():
    assert u.probit_probability(np.asarray([1.0]))[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert u.probit_probability(np.asarray([2.0]), 8 / math.pi * 3)[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert u.probit_probability(np.asarray([3.0]), 1e12)[0] == pytest.approx(0.5, abs=1e-5)


def test_the_temperature_and_the_variances_scale_are_found_again():
    mean = RNG.normal(size=20_000) * 3
    outcomes = RNG.uniform(size=20_000) < u.probit_probability(mean / 2.5)
    assert u.fit_temperature(mean, outcomes) == pytest.approx(2.5, rel=0.05)
    variance = RNG.uniform(0.5, 10, 20_000)
    outcomes = RNG.uniform(size=20_000) < u.probit_probability(mean, 3 * variance)
    assert u.fit_variance_scale(mean, variance, outcomes, 1.0) == pytest.approx(3.0, rel=0.15)


def test_the_area_under_the_curve_counts_ordered_pairs():
    scores, positive = np.asarray([0.1, 0.4, 0.4, 0.8]), np.asarray([False, False, True, True])
    assert u.auroc(scores, positive) == (1 + 0.5 + 2) / 4
    assert u.auroc(-scores, positive) == pytest.approx(1 - 3.5 / 4)
    assert u.auroc(scores, np.ones(4, bool)) is None


def test_the_rank_correlation_lies_in_its_interval():
    x = RNG.normal(size=80)
    y = np.exp(x) + RNG.normal(size=80)
    found = u.spearman_interval(x, y)
    assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert found["spearman_low"] < found["spearman"] < found["spearman_high"]
    assert u.spearman_interval(np.ones(5), RNG.normal(size=5))["spearman"] is None


def test_distances_are_those_of_a_loop():
    points, others = RNG.normal(size=(7, 4)), RNG.normal(size=(9, 4))
    loop = [min(np.linalg.norm(p - o) for o in others) for p in points]
    np.testing.assert_allclose(u.nearest_distances(points, others, at_once=3), loop, rtol=1e-9)


def test_figures_by_hand():
    mean, variance = np.asarray([2.0, -0.5, 1.0, 3.0]), np.asarray([0.1, 5.0, 1.0, 0.2])
    told = u.uncertainty_figures(mean, variance, np.ones(4, bool), temperature=2.0)
    assert told["accuracy"] == 0.75 and told["n"] == 4
    assert told["map"]["nll"] == pytest.approx(np.log1p(np.exp(-mean)).mean())
    assert told["temperature"]["nll"] == pytest.approx(np.log1p(np.exp(-mean / 2)).mean())
    assert told["detection"] == {"map": 1.0, "std": 1.0, "laplace": 1.0}
