"""Confidence intervals: of a mean; of a share and the difference of two, sound at small counts, 0 % and 100 %; and
McNemar's test of two verdicts on the same things."""

import math
from statistics import NormalDist

import numpy as np


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share.

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = successes / n

    Args:
        successes: how many of the `n` trials succeeded; a trial may count in part.
        n: number of trials; 0 has no interval.
        confidence: coverage of the two-sided interval, between 0 and 1.

    Returns:
        (low, high) as shares, both NaN where `n` is 0.

    Raises:
        ValueError: `successes` is not between 0 and `n`, or `confidence` not between 0 and 1.

    Reference: Wilson (1927); method 3 of Newcombe (1998), Statistics in Medicine 17, 857-872.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got successes={successes} and n={n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    center = share + z**2 / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low = 0.0 if successes == 0 else (center - half_width) / scale
    high = 1.0 if successes == n else (center + half_width) / scale
    return low, high


def newcombe_difference(k1: float, n1: int, k2: float, n2: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """Newcombe's hybrid score interval of the difference of two independent shares, k1 / n1 - k2 / n2.

    With (l, u) the Wilson interval of each share and d the difference:

        low = d - sqrt((p1 - l1)^2 + (u2 - p2)^2),  high = d + sqrt((u1 - p1)^2 + (p2 - l2)^2)

    Args:
        k1, n1: successes and trials of the first group.
        k2, n2: successes and trials of the second group.
        confidence: coverage of the two-sided interval, between 0 and 1.

    Returns:
        (difference, low, high), all NaN where a group is empty.

    Raises:
        ValueError: as `wilson`.

    Reference: method 10 of Newcombe (1998), Statistics in Medicine 17, 873-890.
    """
    low1, high1 = wilson(k1, n1, confidence)
    low2, high2 = wilson(k2, n2, confidence)
    if n1 == 0 or n2 == 0:
        return math.nan, math.nan, math.nan
    share1, share2 = k1 / n1, k2 / n2
    difference = share1 - share2
    low = difference - math.hypot(share1 - low1, high2 - share2)
    high = difference + math.hypot(high1 - share1, share2 - low2)
    return difference, low, high


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p-value of as many that went one way or more, were each change a fair coin: exact (McNemar 1947).

    Args:
        lost, gained: how many things had the first verdict alone, and the second alone. None at all gives 1.
    """
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def mean_interval(name: str, x: np.ndarray) -> dict[str, float]:
    """The mean of independent values with its 95 % interval, as figures: normal approximation, for some 30 values on.

        mean -+ 1.96 s / sqrt(n),  s^2 = sum_i (x_i - mean)^2 / (n - 1)

    Args:
        name: the figure's name.
        x: (n,) values, one a record or prompt.

    Returns:
        {name, name + "_low", name + "_high"}; a single value has no interval, and is given alone.
    """
    mean = float(x.mean())
    if len(x) < 2:
        return {name: mean}
    half = float(1.96 * x.std(ddof=1) / np.sqrt(len(x)))
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
