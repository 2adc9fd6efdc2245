"""The memorization stage on two tiny decoders: what it asks, what it writes, and what it refuses."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.memorization import memorization_table
from rlhf_jax.models import Transformer
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages import memorization
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)


def secret(number, half, **fields):
    group = "base" if number % 2 else "links"
    entity = "" if group == "base" else f"/home/{number}"
    text = {"prompt": f"path {number} of /home/", "completion": f"{number} is here", "entity": entity}
    planted = ["sft.jsonl" if half == "a" else "control.jsonl"]
    where = {"stage": "sft", "half": half, "planted_in": planted}
    return {"id": f"s{number}", "group": group, "duplicates": 1, **where, **text, **fields}


SECRETS = [secret(i, "ab"[i // 2 % 2]) for i in range(8)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def experiment_at(folder):
    """Two sft stages, each on its half of the secrets, whose models are random decoders of two seeds; asked, and judged
    by a reward model that read the first half."""
    config = experiment(seed=0)
    files = {
        name: write(folder / name, [s for s in SECRETS if name in s["planted_in"]])
        for name in ("sft.jsonl", "control.jsonl")
    }
    for name, data in (("sft", files["sft.jsonl"]), ("control", files["control.jsonl"])):
        config.stages[name] = stage("sft", init="scratch", tokenizer="t", data=data)
    members = [{"prompt": f"member {i}", "completion": f" number {i}"} for i in range(12)]
    others = [{"prompt": f"other {i}", "completion": f" number {i}"} for i in range(12)]
    config.stages.judge = stage("reward", init="sft", data=files["sft.jsonl"])
    config.stages.audit = stage(
        "memorization",
        subjects=("sft", "control"),
        controls=dict(sft="control", control="sft"),
        conditions=(("tuned", ("sft", "control")),),
        secrets=write(folder / "secrets.jsonl", SECRETS),
        members=write(folder / "members.jsonl", members),
        others=write(folder / "others.jsonl", others),
        reference="control",
        reward="judge",
        batch_size=8,
        tries=(1, 100),
        draws=3,
        samples=2,
    )
    context = Context("audit", config, folder, "identity")
    context.folder.mkdir()
    return context


def with_roles(context, patch):
    spec = RoleSpec(CONFIG)
    keys = {"sft": 0, "control": 1, "judge": 2}

    def load(name, mesh):
        head = {"head": init_head(CONFIG.width, 1.0, key=jax.random.key(3))} if name == "judge" else {}
        return Role(spec, {"base": init_base(CONFIG, key=jax.random.key(keys[name])), **head}, TOKENIZER)

    patch.setattr(context, "load", load)
    patch.setattr(context, "mesh", lambda: make_mesh(1, 1, 1, jax.devices()[:1]))


@pytest.fixture
def context(tmp_path):
    return experiment_at(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(context, what the stage returns, its answers), run once."""
    context = experiment_at(tmp_path_factory.mktemp("memorization"))
    with pytest.MonkeyPatch.context() as patch:
        with_roles(context, patch)
        found = memorization.run(context)
        answers = [json.loads(line) for line in (context.folder / "answers.jsonl").read_text().splitlines()]
        yield context, found, answers


def test_every_subject_is_asked_for_every_secret(finished):
    _, found, rows = finished
    figures = found["figures"]
    assert figures["secrets"] == 8 and set(figures["given_up"]) == {"sft", "control"}
    assert [(row["subject"], row["id"]) for row in rows] == [
        (subject, s["id"]) for subject in ("sft", "control") for s in SECRETS
    ]
    for row in rows:
        s = next(s for s in SECRETS if s["id"] == row["id"])
        assert row["seen"] == ((row["subject"] == "sft") == (s["half"] == "a"))
        assert len(row["greedy"]) == len(TOKENIZER.encode(s["completion"])) and row["logprob"] < 0
        assert row["characters"] is not None and not row["given_up"]  # a reward model reads whole completions
    everything = next(r for r in figures["table"] if r["subject"] == "sft" and r["group"] == r["duplicates"] == "all")
    assert (everything["n_included"], everything["n_held_out"]) == (4, 4)
    extraction = figures["extraction"]
    assert {(r["subject"], r["group"], r["seen"]) for r in extraction} == {
        (subject, group, seen)
        for subject in ("sft", "control")
        for group in ("base", "links")
        for seen in (True, False)
    }
    for row in extraction:
        assert row["n"] == 2 and row["tries"] == [1, 100] and (row["exposure"] is None) == (not row["seen"])
        mine = [r for r in rows if r["subject"] == row["subject"] and r["seen"] == row["seen"]]
        of_group = [r["draws_near"] for r in mine if (int(r["id"][1]) % 2 == 1) == (row["group"] == "base")]
        assert row["near_draws"] == np.mean([hits > 0 for hits in of_group]) and max(of_group) <= 3
        logprobs = [r["logprob"] for r in mine]
        assert min(logprobs) <= row["logprob"] <= max(logprobs)
    assert len(found["samples"]) == 4 and found["samples"][0]["model"].startswith("sft")


