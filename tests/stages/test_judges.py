"""Scores of a rollout by models, by functions on the host, and by weighted sums of them."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import batch_sharding, fetch, make_mesh, replicated
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.pipeline import identities
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout.scoring import answer_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge, check_sources, source_names
from rlhf_jax.stages.plan import role_bases
from rlhf_jax.training.artifacts import Role

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
TOKENIZER, OTHER = (load_tokenizer(FIXTURES / name) for name in ("qwen", "gpt2"))
CONFIG = TransformerConfig(
    vocab_size=max(TOKENIZER.vocab_size, OTHER.vocab_size),
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn=24,
    context=128,
)
SPEC = RoleSpec(CONFIG)
TEXTS = ["one", "two words", "three words here", "4", "five!", "six", "", "eight ones"]
RECORDS = [{"prompt": f"Say {i}", "number": i} for i in range(len(TEXTS))]
FUNCTIONS = """
import pathlib, time
def length(prompts, completions):
    return [len(text) for text in completions]
def number(prompts, completions, records):
    assert [r["prompt"] for r in records] == prompts
    return [r["number"] for r in records]
def waiting(prompts, completions):
    end = time.monotonic() + 30
    while not pathlib.Path(__file__).with_name("go").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return [0.0] * len(prompts)
"""


def weights(seed):
    return {
        "base": init_base(CONFIG, key=jax.random.key(seed)),
        "head": init_head(CONFIG.width, 1.0, key=jax.random.key(seed + 1)),
    }


ROLES = {"mine": Role(SPEC, weights(0), TOKENIZER), "theirs": Role(SPEC, weights(2), OTHER)}


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def make_context(reward, reward_weights=()):
    config = experiment()
    config.stages.sft = stage("sft", init="scratch", data="x", tokenizer="x")
    for name in ROLES:
        config.stages[name] = stage("reward", init="sft", data="x")
    config.stages.ppo = stage("ppo", init="sft", reward=reward, reward_weights=reward_weights, data="x")
    context = Context("ppo", config, Path("nowhere"), "")

    def load(name, mesh):
        return dataclasses.replace(ROLES[name], weights=jax.device_put(ROLES[name].weights, replicated(mesh)))

    context.load = load
    return context


def make_rollout(texts, mesh):
    """Answers that end in turn with eos and without."""
    rows = [TOKENIZER.encode(text) + [TOKENIZER.eos_id] * (i % 2 == 0 or not text) for i, text in enumerate(texts)]
    width = max(map(len, rows)) + 1
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    ended = np.asarray([row[-1] == TOKENIZER.eos_id for row in rows])
    asked = [TOKENIZER.encode(f"Say {i}") for i in range(len(rows))]
    prompts = np.asarray([row[:2] for row in asked], np.int32)
    fields = (prompts, np.full(len(rows), 2, np.int32), tokens, np.asarray([len(row) for row in rows], np.int32), ended)
    placed = jax.device_put((*fields, np.zeros(tokens.shape, np.float32)), batch_sharding(mesh))
    return Rollout(*placed, Sampling(width, stop_ids=TOKENIZER.stop_ids))


def test_sources_are_weighed_and_kept_apart_under_the_transfer_guard(functions):
    """A model of the policy's tokenizer, a foreign one, and two functions; the rows of two rollouts in their order."""
    mesh = make_mesh(2, 2, 2)
    reward = f"mine, theirs, {functions}:length, {functions}:number"
    with jax.set_mesh(mesh):
        judge = Judge(make_context(reward, (1.0, 0.5, 0.1, -2)), TOKENIZER, mesh, parts=1, stop_strings=False)
        assert judge.names == ["mine", "theirs", "length", "number"]
        assert judge.foreign == {"mine": False, "theirs": True} and list(judge.roles) == ["mine", "theirs"]
        halves = [make_rollout(TEXTS[:4], mesh), make_rollout(TEXTS[4:], mesh)]
        for guard in (contextlib.nullcontext(), jax.transfer_guard("disallow")):  # compiled before the guard stands
            with guard:
                pending = [judge.begin(half, RECORDS[at : at + 4]) for half, at in zip(halves, (0, 4), strict=True)]
                scores, columns = judge.finish(pending)
    assert scores.sharding.is_equivalent_to(batch_sharding(mesh), 1)
    scores, columns = fetch((scores, columns))
    assert list(columns) == [f"rewards/{name}" for name in sorted(judge.names)]
    np.testing.assert_array_equal(columns["rewards/length"], [len(text) for text in TEXTS])
    np.testing.assert_array_equal(columns["rewards/number"], range(8))
    fields = [(r.prompts, r.prompt_lengths, r.tokens, r.lengths) for r in halves]
    mine = [answer_scores(SPEC, ROLES["mine"].weights, *jax.device_get(half)) for half in fields]
    np.testing.assert_allclose(columns["rewards/mine"], np.concatenate(mine), atol=1e-5)
    total = sum(
        weight * columns[f"rewards/{name}"] for name, weight in zip(judge.names, (1.0, 0.5, 0.1, -2), strict=True)
    )
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, total, rtol=1e-6, atol=1e-6)


