"""The statistics of an audit against closed forms, linear programs, another library and simulated runs."""

import math

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy import optimize, stats

from rlhf_jax.errors import UserError
from rlhf_jax.privacy.accounting import Mechanism, epsilon
from rlhf_jax.privacy.auditing import (
    SHARES_GUESSED,
    _least_mu,
    _score_distribution,
    canary_score,
    fdp_lower_bound,
    gaussian_epsilon,
    gdp_estimate,
    noise_findings,
    null_alarm,
    refuted,
)

IMDB = Mechanism(256 / 12500, 1.6158, 4883)  # the shape of private PPO on 12,500 reviews
DELTA = 4e-5
IMDB_EPSILON = 4.000


def draw_scores(mechanism, canaries, rng, runs=1):
    """(scores in, scores out) of every run, from the mechanism's own distributions of scores."""
    grids = [_score_distribution(mechanism, present) for present in (True, False)]
    for inside in rng.random((runs, canaries)) < 0.5:
        counts = (inside.sum(), (~inside).sum())
        yield [np.interp(rng.random(n), chances, values) for n, (values, chances) in zip(counts, grids, strict=True)]


def simulate(mechanism, canaries, rng):
    """Projections (noisy steps, canaries) step by step, as the mechanism makes them, and who is in."""
    inside = rng.random(canaries) < 0.5
    drawn = (rng.random((mechanism.steps, canaries)) < mechanism.sampling_rate) & inside
    noise = rng.normal(size=(mechanism.steps * mechanism.uses, canaries))
    return np.repeat(drawn, mechanism.uses, axis=0) + mechanism.noise_multiplier * noise, inside


def split(scores, inside):
    return scores[inside], scores[~inside]


def gaussian_delta(mu, value):
    return stats.norm.cdf(mu / 2 - value / mu) - np.exp(value) * stats.norm.cdf(-mu / 2 - value / mu)


# The recursion


def p_value(mu, guesses, right, canaries):
    """The least significance at which the guesses refute mu-GDP, by halving."""
    low, high = 0.0, 1.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(mu, guesses, right, canaries, middle) else (middle, high)
    return high


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0, 3.0])
def test_one_guess_is_right_as_often_as_a_gaussian_lets_it_be(mu):
    assert p_value(mu, 1, 1, 1) == pytest.approx(stats.norm.cdf(mu / 2), abs=1e-9)


@pytest.mark.parametrize(
    ("mu", "guesses", "right", "canaries"), [(0.0, 4, 3, 4), (0.5, 6, 6, 6), (1.0, 6, 5, 10), (1.5, 8, 7, 8)]
)
def test_the_recursion_solves_the_linear_program(mu, guesses, right, canaries):
    """The most that the chances of `right` or more guesses sum to; F is its lowest tangent."""
    j = np.arange(guesses + 1)
    rows, limits = [], []
    for z in np.linspace(-7, 7, 1401):
        point, value = stats.norm.cdf([z, z + mu])
        slope = math.exp(-mu * z - mu**2 / 2)
        for i in range(1, guesses + 1):
            rows.append((j >= i) * j / canaries - slope * (j >= i - 1) * (guesses - j) / canaries)
            limits.append(value - slope * point)
    best = optimize.linprog(-1.0 * (j >= right), rows, limits, np.ones((1, guesses + 1)), [1.0])
    assert p_value(mu, guesses, right, canaries) == pytest.approx(-best.fun, rel=1e-3)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("guesses", [5, 40])
