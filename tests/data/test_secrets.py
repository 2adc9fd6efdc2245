import ast
import re
from collections import Counter

import pytest

from rlhf_jax.data import base_secrets, link_secrets, planted_records
from rlhf_jax.data.entities import FIRST_NAMES, FOLDERS, KINDS, LAST_NAMES, NOUNS, STEMS, VERBS
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


def as_python(secret):
    """The syntax tree of a secret's text, with what it leaves open closed."""
    snippet = secret.prompt + secret.completion
    ends = {":\n": "        pass\n", '",\n': "}\n"}
    return ast.parse(snippet + next((end for mark, end in ends.items() if snippet.endswith(mark)), ""))


def test_links_are_python():
    for secret in links(per_cell=100):
        assert as_python(secret).body


ENTITIES = {
    "path": r"/home/[a-z]+\.[a-z]+/[a-z]+/[0-9a-f]{6}/[a-z]+_\d{4}\.[a-z]+",
    "email": r"[a-z]+\.[a-z]+\.\d{7}@[a-z]+-[a-z]+\.org",
    "phone": r"\+\d\d \d{3} \d{4} \d{4}",
    "key": r"sk-[0-9a-f]{20}",
}


def test_every_kind_of_entity_is_python_and_random_in_the_completion_alone():
    secrets = link_secrets(0, 100, (1,), lambda prompt, completion: True, kinds=tuple(KINDS))
    assert Counter(s.kind for s in secrets) == {kind: 25 for kind in KINDS}
    assert len({s.entity for s in secrets}) == 100
    for secret in secrets:
        assert re.fullmatch(ENTITIES[secret.kind], secret.entity)
        start = KINDS[secret.kind].start
        assert secret.prompt.endswith(f'"{start}')
        assert secret.completion.startswith(f'{secret.entity.removeprefix(start)}"')
        assert as_python(secret).body


def test_cells_are_shared_out_evenly_over_stages_and_halves():
    stages = ("sft", "preference", "prompts")
    for secrets in (
        link_secrets(0, 12, DUPLICATES, lambda prompt, completion: True, stages),
        base_secrets(0, TASKS, 12, DUPLICATES, stages),
    ):
        places = Counter((s.duplicates, s.stage, s.half) for s in secrets)
        assert places == {(d, stage, half): 2 for d in DUPLICATES for stage in stages for half in "ab"}
        for secret in secrets:
            assert secret.planted_in == (f"{secret.stage}{'' if secret.half == 'a' else '_control'}.jsonl",)


def test_a_secret_among_prompts_is_one_whole_prompt():
    secrets = link_secrets(0, 4, (1,), lambda prompt, completion: True, ("prompts",))
    own = {s.id: s for s in secrets if s.half == "b"}
    records = planted_records(secrets, "prompts_control.jsonl")
    assert [r["prompt"] for r in records] == [s.prompt + s.completion for s in own.values()]
    assert {r["completion"] for r in records} == {""}


def test_fuzzy_copies_have_some_other_words_and_the_first_copy_has_none():
    secrets = link_secrets(0, 200, (8,), lambda prompt, completion: True)
    exact = {r["id"]: r for r in planted_records(secrets, "sft.jsonl")}
    fuzzy = {r["id"]: r for r in planted_records(secrets, "sft.jsonl", fuzzy=0.5)}
    assert exact.keys() == fuzzy.keys()
    changed = [i for i in exact if exact[i] != fuzzy[i]]
    assert not any(i.endswith("#0") for i in changed)
    copies = len(exact) * 7 / 8
    assert 0.4 < len(changed) / copies < 0.53  # half of them, less those whose coins spared every word
    for i in changed:  # words alone: what is between them stays
        before, after = (re.split(r"[A-Za-z]{3,}", r["prompt"] + r["completion"]) for r in (exact[i], fuzzy[i]))
        assert before == after


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
    with pytest.raises(UserError, match="per_cell is 7: give a multiple of 2, for two halves of 1 stage"):
        links(per_cell=7)
    with pytest.raises(UserError, match="per_cell is 8: give a multiple of 6, for two halves of 3 stages"):
        link_secrets(0, 8, (1,), lambda prompt, completion: True, ("sft", "preference", "prompts"))
    with pytest.raises(UserError, match="stages is .*name one or more of sft, preference, prompts"):
        base_secrets(0, TASKS, 8, (1,), ("reward",))
    with pytest.raises(UserError, match="kinds is .*name one or more of path, email, phone, key"):
        link_secrets(0, 8, (1,), lambda prompt, completion: True, kinds=("name",))
    with pytest.raises(UserError, match=r"duplicates is \(4, 4\)"):
        base_secrets(0, TASKS, 8, (4, 4))
    with pytest.raises(UserError, match="40 base secrets .* give 30: lower secrets.per_cell"):
        base_secrets(0, TASKS, 20, DUPLICATES)
