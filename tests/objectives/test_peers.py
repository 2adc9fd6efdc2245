"""Ours beside what other libraries' own functions return (fixtures/peers.json, written by fixtures/make.py).

Where a convention differs the test states the difference: what turns our number into theirs.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import (
    adaptive_kl_step,
    dpo_loss,
    gae,
    grpo_advantages,
    hinge_loss,
    ipo_loss,
    kl_estimate,
    kl_penalized_rewards,
    kto_loss,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_returns,
    rloo_advantages,
    sequence_logprobs,
    simpo_loss,
    whiten,
)

FIXTURE = json.loads(Path(__file__).with_name("fixtures").joinpath("peers.json").read_text())
X = {name: np.asarray(x, np.float32) for name, x in FIXTURE["inputs"].items()}
MASK = X["mask"].astype(bool)
ENTRIES = MASK.sum()
UNBIASED = np.sqrt((ENTRIES - 1) / ENTRIES)  # TRL, verl and Tunix whiten by the variance with n - 1


def vectors(*names):
    """One test case for each stored vector of these names."""
    found = [v for v in FIXTURE["vectors"] if v["name"] in names]
    assert found, names
    return pytest.mark.parametrize(
        "vector", found, ids=[f"{v['name']}-{v['peer']}-{v['version']}-{i}" for i, v in enumerate(found)]
    )


def equal(ours, vector, inside=None):
    ours, theirs = np.asarray(ours), np.asarray(vector["output"])
    assert ours.shape == theirs.shape
    keep = np.ones(theirs.shape, bool) if inside is None else inside
    np.testing.assert_allclose(ours[keep], theirs[keep], rtol=1e-5, atol=2e-6, err_msg=vector["function"])


def slopes(function, x):
    """The gradient of the sum, where each entry has a loss of its own."""
    return jax.jit(jax.grad(lambda x: jnp.sum(function(x))))(x)


def test_every_vector_names_its_source():
    for vector in FIXTURE["vectors"]:
        assert vector["peer"] and vector["version"] and "." in vector["function"]
    assert {v["peer"] for v in FIXTURE["vectors"]} == {"trl", "verl", "openrlhf", "google-tunix"}


@vectors("whiten")
def test_whiten_is_theirs_but_for_the_biased_variance(vector):
    """Ours is the 2019 code's n; theirs n - 1. Ours is 0 where masked; theirs keeps shifted leftovers there."""
    shift_mean = vector["settings"]["shift_mean"]
    ours = UNBIASED * whiten(X["rewards"], MASK)
    equal(ours if shift_mean else ours + X["rewards"][MASK].mean(), vector, MASK)
    with pytest.raises(AssertionError):
        equal(whiten(X["rewards"], MASK, shift_mean), vector, MASK)


@vectors("gae_whitened", "gae_returns")
def test_gae_skips_holes_as_verl_and_tunix_do(vector):
    settings = vector["settings"]
    advantages, returns = gae(X["rewards"], X["values"], MASK, settings["gamma"], settings["lam"])
    if vector["name"] == "gae_returns":
        equal(returns, vector, MASK)
    else:
        equal(UNBIASED * whiten(advantages, MASK), vector, MASK)


@vectors("gae_zeroed", "reinforce_zeroed")
def test_openrlhf_zeroes_holes_where_ours_skips_them(vector):
    """Theirs is ours on rows whose masked steps are real steps of reward and value 0; row 1 alone has a hole."""
    rewards, values, everywhere = X["rewards"] * MASK, X["values"] * MASK, np.ones_like(MASK)

    def ours(rewards, values, mask):
        if vector["name"] == "gae_zeroed":
            return gae(rewards, values, mask, vector["settings"]["gamma"], vector["settings"]["lam"])[0]
        return reinforce_returns(rewards, mask, vector["settings"]["gamma"])

    equal(ours(rewards, values, everywhere), vector)
    skipped = np.asarray(ours(X["rewards"], X["values"], MASK))
    whole = MASK & (np.arange(4) != 1)[:, None]
    equal(skipped, vector, whole)
    assert abs(skipped[1, 0] - vector["output"][1][0]) > 1e-3


@vectors("kl")
def test_kl_estimates(vector):
    equal(kl_estimate(X["logprobs"], X["ref_logprobs"], vector["settings"]["estimator"]), vector)


