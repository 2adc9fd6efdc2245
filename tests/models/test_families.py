"""Checkpoint formats: each family computes what the reference implementation computes, and its config says so."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer, TransformerConfig
from rlhf_jax.models.config import RopeScaling
from rlhf_jax.models.families import FAMILIES, Layout, stored_tensors
from rlhf_jax.models.family_json import from_json, to_json
from rlhf_jax.models.leaves import base_leaves
from rlhf_jax.models.pretrained import load_pretrained, read_config, save_pretrained

FIXTURES = Path(__file__).parent / "fixtures"
CAUSAL = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/config.json")
    if "ForSequenceClassification" not in path.read_text(encoding="utf-8")
)


def stored_json(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def config_of(name):
    return from_json(stored_json(name), name)


@functools.cache
def loaded(name):
    return load_pretrained(FIXTURES / name)


def all_tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_the_reference_implementation(name):
    config, params = loaded(name)
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = jax.jit(Transformer(config).apply)({"params": params}, expected["tokens"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_was_imported_is_exported_byte_for_byte(name, tmp_path):
    config, params = loaded(name)
    save_pretrained(tmp_path / "out", config, params, shard_bytes=20_000)
    before, after = all_tensors(FIXTURES / name), all_tensors(tmp_path / "out")
    renamed = {"lm_head.weight": "embed_out.weight"} if config.family == "gpt_neox" else {}
    before = {renamed.get(key, key): value for key, value in before.items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes() and value.shape == after[key].shape, key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert read_config(tmp_path / "out") == config_of(name)


def test_every_family_has_a_fixture_tied_and_untied():
    seen = {(config_of(name).family, config_of(name).tie_embeddings) for name in CAUSAL}
    assert {family for family, _ in seen} == set(FAMILIES)
    untied_alike = {("gemma2", False)}  # as gemma3_text
    assert {(family, tied) for family in FAMILIES for tied in (True, False)} - seen == untied_alike


# config.json


@pytest.mark.parametrize("name", CAUSAL)
def test_a_config_survives_the_trip_to_json_and_back(name):
    config = config_of(name)
    again = from_json(json.loads(json.dumps(to_json(config))), name)
    assert again == config


def test_a_config_of_this_library_is_a_llama():
    config = TransformerConfig(vocab_size=100)
    assert from_json(to_json(config), "") == config


def test_an_old_llama_config_means_what_a_new_one_does():
    new = stored_json("llama_llama3")
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    scaling = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    old.update(rope_theta=500.0, rope_scaling=scaling, torch_dtype="float32", head_dim=8)
    assert from_json(old, "") == from_json(new, "")
    scaling = {"type": "linear", "factor": 2.5}  # older still
    old.update(rope_scaling=scaling, head_dim=None)
    assert from_json(old, "").rope_scaling == RopeScaling("linear", 2.5)
    assert from_json(old, "").head_dim == 6


def test_an_old_gemma3_config_means_what_a_new_one_does():
    new = stored_json("gemma3_text")
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    old.update(
        rope_theta=900.0,
        rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
        sliding_window_pattern=6,
    )
    assert from_json(old, "") == from_json(new, "")
    assert from_json(new, "").windows == (4, 4, 4, 4, 4, 0)


def test_an_old_gpt_neox_config_means_what_a_new_one_does():
    new = stored_json("gpt_neox")
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "attention_bias")}
    old.update(rotary_pct=0.4, rotary_emb_base=500)
    assert from_json(old, "") == from_json(new, "")
    assert from_json(new, "").rotary_dims == 4


def test_windows_of_old_qwen2_configs_start_at_a_layer():
    old = {key: value for key, value in stored_json("qwen2").items() if key != "layer_types"}
    assert from_json(old, "").windows == (0, 5, 5)
    assert from_json({**old, "use_sliding_window": False}, "").windows == ()


def test_the_first_gemma_files_say_gelu_and_mean_its_tanh_form():
    old = {**stored_json("gemma"), "hidden_act": "gelu"}
    assert from_json(old, "").activation == "gelu_tanh"


def test_gemma2_softcaps_are_off_where_they_are_null():
    off = {**stored_json("gemma2"), "attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert (from_json(off, "").attention_softcap, from_json(off, "").logit_softcap) == (0.0, 0.0)
    absent = {key: value for key, value in off.items() if "softcapping" not in key}
    assert (from_json(absent, "").attention_softcap, from_json(absent, "").logit_softcap) == (50.0, 30.0)


def test_yarn_attention_follows_the_paper_unless_given():
    scaling = from_json(stored_json("llama_yarn"), "").rope_scaling
    assert scaling.attention_factor == pytest.approx(1 + 0.1 * np.log(4.0))
    given = stored_json("llama_yarn")
    given["rope_parameters"]["attention_factor"] = 0.5
    assert from_json(given, "").rope_scaling.attention_factor == 0.5
    given["rope_parameters"].update(attention_factor=None, mscale=2.0, mscale_all_dim=1.0)
    expected = (1 + 0.2 * np.log(4.0)) / (1 + 0.1 * np.log(4.0))
    assert from_json(given, "").rope_scaling.attention_factor == pytest.approx(expected)


REFUSED = {
    "no model_type": ({"model_type": None}, "has no model_type: give a checkpoint of one of gpt2, gpt_neox, llama"),
    "unknown": ({"model_type": "mamba"}, 'model_type "mamba" is not supported: give a checkpoint of one of gpt2'),
    "experts": ({"model_type": "mixtral", "num_local_experts": 8}, '"mixtral" is a mixture of experts'),
    "qwen experts": ({"model_type": "qwen3_moe"}, '"qwen3_moe" is a mixture of experts'),
    "encoder": ({"model_type": "roberta"}, '"roberta" is an encoder'),
    "both": ({"model_type": "t5", "is_encoder_decoder": True}, '"t5" is an encoder-decoder'),
    "vision": ({"model_type": "gemma3", "vision_config": {}}, '"gemma3" is a multimodal model'),
    "architecture": (
        {"architectures": ["LlamaForTokenClassification"]},
        "LlamaForTokenClassification is not supported: give LlamaForCausalLM",
    ),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq)"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope type "dynamic" is not supported'),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, 'rope type "longrope" is not supported'),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "the rotary scaling has no 'factor'"),
    "heads": ({"num_attention_heads": 5}, "F/config.json: model.heads 5 is no multiple of model.kv_heads 2"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for llama"),
    "activation": ({"hidden_act": "quick_gelu"}, 'hidden_act "quick_gelu" is not supported'),
    "size": ({"hidden_size": None}, "has no hidden_size: add it"),
    "feed-forward": ({"intermediate_size": None}, "has no intermediate_size: add it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        from_json({**stored_json("llama"), **changes}, "F/config.json")
    assert message in str(error.value) and "F/config.json" in str(error.value)


REFUSED_OF_FAMILIES = {
    "gpt2 inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "gpt2 cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "layer type": ("qwen2", {"layer_types": ["chunked_attention"] * 3}, 'layer_types has "chunked_attention"'),
    "layer count": ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    "mistral mix": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types mixes windows, which mistral does not",
    ),
    "local rope": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        'rope type "linear" in layers with a window',
    ),
    "nested rope": (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters differ by layer type",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OF_FAMILIES)
def test_a_familys_variants_are_refused_by_name(case):
    name, changes, message = REFUSED_OF_FAMILIES[case]
    with pytest.raises(UserError) as error:
        from_json({**stored_json(name), **changes}, "F/config.json")
    assert message in str(error.value)


def test_reorder_and_upcast_changes_no_mathematics():
    assert from_json({**stored_json("gpt2"), "reorder_and_upcast_attn": True}, "") == config_of("gpt2")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"windows": (4, 4)}, "model.windows=[4, 4]"),
        ({"o_bias": False}, "model.qkv_bias=True"),
        ({"embedding_scale": 2.0, "logit_softcap": 3.0}, "model.embedding_scale=2.0 and model.logit_softcap=3.0"),
    ],
)
def test_a_config_that_its_family_cannot_say_is_refused_by_field(changes, named):
    with pytest.raises(UserError) as error:
        to_json(dataclasses.replace(config_of("llama"), **changes))
    assert named in str(error.value)


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match='model.family is "bloom"'):
        to_json(dataclasses.replace(config_of("llama"), family="bloom"))


# Tensors


@pytest.mark.parametrize("name", CAUSAL)
def test_stored_tensors_hold_every_leaf_once(name):
    config = config_of(name)
    leaves = base_leaves(config)
    wanted = {(leaf, None) for leaf in leaves if leaf != "layers"}
    wanted |= {(leaf, i) for leaf in leaves["layers"] for i in range(config.layers)}
    pieces = [(piece.leaf, piece.layer) for parts in stored_tensors(config).values() for piece in parts]
    assert len(pieces) == len(set(pieces)) and set(pieces) == wanted


LAYOUTS = {
    "plain": Layout(),
    "transposed": Layout(transposed=True),
    "fused": Layout(part=1, parts=3),
    "interleaved": Layout(transposed=True, part=2, parts=3, block=4),
}


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_slice_of_a_leaf_is_read_from_its_stored_tensor(layout, chunk, monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.families.CHUNK", chunk)
    leaf = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    stored = np.full(layout.shape(leaf.shape), np.nan, np.float32)
    layout.write(stored, leaf)
    assert np.isfinite(stored).sum() == leaf.size  # the other parts are untouched
    for top, bottom, left, right in [(0, 5, 0, 12), (1, 4, 3, 9), (2, 3, 11, 12), (0, 5, 5, 6)]:
        got = layout.read(stored, ((top, bottom), (left, right)), leaf.shape, np.float16)
        np.testing.assert_array_equal(got, leaf[top:bottom, left:right].astype(np.float16))


def test_a_fused_bias_is_read_like_its_weight():
    layout, leaf = Layout(part=1, parts=3, block=2), np.arange(6, dtype=np.float32)
    stored = np.zeros(layout.shape(leaf.shape), np.float32)
    layout.write(stored, leaf)
    np.testing.assert_array_equal(stored.reshape(3, 3, 2)[:, 1].ravel(), leaf)
    np.testing.assert_array_equal(layout.read(stored, ((1, 5),), leaf.shape, np.float32), leaf[1:5])
