"""Whether figures rise with an ordered setting: the test of Jonckheere and Terpstra."""

import math
from collections.abc import Sequence


def jonckheere(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """One-sided test of a trend over ordered groups (Jonckheere, 1954; Terpstra, 1952).

    The statistic counts the pairs of values from two groups of which the later group's is larger; a tie counts one
    half. Its chances are exact, where all orders of the values are alike: those of the inversions of a multiset, the
    coefficients of a q-multinomial. Half a pair counts as none, which makes the p-value larger.

    Args:
      groups: the values of each setting, settings in the order in which they are to rise.

    Returns:
      (statistic, p): the chance of a statistic as large or larger without any trend.

    Raises:
      ValueError: fewer than two groups, or an empty one.
    """
    if len(groups) < 2 or not all(groups):
        raise ValueError("a trend needs two groups or more, and a value in each")
    statistic = sum(
        (x < y) + 0.5 * (x == y)
        for i, earlier in enumerate(groups)
        for later in groups[i + 1 :]
        for x in earlier
        for y in later
    )
    counts, size = [1], len(groups[0])
    for group in groups[1:]:
        size += len(group)
        counts = _product(counts, _gaussian_binomial(size, len(group)))
    return float(statistic), sum(counts[math.floor(statistic) :]) / sum(counts)


def _product(a: list[int], b: list[int]) -> list[int]:
    """Coefficients of the product of two polynomials."""
    out = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return out


def _gaussian_binomial(n: int, k: int) -> list[int]:
    """Coefficients in q of the number of k-subsets of n, by how many pairs they invert."""
    if k in (0, n):
        return [1]
    with_last, without = _gaussian_binomial(n - 1, k - 1), _gaussian_binomial(n - 1, k)
    out = [0] * (k * (n - k) + 1)
    for i, x in enumerate(with_last):
        out[i + n - k] += x
    for i, x in enumerate(without):
        out[i] += x
    return out
