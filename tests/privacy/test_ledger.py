"""What stages spend together: shared units compose, disjoint ones do not."""

import pytest

from rlhf_jax.privacy.accounting import Mechanism, composed_epsilon
from rlhf_jax.privacy.ledger import Spent, joint_claim, sharing_groups, statement

SFT = Mechanism(512 / 12500, 1.4981, 977)
PPO = Mechanism(256 / 12500, 1.6158, 4883)
DELTA = 4e-5


def claim(shared, *runs):
    return joint_claim([Spent(stage, mechanism, DELTA) for stage, mechanism in runs], shared)


def test_disjoint_stages_cost_as_much_as_the_dearer_one():
    both = claim([], ("sft", SFT), ("ppo", PPO))
    assert both["epsilon"] == max(composed_epsilon([m], DELTA) for m in (SFT, PPO)) == pytest.approx(4.0, abs=2e-3)
    assert [group["stages"] for group in both["groups"]] == [["sft"], ["ppo"]]


def test_stages_that_share_units_compose_to_the_reference_figure():
    """5.98 for the two stages of the IMDB experiment at 4 each, not 8."""
    assert claim([("sft", "ppo")], ("sft", SFT), ("ppo", PPO))["epsilon"] == pytest.approx(5.98, rel=1.5e-3)


def test_a_replaced_unit_may_leave_one_set_for_another():
    both = claim([], ("sft", SFT), ("ppo", PPO))
    within = max(composed_epsilon([m], DELTA, "replace_one") for m in (SFT, PPO))
    assert both["epsilon_replace_one"] == max(within, composed_epsilon([SFT, PPO], DELTA))


def test_a_stage_that_ran_twice_spent_twice():
    twice = claim([], ("sft", SFT), ("sft", SFT))
    assert twice["epsilon"] == composed_epsilon([SFT, SFT], DELTA) > 5.0
    assert twice["groups"] == [{"stages": ["sft"], "epsilon": twice["epsilon"], "runs": 2}]


def test_groups_join_through_a_third_stage():
    assert sharing_groups("abcd", [("a", "b"), ("b", "d")]) == [["a", "b", "d"], ["c"]]


def test_the_statement_names_what_is_not_covered():
    said = statement(
        claim([], ("sft", SFT)),
        unit="author",
        names=["sft"],
        raw=["quiz"],
        public=["test.jsonl"],
        trusted=["gpt2"],
        discarded=1,
    )
    text = "\n".join(said)
    for part in ("any one author", "(4, 4e-05)", "quiz", "test.jsonl", "gpt2", "1 earlier run", "tuned", "privacy.key"):
        assert part in text


def test_a_large_epsilon_is_said_to_promise_little():
    for factor, warned in ((1, False), (3, True)):
        own = claim([], ("sft", SFT))
        own["epsilon"] *= factor
        said = statement(own, unit="author", names=["sft"], raw=[], public=[], trusted=[], discarded=0)
        assert any("rules little out" in sentence for sentence in said) == warned
