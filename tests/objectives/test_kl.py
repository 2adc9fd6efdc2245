"""KL estimators against a policy so small that every answer is enumerated: expectations are sums, not samples."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import (
    adaptive_kl_step,
    gae,
    kl_estimate,
    kl_gradient,
    kl_penalized_rewards,
    ppo_policy_loss,
)

VOCAB = 3
ANSWERS = np.array(list(itertools.product(range(VOCAB), repeat=2)))  # (9, 2), all answers of two tokens


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tables(seed):
    """Logits of the first token (3,) and of the second one after each first (3, 3)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=VOCAB), rng.normal(size=(VOCAB, VOCAB))


POLICY, REFERENCE = tables(6), tables(7)


@jax.jit
def token_logprobs(theta):
    """(9, 2): of each answer's tokens."""
    first, second = jax.nn.log_softmax(theta[0]), jax.nn.log_softmax(theta[1])
    return jnp.stack([first[ANSWERS[:, 0]], second[ANSWERS[:, 0], ANSWERS[:, 1]]], axis=1)


def answer_logprobs(theta):
    return token_logprobs(theta).sum(1, keepdims=True)  # (9, 1)


@jax.jit
def expectation(per_answer, theta=POLICY):
    """Over answers that the policy has already sampled: no gradient through their probabilities."""
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(answer_logprobs(theta)[:, 0])) * per_answer)


@jax.jit
def kl(theta, other):
    """KL(theta || other) over answers."""
    logprobs = answer_logprobs(theta)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - answer_logprobs(other)))


def gradient(function):
    return np.concatenate([np.asarray(g).ravel() for g in jax.jit(jax.grad(function))(POLICY)])


def reverse():
    return gradient(lambda theta: kl(theta, REFERENCE))


def forward():
    return gradient(lambda theta: kl(REFERENCE, theta))


def estimate(theta, estimator):
    """(9,) of whole answers."""
    return kl_estimate(answer_logprobs(theta), answer_logprobs(REFERENCE), estimator)[:, 0]


def expected_gradient(estimator, place):
    if place == "loss":
        return gradient(lambda theta: expectation(estimate(theta, estimator), theta))
    constant = estimate(POLICY, estimator)
    return gradient(lambda theta: expectation(constant * answer_logprobs(theta)[:, 0], theta))


def cosine(a, b):
    return a @ b / math.sqrt((a @ a) * (b @ b))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    true = float(kl(POLICY, REFERENCE))
    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(expectation(estimate(POLICY, estimator)), true, rtol=1e-12)
    assert abs(float(expectation(estimate(POLICY, "k2"))) - true) > 0.4 * true


@pytest.mark.parametrize("estimator, place", [("k1", "reward"), ("k2", "loss")])
def test_the_reverse_kl(estimator, place):
    assert kl_gradient(estimator, place) == "reverse KL"
    np.testing.assert_allclose(expected_gradient(estimator, place), reverse(), atol=1e-14)


def test_the_forward_kl():
    assert kl_gradient("k3", "loss") == "forward KL"
    np.testing.assert_allclose(expected_gradient("k3", "loss"), forward(), atol=1e-14)
    assert cosine(forward(), reverse()) < 0.7  # the two are told apart here


def test_k1_in_the_loss_has_no_gradient():
    with pytest.raises(ValueError, match="gradient of 0"):
        kl_gradient("k1", "loss")
    np.testing.assert_allclose(expected_gradient("k1", "loss"), 0.0, atol=1e-15)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_reward_neither_k2_nor_k3_is_a_kl(estimator):
    assert kl_gradient(estimator, "reward") == "no KL: another regularizer"
    ours = expected_gradient(estimator, "reward")
    assert abs(cosine(ours, reverse())) < 0.9
    assert abs(cosine(ours, forward())) < 0.9


