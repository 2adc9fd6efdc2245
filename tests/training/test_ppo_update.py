"""One iteration of policy optimization: identities at update 0, a float64 loop, invariances of the update."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_ppo as tiny

from rlhf_jax.models import Transformer
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.training.experience import Experience, PPOConfig, end_penalized, init_controllers, make_experience
from rlhf_jax.training.ppo import (
    answer_outputs,
    make_single_update,
    make_update,
    minibatch_rows,
    score_logprobs,
    score_rewards,
    score_values,
)
from rlhf_jax.training.state import TrainState

# Before the first update.


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_nothing_has_moved_at_update_0(lora, full, adapted):
    roles = adapted if lora else full
    experience, metrics = tiny.experience_of(roles, tiny.roll(roles))
    assert float(metrics["objective/kl"]) == 0.0
    assert float(metrics["objective/rlhf_reward"]) == float(metrics["objective/scores"])
    assert float(metrics["rollout/logprob_gap"]) < 1e-5
    _, metrics = tiny.run(roles, experience, tiny.ONCE)
    assert float(metrics["val/first_ratio_error"]) < 1e-5
    assert float(metrics["policy/clipfrac"]) == float(metrics["val/clipfrac"]) == 0.0
    assert float(metrics["policy/approxkl"]) < 1e-10
    assert abs(float(metrics["loss/policy"])) < 1e-6  # minus the mean of whitened advantages


def test_another_reference_has_a_kl(full):
    """What the zero above would show: kl is the mean over answers of the summed log-ratio."""
    rollout, reference = tiny.roll(full), {"base": tiny.base(7)}
    _, metrics = tiny.experience_of(full, rollout, reference=reference)
    ours, theirs = (score_logprobs(full.spec, w, rollout, 1)[0] for w in (full.weights["policy"], reference))
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    kl = [sum(ours[i, t] - theirs[i, t] for t in range(n)) for i, n in enumerate(rollout.lengths)]
    assert np.mean(kl) > 0.1
    np.testing.assert_allclose(metrics["objective/kl"], np.mean(kl), rtol=1e-5)
    expected = float(metrics["objective/scores"]) - tiny.ONCE.kl_coef * np.mean(kl)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], expected, rtol=1e-5)


def test_one_temperature_for_sampling_old_and_new(full):
    rollout = tiny.roll(full, temperature=0.7)
    experience, metrics = tiny.experience_of(full, rollout)
    assert float(metrics["rollout/logprob_gap"]) < 1e-5  # decoding and scoring
    assert float(metrics["objective/kl"]) == 0.0
    _, metrics = tiny.run(full, experience, tiny.ONCE)
    assert float(metrics["val/first_ratio_error"]) < 1e-5
    other = dataclasses.replace(experience.sampling, temperature=1.0)
    _, metrics = tiny.run(full, experience.replace(sampling=other), tiny.ONCE)
    assert float(metrics["val/first_ratio_error"]) > 1e-2  # what a second temperature would show


def test_scores_come_back_in_the_order_of_the_rows(full):
    rollout = tiny.roll(full)
    for score, role, spec in (
        (score_logprobs, "policy", full.spec),
        (score_values, "value", full.spec),
        (score_rewards, "reward", full.reward),
    ):
        whole, split_up = (score(spec, full.weights[role], rollout, n) for n in (1, 4))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split_up, whole)


def test_a_score_is_read_at_the_last_real_token(full):
    rollout = tiny.roll(full)
    scores = score_rewards(full.reward, full.weights["reward"], rollout, 1)
    hidden_of = jax.jit(partial(Transformer(tiny.CONFIG).apply, return_hidden=True))
    head = full.weights["reward"]["head"]
    for i in range(tiny.ROWS):
        answer = rollout.tokens[i, : rollout.lengths[i]]
        row = np.concatenate([tiny.PROMPTS[i, : tiny.LENGTHS[i]], answer])
        padded = np.pad(row, (0, tiny.WIDTH + tiny.COUNT - len(row)))[None]
        hidden = hidden_of({"params": full.weights["reward"]["base"]}, padded)[0, len(row) - 1]
        np.testing.assert_allclose(scores[i], hidden @ head["kernel"][:, 0] + head["bias"][0], rtol=1e-4, atol=1e-5)


# From scores to advantages.


def test_experience_equals_the_float64_loop():
    config = PPOConfig(kl_coef=0.3, missing_end_penalty=-2.5, gamma=0.97, lam=0.9)
    rollout, mask, arrays = tiny.synthetic()
    experience, metrics = tiny.experienced(config, rollout, *arrays)
    logprobs, ref_logprobs, entropy, values, scores = (np.asarray(x, np.float64) for x in arrays)
    scores = [score if ended else -2.5 for score, ended in zip(scores, rollout.ended, strict=True)]
    advantages = np.zeros(mask.shape)
    for i, n in enumerate(rollout.lengths):
        value = advantage = 0.0
        for t in reversed(range(n)):
            reward = -0.3 * (logprobs[i, t] - ref_logprobs[i, t]) + (scores[i] if t == n - 1 else 0.0)
            advantage = reward + 0.97 * value - values[i, t] + 0.97 * 0.9 * advantage
            value, advantages[i, t] = values[i, t], advantage
    returns = np.where(mask, advantages + values, 0.0)
    whitened = np.where(mask, (advantages - advantages[mask].mean()) / advantages[mask].std(), 0.0)
    np.testing.assert_allclose(experience.advantages, whitened, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(experience.returns, returns, rtol=1e-4, atol=1e-5)
    kl = (logprobs - ref_logprobs).sum(1)
    expected = {
        "objective/kl": kl.mean(),
        "objective/entropy": -logprobs.sum(1).mean(),
        "objective/scores": np.mean(scores),
        "objective/scores_std": np.std(scores),
        "objective/raw_scores": arrays[-1].mean(),
        "objective/rlhf_reward": np.mean(scores - 0.3 * kl),
        "objective/kl_coef": 0.3,
        "policy/entropy": entropy.sum() / mask.sum(),
        "rollout/logprob_gap": 0.0,
        "rollout/repeated": 0.0,
        "val/num_eos_tokens": 5,
        "response_length": 29 / 8,
        "returns/mean": returns.sum() / mask.sum(),
        "returns/var": returns[mask].var(),
        "val/error": np.square(values - returns)[mask].mean(),
        "val/var_explained": 1 - (returns - values)[mask].var() / returns[mask].var(),
    }
    assert set(metrics) == set(expected)
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_answer_without_an_end_gets_the_penalty_for_its_score():
    """No KL, no values, no discount: every token's advantage is what its answer got."""
    config = PPOConfig(gamma=1.0, lam=1.0, whiten_advantages=False, missing_end_penalty=-1.0)
    rollout, mask, (logprobs, _, entropy, values, _) = tiny.synthetic()
    scores = np.linspace(0.1, 0.8, 8, dtype=np.float32)
    experience, metrics = tiny.experienced(config, rollout, logprobs, logprobs, entropy, 0 * values, scores)
    got = [-1.0, 0.2, 0.3, -1.0, 0.5, 0.6, -1.0, 0.8]
    np.testing.assert_allclose(experience.advantages, np.where(mask, np.array(got)[:, None], 0.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/scores"], np.mean(got), rtol=1e-6)
    np.testing.assert_array_equal(end_penalized(scores, rollout.ended, "set", -1.0), np.float32(got))


def test_whitening_is_over_the_whole_batch_however_it_is_split(full):
    rollout = tiny.roll(full)
    in_one, _ = tiny.experience_of(full, rollout)
    halves = PPOConfig(epochs=1, minibatches=2, accumulation=2)
    in_two, _ = tiny.experience_of(full, rollout, halves)
    np.testing.assert_allclose(in_two.advantages, in_one.advantages, rtol=1e-4, atol=1e-5)
    mask = np.arange(tiny.COUNT) < np.asarray(rollout.lengths)[:, None]
    inside = np.asarray(in_one.advantages, np.float64)[mask]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0.0, 1.0], atol=1e-5)
    # At ratio 1 a minibatch's policy loss is minus its mean advantage: not 0, as its own whitening would make it.
    key = jax.random.key(0)
    of_rows = [
        -np.asarray(in_one.advantages)[rows][mask[rows]].mean()
        for rows in np.asarray(minibatch_rows(key, tiny.ROWS, 1, 2))
    ]
    assert min(np.abs(of_rows)) > 1e-2
    _, metrics = tiny.run(full, in_two, halves, optimizer=optax.sgd(0.0))
    np.testing.assert_allclose(metrics["loss/policy"], np.mean(of_rows), rtol=1e-4, atol=1e-5)