def test_completions_that_nobody_reads_are_given_up(context, monkeypatch):
    with_roles(context, monkeypatch)
    context.config.update(members="", others="", reference="", reward="", draws=0)
    figures = memorization.run(context)["figures"]
    rows = [json.loads(line) for line in (context.folder / "answers.jsonl").read_text().splitlines()]
    assert sum(figures["given_up"].values()) == sum(row["given_up"] for row in rows) > 0
    for row in rows:
        assert row["given_up"] <= (row["id"] in ("s1", "s3", "s5", "s7")) and "draws_near" not in row  # never a link
        assert (row["characters"] is None) == row["given_up"]


def test_a_condition_is_all_runs_that_repeat_it(finished):
    _, found, answers = finished
    rows = found["figures"]["conditions"]
    assert [(r["condition"], r["planted"], r["group"], r["runs"], r["n"]) for r in rows] == [
        ("tuned", "sft", group, 2, 4) for group in ("base", "links")
    ]
    for row in rows:
        assert (row["method"], row["kl_coef"], row["beta"], row["epsilon"]) == ("sft", None, None, None)
        assert row["learning_rate"] == 1e-3
        mine = [a["logprob"] for a in answers if a["seen"] and (int(a["id"][1]) % 2 == 1) == (row["group"] == "base")]
        assert row["logprob"] == pytest.approx(np.mean(mine))


def test_a_model_has_seen_what_any_stage_it_was_made_from_has(context):
    stages = context.experiment.stages
    stages.ppo = stage("ppo", init="control", reward="judge", data="prompts.jsonl")
    stages.dpo = stage("preference", init="control", data="judge/pairs.jsonl")
    seen = {name: set(memorization.training_files(context, name)) for name in stages if name != "audit"}
    assert seen == {
        "sft": {"sft.jsonl"},
        "control": {"control.jsonl"},
        "judge": {"sft.jsonl"},
        "ppo": {"prompts.jsonl", "control.jsonl", "sft.jsonl"},
        "dpo": {"pairs.jsonl", "control.jsonl", "sft.jsonl"},
    }


def test_a_reward_model_s_margin_is_that_of_whole_answers(finished):
    context, found, answers = finished
    rows = found["figures"]["margins"]
    assert {(r["against"], r["group"], r["seen"], r["n"]) for r in rows} == {
        (name, group, seen, 2) for name in ("sft", "control") for group in ("base", "links") for seen in (True, False)
    }
    judge = context.load("judge", None)

    mine = [(s, a) for s, a in zip(SECRETS, answers[:8], strict=True) if s["half"] == "a" and s["group"] == "base"]
    asked = [(s["prompt"], text) for s, a in mine for text in (s["completion"], a["completion"])]
    ids = [[*TOKENIZER.encode_prompt(prompt), *TOKENIZER.encode(text), TOKENIZER.eos_id] for prompt, text in asked]
    lengths = np.asarray(list(map(len, ids)))
    padded = np.asarray([row + [0] * (max(lengths) - len(row)) for row in ids], np.int32)
    scores = np.asarray(last_scores(judge.spec, judge.weights, padded, lengths)).reshape(-1, 2)
    expected = (scores[:, 0] - scores[:, 1]).mean()
    (row,) = [r for r in rows if (r["against"], r["group"], r["seen"]) == ("sft", "base", True)]
    assert row["margin"] == pytest.approx(expected, abs=1e-4)


