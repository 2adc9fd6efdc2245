"""What a scorer's stated uncertainty is worth: probabilities, detected errors, distance from the training data."""

from typing import Any

import numpy as np
import scipy  # its parts load where they are first used: two of them take long

from rlhf_jax.evaluation.calibration import expected_calibration_error, reliability
from rlhf_jax.evaluation.intervals import wilson

Array = np.ndarray


def probit_probability(mean: Array, variance: Array | float = 0.0, temperature: float = 1.0) -> Array:
    """P(a score of these moments is positive): sigmoid(m / t / sqrt(1 + pi / 8 v / t^2)), MacKay's approximation."""
    return scipy.special.expit(mean / temperature / np.sqrt(1.0 + np.pi / 8.0 * np.asarray(variance) / temperature**2))


def negative_log_likelihood(probabilities: Array, outcomes: Array) -> float:
    """Mean nats of what came true; probabilities nearer to 0 or 1 than 1e-12 count as that."""
    told = np.clip(np.where(outcomes, probabilities, 1.0 - probabilities), 1e-12, 1.0)
    return float(-np.log(told).mean())


def fit_temperature(mean: Array, outcomes: Array) -> float:
    """What scores are divided by for the least negative log-likelihood, between 0.01 and 100 (Guo et al., 2017)."""
    return _least(lambda x: negative_log_likelihood(probit_probability(mean, 0.0, x), outcomes))


def fit_variance_scale(mean: Array, variance: Array, outcomes: Array, temperature: float) -> float:
    """What variances are multiplied with for the least negative log-likelihood at a temperature."""
    return _least(lambda x: negative_log_likelihood(probit_probability(mean, x * variance, temperature), outcomes))


def _least(loss: Any) -> float:
    """The positive number of the least loss: of a grid in its logarithm, then Brent's method beside the best."""
    grid = np.log(np.logspace(-2, 2, 41))
    best = int(np.argmin([loss(float(np.exp(x))) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(
        np.exp(scipy.optimize.minimize_scalar(lambda x: loss(float(np.exp(x))), bounds=bounds, method="bounded").x)
    )


def auroc(scores: Array, positive: Array) -> float | None:
    """P(a positive one's score is above a negative one's), ties a half; None where there are not both."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return None
    ranks = scipy.stats.rankdata(scores)[positive].sum()
    return float((ranks - n * (n + 1) / 2) / (n * (len(positive) - n)))


def spearman_interval(x: Array, y: Array, resamples: int = 1000) -> dict[str, float | None]:
    """Spearman's rank correlation with its 95 % bootstrap interval (percentiles; drawn with seed 0).

    None where a side is constant; so are resamples left out in which one is.
    """
    names = ("spearman", "spearman_low", "spearman_high")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(names)
    rng, n = np.random.default_rng(0), len(x)

    def correlation(x: Array, y: Array) -> float:
        return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])

    picks = (rng.integers(0, n, n) for _ in range(resamples))
    drawn = [correlation(x[rows], y[rows]) for rows in picks if np.ptp(x[rows]) and np.ptp(y[rows])]
    return dict(zip(names, [correlation(x, y), *map(float, np.percentile(drawn, [2.5, 97.5]))], strict=True))


def nearest_distances(points: Array, others: Array, at_once: int = 256) -> Array:
    """Euclidean distance (n,) of each point (n, d) to the nearest of others (m, d), in float64."""
    points, others = np.asarray(points, np.float64), np.asarray(others, np.float64)
    squares = np.square(others).sum(1)
    out = []
    for start in range(0, len(points), at_once):
        part = points[start : start + at_once]
        out.append((np.square(part).sum(1)[:, None] - 2 * part @ others.T + squares).min(1))
    return np.sqrt(np.maximum(np.concatenate(out), 0.0))


def probability_figures(probabilities: Array, outcomes: Array, bins: int = 10) -> dict[str, Any]:
    """Negative log-likelihood and calibration of the called side's probability, max(p, 1 - p), against it being right.

    Returns:
      {"nll", "expected_calibration_error", "reliability"}.
    """
    called = np.maximum(probabilities, 1.0 - probabilities)
    right = (probabilities > 0.5) == outcomes
    return {
        "nll": negative_log_likelihood(probabilities, outcomes),
        "expected_calibration_error": expected_calibration_error(called, right, bins),
        "reliability": reliability(called, right, bins),
    }


def uncertainty_figures(
    mean: Array, variance: Array, outcomes: Array, temperature: float, laplace_temperature: float = 1.0
) -> dict[str, Any]:
    """What scores that decide by their sign, of these moments, get right and know of it.

    Args:
      mean, variance: (n,) of a pair's difference, or of a cost; variances as they are used.
      outcomes: (n,) bool, whether the positive side is true.
      temperature: of the MAP scores, fitted to other records.
      laplace_temperature: what the posterior's own probabilities divide scores by.

    Returns:
      "n", "accuracy" with its interval, `probability_figures` of "map", "temperature" and "laplace", and "detection":
      areas under the ROC curve of a wrong call by the lack of MAP confidence, by the standard deviation, and by the
      lack of the posterior's confidence; a half tells nothing, None: all calls are right, or all wrong.
    """
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    wrong = (mean > 0) != outcomes
    low, high = wilson(int((~wrong).sum()), len(wrong))
    stated = {
        "map": probit_probability(mean),
        "temperature": probit_probability(mean, 0.0, temperature),
        "laplace": probit_probability(mean, variance, laplace_temperature),
    }
    return {
        "n": len(mean),
        "accuracy": float((~wrong).mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{name: probability_figures(p, outcomes) for name, p in stated.items()},
        "detection": {
            "map": auroc(-np.abs(mean), wrong),
            "std": auroc(variance, wrong),
            "laplace": auroc(-np.abs(stated["laplace"] - 0.5), wrong),
        },
    }


def distance_figures(distances: Array, variance: Array, points: int = 200) -> dict[str, Any]:
    """How variance goes with distance from the training data: rank correlation, and some points of the scatter."""
    shown = np.linspace(0, len(distances) - 1, min(points, len(distances))).astype(int)
    pairs = [{"distance": float(distances[i]), "variance": float(variance[i])} for i in shown]
    return {**spearman_interval(distances, variance), "points": pairs}
