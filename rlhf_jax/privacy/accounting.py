"""The privacy accountant: epsilon of Poisson-subsampled Gaussian steps, and the noise that a budget asks for.

`sampling_rate` is q, the chance that a record enters a minibatch; `noise_multiplier` is sigma, the noise's standard
deviation over the clip norm; `steps` counts minibatches and `uses` the noisy steps taken on each. With `physical_batch`
a minibatch is cut down to that many records at random (truncated Poisson sampling, arXiv 2508.15089); that also needs
`records`, the size of the data set.

`adjacency` says what a neighbouring data set is: "add_or_remove" one record (turning its gradient into zero counts the
same), or "replace_one" record by any other, whose two gradients may differ by twice the clip norm.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_jax.errors import UserError

ADJACENCIES = ("add_or_remove", "replace_one")
LOSS_INTERVAL = 1e-4  # of the grid that privacy losses are rounded up to
GRID_ERROR = 1e-3  # relative, of epsilon: a grid that may err by more is made finer
SMALLEST_DELTA = 1e-13  # below it the convolution's cut tails count
CUT_TAILS = 1e-15  # probability outside of a composed grid, counted as an infinite loss
# A spectrum to the power of `steps` has its rounding times `steps`, and delta is a sum of its terms.
ROUNDING = float(np.finfo(np.longdouble).eps) / 2
SMALLEST_NOISE = 0.02  # over the sensitivity: less noise, epsilon in the thousands, is accounted as none
NOISE_RANGE = (0.05, 1e4)
EPSILON_WINDOW = 1e-3


@dataclass(frozen=True)
class Mechanism:
    """Noisy steps of one kind: `steps` minibatches at rate q, each used `uses` times with noise sigma."""

    sampling_rate: float
    noise_multiplier: float
    steps: int
    uses: int = 1
    physical_batch: int | None = None
    records: int | None = None

    def __post_init__(self):
        if not 0 < self.sampling_rate <= 1:
            raise UserError(f"sampling_rate is {self.sampling_rate:g}: give a rate above 0 and at most 1")
        if not self.noise_multiplier >= 0:
            raise UserError(f"noise_multiplier is {self.noise_multiplier:g}: give 0 or more")
        if self.steps < 0 or self.uses < 1:
            raise UserError(f"steps is {self.steps} and uses is {self.uses}: give at least 0 steps and 1 use")
        if self.physical_batch is None:
            return
        if self.records is None:
            raise UserError(
                f"physical_batch is {self.physical_batch} without records: the chance of a cut minibatch "
                "needs the number of records, give it"
            )
        if self.physical_batch < 1 or self.records < 1:
            raise UserError(
                f"physical_batch is {self.physical_batch} and records is {self.records}: give at least 1 of each"
            )

    @property
    def truncated(self) -> bool:
        """Whether a minibatch can be cut at all."""
        return self.physical_batch is not None and self.records is not None and self.physical_batch < self.records

    @property
    def sampled(self) -> bool:
        """Whether chance decides who is in a minibatch; without it the steps are one Gaussian in closed form."""
        return self.truncated or self.sampling_rate < 1

    @property
    def noise_per_minibatch(self) -> float:
        """k uses of a minibatch at sigma tell as much as one at sigma / sqrt(k), whatever was sampled."""
        return self.noise_multiplier / math.sqrt(self.uses)


def epsilon(
    *,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    adjacency: str = "add_or_remove",
    uses: int = 1,
    physical_batch: int | None = None,
    records: int | None = None,
) -> float:
    """Epsilon at `delta` after `steps` minibatches: an upper bound, by privacy loss distributions.

    Zero noise gives infinity, zero steps give 0. Figures are kept: asking again is free, and asking for another number
    of steps of the same mechanism (a progress line) costs one convolution, 0.15 to 0.4 s on a CPU core.

    Raises:
      UserError: a value out of its range, or `physical_batch` without `records`.
    """
    mechanism = Mechanism(sampling_rate, noise_multiplier, steps, uses, physical_batch, records)
    return composed_epsilon([mechanism], delta, adjacency)


def composed_epsilon(
    mechanisms: Sequence[Mechanism], delta: float, adjacency: str = "add_or_remove", *, coarser: float = 1.0
) -> float:
    """Epsilon at `delta` of all mechanisms together, each of which may see the same records (sequential composition).

    The losses' grid has an interval of 1e-4, coarser where noise below 0.6 makes losses large, and finer where the grid
    could move epsilon by more than 1e-3 of itself. Rounding is covered too: it is charged to delta. A grid that is
    `coarser` so many times is as many times as fast, and a bound all the same, a little larger.
    """
    _check(delta, adjacency)
    steps: dict[Mechanism, int] = {}  # runs of one mechanism are one longer run
    for mechanism in mechanisms:
        kind = replace(mechanism, steps=1)
        steps[kind] = steps.get(kind, 0) + mechanism.steps
    together = tuple(replace(kind, steps=count) for kind, count in steps.items() if count)
    return _composed_epsilon(together, delta, adjacency, coarser)


@functools.lru_cache(maxsize=4096)
def _composed_epsilon(mechanisms: tuple[Mechanism, ...], delta: float, adjacency: str, coarser: float) -> float:
    if not mechanisms:
        return 0.0
    noise = min(_noise_over_sensitivity(mechanism, adjacency) for mechanism in mechanisms)
    if noise < SMALLEST_NOISE:
        return math.inf
    sampled_steps = sum(mechanism.steps for mechanism in mechanisms if mechanism.sampled)
    rounding = sampled_steps * ROUNDING
    if delta < 4 * rounding:
        raise UserError(
            f"delta {delta:g} is too small to account for {sampled_steps} steps: "
            f"give at least {4 * rounding:.1g}, or take fewer steps"
        )

    def on_grid(interval):
        total = functools.reduce(
            lambda left, right: left.compose(right), (_losses(m, adjacency, interval) for m in mechanisms)
        )
        return float(total.get_epsilon_for_delta(delta - rounding))

    interval = coarser * LOSS_INTERVAL / min(1.0, noise / 0.6) ** 2
    value = on_grid(interval)
    if value in (0.0, math.inf):
        return value
    # Rounding a loss to a grid adds at most interval^2 / 4 to its variance; the whole variance is about (epsilon / z)^2
    # with z^2 = 2 ln(1 / delta), and epsilon moves by half of what the variance does.
    error = max(1, sampled_steps) * interval**2 * -math.log(delta) / (4 * value**2)
    return on_grid(interval * math.sqrt(GRID_ERROR / error)) if error > GRID_ERROR else value


def _noise_over_sensitivity(mechanism, adjacency):
    """Noise of one composed unit over how far one record moves it; all steps are one unit where nothing is sampled."""
    noise = mechanism.noise_per_minibatch / (1 if mechanism.sampled else math.sqrt(mechanism.steps))
    return noise / (2 if adjacency == "replace_one" or mechanism.truncated else 1)


@functools.lru_cache(maxsize=8)
def _losses(mechanism, adjacency, interval):
    """The privacy loss distribution of all steps."""
    if mechanism.sampled:
        return _self_compose(_minibatch_losses(replace(mechanism, steps=1), adjacency, interval), mechanism.steps)
    noise = mechanism.noise_per_minibatch / math.sqrt(mechanism.steps)
    return _minibatch_losses(Mechanism(1.0, noise, steps=1), adjacency, interval)


@functools.lru_cache(maxsize=8)
def _minibatch_losses(mechanism, adjacency, interval):
    """The privacy loss distribution of one minibatch and all its uses, bounded on the grid (arXiv 2207.04380)."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution as pld

    relation = dp_accounting.NeighboringRelation
    relation = relation.ADD_OR_REMOVE_ONE if adjacency == "add_or_remove" else relation.REPLACE_ONE
    shared = {"value_discretization_interval": interval, "neighboring_relation": relation}
    if mechanism.truncated:
        return pld.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=mechanism.records,
            sampling_probability=mechanism.sampling_rate,
            truncated_batch_size=mechanism.physical_batch,
            noise_multiplier=mechanism.noise_per_minibatch,
            **shared,
        )
    return pld.from_gaussian_mechanism(mechanism.noise_per_minibatch, sampling_prob=mechanism.sampling_rate, **shared)


