"""Truths that hold of our code and break under a defect: identities and invariances, each raising with its name.

They run without compilation (`jax.disable_jit`) or compile anew, so a patch is seen wherever it is put.
"""

import dataclasses
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from harness import COUNT

from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages import ppo as stage
from rlhf_jax.training import experience as experiences
from rlhf_jax.training.experience import PPOConfig

LENGTHS = np.array([6, 1, 3, 2, 6, 4, 5, 2], np.int32)
PLAIN = PPOConfig(epochs=1, minibatches=1, estimator="reinforce++", whiten_advantages=False)


def same(a: Any, b: Any, broken: str, tolerance: float = 1e-5) -> None:
    assert np.allclose(a, b, rtol=tolerance, atol=tolerance), broken


def synthetic(width: int = COUNT, beyond: float = 0.0) -> tuple[Rollout, RoleScores, jax.Array]:
    """A rollout, its scores by the roles, and its rewards, all from random numbers; log-probabilities `beyond`."""
    rng = np.random.default_rng(0)
    mask = np.arange(COUNT) < LENGTHS[:, None]

    def column(fill: float = 0.0) -> jax.Array:
        inside = np.where(mask, rng.normal(size=mask.shape), fill)
        return jnp.asarray(np.pad(inside, ((0, 0), (0, width - COUNT)), constant_values=fill), jnp.float32)

    tokens = np.pad(np.where(mask, rng.integers(1, 8, mask.shape), 0), ((0, 0), (0, width - COUNT)))
    prompts = jnp.asarray(rng.integers(1, 13, (8, 5)), jnp.int32)
    ended = jnp.asarray(LENGTHS < COUNT)
    logprobs = column()
    rollout = Rollout(
        prompts, jnp.full(8, 5), jnp.asarray(tokens, jnp.int32), jnp.asarray(LENGTHS), ended, logprobs, Sampling(width)
    )
    read = RoleScores(logprobs, column(beyond), jnp.abs(logprobs), column())
    return rollout, read, jnp.asarray(rng.normal(size=8), jnp.float32)


def experience_of(config: PPOConfig, rollout: Rollout, read: RoleScores, scores: jax.Array):
    with jax.disable_jit():
        controllers = experiences.init_controllers(config)
        return experiences.make_experience(config, rollout, read, scores, controllers)


# --- rewards and advantages -------------------------------------------------------------------------------------------


def trained_on_is_logged() -> None:
    """Without values, discount and whitening the first token's advantage is the answer's reward."""
    config = dataclasses.replace(PLAIN, kl_coef=0.3, reward_clip=0.8, missing_end="add", missing_end_penalty=0.0)
    experience, metrics, _ = experience_of(config, *synthetic())
    same(
        experience.advantages[:, 0].mean(), metrics["objective/rlhf_reward"], "trained rewards are not the logged ones"
    )


def order_of_rows_is_nothing() -> None:
    rollout, read, scores = synthetic()
    order = np.array([0, 1, 4, 7, 2, 3, 5, 6])
    config = PPOConfig()
    experience, _, _ = experience_of(config, rollout, read, scores)
    moved, _, _ = experience_of(config, *jax.tree.map(lambda x: x[order], (rollout, read, scores)))
    same(moved.advantages, experience.advantages[order], "an advantage depends on its row's place in the batch")


def wider_padding_is_nothing() -> None:
    wide, narrow = (experience_of(PPOConfig(), *synthetic(width))[1] for width in (COUNT + 3, COUNT))
    for name in narrow:
        same(wide[name], narrow[name], f"padding changes {name}")


def whitened_rewards_keep_their_sum() -> None:
    _, read, _ = synthetic()
    mask = jnp.arange(COUNT) < LENGTHS[:, None]
    rewards = jnp.where(mask, read.ref_logprobs + 1.0, 0.0)
    with jax.disable_jit():
        config = dataclasses.replace(PLAIN, whiten_rewards=True)
        advantages, _ = experiences.advantages_and_returns(config, rewards, jnp.zeros_like(rewards), mask)
    same(advantages[:, 0].sum(), rewards.sum(), "whitening rewards moved their mean")


