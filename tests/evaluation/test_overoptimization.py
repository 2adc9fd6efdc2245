"""Over-optimization: KL that ties leave, intervals over runs and prompts, fits, and simulations with known answers."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation import best_of_n_estimate, best_of_n_kl
from rlhf_jax.evaluation.overoptimization import (
    ORACLE,
    Ranked,
    crossed_interval,
    gao_fit,
    laboratory,
    numbers_of,
    policy_curve,
    same_scores,
    standardized,
    tried,
)
from rlhf_jax.objectives.adjustment import Moments

# --- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool, numbers", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_end_at_the_pool(pool, numbers):
    assert numbers_of(pool) == numbers


@pytest.mark.parametrize("levels", [3, 10_000])  # many ties, none
def test_all_n_at_once_are_the_single_estimates(levels):
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(levels, size=(5, 12)) * 0.5, rng.normal(size=(5, 12))
    found = Ranked(proxy).best_of_n(gold, numbers_of(12))
    expected = np.stack([best_of_n_estimate(proxy, gold, n) for n in numbers_of(12)], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    shuffle = rng.permutation(12)
    np.testing.assert_allclose(Ranked(proxy[:, shuffle]).best_of_n(gold[:, shuffle], numbers_of(12)), found)


def test_a_score_that_is_not_a_number_has_no_rank():
    with pytest.raises(ValueError, match="have no rank"):
        Ranked(np.asarray([[1.0, np.nan]]))


def test_without_ties_the_kl_is_just_below_its_bound():
    numbers = [1, 2, 4, 64, 512]
    (kl,) = Ranked(np.random.default_rng(0).normal(size=(1, 512))).kl(numbers)
    gap = best_of_n_kl(numbers) - kl
    assert kl[0] == 0 and (gap >= -1e-12).all() and (gap < 0.043).all() and gap[1] < 1e-5


def test_few_answers_end_at_the_share_of_the_best():
    """Fifty answers at n = 4096: 7.32 nats by the formula, but 2.66 where the best one has 7 % of the policy."""
    for share, nats in ((0.07, 2.66), (0.02, math.log(50))):
        best = round(share * 5000)
        others = np.arange(5000 - best) % 49
        (kl,) = Ranked(np.concatenate([others, np.full(best, 50)])[None].astype(float)).kl([1, 4096])
        assert kl == pytest.approx([0, nats], abs=2e-3)
    assert best_of_n_kl(4096) == pytest.approx(7.318, abs=1e-3)


def test_kl_of_ties_by_enumeration():
    """Two of four answers are one: each pair drawn with replacement, ties broken evenly, counted by hand."""
    scores = np.asarray([[1.0, 2.0, 2.0, 3.0]])
    chances = np.zeros(4)
    for i in range(4):
        for j in range(4):
            best = [k for k in (i, j) if scores[0, k] == max(scores[0, i], scores[0, j])]
            for k in best:
                chances[k] += 1 / 16 / len(best)
    assert Ranked(scores).kl([2])[0, 0] == pytest.approx(np.sum(chances * np.log(chances / 0.25)))


def test_a_repeated_answer_keeps_its_first_score():
    answers = np.asarray([[7, 3, 7, 7], [1, 2, 3, 4]])
    values = np.asarray([[1.0, 5.0, 1.0000001, 0.9999999], [1.0, 2.0, 3.0, 4.0]])
    assert same_scores(values, answers).tolist() == [[1.0, 5.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]


# --- intervals -------------------------------------------------------------------------------------------------------


def test_one_run_is_a_mean_of_prompts():
    """Student's interval by hand: mean 2, s = 1, n = 3, t = 4.3027."""
    found = crossed_interval("x", np.asarray([[1.0, 2.0, 3.0]]))
    half = 4.302653 / math.sqrt(3)
    assert (found["x"], found["x_low"]) == (2.0, pytest.approx(2 - half))
    assert crossed_interval("x", np.asarray([[4.0]])) == {"x": 4.0}
    assert crossed_interval("x", np.asarray([[4.0], [6.0]]))["x_high"] == pytest.approx(5 + 12.7062 * 1.0)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    both = 5 * rng.normal(size=20) + rng.normal(size=(3, 1))  # what a run and a prompt have in common
    one, other = (both + 0.1 * rng.normal(size=(3, 20)) for _ in range(2))
    paired = crossed_interval("x", one, other)
    assert paired == crossed_interval("x", one - other)
    unpaired = crossed_interval("x", one, other[:2])  # other runs, the same prompts
    assert unpaired["x"] == pytest.approx(one.mean() - other[:2].mean())
    width = unpaired["x_high"] - unpaired["x_low"]
    assert width > 10 * (paired["x_high"] - paired["x_low"])
    assert crossed_interval("x", one, one) == {"x": 0.0, "x_low": 0.0, "x_high": 0.0}


