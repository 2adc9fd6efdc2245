"""Best-of-n sampling as a policy: how far it can be from the one it samples, and what it scores, without bias."""

from typing import Any

import numpy as np


def best_of_n_kl(n: Any) -> Any:
    """An upper bound, in nats, of KL(best of n || policy), reached where no two answers can score the same.

        log n - (n - 1) / n

    Args:
      n: answers the best is chosen from, a number or an array of them.

    Raises:
      ValueError: an n below 1.

    Reference: the formula is in Stiennon et al. (2020), appendix G.3; Beirami et al. (2024) show that it is a bound.
    """
    n = np.asarray(n, np.float64)
    if np.any(n < 1):
        raise ValueError(f"best of n needs n at least 1, got {n}")
    return np.log(n) - (n - 1) / n


def rank_weights(count: int, n: int) -> np.ndarray:
    """The chance (count,) float64 that the i-th smallest of `count` is the largest of n drawn without replacement.

        C(i - 1, n - 1) / C(count, n),  i = 1 ... count

    It is n / count for the largest, and each one below it has (i - n) / (i - 1) of the one above: a running product,
    which neither overflows nor cancels.
    """
    above = np.arange(count, 1, -1)  # i, from the top
    return np.cumprod(np.concatenate([[n / count], np.maximum(above - n, 0) / (above - 1)]))[::-1]


def best_of_n_estimate(proxy: Any, gold: Any, n: int) -> Any:
    """Unbiased estimate of the gold score expected of the best by proxy of n answers, from N >= n answers.

        sum_{i=n}^{N} C(i - 1, n - 1) / C(N, n) * gold of the i-th by ascending proxy

    It is the mean over all subsets of n answers. Answers that the proxy scores the same share their weights equally,
    as if each tie were broken at random, so the order of the answers never matters.

    Args:
      proxy: (N,) or (P, N), what chooses among the N answers to each of P prompts.
      gold: the same shape, what the chosen answer is worth; `proxy` itself gives the expected largest proxy.
      n: 1 ... N; 1 gives the mean, N the gold score of the best.

    Returns:
      A float64, or (P,) of them.

    Raises:
      ValueError: shapes that differ, n outside 1 ... N, or a proxy score that is not a number.

    Reference: Nakano et al. (2021), WebGPT; Hilton and Gao (2022), Measuring Goodhart's law.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if proxy.shape != gold.shape or proxy.ndim not in (1, 2):
        raise ValueError(f"proxy and gold must be both (N,) or both (P, N), got {proxy.shape} and {gold.shape}")
    count = proxy.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"best of n is estimated for n of 1 to the {count} answers, got {n}")
    if np.isnan(proxy).any():
        raise ValueError("a proxy score is not a number: answers without a score have no rank")
    rows = proxy.reshape(-1, count)
    order = np.argsort(rows, axis=-1)
    ranked = np.take_along_axis(rows, order, axis=-1)
    fresh = np.ones(ranked.shape, bool)  # where a group of equal scores begins
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = np.cumsum(fresh) - 1
    shared = np.bincount(group, np.tile(rank_weights(count, n), len(rows))) / np.bincount(group)
    chosen = np.take_along_axis(gold.reshape(-1, count), order, axis=-1)
    return (shared[group].reshape(chosen.shape) * chosen).sum(-1).reshape(proxy.shape[:-1])[()]