# The update.


def naive_loss(params, batch, config, temperature):
    """The same loss from whole logits and written-out indices."""
    sequence, mask = batch["sequence"], batch["mask"]
    at = batch["prompt_lengths"][:, None] - 1 + jnp.arange(tiny.COUNT)
    row = jnp.arange(len(sequence))[:, None]
    logits = Transformer(tiny.CONFIG).apply({"params": params["policy"]["base"]}, sequence)
    logp = jax.nn.log_softmax(logits / temperature)[row, at, batch["tokens"]]
    hidden = Transformer(tiny.CONFIG).apply({"params": params["value"]["base"]}, sequence, return_hidden=True)
    head = params["value"]["head"]
    values = (hidden @ head["kernel"][:, 0] + head["bias"])[row, at]
    ratio = jnp.exp(jnp.where(mask, logp - batch["logprobs"], 0.0))
    clipped = jnp.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
    policy = -jnp.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    near = batch["values"] + jnp.clip(values - batch["values"], -config.value_clip, config.value_clip)
    value = 0.5 * jnp.maximum((values - batch["returns"]) ** 2, (near - batch["returns"]) ** 2)
    return jnp.sum(jnp.where(mask, policy + config.value_coef * value, 0.0)) / jnp.sum(mask)


def test_update_equals_a_loop_of_gradient_steps(full):
    config = PPOConfig(epochs=2, minibatches=2, value_coef=0.5, clip_ratio=0.1, value_clip=0.05)
    rollout = tiny.roll(full, temperature=0.7)
    experience, _ = tiny.experience_of(full, rollout)
    ours, metrics = tiny.run(full, experience, config, key=3)
    sequence = np.zeros((tiny.ROWS, tiny.WIDTH + tiny.COUNT), np.int32)
    for i, (n, m) in enumerate(zip(tiny.LENGTHS, rollout.lengths, strict=True)):
        sequence[i, : n + m] = np.concatenate([tiny.PROMPTS[i, :n], rollout.tokens[i, :m]])
    names = [f.name for f in dataclasses.fields(Experience) if f.name != "sampling"]
    fields = {name: np.asarray(getattr(experience, name)) for name in names if getattr(experience, name) is not None}
    batch = {**fields, "sequence": sequence, "mask": np.arange(tiny.COUNT) < fields["lengths"][:, None]}
    params, _ = tiny.trainable_and_frozen(full)
    start = params
    gradient = jax.jit(jax.grad(partial(naive_loss, config=config, temperature=0.7)))
    for rows in np.asarray(minibatch_rows(jax.random.key(3), tiny.ROWS, 2, 2)):
        grads = gradient(params, {name: field[rows] for name, field in batch.items()})
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert tiny.largest(ours, start) > 1e-2
    assert tiny.largest(ours, params) < 1e-5
    assert float(metrics["policy/clipfrac"]) > 0 and float(metrics["val/clipfrac"]) > 0
    assert float(metrics["val/first_ratio_error"]) < 1e-5 < float(metrics["val/ratio_error"])


