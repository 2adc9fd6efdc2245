"""Best-of-n: the bound of its KL, and the estimate of its score against every subset there is."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation import best_of_n_estimate, best_of_n_kl
from rlhf_jax.evaluation.best_of_n import rank_weights

RNG = np.random.default_rng(0)


def over_subsets(proxy, gold, n):
    """The mean over all subsets of n answers of the gold score of the best by proxy, ties broken evenly."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        values.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return np.mean(values)


@pytest.mark.parametrize("n, kl", [(1, 0.0), (2, 0.193), (4, 0.636), (16, 1.835), (256, 4.549), (12500, 8.434)])
def test_kl_bound(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-4)
    np.testing.assert_array_equal(best_of_n_kl([n, n]), [best_of_n_kl(n)] * 2)


def test_kl_bound_is_reached_without_ties():
    """Best of n over m equally likely answers of different scores: the KL grows to the bound with m."""
    n = 4
    for m, gap in ((100, 0.02), (10_000, 2e-4)):
        edges = (np.arange(m + 1) / m) ** n  # chance that the best is among the lowest i
        chance = np.diff(edges)
        kl = np.sum(chance * np.log(chance * m))
        assert best_of_n_kl(n) - gap < kl <= best_of_n_kl(n)


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_mean_over_all_subsets(n):
    proxy, gold = RNG.normal(size=7), RNG.normal(size=7)
    assert best_of_n_estimate(proxy, gold, n) == pytest.approx(over_subsets(proxy, gold, n), abs=1e-12)
    assert best_of_n_estimate(proxy, proxy, n) == pytest.approx(over_subsets(proxy, proxy, n), abs=1e-12)


@pytest.mark.parametrize("n", (1, 2, 5))
def test_each_prompt_is_estimated_alone(n):
    proxy, gold = RNG.normal(size=(3, 6)).round(), RNG.normal(size=(3, 6))
    each = [best_of_n_estimate(p, g, n) for p, g in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(best_of_n_estimate(proxy, gold, n), each, rtol=1e-14)


def test_one_is_the_mean_and_all_is_the_best():
    proxy, gold = RNG.normal(size=(4, 50)), RNG.normal(size=(4, 50))
    np.testing.assert_allclose(best_of_n_estimate(proxy, gold, 1), gold.mean(-1), atol=1e-12)
    np.testing.assert_allclose(best_of_n_estimate(proxy, proxy, 50), proxy.max(-1), atol=1e-12)
    best = gold[np.arange(4), proxy.argmax(-1)]
    np.testing.assert_allclose(best_of_n_estimate(proxy, gold, 50), best, atol=1e-12)


@pytest.mark.parametrize("n", (1, 3, 8))
def test_order_never_matters_with_ties(n):
    proxy, gold = RNG.integers(0, 3, 8), RNG.normal(size=8)
    expected = best_of_n_estimate(proxy, gold, n)
    for _ in range(5):
        order = RNG.permutation(8)
        assert best_of_n_estimate(proxy[order], gold[order], n) == pytest.approx(expected, abs=1e-12)
    # all tied: any answer is as likely
    assert best_of_n_estimate(np.zeros(8), gold, n) == pytest.approx(gold.mean(), abs=1e-12)


def test_ties_are_broken_evenly():
    """Two of the three answers tie on top: of the subsets {1, 2}, {1, 3}, {2, 3} the second is chosen 1 + 0 + 1/2."""
    assert best_of_n_estimate([0.0, 1.0, 1.0], [0.0, 1.0, 0.0], 2) == pytest.approx(1.5 / 3)


def test_many_answers_do_not_overflow():
    count = 12_600
    for n in (1, 256, 12_500, 12_600):
        weights = rank_weights(count, n)
        assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1.0, abs=1e-10)
        exact = math.comb(count - 101, n - 1) / math.comb(count, n)  # of the 101st from the top
        assert weights[-101] == pytest.approx(exact, rel=1e-10)
        ranks = np.arange(1, count + 1)  # whose expected largest is n (N + 1) / (n + 1)
        assert best_of_n_estimate(ranks, ranks, n) == pytest.approx(n * (count + 1) / (n + 1), rel=1e-10)


@pytest.mark.parametrize(
    "proxy, gold, n, told",
    [
        ([1, 2], [1, 2], 0, "1 to the 2 answers, got 0"),
        ([1, 2], [1, 2], 3, "1 to the 2 answers, got 3"),
        ([1, 2], [1], 1, r"got \(2,\) and \(1,\)"),
        (1.0, 1.0, 1, "must be both"),
        ([1, math.nan], [1, 2], 1, "not a number"),
    ],
)
def test_what_has_no_answer_is_refused(proxy, gold, n, told):
    with pytest.raises(ValueError, match=told):
        best_of_n_estimate(proxy, gold, n)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)
