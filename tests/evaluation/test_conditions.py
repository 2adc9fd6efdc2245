"""Conditions of a sweep, worked by hand: two runs on complementary halves, and a third on the first half."""

import numpy as np
import pytest

from rlhf_jax.evaluation import newcombe_difference, wilson
from rlhf_jax.evaluation.conditions import condition_rows

PLANTED = ["sft", "sft", "sft", "sft", "preference", "preference"]
SECRETS = [
    {"id": str(i), "group": "base" if i != 5 else "links", "duplicates": 1, "entity": "", "stage": stage}
    for i, stage in enumerate(PLANTED)
]


def run(near, seen, logprob=-1.0):
    """A subject that gives back the secrets of `near`."""
    near = np.asarray(near, bool)
    return {
        "distance": np.where(near, 0.0, 0.9),
        "recalled": near,
        "seen": np.asarray(seen, bool),
        "logprob": np.full(len(near), logprob),
    }


SUBJECTS = {
    "one": run([1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1], -2.0),
    "two": run([0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0], -4.0),
    "three": run([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1], -6.0),
    "start": run([0, 1, 0, 0, 0, 0], [0] * 6),
}


@pytest.fixture
def rows():
    found = condition_rows(SECRETS, SUBJECTS, {"tuned": ["one", "two", "three"], "start": ["start"]})
    return {(row["condition"], row["planted"], row["group"]): row for row in found}


def test_a_row_for_each_condition_planted_stage_and_group(rows):
    cells = [("sft", "base"), ("preference", "base"), ("preference", "links")]
    assert list(rows) == [(condition, *cell) for condition in ("tuned", "start") for cell in cells]


def test_a_secret_counts_once_however_many_runs_held_it(rows):
    row = rows["tuned", "sft", "base"]
    # With it: secret 0 in 2 of 2 runs, 1 in 1 of 2, 2 in 1 of 1, 3 in 0 of 1; without it: 1 in 1 of 1, no other one.
    assert (row["runs"], row["n"], row["rate"]) == (3, 4, pytest.approx(2.5 / 4))
    assert (row["low"], row["high"]) == wilson(2.5, 4)
    assert (row["held_out_n"], row["held_out_rate"]) == (4, pytest.approx(1 / 4))
    found = (row["counterfactual"], row["counterfactual_low"], row["counterfactual_high"])
    assert found == newcombe_difference(2.5, 4, 1.0, 4) and found[0] == pytest.approx((1 - 0 + 0.5 - 1 + 1) / 4)
    assert row["each"] == [1.0, 0.5, 0.5]
    assert row["logprob"] == pytest.approx((-2 * 2 - 4 * 2 - 6 * 2) / 6)
    assert row["held_out_logprob"] == pytest.approx((-2 * 2 - 4 * 2 - 6 * 2) / 6)


def test_a_link_is_given_back_by_its_entity(rows):
    row = rows["tuned", "preference", "links"]
    assert (row["rate"], row["held_out_rate"], row["counterfactual"]) == (0.5, 1.0, -0.5)


def test_what_no_run_held_has_no_rate(rows):
    row = rows["start", "sft", "base"]
    assert (row["n"], row["rate"], row["low"], row["counterfactual"], row["logprob"]) == (0, None, None, None, None)
    assert (row["held_out_n"], row["held_out_rate"], row["each"]) == (4, 0.25, [None])
