"""The curvature of a tiny trained reward model: against loops, closed forms, and the exact posterior."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_reward as tiny
from scipy.stats import spearmanr

from rlhf_jax.distributed.sharding import make_mesh, place_batch, tree_shardings
from rlhf_jax.models.roles import weight_axes
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.uncertainty import curvature as sums
from rlhf_jax.uncertainty.fit import groups, joint_gradient, make_sketches
from rlhf_jax.uncertainty.jacobians import gradients, uncertain
from rlhf_jax.uncertainty.likelihood import directions, terms
from rlhf_jax.uncertainty.posterior import variance
from rlhf_jax.uncertainty.predictive import (
    DIFFERENCE,
    difference_moments,
    moments_by_precision,
    relative_moments,
    score_moments,
)
from rlhf_jax.uncertainty.prior import log_evidence, maximize

SPEC = tiny.tiny_spec()
SCORES = jax.jit(last_scores, static_argnums=0)
SIDE = jax.jit(score_moments, static_argnums=0)
PAIR = jax.jit(difference_moments, static_argnums=0)
JACOBIANS = jax.jit(partial(gradients, SPEC, directions=DIFFERENCE, scope="all", scale=1.0))


@pytest.fixture(scope="module")
def model():
    return tiny.trained(SPEC)


@pytest.fixture(scope="module")
def oracle(model):
    return tiny.fitted(SPEC, *model, structure="dual")


TEST = tiny.pairs(60, 99)
PLACE = TEST["tokens"], TEST["lengths"]


def flat(blocks):
    return np.concatenate([np.asarray(blocks[n], np.float64).reshape(len(blocks[n]), -1) for n in sorted(blocks)], 1)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_a_loop_with_the_head_that_was_trained(model):
    weights, _ = model
    scale = 2.5
    own = {"adapters": weights["adapters"], "head": {**weights["head"], "kernel": weights["head"]["kernel"] * scale}}

    def score(own, tokens, length):
        return last_scores(SPEC, {"base": weights["base"], **own}, tokens[None], length[None])[0]

    loop = jax.jit(jax.grad(score))
    jacobians = jax.jit(partial(gradients, SPEC, directions=DIFFERENCE, scope="all", scale=scale))
    scores, found = jacobians(weights, PLACE[0][:3], PLACE[1][:3])
    for i in range(3):
        each = [loop(own, PLACE[0][i, a], PLACE[1][i, a]) for a in (0, 1)]
        parts = [uncertain(one, "all", 1.0) for one in each]
        for name, g in found.items():
            expected = parts[0][name] - parts[1][name]
            np.testing.assert_allclose(g[i, 0], expected, rtol=2e-4, atol=2e-5, err_msg=name)
    rows = PLACE[0][:3].reshape(6, -1), PLACE[1][:3].reshape(-1)
    np.testing.assert_allclose(scores.reshape(-1), SCORES(SPEC, weights, *rows), rtol=1e-5, atol=1e-6)


def test_terms_of_a_pair_with_safety_labels_have_the_likelihoods_own_derivatives():
    scores = jnp.asarray([[0.3, -1.2], [2.0, 0.5]])
    batch = {
        "weight": jnp.ones(2),
        "unsafe": jnp.asarray([[True, False], [True, True]]),
        "labelled": jnp.asarray([True, False]),
    }
    along = directions(2, True)
    seen = terms(scores, batch)

    def likelihood(s):
        pair = jax.nn.log_sigmoid(s[:, 0] - s[:, 1]).sum()
        return pair + jax.nn.log_sigmoid(s[0, 0]) + jax.nn.log_sigmoid(-s[0, 1])

    assert float(seen.log_likelihood.sum()) == pytest.approx(float(likelihood(scores)), rel=1e-6)
    np.testing.assert_allclose(seen.slopes @ along, jax.grad(likelihood)(scores), rtol=1e-5, atol=1e-7)
    hessian = jnp.einsum("bk,ka,kc->bac", seen.curvatures, along, along)
    for i in (0, 1):
        np.testing.assert_allclose(-jax.hessian(likelihood)(scores)[i, :, i], hessian[i], rtol=1e-5, atol=1e-7)


# --- factors ---------------------------------------------------------------------------------------------------------


def test_factors_of_one_answer_with_one_token_are_exact(model):
    weights, _ = model
    tokens, lengths = jnp.asarray([[[5, 0, 0]]]), jnp.asarray([[1]])
    batch = {"tokens": tokens, "lengths": lengths, "weight": jnp.ones(1)}
    batch |= {"unsafe": jnp.asarray([[True]]), "labelled": jnp.asarray([True])}
    jacobians = jax.jit(partial(gradients, SPEC, directions=directions(1, True), scope="all", scale=1.0))
    scores, found = jacobians(weights, tokens, lengths)
    p = float(jax.nn.sigmoid(scores[0, 0]))
    for factors in ("tokens", "records"):
        sketches = dict.fromkeys(found)
        if factors == "tokens":
            out = sums.token_moments(SPEC, 1.0, sketches, weights, batch)
        else:
            out = sums.record_moments(SPEC, "all", 1.0, sketches, weights, batch)
        for name, g in found.items():
            large, small = (np.asarray(x[0], np.float64) for x in out["moments"][name])
            divisor = 1.0 if factors == "tokens" and name != "head" else np.trace(small) or 1.0
            vector = np.asarray(g[0, 0, 0], np.float64).ravel()
            expected = p * (1 - p) * np.outer(vector, vector)
            size = np.abs(expected).max()
            np.testing.assert_allclose(np.kron(large, small) / divisor, expected, rtol=1e-3, atol=1e-4 * size)


def test_the_trace_of_factors_of_records_and_of_corrected_ones_is_exact(model):
    weights, data = model
    scores, found = JACOBIANS(weights, data["tokens"], data["lengths"])
    w = np.asarray(terms(scores, {"weight": jnp.ones(len(scores))}).curvatures, np.float64)[:, 0]
    exact = {name: np.einsum("b,bldr->l", w, np.square(np.asarray(g[:, 0], np.float64))) for name, g in found.items()}
    for fields in ({"factors": "records"}, {"factors": "tokens", "corrected": True}, {"structure": "diagonal"}):
        values = tiny.fitted(SPEC, weights, data, **fields).eigenvalues
        for name, trace in exact.items():
            np.testing.assert_allclose(values[name].sum((1, 2)), trace, rtol=1e-4)


def test_the_slope_is_the_likelihoods_gradient_in_every_structure(model, oracle):
    weights, data = model
    rows = data["tokens"].reshape(-1, tiny.LENGTH), data["lengths"].reshape(-1)

    def likelihood(own):
        scores = last_scores(SPEC, {**weights, **own}, *rows).reshape(-1, 2)
        return jax.nn.log_sigmoid(scores[:, 0] - scores[:, 1]).sum()

    own = {name: weights[name] for name in ("adapters", "head")}
    value, slope = jax.jit(jax.value_and_grad(likelihood))(own)
    expected = uncertain(slope, "all", 1.0)
    for found in (oracle, tiny.fitted(SPEC, weights, data)):
        assert found.log_likelihood == pytest.approx(float(value), rel=1e-5)
        for name, g in expected.items():
            np.testing.assert_allclose(found.slope[name], g, rtol=1e-3, atol=1e-4, err_msg=name)
    told = joint_gradient(oracle, np.float64(2.0))
    theta = np.concatenate([x.ravel() for x in oracle.mean.values()])
    both = np.concatenate([np.asarray(expected[name]).ravel() for name in oracle.mean]) - 2.0 * theta
    assert told["joint_gradient"] == pytest.approx(np.linalg.norm(both), rel=1e-4)
    assert told["prior_gradient"] == pytest.approx(2 * np.linalg.norm(theta), rel=1e-5)


@pytest.mark.parametrize("fields", [{}, {"factors": "records"}, {"rank": 3}], ids=["tokens", "records", "sketched"])
def test_padding_batches_and_their_order_change_nothing(model, fields):
    weights, data = model
    inside = np.arange(tiny.LENGTH) < data["lengths"][..., None]
    order = np.random.default_rng(3).permutation(len(inside))
    noisy = np.where(inside, data["tokens"], np.random.default_rng(4).integers(0, tiny.VOCAB, inside.shape))
    other = {**data, "tokens": noisy.astype(np.int32)}
    other = {name: x[order] for name, x in other.items()}
    found = [tiny.fitted(SPEC, weights, d, size, **fields) for d, size in ((data, 40), (other, 50))]
    for name, values in found[0].eigenvalues.items():
        size = values.max()
        np.testing.assert_allclose(found[1].eigenvalues[name], values, rtol=1e-2, atol=1e-4 * size, err_msg=name)


def test_tokens_of_padding_do_not_count(model):
    """Moments of activations see what stands behind an answer, whose gradients are 0: the mask leaves it out."""
    weights, data = model
    short = {name: x[:8] for name, x in data.items()}
    sketches = dict.fromkeys(uncertain(weights, "all", 1.0))
    whole = sums.token_moments(SPEC, 1.0, sketches, weights, {n: jnp.asarray(x) for n, x in short.items()})
    wider = {**short, "tokens": np.pad(short["tokens"], ((0, 0), (0, 0), (0, 5)), constant_values=3)}
    padded = sums.token_moments(SPEC, 1.0, sketches, weights, {n: jnp.asarray(x) for n, x in wider.items()})
    assert float(whole["tokens"]) == float(padded["tokens"]) == short["lengths"].sum()
    for name, (large, small) in whole["moments"].items():
        np.testing.assert_allclose(padded["moments"][name][0], large, rtol=1e-3, atol=1e-5 * float(large.max()))
        np.testing.assert_allclose(padded["moments"][name][1], small, rtol=1e-3, atol=1e-5 * float(small.max()))


def test_every_batch_runs_one_program(model):
    for step, fields in ((sums.token_moments, {}), (sums.record_moments, {"factors": "records"})):
        step.clear_cache()
        tiny.fitted(SPEC, *model, size=24, **fields)
        assert step._cache_size() == 1


STEPS = {"tokens": partial(sums.token_moments, SPEC), "records": partial(sums.record_moments, SPEC, "all")}


@pytest.mark.parametrize("factors", STEPS)
def test_a_mesh_of_two_devices_gives_the_same(model, factors):
    weights, data = model
    step = STEPS[factors]
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    placed = jax.device_put(weights, tree_shardings(weights, weight_axes(SPEC, weights), mesh))
    sketches = make_sketches(uncertain(weights, "all", 1.0), 3, key=jax.random.key(0))
    part = {name: x[:40] for name, x in data.items()}
    one = step(1.0, sketches, weights, part)
    with jax.set_mesh(mesh):
        batch = place_batch(40, lambda mine: {name: x[mine] for name, x in part.items()}, mesh)
        two = step(1.0, sketches, placed, batch)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(np.abs(a).max()))


# --- what the posterior says -----------------------------------------------------------------------------------------


def test_the_head_alone_is_bayesian_logistic_regression(model):
    weights, data = model
    scale, precision = 1.7, 0.8
    found = tiny.fitted(SPEC, weights, data, scope="head", factors="records", scale=scale)
    posterior = tiny.posterior_of(found, precision, scale, "head")
    state = jax.jit(partial(gradients, SPEC, directions=np.eye(2, dtype=np.float32), scope="head", scale=1.0))

    def features(rows):
        return np.asarray(state(weights, rows["tokens"], rows["lengths"])[1]["head"], np.float64)[:, :, 0, :, 0]

    x = features(data)
    theta = np.asarray(weights["head"]["kernel"], np.float64)[:, 0] * scale
    difference = x[:, 0] - x[:, 1]
    p = 1 / (1 + np.exp(-difference @ theta))
    hessian = (difference.T * (p * (1 - p))) @ difference + precision * np.eye(len(theta))
    x = features(TEST)
    covariance = np.linalg.inv(hessian) / scale**2
    _, alone = SIDE(SPEC, weights, posterior, PLACE[0][:, 0], PLACE[1][:, 0])
    np.testing.assert_allclose(alone, np.einsum("bi,ij,bj->b", x[:, 0], covariance, x[:, 0]), rtol=1e-3)
    mean, both = PAIR(SPEC, weights, posterior, *PLACE)
    d = x[:, 0] - x[:, 1]
    np.testing.assert_allclose(both, np.einsum("bi,ij,bj->b", d, covariance, d), rtol=1e-3)
    np.testing.assert_allclose(mean, d @ theta / scale, rtol=1e-3, atol=1e-4)


def test_the_dual_is_the_dense_posterior_of_all_weights(model, oracle):
    weights, data = model
    scores, found = JACOBIANS(weights, data["tokens"], data["lengths"])
    j, w = flat(found), np.asarray(terms(scores, {"weight": jnp.ones(len(scores))}).curvatures, np.float64)
    hessian, precision = (j.T * w[:, 0]) @ j, 0.6
    covariance = np.linalg.inv(hessian + precision * np.eye(len(hessian)))
    g = flat(JACOBIANS(weights, *PLACE)[1])
    _, told = PAIR(SPEC, weights, tiny.posterior_of(oracle, precision), *PLACE)
    np.testing.assert_allclose(told, np.einsum("bi,ij,bj->b", g, covariance, g), rtol=2e-3)
    group = groups(oracle, False)["all"]
    dense = np.linalg.slogdet(hessian + precision * np.eye(len(hessian)))[1] - len(hessian) * np.log(precision)
    assert np.log1p(group.curvature / precision).sum() == pytest.approx(dense, rel=1e-3)


def shrinkage(weights, factors, precision):
    """How much of the prior's variance is left, of each test pair."""
    gradient = {name: g[:, 0] for name, g in JACOBIANS(weights, *PLACE)[1].items()}
    prior = sum(np.square(g).sum((1, 2, 3)) for g in gradient.values()) / precision
    posterior = tiny.posterior_of(factors, precision)
    return np.asarray(variance(posterior.factors, posterior.precision, gradient)) / np.asarray(prior)


