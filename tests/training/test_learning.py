"""Two tasks whose optimum has a closed form: PPO, RLOO and GRPO reach 95 % of what it gains, from three seeds.

Both maximize J(pi) = E[r] - beta KL(pi || pi_ref) over all answers of N tokens, so the optimum is
J* = beta log E_ref[exp(r / beta)] for each prompt; J is computed exactly, by scoring every answer there is.
"""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.training.experience import PPOConfig, init_controllers, make_experience
from rlhf_jax.training.ppo import make_update, score_logprobs, score_values
from rlhf_jax.training.state import TrainState

NEVER = (99,)  # a stop id outside the vocabulary: every answer has N tokens
BETA, ROWS, SAMPLES = 0.2, 64, 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts of one token each, answers of `length` tokens; `reward` maps (prompts (B, 1), tokens (B, N)) to (B,)."""

    vocab: int
    length: int
    prompts: int
    reward: object

    @property
    def spec(self):
        shape = dict(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=32, context=8, tie_embeddings=False)
        return RoleSpec(TransformerConfig(vocab_size=self.vocab, **shape))


def bandit_reward(prompts, tokens):
    """One arm a prompt pays 1, another 0.6, the rest nothing."""
    arm = tokens[:, 0]
    return jnp.where(arm == 2 * prompts[:, 0], 1.0, jnp.where(arm == 2 * prompts[:, 0] + 1, 0.6, 0.0))


def counting_reward(prompts, tokens):
    """The number of tokens that are the prompt's."""
    return jnp.sum(tokens == prompts, axis=-1).astype(jnp.float32)


TASKS = {
    "bandit": Task(vocab=12, length=1, prompts=4, reward=bandit_reward),
    "counting": Task(vocab=5, length=4, prompts=4, reward=counting_reward),
}
ALGORITHMS = {
    "ppo": PPOConfig(epochs=2, minibatches=2, kl_coef=BETA, missing_end="add", missing_end_penalty=0.0, lam=1.0),
    "rloo": PPOConfig(estimator="rloo", samples=SAMPLES, epochs=2, minibatches=2, kl_coef=BETA, missing_end="add",
                      missing_end_penalty=0.0),
    "grpo": PPOConfig(estimator="grpo", samples=SAMPLES, epochs=2, minibatches=2, kl_coef=BETA, missing_end="add",
                      missing_end_penalty=0.0),
}  # fmt: skip
ITERATIONS = 150


@cache
def programs(task_name, algorithm):
    """Optimizer and update, compiled once for all seeds."""
    task, config = TASKS[task_name], ALGORITHMS[algorithm]
    optimizer = optax.adam(optax.linear_schedule(5e-3, 0.0, ITERATIONS * 4), eps=1e-5)
    return optimizer, make_update(config, task.spec, task.spec if config.has_critic else None, optimizer)


@partial(jax.jit, static_argnames=("config", "task"))
def experience_of(config, task, reference, params, rollout, controllers):
    logprobs, entropy = score_logprobs(task.spec, params["policy"], rollout, 1)
    ref_logprobs, _ = score_logprobs(task.spec, reference, rollout, 1)
    values = score_values(task.spec, params["value"], rollout, 1) if config.has_critic else 0 * logprobs
    read = RoleScores(logprobs, ref_logprobs, entropy, values)
    return make_experience(config, rollout, read, task.reward(rollout.prompts, rollout.tokens), controllers)


def every_answer(task):
    """A "rollout" of all answers to all prompts, prompt by prompt."""
    answers = np.asarray(list(itertools.product(range(task.vocab), repeat=task.length)), np.int32)
    prompts = np.repeat(np.arange(1, task.prompts + 1, dtype=np.int32), len(answers))[:, None]
    tokens = np.tile(answers, (task.prompts, 1))
    ones = np.ones(len(tokens), np.int32)
    sampling = Sampling(task.length, stop_ids=NEVER)
    return Rollout(prompts, ones, tokens, task.length * ones, ones > 1, 0.0 * tokens, sampling)


def log_policy(task, weights):
    """log pi of every answer: (prompts, answers) float64."""
    logprobs, _ = score_logprobs(task.spec, weights, every_answer(task), 1)
    out = np.asarray(logprobs, np.float64).sum(-1).reshape(task.prompts, -1)
    np.testing.assert_allclose(np.exp(out).sum(-1), 1.0, rtol=1e-4)
    return out


def objective(task, weights, reference):
    """(J, J*, J of the reference), each the mean over prompts."""
    ours, theirs = log_policy(task, weights), log_policy(task, reference)
    rollout = every_answer(task)
    rewards = np.asarray(task.reward(rollout.prompts, rollout.tokens), np.float64).reshape(task.prompts, -1)
    reached = (np.exp(ours) * (rewards - BETA * (ours - theirs))).sum(-1).mean()
    best = (BETA * np.log((np.exp(theirs) * np.exp(rewards / BETA)).sum(-1))).mean()
    return reached, best, (np.exp(theirs) * rewards).sum(-1).mean()


def train(task_name, algorithm, seed):
    """(trained policy, reference)."""
    task, config = TASKS[task_name], ALGORITHMS[algorithm]
    optimizer, update = programs(task_name, algorithm)
    keys = jax.random.split(jax.random.key(seed), 4)
    reference = {"base": jax.jit(partial(init_base, task.spec.config))(key=keys[0])}
    params = {"policy": jax.tree.map(jnp.copy, reference)}
    if config.has_critic:
        params["value"] = {"base": jax.tree.map(jnp.copy, reference["base"]), "head": init_head(16, 0.0, key=keys[1])}
    frozen = {role: {} for role in params}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), init_controllers(config))
    rows = ROWS // config.samples
    prompts = (np.arange(rows, dtype=np.int32) % task.prompts + 1)[:, None]
    for iteration in range(ITERATIONS):
        rollout = generate(
            task.spec.config,
            state.params["policy"]["base"],
            prompts,
            np.ones(rows, np.int32),
            key=jax.random.fold_in(keys[2], iteration),
            sampling=Sampling(task.length, stop_ids=NEVER),
            samples=config.samples,
        )
        experience, metrics, controllers = experience_of(
            config, task, reference, state.params, rollout, state.controllers
        )
        state = state.replace(controllers=controllers)
        key = jax.random.fold_in(keys[3], iteration)
        state, _ = update(state, frozen, experience, metrics["objective/kl_coef"], key)
    return state.params["policy"], reference


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task_name", TASKS)
def test_95_percent_of_the_optimum_is_reached(task_name, algorithm, seed):
    policy, reference = train(task_name, algorithm, seed)
    reached, best, start = objective(TASKS[task_name], policy, reference)
    share = (reached - start) / (best - start)
    print(f"{task_name} {algorithm} seed {seed}: {start:.3f} -> {reached:.3f} of {best:.3f}: {share:.1%}")
    assert best - start > 0.1
    assert 0.95 < share < 1 + 1e-3
