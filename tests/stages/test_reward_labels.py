import json
import math

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf_jax.config import experiment, stage
from rlhf_jax.data import load_tokenizer, train_tokenizer
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.reward_labels import label_objective, labelled_texts, place_windows, show_window, window_length

WINDOW = 16
SPEC = RoleSpec(
    TransformerConfig(vocab_size=300, layers=1, width=16, heads=1, kv_heads=1, head_dim=16, ffn=32, context=64)
)
TEXTS = ["no.", *(f"It was the {i}th film of the year, and not the best of them." for i in range(39))]


@pytest.fixture
def context(tmp_path):
    """A reward stage on 40 texts sorted by their labels, the first one short."""
    path = tmp_path / "labels.jsonl"
    rows = [{"id": f"review {i}", "text": text, "label": int(i < 20)} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = experiment()
    config.stages.classifier = stage("reward", init="base", data=str(path), schema="label", sequence_length=WINDOW)
    return Context("classifier", config, tmp_path, "")


@pytest.fixture
def tokenizer(tmp_path):
    train_tokenizer(TEXTS, tmp_path / "tokenizer.model", 300)
    return load_tokenizer(tmp_path / "tokenizer.model")


@pytest.fixture
def texts(context, tokenizer):
    return labelled_texts(context, SPEC, tokenizer, context.config.data)


def placed(context, texts, rows, epochs):
    batch = place_windows(context, texts, np.asarray(rows), np.asarray(epochs), make_mesh(1, 1, 1, jax.devices()[:1]))
    return {name: np.asarray(x) for name, x in batch.items()}


def test_texts_are_cut_to_the_longest_window_and_a_short_one_ends_with_eos(context, tokenizer, texts):
    assert texts["tokens"].shape == (40, WINDOW) and texts["positive"].tolist() == [True] * 20 + [False] * 20
    short = [*tokenizer.encode_prompt("no."), tokenizer.eos_id]
    assert texts["tokens"][0].tolist() == short + [0] * (WINDOW - len(short))
    assert texts["lengths"].tolist() == [len(short)] + [WINDOW] * 39
    assert texts["tokens"][5].tolist() == tokenizer.encode_prompt(TEXTS[5])[:WINDOW]


def test_a_limit_takes_both_ends_of_sorted_data(context, tokenizer, texts):
    some = labelled_texts(context, SPEC, tokenizer, context.config.data, limit=10)
    assert some["ids"].tolist() == [f"review {i}" for i in range(0, 40, 4)]
    assert some["positive"].sum() == 5
    assert (some["tokens"] == texts["tokens"][::4]).all()
    assert len(labelled_texts(context, SPEC, tokenizer, context.config.data, limit=400)["lengths"]) == 40


def test_windows_are_uniform_from_a_quarter_to_the_whole(context):
    drawn = [window_length(context, f"review {i}", epoch) for i in range(1000) for epoch in range(3)]
    lengths, counts = np.unique(drawn, return_counts=True)
    assert lengths.tolist() == list(range(WINDOW // 4, WINDOW + 1))
    assert chisquare(counts).pvalue > 1e-3


def test_a_window_is_its_record_s_and_its_epoch_s_alone(context, texts):
    batch = placed(context, texts, [3, 7, 0, 3], [0, 0, 0, 1])
    expected = [window_length(context, f"review {i}", epoch) for i, epoch in ((3, 0), (7, 0), (0, 0), (3, 1))]
    assert batch["lengths"].tolist() == np.minimum(expected, texts["lengths"][[3, 7, 0, 3]]).tolist()
    assert batch["lengths"][0] != batch["lengths"][3]
    other = placed(context, texts, [9, 3], [2, 0])
    for name, x in batch.items():
        np.testing.assert_array_equal(other[name][1], x[0])
    for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
        assert (row[length:] == 0).all()


def test_loss_and_accuracy_are_those_of_a_loop_over_single_texts(context, texts):
    batch = placed(context, texts, [1, 30, 20, 5, -1], [0, 1, 0, 0, 0])
    weights = {"base": init_base(SPEC.config, key=jax.random.key(0)), "head": init_head(16, 1.0, key=jax.random.key(1))}
    objective = jax.jit(label_objective(SPEC))
    out = objective({}, weights, batch)
    losses, right = [], 0
    for i in range(4):
        alone = {name: x[i : i + 1] for name, x in batch.items()}
        # The loss of a positive text, -log sigmoid(s), gives its score back: s = -log(exp(loss) - 1).
        as_positive = objective({}, weights, {**alone, "positive": np.asarray([True])})
        score = -math.log(math.expm1(float(as_positive.losses[0])))
        signed = score if batch["positive"][i] else -score
        losses.append(math.log1p(math.exp(-signed)))
        right += signed > 0
    np.testing.assert_allclose(out.losses, [*losses, 0.0], rtol=2e-5)
    assert out.weights.tolist() == [1, 1, 1, 1, 0]
    total, count = out.metrics["loss/train"]
    assert (float(total), float(count)) == (pytest.approx(sum(losses), rel=1e-5), 4)
    assert [float(x) for x in out.metrics["accuracy/train"]] == [right, 4]


def test_the_window_shown_is_the_first_one_judged(context, tokenizer):
    record = {"id": "review 5", "text": TEXTS[5], "label": True}
    length = window_length(context, "review 5", 0)
    shown = show_window(context, tokenizer, record, 5)
    assert shown.startswith(f"{length} tokens: 0 masked")
    assert shown.endswith(tokenizer.decode(tokenizer.encode_prompt(TEXTS[5])[:length]))
