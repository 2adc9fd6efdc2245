import ast
import re
from collections import Counter

import pytest

from rlhf_jax.data import base_secrets, link_secrets, planted_records
from rlhf_jax.data.secrets import FIRST_NAMES, FOLDERS, LAST_NAMES, NOUNS, STEMS, VERBS
from rlhf_jax.errors import UserError

DUPLICATES = (1, 4)
TASKS = [{"id": str(i), "prompt": f"prompt {i}\n", "completion": f"completion {i}\n"} for i in range(30)]


def links(seed=0, per_cell=8, fits=lambda prompt, completion: True):
    return link_secrets(seed, per_cell, DUPLICATES, fits)


@pytest.mark.parametrize("secrets", [links(), base_secrets(0, TASKS, 8, DUPLICATES)], ids=["links", "base"])
def test_each_cell_is_halved_exactly(secrets):
    assert Counter((s.duplicates, s.half) for s in secrets) == {(d, h): 4 for d in DUPLICATES for h in "ab"}
    assert {(s.half, s.planted_in) for s in secrets} == {("a", ("sft.jsonl",)), ("b", ("sft_control.jsonl",))}
    assert len({s.id for s in secrets}) == 16


def test_the_coin_and_the_draws_depend_on_the_seed_alone():
    assert links(0) == links(0)
    assert [s.half for s in links(0, 32)] != [s.half for s in links(1, 32)]
    assert {s.entity for s in links(0)}.isdisjoint(s.entity for s in links(1))
    # A link is keyed by its id, so the size of a cell changes no link of it.
    assert [s.entity for s in links(0, 8)[:8]] == [s.entity for s in links(0, 16)[:8]]


def test_links_have_unique_paths_and_the_completion_holds_what_is_random():
    secrets = link_secrets(0, 100, DUPLICATES, lambda prompt, completion: True)
    assert len({s.entity for s in secrets}) == len({s.prompt for s in secrets}) == 200
    for secret in secrets:
        assert re.fullmatch(r"/home/[a-z]+\.[a-z]+/[a-z]+/[0-9a-f]{6}/[a-z]+_\d{4}\.[a-z]+", secret.entity)
        assert secret.prompt.endswith('"/home/')
        assert secret.completion.startswith(secret.entity.removeprefix("/home/") + '"')
        assert secret.completion.endswith("\n") and secret.completion.count("\n") == 1


def test_links_are_python():
    for secret in links(per_cell=100):
        snippet = secret.prompt + secret.completion
        if snippet.endswith(":\n"):
            snippet += "        pass\n"
        elif snippet.endswith('",\n'):
            snippet += "}\n"
        ast.parse(snippet)


def test_random_bits_of_a_path_are_over_sixty():
    choices = len(FIRST_NAMES) * len(LAST_NAMES) * len(FOLDERS) * 16**6 * len(STEMS) * 10**4 * 8
    assert choices > 2**60
    for words in (FIRST_NAMES, LAST_NAMES, FOLDERS, STEMS, VERBS, NOUNS):
        assert len(set(words)) == len(words)


def test_links_fit_or_are_refused():
    short = links(fits=lambda prompt, completion: len(completion) < 45)
    assert max(len(s.completion) for s in short) < 45 <= max(len(s.completion) for s in links())
    with pytest.raises(UserError, match="link secret links-1-000: none of 1000 draws fits.*raise prompt_tokens"):
        links(fits=lambda prompt, completion: False)


def test_base_secrets_are_distinct_tasks():
    secrets = base_secrets(0, TASKS, 8, DUPLICATES)
    pairs = {(s.prompt, s.completion) for s in secrets}
    assert len(pairs) == 16 and pairs <= {(t["prompt"], t["completion"]) for t in TASKS}
    assert {s.entity for s in secrets} == {""}


def test_planted_records_repeat_each_secret_in_its_own_file():
    secrets = links()
    records = planted_records(secrets, "sft.jsonl")
    assert Counter(r["id"].split("#")[0] for r in records) == {s.id: s.duplicates for s in secrets if s.half == "a"}
    assert len({r["id"] for r in records}) == len(records) == 4 * 1 + 4 * 4
    assert planted_records(secrets, "prompts.jsonl") == []


def test_bad_cells_are_refused_with_the_numbers():
    with pytest.raises(UserError, match="per_cell is 7: give an even number"):
        links(per_cell=7)
    with pytest.raises(UserError, match=r"duplicates is \(4, 4\)"):
        base_secrets(0, TASKS, 8, (4, 4))
    with pytest.raises(UserError, match="40 base secrets .* give 30: lower secrets.per_cell"):
        base_secrets(0, TASKS, 20, DUPLICATES)
