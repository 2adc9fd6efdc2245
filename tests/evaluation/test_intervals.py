import math

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_jax.evaluation import mean_interval, newcombe_difference, wilson
from rlhf_jax.evaluation.intervals import mcnemar


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_within_zero_and_one():
    low, high = wilson(3, 17)
    assert wilson(14, 17) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert wilson(3, 17, confidence=0.5)[0] > low


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_newcombe_gives_the_published_intervals(counts, low, high):
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10."""
    k1, n1, k2, n2 = counts
    assert newcombe_difference(*counts) == pytest.approx((k1 / n1 - k2 / n2, low, high), abs=5e-5)


def test_empty_groups_have_no_interval():
    assert all(math.isnan(value) for value in wilson(0, 0))
    assert all(math.isnan(value) for value in newcombe_difference(1, 2, 0, 0))


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="successes=5 and n=4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 4, confidence=95)


def test_a_mean_lies_two_standard_errors_from_its_bounds():
    """1, 2, 3, 4, 5 and 9: deviations -3, -2, -1, 0, 1, 5 from 4, variance 40 / 5 = 8, standard error sqrt(8 / 6)."""
    figures = mean_interval("score", np.float32([1, 2, 3, 4, 5, 9]))
    assert figures == pytest.approx({"score": 4.0, "score_low": 1.73679, "score_high": 6.26321}, abs=1e-5)
    assert mean_interval("kl", np.float32([2.5])) == {"kl": 2.5}


def test_mcnemar_is_the_chance_of_coins():
    """Of 8 changes 1 or fewer one way: (1 + 8) / 256, twice; the same for either direction."""
    assert mcnemar(7, 1) == mcnemar(1, 7) == pytest.approx(2 * 9 / 256)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(30, 70) == pytest.approx(binomtest(30, 100).pvalue)
