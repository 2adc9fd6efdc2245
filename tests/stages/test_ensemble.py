"""Ensembles: members that share one base, train at once, and know how far they disagree."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.examples import answer_ids
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import fetch, make_mesh, replicated
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.roles import RoleSpec, init_base, member
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout.scoring import answer_rows, last_scores, member_scores
from rlhf_jax.stages import cost, reward
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge
from rlhf_jax.training.artifacts import Role, continue_role, load_role
from rlhf_jax.validation import validate

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)
BASE = init_base(CONFIG, key=jax.random.key(0))
MEMBERS = 3
FEW = dict(rank=2, alpha=4.0, targets=("q", "v"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(path, count=16):
    rows = [{"prompt": f"Ask {i}", "chosen": " yes" * (1 + i % 3), "rejected": f" no {i}"} for i in range(count)]
    return write(path, rows)


def make_context(folder, kind, data, mesh, **fields):
    config = experiment()
    config.logging.update(every=100, tensorboard=False)
    config.stages.base = stage("sft", init="scratch", tokenizer="x", data="x")
    fields = {"batch_size": 4, "sequence_length": 48, "epochs": 2.0, "lora": FEW, "mesh": dict(data=-1), **fields}
    config.stages.scorer = stage(kind, init="base", data=data, **fields)
    validate(config)
    context = Context("scorer", config, folder, "identity")
    context.folder.mkdir(parents=True, exist_ok=True)
    context.load = lambda reference, mesh: Role(
        RoleSpec(CONFIG), {"base": jax.device_put(BASE, replicated(mesh))}, TOKENIZER
    )
    context.mesh = lambda: mesh
    return context


def trained(folder, mesh=None, kind="reward", **fields):
    """The figures of a stage, and the role it left; the base is stored with it."""
    mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
    data = pairs(folder.parent / "pairs.jsonl")
    schema = {"schema": "preference", "max_new_tokens": 8, "rollout_batch_size": 8, "calibration_prompts": 8}
    context = make_context(folder, kind, data, mesh, **schema, **fields)
    figures = reward.run(context)["figures"]
    return figures, load_role(folder, "scorer", mesh, {})


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    held_out = pairs(folder / "held.jsonl", 6)
    return trained(folder / "work", members=MEMBERS, evaluation=dict(data=held_out, every=8))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    held_out = pairs(folder / "held.jsonl", 6)
    return trained(folder / "work", evaluation=dict(data=held_out, every=8))


def close(left, right, rtol=2e-4, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), fetch(left), fetch(right))


def test_the_first_member_is_the_model_of_the_stage_without_the_others(ensemble, alone):
    """Its start, its order of the data, its clipped steps and its calibration: nobody else's gradient is in them."""
    spec, first = member(ensemble[1].spec, ensemble[1].weights, 0)
    assert spec == alone[1].spec
    close(first, alone[1].weights)


