import json

import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data import load_tokenizer, train_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.pipeline import plan
from rlhf_jax.stages import tokenizer as tokenizer_stage
from rlhf_jax.stages.context import Context

TEXTS = [
    f"It was the {i}th film of the year, and {'the best' if i % 3 else 'not the best'} of them.\n" for i in range(120)
]


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def made(folder, records, **fields):
    """(the stage's folder, its figures) of a run by itself."""
    config = experiment()
    config.stages.words = stage("tokenizer", data=str(records), **{"vocab_size": 300, **fields})
    context = Context("words", config, folder, "")
    context.folder.mkdir(parents=True)
    tokenizer_stage.check(context)
    return context.folder, tokenizer_stage.run(context)["figures"]


def test_it_is_the_tokenizer_that_prepare_trains_on_the_same_texts(records, tmp_path):
    folder, figures = made(tmp_path / "work", records)
    kept = [text for number, text in enumerate(TEXTS, 1) if number % 50]
    train_tokenizer(kept, tmp_path / "same.model", 300)
    assert (folder / "tokenizer.model").read_bytes() == (tmp_path / "same.model").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]
    assert (figures["vocab_size"], figures["records"], figures["records_held_out"]) == (300, 118, 2)
    assert figures["bytes"] == sum(len(text.encode()) for text in kept)


def test_bytes_a_token_are_of_texts_it_has_not_seen(records, tmp_path):
    folder, figures = made(tmp_path / "work", records)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    held_out = [TEXTS[49], TEXTS[99]]
    tokens = sum(len(tokenizer.encode(text)) for text in held_out)
    assert figures["bytes_per_token"] == sum(map(len, held_out)) / tokens
    few = tmp_path / "few.jsonl"
    few.write_text("".join(records.read_text().splitlines(keepends=True)[:49]))
    assert "bytes_per_token" not in made(tmp_path / "few", few)[1]


def test_no_more_than_max_bytes_is_read(records, tmp_path):
    _, figures = made(tmp_path / "work", records, max_bytes=3000)
    assert 3000 - max(map(len, TEXTS)) < figures["bytes"] <= 3000


def test_an_sft_stage_waits_for_it(records, tmp_path):
    config = experiment()
    shape = dict(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, ffn=32, context=16)
    reads = dict(tokenizer="words/tokenizer.model", data=str(records), schema="text", loss_on="all")
    config.stages.base = stage("sft", init="scratch", sequence_length=16, model=shape, **reads)
    config.stages.words = stage("tokenizer", data=str(records), vocab_size=300)
    shown = plan(config, tmp_path / "work")
    assert "[1/2] words (tokenizer)" in shown and "examples: once words/tokenizer.model is there" in shown
    parameters = 300 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16  # tied embeddings; q, k, v, o; feed-forward; norms
    assert f"{parameters / 1e6:.2f}M parameters" in shown


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 5000}, "vocab_size 5000 is too large, the texts support [0-9]+: .*give more text"),
        ({"vocab_size": 100}, "cannot train a tokenizer of vocab_size 100 .*give more text or another vocab_size"),
        ({"max_bytes": 10}, "cannot train a tokenizer of vocab_size 300 .*give more text"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
    ],
)
def test_too_little_text_is_one_line_with_the_remedy(records, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        made(tmp_path / "work", changes.pop("data", records), **changes)
    assert "\n" not in str(error.value)


def test_a_malformed_record_is_named_or_skipped(records, tmp_path):
    with records.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(UserError, match=r'texts.jsonl:121: field "text" is int'):
        made(tmp_path / "raise", records)
    assert made(tmp_path / "skip", records, on_error="skip")[1]["skipped"] == 1
