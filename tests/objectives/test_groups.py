import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import gae, grpo_advantages, reinforce_returns, rloo_advantages

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(2.0, 3.0, size=(7, 5)).astype(np.float32)


def test_rloo_by_hand():
    # the others' means: 4, 3, 2
    np.testing.assert_allclose(rloo_advantages(jnp.array([[1.0, 3.0, 5.0]])), [[-3.0, 0.0, 3.0]], rtol=1e-6)


def test_grpo_by_hand():
    # mean 3, deviations -2 0 2, unbiased variance 8 / 2 = 4
    expected = 2.0 / (2.0 + 1e-4)
    result = grpo_advantages(jnp.array([[1.0, 3.0, 5.0]]))
    np.testing.assert_allclose(result, [[-expected, 0.0, expected]], rtol=1e-6)
    np.testing.assert_allclose(grpo_advantages(jnp.array([[1.0, 3.0, 5.0]]), scale=False), [[-2.0, 0.0, 2.0]])


def test_advantages_equal_the_loop():
    rloo, grpo, dr_grpo = np.zeros((3, *REWARDS.shape))
    for p, row in enumerate(REWARDS.tolist()):
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
        for i, r in enumerate(row):
            others = [row[j] for j in range(len(row)) if j != i]
            rloo[p, i] = r - sum(others) / len(others)
            dr_grpo[p, i] = r - mean
            grpo[p, i] = (r - mean) / (deviation + 1e-4)
    np.testing.assert_allclose(rloo_advantages(REWARDS), rloo, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grpo_advantages(REWARDS), grpo, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grpo_advantages(REWARDS, scale=False), dr_grpo, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reward", [0.1, -1.0, 1e8, 0.0])
def test_equal_rewards_give_exactly_nothing(reward):
    rewards = jnp.full((2, 7), reward, jnp.float32)  # the float32 mean of seven 0.1 is not 0.1
    for advantages in (rloo_advantages(rewards), grpo_advantages(rewards), grpo_advantages(rewards, scale=False)):
        np.testing.assert_array_equal(advantages, 0.0)


@pytest.mark.parametrize(
    "advantages",
    [rloo_advantages, grpo_advantages, lambda r: grpo_advantages(r, scale=False)],
    ids=["rloo", "grpo", "dr"],
)
def test_invariances(advantages):
    ours = np.asarray(advantages(REWARDS))
    np.testing.assert_allclose(ours.sum(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages(REWARDS + np.float32(3.0)), ours, rtol=1e-4, atol=1e-5)
    order = RNG.permutation(5)
    np.testing.assert_allclose(advantages(REWARDS[:, order]), ours[:, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(advantages(REWARDS[:2]), ours[:2], rtol=1e-6)  # another prompt changes nothing


def test_grpo_forgets_the_scale_and_dr_grpo_keeps_it():
    np.testing.assert_allclose(grpo_advantages(8.0 * REWARDS), grpo_advantages(REWARDS), rtol=3e-4)
    np.testing.assert_allclose(grpo_advantages(8.0 * REWARDS, False), 8.0 * grpo_advantages(REWARDS, False), rtol=1e-5)


def test_whole_numbers_are_not_cut_and_one_answer_is_refused():
    np.testing.assert_allclose(rloo_advantages(jnp.array([[1, 0, 0]])), [[1.0, -0.5, -0.5]])
    for function in (rloo_advantages, grpo_advantages):
        assert function(jnp.array([[1, 0, 0]])).dtype == jnp.float32
        with pytest.raises(ValueError, match="at least 2"):
            function(jnp.ones((4, 1)))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_equal_the_loop_on_masks_with_holes(gamma):
    rewards = RNG.normal(size=(6, 9)).astype(np.float32)
    mask = RNG.random((6, 9)) < 0.6
    mask[0], mask[1], mask[2] = True, False, np.arange(9) == 4
    expected = np.zeros((6, 9))
    for row in range(6):
        after = 0.0
        for t in reversed(range(9)):
            if mask[row, t]:
                after = expected[row, t] = float(rewards[row, t]) + gamma * after
    dirty = np.where(mask, rewards, np.nan).astype(np.float32)
    result = jax.jit(reinforce_returns, static_argnums=2)(dirty, mask, gamma)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_returns_are_gae_s_at_lambda_one_whatever_the_values():
    rewards, values = RNG.normal(size=(2, 4, 9)).astype(np.float32)
    mask = RNG.random((4, 9)) < 0.7
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    np.testing.assert_allclose(reinforce_returns(rewards, mask, 0.9), returns, rtol=1e-4, atol=1e-5)