def what_lies_beyond_may_be_nan() -> None:
    config = dataclasses.replace(PLAIN, estimator="rloo", samples=2)
    experience, metrics, _ = experience_of(config, *synthetic(beyond=float("nan")))
    assert np.isfinite(experience.advantages).all() and np.isfinite(metrics["objective/kl"]), "a NaN on padding spreads"


def only_a_missing_end_is_penalized() -> None:
    ended = jnp.asarray(LENGTHS < COUNT)
    shaped = experiences.shaped_scores(PPOConfig(), jnp.full(8, 0.5), ended, experiences.init_controllers(PPOConfig()))
    same(shaped[0], np.where(ended, 0.5, -1.0), "the missing-end penalty is not on the answers without a stop token")


def adaptive_coefficient_rests_at_its_target() -> None:
    inputs = synthetic()
    rollout, read, scores = inputs
    read = read._replace(ref_logprobs=jnp.where(read.logprobs != 0, read.logprobs - 0.5, 0.0))  # KL above 0
    fixed = experience_of(PPOConfig(), rollout, read, scores)[1]
    config = PPOConfig(kl_controller="adaptive", kl_target=float(fixed["objective/kl"]), kl_horizon=100)
    controllers = experience_of(config, rollout, read, scores)[2]
    same(controllers.kl_coef, config.kl_coef, "the coefficient moves though objective/kl is at kl_target")


def gae_of(rewards: Any, values: Any, mask: Any) -> np.ndarray:
    with jax.disable_jit():
        arrays = (jnp.asarray(x, jnp.float32) for x in (rewards, values))
        return np.asarray(experiences.gae(*arrays, jnp.asarray(mask), 0.97, 0.9)[0])


def hole_is_skipped() -> None:
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 1, 6))
    mask = np.array([[1, 1, 0, 0, 1, 1]], bool)
    inside = [x[mask][None] for x in (rewards, values)]
    broken = "a hole in the mask changes the advantages around it"
    same(gae_of(rewards * mask, values, mask)[mask], gae_of(*inside, np.ones((1, 4), bool))[0], broken)


def nothing_is_bootstrapped_past_the_end() -> None:
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 8, 6))
    mask = np.arange(6) < LENGTHS[:, None]
    clean, dirty = (gae_of(rewards * mask, np.where(mask, values, fill), mask) for fill in (0.0, 50.0))
    same(clean, dirty, "a value beyond the last token is bootstrapped from")


# --- groups -----------------------------------------------------------------------------------------------------------


def prompt_alone_gives_no_advantage() -> None:
    """Answers to one prompt that score alike have nothing over each other."""
    with jax.set_mesh(harness.mesh()):
        context = harness.tiny_context(batch_size=16, samples=2)
        roles, prompts = harness.tiny_roles(), harness.tiny_prompts()
        sample = stage._sampler(context, roles, harness.mesh())
        draw = stage._in_order(context, len(prompts))
        rollout, _ = stage._rollouts(context, roles, prompts, sample, draw, harness.mesh())(roles.policy.weights, 0)
    rewards = jnp.zeros_like(rollout.logprobs).at[:, 0].set(rollout.prompts.sum(1) / 7.0)
    config = dataclasses.replace(PLAIN, estimator="rloo", samples=2)
    mask = jnp.arange(COUNT) < rollout.lengths[:, None]
    advantages, _ = experiences.advantages_and_returns(config, rewards, rewards, mask)
    same(advantages, 0.0, "answers are compared with another prompt's")


def group_is_compared_whole() -> None:
    """Whoever changes places with whom inside a group: each answer keeps its advantage."""
    config = dataclasses.replace(PLAIN, estimator="grpo", samples=4)
    rewards = jnp.asarray(np.random.default_rng(2).normal(size=(8, 1)), jnp.float32)
    order, mask = np.array([0, 2, 1, 3, 6, 5, 4, 7]), jnp.ones((8, 1), bool)
    here, there = (experiences.advantages_and_returns(config, x, x, mask)[0] for x in (rewards, rewards[order]))
    same(there, here[order], "an advantage depends on its answer's place in the group")
