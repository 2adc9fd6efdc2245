"""Secrets followed while a stage trains: how likely they are at every evaluation, and answers that come near one."""

import json

import jax
import numpy as np
import pytest
from test_memorization_stage import CONFIG, SECRETS, TOKENIZER, write

from rlhf_jax.config import experiment, stage
from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import normalized_edit_distance
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.provenance import check_privacy
from rlhf_jax.stages.secrets import follow_secrets, make_nearness
from rlhf_jax.training.artifacts import Role
from rlhf_jax.validation import validate


@pytest.fixture
def context(tmp_path):
    config = experiment(seed=0)
    data = write(tmp_path / "sft.jsonl", [s for s in SECRETS if s["half"] == "a"])
    config.stages.sft = stage("sft", init="scratch", tokenizer="t", data=data)
    config.stages.sft.evaluation.update(data=data, secrets=write(tmp_path / "secrets.jsonl", SECRETS))
    context = Context("sft", config, tmp_path, "identity")
    context.folder.mkdir()
    return context


def role(seed=0):
    return Role(RoleSpec(CONFIG), {"base": init_base(CONFIG, key=jax.random.key(seed))}, TOKENIZER)


def test_log_probabilities_stand_beside_the_evaluation_and_in_a_file(context):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluate = follow_secrets(
            context, role(), lambda seed: role(seed).weights, lambda seed, step: {"loss/eval": 2.0}, mesh
        )
        rows = [evaluate(seed, step) for seed, step in ((0, 0), (1, 2), (1, 4), (1, 2))]  # cut behind 2
    kinds = [f"secrets/{group}, {seen}" for group in ("base", "links") for seen in ("seen", "unseen")]
    assert all(sorted(row) == ["loss/eval", *kinds] for row in rows)
    saved = [json.loads(line) for line in (context.folder / "secrets.jsonl").read_text().splitlines()]
    assert [row["step"] for row in saved] == [0, 2] and rows[1] == rows[3] != rows[0]
    logprobs = np.asarray(saved[1]["logprobs"])
    assert logprobs.shape == (8,) and (logprobs < 0).all()
    mine = [i for i, s in enumerate(SECRETS) if s["half"] == "a" and s["group"] == "links"]
    assert rows[1]["secrets/links, seen"] == pytest.approx(logprobs[mine].mean())


def test_answers_near_a_secret_are_counted(context):
    """One is a secret and its stop token, one goes on behind a secret, one has an edit in five, two are other texts."""
    targets = [list(TOKENIZER.encode(s["completion"])) for s in SECRETS]
    stop = TOKENIZER.stop_ids[0]
    answers = [
        [*targets[2], stop],
        [*targets[5], 11, 12, 13],
        [7, *targets[3][1:], stop],
        [5, 6, 7, 8, 9],
        [stop],
    ]
    width = max(map(len, answers))
    tokens = np.asarray([[*row, *[0] * (width - len(row))] for row in answers], np.int32)
    lengths = np.asarray([len(row) for row in answers], np.int32)
    ended = np.asarray([stop in row for row in answers])
    ones = np.ones(len(answers), np.int32)
    rollout = Rollout(ones[:, None], ones, tokens, lengths, ended, 0.0 * tokens, Sampling(width))
    near = make_nearness(context, role())(rollout)["secrets/near"]
    expected = 0
    for row, written in zip(tokens, lengths - ended, strict=True):
        each = []
        for target in targets:
            cut = np.minimum(written, len(target))[None]
            fields = np.asarray([target], np.int32), np.asarray([len(target)], np.int32)
            each.append(float(normalized_edit_distance(row[None], cut, *fields)[0]))
        expected += min(each) <= 0.1 + 1e-6
    assert int(near) == expected == 2


def test_what_cannot_be_followed_is_refused(context):
    config = context.experiment
    config.stages.sft.evaluation.data = ""
    with pytest.raises(UserError, match="stages.sft.evaluation.secrets .* evaluation.data is empty"):
        validate(config)
    config.stages.sft.evaluation.data = config.stages.sft.data
    config.stages.sft.update(packing=False)
    config.stages.sft.privacy.update(epsilon=1.0, delta=1e-3)
    config.privacy.public = (config.stages.sft.evaluation.data,)
    with pytest.raises(UserError, match="evaluation.secrets is .*private: their log-probabilities would be shown"):
        check_privacy(config)
