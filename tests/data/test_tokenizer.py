import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rlhf_jax.data import Tokenizer, train_tokenizer
from rlhf_jax.errors import UserError

NASTY = [
    "",
    " ",
    "\n",
    "    leading and trailing   ",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n        y = 'é 🎉 日本'\r\n\0\x0c end\u2028",
    "\u2581 \u2581\u2581x\u2585",  # SentencePiece's own markers
    "<pad><s></s><unk><fim_prefix><fim_suffix><fim_middle><0x41>",
    "no newline at the end",
]


@pytest.fixture(scope="module")
def texts():
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text() for name in ("argparse.py", "inspect.py", "json/decoder.py")]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(texts, path, 1024)
    return Tokenizer(path)


def test_code_round_trips_exactly(tokenizer, texts):
    unseen = Path(sysconfig.get_path("stdlib"), "ast.py").read_text()
    for text in [*NASTY, *texts, unseen]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_spells_a_special_token(tokenizer):
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}
    special |= {tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id}
    assert special == set(range(7))
    for text in NASTY:
        assert special.isdisjoint(tokenizer.encode(text))


def test_decode_skips_pad_bos_eos(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("x = 1\n"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "x = 1\n"


def test_cut_at_a_line_never_changes_the_tokens(tokenizer, texts):
    lines = texts[2].splitlines(keepends=True)
    for cut in range(1, 150):
        if lines[cut].strip():
            head, tail = "".join(lines[:cut]), "".join(lines[cut:200])
            assert tokenizer.encode(head) + tokenizer.encode(tail) == tokenizer.encode(head + tail)


def test_newline_and_indentation_are_two_tokens(tokenizer):
    assert len(tokenizer.encode("):\n        return")) == len(tokenizer.encode("):\n")) + 2
    assert len(tokenizer.encode("):\n")) == 1


def test_same_texts_give_the_same_bytes(tokenizer, texts, tmp_path):
    train_tokenizer(iter(texts), tmp_path / "again.model", 1024)
    assert Tokenizer(tmp_path / "again.model").identity == tokenizer.identity
    assert tokenizer.vocab_size == 1024
    train_tokenizer(texts[:2], tmp_path / "other.model", 1024)
    assert Tokenizer(tmp_path / "other.model").identity != tokenizer.identity


def test_vocab_size_too_large_names_both_numbers(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size 5000 is too large, the texts support \d+"):
        train_tokenizer(["def f():\n    return 1\n"] * 5, tmp_path / "t.model", 5000)
    with pytest.raises(UserError, match="vocab_size 100"):
        train_tokenizer(["def f():\n    return 1\n"] * 5, tmp_path / "t.model", 100)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], tmp_path / "t.model", 300)
    assert not (tmp_path / "t.model").exists()


def foreign_model(path, **options):
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"] * 9),
            model_writer=stream,
            model_type="bpe",
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


def test_pad_missing_is_refused_with_the_ids(tmp_path):
    path = foreign_model(tmp_path / "no_pad.model")  # SentencePiece's default: unk 0, bos 1, eos 2, no pad
    with pytest.raises(UserError, match="three different ids, got pad=-1 bos=1 eos=2: train the model again"):
        Tokenizer(path)


def test_pad_equal_to_eos_is_refused(tmp_path):
    path = foreign_model(tmp_path / "pad_is_eos.model")
    model = ModelProto.FromString(path.read_bytes())
    model.trainer_spec.pad_piece = model.trainer_spec.eos_piece
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="three different ids, got pad=2 bos=1 eos=2"):
        Tokenizer(path)


def test_fim_ids_are_none_where_the_model_has_none_that_text_cannot_spell(tmp_path):
    without = Tokenizer(foreign_model(tmp_path / "plain.model", pad_id=3))
    assert without.fim_prefix_id is None
    spelled = foreign_model(tmp_path / "spelled.model", pad_id=3, user_defined_symbols=["<fim_prefix>"])
    assert Tokenizer(spelled).fim_prefix_id is None


def test_missing_or_foreign_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")