def test_members_differ_and_each_is_calibrated(ensemble):
    heads, figures = np.asarray(ensemble[1].weights["head"]["kernel"]), ensemble[0]
    assert all(np.abs(heads[i] - heads[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    np.testing.assert_allclose(figures["calibration"]["mean"], np.zeros(MEMBERS), atol=1e-4)
    np.testing.assert_allclose(figures["calibration"]["std"], np.ones(MEMBERS), rtol=1e-4)
    assert figures["members"] == MEMBERS


def test_an_ensemble_is_read_back_as_it_was_written(ensemble):
    role = ensemble[1]
    assert role.spec.members == MEMBERS and role.weights["adapters"]["q"]["a"].shape[0] == MEMBERS
    assert role.weights["base"]["embedding"].ndim == 2  # one base


def test_scores_of_all_members_are_those_of_each(ensemble):
    spec, weights = ensemble[1].spec, ensemble[1].weights
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (4, 20)), jnp.int32)
    lengths = jnp.asarray([20, 7, 1, 12])
    one, scores = (jax.jit(function, static_argnums=0) for function in (last_scores, member_scores))
    each = [one(*member(spec, weights, i), tokens, lengths) for i in range(MEMBERS)]
    np.testing.assert_allclose(scores(spec, weights, tokens, lengths), np.stack(each), rtol=1e-4, atol=1e-5)


def test_what_goes_on_from_an_ensemble_goes_on_from_its_first_member(ensemble):
    role = ensemble[1]
    one = continue_role(role, LoraConfig(2, 4.0, ("q", "v")), key=jax.random.key(0))
    assert one.spec.members == 1
    close(one.weights["adapters"], member(role.spec, role.weights, 0)[1]["adapters"], 0, 0)


def test_an_ensemble_is_the_same_on_two_devices(ensemble, tmp_path):
    held_out = pairs(tmp_path / "held.jsonl", 6)
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    _, role = trained(tmp_path / "work", mesh, members=MEMBERS, evaluation=dict(data=held_out, every=8))
    close(role.weights["head"], ensemble[1].weights["head"], 2e-3, 2e-4)


def test_held_out_accuracy_of_the_mean_is_beside_the_members(ensemble):
    figures, _ = ensemble
    assert 0 <= figures["accuracy_of_their_mean"] <= 1 and 0 <= figures["accuracy"] <= 1


def test_a_cost_ensemble_trains_and_reports(tmp_path):
    row = {"prompt": "p", "safer": 0, "safe": [True, False]}
    data = write(tmp_path / "c.jsonl", [{**row, "responses": [f" good {i}", f" bad {i}"]} for i in range(8)])
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    context = make_context(tmp_path / "work", "cost", data, mesh, members=2, evaluation=dict(data=data))
    figures = cost.run(context)["figures"]
    assert figures["sign_labels_eval"] == 16
    assert load_role(tmp_path / "work", "scorer", mesh, {}).weights["head"]["bias"].shape == (2, 1)


# --- what it says of a rollout ---------------------------------------------------------------------------------------


def make_judge(role, folder, field="reward", **fields):
    """The judge of a ppo stage whose every model is `role`."""
    config, mesh = experiment(), make_mesh(1, 1, 1, jax.devices()[:1])
    config.stages.base = stage("sft", init="scratch", tokenizer="x", data="x")
    config.stages.scorer = stage("reward", init="base", data="x", members=MEMBERS, lora=FEW)
    config.stages.harm = stage("cost", init="base", data="x", members=MEMBERS, lora=FEW)
    config.stages.ppo = stage("ppo", init="base", data="x", **fields)
    validate(config)
    context = Context("ppo", config, folder, "identity")
    context.load = lambda reference, mesh: role
    return Judge(context, TOKENIZER, mesh, parts=2, stop_strings=False, field=field)


def make_rollout(rows=4):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    rng = np.random.default_rng(1)
    fields = dict(
        prompts=rng.integers(3, 200, (rows, 6)).astype(np.int32),
        prompt_lengths=np.full(rows, 6, np.int32),
        tokens=rng.integers(3, 200, (rows, 5)).astype(np.int32),
        lengths=np.full(rows, 5, np.int32),
        ended=np.ones(rows, bool),
        logprobs=np.zeros((rows, 5), np.float32),
    )
    return Rollout(**jax.device_put(fields, replicated(mesh)), sampling=Sampling(5))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, lambda s: s.mean(0)),
        (dict(kind="std", k=2.0), lambda s: s.mean(0) - 2.0 * s.std(0)),
        (dict(kind="variance", k=0.5), lambda s: s.mean(0) - 0.5 * s.var(0)),
        (dict(kind="worst"), lambda s: s.min(0)),
    ],
)
def test_a_judge_takes_off_what_uncertainty_costs(ensemble, tmp_path, fields, wanted):
    role, rollout = ensemble[1], make_rollout()
    judge = make_judge(role, tmp_path, reward="scorer", reward_adjustment=fields)
    total, columns = judge.finish([judge.begin(rollout, [{"prompt": ""}] * 4)])
    rows = answer_rows(role.spec, rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths)
    scores = np.asarray(member_scores(role.spec, role.weights, *rows))
    np.testing.assert_allclose(total, wanted(scores), rtol=1e-3, atol=1e-4)
    wanted_columns = {"rewards": scores.mean(0), "variance": scores.var(0), "lowest": scores.min(0)}
    for name, column in {**wanted_columns, "highest": scores.max(0)}.items():
        np.testing.assert_allclose(columns[f"{name}/scorer"], column, rtol=1e-3, atol=1e-4)
    assert judge.forward_passes() == MEMBERS


def test_uncertainty_adds_to_a_cost(ensemble, tmp_path):
    constraint = dict(cost="harm", adjustment=dict(kind="std", k=1.5))
    judge = make_judge(ensemble[1], tmp_path, "constraint.cost", reward="scorer", constraint=constraint)
    total, columns = judge.finish([judge.begin(make_rollout(), [{"prompt": ""}] * 4)])
    above = np.asarray(total) - np.asarray(columns["rewards/harm"])
    np.testing.assert_allclose(above, 1.5 * np.sqrt(columns["variance/harm"]), rtol=1e-4, atol=1e-5)
    assert (above > 0).all()


