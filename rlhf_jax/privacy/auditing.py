"""The statistics of a privacy audit: what the noisy steps of a run give away of the canaries that went into it.

Half of all canaries, each by a fair coin, are records of the run. Who sees every noisy step scores each canary; the
scores give a lower bound of epsilon that holds with a stated confidence, and an estimate that has none but an alarm.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import fft, optimize, special, stats

from rlhf_jax.errors import UserError
from rlhf_jax.privacy.accounting import Mechanism, composed_epsilon

Array = np.ndarray

SHARES_GUESSED = (1 / 8, 1 / 2)  # of all canaries: few guesses refute a small epsilon, only many a large one
MU_TOLERANCE = 1e-4
LARGEST_MU = 64.0  # a claim that no audit reaches
GRID_PER_DEVIATION = 50  # points of a null's grid to a standard deviation of one minibatch's score
TAIL = 9.0  # standard deviations of a normal beyond which nothing is drawn


@dataclass(frozen=True)
class NoiseFindings:
    """How the noise of a run compares with what it should be.

    Attributes:
      stddev: measured, over all steps and directions.
      p_size: the chance of noise as small as this, were it of the standard deviation that it should have.
      p_repeated: of two steps as alike as the two most alike (Bonferroni over all pairs), were they independent.
      p_neighbours: of neighbouring steps as correlated as these.
      p_sum: of a sum over steps as far from what independent steps add up to.
      findings: a plain sentence for each chance below a quarter of the level.
    """

    stddev: float
    p_size: float
    p_repeated: float
    p_neighbours: float
    p_sum: float
    findings: tuple[str, ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; `flags` is empty where nothing speaks against the run.

    Attributes:
      epsilon: what the accountant says, at `delta`, of adding or removing one record: the game that canaries play.
      lower_bound: epsilon is no smaller, with `confidence`, if the trade-off of the two errors is a Gaussian's.
      estimate: epsilon of the Gaussian that separates its scores as far; no bound: correct runs lie on either side.
      alarm: correct runs have an estimate above it with a chance of `level` at most.
      noise: findings at the same level.
      flags: plain sentences.
    """

    epsilon: float
    delta: float
    lower_bound: float
    confidence: float
    estimate: float
    alarm: float
    level: float
    noise: NoiseFindings
    flags: tuple[str, ...]


def audit_report(
    projections: Array,
    included: Array,
    idle: Array,
    *,
    mechanism: Mechanism,
    delta: float,
    rng: np.random.Generator,
    confidence: float = 0.95,
    level: float = 0.01,
) -> AuditReport:
    """All of an audit's figures and what is wrong with the run, in plain sentences.

    Args:
      projections: (noisy steps, canaries), the noisy sums along the canaries' directions over the sensitivity; each
        minibatch's uses follow one another.
      included: (canaries,) bool, each by a fair coin.
      idle: (noisy steps, directions), the noise alone over the sensitivity: the noisy less the clean sum, or the noisy
        sum along directions in which no record has a share.
      mechanism: what the run claims to be.
    """
    scores = canary_score(projections, mechanism)
    inside, outside = scores[included], scores[~included]
    epsilon = composed_epsilon([mechanism], delta)
    bound = fdp_lower_bound(inside, outside, delta=delta, confidence=confidence)
    estimate = gdp_estimate(inside, outside, delta=delta)
    alarm = null_alarm(mechanism, len(scores), delta, level=level, rng=rng)
    noise = noise_findings(idle, mechanism.noise_multiplier, level=level)
    flags = []
    if bound > epsilon:
        flags.append(
            f"the run spends an epsilon of at least {bound:.3g} (confidence {confidence:g}), "
            f"more than the {epsilon:.3g} that it accounts for"
        )
    if estimate > alarm:
        flags.append(
            f"the estimate of epsilon, {estimate:.3g}, is above {alarm:.3g}, "
            f"which a correct run exceeds with a chance of {level:g}"
        )
    flags.extend(noise.findings)
    return AuditReport(epsilon, delta, bound, confidence, estimate, alarm, level, noise, tuple(flags))


def canary_score(projections: Array, mechanism: Mechanism) -> Array:
    """(canaries,) log-likelihood ratios, of a canary being in the run over its being out: the most powerful score.

    A minibatch that shows x of a canary, the mean over its uses, counts log(1 - q + q exp((2 x - 1) / (2 sigma^2)))
    with sigma the noise per minibatch.

    Args:
      projections: (noisy steps, canaries), as in `audit_report`.

    Raises:
      ValueError: another number of noisy steps than the mechanism has.
    """
    if len(projections) != mechanism.steps * mechanism.uses:
        raise ValueError(
            f"{len(projections)} noisy steps of {mechanism.steps} minibatches used {mechanism.uses} times each"
        )
    shown = np.asarray(projections, np.float64).reshape(mechanism.steps, mechanism.uses, -1).mean(axis=1)
    return _minibatch_score(shown, mechanism).sum(axis=0)


