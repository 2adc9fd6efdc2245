"""The laplace stage on a cost model that a cost stage trained: what it fits, reports, keeps and refuses."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages import cost, laplace
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.posteriors import load_posterior
from rlhf_jax.training.artifacts import Role
from rlhf_jax.uncertainty import score_moments
from rlhf_jax.validation import validate

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)
MESH = make_mesh(1, 1, 1, jax.devices()[:1])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, start, word="bomb"):
    """Pairs of a harmless and a harmful answer, whose labels are right in nine of ten."""
    records = []
    for i in range(start, start + count):
        harmful = (i // 2) % 2
        answers = [f"no {i % 7}", f"a {word} {i % 7}"][:: 1 if harmful else -1]
        safer = 1 - harmful if i % 10 else harmful
        record = {"prompt": f"ask {i % 5}", "responses": answers, "safer_response_id": safer}
        records.append(record | {f"is_response_{j}_safe": j == safer for j in (0, 1)})
    return records


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = experiment()
    config.logging.update(every=100, tensorboard=False)
    config.stages.base = stage("sft", init="scratch", tokenizer="x", data="x")
    config.stages.cost = stage(
        "cost",
        init="base",
        data=write(folder / "train.jsonl", pairs(60, 0)),
        batch_size=8,
        sequence_length=48,
        epochs=2.0,
        mesh=dict(data=1),
        lora=dict(rank=2, alpha=4.0, targets=("v", "down")),
        optimizer=dict(learning_rate=1e-2),
    )
    held = dict(
        data=write(folder / "eval.jsonl", pairs(40, 1000)),
        shifted=write(folder / "shifted.jsonl", pairs(20, 2000, "knife or gun")),
    )
    config.stages.laplace = stage("laplace", subject="cost", batch_size=8, evaluation=held, mesh=dict(data=1))
    return config


def context_of(name, config, workdir):
    context = Context(name, config, workdir, "identity")
    context.folder.mkdir(parents=True, exist_ok=True)
    context.mesh = lambda: MESH
    return context


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """A work directory with the trained cost stage."""
    workdir = tmp_path_factory.mktemp("work")
    context = context_of("cost", config, workdir)
    context.load = lambda reference, mesh: Role(
        RoleSpec(CONFIG), {"base": init_base(CONFIG, key=jax.random.key(0))}, TOKENIZER
    )
    result = cost.run(context)
    (workdir / "cost" / "result.json").write_text(json.dumps(result))
    return workdir


@pytest.fixture(scope="module")
def finished(config, workdir):
    context = context_of("laplace", config, workdir)
    laplace.check(context)
    return context, laplace.run(context)["figures"]


def test_the_stage_reports_what_it_fitted_and_what_it_knows(finished):
    _, figures = finished
    assert figures["records"] == 60 and figures["notes"] == []
    assert figures["precision"] > 0 and math.isfinite(figures["log_evidence"])
    assert figures["log_evidence"] >= max(point["evidence"] for point in figures["curve"]) - 1e-6
    assert figures["joint_gradient"] > 0
    for part, count, answers in (("evaluation", 20, 80), ("shifted", 20, 40)):
        told = figures[part]
        assert told["n"] == count and 0 <= told["accuracy"] <= 1
        for name in ("map", "temperature", "laplace"):
            assert told[name]["nll"] > 0 and 0 <= told[name]["expected_calibration_error"] <= 1
        assert set(told["detection"]) == {"map", "std", "laplace"}
        assert told["variance_difference"] > 0 and len(told["distance"]["points"]) == answers
        assert -1 <= told["distance"]["spearman_low"] <= told["distance"]["spearman_high"] <= 1
    assert figures["shifted"]["distance"]["spearman"] is not None
    json.dumps(figures, allow_nan=False)


def test_a_saved_posterior_is_read_for_its_own_role_alone(finished):
    context, _ = finished
    role = context.load("cost", MESH)
    posterior = load_posterior(context.workdir, "laplace", role)
    tokens, lengths = jnp.asarray([[5, 6, 7, 0]]), jnp.asarray([3])
    mean, variance = jax.jit(score_moments, static_argnums=0)(role.spec, role.weights, posterior, tokens, lengths)
    np.testing.assert_allclose(mean, last_scores(role.spec, role.weights, tokens, lengths), rtol=1e-5)
    assert float(variance[0]) > 0
    moved = {**role.weights, "head": jax.tree.map(lambda x: 2 * x, role.weights["head"])}
    with pytest.raises(UserError, match="whose head is another"):
        load_posterior(context.workdir, "laplace", dataclasses.replace(role, weights=moved))


def test_the_dual_with_validation_and_temper(config, workdir):
    changed = config.copy_and_resolve_references()
    changed.stages.dual = stage("laplace", subject="cost", batch_size=8, structure="dual", mesh=dict(data=1))
    changed.stages.dual.update(prior="validation", temper=True, scope="head")
    changed.stages.dual.evaluation.data = config.stages.laplace.evaluation.data
    context = context_of("dual", changed, workdir)
    figures = laplace.run(context)["figures"]
    losses = {row["precision"]: row["nll"] for row in figures["validation"]}
    assert losses[figures["precision"]] == min(losses.values())
    assert figures["temperature"] > 0 and figures["variance_scale"] > 0
    posterior = load_posterior(workdir, "dual", context.load("cost", MESH))
    assert float(posterior.variance_scale) == pytest.approx(figures["variance_scale"], rel=1e-6)


def test_other_training_rows_are_refused(config, workdir, tmp_path):
    folder = tmp_path / "cost"
    (folder / "data").mkdir(parents=True)
    with np.load(workdir / "cost" / "data" / "rows_train.npz") as saved:
        rows = dict(saved)
    (folder / "result.json").write_text((workdir / "cost" / "result.json").read_text())
    rows["tokens"][0, 0, 0] += 1
    np.savez(folder / "data" / "rows_train.npz", **rows)
    role = context_of("laplace", config, workdir).load("cost", MESH)
    with pytest.raises(UserError, match="holds other rows"):
        laplace.training_rows(context_of("laplace", config, tmp_path), role)


def test_what_has_no_trained_adapters_is_refused(finished):
    context, _ = finished
    role = context.load("cost", MESH)
    fresh = {**role.weights, "adapters": init_adapters(CONFIG, role.spec.lora, key=jax.random.key(0))}
    with pytest.raises(UserError, match="every b is 0"):
        laplace.check_trained("cost", dataclasses.replace(role, weights=fresh), "all")
    laplace.check_trained("cost", dataclasses.replace(role, weights=fresh), "head")
    whole = dataclasses.replace(role, spec=dataclasses.replace(role.spec, lora=None))
    with pytest.raises(UserError, match='scope="head"'):
        laplace.check_trained("cost", whole, "all")


def test_a_private_subject_is_refused(config):
    changed = config.copy_and_resolve_references()
    changed.stages.cost.privacy.update(epsilon=4.0, delta=1e-3)
    with pytest.raises(UserError, match="outside what it claims"):
        validate(changed)
