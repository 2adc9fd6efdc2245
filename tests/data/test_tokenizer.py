import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rlhf_jax.data import load_tokenizer, train_tokenizer
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
    return load_tokenizer(path)


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


def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer, texts):
    for text in [*NASTY, texts[2]]:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert all(tokenizer.token_bytes(index) == b"" for index in [*range(7), tokenizer.vocab_size])


def test_special_tokens_are_parsed_in_rendered_text_only(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("é 🎉\u2581x"), tokenizer.eos_id, tokenizer.fim_middle_id]
    assert tokenizer.encode_rendered("<s>é 🎉\u2581x</s><fim_middle>") == ids
    for text in NASTY:
        spans = tokenizer.rendered_spans(text)
        assert spans[0] == tokenizer.encode_rendered(text)
        assert "".join(text[begin:end] for begin, end in sorted(set(spans[1]))) == text


def test_prompts_start_with_bos_and_texts_end_with_eos_only(tokenizer):
    assert tokenizer.encode_prompt("x") == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert tokenizer.encode_prompt("") == [tokenizer.bos_id]
    assert (tokenizer.prefix, tokenizer.stop_ids) == ((1,), (2,))
    assert tokenizer.pad_note == "declared" and tokenizer.chat_template is None


def test_a_saved_folder_is_the_same_tokenizer(tokenizer, tmp_path):
    # transformers 5.23 loads this folder and gives the same ids for these texts but the spelled tokens and U+2581,
    # for which it has no way: checked by hand with AutoTokenizer.
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.identity == tokenizer.identity == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert (again.pad_id, again.bos_id, again.eos_id, again.unk_id) == (0, 1, 2, 3)
    assert [again.encode(text) for text in NASTY] == [tokenizer.encode(text) for text in NASTY]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["pad_token"] == "<pad>"
    assert config["add_prefix_space"] is False


def test_newline_and_indentation_are_two_tokens(tokenizer):
    assert len(tokenizer.encode("):\n        return")) == len(tokenizer.encode("):\n")) + 2
    assert len(tokenizer.encode("):\n")) == 1


def test_same_texts_give_the_same_bytes(tokenizer, texts, tmp_path):
    train_tokenizer(iter(texts), tmp_path / "again.model", 1024)
    assert load_tokenizer(tmp_path / "again.model").identity == tokenizer.identity
    assert tokenizer.vocab_size == 1024
    train_tokenizer(texts[:2], tmp_path / "other.model", 1024)
    assert load_tokenizer(tmp_path / "other.model").identity != tokenizer.identity


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
            hard_vocab_limit=False,
            minloglevel=2,
            **{"vocab_size": 20} | options,
        )
    return path


FIM = {"control_symbols": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]}  # what makes a model one of ours


def test_pad_missing_in_our_own_model_is_refused_with_the_ids(tmp_path):
    path = foreign_model(tmp_path / "no_pad.model", **FIM)  # SentencePiece's default: unk 0, bos 1, eos 2, no pad
    with pytest.raises(UserError, match="three different ids, got pad=-1 bos=1 eos=2: train the model again"):
        load_tokenizer(path)


def with_pad_as_eos(path):
    model = ModelProto.FromString(path.read_bytes())
    model.trainer_spec.pad_piece = model.trainer_spec.eos_piece
    path.write_bytes(model.SerializeToString())
    return path


def test_pad_equal_to_eos_in_our_own_model_is_refused(tmp_path):
    path = with_pad_as_eos(foreign_model(tmp_path / "pad_is_eos.model", **FIM))
    with pytest.raises(UserError, match="three different ids, got pad=2 bos=1 eos=2"):
        load_tokenizer(path)


def test_a_foreign_model_gets_a_pad_that_is_neither_eos_nor_bos(tmp_path):
    without = load_tokenizer(foreign_model(tmp_path / "no_pad.model"))
    same = load_tokenizer(with_pad_as_eos(foreign_model(tmp_path / "pad_is_eos.model")))
    spare = load_tokenizer(foreign_model(tmp_path / "spare.model", control_symbols=["<unused0>"]))
    assert (without.pad_id, without.pad_note) == (same.pad_id, same.pad_note) == (without.unk_id, "unk")
    assert (spare.pad_id, spare.pad_note) == (3, "reserved token <unused0>")
    assert without.decode([without.pad_id, *without.encode("a b"), without.pad_id]) == "a b"