def _minibatch_score(shown, mechanism):
    rate, noise = mechanism.sampling_rate, mechanism.noise_per_minibatch
    if noise == 0:
        raise UserError("noise_multiplier is 0: a run without noise has nothing to audit, give noise above 0")
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * shown - 1) / (2 * noise**2))


def fdp_lower_bound(scores_in: Array, scores_out: Array, *, delta: float, confidence: float = 0.95) -> float:
    """A lower bound of epsilon from one run (Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235).

    The highest scores are guessed to be in and as many of the lowest to be out; the rest is not guessed. The bound is
    of the least Gaussian trade-off under which so many right guesses are not too rare. It is tried with the shares
    `SHARES_GUESSED` of the canaries, set in advance, each at a part of 1 - confidence (Bonferroni).

    It holds where canaries are in by independent fair coins, and for a mechanism whose errors trade off no better than
    those of the Gaussian with its (epsilon, delta): those of sampled Gaussians do not, as tests confirm.

    Args:
      scores_in, scores_out: of canaries in the run and out of it; a higher score says in.
    """
    scores = np.concatenate([scores_in, scores_out])
    inside = np.arange(len(scores)) < len(scores_in)
    order = np.lexsort((~inside, scores))  # equal scores make wrong guesses: a tie counts against the bound
    significance = (1 - confidence) / len(SHARES_GUESSED)
    mu = 0.0
    for share in SHARES_GUESSED:
        each = max(1, round(share * len(scores) / 2))
        right = inside[order[-each:]].sum() + (~inside[order[:each]]).sum()
        mu = max(mu, _least_mu(2 * each, int(right), len(scores), significance))
    return gaussian_epsilon(mu, delta)


def _least_mu(guesses, right, canaries, significance):
    """The least mu whose Gaussian trade-off is not refuted; every smaller one is."""
    low, high = 0.0, LARGEST_MU
    if not refuted(low, guesses, right, canaries, significance):
        return low
    while high - low > MU_TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle, guesses, right, canaries, significance) else (low, middle)
    return low


def refuted(mu: float, guesses: int, right: int, canaries: int, significance: float) -> bool:
    """Whether `right` of so many guesses, or more, have a chance below `significance` under mu-GDP.

    With p_j the chance of j right guesses of c and m canaries, mu-GDP asks for all i that
    sum_(j >= i) j/m p_j <= F(sum_(j >= i - 1) (c - j)/m p_j), F(a) = Phi(Phi^-1(a) + mu) (the paper's recursion). Let
    all of `significance` be at `right`: this gives the least chances below it, refuted if they sum to more than 1.
    """
    in_right, in_wrong = significance * right / canaries, significance * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        asked = special.ndtr(special.ndtri(in_right) - mu)
        if asked <= in_wrong:
            break
        in_right = min(1.0, in_right + i / (guesses - i) * (asked - in_wrong))
        in_wrong = asked
    return in_right + in_wrong > guesses / canaries


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of mu-GDP, in closed form (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon):
        log_low = special.log_ndtr(-epsilon / mu - mu / 2)
        return special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_low) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    if mu == math.inf:
        return math.inf
    high = mu * (mu / 2 - special.ndtri(delta))  # there the first term alone is delta
    return optimize.brentq(excess, 0.0, high, xtol=1e-9)


def gdp_estimate(scores_in: Array, scores_out: Array, *, delta: float) -> float:
    """An estimate of epsilon, not a bound: of the Gaussian whose means lie as many standard deviations apart.

    The deviation is pooled over canaries in and out; there have to be two of each.
    """
    inside = np.arange(len(scores_in) + len(scores_out)) < len(scores_in)
    return gaussian_epsilon(float(_separation(np.concatenate([scores_in, scores_out])[None], inside[None])[0]), delta)


