"""Truths of best-of-n by uncertain proxies: one order for all columns, one variance everywhere, a k that may be 0."""

import itertools

import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation import overoptimization as laboratory
from rlhf_jax.objectives import adjustment
from rlhf_jax.objectives.adjustment import Moments


def gold_is_that_of_the_chosen_answer() -> None:
    """Gold of the best of n by a second proxy, against every pair and the whole pool by hand.

    The first proxy is ranked before it, so that an order which is left over from it shows.
    """
    rng = np.random.default_rng(0)
    first, second, gold = rng.normal(size=(3, 1, 8))
    runs = [Moments(first.astype(np.float32)), Moments(second.astype(np.float32))]
    found = laboratory.method(runs, gold, "none", 0.0, [1, 2, 8]).gold[:, 0]
    for run, ranking in zip(found, (first[0], second[0]), strict=True):
        pairs = [gold[0, i if ranking[i] > ranking[j] else j] for i, j in itertools.combinations(range(8), 2)]
        expected = [gold.mean(), np.mean(pairs), gold[0, np.argmax(ranking)]]
        assert np.allclose(run, expected, atol=1e-6), "gold is not that of the answers which the proxy chose"


def ensembles_have_one_variance() -> None:
    """Two members at 1 and 3: 1, the variance of the equal mixture of the two, wherever it is read; not 2."""
    members = jnp.asarray([[1.0], [3.0]])
    moments = adjustment.mixture(members)
    assert np.allclose(moments.variance, 1.0), "the variance is not that of the members' mixture"
    scored = adjustment.adjusted(moments, "variance", 0.5)
    assert np.allclose(scored, 1.5), "the variance is not that of the members' mixture"


def a_k_of_zero_is_the_mean() -> None:
    runs = [Moments(np.asarray([[1.0, 2.0]], np.float32), np.asarray([[0.0, 9.0]], np.float32))]
    for kind in ("std", "variance"):
        found = laboratory.method(runs, np.asarray([[0.0, 1.0]]), kind, 0.0, [2])
        assert found.gold.item() == 1.0, "a k of 0 penalizes uncertainty"