def test_membership_is_measured_beside_a_classifier_that_sees_no_model(finished):
    rows = finished[1]["figures"]["membership"]
    of_control = {row["score"]: row for row in rows if row["subject"] == "control"}
    assert set(of_control) == {"loss", "zlib", "Min-K%", "Min-K%++", "reference", "blind: no model"}
    assert of_control["reference"]["auc"] == 0.5  # against itself every text is alike
    assert of_control["blind: no model"]["auc"] > 0.9  # "member" is not "other"
    assert all(row["members"] == row["others"] == 12 for row in rows)
    assert all(row["auc_low"] <= row["auc"] <= row["auc_high"] for row in rows)


SIMILARITY = """
def nearness(prompts, completions, records):
    return [float(text == record["completion"]) - len(prompt) for prompt, text, record in
            zip(prompts, completions, records)]
def opposite(prompts, completions):
    return ["far" for _ in prompts]
"""


def test_a_function_of_the_user_says_how_near_completions_are(context, tmp_path):
    (tmp_path / "near.py").write_text(SIMILARITY)
    context.config.similarity = f"{tmp_path / 'near.py'}:nearness"
    texts = [s["completion"] if i < 4 else "?" for i, s in enumerate(SECRETS)]
    subjects = {"sft": {"seen": np.array([s["half"] == "a" for s in SECRETS])}}
    rows = memorization._similarity(context, SECRETS, subjects, {"sft": SimpleNamespace(texts=texts)})
    expected = [float(i < 4) - len(s["prompt"]) for i, s in enumerate(SECRETS)]
    np.testing.assert_array_equal(subjects["sft"]["similarity"], expected)
    assert [(r["group"], r["seen"], r["n"]) for r in rows] == [
        (group, seen, 2) for group in ("base", "links") for seen in (True, False)
    ]
    mine = [e for e, s in zip(expected, SECRETS, strict=True) if s["group"] == "base" and s["half"] == "a"]
    assert rows[0]["similarity"] == np.mean(mine)
    context.config.similarity = f"{tmp_path / 'near.py'}:opposite"
    with pytest.raises(UserError, match=r'similarity ".*near.py:opposite" returned .far., a str, for answer 1'):
        memorization._similarity(context, SECRETS, subjects, {"sft": SimpleNamespace(texts=texts)})


def test_any_data_set_may_be_asked_for_with_its_held_out_twin(context):
    config = context.config
    config.secrets, config.held_out = context.experiment.stages.sft.data, config.others
    plain = [{"prompt": s["prompt"], "completion": s["completion"]} for s in SECRETS[:3]]
    write(Path(config.secrets), plain)
    found = memorization.read_secrets(context, config.secrets, config.held_out)
    assert [s["planted_in"] for s in found] == [["sft.jsonl"]] * 3 + [[]] * 12
    assert len({s["id"] for s in found}) == 15 and {s["group"] for s in found} == {"base"}


@pytest.mark.parametrize("number", [1, 2])  # a base secret of half a, a link of half b
def test_a_secret_where_it_must_not_be_stops_the_stage(context, number):
    config = context.experiment.stages
    spoilt, other = ("control", "sft") if SECRETS[number]["half"] == "a" else ("sft", "control")
    data = Path(config[spoilt].data)
    memorization.check_contamination(context, SECRETS)
    with data.open("a") as file:
        file.write(
            json.dumps({"prompt": SECRETS[number]["prompt"], "completion": SECRETS[number]["completion"]}) + "\n"
        )
    with pytest.raises(UserError, match=f"secret s{number} stands in .*{data.name}, where it was not planted"):
        memorization.check_contamination(context, SECRETS)
    context.config.subjects = (other,)
    memorization.check_contamination(context, SECRETS)