def _separation(scores, inside):
    """(runs,) differences of the two means in pooled standard deviations, of scores (runs, canaries)."""
    counts = np.stack([inside.sum(axis=1), (~inside).sum(axis=1)])
    if counts.min() < 2:
        raise ValueError("an estimate needs two canaries in the run and two out of it")
    means = np.stack([(scores * group).sum(axis=1) for group in (inside, ~inside)]) / counts
    rest = scores - np.where(inside, means[0][:, None], means[1][:, None])
    variances = np.stack([(rest**2 * group).sum(axis=1) for group in (inside, ~inside)]) / (counts - 1)
    gap, spread = means[0] - means[1], np.sqrt(variances.mean(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, gap / spread, 0.0)


def null_alarm(
    mechanism: Mechanism,
    canaries: int,
    delta: float,
    *,
    rng: np.random.Generator,
    runs: int = 2000,
    level: float = 0.01,
) -> float:
    """The estimate that a correct run exceeds with a chance of `level` at most, by simulated runs of the mechanism.

    Scores are drawn from their own distributions, of canaries in and out: the sum over minibatches is a convolution
    power on a grid, so that a simulated run costs a draw a canary whatever its steps.
    """
    tables = [_score_distribution(mechanism, present) for present in (False, True)]
    inside = rng.random((runs, canaries)) < 0.5
    chances = rng.random((runs, canaries))
    scores = np.where(inside, *(np.interp(chances, cumulative, values) for values, cumulative in reversed(tables)))
    rank = min(runs, math.ceil((runs + 1) * (1 - level)))
    return gaussian_epsilon(float(np.sort(_separation(scores, inside))[rank - 1]), delta)


def _score_distribution(mechanism, present):
    """The grid of a canary's score over a run and its cumulative chances, of one that is in or out."""
    z = np.linspace(-TAIL, TAIL, 2**17 + 1)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    shown = mechanism.noise_per_minibatch * z
    values = _minibatch_score(np.concatenate([shown, shown + 1]), mechanism)
    rate = mechanism.sampling_rate if present else 0.0
    weights = np.concatenate([(1 - rate) * weights, rate * weights])
    mean = weights @ values
    deviation = math.sqrt(weights @ (values - mean) ** 2)
    interval = deviation / GRID_PER_DEVIATION
    places = np.rint(values / interval).astype(np.int64)
    reach = 2 * 12 * deviation * math.sqrt(mechanism.steps) + (values.max() - values.min())
    length = fft.next_fast_len(math.ceil(reach / interval) + 2, real=True)
    wrapped = np.bincount(places % length, weights, length)
    total = fft.irfft(fft.rfft(wrapped) ** mechanism.steps, length).clip(0.0)
    start = round(mechanism.steps * mean / interval) - length // 2
    total = np.roll(total, -start)
    return (start + np.arange(length)) * interval, np.cumsum(total) / total.sum()


def noise_findings(idle: Array, stddev: float, *, level: float = 0.01) -> NoiseFindings:
    """Tests noise (noisy steps, directions) for being normal, independent over steps and no smaller than it should be.

    Four tests share the level: any pair of steps alike, neighbours correlated, the variance of the sum over steps
    other than the sum of their variances, and less noise than `stddev` (chi-square). Where steps are not independent
    the last counts one step's directions alone.

    Args:
      stddev: of the noise of each entry, in the units of `idle`.
    """
    noise = np.asarray(idle, np.float64)
    steps, directions = noise.shape
    if steps < 2 or directions < 2:
        raise ValueError(f"noise of {steps} steps along {directions} directions: give at least 2 of each")
    squares = np.square(noise).sum(axis=1)
    dependence = (_repeated(noise, squares), _neighbours(noise, squares), _sum(noise))
    each = level / 4
    size = squares.sum() / stddev**2
    count = noise.size
    if min(dependence) < each:
        size, count = size / steps, directions
    p_size = float(stats.chi2.cdf(size, count))
    measured = math.sqrt(squares.sum() / noise.size)
    sentences = (
        f"noise has a standard deviation of {measured:.3g} and not of {stddev:.3g} (p = {p_size:.1g})",
        f"two steps have nearly the same noise (p = {dependence[0]:.1g})",
        f"the noise of a step goes with that of the step before (p = {dependence[1]:.1g})",
        f"noise does not add up over steps as independent draws do (p = {dependence[2]:.1g})",
    )
    chances = (p_size, *dependence)
    findings = tuple(sentence for sentence, chance in zip(sentences, chances, strict=True) if chance < each)
    return NoiseFindings(measured, *chances, findings)


def _repeated(noise, squares):
    """The chance of a correlation as large as the largest between two steps; its square is a beta variable."""
    steps, directions = noise.shape
    unit = noise / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]
    largest, rows = 0.0, 512
    for start in range(0, steps, rows):
        products = np.abs(unit[start : start + rows] @ unit[start:].T)
        products[np.arange(len(products)), np.arange(len(products))] = 0.0
        largest = max(largest, float(products.max()))
    chance = stats.beta.sf(min(1.0, largest**2), 0.5, (directions - 1) / 2)
    return min(1.0, float(chance) * steps * (steps - 1) / 2)


def _neighbours(noise, squares):
    """The chance of a lag-1 correlation as far from zero."""
    spread = math.sqrt((squares[1:] * squares[:-1]).sum() / noise.shape[1])
    return float(2 * stats.norm.sf(abs((noise[1:] * noise[:-1]).sum()) / spread)) if spread > 0 else 1.0


def _sum(noise):
    """The chance of a variance between directions' means as far from that within them (an F test)."""
    steps, directions = noise.shape
    means = noise.mean(axis=0)
    between, within = steps * np.square(means).sum(), np.square(noise - means).sum() / (steps - 1)
    if between == within == 0:
        return 1.0
    ratio = between / within if within > 0 else math.inf
    f = stats.f(directions, directions * (steps - 1))
    return float(min(1.0, 2 * min(f.cdf(ratio), f.sf(ratio))))
