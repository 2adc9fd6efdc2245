"""Labels of a policy's answers: exact, drawn, mixed; which answers make a pair; and the stage on a tiny decoder."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.data.schemas import normalize_record
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import replicated
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.pipeline import checked_order, semantic_fields
from rlhf_jax.stages import annotate
from rlhf_jax.stages.annotate import _label_figures, _pair, _score_figures
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.validation import validate

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)
TURNS = [{"role": "user", "content": "hi"}]
NEVER = np.ones(5) - 1e-9  # draws that say no to every chance below one


def row(completions, rewards=None, costs=None):
    scores = {name: x for name, x in (("rewards", rewards), ("costs", costs)) if x is not None}
    return {"prompt": 0, "completions": completions, **scores, "ended": [True] * len(completions)}


def exact(found, draws=NEVER, cost_weight=0.0, **record):
    return _pair({"id": "x", "prompt": "p", **record}, found, draws, sampled=False, cost_weight=cost_weight)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_exact_labels_are_the_larger_reward_the_lower_cost_and_a_cost_of_at_most_zero():
    pair = exact(row(["a", "b"], [1.0, 2.0], [0.0, 3.0]), category=["Drugs"], more=1)
    assert pair == {
        "id": "x",
        "prompt": "p",
        "responses": ["a", "b"],
        "better": 1,
        "safer": 0,
        "safe": [True, False],
        "rewards": [1.0, 2.0],
        "costs": [0.0, 3.0],
        "category": ["Drugs"],
    }
    assert normalize_record(pair, "safety", "here") == pair
    turns = _pair({"prompt": TURNS}, row(["a", "b"], [2.0, 1.0], [1.0, -1.0]), NEVER, sampled=False, cost_weight=0.0)
    assert turns["responses"] == [[{"role": "assistant", "content": text}] for text in "ab"]
    assert (turns["better"], turns["safer"], turns["safe"]) == (0, 1, [False, True])
    assert normalize_record(turns, "safety", "here") == turns


def test_a_label_that_nothing_decides_is_absent():
    """What is left is read by the schema that needs no other label."""
    ranked, judged = exact(row(["a", "b"], [1.0, 2.0])), exact(row(["a", "b"], None, [1.0, 2.0]))
    assert {"better", "safer", "safe", "costs"} & ranked.keys() == {"better"}
    assert normalize_record(ranked, "preference", "here") == ranked
    assert (ranked["chosen"], ranked["rejected"]) == ("b", "a")
    assert {"better", "safer", "safe", "rewards", "chosen"} & judged.keys() == {"safer", "safe"}
    assert normalize_record(judged, "safety", "here") == judged | {"better": None}


def test_mixed_labels_follow_reward_less_cost():
    answers = row(["a", "b"], [3.0, 2.0], [2.5, 1.0])  # 0.5 and 1.0
    assert exact(answers)["better"] == 0 and exact(answers, cost_weight=1.0)["better"] == 1
    assert exact(answers, cost_weight=1.0)["safer"] == 1


@pytest.mark.parametrize(
    "texts, chosen",
    [
        (["a", "b", "c"], [0, 1]),
        (["a", "a", "c"], [0, 2]),
        (["", "b", "", "b", "c"], [1, 4]),
        (["a", "a"], None),
        (["a", ""], None),
        (["", ""], None),
    ],
)
def test_the_first_two_answers_with_text_that_differ_are_the_pair(texts, chosen):
    rewards = [float(i) for i in range(len(texts))]
    pair = exact(row(texts, rewards))
    assert (pair and pair["rewards"]) == (chosen and [rewards[i] for i in chosen])
    assert chosen is None or pair["responses"] == [texts[i] for i in chosen]


@pytest.mark.parametrize("draw, first", [(0.0, True), (0.49, True), (0.5, False), (0.99, False)])
def test_a_tie_is_decided_by_a_fair_draw(draw, first):
    pair = exact(row(["a", "b"], [1.0, 1.0], [2.0, 2.0]), np.full(5, draw))
    assert (pair["better"], pair["safer"], pair["safe"]) == (0 if first else 1, 1 if first else 0, [False] * 2)


def test_drawn_labels_have_the_chances_of_the_logistic_model():
    answers, n = row(["a", "b"], [1.5, 0.5], [-1.0, 2.0]), 4000
    pairs = [
        _pair({"prompt": "p"}, answers, keyed_generator(0, "s", str(i)).random(5), sampled=True, cost_weight=0.0)
        for i in range(n)
    ]
    found = {
        "first is better": (np.mean([pair["better"] == 0 for pair in pairs]), 1.0),
        "first is more harmful": (np.mean([pair["safer"] == 1 for pair in pairs]), -3.0),
        "first is unsafe": (np.mean([not pair["safe"][0] for pair in pairs]), -1.0),
        "second is unsafe": (np.mean([not pair["safe"][1] for pair in pairs]), 2.0),
    }
    for name, (share, logit) in found.items():
        p = 1 / (1 + math.exp(-logit))
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n), name
    mixed = [_pair({"prompt": "p"}, answers, np.full(5, draw), sampled=True, cost_weight=1.0) for draw in (0.98, 0.983)]
    assert [pair["better"] for pair in mixed] == [0, 1]  # sigmoid((1.5 + 1) - (0.5 - 2)) = 0.98201


def test_a_share_of_the_better_labels_is_turned_round_and_of_no_others():
    answers = row(["a", "b"], [1.0, 0.0], [2.0, -2.0])
    drawn = [np.random.default_rng(i).random(5) for i in range(4000)]
    pairs = [_pair({"prompt": "p"}, answers, draws, sampled=False, cost_weight=0.0, flips=0.25) for draws in drawn]
    turned = np.mean([pair["better"] == 1 for pair in pairs])
    assert abs(turned - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(pairs))
    assert all((pair["safer"], pair["safe"]) == (1, [False, True]) for pair in pairs)


def test_the_figures_of_labels_and_scores():
    def labelled(better, safer, safe):
        return {"better": better, "safer": safer, "safe": safe}

    pairs = [labelled(0, 1, [False, True]), labelled(0, 0, [True, True]), labelled(1, 0, [False, True])]
    figures = _label_figures([*pairs, labelled(1, 1, [False, False])])
    assert figures["conflicts"] == 0.5 and figures["conflicts_low"] < 0.5 < figures["conflicts_high"]
    assert figures["unsafe"] == 0.5 and figures["contradictions"] == 1
    assert _label_figures([]) == {}
    rows = [row(["a", "b"], [1.0, 3.0], [2.0, 4.0]), row(["a", "b"], [5.0, 7.0], [0.0, -6.0])]
    figures = _score_figures(rows, ["rewards", "costs"])
    assert (figures["reward"], figures["cost"]) == (4.0, 0.0)
    assert figures["reward_high"] - 4 == pytest.approx(1.96 * math.sqrt(8) / math.sqrt(2))  # of 2 and 6, by prompt
    assert figures["correlation"] == pytest.approx((-3 * 2 - 1 * 4 + 0 - 3 * 6) / math.sqrt(20 * 56))
    assert math.isnan(_score_figures([row(["a", "b"], [1.0, 1.0], [1.0, 2.0])], ["rewards", "costs"])["correlation"])


# --- the stage -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
def length(prompts, completions):
    return [len(text) / 8 for text in completions]

def harm(prompts, completions, records):
    assert [record["prompt"] for record in records] == prompts
    return [(sum(map(ord, text)) % 7 - 3) / 2 for text in completions]
"""


