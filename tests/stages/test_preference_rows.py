"""The rows a preference stage trains on, and the reference log-probabilities it keeps."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages import preference
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role

SHAPE = TransformerConfig(vocab_size=32, layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, context=16)
EOS = 2


def ids(text):
    return [ord(letter) - ord("a") + 3 for letter in text]


class Letters:
    """A tokenizer of the letters a to z."""

    identity = "letters"
    encode = staticmethod(ids)
    encode_prompt = staticmethod(lambda text: [1, *ids(text)])
    eos_id = EOS


PAIRS = [
    {"prompt": "ab", "chosen": "c", "rejected": "de"},
    {"prompt": "a", "chosen": "same", "rejected": "same"},
    {"prompt": "", "chosen": "fgh", "rejected": "i"},
]


def make(tmp_path, records, **fields):
    """(context, role) of a stage on the given records, beside a random model."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = experiment(seed=3)
    config.stages.pref = stage("preference", init="start", data=str(tmp_path / "records.jsonl"), **fields)
    (tmp_path / "work" / "pref").mkdir(parents=True)
    context = Context("pref", config, tmp_path / "work", "identity")
    role = Role(RoleSpec(SHAPE), {"base": init_base(SHAPE, key=jax.random.key(0))}, Letters())
    return context, role


def rows_of(context, role, part="train"):
    return preference._make_rows(context, role, context.config.data, part)


def test_each_answer_stands_behind_its_prompt_and_equal_answers_are_dropped(tmp_path):
    data = rows_of(*make(tmp_path, PAIRS))
    expected = [
        [[1, *ids("abc"), EOS], [1, *ids("abde"), EOS]],
        [[1, *ids("fgh"), EOS], [1, *ids("i"), EOS]],
    ]
    assert data["tokens"].shape == (2, 2, 6)
    for i, j in np.ndindex(2, 2):
        row, length = expected[i][j], data["lengths"][i, j]
        assert data["tokens"][i, j, :length].tolist() == row
        assert not data["tokens"][i, j, length:].any()
    assert data["answer_lengths"].tolist() == [[2, 3], [4, 2]]
    assert (int(data["dropped"]), int(data["skipped"])) == (1, 0)


def test_a_batch_holds_the_answers_by_themselves(tmp_path):
    data = rows_of(*make(tmp_path, PAIRS))
    batch = preference._place(data, np.array([1, 0, -1]), make_mesh(devices=jax.devices()[:1]))
    assert batch["answers"].shape == (3, 2, 4)
    for i, answers in enumerate([["fgh", "i"], ["c", "de"]]):
        for j, answer in enumerate(answers):
            count = int(batch["lengths"][i, j])
            assert batch["answers"][i, j, :count].tolist() == [*ids(answer), EOS]
    assert batch["prompt_lengths"][:2].tolist() == [1, 3]
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0]


def test_the_better_answer_of_a_safety_record_is_the_chosen_one(tmp_path):
    record = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1, "safer_response_id": 0}
    record |= {"is_response_0_safe": True, "is_response_1_safe": False}
    data = rows_of(*make(tmp_path, [record], schema="safety"))
    assert data["tokens"][0, :, :4].tolist() == [[1, *ids("ac"), EOS], [1, *ids("ab"), EOS]]


def test_a_long_record_is_refused_by_its_number_or_dropped(tmp_path):
    records = [*PAIRS, {"prompt": "abcdefgh", "chosen": "ijklmnopq", "rejected": "r"}]
    with pytest.raises(UserError, match="records.jsonl: record 4 has 19 tokens, above 16"):
        rows_of(*make(tmp_path / "raise", records))
    assert int(rows_of(*make(tmp_path / "skip", records, on_error="skip"))["dropped"]) == 2
    with pytest.raises(UserError, match="no record is left to train on"):
        rows_of(*make(tmp_path / "none", records[-1:], on_error="skip"))


def test_unpaired_records_stand_beside_another_ones_answer(tmp_path):
    words = ["b", "cd", "efg", "hijk", "lmnopqrstuvw"]
    records = [{"prompt": "a" * (i + 1), "completion": w, "label": i % 2 == 0} for i, w in enumerate(words[:4])]
    records.append({"prompt": "a", "completion": words[4], "label": "false"})
    data = rows_of(*make(tmp_path, records, loss="kto", schema="unpaired"))
    assert data["desirable"].tolist() == [True, False, True, False, False]
    prompts = [[1, *ids(record["prompt"])] for record in records]
    answers = [[*ids(word), EOS] for word in words]
    partners = []
    for i, prompt in enumerate(prompts):
        own, other = (data["tokens"][i, j, len(prompt) : data["lengths"][i, j]].tolist() for j in range(2))
        assert own == answers[i]
        assert data["tokens"][i, 1, : len(prompt)].tolist() == prompt
        partners.append(next(k for k, answer in enumerate(answers) if other == answer[: SHAPE.context - len(prompt)]))
    assert sorted(partners) == list(range(5)) and all(k != i for i, k in enumerate(partners))
    assert data["tokens"].shape[-1] <= SHAPE.context


@pytest.fixture
def counted(monkeypatch):
    """The number of times a reference is scored."""
    calls, score = [], preference._score_reference
    monkeypatch.setattr(preference, "_score_reference", lambda *args: calls.append(1) or score(*args))
    return calls


def test_reference_logprobs_are_scored_once_and_anew_for_another_reference(tmp_path, counted):
    context, role = make(tmp_path, PAIRS, batch_size=4)
    mesh = make_mesh(devices=jax.devices()[:1])
    context.bases["other"] = object()

    def known(role):
        data = rows_of(context, role)
        with jax.set_mesh(mesh):
            preference._precompute_reference(context, role, {"train": data}, mesh)
        return data["reference"]

    first = known(role)
    assert first.shape == (2, 2) and first.dtype == np.float32 and (first < 0).all()
    assert not context.bases  # a base that the policy does not read is let go
    np.testing.assert_array_equal(known(role), first)
    assert len(counted) == 1
    other = Role(role.spec, {"base": init_base(SHAPE, key=jax.random.key(1))}, role.tokenizer)
    assert not np.allclose(known(other), first)
    assert len(counted) == 2


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
    context, role = make(tmp_path, PAIRS, reference="other")
    other = SimpleNamespace(tokenizer=SimpleNamespace(identity="words"))
    monkeypatch.setattr(Context, "load", lambda *args: other)
    with pytest.raises(UserError, match='stages.pref.reference "other" has another tokenizer than init "start"'):
        preference._load_reference(context, role, make_mesh(devices=jax.devices()[:1]))
