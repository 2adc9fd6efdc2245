import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import (
    bradley_terry_loss,
    gae,
    kl_penalized_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_logprobs,
    whiten,
)


def rows(*values):
    return np.array(values, np.float32)


def test_gae_by_hand():
    # gamma 0.9, lambda 0.5:
    # A_2 = 2 - (-1)                       = 3
    # A_1 = 0 + 0.9 * (-1) - 1 + 0.45 * 3  = -0.55
    # A_0 = 1 + 0.9 * 1 - 0.5 + 0.45 * -0.55 = 1.1525
    rewards, values = rows([1.0, 0.0, 2.0]), rows([0.5, 1.0, -1.0])
    advantages, returns = gae(rewards, values, np.ones((1, 3), bool), gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, [[1.1525, -0.55, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[1.6525, 0.45, 2.0]], rtol=1e-6)


def test_gae_skips_a_hole_instead_of_zeroing_it():
    # Skipped: A_2 = 2 - (-1) = 3, A_0 = 1 + 0.9 * (-1) - 0.5 + 0.45 * 3 = 0.95.
    # Zeroed, the hole would give A_1 = 0.9 * (-1) + 0.45 * 3 = 0.45 and A_0 = 1 - 0.5 + 0.45 * 0.45 = 0.7025.
    rewards, values, mask = rows([1.0, 100.0, 2.0]), rows([0.5, 50.0, -1.0]), np.array([[1, 0, 1]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, [[0.95, 0.0, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[1.45, 0.0, 2.0]], rtol=1e-6)


def gae_loop(rewards, values, mask, gamma, lam):
    """Over the real steps of each row alone, in float64."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        value, advantage = 0.0, 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = float(rewards[row, t]) + gamma * value - float(values[row, t])
            advantage = delta + gamma * lam * advantage
            value = float(values[row, t])
            advantages[row, t] = advantage
    return advantages, np.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_the_loop_on_masks_with_holes(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 16, 23)).astype(np.float32)
    mask = rng.random((16, 23)) < 0.6
    mask[0], mask[1] = True, False
    expected = gae_loop(rewards, values, mask, gamma, lam)
    garbage = np.where(mask, 0.0, np.nan).astype(np.float32)  # what lies outside the mask is never read
    result = jax.jit(gae, static_argnums=(3, 4))(rewards + garbage, values + garbage, mask, gamma, lam)
    for ours, reference in zip(result, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_gae_at_lambda_one_is_the_return_less_the_value():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 4, 9)).astype(np.float32)
    _, returns = gae(rewards, values, np.ones((4, 9)), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, rewards[:, ::-1].cumsum(1)[:, ::-1], rtol=1e-5, atol=1e-5)


def test_whiten_divides_by_the_biased_deviation():
    # mean 4, squares 9 + 1 + 1 + 9 = 20, variance 20 / 4 = 5 (unbiased it would be 20 / 3)
    x, mask = rows([1.0, 3.0, 99.0], [5.0, 7.0, -99.0]), np.array([[1, 1, 0], [1, 1, 0]])
    root = 5.0**0.5
    np.testing.assert_allclose(whiten(x, mask), [[-3 / root, -1 / root, 0], [1 / root, 3 / root, 0]], rtol=1e-6)
    kept = [[4 - 3 / root, 4 - 1 / root, 0], [4 + 1 / root, 4 + 3 / root, 0]]
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), kept, rtol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_moments(shift_mean):
    rng = np.random.default_rng(2)
    x = rng.normal(3.0, 7.0, (8, 30)).astype(np.float32)
    mask = rng.random((8, 30)) < 0.7
    inside = np.asarray(whiten(x, mask, shift_mean), np.float64)[mask]
    np.testing.assert_allclose(inside.mean(), 0.0 if shift_mean else x[mask].mean(dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(inside.std(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("garbage", [1e4, 1e30, np.inf, np.nan])
def test_whiten_does_not_read_masked_entries(garbage, shift_mean):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 3, 1, 4])[:, None]
    clean = whiten(np.where(mask, x, 0.0), mask, shift_mean)
    np.testing.assert_array_equal(whiten(np.where(mask, x, np.float32(garbage)), mask, shift_mean), clean)
    np.testing.assert_array_equal(np.asarray(clean)[~mask], 0.0)


def test_whitening_one_entry_or_none_stays_finite():
    x = rows([3.0, 5.0])
    np.testing.assert_array_equal(whiten(x, np.array([[1, 0]])), [[0.0, 0.0]])
    np.testing.assert_array_equal(whiten(x, np.array([[0, 0]])), [[0.0, 0.0]])


# ratio, advantage, loss and its derivative by the new log-probability, at clip_ratio 0.2
POLICY = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),  # inside: -A ratio
    (1.5, 2.0, -2.4, 0.0),  # max(-3, -2.4): the gain is clipped
    (0.5, 2.0, -1.0, -1.0),  # max(-1, -1.6): the way back stays open
    (1.1, -2.0, 2.2, 2.2),
    (1.5, -2.0, 3.0, 3.0),  # max(3, 2.4)
    (0.5, -2.0, 1.6, 0.0),  # max(1, 1.6)
]


def test_policy_loss_by_hand():
    ratio, advantage, loss, slope = (rows(column) for column in zip(*POLICY, strict=True))
    old = np.full_like(ratio, -1.25)
    new = old + np.log(ratio)
    np.testing.assert_allclose(ppo_policy_loss(new, old, advantage, clip_ratio=0.2), loss, rtol=1e-5)
    gradient = jax.grad(lambda x: ppo_policy_loss(x, old, advantage, clip_ratio=0.2).sum())(new)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradient)[slope == 0], 0.0)


def policy_loss_loop(new, old, advantage, clip_ratio, dual_clip):
    """One token, in float64."""
    ratio = math.exp(new - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1.0 - clip_ratio), 1.0 + clip_ratio))
    return min(loss, -advantage * dual_clip) if dual_clip and advantage < 0 else loss


@pytest.mark.parametrize("dual_clip", [0.0, 1.5, 3.0])
def test_policy_loss_equals_the_loop_in_value_and_gradient(dual_clip):
    rng = np.random.default_rng(6)
    new, old, advantages = rng.normal(size=(3, 20, 10)).astype(np.float32)
    loss = np.asarray(ppo_policy_loss(new, old, advantages, 0.2, dual_clip))
    gradient = np.asarray(jax.grad(lambda x: ppo_policy_loss(x, old, advantages, 0.2, dual_clip).sum())(new))
    h, bound = 1e-6, 0
    for at in np.ndindex(20, 10):
        n, o, a = float(new[at]), float(old[at]), float(advantages[at])
        np.testing.assert_allclose(loss[at], policy_loss_loop(n, o, a, 0.2, dual_clip), rtol=1e-5)
        left, right = (policy_loss_loop(n + s, o, a, 0.2, dual_clip) for s in (-h, h))
        np.testing.assert_allclose(gradient[at], (right - left) / (2 * h), rtol=1e-4, atol=1e-6)
        bound += a < 0 and bool(dual_clip) and math.exp(n - o) > dual_clip
    assert bound > 5 or not dual_clip  # the bound is met


def test_dual_clip_by_hand():
    # ratio 5, A -2: max(10, 2.4) = 10, at most 6; ratio 2: 4 stands; A 2: -2.4 stands
    ratio, advantage = rows([5.0, 2.0, 5.0]), rows([-2.0, -2.0, 2.0])
    new, old = np.log(ratio), np.zeros_like(ratio)
    np.testing.assert_allclose(ppo_policy_loss(new, old, advantage, 0.2, 3.0), [[6.0, 4.0, -2.4]], rtol=1e-6)
    gradient = jax.grad(lambda x: ppo_policy_loss(x, old, advantage, 0.2, 3.0).sum())(new)
    np.testing.assert_allclose(gradient, [[0.0, 4.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_ratios_give_finite_losses_and_gradients(log_ratio, dual_clip):
    new, advantages = rows([log_ratio] * 3), rows([-1.5, 0.0, 1.5])

    def loss(x):
        return ppo_policy_loss(x, jnp.zeros((1, 3)), advantages, 0.2, dual_clip)

    assert np.isfinite(loss(new)).all()
    assert np.isfinite(jax.grad(lambda x: loss(x).sum())(new)).all()


def gspo_loop(new, old, mask, advantage, clip_ratio):
    """Each answer's loss, float64: its ratio to the power 1 / length, clipped."""
    out = []
    for row in range(len(new)):
        steps = [t for t in range(len(new[row])) if mask[row][t]]
        if not steps:
            out.append(0.0)
            continue
        ratio = math.exp(sum(new[row][t] - old[row][t] for t in steps) / len(steps))
        clipped = min(max(ratio, 1.0 - clip_ratio), 1.0 + clip_ratio)
        out.append(max(-advantage[row] * ratio, -advantage[row] * clipped))
    return out


def test_sequence_logprobs_give_gspo_s_loss_and_gradient():
    rng = np.random.default_rng(7)
    old = -np.abs(rng.normal(size=(12, 6))).astype(np.float32)
    new = old + rng.normal(0.0, 0.4, (12, 6)).astype(np.float32)
    mask, advantage = rng.random((12, 6)) < 0.6, rng.normal(size=12).astype(np.float32)
    mask[0], mask[1], mask[2] = True, False, np.arange(6) == 3  # full, empty, one token

    @jax.jit
    def ours(new):
        per_token = ppo_policy_loss(
            sequence_logprobs(new, mask), sequence_logprobs(old, mask), jnp.asarray(advantage)[:, None], 0.2
        )
        lengths = jnp.maximum(mask.sum(1), 1)
        return (jnp.where(mask, per_token, 0.0)).sum(1) / lengths  # each answer's mean

    lists = old.tolist(), mask.tolist(), advantage.tolist(), 0.2
    np.testing.assert_allclose(ours(new), gspo_loop(new.tolist(), *lists), rtol=1e-5)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: ours(x).sum()))(new))
    for at in np.ndindex(12, 6):
        sides = []
        for step in (-1e-6, 1e-6):
            moved = new.tolist()
            moved[at[0]][at[1]] += step
            sides.append(sum(gspo_loop(moved, *lists)))
        np.testing.assert_allclose(gradient[at], (sides[1] - sides[0]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_sequence_logprobs_by_hand():
    logprobs = rows([-1.0, -2.0, np.nan, -6.0], [-4.0, np.nan, np.nan, np.nan], [np.nan] * 4)
    result = sequence_logprobs(logprobs, np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(result, [[-3.0, -3.0, 0.0, -3.0], [-4.0, 0.0, 0.0, 0.0], [0.0] * 4], rtol=1e-6)


# value, return, loss and its derivative by the value; the old value is 1, clip_range 0.2
VALUE = [
    (1.1, 2.0, 0.405, -0.9),  # inside: 1/2 0.9^2
    (1.5, 2.0, 0.32, 0.0),  # 1/2 max(0.5^2, (1.2 - 2)^2): no reward for going further than the range
    (1.5, 0.0, 1.125, 1.5),  # 1/2 max(1.5^2, 1.2^2): the way back stays open
    (0.5, 0.0, 0.32, 0.0),  # 1/2 max(0.5^2, 0.8^2)
    (0.5, 2.0, 1.125, -1.5),  # 1/2 max(1.5^2, 1.2^2)
]


def test_value_loss_by_hand():
    value, target, loss, slope = (rows(column) for column in zip(*VALUE, strict=True))
    old = np.ones_like(value)
    np.testing.assert_allclose(ppo_value_loss(value, old, target, clip_range=0.2), loss, rtol=1e-5)
    gradient = jax.grad(lambda v: ppo_value_loss(v, old, target, clip_range=0.2).sum())(value)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradient)[slope == 0], 0.0)


def test_value_loss_equals_the_loop_in_value_and_gradient():
    rng = np.random.default_rng(8)
    values, old, returns = rng.normal(0.0, 0.5, (3, 20, 10)).astype(np.float32)

    def loop(v, o, r):
        return 0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)

    loss = np.asarray(ppo_value_loss(values, old, returns, 0.2))
    gradient = np.asarray(jax.grad(lambda v: ppo_value_loss(v, old, returns, 0.2).sum())(values))
    for at in np.ndindex(20, 10):
        v, o, r = float(values[at]), float(old[at]), float(returns[at])
        np.testing.assert_allclose(loss[at], loop(v, o, r), rtol=1e-5, atol=1e-7)
        slope = (loop(v + 1e-6, o, r) - loop(v - 1e-6, o, r)) / 2e-6
        np.testing.assert_allclose(gradient[at], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_the_loop(shift_mean):
    rng = np.random.default_rng(9)
    x, mask = rng.normal(5.0, 0.3, (6, 11)).astype(np.float32), rng.random((6, 11)) < 0.5
    kept = [float(x[at]) for at in np.ndindex(6, 11) if mask[at]]
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((k - mean) ** 2 for k in kept) / len(kept) + 1e-8)
    ours = np.asarray(whiten(x, mask, shift_mean))
    for at in np.ndindex(6, 11):
        expected = (float(x[at]) - mean) / deviation + (0.0 if shift_mean else mean) if mask[at] else 0.0
        np.testing.assert_allclose(ours[at], expected, rtol=1e-5, atol=1e-5)