def _self_compose(losses, steps):
    """dp-accounting's composition with itself in extended precision: float64 moves epsilon by 1e-3 at 1e5 steps."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    directions = (losses._pmf_remove,) if losses._symmetric else (losses._pmf_remove, losses._pmf_add)
    return PrivacyLossDistribution(*(_convolution_power(direction.to_dense_pmf(), steps) for direction in directions))


def _convolution_power(pmf, steps):
    from dp_accounting.pld import common, pld_pmf
    from scipy import fft

    low, high = common.compute_self_convolve_bounds(pmf._probs, steps, CUT_TAILS)
    length = fft.next_fast_len(max(high - low + 1, pmf.size), real=True)
    spectrum = fft.rfft(pmf._probs.astype(np.longdouble), length) ** steps
    probabilities = np.roll(fft.irfft(spectrum, length), -low)[: high - low + 1].astype(np.float64)
    infinite = CUT_TAILS - math.expm1(steps * math.log1p(-pmf._infinity_mass))
    return pld_pmf.DensePLDPmf(pmf._discretization, pmf._lower_loss * steps + low, probabilities, infinite, True)


def noise_multiplier(
    *,
    epsilon: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    adjacency: str = "add_or_remove",
    uses: int = 1,
    physical_batch: int | None = None,
    records: int | None = None,
) -> float:
    """The smallest noise multiplier whose epsilon does not exceed the target; its epsilon falls short by 1e-3 at most.

    (By 1e-3 of the target where that is below 1.) Takes about six epsilons, a few seconds.

    Raises:
      UserError: no noise between 0.05 and 10,000 meets the target, and what to change.
    """
    if not 0 < epsilon < math.inf:
        raise UserError(f"the target epsilon is {epsilon:g}: give a finite number above 0")
    if steps < 1:
        raise UserError(f"steps is {steps}: noise is calibrated for at least 1 step")
    mechanism = Mechanism(sampling_rate, 1.0, steps, uses, physical_batch, records)
    _check(delta, adjacency)
    window = EPSILON_WINDOW * min(1.0, epsilon)

    def spent(noise, coarser=1.0):
        return _composed_epsilon((replace(mechanism, noise_multiplier=noise),), delta, adjacency, coarser)

    # A coarse grid is ten times as fast, and only a little above the one that decides.
    near = _least_noise(functools.partial(spent, coarser=10.0), epsilon, window / 4, start=1.0)
    return _least_noise(spent, epsilon, window, start=near)


def _least_noise(spent, target, window, start):
    """The least noise whose epsilon is in [target - window, target], by the decreasing function `spent`."""
    low, high = _bracket(spent, target, start)
    # Epsilon over noise is nearly a line in logarithms: follow it, and halve now and then so that both ends move.
    for trial in range(100):
        if high[1] >= target - window or high[0] <= low[0] * (1 + 1e-12):
            break
        share = 0.5
        if trial % 3 < 2 and high[1] > 0 and low[1] < math.inf:
            share = math.log(low[1] / (target - window / 2)) / math.log(low[1] / high[1])
        noise = low[0] * (high[0] / low[0]) ** share
        value = spent(noise)
        low, high = (low, (noise, value)) if value <= target else ((noise, value), high)
    return high[0]


def _bracket(spent, target, start):
    """Two (noise, epsilon) pairs: the first spends more than the target, the second does not."""
    noise, value = start, spent(start)
    above = value > target
    least_factor = 1.001
    while True:
        factor = min(max(value / target if above else target / max(value, 1e-9), least_factor), 4.0)
        least_factor **= 2
        other = min(noise * factor, NOISE_RANGE[1]) if above else max(noise / factor, NOISE_RANGE[0])
        if other == noise:
            break
        before, noise, value = (noise, value), other, spent(other)
        if (value > target) != above:
            return (before, (noise, value)) if above else ((noise, value), before)
    if above:
        raise UserError(
            f"noise_multiplier {noise:g}, the largest, still spends epsilon {value:.4g}, above the target {target:g}: "
            "take fewer steps or uses, a smaller sampling rate, or a larger epsilon or delta"
        )
    raise UserError(
        f"noise_multiplier {noise:g}, the smallest, spends only epsilon {value:.4g} of the target {target:g}: "
        "take more steps, a larger sampling rate, or a smaller epsilon or delta"
    )


def rdp_epsilon(
    *,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    adjacency: str = "add_or_remove",
    uses: int = 1,
    physical_batch: int | None = None,
    records: int | None = None,
) -> float:
    """The same epsilon by Renyi differential privacy: looser, reached by other mathematics, shown as a check."""
    _check(delta, adjacency)
    mechanism = Mechanism(sampling_rate, noise_multiplier, steps, uses, physical_batch, records)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    from dp_accounting.rdp import compute_epsilon
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    divergences = np.array([_renyi_divergence(mechanism, adjacency, order) for order in DEFAULT_RDP_ORDERS])
    return float(compute_epsilon(DEFAULT_RDP_ORDERS, steps * divergences, delta)[0])


def _renyi_divergence(mechanism, adjacency, order):
    """Of one minibatch, at one order; removing a record diverges more than adding it (arXiv 1908.10530, theorem 5)."""
    from scipy.stats import binom

    rate, noise = mechanism.sampling_rate, mechanism.noise_per_minibatch
    moment = _log_moment(rate, noise, order, replaced=adjacency == "replace_one")
    if mechanism.truncated:
        # In a full minibatch a record takes another's place: both gradients change, whatever the adjacency.
        batch, records = mechanism.physical_batch, mechanism.records
        full = binom.sf(batch - 1, records - 1, rate)
        if full > 0:
            kept = binom.sf(batch, records, rate) * batch / full / records
            of_full = _log_moment(kept, noise / 2, order, replaced=True)
            moment = np.logaddexp(np.log(full) + of_full, np.log1p(-full) + moment)
    return max(0.0, float(moment)) / (order - 1)


def _log_moment(rate, noise, order, replaced):
    """log of the integral of P^order Q^(1 - order), by the trapezoid rule: its error falls exponentially in the step.

    P is the sampled Gaussian of a record at 1; Q that of none or, `replaced`, that of a record at -1.
    """
    step = min(noise, noise**2) / 8
    x = np.arange(-12 * noise, (2 if replaced else 1) * order + 12 * noise, step)
    with np.errstate(divide="ignore"):
        absent, present = np.log1p(-rate), np.log(rate)
    gaussian = -(x**2) / (2 * noise**2)
    p = np.logaddexp(absent, present + (2 * x - 1) / (2 * noise**2))
    q = np.logaddexp(absent, present - (2 * x + 1) / (2 * noise**2)) if replaced else 0.0
    exponents = gaussian + order * p + (1 - order) * q
    peak = exponents.max()
    return peak + np.log(np.exp(exponents - peak).sum() * step / (noise * math.sqrt(2 * math.pi)))


def check_delta(delta: float, records: int, where: str = "delta") -> None:
    """Refuse a delta that lets a mechanism publish a whole record: it has to be below 1 / records.

    `where` is what the message calls it.
    """
    if delta >= 1 / records:
        raise UserError(
            f"{where} {delta:g} is not below 1/{records} = {1 / records:.3g} for {records} records: "
            f"give a smaller one, {0.1 / records:.1g} or less"
        )


def _check(delta, adjacency):
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta:g}: give a probability strictly between 0 and 1")
    if delta < SMALLEST_DELTA:
        raise UserError(f"delta is {delta:g}: float64 resolves it down to {SMALLEST_DELTA:g}, give at least that")
    if adjacency not in ADJACENCIES:
        raise UserError(f'adjacency is "{adjacency}": give one of {", ".join(ADJACENCIES)}')