def test_a_reference_answer_takes_a_prompts_own_offset_out_of_the_uncertainty(ensemble, tmp_path):
    adjustment = dict(kind="std", k=1.0, against="completion")
    judge = make_judge(ensemble[1], tmp_path, reward="scorer", reward_adjustment=adjustment)
    role, rollout, texts = ensemble[1], make_rollout(), ["yes", "no 3", "no 4", "yes yes"]
    records = [{"prompt": "", "completion": text} for text in texts]
    total, columns = judge.finish([judge.begin(rollout, records)])

    def scores(tokens, lengths):
        rows = answer_rows(role.spec, rollout.prompts, rollout.prompt_lengths, tokens, lengths)
        return np.asarray(member_scores(role.spec, role.weights, *rows))

    ids = [answer_ids(TOKENIZER, "", text)[:5] for text in texts]
    padded = jnp.asarray([row + [0] * (5 - len(row)) for row in ids], jnp.int32)
    own = scores(rollout.tokens, rollout.lengths)
    differences = own - scores(padded, jnp.asarray([len(row) for row in ids], jnp.int32))
    np.testing.assert_allclose(columns["rewards/scorer"], own.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(columns["variance/scorer"], differences.var(0), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(total, own.mean(0) - differences.std(0), rtol=2e-3, atol=1e-4)
    with pytest.raises(UserError, match='no "completion"'):
        judge.begin(rollout, [{"prompt": ""}] * 4)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(**stages):
    config = experiment()
    config.stages.base = stage("sft", init="scratch", tokenizer="x", data="x")
    config.stages.one = stage("reward", init="base", data="x", lora=FEW)
    config.stages.many = stage("reward", init="base", data="x", lora=FEW, members=2)
    config.stages.posterior = stage("laplace", subject="one")
    for name, fields in stages.items():
        config.stages[name] = fields
    with pytest.raises(UserError) as caught:
        validate(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: stage("reward", init="base", data="x", members=2), "set lora.rank"),
        (lambda: stage("reward", init="base", data="x", members=0, lora=FEW), "members"),
        (lambda: stage("reward", init="base", data="x", members=2, lora=FEW, schema="label"), "one classifier"),
        (lambda: stage("reward", init="base", data="x", members=2, lora=FEW, privacy=dict(epsilon=1.0)), "one model"),
        (lambda: stage("sft", init="many", data="x"), "an ensemble"),
        (
            lambda: stage("ppo", init="base", reward="one", data="x", reward_adjustment=dict(kind="std")),
            "no uncertainty",
        ),
        (lambda: stage("ppo", init="base", reward="many", data="x", reward_adjustment=dict(kind="sd")), "worst"),
        (lambda: stage("ppo", init="base", reward="many", data="x", reward_adjustment=dict(kind="std", k=-1.0)), "k"),
        (
            lambda: stage("ppo", init="base", reward="many,posterior", data="x", reward_adjustment=dict(kind="worst")),
            "posterior has no members",
        ),
        (
            lambda: stage(
                "ppo", init="base", reward="many", data="x", reward_adjustment=dict(kind="std", chosen_by="base")
            ),
            "overoptimization stage",
        ),
    ],
)
def test_what_no_ensemble_can_be_is_refused_in_one_line(made, words):
    message = refused(checked=made())
    assert words in message and "\n" not in message


@pytest.mark.parametrize("subject", ["nowhere", "base"])
def test_a_posterior_of_no_scorer_is_refused_wherever_it_is_named_first(subject):
    adjustment = dict(kind="worst")
    policy = stage("ppo", init="base", reward="late,many", data="x", reward_adjustment=adjustment)
    assert f'stages.late.subject is "{subject}"' in refused(policy=policy, late=stage("laplace", subject=subject))


def test_a_pessimistic_cost_needs_a_cost_that_knows_its_uncertainty():
    costs = {"cost": stage("cost", init="base", data="x", lora=FEW)}
    constraint = dict(cost="cost", adjustment=dict(kind="std", k=1.0))
    assert "no uncertainty" in refused(
        **costs, ppo=stage("ppo", init="base", reward="one", data="x", constraint=constraint)
    )
