"""What a stage will spend: calibrated, affordable, and never told lower than it is."""

import json
import math
from functools import cache

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.privacy.accounting import epsilon
from rlhf_jax.privacy.plan import make_plan, plan_of

SIZE = dict(units=1000, expected_batch=50, minibatches=30, uses=1, physical_batch=1000, delta=1e-4)


@cache
def plan(target=4.0, **changes):
    return make_plan("stages.sft.privacy", target=target, **{**SIZE, **changes})


def truth(made, steps):
    return epsilon(
        sampling_rate=0.05,
        noise_multiplier=made.mechanism.noise_multiplier,
        steps=steps,
        delta=1e-4,
        uses=made.mechanism.uses,
    )


def test_calibrated_noise_spends_the_target_and_never_more():
    made = plan()
    assert 4.0 - 1e-3 <= truth(made, 30) <= 4.0
    assert made.figures()["epsilon"] == truth(made, 30)


def test_what_is_told_on_the_way_is_never_below_the_truth_and_never_falls():
    made = plan()
    told = [made.spent(steps) for steps in range(0, 31, 6)]
    assert told == sorted(told) and told[0] == 0.0
    assert all(told[i] >= truth(made, 6 * i) for i in range(6))
    assert told[-1] == truth(made, 30)


def test_with_given_noise_a_stage_takes_the_steps_its_budget_allows():
    made = plan(noise=1.0, minibatches=1000, together=4)
    steps = made.mechanism.steps
    assert steps % 4 == 0 and 0 < steps < 1000
    assert truth(made, steps) <= 4.0 < truth(made, steps + 4)
    assert plan(noise=1.0, minibatches=12).mechanism.steps == 12


def test_uses_of_a_minibatch_count():
    once, twice = plan(noise=2.0), plan(noise=2.0, uses=2)
    assert once.spent(30) < twice.spent(30) == pytest.approx(plan(noise=math.sqrt(2.0)).spent(30), rel=1e-3)


def test_a_written_plan_is_read_back_whole():
    for made in (plan(uses=2), plan(target=math.inf, delta=0.0)):
        assert plan_of(json.loads(json.dumps(made.figures()))) == made


def test_both_adjacencies_and_the_looser_bound_are_told():
    figures = plan().figures()
    assert figures["epsilon"] < figures["epsilon_replace_one"] and figures["epsilon"] < figures["epsilon_renyi"]
    other = plan(adjacency="replace_one").figures()
    assert other["epsilon_add_or_remove"] < other["epsilon"] <= 4.0


def test_an_infinite_budget_takes_no_noise():
    made = plan(target=math.inf, delta=0.0)
    assert made.mechanism.noise_multiplier == 0.0 and made.figures()["epsilon"] == math.inf


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"delta": 1e-3}, r"stages.sft.privacy.delta 0.001 is not below 1/1000 = 0.001.*give a smaller one, 0.0001"),
        ({"expected_batch": 2000}, r"a minibatch of 2000 is asked of 1000 units: lower batch_size"),
        ({"target": 1e6}, r"stages.sft.privacy.epsilon 1e\+06 over 30 minibatches: .*take more steps"),
        (
            {"noise": 0.3, "target": 0.5, "together": 2},
            r"noise_multiplier 0.3 spends more than epsilon 0.5 in the first 2",
        ),
    ],
)
def test_a_claim_that_cannot_be_made_is_refused_with_its_mend(changes, said):
    with pytest.raises(UserError, match=said):
        plan(**changes)