def test_score_lands_on_the_last_real_token_and_stays_a_float():
    logprobs = rows([-1.0, -2.0, -3.0, -50.0], [-1.0, 7.0, 7.0, 7.0], [-1.0, -1.0, -1.0, -1.0])
    ref_logprobs = rows([-1.5, -1.0, -3.0, 50.0], [-1.0, -7.0, -7.0, -7.0], [-1.0, -1.0, -1.0, -3.0])
    rewards = kl_penalized_rewards(rows(0.7, -1.9, 0.25), logprobs, ref_logprobs, np.array([3, 1, 4]), 0.1)
    # row 0: -0.1 * 0.5, -0.1 * (-1), 0.7; row 1 has one token of zero KL; row 2 fills its width: 0.25 - 0.1 * 2
    expected = [[-0.05, 0.1, 0.7, 0.0], [-1.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.05]]
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-7)


def test_rewards_of_a_row_sum_to_score_less_penalty():
    rng = np.random.default_rng(4)
    logprobs, ref_logprobs = rng.normal(size=(2, 5, 8)).astype(np.float32)
    lengths, scores = np.array([1, 8, 3, 5, 2]), rng.normal(size=5).astype(np.float32)
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, lengths, 0.3)
    kl = [(logprobs - ref_logprobs)[i, :n].sum() for i, n in enumerate(lengths)]
    np.testing.assert_allclose(rewards.sum(1), scores - 0.3 * np.array(kl), rtol=1e-5, atol=1e-6)


def test_bradley_terry_is_ln_2_between_equals():
    scores = rows(-3.0, 0.0, 1e4)
    np.testing.assert_allclose(bradley_terry_loss(scores, scores), np.full(3, np.log(2.0)), rtol=1e-6)


def test_bradley_terry_equals_float64_and_survives_large_margins():
    margin = np.array([-1e4, -88.0, -5.0, -0.1, 0.1, 5.0, 20.0, 88.0, 1e4])
    zero = np.zeros(len(margin), np.float32)
    expected = np.logaddexp(0.0, -margin)
    np.testing.assert_allclose(bradley_terry_loss(margin.astype(np.float32), zero), expected, rtol=1e-5, atol=1e-37)
    gradient = jax.grad(lambda x: bradley_terry_loss(x, zero).sum())(margin.astype(np.float32))
    # -sigmoid(-margin)
    np.testing.assert_allclose(gradient, -np.exp(-np.logaddexp(0.0, margin)), rtol=1e-5, atol=1e-37)
