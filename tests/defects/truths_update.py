"""Truths of losses, gradients and updates, and of the places where a role is read.

Patched code is traced anew, or a specimen has it traced anew.
"""

import dataclasses
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import COUNT, MODEL, SPEC
from truths import LENGTHS, PLAIN, experience_of, same, synthetic

from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.training import gradient as gradients
from rlhf_jax.training import ppo as updates
from rlhf_jax.training.experience import Experience, PPOConfig
from rlhf_jax.training.gradient import mean_metrics
from rlhf_jax.training.state import TrainState

# --- losses -----------------------------------------------------------------------------------------------------------


def loss_is_never_below_the_unclipped() -> None:
    ratio, advantages = jnp.meshgrid(jnp.linspace(0.5, 2.0, 7), jnp.asarray([-1.0, 1.0]))
    loss = updates.ppo_policy_loss(jnp.log(ratio), jnp.zeros_like(ratio), advantages, 0.2)
    assert (loss >= -advantages * ratio - 1e-6).all(), "clipping made the policy's loss lower"


def gradient_at_ratio_1_is_the_advantage() -> None:
    logprobs, advantages = -jnp.arange(1.0, 5.0), jnp.asarray([1.0, -2.0, 0.5, 3.0])
    gradient = jax.grad(lambda x: updates.ppo_policy_loss(x, logprobs, advantages, 0.2).sum())(logprobs)
    same(gradient, -advantages, "at ratio 1 the gradient is not minus the advantage")


def dual_clip_leaves_positive_advantages() -> None:
    ratio = jnp.linspace(0.1, 6.0, 9)
    one, other = (updates.ppo_policy_loss(jnp.log(ratio), 0 * ratio, 1 + 0 * ratio, 0.2, c) for c in (0.0, 3.0))
    same(one, other, "the dual clip moved the loss of a positive advantage", 0.0)
    bounded = updates.ppo_policy_loss(jnp.log(ratio), 0 * ratio, -1 + 0 * ratio, 0.2, 3.0)
    same(bounded.max(), 3.0, "the dual clip does not bound a negative advantage's loss")


def value_may_move_so_far() -> None:
    """A value that went more than the range from its old one, toward its return, is pulled no further."""
    gradient = jax.grad(lambda v: updates.ppo_value_loss(v, jnp.float32(0.0), jnp.float32(1.0), 0.2))(jnp.float32(0.5))
    same(gradient, 0.0, "the value is clipped around something other than its old value")


def bigram(spec: Any, weights: Any, prompts: Any, prompt_lengths: Any, answers: Any, lengths: Any, temperature: float):
    """`answer_logprobs` of a table of next-token logits in the decoder's place."""
    last = jnp.take_along_axis(prompts, (prompt_lengths - 1)[:, None], axis=1)
    before = jnp.concatenate([last, answers[:, :-1]], axis=1)
    logps = jax.nn.log_softmax(weights["table"][before] / temperature)
    chosen = jnp.take_along_axis(logps, answers[:, :, None], axis=-1)[..., 0]
    inside = jnp.arange(answers.shape[1]) < lengths[:, None]
    return jnp.where(inside, chosen, 0.0), jnp.where(inside, -jnp.sum(jnp.exp(logps) * logps, axis=-1), 0.0)


def bigram_weights() -> dict[str, Any]:
    table = np.random.default_rng(3).normal(size=(MODEL.vocab_size, MODEL.vocab_size))
    return {"policy": {"table": jnp.asarray(table, jnp.float32)}}


def bigram_experience(config: PPOConfig, width: int = COUNT) -> Experience:
    """Its old log-probabilities are random numbers, so ratios are not 1."""
    return experience_of(config, *synthetic(width))[0]


def objective_of(config: PPOConfig, experience: Experience) -> RecordLosses:
    with jax.disable_jit(), mock.patch.object(updates, "answer_logprobs", bigram):
        objective = updates.ppo_objective(config, SPEC, None)
        frozen = {"policy": {}, "kl_coef": jnp.float32(config.kl_coef)}
        return objective(bigram_weights(), frozen, experience)