@pytest.mark.parametrize("runs, prompts, between", [(3, 30, 1.0), (3, 30, 0.1), (5, 8, 0.5), (1, 20, 0.0)])
def test_the_interval_covers(runs, prompts, between):
    rng = np.random.default_rng(1)
    hits, draws = 0, 600
    for _ in range(draws):
        values = between * rng.normal(size=(runs, 1)) + rng.normal(size=prompts) + rng.normal(size=(runs, prompts))
        found = crossed_interval("x", values)
        hits += found["x_low"] <= 0 <= found["x_high"]
    assert 0.92 <= hits / draws <= 0.995


# --- fits, and policies ----------------------------------------------------------------------------------------------


def test_fits_find_the_curves_they_come_from():
    kl = np.asarray([0.0, 0.2, 1.0, 2.5, 5.0, 9.0])
    d = np.sqrt(kl)
    for form, gold, peak in (
        ("best_of_n", d * (2.0 - 0.5 * d), 2.0**2),
        ("rl", d * (2.0 - 1.5 * np.log(np.maximum(d, 1e-9))), math.exp(2 * (2 / 1.5 - 1))),
    ):
        found = gao_fit(kl, gold, form)
        assert found["r2"] == pytest.approx(1) and found["peak_kl"] == pytest.approx(peak)
        broken = gao_fit([*kl, 3.0, np.nan], [*gold, np.nan, 1.0], form)
        assert broken == pytest.approx(found)
        assert found["alpha"] == pytest.approx(2.0)


def test_what_cannot_be_fitted_is_none():
    assert set(gao_fit([0, 1, 2], [0, 1, 2], "rl").values()) == {None}
    rising = gao_fit([1, 4, 9], [1, 2.2, 3.6], "best_of_n")
    assert rising["peak_kl"] is None and rising["beta"] < 0


def test_a_policy_is_the_mean_of_its_runs():
    runs = [
        (np.asarray([0, 1, 4.0, 9]), np.asarray([0, 1, 3.0, 2])),
        (np.asarray([0, 4, 9.0]), np.asarray([0, 3, 1.0])),
    ]
    found = policy_curve(runs)
    assert [x["root_kl"] for x in found["points"]] == [0, 1.5, 2.5]
    assert [x["gold"] for x in found["points"]] == [0, 2, 2]
    # The first run is highest at its end and tells the second to look there; the second's peak is the middle.
    assert found["drop"] == pytest.approx(np.mean([1 - 3, 1 - 1]))
    assert found["falls"] is False and "drop" not in policy_curve(runs[:1])


def test_long_curves_of_policies_are_means():
    kl = np.arange(130.0)
    (points,) = (policy_curve([(kl**2, kl)])["points"],)
    assert len(points) == 44 and points[0]["gold"] == 1 and points[-1]["gold"] == 129
    assert all(point["gold"] == point["root_kl"] or abs(point["gold"] - point["root_kl"]) < 1 for point in points)


def test_a_policy_that_falls_is_said_to_fall():
    rng = np.random.default_rng(0)
    d = np.linspace(0, 3, 40)
    runs = [(d**2, d * (2 - 0.8 * d) + 0.05 * rng.normal(size=40)) for _ in range(4)]
    found = policy_curve(runs)
    assert found["falls"] and found["drop_low"] > 0.8
    assert found["peak_kl"] == pytest.approx(1.25**2, rel=0.3)


# --- the laboratory --------------------------------------------------------------------------------------------------


def test_only_known_uncertainty_is_counted():
    x = np.zeros((1, 2))
    grid = {"std": (0.5, 1.0), "variance": (2.0,), "worst": (0.0,)}
    assert [*tried([Moments(x)], grid)] == []
    assert [*tried([Moments(x, x), Moments(x, x)], grid)] == [("std", 0.5), ("std", 1.0), ("variance", 2.0)]
    assert [*tried([Moments(x, x, x, x), Moments(x, x)], grid)] == [("std", 0.5), ("std", 1.0), ("variance", 2.0)]
    assert ("worst", 0.0) in tried([Moments(x, x, x, x)], grid)


