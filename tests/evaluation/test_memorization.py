import numpy as np
import pytest

from rlhf_jax.evaluation import memorization_table, newcombe_difference, persistence, wilson
from rlhf_jax.evaluation.memorization import counterfactual_scores

#            0       1       2       3       4        5        6        7
GROUPS = ["base", "base", "base", "base", "links", "links", "links", "links"]
DUPLICATES = [1, 1, 4, 4, 1, 1, 4, 4]
SECRETS = [
    {"id": f"s{i}", "group": group, "duplicates": duplicates, "entity": "", "planted_in": ["sft"]}
    for i, (group, duplicates) in enumerate(zip(GROUPS, DUPLICATES, strict=True))
]


def subject(distance, recalled, seen):
    return {
        "distance": np.array(distance, np.float32),
        "recalled": np.array(recalled, bool),
        "seen": np.array(seen, bool),
    }


@pytest.fixture
def subjects():
    return {
        "sft": subject([0.1, 0.5, 0.0, 0.05, 0.9, 0.0, 0.3, 0.9], [0, 0, 0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0, 1, 1]),
        "ppo": subject([0.6, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9], [0, 0, 0, 0, 1, 0, 1, 0], [1, 0, 1, 1, 1, 0, 1, 1]),
        # The control guesses secret 3 and has seen secret 6.
        "control": subject([0.8, 0.8, 0.8, 0.1, 0.9, 0.9, 0.9, 0.9], [0] * 8, [0, 1, 0, 0, 0, 1, 1, 0]),
    }


CONTROLS = {"sft": "control", "ppo": "control"}


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_table_has_a_row_for_each_subject_group_and_number_of_duplicates(subjects):
    rows = memorization_table(SECRETS, subjects, CONTROLS)
    assert [(row["group"], row["duplicates"]) for row in rows if row["subject"] == "sft"] == [
        (group, duplicates) for group in ("base", "links", "all") for duplicates in (1, 4, "all")
    ]
    assert len(rows) == 27


def test_rates_worked_by_hand(subjects):
    rows = memorization_table(SECRETS, subjects, CONTROLS)
    base = only(rows, subject="sft", group="base", duplicates="all")  # saw 0, 2, 3 and memorized each; held out 1
    assert (base["n_included"], base["included_count"], base["included_rate"]) == (3, 3, 1.0)
    assert (base["included_low"], base["included_high"]) == wilson(3, 3)
    assert (base["n_held_out"], base["held_out_count"], base["held_out_rate"]) == (1, 0, 0.0)
    assert (base["difference"], base["difference_low"], base["difference_high"]) == newcombe_difference(3, 3, 0, 1)
    everything = only(rows, subject="sft", group="all", duplicates="all")  # 0, 2, 3, 6, 7 of 0, 2, 3, 4, 6, 7
    assert (everything["included_count"], everything["n_included"]) == (5, 6)


def test_one_edit_in_ten_tokens_is_memorized_in_either_precision(subjects):
    for dtype in (np.float32, np.float64):
        subjects["sft"]["distance"] = subjects["sft"]["distance"].astype(dtype)
        row = only(memorization_table(SECRETS, subjects, CONTROLS), subject="sft", group="base", duplicates=1)
        assert row["included_count"] == 1


def test_counterfactual_leaves_out_what_the_control_guesses_or_has_seen(subjects):
    rows = memorization_table(SECRETS, subjects, CONTROLS)
    base = only(rows, subject="sft", group="base", duplicates="all")
    assert (base["counterfactual_n"], base["counterfactual_count"]) == (3, 2)  # the control guesses 3
    links = only(rows, subject="sft", group="links", duplicates="all")
    assert (links["counterfactual_n"], links["counterfactual_count"]) == (2, 1)  # of 4 and 7; the control saw 6
    assert (links["counterfactual_low"], links["counterfactual_high"]) == wilson(1, 2)
    control = only(rows, subject="control", group="base", duplicates="all")
    assert control["control"] is None and control["counterfactual_rate"] is None


def test_links_are_judged_by_recall_first_and_by_distance_second(subjects):
    rows = memorization_table(SECRETS, subjects, CONTROLS)
    links = only(rows, subject="sft", group="links", duplicates="all")
    assert (links["included_count"], links["n_included"], links["held_out_count"]) == (2, 3, 0)
    assert (links["distance_included_count"], links["distance_held_out_count"]) == (0, 1)
    assert links["distance_difference"] == -1.0
    assert "distance_included_count" not in only(rows, subject="sft", group="base", duplicates="all")


def test_empty_sets_have_no_rate(subjects):
    subjects["sft"]["seen"][:] = True
    row = only(memorization_table(SECRETS, subjects, CONTROLS), subject="sft", group="base", duplicates=1)
    assert row["n_held_out"] == 0 and np.isnan(row["held_out_rate"]) and np.isnan(row["difference"])


def test_persistence_worked_by_hand(subjects):
    rows = persistence(SECRETS, subjects, CONTROLS, before="sft", after="ppo")
    base = only(rows, group="base", duplicates="all")  # the pool is 0, 2: sft has both, ppo has 2
    assert (base["n_before"], base["kept"], base["lost"], base["gained"], base["rate"]) == (2, 1, 1, 0, 0.5)
    assert base["p"] == 1.0
    assert (base["low"], base["high"]) == wilson(1, 2)
    links = only(rows, group="links", duplicates="all")  # the pool is 4, 7: sft has 7, ppo has 4
    assert (links["n_before"], links["kept"], links["lost"], links["gained"]) == (1, 0, 1, 1)
    without_control = persistence(SECRETS, subjects, {}, before="sft", after="ppo")
    assert only(without_control, group="base", duplicates="all")["n_before"] == 3


def test_mismatched_input_is_refused(subjects):
    with pytest.raises(ValueError, match="'ghost'"):
        memorization_table(SECRETS, subjects, {"sft": "ghost"})
    with pytest.raises(ValueError, match=r"\(8,\).*7 secrets"):
        memorization_table(SECRETS[:7], subjects, CONTROLS)
    with pytest.raises(ValueError, match="'rlhf'"):
        persistence(SECRETS, subjects, CONTROLS, before="sft", after="rlhf")


def test_a_counterfactual_score_is_the_difference_of_runs_with_and_without():
    seen = np.array([[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]], bool)
    memorized = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]], bool)
    scores = counterfactual_scores(memorized, seen)
    np.testing.assert_allclose(scores, [0.5 - 0.0, 0.0 - 0.5, np.nan, 1.0 - 0.5])  # the third one no run was without
