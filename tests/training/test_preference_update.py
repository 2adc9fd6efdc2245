"""The preference objective: what is scored, what is counted, and what neither padding nor microbatches may change."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.sharding import batch_sharding, replicated
from rlhf_jax.models import LoraConfig, Transformer, TransformerConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base, split
from rlhf_jax.rollout.scoring import answer_logprobs, row_logprobs
from rlhf_jax.training.preference import (
    PreferenceConfig,
    preference_gradient,
    preference_objective,
    summed_logprobs,
    with_kl,
)

SHAPE = TransformerConfig(
    vocab_size=13, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32, tie_embeddings=False
)
LORA = LoraConfig(rank=2, alpha=4.0)
FULL, ADAPTED = RoleSpec(SHAPE), RoleSpec(SHAPE, LORA)
RECORDS, WIDTH = 8, 12
PROMPTS = np.resize([3, 5, 1, 4], RECORDS).astype(np.int32)
LENGTHS = np.stack([np.resize([4, 2, 6, 1], RECORDS), np.resize([1, 7, 3, 5], RECORDS)], 1).astype(np.int32)
LOSSES = ("dpo", "hinge", "ipo", "kto", "orpo", "simpo")
SETTINGS = {loss: PreferenceConfig(loss, beta=2.0 if loss == "simpo" else 0.5) for loss in LOSSES}
SETTINGS["cdpo"] = PreferenceConfig("dpo", beta=0.5, label_smoothing=0.2)
SETTINGS["ipo_mean"] = PreferenceConfig("ipo", beta=0.5, length_normalized=True)
every_loss = pytest.mark.parametrize("name", SETTINGS)


def base(seed):
    """A decoder whose predictions are far from uniform."""
    params = jax.jit(partial(init_base, SHAPE))(key=jax.random.key(seed))
    return {**params, "embedding": 30 * params["embedding"]}


@cache
def weights(role, lora=False):
    """{"policy", "reference"}: other bases, or with adapters one base and other adapters."""
    seed = ("reference", "policy").index(role)
    if not lora:
        return {"base": base(seed)}
    adapters = init_adapters(SHAPE, LORA, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for leaf in adapters.values():
        leaf["b"] = jnp.asarray(0.3 * rng.normal(size=leaf["b"].shape), jnp.float32)
    return {"base": base(0), "adapters": adapters}


def rows(filler=0, width=WIDTH):
    """A batch of all records as training gets it; what lies beyond a length is `filler`."""
    rng = np.random.default_rng(7)
    tokens = np.full((RECORDS, 2, width), filler, np.int32)
    count = LENGTHS.max()
    answers = np.full((RECORDS, 2, count), filler, np.int32)
    for i in range(RECORDS):
        prompt = rng.integers(1, 13, PROMPTS[i])
        for j in range(2):
            answer = rng.integers(1, 13, LENGTHS[i, j])
            tokens[i, j, : PROMPTS[i]] = prompt
            tokens[i, j, PROMPTS[i] : PROMPTS[i] + LENGTHS[i, j]] = answer
            answers[i, j, : LENGTHS[i, j]] = answer
    return {
        "tokens": tokens,
        "answers": answers,
        "lengths": LENGTHS,
        "prompt_lengths": PROMPTS,
        "weight": np.ones(RECORDS, np.float32),
        "desirable": np.arange(RECORDS) % 3 == 0,
    }


def frozen_of(config, spec, precomputed=False):
    lora = spec.lora is not None
    parts = {"policy": split(spec, weights("policy", lora))[1], "coefficients": config.coefficients}
    return parts | {"reference": {} if precomputed else weights("reference", lora)}


def trainable_of(spec):
    return split(spec, weights("policy", spec.lora is not None))[0]


def spec_of(name):
    """With adapters for some losses."""
    return ADAPTED if name in ("dpo", "kto") else FULL


@cache
def compiled(config, spec, accumulation=1, precomputed=False):
    """One program for all tests that run it."""
    return jax.jit(preference_gradient(config, spec, None if precomputed else spec, accumulation))


def gradient_of(name, batch, spec=FULL, accumulation=1, precomputed=False):
    gradient = compiled(SETTINGS[name], spec, accumulation, precomputed)
    return gradient(trainable_of(spec), frozen_of(SETTINGS[name], spec, precomputed), batch)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@cache
def oracle_logprobs(role):
    """Summed log-probability of every answer, from whole logits, in float64: (RECORDS, 2)."""
    tokens, out = rows()["tokens"], np.zeros((RECORDS, 2))
    apply = jax.jit(partial(Transformer(SHAPE).apply, {"params": weights(role)["base"]}))
    for j in range(2):
        logits = np.asarray(apply(tokens[:, j]), np.float64)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in range(RECORDS):
            answer = range(PROMPTS[i], PROMPTS[i] + LENGTHS[i, j])
            out[i, j] = sum(table[i, t - 1, tokens[i, j, t]] for t in answer)
    return out


@cache
def oracle(name):
    """(mean loss, metrics) by a loop over the records in float64."""
    config, labels = SETTINGS[name], rows()["desirable"]
    policy, reference = oracle_logprobs("policy"), oracle_logprobs("reference")
    losses, rewards, right = [], [], []

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    kl = max(0.0, float(np.mean(policy[:, 1] - reference[:, 1])))
    for i in range(RECORDS):
        c, r = policy[i] - reference[i]
        mean_c, mean_r = policy[i] / LENGTHS[i]
        x = config.beta * (c - r)
        good = labels[i]
        odds = [np.exp(m) / (1 - np.exp(m)) for m in (mean_c, mean_r)]
        h = (c / LENGTHS[i, 0] - r / LENGTHS[i, 1]) if config.length_normalized else c - r
        losses.append(
            {
                "dpo": -(1 - config.label_smoothing) * np.log(sigmoid(x))
                - config.label_smoothing * np.log(sigmoid(-x)),
                "hinge": max(0.0, 1 - x),
                "ipo": (h - 1 / (2 * config.beta)) ** 2,
                "kto": 1 - sigmoid(config.beta * (c - kl) * (1 if good else -1)),
                "orpo": -mean_c - config.beta * np.log(sigmoid(np.log(odds[0] / odds[1]))),
                "simpo": -np.log(sigmoid(config.beta * (mean_c - mean_r - config.margin))),
            }[config.loss]
        )
        pair = (mean_c, mean_r) if config.loss in ("orpo", "simpo") else (c, r)
        if config.length_normalized:
            pair = (c / LENGTHS[i, 0], r / LENGTHS[i, 1])
        rewards.append([config.beta * value for value in pair])
        right.append((c > kl) == good if config.loss == "kto" else pair[0] > pair[1])
    rewards = np.asarray(rewards)
    sides = {"chosen": rewards[:, 0], "rejected": rewards[:, 1]}
    logps = {"chosen": policy[:, 0], "rejected": policy[:, 1]}
    if config.loss == "kto":
        sides = {"chosen": rewards[labels, 0], "rejected": rewards[~labels, 0]}
        logps = {"chosen": policy[labels, 0], "rejected": policy[~labels, 0]}
    metrics = {f"rewards/{side}": values.mean() for side, values in sides.items()}
    metrics |= {f"logps/{side}": values.mean() for side, values in logps.items()}
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = np.mean(right)
    metrics["loss/train"] = np.mean(losses)
    if config.loss == "kto":
        metrics["objective/kl"] = kl
    return metrics


@every_loss
def test_loss_and_metrics_are_those_of_a_loop_over_records(name):
    _, metrics = gradient_of(name, rows())
    expected = oracle(name)
    assert metrics.keys() == expected.keys()
    for metric, value in expected.items():
        assert float(metrics[metric]) == pytest.approx(value, rel=1e-4, abs=1e-4), metric


def test_the_kl_of_kto_is_never_negative():
    assert oracle("kto")["objective/kl"] > 0.1  # what the loop above has seen
    turned = {"policy": {}, "reference": weights("policy")}
    batch = jax.jit(partial(with_kl, FULL, FULL))(weights("reference"), turned, rows())
    np.testing.assert_array_equal(batch["kl"], np.zeros(RECORDS))


def test_rows_and_joined_answers_score_alike():
    batch = rows()
    prompts = batch["tokens"][:, 0, : PROMPTS.max()]
    joined = jax.jit(partial(answer_logprobs, FULL, temperature=1.0))(
        weights("policy"), prompts, PROMPTS, batch["answers"][:, 0], LENGTHS[:, 0]
    )
    placed = jax.jit(partial(row_logprobs, FULL, temperature=1.0))(
        weights("policy"), batch["tokens"][:, 0], PROMPTS, batch["answers"][:, 0], LENGTHS[:, 0]
    )
    assert_close(joined, placed, 1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_padding_changes_nothing(name):
    """Neither what stands beyond a length (a pad id may be a real token), nor wider rows, nor padding records."""
    grads, metrics = gradient_of(name, rows())
    wide = rows(filler=5, width=WIDTH + 6)
    longer = {field: np.concatenate([x, x[: RECORDS // 2]]) for field, x in wide.items()}
    longer["weight"][RECORDS:] = 0.0
    assert_close(gradient_of(name, longer), (grads, metrics))
    assert optax.tree.norm(grads) > 1e-2


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_accumulation_changes_neither_gradient_nor_metrics(name):
    batch = rows()
    batch["weight"][3] = 0.0
    whole = gradient_of(name, batch)
    for parts in (2, 4):
        assert_close(gradient_of(name, batch, accumulation=parts), whole)


def test_a_mesh_changes_neither_gradient_nor_metrics():
    gradient, batch = compiled(SETTINGS["kto"], FULL, 2), rows()
    frozen = frozen_of(SETTINGS["kto"], FULL)
    whole = gradient(trainable_of(FULL), frozen, batch)
    mesh = make_mesh(4, 1, 1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        roles = jax.device_put((trainable_of(FULL), frozen), replicated(mesh))
        assert_close(gradient(*roles, jax.device_put(batch, batch_sharding(mesh))), whole)


@pytest.mark.parametrize("name, spec", [("dpo", FULL), ("kto", ADAPTED)], ids=["full", "lora"])
def test_a_reference_scored_before_equals_one_scored_in_the_step(name, spec):
    batch = rows()
    known = jax.jit(partial(summed_logprobs, spec))(weights("reference", spec is ADAPTED), batch)
    before = gradient_of(name, {**batch, "reference": known}, spec, precomputed=True)
    assert_close(before, gradient_of(name, batch, spec))


@pytest.mark.parametrize("name", ["dpo", "hinge", "ipo", "kto"])
def test_at_its_reference_a_policy_has_no_rewards(name):
    spec = spec_of(name)
    config, start = SETTINGS[name], weights("policy", spec is ADAPTED)
    trainable, fixed = split(spec, start)
    frozen = {"policy": fixed, "reference": start, "coefficients": config.coefficients}
    _, metrics = compiled(config, spec)(trainable, frozen, rows())
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert float(metrics[metric]) == pytest.approx(0.0, abs=1e-6), metric
    at_start = {"dpo": np.log(2), "hinge": 1.0, "ipo": 1 / (4 * config.beta**2), "kto": 0.5}[name]
    assert float(metrics["loss/train"]) == pytest.approx(at_start, abs=1e-6)


def test_no_gradient_passes_through_the_kl():
    """The gradient is that of the same loss with the KL written down as a number."""
    batch = rows()
    grads, metrics = gradient_of("kto", batch)
    kl = np.full(RECORDS, metrics["objective/kl"], np.float32)
    objective = preference_objective(SETTINGS["kto"], FULL, FULL)

    def mean_loss(trainable):
        return objective(trainable, frozen_of(SETTINGS["kto"], FULL), {**batch, "kl": kl}).losses.mean()

    assert_close(jax.jit(jax.grad(mean_loss))(trainable_of(FULL)), grads)


@every_loss
def test_a_few_steps_prefer_the_chosen_answers(name):
    spec = spec_of(name)
    start = weights("policy", spec is ADAPTED)
    params, fixed = split(spec, start)
    gradient, optimizer = compiled(SETTINGS[name], spec), optax.adam(1e-2)
    state, seen = optimizer.init(params), []
    frozen = {"policy": fixed, "reference": start, "coefficients": SETTINGS[name].coefficients}
    for _ in range(17):
        grads, metrics = gradient(params, frozen, rows())
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        seen.append({metric: float(value) for metric, value in metrics.items()})
    assert seen[-1]["rewards/margins"] - seen[0]["rewards/margins"] > 0.3
    assert seen[-1]["loss/train"] < 0.8 * seen[0]["loss/train"]
    assert seen[-1]["rewards/accuracies"] >= 0.75


def test_undesirable_answers_weigh_what_the_config_says():
    batch = rows()
    batch["desirable"][:] = False
    doubled = dataclasses.replace(SETTINGS["kto"], desirable_weight=5.0, undesirable_weight=2.0)
    once, _ = gradient_of("kto", batch)
    twice, _ = compiled(SETTINGS["kto"], FULL)(trainable_of(FULL), frozen_of(doubled, FULL), batch)
    assert_close(jax.tree.map(lambda g: 2 * g, once), twice)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match='unknown preference loss "sppo"'):
        config = PreferenceConfig("sppo")
        jax.eval_shape(preference_objective(config, FULL, FULL), trainable_of(FULL), frozen_of(config, FULL), rows())