def near(shrunk, oracle_shrunk):
    """Within a factor of 2.5 in the mean, and ordering pairs as the exact posterior does."""
    ratio = np.mean(shrunk) / np.mean(oracle_shrunk)
    return 0.4 < ratio < 2.5 and spearmanr(shrunk, oracle_shrunk).statistic > 0.4 and np.ptp(shrunk) > 1e-3


@pytest.mark.parametrize(
    "fields", [{}, {"factors": "records"}, {"corrected": True}], ids=["tokens", "records", "twice"]
)
def test_factors_shrink_the_prior_as_the_exact_posterior_does(model, oracle, fields):
    weights, data = model
    precision = maximize(groups(oracle, False)["all"])
    exact = shrinkage(weights, oracle, precision)
    assert exact.mean() < 0.95
    assert near(shrinkage(weights, tiny.fitted(SPEC, weights, data, **fields), precision), exact)
    prior_only = oracle._replace(factors=oracle.factors._replace(curvature=jnp.zeros_like(oracle.factors.curvature)))
    assert not near(shrinkage(weights, prior_only, precision), exact)


def test_a_pairs_two_answers_are_not_independent(model, oracle):
    weights, _ = model
    posterior = tiny.posterior_of(oracle, 1.0)
    _, both = PAIR(SPEC, weights, posterior, *PLACE)
    each = [SIDE(SPEC, weights, posterior, PLACE[0][:, a], PLACE[1][:, a])[1] for a in (0, 1)]
    assert np.abs(both - (each[0] + each[1])).max() > 0.1 * float(np.mean(both))
    same = PLACE[0][:, [0, 0]], PLACE[1][:, [0, 0]]
    np.testing.assert_allclose(PAIR(SPEC, weights, posterior, *same)[1], 0.0, atol=1e-5)