def test_a_foreign_model_keeps_its_own_reading_of_text(tmp_path):
    path = foreign_model(tmp_path / "t.model", byte_fallback=True, control_symbols=["<e>", "<e>x"], vocab_size=290)
    tokenizer = load_tokenizer(path)
    alone = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("a b", "a\u2581b", "é g"):
        assert tokenizer.encode(text) == alone.encode(text)
    ids, spans = tokenizer.rendered_spans("<e>xa b<e>é")  # the longest special token; the dummy space has no width
    assert ids == [4, *alone.encode("a b"), 3, *alone.encode("é")]
    assert spans[0] == (0, 4) and [s for s in spans if s[0] < s[1]][1:3] == [(4, 5), (5, 7)] and spans[-1] == (10, 11)
    with pytest.raises(UserError, match="the SentencePiece model rewrites text"):
        tokenizer.rendered_spans("a\u2581b  c")


def test_a_foreign_model_without_bos_starts_with_eos(tmp_path):
    options = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "byte_fallback": False}
    tokenizer = load_tokenizer(foreign_model(tmp_path / "t5.model", **options))
    assert (tokenizer.bos_id, tokenizer.prefix, tokenizer.start_id) == (None, (), tokenizer.eos_id)
    assert tokenizer.encode_prompt("") == [1]
    with pytest.raises(UserError, match="nothing says which token ends a text"):
        load_tokenizer(foreign_model(tmp_path / "no_eos.model", eos_id=-1))


def test_fim_ids_are_none_where_the_model_has_none_that_text_cannot_spell(tmp_path):
    without = load_tokenizer(foreign_model(tmp_path / "plain.model", pad_id=3))
    assert without.fim_prefix_id is None
    spelled = foreign_model(tmp_path / "spelled.model", pad_id=3, user_defined_symbols=["<fim_prefix>"])
    assert load_tokenizer(spelled).fim_prefix_id is None


LLAMA2 = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.mark.skipif(not LLAMA2.exists(), reason="the Llama 2 model is not here")
def test_llama_2_encodes_as_its_reference():
    tokenizer = load_tokenizer(LLAMA2 / "llama2.model")
    pairs = json.loads((LLAMA2 / "llama2_reference.json").read_text(encoding="utf-8"))["pairs"]
    assert len(pairs) == 18
    for text, ids in pairs:
        assert tokenizer.encode(text) == ids
        assert b"".join(map(tokenizer.token_bytes, ids)) == b" " + text.encode()
        assert tokenizer.rendered_spans(text)[0] == ids
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.pad_note) == (32000, 0, "unk")
    assert {1, 2}.isdisjoint(tokenizer.encode("<s>hello</s>"))
    assert tokenizer.encode_rendered("<s>hello</s>") == [1, *tokenizer.encode("hello"), 2]


def test_a_checkpoint_folder_with_a_sentencepiece_model(tmp_path):
    symbols = ["<|user|>", "<|end|>"]
    model = foreign_model(tmp_path / "tokenizer.model", user_defined_symbols=symbols)
    user, end = (load_tokenizer(model).encode(f"a{text}")[-1] for text in symbols)
    config = {"eos_token": "<|end|>", "pad_token": "[PAD]", "add_bos_token": False, "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": ["<|user|>"]}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": load_tokenizer(model).vocab_size}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.prefix) == (end, (end, 2), ())
    assert (tokenizer.pad_id, tokenizer.pad_note) == (tokenizer.vocab_size - 1, "declared")
    assert {user, end}.isdisjoint(tokenizer.encode("a<|user|><|end|>"))  # though SentencePiece itself would parse them
    assert tokenizer.encode_rendered("<|user|>[PAD]<|end|>") == [user, tokenizer.pad_id, end]
    assert tokenizer.decode([user, tokenizer.pad_id, *tokenizer.encode("a b"), end, 9999]) == "a b"
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.identity, again.stop_ids, again.pad_id) == (tokenizer.identity, (end, 2), tokenizer.pad_id)
    shutil.copy(model, tmp_path / "saved" / "alone.model")
    assert again.identity != load_tokenizer(tmp_path / "saved" / "alone.model").identity
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(UserError, match="eos_token '<absent>' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_a_lone_surrogate_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_missing_or_foreign_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")