def test_choices_are_made_on_one_part_and_shown_on_the_other():
    """The prompts that choose prefer the larger k and the last n; on the others both are wrong, and it is shown."""
    gold = np.tile(np.asarray([0.0, 1.0, 2.0, 3.0]), (4, 1))
    selected = np.asarray([True, True, False, False])
    gold[~selected] = gold[~selected, ::-1]
    moments = Moments(
        np.tile(np.asarray([3.0, 2.0, 1.0, 0.0]), (4, 1)), np.tile(np.asarray([9.0, 4.0, 1.0, 0.0]), (4, 1))
    )
    found = laboratory({"proxy": [moments]}, standardized(gold), {"std": (0.0, 2.0)}, selected)
    plain, std, oracle = found["conditions"]
    assert found["chosen"] == {"proxy": {"std": 2.0}} and std["k"] == 2.0
    top = (3 - 1.5) / math.sqrt(1.25)
    assert (plain["end"], std["end"], oracle["end"]) == pytest.approx((top, -top, top))
    assert (plain["peak_n"], std["peak_n"]) == (1, 4)
    assert (plain["peak"], plain["drop"], plain["falls"]) == (pytest.approx(0, abs=1e-12), pytest.approx(-top), False)
    assert std["gain"] == pytest.approx(-2 * top) and std["peak_gain"] == pytest.approx(-top)
    assert [row["selection"] for row in found["sweep"]] == pytest.approx([-top, top])
    assert [row["end"] for row in found["sweep"]] == pytest.approx([top, -top])
    assert (oracle["proxy"], oracle["adjustment"]) == (ORACLE, "oracle") and "first_gain" not in oracle


def test_rounding_is_no_fall():
    """Gold of one value a prompt: whatever is chosen is worth the same, at the first n as at the last."""
    gold = np.repeat(np.linspace(-1.3, 1.1, 6)[:, None], 7, axis=1)
    proxy = Moments(np.random.default_rng(0).normal(size=gold.shape).astype(np.float32))
    plain, _ = laboratory({"proxy": [proxy, proxy]}, standardized(gold), {}, np.arange(6) < 3)["conditions"]
    assert plain["peak_n"] == 1 and plain["falls"] is False and plain["runs_fall"] == 0


def test_runs_that_fall_are_counted_where_their_mean_does_not():
    """One run ranks a middling answer first, two rank by gold itself: their mean rises, and one of three falls."""
    gold = np.tile(np.arange(8.0), (6, 1)) + 0.01 * np.random.default_rng(0).normal(size=(6, 8))
    good, bad = Moments(gold), Moments(np.where(np.rint(gold) == 4, 9.0, gold))
    row, oracle = laboratory({"proxy": [good, bad, good]}, standardized(gold), {}, np.arange(6) < 3)["conditions"]
    assert row["peak_n"] == 8 and not row["falls"]
    assert (row["runs_fall"], row["runs"], oracle["runs_fall"]) == (1, 3, 0)


def test_proxies_are_compared_with_their_own_mean_and_with_the_first():
    rng = np.random.default_rng(0)
    gold = standardized(rng.normal(size=(6, 16)))
    good, bad = (Moments(gold + noise * rng.normal(size=gold.shape), np.ones(gold.shape)) for noise in (0.1, 3.0))
    selected = np.arange(6) < 3
    found = laboratory({"bad": [bad, bad], "good": [good]}, gold, {"variance": (1.0,)}, selected)
    rows = {(row["proxy"], row["adjustment"]): row for row in found["conditions"]}
    same = rows["bad", "variance"]
    assert (same["gain"], same["gain_low"], same["gain_high"]) == (0, 0, 0)  # one variance for all changes no rank
    assert "gain" not in rows["bad", "none"] and "first_gain" not in same and "gain" not in rows["good", "none"]
    first = rows["good", "variance"]["first_gain"]
    assert first == pytest.approx(rows["good", "none"]["end"] - rows["bad", "none"]["end"]) and first > 0.3
    assert rows["good", "variance"]["gain"] == 0 and rows["bad", "none"]["runs"] == 2
    points = next(curve["points"] for curve in found["curves"] if curve["proxy"] == "good")
    np.testing.assert_allclose(
        [point["gold"] for point in points],
        [best_of_n_estimate(np.asarray(good.mean, np.float32), gold, n)[3:].mean() for n in (1, 2, 4, 8, 16)],
    )


