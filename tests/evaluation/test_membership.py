"""Membership figures against loops over all pairs, and the blind baseline on texts that differ or do not."""

import numpy as np

from rlhf_jax.evaluation.membership import auc, blind_scores, bootstrap_interval, true_positive_rate


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40), rng.integers(0, 7, 30)  # with ties
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others) == np.mean(pairs)
    assert np.isclose(auc(others, members), 1 - np.mean(pairs))


def test_the_true_positive_rate_lets_no_more_others_pass_than_allowed():
    rng = np.random.default_rng(1)
    members, others = rng.normal(1.0, 1.0, 500), rng.normal(0.0, 1.0, 1000)
    for rate in (0.001, 0.01, 0.1):
        best = max(np.mean(members > threshold) for threshold in others if np.mean(others > threshold) <= rate + 1e-12)
        assert true_positive_rate(members, others, rate) == best
    assert true_positive_rate(np.ones(5), np.ones(100)) == 0.0  # a tie is no sign


def test_an_interval_holds_the_statistic_and_narrows_with_more_texts():
    rng = np.random.default_rng(2)
    widths = []
    for count in (50, 800):
        members, others = rng.normal(0.5, 1.0, count), rng.normal(0.0, 1.0, count)
        low, high = bootstrap_interval(auc, members, others, seed=0, draws=200)
        assert low < auc(members, others) < high
        widths.append(high - low)
    assert 3 < widths[0] / widths[1] < 5


def test_a_blind_classifier_finds_a_difference_in_kind_and_none_where_there_is_none():
    rng = np.random.default_rng(3)

    def texts(words, count):
        return [" ".join(rng.choice(words, 12)) for _ in range(count)]

    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    assert auc(*blind_scores(texts(words[:4], 60), texts(words[2:], 60), seed=0)) > 0.95
    same = auc(*blind_scores(texts(words, 200), texts(words, 200), seed=0))
    assert 0.4 < same < 0.6