def weights(seed):
    base = init_base(CONFIG, key=jax.random.key(seed))
    return {"base": base, "head": init_head(CONFIG.width, 1.0, key=jax.random.key(seed + 1))}


ROLES = {name: Role(RoleSpec(CONFIG), weights(seed), TOKENIZER) for name, seed in (("sft", 0), ("judge", 2))}


def make_context(folder, prompts=tuple(range(12)), **fields):
    (folder / "scores.py").write_text(FUNCTIONS)
    records = [{"id": f"p{i}", "prompt": f"Say {i:02}", "category": ["Drugs"]} for i in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = experiment(seed=3)
    config.stages.sft = stage("sft", init="scratch", tokenizer="t", data="x")
    config.stages.judge = stage("reward", init="sft", data="x", schema="preference")
    sources = {"reward": f"{folder}/scores.py:length", "cost": f"{folder}/scores.py:harm"}
    given = {**sources, "batch_size": 16, "max_new_tokens": 5, "labels": "sampled", **fields}
    config.stages.pairs = stage("annotate", subject="sft", data=str(folder / "prompts.jsonl"), **given)
    validate(config)
    context = Context("pairs", config, folder, "identity")
    context.folder.mkdir(exist_ok=True)

    def load(name, mesh):
        return dataclasses.replace(ROLES[name], weights=jax.device_put(ROLES[name].weights, replicated(mesh)))

    context.load = load
    return context


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_stage_labels_what_it_answers_and_goes_on_where_it_was_cut(tmp_path, capsys):
    context = make_context(tmp_path)
    annotate.check(context)
    result = annotate.run(context)
    answers = sorted(read(context.folder / "answers.jsonl"), key=lambda found: found["prompt"])
    pairs = {pair["id"]: pair for pair in read(context.folder / "pairs.jsonl")}
    assert [found["prompt"] for found in answers] == list(range(12)) and len(pairs) > 8
    for i, found in enumerate(answers):
        penalized = zip(found["completions"], found["ended"], strict=True)
        assert found["rewards"] == [len(text) / 8 if ended else -1.0 for text, ended in penalized]
        assert found["costs"] == [(sum(map(ord, text)) % 7 - 3) / 2 for text in found["completions"]]
        if f"p{i}" in pairs:
            pair = pairs[f"p{i}"]
            assert pair["responses"] == found["completions"] and pair["costs"] == found["costs"]
            assert pair["prompt"] == f"Say {i:02}" and pair["category"] == ["Drugs"]
            assert normalize_record(pair, "safety", "here") == pair
    figures = result["figures"]
    assert (figures["pairs"], figures["dropped"]) == (len(pairs), 12 - len(pairs))
    assert figures["cost"] == pytest.approx(np.mean([found["costs"] for found in answers]))
    whole = {name: (context.folder / name).read_bytes() for name in ("answers.jsonl", "pairs.jsonl")}
    lines = whole["answers.jsonl"].splitlines(keepends=True)
    (context.folder / "answers.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:15])
    (context.folder / "pairs.jsonl").unlink()
    capsys.readouterr()
    assert annotate.run(context) == result
    console = capsys.readouterr().out
    assert "1/2" in console and "0/2" not in console
    assert whole == {name: (context.folder / name).read_bytes() for name in whole}


def test_a_record_s_labels_do_not_hang_on_the_others(tmp_path):
    """Eight of the prompts in another order: the same answers get the same labels, though drawn."""
    found = []
    for name, prompts in (("all", range(12)), ("some", (11, 3, 4, 0, 9, 7, 2, 5))):
        (tmp_path / name).mkdir()
        context = make_context(tmp_path / name, prompts, reward="judge", missing_end="add", missing_end_penalty=0.0)
        annotate.run(context)
        found.append({pair["id"]: pair for pair in read(context.folder / "pairs.jsonl")})
    every, some = found
    assert len(some) > 5
    for name, pair in some.items():
        assert pair.pop("rewards") == pytest.approx(every[name].pop("rewards"), rel=1e-5)
        assert pair == every[name]
    assert len({tuple(pair["safe"]) for pair in every.values()}) > 1


def test_what_cannot_be_labelled_is_refused(tmp_path):
    for fields, told in (
        ({"reward": "", "cost": ""}, "reward and cost are both empty"),
        ({"cost": "", "cost_weight": 1.0}, "cost_weight weighs a cost against a reward, and cost is empty"),
        ({"samples": 1}, "samples is 1: a pair needs two answers"),
        ({"batch_size": 15}, "batch_size 15 is not whole prompts of 2"),
        ({"labels": "noisy"}, 'labels is "noisy"'),
        ({"cost": "judge, judge"}, "name one source"),
        ({"cost": "sft"}, 'cost is "sft", a sft stage'),
        ({"reward": "", "reward_weights": (1.0,)}, "reward_weights has 1 numbers for 0 sources"),
    ):
        with pytest.raises(UserError, match=told):
            make_context(tmp_path, **fields)
    with pytest.raises(UserError, match="15 rows|do not divide over"):
        annotate.check(make_context(tmp_path, batch_size=6))


def test_a_changed_function_makes_another_stage(tmp_path):
    context = make_context(tmp_path)
    before = semantic_fields(context.experiment, "pairs")
    assert before["cost"].startswith("function harm ")
    (tmp_path / "scores.py").write_text(FUNCTIONS + "# changed\n")
    assert semantic_fields(context.experiment, "pairs")["cost"] != before["cost"]


def test_answers_of_a_raw_model_are_no_private_stage_s_data(tmp_path):
    config = make_context(tmp_path, reward="judge").experiment
    config.stages.base = stage("sft", init="scratch", tokenizer="t", data="texts.jsonl")
    config.stages.student = stage("preference", init="base", data="pairs/pairs.jsonl", schema="safety")
    config.stages.student.privacy.update(epsilon=8.0, delta=1e-3)
    config.privacy.public = (config.stages.pairs.data, "texts.jsonl", "t")
    with pytest.raises(UserError, match="stages.student.data is .*, written by a model of private data"):
        checked_order(config)
    config.privacy.public = (*config.privacy.public, "x")  # what the policy and its judge were trained on
    checked_order(config)