# --- a simulation with a known answer --------------------------------------------------------------------------------

FEATURES, RARE = 36, 24


def linear_reward_model(rng, gold, noise, prior, pairs=400):
    """MAP and covariance of a linear Bradley-Terry model; each rare feature differs in one pair of fifteen."""
    x = rng.normal(size=(pairs, FEATURES))
    x[:, -RARE:] *= rng.random((pairs, RARE)) < 1 / 15
    better = rng.random(pairs) < 1 / (1 + np.exp(-x @ gold))
    x = np.where((better ^ (rng.random(pairs) < noise))[:, None], x, -x)
    theta, precision = np.zeros(FEATURES), prior * np.eye(FEATURES)
    for _ in range(20):  # Newton
        p = 1 / (1 + np.exp(x @ theta))
        precision = (x * (p * (1 - p))[:, None]).T @ x + prior * np.eye(FEATURES)
        theta += np.linalg.solve(precision, x.T @ p - prior * theta)
    assert np.abs(x.T @ (1 / (1 + np.exp(x @ theta))) - prior * theta).max() < 1e-8  # stationary
    return theta, np.linalg.inv(precision)


@pytest.fixture(scope="module", params=[(0.0, 2.0), (0.25, 20.0)], ids=["exact labels", "25 % flipped"])
def simulated(request):
    """Six linear reward models on pools whose answers have a heavy tail along features that gold hardly values."""
    rng = np.random.default_rng(7)
    prompts, pool = 48, 1024
    weights = np.append(rng.normal(size=FEATURES - RARE), 0.1 * rng.normal(size=RARE))
    answers = rng.normal(size=(prompts, pool, FEATURES))
    answers[..., -RARE:] = rng.standard_t(3, size=(prompts, pool, RARE)) * (rng.random((prompts, pool, RARE)) < 0.1)
    runs = []
    for _ in range(6):
        theta, covariance = linear_reward_model(rng, weights, *request.param)
        variance = np.einsum("pnf,pnf->pn", answers @ covariance, answers)
        runs.append(Moments((answers @ theta).astype(np.float32), variance.astype(np.float32)))
    grid, selected = {"std": (1.0,), "variance": (0.5, 1.0)}, np.arange(prompts) < prompts // 2
    return laboratory({"map": runs}, standardized(answers @ weights), grid, selected)


def test_uncertainty_removes_over_optimization_where_the_tail_is_rarely_seen(simulated):
    """By the mean gold rises, peaks and falls while the proxy rises on; less one standard deviation it rises on too.

    The set-up favours uncertainty: it shows that the code measures the effect where there is one, nothing else.
    """
    plain, std, variance, oracle = simulated["conditions"]
    curves = {row["adjustment"]: np.asarray([point["gold"] for point in row["points"]]) for row in simulated["curves"]}
    assert 16 < plain["peak_n"] < 1024 and plain["drop"] > 0.2 and plain["proxy_end"] > 4
    assert std["peak_n"] == 1024 and np.diff(curves["std"]).min() > 0 and np.diff(curves["oracle"]).min() > 0
    assert min(std[name] for name in ("gain_low", "peak_gain_low")) > 0 and variance["gain_low"] > 0
    assert plain["end"] < plain["peak"] < std["end"] < oracle["end"]
    proxy = [point["proxy"] for point in simulated["curves"][0]["points"]]
    assert np.diff(proxy).min() > 0.1
    fit = simulated["curves"][0]["fit"]
    assert fit["r2"] > 0.8 and 2 < fit["peak_kl"] < 8


def test_choosing_little_gains_the_same_by_any_score(simulated):
    """Expected largest of n normals are 1.03 and 1.77 standard deviations at 4 and 16: gold reaches them by itself."""
    four, sixteen = 2, 4
    curves = {row["adjustment"]: [point["gold"] for point in row["points"]] for row in simulated["curves"]}
    assert (curves["oracle"][four], curves["oracle"][sixteen]) == pytest.approx((1.03, 1.77), abs=0.05)
    for kind in ("none", "std", "variance"):
        assert 0.75 * 1.03 < curves[kind][four] < 1.03 and 0.75 * 1.77 < curves[kind][sixteen] < 1.77
