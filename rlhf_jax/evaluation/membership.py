"""How well scores tell members of the training data from others: ROC area, true positives at few false ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def auc(members: Array, others: Array) -> float:
    """The chance that a member's score is above another's, a tie counting one half: the area under the ROC curve."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    equal = np.searchsorted(ordered, members, side="right") - below
    return float((below + 0.5 * equal).mean() / len(others))


def true_positive_rate(members: Array, others: Array, false_positive_rate: float = 0.01) -> float:
    """The share of members above a threshold that at most so many of the others pass."""
    allowed = int(np.floor(false_positive_rate * len(others) + 1e-9))
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return float((np.asarray(members) > threshold).mean())


def bootstrap_interval(
    statistic: Callable[[Array, Array], float], members: Array, others: Array, *, seed: int, draws: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of both samples, each drawn anew with replacement."""
    rng = np.random.default_rng(seed)
    members, others = np.asarray(members), np.asarray(others)
    found = [statistic(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def membership_row(score: str, members: Array, others: Array, seed: int) -> dict[str, Any]:
    """What one score (n,) of members and (m,) of others shows: {score, members, others, auc, tpr, with _low, _high}.

    `tpr` is the true-positive rate at 1 % false positives; the intervals are bootstrapped, 95 %.
    """
    row: dict[str, Any] = {"score": score, "members": len(members), "others": len(others)}
    for name, statistic in (("auc", auc), ("tpr", true_positive_rate)):
        low, high = bootstrap_interval(statistic, members, others, seed=seed)
        row |= {name: statistic(members, others), f"{name}_low": low, f"{name}_high": high}
    return row


def blind_scores(members: Sequence[str], others: Sequence[str], *, seed: int, folds: int = 5) -> tuple[Array, Array]:
    """What a classifier that never sees the model makes of the texts: scores of members and of others.

    Naive Bayes on character trigrams (multinomial, add-one), each text scored by the folds that it is not in. Where it
    tells them apart, so does any difference between the two collections, and a membership score shows no memory.
    """
    texts, labels = [*members, *others], np.repeat([True, False], [len(members), len(others)])
    grams = [_trigrams(text) for text in texts]
    vocabulary = {gram: i for i, gram in enumerate(sorted({gram for each in grams for gram in each}))}
    rows = [np.asarray([vocabulary[gram] for gram in each], int) for each in grams]
    fold = np.random.default_rng(seed).permutation(len(texts)) % folds
    scores = np.zeros(len(texts))
    for left_out in range(folds):
        logs = []
        for label in (True, False):
            chosen = [rows[i] for i in np.flatnonzero((fold != left_out) & (labels == label))]
            counts = np.bincount(np.concatenate(chosen), minlength=len(vocabulary)) + 1.0
            logs.append(np.log(counts / counts.sum()))
        weights = logs[0] - logs[1]
        for i in np.flatnonzero(fold == left_out):
            scores[i] = weights[rows[i]].mean() if len(rows[i]) else 0.0
    return scores[labels], scores[~labels]


def _trigrams(text: str) -> list[str]:
    return [text[i : i + 3] for i in range(len(text) - 2)]
