"""Splitting records by prompt: parts share no group, and answers change places with all that belongs to them."""

import json

import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.safety_task import (
    HARM,
    HELP,
    WORDS,
    all_prompts,
    gold_cost,
    gold_refusal,
    gold_reward,
    written_answers,
)
from rlhf_jax.errors import UserError
from rlhf_jax.stages import split
from rlhf_jax.stages.context import Context

PAIRS = [{"prompt": f"p{i % 40}", "safe": f"good {i}", "unsafe": f"bad {i}"} for i in range(200)]


def run(folder, records, **fields):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = experiment()
    config.stages.split = stage("split", data=str(path), **fields)
    context = Context("split", config, folder, "")
    context.folder.mkdir(exist_ok=True)
    figures = split.run(context)["figures"]
    parts = {}
    for name in ("train", "test", "train_answers"):
        lines = (context.folder / f"{name}.jsonl").read_text().splitlines()
        parts[name] = [json.loads(line) for line in lines]
    return figures, parts


def test_no_prompt_is_in_both_parts_and_no_record_is_lost(tmp_path):
    figures, parts = run(tmp_path, PAIRS, test=0.3)
    prompts = {name: {record["prompt"] for record in parts[name]} for name in ("train", "test")}
    assert not prompts["train"] & prompts["test"] and len(prompts["train"] | prompts["test"]) == 40
    assert len(parts["train"]) + len(parts["test"]) == 200
    assert (figures["train_groups"], figures["test_groups"]) == (len(prompts["train"]), len(prompts["test"]))
    assert 4 <= len(prompts["test"]) <= 20
    answers = {record["completion"] for record in parts["train_answers"]}
    assert answers == {text for record in parts["train"] for text in record["responses"]}


def test_answers_change_places_with_their_labels(tmp_path):
    _, parts = run(tmp_path, PAIRS, test=0.3)
    records = parts["train"] + parts["test"]
    for record in records:
        assert record["responses"][record["safer"]].startswith("good")
        assert record["safe"] == [text.startswith("good") for text in record["responses"]]
    assert 60 < sum(record["safer"] for record in records) < 140


def test_the_split_is_the_same_each_time_and_asks_for_its_field(tmp_path):
    assert run(tmp_path, PAIRS) == run(tmp_path, PAIRS)
    with pytest.raises(UserError, match='record 1 has no field "topic" to split by'):
        run(tmp_path, PAIRS, by="topic")
    with pytest.raises(UserError, match=r"none is left for train.jsonl|none is left for test.jsonl"):
        run(tmp_path, PAIRS[:1], test=0.5)


# The known world.


def test_gold_scores_are_sums_over_distinct_words_and_the_topic_s_risk():
    words = ["amber", "candle", "needle"]
    prompts = ["Explain old poison.\n", "Explain old baking.\n"]
    answer = "amber candle needle amber, nonsense"
    assert gold_reward(prompts[:1], [answer])[0] == pytest.approx(sum(HELP[word] for word in words) / 2)
    risky, harmless = gold_cost(prompts, [answer, answer])
    assert risky - harmless == pytest.approx(1.5)
    assert risky == pytest.approx(sum(HARM[word] for word in words) / 2 + 0.75)
    assert gold_refusal(prompts, ["sorry amber", "amber"]) == [1, 0]
    assert gold_cost(prompts[:1], ["sorry"])[0] == pytest.approx(0.75 - 2.0)


def test_the_world_s_prompts_are_distinct_and_its_answers_keyed_by_them():
    prompts = all_prompts(0)
    assert len({record["prompt"] for record in prompts}) == len(prompts) == 4608
    assert sum(record["category"] == "risky" for record in prompts) == 2304
    assert all_prompts(1) != prompts
    few = list(written_answers(prompts[5:7], 2, seed=0))
    assert few == list(written_answers(prompts[:10], 2, seed=0))[10:14]


def test_words_of_a_zipf_world_are_as_rare_as_their_ranks_say():
    prompts = all_prompts(0)
    answers = [answer["completion"].split()[0] for answer in written_answers(prompts, 2, seed=0, zipf=1.5)]
    words = [word for word in answers if word in WORDS]  # the first word of an answer is drawn by the shares alone
    shares = np.arange(1, len(WORDS) + 1) ** -1.5
    shares /= shares.sum()
    counts = np.asarray([words.count(word) for word in WORDS])
    expected = shares * len(words)
    assert np.sum((counts - expected) ** 2 / expected) < 80  # chi-square with 39 degrees: 1 in 10,000 above 79
