"""What a report shows of a memorization sweep: which figures, of which conditions, in which order."""

import xml.etree.ElementTree as ElementTree

import pytest

from rlhf_jax.reporting.memorization_card import memorization_headlines, memorization_plots, memorization_tables

SVG = "{http://www.w3.org/2000/svg}"


def row(condition, planted, group, rate, **fields):
    found = {"condition": condition, "planted": planted, "group": group, "runs": 3, "n": 150, "rate": rate}
    found |= dict.fromkeys(("kl_coef", "beta", "learning_rate", "epsilon"))
    found |= {"low": rate - 0.01, "high": rate + 0.01, "held_out_rate": 0.02, "held_out_low": 0.0}
    found |= {"held_out_high": 0.03, "counterfactual": rate - 0.02, "counterfactual_low": 0.0}
    found |= {"counterfactual_high": 1.0, "each": [rate] * 3, "logprob": -20.0, "held_out_logprob": -50.0}
    return found | fields


def sweep():
    rows = []
    for group in ("base", "links"):
        rows.append(row("tuned", "sft", group, 0.9, method="sft"))
        rows.append(row("private", "sft", group, 0.1, method="sft", epsilon=8.0))
        for kl_coef in (0.01, 1.0, 0.0):
            fields = dict(method="ppo", kl_coef=kl_coef, learning_rate=1e-4)
            rows.append(row(f"ppo {kl_coef}", "sft", group, 0.5 + 0.1 * kl_coef, **fields))
            rows.append(row(f"ppo {kl_coef}", "preference", group, 0.03, **fields))
        for loss in ("ipo", "dpo"):
            rows.append(row(loss, "preference", group, 0.2, method=loss, beta=0.1))
        rows.append(row("direct", "preference", group, 0.8, method="sft"))
        nothing = dict.fromkeys(("rate", "low", "high", "counterfactual", "logprob"))
        rows.append(row("start", "sft", group, 0.0, method="sft") | nothing | {"n": 0, "each": [None]})
    return rows


def shown(plot):
    return [element.text for element in ElementTree.fromstring(str(plot.svg)).iter(f"{SVG}text")]


@pytest.fixture
def plots():
    return memorization_plots({"conditions": sweep()})


def test_each_question_has_a_figure_and_one_without_rows_is_left_out(plots):
    titles = ["Fine-tuning secrets, after fine-tuning and after RL", "Fine-tuning secrets, with privacy and without"]
    titles += ["Reward-model secrets: what gives them back", "How likely they became"]
    assert [title for plot in plots for title in shown(plot) if title in [*titles, "RL prompts"]] == titles


def test_coefficients_run_from_the_tightest_to_none(plots):
    labels = shown(plots[0])
    places = [labels.index(label) for label in ("1", "0.01", "0")]
    assert places == sorted(places) and {"base, after tuned", "links, after tuned"} <= set(labels)


def test_conditions_stand_in_the_paper_s_order(plots):
    order = ["ppo 1.0", "ppo 0.01", "ppo 0.0", "dpo", "ipo", "direct"]
    assert [label for label in shown(plots[2]) if label in order] == order


def test_a_condition_that_held_nothing_is_in_the_table_alone(plots):
    assert all("start" not in shown(plot) for plot in plots)
    (table,) = memorization_tables({"conditions": sweep()})
    (start, _) = [cells for cells in table.rows if cells[0] == "start"]
    assert start[1:6] == ["sft", "base", "0", "3", "–"] and start[6] == "2.0 [0.0, 3.0]"


def test_headlines_are_of_the_four_that_the_paper_compares():
    found = memorization_headlines({"conditions": sweep()})
    assert [value for _, value in found] == ["88.0 %", "48.1 %", "1.0 %", "78.0 %"]
    assert "(ppo 0.01, base)" in found[1][0]  # the smallest positive coefficient


def test_many_subjects_have_no_plots_of_their_own_beside_conditions():
    def table(count):
        cells = {"included": 1, "held_out": 1, "group": "base", "duplicates": 1, "control": None}
        for key in ("included", "held_out"):
            cells |= {f"{key}_rate": 0.5, f"{key}_low": 0.1, f"{key}_high": 0.9}
        return [{"subject": f"s{i}", **cells} for i in range(count)]

    with_few, with_many = (memorization_plots({"conditions": sweep(), "table": table(n)}) for n in (8, 9))
    assert (len(with_few), len(with_many)) == (4 + 8, 4)
    assert len(memorization_plots({"table": table(9)})) == 9


def test_each_group_and_learning_rate_has_a_line_and_repeated_runs_have_dots():
    rows = [
        row(f"{rate:g}, {kl_coef:g}", "prompts", group, 0.2, method="ppo", kl_coef=kl_coef, learning_rate=rate, **each)
        for rate, each in ((1e-4, {"each": [0.1, None, 0.3]}), (1e-5, {"each": [0.2]}))
        for kl_coef in (0.1, 0.0)
        for group in ("links", "base")
    ]
    (both,), (single,) = (memorization_plots({"conditions": chosen}) for chosen in (rows, rows[4:]))
    expected = [f"{group}, learning rate {rate}" for group in ("base", "links") for rate in ("0.0001", "1e-05")]
    assert [label for label in shown(both) if "learning rate" in label] == expected
    assert [label for label in shown(single) if label in ("base", "links")] == ["base", "links"]  # one rate: unsaid
    assert "Small dots" in both.caption and "Small dots" not in single.caption  # a single run is its own mean
    assert "Diamonds" in both.caption and "150 secrets, 3 runs." in both.caption


def test_what_was_not_measured_leaves_a_gap():
    unknown = dict.fromkeys(("low", "high", "held_out_rate", "held_out_low", "held_out_high", "held_out_logprob"))
    rows = [row("dpo", "preference", "base", 0.2, method="dpo", beta=0.1) | unknown]
    rows.append(row("ipo", "preference", "links", 0.3, method="ipo", beta=0.1) | unknown | {"logprob": None})
    share, likelihood = memorization_plots({"conditions": rows})
    assert {"dpo", "ipo", "base", "links"} <= set(shown(share)) and "held-out" not in shown(share)
    assert {"dpo", "base"} <= set(shown(likelihood)) and {"ipo", "links"}.isdisjoint(shown(likelihood))
    assert [cells[5:7] for cells in memorization_tables({"conditions": rows})[0].rows] == [["20.0", "–"], ["30.0", "–"]]
    assert memorization_headlines({"conditions": rows}) == []  # neither is ppo or sft
