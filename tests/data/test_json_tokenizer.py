import json
import shutil
from pathlib import Path

import pytest

from rlhf_jax.data.tokenizer import check_vocabulary, load_tokenizer
from rlhf_jax.data.tokenizer_base import choose_pad
from rlhf_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["qwen", "llama3", "gpt2", "llama2", "unigram"]


def reference(name):
    return json.loads((FIXTURES / name / "reference.json").read_text(encoding="utf-8"))


def spec_of(name):
    return json.loads((FIXTURES / name / "tokenizer.json").read_text(encoding="utf-8"))


def edited(tmp_path, name, spec=None, **config):
    """A copy of a fixture with another tokenizer.json, or with fields of tokenizer_config.json set or None."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    if spec is not None:
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | config
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    return request.param, load_tokenizer(FIXTURES / request.param)


def test_ids_and_text_are_those_of_transformers(named):
    name, tokenizer = named
    expected = reference(name)
    assert tokenizer.vocab_size == expected["vocab_size"]
    compared = 0
    for text, plain, rendered, decoded in expected["texts"]:
        assert tokenizer.encode_rendered(text) == rendered, text
        assert tokenizer.rendered_spans(text)[0] == rendered
        # transformers, asked to split special tokens, still makes some of ordinary text: Unigram's own pieces, and
        # fill-in-the-middle tokens without the flag. Ours never does (below).
        if (tokenizer.special_ids - {tokenizer.unk_id}).isdisjoint(plain):
            compared += 1
            assert tokenizer.encode(text) == plain, text
            assert tokenizer.decode(plain) == decoded
    assert compared >= 14


def test_no_text_spells_a_special_token(named):
    name, tokenizer = named
    for text, *_ in reference(name)["texts"]:
        assert tokenizer.special_ids & set(tokenizer.encode(text)) <= {tokenizer.unk_id}
    for text, index in tokenizer._controls.items():
        assert index in tokenizer.encode_rendered(f"a{text}b")
        if index != tokenizer.unk_id or name == "gpt2":
            assert index not in tokenizer.encode(f"a{text}b")


def test_bytes_of_tokens_are_the_bytes_of_the_text(named):
    name, tokenizer = named
    for text, *_ in reference(name)["texts"]:
        ids = tokenizer.encode("a" + text)
        if tokenizer.unk_id not in ids:
            joined = b"".join(map(tokenizer.token_bytes, ids))
            assert joined.removeprefix(b" ").decode() == tokenizer.decode(ids)
    assert all(tokenizer.token_bytes(index) == b"" for index in tokenizer.special_ids)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_every_prompt_has_a_first_token_and_the_prefix_of_transformers(named):
    name, tokenizer = named
    a = tokenizer.encode("a")
    whole = reference(name)["a"]
    assert tokenizer.encode_prompt("a") == whole[: len(whole) - (name == "unigram")]  # T5 ends its texts by itself
    assert tokenizer.encode_prompt("a") == [*tokenizer.prefix, *a]
    assert tokenizer.encode_prompt("") == [tokenizer.start_id]


ROLES = {  # spelling of bos, eos, pad; how pad was chosen
    "qwen": (None, "<|im_end|>", "<|endoftext|>", "declared"),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        "reserved token <|finetune_right_pad_id|>",
    ),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", "!", "ordinary token 1, a filler only"),
    "llama2": ("<s>", "</s>", "<unk>", "unk"),
    "unigram": (None, "</s>", "<pad>", "declared"),
}


def test_roles(named):
    name, tokenizer = named
    bos, eos, pad, note = ROLES[name]
    spelled = tokenizer._spelling
    assert (tokenizer.bos_id is None) == (bos is None)
    assert bos is None or spelled[tokenizer.bos_id] == bos
    assert (spelled[tokenizer.eos_id], spelled[tokenizer.pad_id], tokenizer.pad_note) == (eos, pad, note)
    assert tokenizer.pad_id not in (tokenizer.eos_id, tokenizer.bos_id)
    assert tokenizer.stop_ids[0] == tokenizer.eos_id
    further = {"qwen": ["<|endoftext|>"], "llama3": ["<|end_of_text|>"]}.get(name, [])
    assert [spelled[i] for i in tokenizer.stop_ids[1:]] == further
    assert (tokenizer.fim_prefix_id is not None) == (name == "qwen")


def test_a_filler_that_is_ordinary_text_stays_in_the_text():
    tokenizer = load_tokenizer(FIXTURES / "gpt2")
    assert tokenizer.decode(tokenizer.encode("Hi!")) == "Hi!"
    assert tokenizer.token_bytes(tokenizer.pad_id) == b"!"


def test_saved_folders_load_the_same(named, tmp_path):
    _, tokenizer = named
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for field in ("identity", "pad_id", "pad_note", "stop_ids", "prefix", "chat_template", "special_tokens"):
        assert getattr(again, field) == getattr(tokenizer, field), field
    again.save(tmp_path)  # onto itself
    assert load_tokenizer(tmp_path).identity == tokenizer.identity


def test_a_tokenizer_json_alone(tmp_path):
    shutil.copy(FIXTURES / "llama3" / "tokenizer.json", tmp_path)
    alone = load_tokenizer(tmp_path / "tokenizer.json")
    assert alone.eos_id == alone._controls["<|end_of_text|>"]  # its name, nothing declares it
    assert alone.prefix == (alone.bos_id,)
    alone.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity == alone.identity


def test_identity_is_of_vocabulary_special_tokens_and_template(tmp_path):
    base = load_tokenizer(FIXTURES / "qwen")
    assert load_tokenizer(edited(tmp_path / "a", "qwen", model_max_length=5)).identity == base.identity
    assert load_tokenizer(edited(tmp_path / "b", "qwen", chat_template="x")).identity != base.identity
    assert load_tokenizer(edited(tmp_path / "c", "qwen", eos_token="<|endoftext|>")).identity != base.identity
    assert load_tokenizer(FIXTURES / "qwen", chat_template="x").identity != base.identity
    merges = spec_of("qwen")
    merges["model"]["merges"] = merges["model"]["merges"][:-1]
    assert load_tokenizer(edited(tmp_path / "d", "qwen", merges)).identity != base.identity


def test_merges_that_end_in_a_special_token_do_not_make_it(tmp_path):
    spec = spec_of("llama2")
    vocabulary = spec["model"]["vocab"]
    for piece in ("<", "/", ">", "</", "s>"):
        vocabulary.setdefault(piece, len(vocabulary))
    spec["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    tokenizer = load_tokenizer(edited(tmp_path, "llama2", spec))
    eos = tokenizer.eos_id
    assert tokenizer._rendered.model.tokenize("</s>")[0].id == eos  # the trap is real
    assert eos not in tokenizer.encode("a</s>")
    assert tokenizer.encode("a</s>")[-2:] == [vocabulary["</"], vocabulary["s>"]]
    assert eos in tokenizer.encode_rendered("a</s>")


def test_a_whole_word_vocabulary_does_not_spell_special_tokens(tmp_path):
    spec = spec_of("gpt2")
    spec["model"]["ignore_merges"] = True  # then a whole pre-token that is in the vocabulary is taken as it is
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = load_tokenizer(edited(tmp_path, "gpt2", spec))
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_add_bos_token_is_honoured(tmp_path):
    assert load_tokenizer(edited(tmp_path / "a", "llama2", add_bos_token=False)).prefix == ()
    assert load_tokenizer(edited(tmp_path / "b", "gpt2", add_bos_token=True)).prefix == (0,)
    with pytest.raises(UserError, match="add_bos_token is true but there is no bos_token"):
        load_tokenizer(edited(tmp_path / "c", "unigram", add_bos_token=True))


def test_pad_declared_as_eos_is_replaced(tmp_path):
    tokenizer = load_tokenizer(edited(tmp_path / "a", "llama2", pad_token="</s>"))
    assert (tokenizer.pad_id, tokenizer.pad_note) == (tokenizer.unk_id, "unk")
    spare = load_tokenizer(edited(tmp_path / "b", "llama3", pad_token="<|eot_id|>"))
    assert spare.pad_note == "reserved token <|finetune_right_pad_id|>"
    new = load_tokenizer(edited(tmp_path / "c", "gpt2", pad_token="[PAD]"))  # only the configuration has it
    assert (new.pad_id, new.pad_note, new.vocab_size) == (350, "declared", 351)


def test_a_filler_is_no_special_token_and_a_pad_no_stop_token(tmp_path):
    assert choose_pad(None, {"<x>": 0}, None, eos=5, bos=1, stop_ids=(5, 2))[0] == 3
    tokenizer = load_tokenizer(edited(tmp_path, "qwen", pad_token=None))  # its <|endoftext|> ends answers
    assert tokenizer.pad_id not in tokenizer.stop_ids and "filler" in tokenizer.pad_note


def test_end_tokens_of_the_generation_config_are_special_whatever_their_flag(tmp_path):
    folder = edited(tmp_path, "qwen")
    end = load_tokenizer(folder)._rendered.token_to_id("</tool_call>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (tokenizer.eos_id, end)
    assert end not in tokenizer.encode("</tool_call>") and tokenizer.decode([end]) == ""


def test_truncation_and_padding_of_the_file_do_not_touch_the_data(tmp_path):
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = edited(tmp_path, "llama2", spec_of("llama2") | {"padding": padding, "truncation": truncation})
    tokenizer, base = load_tokenizer(folder), load_tokenizer(FIXTURES / "llama2")
    for text in ("a", "a longer text"):
        assert tokenizer.encode(text) == base.encode(text)
        assert tokenizer.encode_prompt(text) == base.encode_prompt(text)
    assert tokenizer.pad_note == "declared"


def test_special_tokens_map_counts_where_the_config_is_silent(tmp_path):
    folder = edited(tmp_path, "llama3")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end_header_id|>"}}))
    assert load_tokenizer(folder).special_tokens["eos_token"] == "<|end_header_id|>"


def test_tokens_that_only_the_configuration_has_get_the_next_ids(tmp_path):
    decoder = {"351": {"content": "<b>", "special": True}, "350": {"content": "<a>", "special": True}}
    tokenizer = load_tokenizer(edited(tmp_path, "gpt2", added_tokens_decoder=decoder))
    assert tokenizer.encode_rendered("<b><a>") == [351, 350]
    assert not {350, 351} & set(tokenizer.encode("<b><a>"))


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer.json and no tokenizer.model here"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.json"
    for content, problem in (("{", "not a tokenizer.json"), ("{}", "not a tokenizer.json")):
        broken.write_text(content)
        with pytest.raises(UserError, match=problem):
            load_tokenizer(tmp_path)
    broken.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}))
    with pytest.raises(UserError, match="package cannot read tokenizer.json"):
        load_tokenizer(tmp_path)
    broken.write_text(
        json.dumps(spec_of("llama2") | {"added_tokens": [], "post_processor": None}).replace("</s>", "@@")
    )
    with pytest.raises(UserError, match="nothing says which token ends a text"):
        load_tokenizer(tmp_path)
    folder = edited(tmp_path, "llama3")
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(folder)
    shutil.copy(FIXTURES / "llama3" / "tokenizer_config.json", folder)
    for value, problem in ((7, r"eos_token_id 7 \('.*'\) is no special token"), ("x", "make it an id or a list")):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(UserError, match=problem):
            load_tokenizer(folder)
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        load_tokenizer(FIXTURES / "qwen").encode("a\ud800")


def test_a_decoder_without_bytes_is_refused(tmp_path):
    folder = edited(
        tmp_path, "gpt2", spec_of("gpt2") | {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}}
    )
    with pytest.raises(UserError, match="decoder WordPiece does not say which bytes"):
        load_tokenizer(folder).token_bytes(5)


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    tokenizer = load_tokenizer(FIXTURES / "gpt2")
    check_vocabulary(tokenizer, 350, "stages.sft")
    with pytest.raises(
        UserError, match="stages.sft: the tokenizer .* has 350 ids but the model's embedding has 349 rows"
    ):
        check_vocabulary(tokenizer, 349, "stages.sft")