def test_accumulation_changes_nothing(full):
    config = PPOConfig(epochs=2, minibatches=2)
    experience, _ = tiny.experience_of(full, tiny.roll(full))
    (whole, metrics), *others = (
        tiny.run(full, experience, dataclasses.replace(config, accumulation=n)) for n in (1, 2, 4)
    )
    assert tiny.largest(whole, tiny.trainable_and_frozen(full)[0]) > 1e-2
    for params, parts in others:
        assert tiny.largest(params, whole) < 1e-5
        for name in metrics:
            np.testing.assert_allclose(parts[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_prompt_padding_changes_nothing(full):
    rollout = tiny.roll(full)
    wide = rollout.replace(prompts=np.pad(tiny.PROMPTS, ((0, 0), (0, 4)), constant_values=9))
    (experience, metrics), (padded, padded_metrics) = (tiny.experience_of(full, r) for r in (rollout, wide))
    for field in ("logprobs", "values", "advantages", "returns"):
        np.testing.assert_allclose(getattr(padded, field), getattr(experience, field), rtol=1e-4, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(padded_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert tiny.largest(tiny.run(full, padded, tiny.ONCE)[0], tiny.run(full, experience, tiny.ONCE)[0]) < 1e-5


def test_garbage_beyond_a_length_changes_nothing(full):
    experience, _ = tiny.experience_of(full, tiny.roll(full))
    beyond = np.arange(tiny.COUNT) >= np.asarray(experience.lengths)[:, None]
    garbage = {
        name: np.where(beyond, fill, getattr(experience, name)).astype(getattr(experience, name).dtype)
        for name, fill in (("tokens", 11), ("logprobs", -7.0), ("values", 50.0), ("advantages", 3.0), ("returns", -9.0))
    }
    assert beyond.any()
    clean, dirty = tiny.run(full, experience, tiny.ONCE), tiny.run(full, experience.replace(**garbage), tiny.ONCE)
    assert tiny.largest(dirty[0], clean[0]) < 1e-6
    for name in clean[1]:
        np.testing.assert_allclose(dirty[1][name], clean[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_every_epoch_reads_every_row_once_in_its_own_order():
    rows = np.asarray(minibatch_rows(jax.random.key(0), 24, 4, 3))
    assert rows.shape == (12, 8)
    epochs = rows.reshape(4, 24)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(24), (4, 1)))
    other = np.asarray(minibatch_rows(jax.random.key(1), 24, 4, 3)).reshape(4, 24)
    orders = {tuple(order) for order in np.concatenate([epochs, other])}
    assert len(orders) == 8
    np.testing.assert_array_equal(minibatch_rows(jax.random.key(0), 24, 4, 3), rows)


def test_one_program_for_all_iterations_and_the_key_matters(full):
    config = PPOConfig(epochs=2, minibatches=2)
    update = tiny.shared_update(config, full.spec, tiny.OPTIMIZER)
    jax.block_until_ready(tiny.run(full, tiny.experience_of(full, tiny.roll(full))[0], config))
    assert update.programs() == 1
    experience, _ = tiny.experience_of(full, tiny.roll(full))
    params, frozen = tiny.trainable_and_frozen(full)
    after = []
    for key in (0, 1):
        copied = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), copied, tiny.OPTIMIZER.init(copied))
        state, _ = update(state, frozen, experience, config.kl_coef, jax.random.key(key))
        after.append(jax.tree.map(np.asarray, state.params))
        second, _ = tiny.experience_of(full, tiny.roll(full, key=key + 1))
        state, _ = update(state, frozen, second, config.kl_coef, jax.random.key(7))
        assert int(state.step) == 8
    assert update.programs() == 1
    assert tiny.largest(*after) > 1e-4  # other minibatches


def test_lora_trains_adapters_and_head_and_leaves_the_bases(adapted):
    params, frozen = tiny.trainable_and_frozen(adapted)
    assert {role: set(part) for role, part in params.items()} == {"policy": {"adapters"}, "value": {"adapters", "head"}}
    before = jax.tree.map(np.array, (params, frozen))
    experience, _ = tiny.experience_of(adapted, tiny.roll(adapted))
    after, metrics = tiny.run(adapted, experience, tiny.ONCE)
    jax.tree.map(np.testing.assert_array_equal, (params, frozen), before)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for target, leaf in after["policy"]["adapters"].items():
        assert np.abs(leaf["b"]).max() > 0, target
        assert np.abs(after["value"]["adapters"][target]["b"]).max() > 0, target
    for name, leaf in after["value"]["head"].items():
        assert np.abs(leaf - before[0]["value"]["head"][name]).max() > 0, name
    assert all(np.isfinite(x) for x in metrics.values())


def test_one_step_raises_the_probability_of_what_was_better_than_expected(full):
    rollout = tiny.roll(full)
    experience, _ = tiny.experience_of(full, rollout)
    params, _ = tiny.run(full, experience, tiny.ONCE)
    after, _ = score_logprobs(full.spec, params["policy"], rollout, 1)
    assert float(jnp.sum(experience.advantages * (after - experience.logprobs))) > 0
    values = score_values(full.spec, params["value"], rollout, 1)
    error = [float(jnp.sum(jnp.square(v - experience.returns))) for v in (values, experience.values)]
    assert error[0] < error[1]


@pytest.mark.parametrize("critic", ["policy", pytest.param("shared", marks=pytest.mark.slow), "none"])
def test_one_step_that_scores_itself_is_scoring_and_then_stepping(full, critic):
    """Where a rollout is trained on once, in one step, the single forward pass gives what two give."""
    config = dataclasses.replace(tiny.ONCE, value_coef=0.5, kl_coef=0.3, entropy_coef=0.1, kl_controller="adaptive")
    roles = full
    if critic == "shared":
        config = dataclasses.replace(config, critic="shared")
        head = full.weights["value"]["head"]
        roles = SimpleNamespace(**vars(full) | {"weights": {"policy": {**full.weights["policy"], "head": head}}})
    elif critic == "none":
        config = dataclasses.replace(config, estimator="rloo", samples=2)
        roles = SimpleNamespace(**vars(full) | {"weights": {"policy": full.weights["policy"]}})
    value = full.spec if critic == "policy" else None
    rollout, reference = tiny.roll(full), {"base": tiny.base(7)}
    scores = np.linspace(-1, 1, tiny.ROWS, dtype=np.float32)
    ref_logprobs, _ = score_logprobs(full.spec, reference, rollout, 1)
    params = {role: jax.tree.map(jnp.copy, weights) for role, weights in roles.weights.items() if role != "reward"}
    frozen = {role: {} for role in params}
    assert config.single

    read_once = jax.jit(partial(answer_outputs, config, full.spec, value))
    logprobs, entropy, values, _ = read_once(params, rollout)
    read = RoleScores(logprobs, ref_logprobs, entropy, values)
    experience, metrics, controllers = make_experience(config, rollout, read, scores, init_controllers(config))
    copied = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), copied, tiny.OPTIMIZER.init(copied), controllers)
    update = make_update(config, full.spec, value, tiny.OPTIMIZER)
    two, updates = update(state, frozen, experience, metrics["objective/kl_coef"], jax.random.key(0))

    state = TrainState(jnp.int32(0), params, tiny.OPTIMIZER.init(params), init_controllers(config))
    at_once = make_single_update(config, full.spec, value, tiny.OPTIMIZER)
    one, same, figures = at_once(state, frozen, rollout, ref_logprobs, scores, {})
    assert tiny.largest(one.params, two.params) < 1e-5 and int(one.step) == 1
    np.testing.assert_allclose(one.controllers.kl_coef, two.controllers.kl_coef, rtol=1e-6)
    np.testing.assert_allclose(same.advantages, experience.advantages, rtol=1e-4, atol=1e-5)
    assert set(figures) == set(metrics | updates)
    for name, number in (metrics | updates).items():
        np.testing.assert_allclose(figures[name], number, rtol=1e-4, atol=1e-5, err_msg=name)