def test_k3_in_the_reward_is_the_reverse_kl_less_the_forward_kl():
    np.testing.assert_allclose(expected_gradient("k3", "reward"), reverse() - forward(), atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_reward_and_loss_together_are_the_gradient_of_the_expected_estimate(estimator):
    def expected(theta):
        return jnp.sum(jnp.exp(answer_logprobs(theta)[:, 0]) * estimate(theta, estimator))

    both = expected_gradient(estimator, "reward") + expected_gradient(estimator, "loss")
    np.testing.assert_allclose(both, gradient(expected), atol=1e-14)


@pytest.mark.parametrize("estimator, name", [("k2", "reverse"), ("k3", "forward")])
def test_token_by_token_the_loss_moves_the_next_token_alone(estimator, name):
    def loss(theta):
        return expectation(kl_estimate(token_logprobs(theta), token_logprobs(REFERENCE), estimator).sum(1), theta)

    def next_token_kls(theta):
        """Of both distributions, at prefixes as likely as the policy makes them now."""
        prefixes = jax.lax.stop_gradient(jax.nn.softmax(theta[0]))
        out = 0.0
        for logits, reference, weight in [(theta[0], REFERENCE[0], 1.0), (theta[1], REFERENCE[1], prefixes)]:
            p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
            p, q = (p, q) if name == "reverse" else (q, p)
            out += jnp.sum(weight * jnp.sum(jnp.exp(p) * (p - q), axis=-1))
        return out

    np.testing.assert_allclose(gradient(loss), gradient(next_token_kls), atol=1e-14)
    whole = reverse() if name == "reverse" else forward()
    assert np.abs(gradient(loss) - whole).max() > 0.01  # the first token is not charged for what it leads to


def test_k1_in_the_rewards_of_tokens_moves_the_policy_down_the_kl_of_whole_answers():
    logprobs, lengths = token_logprobs(POLICY), np.full(9, 2)
    rewards = kl_penalized_rewards(np.zeros(9), logprobs, token_logprobs(REFERENCE), lengths, 1.0)
    advantages, _ = gae(rewards, jnp.zeros((9, 2)), np.ones((9, 2), bool), gamma=1.0, lam=1.0)

    def loss(theta):
        return expectation(ppo_policy_loss(token_logprobs(theta), logprobs, advantages).sum(1), theta)

    np.testing.assert_allclose(gradient(loss), reverse(), atol=1e-6)  # rewards and advantages are float32


D = [-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.7, 4.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_estimates_equal_their_formulas(dtype):
    reference = np.full((1, len(D)), -2.0, dtype)
    logprobs = reference + np.array([D], dtype)
    d = [float(a) - float(b) for a, b in zip(logprobs[0], reference[0], strict=True)]
    by_hand = {"k1": d, "k2": [x * x / 2 for x in d], "k3": [math.expm1(-x) + x for x in d]}
    for estimator, expected in by_hand.items():
        result = kl_estimate(jnp.asarray(logprobs), jnp.asarray(reference), estimator)
        assert result.dtype == dtype
        np.testing.assert_allclose(result[0], expected, rtol=1e-5, atol=2e-7 if dtype == np.float32 else 1e-15)


def test_k3_of_near_policies_keeps_its_digits():
    d = np.float32(2.0**-8)  # exp(-d) - 1 would round to a multiple of 6e-8, and the estimate is 7.6e-6
    result = kl_estimate(jnp.full((1, 1), d, jnp.float32), jnp.zeros((1, 1), jnp.float32), "k3")
    np.testing.assert_allclose(result, math.expm1(-float(d)) + float(d), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("d", [-1000.0, -90.0, -20.0, 20.0, 90.0, 1000.0])
def test_extreme_ratios_stay_finite_and_keep_their_direction(estimator, d):
    logprobs = jnp.full((1, 1), d, jnp.float32)
    value, slope = jax.value_and_grad(lambda x: kl_estimate(x, jnp.zeros_like(x), estimator).sum())(logprobs)
    assert np.isfinite(value) and np.isfinite(np.square(slope))
    assert estimator == "k1" or (value > 0 and np.sign(slope) == np.sign(d))


def test_k3_goes_on_as_its_tangent():
    def k3(d):
        return kl_estimate(jnp.full((1, 1), d), jnp.zeros((1, 1)), "k3")[0, 0]

    np.testing.assert_allclose(k3(-20.0), math.expm1(20.0) - 20.0, rtol=1e-12)
    np.testing.assert_allclose(k3(-23.0), math.expm1(20.0) + 3.0 * math.exp(20.0) - 23.0, rtol=1e-12)
    np.testing.assert_allclose([jax.grad(k3)(-20.0), jax.grad(k3)(-23.0)], 1.0 - math.exp(20.0), rtol=1e-12)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4")
    for estimator, place in [("k4", "loss"), ("k1", "advantage")]:
        with pytest.raises(ValueError, match="estimators are"):
            kl_gradient(estimator, place)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_rewards_equal_the_loop(estimator):
    rng = np.random.default_rng(3)
    logprobs, ref_logprobs = rng.normal(size=(2, 4, 6)).astype(np.float32)
    scores, lengths = np.array([3, -1, 0, 2]), np.array([6, 1, 4, 0])  # whole numbers, as a rule gives them
    expected = np.zeros((4, 6))
    for row in range(4):
        for t in range(lengths[row]):
            d = float(logprobs[row, t]) - float(ref_logprobs[row, t])
            expected[row, t] = -0.3 * {"k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d}[estimator]
        if lengths[row]:
            expected[row, lengths[row] - 1] += scores[row]
    outside = np.arange(6) >= lengths[:, None]
    logprobs[outside] = np.nan  # never read
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, lengths, 0.3, estimator)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)


# kl, and the next coefficient of 0.15 at target 6, horizon 10 000 and 512 answers
CONTROLLER = [
    (6.0, 0.15),
    (6.6, 0.15 * (1 + 0.1 * 0.0512)),
    (5.4, 0.15 * (1 - 0.1 * 0.0512)),
    (60.0, 0.15 * (1 + 0.2 * 0.0512)),
    (0.0, 0.15 * (1 - 0.2 * 0.0512)),
    (-3.0, 0.15 * (1 - 0.2 * 0.0512)),  # a k1 estimate may be negative
]


@pytest.mark.parametrize("measured, expected", CONTROLLER)
def test_controller_by_hand(measured, expected):
    np.testing.assert_allclose(adaptive_kl_step(0.15, measured, 6.0, 10_000, 512), expected, rtol=1e-12)


def test_controller_holds_a_toy_policy_at_its_target():
    coefficient, measured = jnp.asarray(0.02), 0.0
    step = jax.jit(lambda c, k: adaptive_kl_step(c, k, 6.0, 10_000, 512))
    for _ in range(2000):
        measured = 0.9 / coefficient  # a policy whose KL falls as the coefficient rises
        coefficient = step(coefficient, measured)
    np.testing.assert_allclose(measured, 6.0, rtol=1e-3)
