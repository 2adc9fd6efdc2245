import math

from rlhf_jax.evaluation import memorization_table
from rlhf_jax.reporting.tables import duration, figure_tables, memorization_rates, number


def test_numbers_as_a_reader_wants_them():
    values = [1234567, 0.123456, 123456.7, math.nan, None, True, ["a", 2], "text", 3e-7]
    assert [number(value) for value in values] == [
        "1,234,567", "0.1235", "123,457", "–", "–", "yes", "a, 2", "text", "3e-07",
    ]  # fmt: skip
    assert [duration(value) for value in (4.21, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 05 min"]


def test_intervals_join_the_cell_of_their_value():
    (table,) = figure_tables({"score": 1.5, "score_low": 1.0, "score_high": 2.0, "tokens_low": 3})
    assert table.rows == [["score", "1.5 [1, 2]"], ["tokens low", "3"]]
    (table,) = figure_tables({"persistence": [{"n": 4, "rate": 0.5, "low": 0.15, "high": 0.85}]})
    assert (table.columns, table.rows) == (["n", "rate"], [["4", "0.5 [0.15, 0.85]"]])


def test_nested_figures_become_tables():
    tables = figure_tables(
        {"secrets": {"base": {"1": 5}, "links": {"1": 6, "4": 7}}, "a": {"b": {"c": {"d": 1}}}, "e": {}}
    )
    assert [table.caption for table in tables] == ["secrets", "a"]
    assert tables[0].columns == ["", "1", "4"]
    assert tables[0].rows == [["base", "5", ""], ["links", "6", "7"]]
    assert tables[1].rows == [["b.c.d", "1"]]


def test_memorization_rates_hold_counts_and_percent():
    secrets = [{"id": str(i), "group": "links", "duplicates": 2} for i in range(4)]
    measured = {
        "distance": [0.0, 0.5, 0.5, 0.5],
        "recalled": [True, True, False, False],
        "seen": [True, True, False, False],
    }
    table = memorization_rates(memorization_table(secrets, {"sft": measured}, {}))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["included"] == "2 / 2\u2003100.0 [34.2, 100.0]"
    assert row["held-out"] == "0 / 2\u20030.0 [0.0, 65.8]"
    assert row["included, by distance"].startswith("1 / 2\u200350.0")
    assert row["counterfactual"] == row["control"] == "–"
