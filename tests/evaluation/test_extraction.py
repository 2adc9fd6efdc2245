"""Extraction from one reading: against loops over splits, published tables, and hand-worked scores."""

import math
import zlib

import numpy as np
import pytest

from rlhf_jax.evaluation.extraction import (
    discoverable_shares,
    exposure,
    first_divergence,
    greedily_extractable,
    log_tries,
    mean_logprob,
    min_k,
    min_k_plus,
    window_logprobs,
    zlib_score,
)

LENGTHS = np.array([6, 4, 1, 6])
GREEDY = np.array([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)


def test_a_suffix_is_extractable_where_all_of_its_tokens_are_greedy():
    found = greedily_extractable(GREEDY, LENGTHS)
    for row, (flags, length) in enumerate(zip(GREEDY, LENGTHS, strict=True)):
        for start in range(GREEDY.shape[1]):
            assert found[row, start] == (start < length and all(flags[start:length]))
    assert first_divergence(GREEDY, LENGTHS).tolist() == [1, 4, 0, 5]


def test_a_window_s_log_probability_is_the_sum_of_its_tokens():
    logprobs = -np.arange(12.0).reshape(2, 6)
    assert window_logprobs(logprobs, [0, 2], [6, 4]).tolist() == [-15.0, -8.0 - 9.0]
    logprobs[1, 3] = -np.inf
    assert window_logprobs(logprobs, [0, 2], [6, 4]).tolist() == [-15.0, -np.inf]
    assert window_logprobs(logprobs, [0, 4], [6, 6]).tolist() == [-15.0, -21.0]


@pytest.mark.parametrize(
    ("share", "tries"),
    [(0.5, (1, 1, 4, 7)), (0.1, (1, 7, 22, 44)), (0.01, (11, 69, 230, 459)), (0.001, (106, 693, 2302, 4603))],
)
def test_tries_are_those_of_the_table(share, tries):
    found = [float(10 ** log_tries(np.log([share]), p)[0]) for p in (0.1, 0.5, 0.9, 0.99)]
    assert found == pytest.approx(tries)


def test_tries_of_probabilities_that_no_float_holds():
    """n = -log(1 - p) / p_z for small p_z; a sure text takes one try, an impossible one never comes."""
    assert log_tries(np.array([-1000.0]), 0.5)[0] == pytest.approx(1000 / math.log(10) + math.log10(math.log(2)))
    assert log_tries(np.array([0.0, -1e-12]), 0.99).tolist() == [0.0, 0.0]
    assert log_tries(np.array([-np.inf]), 0.5)[0] == np.inf
    both_sides = log_tries(np.array([-30.0 - 1e-9, -30.0 + 1e-9]), 0.5)
    assert both_sides[0] == pytest.approx(both_sides[1], abs=1e-8)


def test_shares_of_texts_that_so_many_tries_bring_up():
    shares = discoverable_shares(np.log([0.5, 0.01, 1e-9]), tries=(1, 69, 230, 10**10), probabilities=(0.5, 0.9))
    assert shares.tolist() == [[1 / 3, 0], [2 / 3, 1 / 3], [2 / 3, 2 / 3], [1, 1]]


def test_membership_scores_by_hand():
    logprobs = np.array([[-1.0, -4.0, -2.0, -3.0, -9.0], [-5.0, -1.0, 0.0, 0.0, 0.0]])
    lengths = np.array([4, 2])
    assert mean_logprob(logprobs, lengths).tolist() == [-2.5, -3.0]
    assert min_k(logprobs, lengths, 0.5).tolist() == [-3.5, -5.0]
    assert min_k(logprobs, lengths, 0.2).tolist() == [-4.0, -5.0]  # one at least
    # Standardized: [1, -1, 0, -1] and [-2, 0].
    mean, deviation = np.full((2, 5), -2.0), np.array([[1.0, 2.0, 1.0, 1.0, 1.0], [1.5, 1.0, 1.0, 1.0, 1.0]])
    assert min_k_plus(logprobs, mean, deviation, lengths, 0.5).tolist() == [-1.0, -2.0]
    texts = ["a" * 100, "xy"]
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    np.testing.assert_allclose(zlib_score(logprobs, lengths, texts), [-10 / sizes[0], -6 / sizes[1]])


def test_exposure_is_the_rank_among_random_ones_in_bits():
    candidates = np.array([-10.0, -20.0, -30.0, -40.0, -50.0, -60.0, -70.0])
    found = exposure(np.array([-1.0, -15.0, -35.0, -99.0]), candidates)
    np.testing.assert_allclose(found, [3.0, 3 - math.log2(2), 3 - math.log2(4), 0.0])