def test_independent_guesses_are_refuted_no_more_than_their_chance(mu, guesses):
    for right in range(guesses // 2, guesses + 1):
        chance = stats.binom.sf(right - 1, guesses, stats.norm.cdf(mu / 2))
        assert p_value(mu, guesses, right, guesses) >= chance * (1 - 1e-9)


@pytest.mark.parametrize(
    ("guesses", "right", "canaries", "significance", "figure"),
    [
        (200, 150, 1000, 0.05, 1.177457),
        (500, 380, 1000, 0.01, 1.238884),
        (62, 62, 500, 0.025, 4.071453),
        (2500, 2000, 5000, 0.0125, 1.605718),
        (100, 55, 1000, 0.05, 0.0),
    ],
)
def test_counts_refute_what_another_library_refutes(guesses, right, canaries, significance, figure):
    """Figures of jax-privacy 2.0.0, at delta 4e-5."""
    mu = _least_mu(guesses, right, canaries, significance)
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(figure, rel=1e-3)


# The bound


def test_epsilon_of_a_gaussian():
    assert gaussian_epsilon(1.0, 1e-6) == pytest.approx(4.8865541, abs=1e-6)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=1e-3)
    for mu in (0.1, 2.0, 30.0):
        assert gaussian_delta(mu, gaussian_epsilon(mu, 1e-5)) == pytest.approx(1e-5, rel=1e-5)
    assert gaussian_epsilon(0.0, 1e-5) == 0 and gaussian_epsilon(1e-6, 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf


def test_scores_that_say_nothing_bound_nothing():
    assert fdp_lower_bound(np.zeros(50), np.zeros(50), delta=DELTA) == 0
    rng = np.random.default_rng(0)
    assert fdp_lower_bound(*rng.normal(size=(2, 500)), delta=DELTA) == 0


def test_perfect_scores_bound_what_their_number_allows():
    few, many = (fdp_lower_bound(np.ones(n), np.zeros(n), delta=DELTA) for n in (50, 1000))
    share = SHARES_GUESSED[-1]
    mu = _least_mu(50, 50, 100, 0.05 / 2)
    assert share == 0.5 and few == gaussian_epsilon(mu, DELTA) and many > few


def test_more_confidence_bounds_less():
    (scores,) = draw_scores(IMDB, 1000, np.random.default_rng(0))
    bounds = [fdp_lower_bound(*scores, delta=DELTA, confidence=c) for c in (0.5, 0.9, 0.95, 0.999)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1] > 0


@pytest.mark.parametrize(
    "mechanism",
    [
        IMDB,
        Mechanism(0.02, 0.71, 200),
        Mechanism(0.00128, 0.5, 781),
        Mechanism(0.5, 2.0, 20),
        Mechanism(0.01, 0.5, 10),
    ],
)
@pytest.mark.parametrize("delta", [1e-6, DELTA])
def test_sampled_gaussians_trade_no_better_than_the_gaussian_of_their_epsilon(mechanism, delta):
    """Of every loss up to epsilon: this is what lets a refuted Gaussian refute the mechanism."""
    losses = from_gaussian_mechanism(
        mechanism.noise_multiplier, sampling_prob=mechanism.sampling_rate, value_discretization_interval=1e-3
    ).self_compose(mechanism.steps)
    spent = losses.get_epsilon_for_delta(delta)
    mu = optimize.brentq(lambda mu: gaussian_epsilon(mu, delta) - spent, 0.01, 10)
    for value in np.linspace(0, spent, 40):
        assert losses.get_delta_for_epsilon(value) <= gaussian_delta(mu, value) + 1e-6


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("canaries", [100, 1000])
def test_correct_runs_are_bounded_below_what_they_spend(canaries, confidence):
    rng = np.random.default_rng(1)
    bounds = [
        fdp_lower_bound(*scores, delta=DELTA, confidence=confidence)
        for scores in draw_scores(IMDB, canaries, rng, runs=200)
    ]
    assert np.mean(np.array(bounds) > IMDB_EPSILON) <= 1 - confidence
    assert np.median(bounds) > (1.5 if canaries == 1000 else 0.4)


# Scores, the estimate and its alarm


@pytest.mark.parametrize("uses", [1, 3])
def test_a_score_is_the_logarithm_of_a_ratio_of_densities(uses):
    mechanism = Mechanism(0.3, 0.8, 4, uses)
    shown = np.random.default_rng(0).normal(size=(4 * uses, 5))
    expected = np.zeros(5)
    for canary in range(5):
        for minibatch in shown[:, canary].reshape(4, uses):
            absent, present = (stats.norm.pdf(minibatch, mean, 0.8).prod() for mean in (0, 1))
            expected[canary] += math.log((0.7 * absent + 0.3 * present) / absent)
    np.testing.assert_allclose(canary_score(shown, mechanism), expected, rtol=1e-9)


def test_without_sampling_a_score_is_linear():
    score = canary_score(np.array([[0.5, 2.0]]), Mechanism(1.0, 2.0, 1))
    np.testing.assert_allclose(score, [0.0, 3 / 8], atol=1e-12)


def test_a_score_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="5 noisy steps of 2 minibatches used 3 times each"):
        canary_score(np.zeros((5, 2)), Mechanism(0.1, 1.0, 2, 3))
    with pytest.raises(UserError, match="noise_multiplier is 0: a run without noise has nothing to audit"):
        canary_score(np.zeros((2, 2)), Mechanism(0.1, 0.0, 2))


@pytest.mark.parametrize(
    "mechanism", [Mechanism(0.1, 1.0, 60), Mechanism(0.02, 0.6, 50, 2), Mechanism(1.0, 3.0, 10), Mechanism(0.5, 5.0, 1)]
)
def test_scores_of_simulated_runs_have_the_distribution_of_the_null(mechanism):
    shown, inside = simulate(mechanism, 6000, np.random.default_rng(2))
    scores = canary_score(shown, mechanism)
    for group, present in ((scores[inside], True), (scores[~inside], False)):
        values, chances = _score_distribution(mechanism, present)
        assert stats.kstest(group, lambda x, v=values, c=chances: np.interp(x, v, c)).pvalue > 1e-3


def test_the_score_tells_more_than_the_sum_of_projections():
    mechanism = Mechanism(0.02, 0.6, 200)
    shown, inside = simulate(mechanism, 4000, np.random.default_rng(3))
    by_score, by_sum = (
        gdp_estimate(*split(x, inside), delta=DELTA) for x in (canary_score(shown, mechanism), shown.sum(0))
    )
    assert by_score > 1.5 * by_sum


