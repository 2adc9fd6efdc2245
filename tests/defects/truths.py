"""Truths that hold of our code and break under a defect: identities and invariances, each raising with its name.

They run without compilation (`jax.disable_jit`) or compile anew, so a patch is seen wherever it is put.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import COUNT, MODEL, SPEC, STOP_IDS

from rlhf_jax.distributed.sharding import batch_sharding
from rlhf_jax.models import LoraConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout import sampling as sampling_module
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages import ppo as stage
from rlhf_jax.stages import ppo_roles
from rlhf_jax.stages import train as train_module
from rlhf_jax.training import experience as experiences
from rlhf_jax.training import gradient as gradients
from rlhf_jax.training import guards
from rlhf_jax.training import ppo as updates
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.experience import Experience, PPOConfig
from rlhf_jax.training.gradient import RecordLosses, mean_metrics
from rlhf_jax.training.state import TrainState

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
        rollout, _ = stage._rollouts(context, roles, prompts, sample, harness.mesh())(roles.policy.weights, 0)
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


# --- draws and data ---------------------------------------------------------------------------------------------------


def _requests(prompts: int) -> tuple[list[Any], list[np.ndarray]]:
    """(key, row ids) that three rollouts of 8 answers ask the sampler for."""
    asked = []

    def sample(policy: Any, batch: dict[str, jax.Array], key: jax.Array, samples: int) -> Any:
        asked.append((tuple(np.asarray(jax.random.key_data(key)).tolist()), np.asarray(batch["row_ids"])))
        return SimpleNamespace()

    context, roles = harness.tiny_context(), harness.tiny_roles()
    roll_out = stage._rollouts(context, roles, harness.tiny_prompts(prompts), sample, harness.mesh())
    for iteration in range(context.config.iterations):
        roll_out({}, iteration)
    return [list(column) for column in zip(*asked, strict=True)]  # type: ignore[return-value]


def rollouts_have_keys_of_their_own() -> None:
    keys, _ = _requests(8)
    assert len(set(keys)) == len(keys), "two rollouts have one key"


def prompt_that_comes_twice_is_answered_anew() -> None:
    _, row_ids = _requests(3)
    assert all(len(set(ids)) == len(ids) for ids in row_ids), "a prompt that comes twice in a rollout has one answer"


def rows_are_drawn_apart() -> None:
    """Eight times one prompt, by the sampler of the stage."""
    with jax.set_mesh(harness.mesh()):
        rows = {"prompts": np.full((8, 5), 3, np.int32), "lengths": np.full(8, 5, np.int32)}
        batch = jax.device_put({**rows, "row_ids": np.arange(8, dtype=np.int32)}, batch_sharding(harness.mesh()))
        roles = harness.tiny_roles()
        sample = stage._sampler(harness.tiny_context(), roles, harness.mesh())
        rollout = sample(roles.policy.weights, batch, jax.random.key(0))
    assert len(np.unique(np.asarray(rollout.tokens), axis=0)) > 1, "rows of one prompt have one answer"


def tokens_come_as_often_as_their_logprobs_say() -> None:
    logits, rows = jnp.asarray([0.5, 0.1, -0.2, 0.3, -0.6]), 4096
    with jax.disable_jit():
        keys = sampling_module.row_keys(jax.random.key(0), jnp.arange(rows))
        draw = sampling_module.draw(jnp.tile(logits, (rows, 1)), Sampling(), keys, jnp.int32(0))
    tokens, logprobs = (np.asarray(x) for x in draw)
    for token, probability in enumerate(np.asarray(jax.nn.softmax(logits))):
        deviation = np.sqrt(probability * (1 - probability) / rows)
        share = np.mean(tokens == token)
        assert abs(share - probability) < 5 * deviation, f"token {token} comes with {share:.3f}, not {probability:.3f}"
        same(np.exp(logprobs[tokens == token]), probability, "a reported log-probability is another token's")


def epoch_reads_every_record_once() -> None:
    order = stage.DataOrder(24, seed=5)
    batches = [order.batch(step, 8) for step in range(3)]
    assert sorted(np.concatenate(batches)) == list(range(24)), "an epoch does not read every record once"


def order_is_its_seeds() -> None:
    one, other = (stage.DataOrder(24, seed=5).batch(0, 24) for _ in range(2))
    assert (one == other).all(), "one seed has two orders"


def learning_rate_decays_over_steps() -> None:
    """The rate that the loop logs is at its end after the last optimizer step, and not before."""
    given = harness.experiment_with().stages.ppo
    given.optimizer.update(schedule="linear", warmup=0.0, final=0.1, learning_rate=1.0)
    context = SimpleNamespace(config=given, name="ppo", folder=None, identity="", experiment=harness.experiment_with())
    with mock.patch.object(train_module, "run_loop", lambda **given: given["learning_rate"]):
        rate: Any = train_module.train(
            context, None, None, None, iterations=3, steps_each=4, shown=(), tokens_each=1, flops_each=1.0
        )
    assert float(rate(11)) > float(rate(12)) == np.float32(0.1), "the rate ends before the last optimizer step"


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


def reference_is_where_the_policy_starts() -> None:
    """Under adapters that an earlier stage trained: the watch sees the KL before any update."""
    spec, start = RoleSpec(MODEL, LoraConfig(rank=2)), harness.start_weights()
    policy, value = (init_adapters(MODEL, spec.lora, key=jax.random.key(i)) for i in (5, 6))
    policy = {target: {**leaf, "b": leaf["b"] + 0.3} for target, leaf in policy.items()}
    own = {"base": start["policy"]["base"], "adapters": policy}
    critic = {"base": own["base"], "adapters": value, "head": start["value"]["head"]}
    tokenizer: Any = SimpleNamespace(stop_ids=STOP_IDS)
    judge: Any = SimpleNamespace(roles={})
    roles = ppo_roles.Roles(harness.SETTINGS, Role(spec, own, tokenizer), Role(spec, critic, tokenizer), own, judge)
    assert roles.together
    rollout, _, scores = synthetic()
    read = roles.score(roles.acting(roles.trainable), rollout, 1)
    rollout = rollout.replace(logprobs=read.logprobs)
    _, metrics, _ = experience_of(harness.SETTINGS, rollout, read, scores)
    still = {"val/first_ratio_error": 0.0, "optimizer/gradient_norm": 1.0}
    watch = guards.Watch("ppo", harness.SETTINGS, harness.experiment_with().checks, "float32", 20.0, print)
    watch(1, {**metrics, **still})