def wider_padding_is_nothing_to_the_update() -> None:
    wide, narrow = (
        mean_metrics(objective_of(PLAIN, bigram_experience(PLAIN, width)).metrics) for width in (COUNT + 3, COUNT)
    )
    for name in narrow:
        same(wide[name], narrow[name], f"padding changes {name}")


def kl_in_the_loss_costs() -> None:
    config = dataclasses.replace(PLAIN, kl_in="loss", kl_estimator="k2", kl_coef=0.0)
    experience = bigram_experience(config)
    free, paid = (objective_of(dataclasses.replace(config, kl_coef=c), experience).losses for c in (0.0, 1.0))
    assert (paid > free).all(), "a KL in the loss lowers it"


def answer_without_advantage_counts() -> None:
    experience = bigram_experience(PLAIN)
    advantages = jnp.asarray(experience.advantages).at[0].set(0.0)
    out = objective_of(PLAIN, experience.replace(advantages=advantages))
    same(out.weights.sum(), LENGTHS.sum(), "tokens of no advantage are not counted")


def update_counts_its_steps() -> None:
    config = dataclasses.replace(PLAIN, epochs=2, minibatches=2)
    experience, weights = bigram_experience(config), bigram_weights()
    with mock.patch.object(updates, "answer_logprobs", bigram):
        optimizer = optax.scale_by_schedule(lambda count: -0.1)
        state = TrainState(jnp.int32(0), weights, optimizer.init(weights))
        update = updates.make_update(config, SPEC, None, optimizer)
        state, _ = update(state, {"policy": {}}, experience, jnp.float32(0.1), jax.random.key(0))
    assert int(state.step) == int(state.opt_state.count) == 4, "`step` is not the number of optimizer steps"


def accumulation_is_nothing() -> None:
    """Records of unlike weight, in one piece and in four."""

    def objective(trainable: Any, frozen: Any, batch: Any) -> RecordLosses:
        return RecordLosses(jnp.square(trainable - batch["x"]) * batch["weight"], batch["weight"], {})

    batch = {"x": jnp.arange(8.0), "weight": jnp.asarray(LENGTHS, jnp.float32)}
    one, four = (gradients.plain_gradient(objective, n)(jnp.float32(0.0), {}, batch)[0] for n in (1, 4))
    same(one, four, "the gradient depends on the number of microbatches")


def epochs_have_orders_of_their_own() -> None:
    orders = [
        tuple(order)
        for key in (0, 1)
        for order in np.asarray(updates.minibatch_rows(jax.random.key(key), 24, 4, 3)).reshape(4, 24)
    ]
    assert all(sorted(order) == list(range(24)) for order in orders), "an epoch does not read every row once"
    assert len(set(orders[:4])) == 4, "two epochs of an update have one order"
    assert len(set(orders)) == 8, "two updates have one order"


# --- the roles --------------------------------------------------------------------------------------------------------


def value_knows_nothing_of_its_token() -> None:
    rollout, _, _ = synthetic()
    changed = rollout.replace(tokens=rollout.tokens.at[:, 3].set(11))
    weights = harness.start_weights()["value"]
    before, after = (updates.score_values(SPEC, weights, r, 1)[:, :4] for r in (rollout, changed))
    same(after, before, "a value depends on the token it comes before")


def score_ends_with_the_answer() -> None:
    rollout, _, _ = synthetic()
    beyond = jnp.arange(COUNT) >= rollout.lengths[:, None]
    dirty = rollout.replace(tokens=jnp.where(beyond, 11, rollout.tokens))
    weights = harness.start_weights()["value"]  # a role with a head, as a reward model is
    clean, other = (updates.score_rewards(SPEC, weights, r, 1) for r in (rollout, dirty))
    same(clean, other, "a score is read beyond the answer's last token")