def test_beginning_does_not_wait_for_a_function(functions, tmp_path):
    mesh = make_mesh(devices=jax.devices()[:1])
    judge = Judge(make_context(f"{functions}:waiting"), TOKENIZER, mesh, parts=1, stop_strings=False)
    pending = [judge.begin(make_rollout(TEXTS, mesh), RECORDS) for _ in range(2)]
    assert not any(one.called.done() for one in pending)
    (tmp_path / "go").touch()
    assert judge.finish(pending)[0].shape == (16,)


def test_what_a_function_does_wrong_is_raised_where_its_scores_are_awaited(tmp_path):
    (tmp_path / "bad.py").write_text("def score(p, c): return [float('nan')] * len(c)")
    mesh = make_mesh(devices=jax.devices()[:1])
    judge = Judge(make_context(f"{tmp_path}/bad.py:score"), TOKENIZER, mesh, parts=1, stop_strings=False)
    pending = judge.begin(make_rollout(TEXTS, mesh), RECORDS)
    with pytest.raises(UserError, match="returned nan for answer 1 \\('one'\\)"):
        judge.finish([pending])


def test_sources_have_short_names_of_their_own():
    sources = ["a/rewards.py:score", "b/other.py:score", "models/score", "reward", "x/score_2"]
    assert source_names(sources) == ["score", "score_2", "score_3", "reward", "score_2_2"]


@pytest.mark.parametrize("bad, told", [("{}:absent", "it has: length, number, waiting"), ("{}x.py:length", "no file")])
def test_functions_are_refused_before_anything_runs(functions, bad, told):
    with pytest.raises(UserError, match=told):
        check_sources(make_context("mine," + bad.format(functions)))


@pytest.mark.parametrize("weight", ["2", float("nan"), None])
def test_a_weight_is_a_finite_number(functions, weight):
    with pytest.raises(UserError, match="give one finite number a source"):
        check_sources(make_context(f"mine, {functions}:length", (1.0, weight)))


def test_the_plan_names_every_model_and_no_function(functions):
    def roles(reward, **fields):
        context = make_context(f"{reward}{functions}:length")
        context.config.update(fields)
        return role_bases(context)

    assert list(roles("mine, ")) == ["policy", "reference", "value", "reward"]
    assert list(roles("mine, theirs, ")) == ["policy", "reference", "value", "mine", "theirs"]
    assert list(roles("", critic="policy")) == ["policy", "reference", "value"]
    assert list(roles("mine, ", critic="shared")) == ["policy", "reference", "reward"]
    assert list(roles("mine, ", estimator="rloo", samples=2)) == ["policy", "reference", "reward"]


def test_a_changed_function_is_another_stage_and_a_moved_one_is_not(functions, tmp_path):
    def identity(path):
        config = make_context(f"mine, {path}:length").experiment
        return identities(config, ["sft", *ROLES, "ppo"])["ppo"]

    moved = tmp_path / "moved.py"
    moved.write_text(FUNCTIONS)
    first = identity(functions)
    assert identity(moved) == first
    functions.write_text(FUNCTIONS + "# changed\n")
    assert identity(functions) != first