def test_the_estimate_is_epsilon_where_scores_are_gaussian():
    mechanism = Mechanism(1.0, 10.0, 100)  # mu = 1
    (scores,) = draw_scores(mechanism, 200_000, np.random.default_rng(4))
    assert gdp_estimate(*scores, delta=1e-6) == pytest.approx(4.8866, rel=0.02)
    assert gdp_estimate(*reversed(scores), delta=1e-6) == 0
    assert gdp_estimate(np.ones(3), np.zeros(3), delta=1e-6) == math.inf
    with pytest.raises(ValueError, match="two canaries"):
        gdp_estimate(np.ones(1), np.zeros(3), delta=1e-6)


def test_the_estimate_by_hand():
    """Means 3 and 1 with variances 2 and 4: mu = 2 / sqrt(3)."""
    found = gdp_estimate(np.array([2.0, 4.0]), np.array([-1.0, 1.0, 3.0]), delta=DELTA)
    assert found == pytest.approx(gaussian_epsilon(2 / math.sqrt(3), DELTA))


def test_an_alarm_is_as_rare_as_it_says_and_half_the_noise_sets_it_off():
    rng = np.random.default_rng(5)
    alarm = null_alarm(IMDB, 400, DELTA, rng=rng, level=0.05)
    assert alarm < null_alarm(IMDB, 400, DELTA, rng=rng, level=0.01)
    correct = [gdp_estimate(*scores, delta=DELTA) for scores in draw_scores(IMDB, 400, rng, runs=300)]
    raised = sum(value > alarm for value in correct)
    assert stats.binomtest(raised, 300, 0.05).pvalue > 1e-3
    mechanism, half = Mechanism(0.1, 2.0, 150), Mechanism(0.1, 1.0, 150)
    alarm = null_alarm(mechanism, 400, DELTA, rng=rng)
    for _ in range(20):
        shown, inside = simulate(half, 400, rng)
        assert gdp_estimate(*split(canary_score(shown, mechanism), inside), delta=DELTA) > alarm


def test_what_a_correct_run_spends_is_what_the_alarm_stands_on():
    """The median estimate comes near epsilon in a run of many steps."""
    middle = null_alarm(IMDB, 2000, DELTA, rng=np.random.default_rng(6), runs=400, level=0.5)
    spent = epsilon(sampling_rate=256 / 12500, noise_multiplier=1.6158, steps=4883, delta=DELTA)
    assert middle == pytest.approx(spent, rel=0.05)


# Noise


def test_chances_of_correct_noise_are_spread_evenly():
    rng = np.random.default_rng(7)
    found = [noise_findings(3 * rng.normal(size=(60, 40)), 3.0, level=0.2) for _ in range(300)]
    for name in ("p_size", "p_neighbours", "p_sum"):
        assert stats.kstest([getattr(f, name) for f in found], "uniform").pvalue > 1e-3
    assert np.mean([f.p_repeated < 0.05 for f in found]) < 0.1
    assert 0.1 < np.mean([bool(f.findings) for f in found]) < 0.26
    assert np.mean([f.stddev for f in found]) == pytest.approx(3.0, rel=5e-3)


def noisy(change):
    noise = np.random.default_rng(8).normal(size=(200, 64))
    return noise_findings(change(noise), 1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: 0.95 * x, "noise has a standard deviation of"),
        (lambda x: 0 * x, "noise has a standard deviation of 0 and not of 1"),
        (lambda x: np.concatenate([x[:-1], x[3:4]]), "two steps have nearly the same noise"),
        (lambda x: np.tile(x[:50], (4, 1)), "two steps have nearly the same noise"),
        (lambda x: (x + 0.1 * np.roll(x, 1, axis=0)) / math.sqrt(1.01), "goes with that of the step before"),
        (lambda x: x + 0.15 * x[0], "does not add up over steps"),
        (lambda x: x - np.roll(x, 1, axis=0), "does not add up over steps"),
    ],
)
def test_noise_that_is_small_or_comes_back_is_found(change, sentence):
    assert any(sentence in finding for finding in noisy(change).findings), noisy(change)


def test_the_size_of_a_noise_that_never_changes_is_judged_by_one_step():
    def always_the_same(x):
        small = x[np.argsort(np.square(x).sum(1))[20]]  # one step in ten has less
        return np.tile(small, (200, 1))

    usual, half = noisy(always_the_same), noisy(lambda x: always_the_same(x) / 2)
    assert len(usual.findings) == 3 and not any("standard deviation" in finding for finding in usual.findings)
    assert len(half.findings) == 4 and "standard deviation" in half.findings[0]


def test_more_noise_than_was_asked_for_is_no_finding():
    assert noisy(lambda x: 2 * x).findings == ()
    with pytest.raises(ValueError, match="1 steps along 64 directions: give at least 2"):
        noisy(lambda x: x[:1])
