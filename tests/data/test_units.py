"""Which records are one privacy unit, and which units two data sets share."""

import random

import numpy as np
import pytest

from rlhf_jax.data.units import SHORTEST_BEGINNING, group_units, normalized_prompt, shared_units, unit_of
from rlhf_jax.errors import UserError


def test_rows_of_one_owner_are_one_unit():
    units = group_units(["a", "b", "a", "c", "a"], contribution=3)
    assert units.names == ["a", "b", "c"] and len(units) == 3
    np.testing.assert_array_equal(units.rows, [[0, 2, 4], [1, -1, -1], [3, -1, -1]])


def test_a_unit_s_kept_rows_hang_on_it_alone():
    alone = group_units(["x"] * 9, contribution=2).rows[0]
    with_others = group_units(["a", *["x"] * 9, "b"], contribution=2).rows[1]
    assert len(set(alone)) == 2
    np.testing.assert_array_equal(with_others, alone + 1)


def test_a_record_is_its_own_unit_without_a_field():
    assert unit_of({"text": "a"}, 7, "", "here") == "7"
    assert unit_of({"author": 12}, 7, "author", "here") == "12"


def test_a_missing_unit_field_is_refused_with_the_record_and_the_fields_there_are():
    with pytest.raises(UserError, match='a.jsonl: record 8 has no field "author".*name one of id, text'):
        unit_of({"text": "a", "id": 1}, 7, "author", "a.jsonl")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Say   it,\nplease!"},
        {"text": "say it please"},
        {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say it, please"}]},
        {"messages": [{"role": "user", "content": "Say it: please"}, {"role": "assistant", "content": "It."}]},
    ],
)
def test_one_prompt_however_a_record_holds_it(record):
    assert normalized_prompt(record) == "say it please"


def by_loop(ours, theirs):
    def same(a, b):
        begins = a.startswith(b) or b.startswith(a)
        return a == b or (begins and min(len(a), len(b)) >= SHORTEST_BEGINNING)

    return {name for name, text in ours if any(same(text, other) for _, other in theirs)}


@pytest.mark.parametrize("seed", range(20))
def test_shared_units_are_those_of_a_loop_over_all_pairs(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choice("ab") for _ in range(60)) for _ in range(3)]

    def records(count):
        return [(str(rng.randrange(7)), rng.choice(texts)[: rng.randrange(61)]) for _ in range(count)]

    for _ in range(50):
        ours, theirs = records(12), records(9)
        assert shared_units(ours, theirs, by_name=False) == by_loop(ours, theirs)


def test_names_count_where_both_have_them():
    ours, theirs = [("ann", "x"), ("bob", "y"), ("ann", "z")], [("bob", "x"), ("eve", "y")]
    assert shared_units(ours, theirs, by_name=True) == {"bob"}
    assert shared_units(ours, theirs, by_name=False) == {"ann", "bob"}