@vectors("kl_penalized_rewards")
def test_the_score_lands_on_the_last_token(vector):
    lengths = X["lengths"].astype(np.int32)
    kl_coef = vector["settings"]["kl_coef"]
    equal(kl_penalized_rewards(X["scores"], X["logprobs"], X["ref_logprobs"], lengths, kl_coef), vector)


@vectors("kl_controller")
def test_kl_controller(vector):
    s = vector["settings"]
    ours = [adaptive_kl_step(s["kl_coef"], kl, s["target"], s["horizon"], s["samples"]) for kl in s["kl"]]
    equal(ours, vector)


@vectors("policy_loss", "policy_loss_gradient")
def test_policy_loss(vector):
    def ours(logprobs):
        return ppo_policy_loss(logprobs, X["old_logprobs"], X["advantages"], **vector["settings"])

    here = ours(X["logprobs"]) if vector["name"] == "policy_loss" else slopes(ours, X["logprobs"])
    equal(here, vector, MASK)


@vectors("value_loss", "value_loss_gradient")
def test_value_loss(vector):
    def ours(values):
        return ppo_value_loss(values, X["old_values"], X["returns"], **vector["settings"])

    here = ours(X["values"]) if vector["name"] == "value_loss" else slopes(ours, X["values"])
    equal(here, vector, MASK)


@vectors("gspo", "gspo_gradient")
def test_gspo(vector):
    """The mean over answers of each answer's mean."""

    def ours(logprobs):
        new, old = sequence_logprobs(logprobs, MASK), sequence_logprobs(X["old_logprobs"], MASK)
        losses = ppo_policy_loss(new, old, X["scores"][:, None], **vector["settings"])
        return jnp.mean(jnp.sum(losses * MASK, axis=1) / MASK.sum(1))

    equal(ours(X["logprobs"]) if vector["name"] == "gspo" else slopes(ours, X["logprobs"]), vector)


@vectors("grpo")
def test_grpo_is_theirs_but_for_what_is_added_to_the_deviation(vector):
    """All divide by the deviation with n - 1; ours adds 1e-4 to it, theirs 1e-6."""
    scale, epsilon = vector["settings"]["scale"], vector["settings"]["epsilon"]
    deviation = X["group_rewards"].std(axis=1, ddof=1, keepdims=True)
    factor = (deviation + 1e-4) / (deviation + epsilon) if scale else 1.0
    equal(grpo_advantages(X["group_rewards"], scale) * factor, vector)


@vectors("rloo")
def test_rloo(vector):
    equal(rloo_advantages(X["group_rewards"]), vector)


@vectors("reinforce_returns", "reinforce_whitened")
def test_reinforce_plus_plus(vector):
    returns = reinforce_returns(X["rewards"], MASK, vector["settings"]["gamma"])
    equal(returns if vector["name"] == "reinforce_returns" else UNBIASED * whiten(returns, MASK), vector)


PAIR_LOSSES = {"dpo": dpo_loss, "hinge": hinge_loss, "ipo": ipo_loss}


@vectors("dpo", "hinge", "ipo", "dpo_gradient", "hinge_gradient", "ipo_gradient")
def test_losses_of_log_ratios(vector):
    name = vector["name"].removesuffix("_gradient")

    def ours(chosen):
        return PAIR_LOSSES[name](chosen, X["rejected"], **vector["settings"])

    equal(ours(X["chosen"]) if name == vector["name"] else slopes(ours, X["chosen"]), vector)


@vectors("kto", "kto_gradient")
def test_kto(vector):
    def ours(logratio):
        return kto_loss(logratio, X["desirable"], **vector["settings"])

    equal(ours(X["chosen"]) if vector["name"] == "kto" else slopes(ours, X["chosen"]), vector)


@vectors("orpo_odds")
def test_orpo_s_odds_ratio(vector):
    equal(orpo_loss(X["chosen_mean"], X["rejected_mean"], jnp.zeros(6), **vector["settings"]), vector)


@vectors("simpo")
def test_simpo_s_margin_is_theirs_over_beta(vector):
    beta, gamma = vector["settings"]["beta"], vector["settings"]["gamma"]
    equal(simpo_loss(X["chosen_mean"], X["rejected_mean"], beta, gamma / beta), vector)