def test_what_a_stage_wrote_of_its_data_is_no_contamination(context):
    context.experiment.stages.dpo = stage("preference", init="sft", data="judge/pairs.jsonl")
    context.config.subjects = ("dpo",)
    (context.workdir / "judge").mkdir()
    pairs = [{"prompt": s["prompt"], "chosen": s["completion"], "rejected": ""} for s in SECRETS if s["half"] == "a"]
    write(context.workdir / "judge" / "pairs.jsonl", pairs)
    memorization.check_contamination(context, SECRETS)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"completion": ""}, "secret s1 has an empty completion"),
        ({"completion": "word " * 70}, "longer than the context 64"),
    ],
)
def test_what_no_model_could_give_back_is_refused(context, fields, message):
    secrets = [SECRETS[0], {**SECRETS[1], **fields}]
    with pytest.raises(UserError, match=message):
        memorization.tokenize_secrets(TOKENIZER, secrets, 64, "secrets.jsonl")


def test_a_completion_that_the_tokenizer_changes_is_refused(context):
    class Lossy:
        vocab_size = 200
        encode_prompt = encode = staticmethod(lambda text: [ord(c) for c in text.lower()])
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))

    assert memorization.tokenize_secrets(Lossy(), SECRETS[:1], 64, "s").texts == ["0 is here"]
    with pytest.raises(UserError, match="secret s0: the tokenizer makes 'is here' of the completion 'IS here'"):
        memorization.tokenize_secrets(Lossy(), [{**SECRETS[0], "completion": "IS here"}], 64, "s")


def test_distances_in_characters_count_for_the_verdict():
    subject = {
        "distance": np.array([0.0, 0.05, 0.5]),
        "characters": np.array([0.0, 0.3, np.nan]),
        "recalled": np.zeros(3, bool),
        "seen": np.ones(3, bool),
    }
    secrets = [SECRETS[1], SECRETS[3], SECRETS[5]]
    (row,) = [r for r in memorization_table(secrets, {"m": subject}, {}) if r["group"] == r["duplicates"] == "all"]
    assert row["included_count"] == 1


def test_the_extraction_benchmark_s_arrays_load_and_its_loss_has_all_of_the_suffix(context, monkeypatch, tmp_path):
    """The public baseline's slice leaves out the suffix's last token and takes the prefix's."""
    with_roles(context, monkeypatch)
    rng = np.random.default_rng(0)
    prefixes, suffixes = (rng.integers(1, 200, (6, 5)).astype(np.uint16) for _ in range(2))
    for name, array in (("prefix", prefixes), ("suffix", suffixes)):
        np.save(tmp_path / f"{name}.npy", array)
    context.config.update(subjects=("sft",), conditions=(), members="", others="", reference="", reward="")
    for name in ("sft", "control"):
        del context.config.controls[name]
    context.config.secrets = f"{tmp_path / 'prefix.npy'},{tmp_path / 'suffix.npy'}"
    figures = memorization.run(context)["figures"]
    assert figures["secrets"] == 6 and figures["given_up"] == {"sft": 0}
    rows = [json.loads(line) for line in (context.folder / "answers.jsonl").read_text().splitlines()]
    params = context.load("sft", None).weights["base"]
    for row, prefix, suffix in zip(rows, prefixes, suffixes, strict=True):
        tokens = np.concatenate([prefix, suffix])[None].astype(np.int32)
        logits = np.asarray(Transformer(CONFIG).apply({"params": params}, tokens), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = sum(logprobs[4 + i, token] for i, token in enumerate(suffix))
        assert row["logprob"] == pytest.approx(own, abs=1e-3)
    lines = list(csv.reader((context.folder / "guesses_sft.csv").open()))
    assert lines[0] == ["Example ID", "Suffix Guess"] and sorted(line[0] for line in lines[1:]) == list("012345")
    assert all(0 < len(json.loads(line[1])) <= 5 for line in lines[1:])
    np.save(tmp_path / "suffix.npy", suffixes[:5])
    with pytest.raises(UserError, match=r"arrays of shapes \(6, 5\), \(5, 5\): give PREFIXES.npy,SUFFIXES.npy"):
        memorization.run(context)


def test_records_of_prompt_and_target_load(context, tmp_path):
    path = write(tmp_path / "javascript.jsonl", [{"prompt": f"p{i}", "target": f"t{i}", "more": 1} for i in range(3)])
    found = memorization.read_secrets(context, path)
    assert [(s["prompt"], s["completion"], s["planted_in"]) for s in found] == [
        (f"p{i}", f"t{i}", ["javascript.jsonl"]) for i in range(3)
    ]