def test_against_a_reference_the_mean_is_the_answers_own_and_the_variance_the_differences(model, oracle):
    weights, _ = model
    posterior = tiny.posterior_of(oracle, 2.0)
    own, other = ((PLACE[0][:, a], PLACE[1][:, a]) for a in (0, 1))
    relative = jax.jit(relative_moments, static_argnums=0)
    mean, variance = relative(SPEC, weights, posterior, *own, other)
    np.testing.assert_allclose(mean, SIDE(SPEC, weights, posterior, *own)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance, PAIR(SPEC, weights, posterior, *PLACE)[1], rtol=1e-5)
    one = tuple(x[:1] for x in other)  # one row stands for all
    repeated = tuple(np.repeat(x, len(own[1]), axis=0) for x in one)
    for a, b in zip(*(relative(SPEC, weights, posterior, *own, r) for r in (one, repeated)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_mean_is_the_models_own_score_and_padding_changes_no_variance(model, oracle):
    weights, _ = model
    posterior = tiny.posterior_of(oracle, 1.0)
    tokens, lengths = PLACE[0][:, 0], PLACE[1][:, 0]
    mean, found = SIDE(SPEC, weights, posterior, tokens, lengths)
    np.testing.assert_allclose(mean, SCORES(SPEC, weights, tokens, lengths), rtol=1e-5, atol=1e-6)
    noisy = np.where(np.arange(tiny.LENGTH) < lengths[:, None], tokens, 7).astype(np.int32)
    np.testing.assert_allclose(SIDE(SPEC, weights, posterior, noisy, lengths)[1], found, rtol=1e-5)


def test_members_under_vmap_are_a_loop_over_them(model, oracle):
    weights, _ = model
    other = {**weights, "adapters": jax.tree.map(lambda x: 1.1 * x, weights["adapters"])}
    posteriors = [tiny.posterior_of(oracle, precision) for precision in (1.0, 3.0)]
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    own = stack(*({name: w[name] for name in ("adapters", "head")} for w in (weights, other)))
    tokens, lengths = PLACE[0][:8, 0], PLACE[1][:8, 0]

    @jax.jit
    @jax.vmap
    def together(mine, posterior):
        return score_moments(SPEC, {"base": weights["base"], **mine}, posterior, tokens, lengths)

    means, variances = together(own, stack(*posteriors))
    for i, one in enumerate((weights, other)):
        mean, found = SIDE(SPEC, one, posteriors[i], tokens, lengths)
        np.testing.assert_allclose(means[i], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variances[i], found, rtol=1e-3)


def test_one_pass_says_what_every_precision_gives(model, oracle):
    weights, _ = model
    posterior = tiny.posterior_of(oracle, 1.0)
    _, grid = jax.jit(moments_by_precision, static_argnums=0)(SPEC, weights, posterior, jnp.asarray([1.0, 5.0]), *PLACE)
    for row, precision in zip(grid, (1.0, 5.0), strict=True):
        expected = PAIR(SPEC, weights, tiny.posterior_of(oracle, precision), *PLACE)[1]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)


def test_a_precision_for_each_layer_has_no_less_evidence_than_one(model):
    found = tiny.fitted(SPEC, *model, factors="records")
    one, each = groups(found, False), groups(found, True)
    assert set(each) == {0, 1, "head"}
    best, bests = maximize(one["all"]), {name: maximize(group) for name, group in each.items()}
    alike = log_evidence(0.0, each, dict.fromkeys(each, best))
    assert alike == pytest.approx(log_evidence(0.0, one, {"all": best}), rel=1e-9)
    assert log_evidence(0.0, each, bests) >= alike


def test_factors_are_near_exact_blocks_and_those_near_the_dual(model, oracle):
    """Exact blocks know nothing of what matrices have in common, so they are only near the exact posterior."""
    weights, data = model
    precision = maximize(groups(oracle, False)["all"])
    scores, found = JACOBIANS(weights, data["tokens"], data["lengths"])
    w = np.asarray(terms(scores, {"weight": jnp.ones(len(scores))}).curvatures, np.float64)[:, 0]
    test = JACOBIANS(weights, *PLACE)[1]
    blocks, prior = np.zeros(len(TEST["weight"])), np.zeros(len(TEST["weight"]))
    for name, g in found.items():
        for layer in range(g.shape[2]):
            j, t = (np.asarray(x[:, 0, layer], np.float64).reshape(len(x), -1) for x in (g, test[name]))
            covariance = np.linalg.inv((j.T * w) @ j + precision * np.eye(j.shape[1]))
            blocks += np.einsum("bi,ij,bj->b", t, covariance, t)
            prior += np.square(t).sum(1) / precision
    exact = shrinkage(weights, oracle, precision)
    assert 0.5 < np.mean(blocks / prior) / exact.mean() < 1.3
    for fields in ({"factors": "records"}, {"factors": "records", "corrected": True}):
        told = shrinkage(weights, tiny.fitted(SPEC, weights, data, **fields), precision)
        assert 0.4 < told.mean() / np.mean(blocks / prior) < 1.5
        assert spearmanr(told, blocks / prior).statistic > 0.5
