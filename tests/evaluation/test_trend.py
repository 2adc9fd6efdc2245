"""The exact trend test against all orders of the values."""

import itertools

import pytest

from rlhf_jax.evaluation.trend import jonckheere


def statistic(groups):
    pairs = itertools.combinations(groups, 2)
    return sum((x < y) + 0.5 * (x == y) for earlier, later in pairs for x in earlier for y in later)


def by_all_orders(groups):
    """The share of all orders of the values whose statistic is as large."""
    values, sizes = [x for group in groups for x in group], [len(group) for group in groups]
    ends = list(itertools.accumulate(sizes))

    def cut(order):
        return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    found = [statistic(cut(order)) for order in itertools.permutations(values)]
    return sum(x >= statistic(groups) for x in found) / len(found)


@pytest.mark.parametrize(
    "groups", [[[1, 4], [2, 5], [3, 6]], [[3], [1, 2], [5, 4, 6]], [[6, 5], [4, 3], [2, 1]], [[1, 2, 3], [4, 5, 6, 7]]]
)
def test_the_chance_is_the_share_of_all_orders(groups):
    found = jonckheere(groups)
    assert found == (statistic(groups), pytest.approx(by_all_orders(groups)))


def test_a_perfect_order_of_twelve_is_one_of_369600():
    assert jonckheere([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]) == (54.0, pytest.approx(1 / 369600))


def test_ties_never_make_the_chance_smaller():
    assert jonckheere([[1, 2], [2, 3]])[1] >= jonckheere([[1, 2], [2.5, 3]])[1]


def test_one_group_has_no_trend():
    for groups in ([[1.0]], [[1.0], []]):
        with pytest.raises(ValueError, match="two groups or more"):
            jonckheere(groups)
